"""The runs of a record: what was measured when, and each run's notes."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from calipers.record import rows
from calipers.record.chain import TABLES, Chain
from calipers.record.database import Database
from calipers.record.evidence import Run
from calipers.record.schema import now

_PUT_RUN = f"""insert into run values ({", ".join("?" * 11)}) on conflict (id) do update set
    notes = excluded.notes"""


class Runs(Database):
    """The part of a record that keeps its runs.

    Runs that begin here are filed with the command line `argv`.
    """

    argv: tuple[str, ...] = ()

    def begin(self, run: Run) -> Run:
        """Keep a run, and return it with its number.

        A run that has no time yet begins now.
        """
        if not run.time:
            run = dataclasses.replace(run, time=now(), argv=self.argv)
        with self._writing() as chain:
            run = dataclasses.replace(run, number=self._next("run"))
            self._put_run(chain, run)
        return run

    def note(self, run: int, key: str, value: Any) -> None:
        """Keep a note of a run, in place of an earlier one under the same key."""
        held = self.run(run)
        if key not in held.notes or held.notes[key] != json.loads(json.dumps(value)):
            with self._writing() as chain:
                held = self.run(run)
                notes = {**held.notes, key: value}
                self._put_run(chain, dataclasses.replace(held, notes=notes))

    def _put_run(self, chain: Chain, run: Run) -> None:
        row = rows.row_of_run(run)
        self._db.execute(_PUT_RUN, (row[0], self._id(run.question, make=True), *row[2:]))
        chain.add("run", [row])

    def run(self, number: int) -> Run:
        """Return the run of that number as it stands now."""
        return self._runs("where r.id = ?", number)[0]

    def runs(self, fingerprint: str) -> list[Run]:
        """Return the runs that asked a question, oldest first."""
        return self._runs("where q.text = ?", fingerprint)

    def _runs(self, where: str, *parameters: str | int) -> list[Run]:
        found = self._read(f"{TABLES['run']} {where} order by r.id", *parameters)
        return [rows.run(row) for row in found]
