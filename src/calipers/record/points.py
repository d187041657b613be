"""The points of a record: small inputs by value, large ones by digest."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from calipers.record import rows
from calipers.record.chain import Chain
from calipers.record.database import Database
from calipers.record.evidence import Point

_PUT_POINT = f"""insert into point values ({", ".join("?" * 9)}) on conflict (id) do update set
    radius = excluded.radius, digest = excluded.digest, array = excluded.array"""
_HELD = """select p.id, n.text, p.position, p.label, p.target, p.radius, p.digest, p.array
    from point p join name n on n.id = p.name where p.question = ?"""


class Points(Database):
    """The part of a record that keeps the points of its questions."""

    def points(self, fingerprint: str) -> list[Point]:
        """Return the question's points by position."""
        found = self._read(f"{_HELD} order by p.position, n.text", self._id(fingerprint))
        return [rows.point(row[1:]) for row in found]

    def keep_inputs(self, fingerprint: str, inputs: Mapping[str, NDArray[Any]]) -> None:
        """Keep the inputs of these points by value, whatever their size.

        A witness can be replayed only together with the input that it belongs to.
        """
        question = self._id(fingerprint)
        with self._writing() as chain:
            put = list[rows.Row]()
            for name, array in inputs.items():
                found = self._db.execute(f"{_HELD} and n.text = ?", (question, name)).fetchall()
                for number, *held in found:
                    if held[-1] is None:
                        p = dataclasses.replace(rows.point(tuple(held)), array=array)
                        put.append(rows.row_of_point(number, fingerprint, p, whole=True))
            self._put_points(chain, question, put)

    def _place(self, chain: Chain, fingerprint: str, points: Sequence[Point]) -> None:
        """Keep points that are new, and the radius of those that are not."""
        if not points:
            return
        question, start, fresh = self._id(fingerprint), self._next("point"), dict[str, Point]()
        sql = "select n.text, p.id, p.radius from point p join name n on n.id = p.name"
        found = self._db.execute(f"{sql} where p.question = ?", (question,))
        held = {name: (number, radius) for name, number, radius in found}
        moved = dict[int, float]()
        for p in points:
            if p.name not in held:
                fresh.setdefault(p.name, p)
            elif held[p.name][1] != float(p.radius):
                moved[held[p.name][0]] = float(p.radius) + 0.0
        put = [rows.row_of_point(start + i, fingerprint, p) for i, p in enumerate(fresh.values())]
        for number, radius in moved.items():
            _, *before = self._db.execute(f"{_HELD} and p.id = ?", (question, number)).fetchone()
            put.append((number, fingerprint, *before[:4], radius, *before[5:]))
        self._put_points(chain, question, put)

    def _put_points(self, chain: Chain, question: int, put: Sequence[rows.Row]) -> None:
        ids = self._ids_of((row[2] for row in put), make=True)
        self._db.executemany(_PUT_POINT, [(r[0], question, ids[r[2]], *r[3:]) for r in put])
        chain.add("point", put)
