"""The record of evidence, an append-only SQLite file.

Nothing that was admitted is lost: each write is one transaction (`database`). A fact is identified
by question, point, kind, tool and radius, so that adding it again changes nothing, and merging two
files means inserting the rows of one into the other. A chain of digests covers all rows (`chain`).
"""

from __future__ import annotations

import dataclasses
import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from calipers.errors import CalipersError, RecordError
from calipers.record import rows
from calipers.record.chain import TABLES, Chain, Check, Trust, altered, held_head
from calipers.record.evidence import Evidence, Model, Point, Question, Run
from calipers.record.packing import unpack
from calipers.record.points import Points
from calipers.record.runs import Runs
from calipers.record.schema import VERSION as SCHEMA_VERSION
from calipers.record.schema import now

__all__ = ["SCHEMA_VERSION", "Key", "Record", "making_sense"]

Key = tuple[str, str, str, float]
_PUT_FACT = f"insert into evidence values ({', '.join('?' * 17)}) on conflict do nothing"
_PUT_QUESTION = """insert into question values (?, ?, ?, ?, ?) on conflict (id) do update set
    title = excluded.title, facts = excluded.facts, data = excluded.data"""
_STANDING = "not exists (select 1 from passed p where p.fact = evidence.id and p.over)"


class Record(Points, Runs):
    """The record of one or more questions: points, runs and admitted evidence.

    Args:
        path: File of the record; it is created when it is first written to. None keeps the record
            in memory.
        read_only: Leave the file as it is. A record of an earlier version is then brought up to
            date in memory alone.
        argv: The command line, which runs that begin here are filed with.

    Returns:
        An open ledger, which is also a context manager that closes the file.

    Raises:
        RecordError: The file is not a record, was written by a newer calipers or is damaged; its
            folder does not exist; or it is to be read only and does not exist.

    Example:
        >>> from calipers.record.evidence import Evidence, Point, Question
        >>> from calipers.record.record import Record
        >>> with Record() as ledger:
        ...     ledger.ask(Question("q1", "my model"), [Point("a", 0, 3, 0.1, None)])
        ...     ledger.append("q1", [Evidence("a", "certificate", "CROWN()", 0.01)])
        ...     [(fact.kind, fact.radius) for fact in ledger.evidence("q1")]
        [('certificate', 0.01)]
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        read_only: bool = False,
        argv: Sequence[str] = (),
    ) -> None:
        self.acquainted: set[str] = set()  # digests of models recognised since the file was opened
        self._trust: tuple[object, Trust] | None = None
        super().__init__(path, read_only=read_only)
        self.argv = tuple(argv)

    def ask(self, question: Question, points: Iterable[Point]) -> None:
        """Register a question and its points.

        Both may be known already: then the facts and radii of the latest call replace the earlier
        ones (a verdict is a reading of the bracket at a radius), and positions stay.
        """
        with self._writing() as chain:
            self._ask(chain, question)
            self._place(chain, question.fingerprint, list(points))

    def _ask(self, chain: Chain, question: Question) -> None:
        sql = "select id, fingerprint, title, facts, data from question where fingerprint = ?"
        held = self._db.execute(sql, (question.fingerprint,)).fetchone()
        number = held[0] if held else self._next("question")
        row = rows.row_of_question(number, question)
        if held and row[4] is None:  # what is known as data stays
            row = (*row[:4], held[4])
        if row != held:
            self._db.execute(_PUT_QUESTION, row)
            chain.add("question", [row])
        self._id(question.fingerprint, make=True)

    def append(self, fingerprint: str, evidence: Iterable[Evidence], *, run: int = 0) -> None:
        """Store facts of a run in one transaction.

        A fact that is stored already is skipped.
        """
        evidence = list(evidence)
        if not evidence:
            return
        with self._writing() as chain:
            self._insert(chain, fingerprint, evidence, run)

    def _insert(
        self, chain: Chain, fingerprint: str, evidence: Sequence[Evidence], run: int
    ) -> None:
        question, start = self._id(fingerprint, make=True), self._next("evidence")
        put = [rows.row_of(start + i, fingerprint, e, run) for i, e in enumerate(evidence)]
        texts = dict.fromkeys(text for e in evidence for text in (e.point, e.tool))
        ids, before = self._ids_of(texts, make=True), self._db.total_changes
        self._db.executemany(
            _PUT_FACT,
            [(r[0], question, ids[r[2]], r[3], ids[r[4]], *r[5:]) for r in put],
        )
        if self._db.total_changes - before < len(put):
            sql = "select id from evidence where id >= ?"
            new = {number for (number,) in self._db.execute(sql, (start,))}
            put = [row for row in put if row[0] in new]
        chain.add("evidence", put)

    def finish(
        self,
        fingerprint: str,
        tried: Iterable[Evidence],
        found: Iterable[Evidence],
        *,
        run: int = 0,
    ) -> set[Key]:
        """Note that a tool has come to the end of its block.

        Args:
            fingerprint: The question.
            tried: The attempts: one fact for each point and radius of the block.
            found: The facts that this pass handed over; of what the tool handed over at these
                points and radii, only these count from now on.
            run: Number of the run.

        An earlier pass over these points at these radii, cut short by Ctrl-C or a kill, may have
        left other findings in the record. They stay in the file but are disregarded, so that a
        resumed run ends with the same brackets as one that was never interrupted.

        Returns:
            The keys of the facts that are disregarded.
        """
        tried = list(tried)
        keys = {e.key for e in found}
        with self._writing() as chain:
            self._insert(chain, fingerprint, tried, run)
            earlier = self._handed_over(fingerprint, tried)
            left = {key: number for key, number in earlier.items() if key not in keys}
            back = self._passed_over(fingerprint, keys)
            for key, number, over in (
                *((key, number, 1) for key, number in sorted(left.items())),
                *((key, number, 0) for key, number in back.items()),
            ):
                sql = (
                    "insert into passed values (?, ?) on conflict do update set over = "
                    "excluded.over where over != excluded.over"
                )
                if self._db.execute(sql, (number, over)).rowcount:
                    chain.add("passed", [(number, over, *key[:3])])
        return set(left)

    def _handed_over(self, fingerprint: str, tried: Sequence[Evidence]) -> dict[Key, int]:
        """Return the facts that tools handed over at these points and radii."""
        asked = {(e.tool, e.point): float(e.radius) for e in tried}
        ids, names, found = self._ids_of(e.point for e in tried), self._names(), dict[Key, int]()
        for tool in {e.tool for e in tried}:
            points = json.dumps([ids[e.point] for e in tried if e.tool == tool])
            sql = (
                "select id, point, kind, radius, asked from evidence where question = ? and tool = "
                "? and asked is not null and point in (select value from json_each(?))"
            )
            given = self._id(fingerprint), self._id(tool), points
            for number, point, kind, radius, at in self._db.execute(sql, given):
                if asked[tool, names[point]] == at:
                    found[names[point], kind, tool, radius] = number
        return found

    def _passed_over(self, fingerprint: str, keys: set[Key]) -> dict[Key, int]:
        """Return which of these facts are disregarded because of an earlier pass."""
        if not self._db.execute("select 1 from passed where over").fetchone():
            return {}
        sql = (
            "select e.id from evidence e join passed p on p.fact = e.id where p.over and "
            "e.question = ? and e.point = ? and e.kind = ? and e.tool = ? and e.radius = ?"
        )
        found = dict[Key, int]()
        for point, kind, tool, radius in sorted(keys):
            given = (
                self._id(fingerprint),
                self._id(point),
                kind,
                self._id(tool),
                rows.stored(radius),
            )
            for (number,) in self._db.execute(sql, given):
                found[point, kind, tool, radius] = number
        return found

    def decide(self, fingerprint: str, scope: str, key: str, make: Callable[[], Any]) -> Any:
        """Return what was decided under this key; decide now if nothing was.

        Whatever depends on a clock, on memory or on a measured rate is decided here, so that a
        resumed run decides in the same way. If two processes decide at once, the first decision
        holds for both.

        Args:
            fingerprint: The question.
            scope: Name of the run: its plan, seed, points and radii.
            key: Name of the decision.
            make: Makes the decision: any value that JSON holds.

        Returns:
            The value as JSON gives it back.
        """
        sql = "select value from decision where question = ? and scope = ? and key = ?"
        held = self._read(sql, fingerprint, scope, key)
        if not held:
            value = json.dumps(make(), sort_keys=True)
            with self._writing() as chain:
                row = (self._next("decision"), fingerprint, scope, key, value)
                put = "insert into decision values (?, ?, ?, ?, ?) on conflict do nothing"
                if self._db.execute(put, row).rowcount:
                    chain.add("decision", [row])
            held = self._read(sql, fingerprint, scope, key)
        return json.loads(held[0][0])

    def meet(self, model: Model) -> None:
        """Keep what a model is recognised by; the first entry stands."""
        with self._writing() as chain:
            row = rows.row_of_model(self._next("model"), model)
            put = "insert into model values (?, ?, ?, ?, ?, ?, ?, ?) on conflict do nothing"
            if self._db.execute(put, row).rowcount:
                chain.add("model", [row])

    def models(self) -> list[Model]:
        """Return the models that were measured, oldest first.

        Those of records before version 2 are not known.
        """
        return [rows.model(row[1:]) for row in self._read(f"{TABLES['model']} order by id")]

    def note_check(
        self, fingerprint: str, witnesses: int, certificates: int, failures: int
    ) -> None:
        """Keep that a question's evidence was replayed now, with what result."""
        with self._writing() as chain:
            sql = "select count(*) from evidence where question = ?"
            facts = self._db.execute(sql, (self._id(fingerprint),)).fetchone()[0]
            number = self._db.execute("select count(*) from checked").fetchone()[0] + 1
            row = (number, fingerprint, now(), witnesses, certificates, failures, facts)
            self._db.execute("insert into checked values (?, ?, ?, ?, ?, ?, ?)", row)
            chain.add("checked", [row])

    def trust(self) -> Trust:
        """Return whether the record was altered, and when it was replayed.

        Cost: every row is read and hashed, but not again as long as only this ledger writes: then
        rows and chain were written together. Raises `RecordError` for a damaged file.
        """
        sql = (
            "select q.text, count(*) from evidence e join name q on q.id = e.question group by "
            "q.text order by q.text"
        )
        counts = tuple(self._read(sql))
        state = self._state()
        if self._trust is not None and self._trust[0] == state:
            return self._trust[1]
        wrong: tuple[str, ...] = ()
        if self._sound != state:
            try:
                wrong = altered(self._db)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise RecordError(
                    f"{self.path} is damaged ({error}). Take a copy of the file, or measure again "
                    "into a new one."
                ) from error
            self._sound = None if wrong else state
        self._trust = (state, self._trusted(wrong, counts))
        return self._trust[1]

    def _trusted(self, wrong: tuple[str, ...], counts: tuple[tuple[str, int], ...]) -> Trust:
        meta = dict(self._read("select name, value from meta"))
        sql = (
            "select question, at, witnesses, certificates, failures, facts from checked order by "
            "number"
        )
        checks = tuple(Check(*row) for row in self._read(sql))
        head, facts = held_head(self._db)[1].hex(), sum(n for _, n in counts)
        return Trust(wrong, facts, int(meta.get("unchained", 0)), head, checks, counts)

    def questions(self) -> list[Question]:
        """Return the questions, oldest first."""
        sql = "select fingerprint, title, facts, data from question order by id"
        return [rows.question(row) for row in self._read(sql)]

    def evidence(self, fingerprint: str) -> list[Evidence]:
        """Return every fact admitted for the question, in order of admission.

        Arrays are left out (`witness` reads those), and so are facts that are disregarded
        (`finish`).
        """
        sql = f"select {rows.FACT} from evidence where question = ? and {_STANDING} order by id"
        found, names = self._read(sql, self._id(fingerprint)), self._names()
        return [rows.fact(row, names) for row in found]

    def witness(self, fingerprint: str, fact: Evidence) -> NDArray[Any] | None:
        """Return the stored array of a fact, None if it has none.

        For a certificate these are the bytes of its proof file, as uint8.
        """
        sql = (
            "select array from evidence where question = ? and point = ? and kind = ? and tool = ? "
            "and radius = ?"
        )
        key = self._id(fingerprint), self._id(fact.point), fact.kind, self._id(fact.tool)
        found = self._read(sql, *key, rows.stored(fact.radius))
        return None if not found or found[0][0] is None else unpack(found[0][0])

    def merge(self, other: Record) -> None:
        """Add all that another record holds.

        Two half runs become a whole one. New points are placed behind those that are held. Raises
        `RecordError` where the other record was altered.
        """
        if other.trust().altered:
            raise RecordError(
                f"{other.path} was altered after it was written "
                f"({'; '.join(other.trust().altered)}): it is not taken in"
            )
        for model in other.models():
            self.meet(model)
        for question in other.questions():
            fingerprint = question.fingerprint
            held = {p.name for p in self.points(fingerprint)}
            fresh = [p for p in other.points(fingerprint) if p.name not in held]
            moved = [dataclasses.replace(p, position=len(held) + i) for i, p in enumerate(fresh)]
            self.ask(question, moved)
            runs = self._taken_in(other.runs(fingerprint))
            facts = [
                dataclasses.replace(e, array=other.witness(fingerprint, e), run=runs.get(e.run, 0))
                for e in other.evidence(fingerprint)
            ]
            self.append(fingerprint, facts)

    def _taken_in(self, others: Sequence[Run]) -> dict[int, int]:
        """Keep the runs of another record; return the number that each has here.

        Runs that are known here are not added again.
        """
        numbers = dict[int, int]()
        for run in others:
            alike = (
                held.number
                for held in self.runs(run.question)
                if dataclasses.replace(held, number=0) == dataclasses.replace(run, number=0)
            )
            numbers[run.number] = next(alike, 0) or self.begin(run).number
        return numbers


@contextmanager
def making_sense(ledger: Record) -> Iterator[None]:
    """Turn errors caused by an altered record into a `RecordError`.

    Rows that make no sense may raise anything. If the record is as it was written, the error is a
    bug, and is raised as it is.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        if isinstance(error, CalipersError):
            raise
        try:
            wrong = "; ".join(ledger.trust().altered)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            wrong = "not even its chain can be read"
        if not wrong:
            raise
        told = f"{type(error).__name__}: {str(error)[:200]}"
        raise RecordError(
            f"{ledger.path} was altered after it was written ({wrong}), and what it holds makes no "
            f"sense ({told})"
        ) from error
