"""Where is the evidence kept, so that nothing admitted is ever lost? One SQLite file, append-only.

Every append is one transaction in write-ahead mode with full synchronisation: after `kill -9` the file holds every fact whose append returned.
A fact is identified by question, point, kind, tool and radius, so adding it again changes nothing, and merging two files is inserting one's rows
into the other.
"""

from __future__ import annotations

import io
import json
import sqlite3
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.errors import RecordError
from calipers.record.evidence import Evidence, Point, Question

SCHEMA_VERSION = 1
_APPLICATION_ID = 0xCA11BE25 - (1 << 32)  # marks the file as ours; SQLite stores it as a signed 32-bit number
_SCHEMA = """
create table if not exists question (fingerprint text primary key, title text not null, facts text not null);
create table if not exists point (question text not null, name text not null, position integer not null, label integer not null, radius real not null,
    array blob not null, primary key (question, name));
create table if not exists evidence (question text not null, point text not null, kind text not null, tool text not null, radius real not null,
    margin real, guarantee text not null, prediction integer not null, forwards integer not null, backwards integer not null, seconds real not null,
    note text not null, array blob, primary key (question, point, kind, tool, radius));
"""
_DECISIONS = """create table if not exists decision (question text not null, scope text not null, key text not null, value text not null,
    primary key (question, scope, key))"""
_COLUMNS = "point, kind, tool, radius, margin, guarantee, prediction, forwards, backwards, seconds, note"
_NO_RADIUS = -1.0  # SQLite keeps NaN as null, which a primary key cannot hold


class Ledger:
    """The record of one or more questions: points and admitted evidence. `path=None` keeps it in memory."""

    def __init__(self, path: str | Path | None = None, *, read_only: bool = False) -> None:
        self.path = None if path is None else Path(path)
        if read_only and (self.path is None or not self.path.exists()):
            raise RecordError(f"no record at {path}: nothing to read. Measure first: calipers measure --record {path}")
        if self.path is not None and not self.path.absolute().parent.is_dir():
            raise RecordError(f"there is no folder {self.path.parent} to keep the record in: make it first")
        self._made: sqlite3.Connection | None = None
        if self.path is None or self.path.exists():
            self._connect()

    @property
    def _db(self) -> sqlite3.Connection:
        """The open file. One that does not exist is made only when something is asked: a question that is refused at the door leaves none."""
        return self._made or self._connect()

    def _connect(self) -> sqlite3.Connection:
        try:
            self._made = sqlite3.connect(":memory:" if self.path is None else str(self.path), timeout=30)
            self._prepare()
        except sqlite3.DatabaseError as error:
            self.close()
            told = "Give another file name, or remove it if it is not a calipers record."
            raise RecordError(f"{self.path} cannot be used as a record ({error}). {told}") from error
        return self._made

    def _prepare(self) -> None:
        known = self._db.execute("pragma application_id").fetchone()[0]
        tables = self._db.execute("select count(*) from sqlite_master").fetchone()[0]
        if tables and known != _APPLICATION_ID:
            raise RecordError(f"{self.path} is a database of another program, not a calipers record. Give another file name.")
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise RecordError(f"{self.path} was written by a newer calipers (record version {version}, this one reads {SCHEMA_VERSION}). Update calipers.")
        self._db.execute("pragma journal_mode = wal")
        self._db.execute("pragma synchronous = full")
        if not tables:
            self._db.executescript(f"begin; {_SCHEMA} pragma application_id = {_APPLICATION_ID}; pragma user_version = {SCHEMA_VERSION}; commit;")
        self._db.execute(_DECISIONS)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was appended stays."""
        if self._made is not None:
            self._made.close()

    def ask(self, question: Question, points: Iterable[Point]) -> None:
        """Register a question and its points. Both may be known already: then the facts and radii of the latest asking stand (a verdict is a reading
        of the bracket at a radius), and positions stay."""
        with self._db:
            facts = json.dumps(question.facts, sort_keys=True)
            sql = "insert into question values (?, ?, ?) on conflict do update set title = excluded.title, facts = excluded.facts"
            self._db.execute(sql, (question.fingerprint, question.title, facts))
            rows = [(question.fingerprint, p.name, p.position, p.label, p.radius, _pack(p.array)) for p in points]
            self._db.executemany("insert into point values (?, ?, ?, ?, ?, ?) on conflict do update set radius = excluded.radius", rows)

    def append(self, fingerprint: str, evidence: Iterable[Evidence]) -> None:
        """Store facts in one transaction; a fact that is there already is passed over."""
        with self._db:
            self._db.executemany(f"insert into evidence values ({', '.join('?' * 13)}) on conflict do nothing", [_row(fingerprint, e) for e in evidence])

    def decide(self, fingerprint: str, scope: str, key: str, make: Callable[[], Any]) -> Any:
        """Return what was decided under this key, or make the decision now and keep it: whoever resumes the run decides alike.

        For whatever a clock, a memory or a measured rate has a say in. `scope` names the run (its plan, seed, points and radii), `key` the decision; the value
        is anything that JSON holds, and comes back as JSON gives it. Of two processes that decide at once the first one's word stands for both.
        """
        held = self._read("select value from decision where question = ? and scope = ? and key = ?", fingerprint, scope, key)
        if not held:
            value = json.dumps(make(), sort_keys=True)
            with self._db:
                self._db.execute("insert into decision values (?, ?, ?, ?) on conflict do nothing", (fingerprint, scope, key, value))
            held = self._read("select value from decision where question = ? and scope = ? and key = ?", fingerprint, scope, key)
        return json.loads(held[0][0])

    def questions(self) -> list[Question]:
        """Return what was asked, oldest first."""
        rows = self._read("select fingerprint, title, facts from question order by rowid")
        return [Question(fingerprint, title, json.loads(facts)) for fingerprint, title, facts in rows]

    def points(self, fingerprint: str) -> list[Point]:
        """Return the question's points by position."""
        rows = self._read("select name, position, label, radius, array from point where question = ? order by position, name", fingerprint)
        return [Point(name, position, label, radius, _unpack(blob)) for name, position, label, radius, blob in rows]

    def evidence(self, fingerprint: str) -> list[Evidence]:
        """Return every fact admitted for the question, in order of admission, without arrays (`witness` reads those)."""
        rows = self._read(f"select {_COLUMNS} from evidence where question = ? order by rowid", fingerprint)
        return [_fact(row) for row in rows]

    def witness(self, fingerprint: str, fact: Evidence) -> NDArray[Any] | None:
        """Return the stored array of a fact (a certificate's proof file as bytes, uint8), or None if it has none."""
        key = (fingerprint, fact.point, fact.kind, fact.tool, _NO_RADIUS if np.isnan(fact.radius) else fact.radius)
        rows = self._read("select array from evidence where question = ? and point = ? and kind = ? and tool = ? and radius = ?", *key)
        return None if not rows or rows[0][0] is None else _unpack(rows[0][0])

    def _read(self, sql: str, *parameters: str | float) -> list[Any]:
        try:
            return self._db.execute(sql, parameters).fetchall()
        except sqlite3.DatabaseError as error:
            raise RecordError(f"{self.path} is damaged ({error}). Take a copy of the file, or measure again into a new one.") from error

    def merge(self, other: Ledger) -> None:
        """Add all that `other` holds: two half runs become one whole. New points are placed behind the ones held."""
        for question in other.questions():
            held = {p.name for p in self.points(question.fingerprint)}
            fresh = [p for p in other.points(question.fingerprint) if p.name not in held]
            start = len(held)
            moved = [Point(p.name, start + i, p.label, p.radius, p.array) for i, p in enumerate(fresh)]
            self.ask(question, moved)
            facts = other.evidence(question.fingerprint)
            self.append(question.fingerprint, [_with_array(e, other.witness(question.fingerprint, e)) for e in facts])


def _row(fingerprint: str, e: Evidence) -> tuple[Any, ...]:
    radius = _NO_RADIUS if np.isnan(e.radius) else float(e.radius)
    blob = None if e.array is None else _pack(e.array)
    numbers = (float(e.margin), e.guarantee, int(e.prediction), int(e.forwards), int(e.backwards), float(e.seconds))
    return (fingerprint, e.point, e.kind, e.tool, radius, *numbers, e.note, blob)


def _fact(row: tuple[Any, ...]) -> Evidence:
    point, kind, tool, radius, margin, guarantee, prediction, forwards, backwards, seconds, note = row
    radius = float("nan") if radius == _NO_RADIUS else radius
    margin = float("nan") if margin is None else margin
    return Evidence(point, kind, tool, radius, margin, guarantee, prediction, forwards, backwards, seconds, note)


def _with_array(e: Evidence, array: NDArray[Any] | None) -> Evidence:
    fields = {name: getattr(e, name) for name in Evidence.__dataclass_fields__}
    return Evidence(**{**fields, "array": array})


def _pack(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _unpack(blob: bytes) -> NDArray[Any]:
    array: NDArray[Any] = np.load(io.BytesIO(blob), allow_pickle=False)
    return array
