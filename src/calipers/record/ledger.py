"""Where is the evidence kept, so that nothing admitted is ever lost? One SQLite file, append-only.

Every append is one transaction in write-ahead mode with full synchronisation: after `kill -9` the
file holds every fact whose append returned. A fact is identified by question, point, kind, tool and
radius, so adding it again changes nothing, and merging two files is inserting one's rows into the
other. A chain of digests runs over all rows (see chain.py).
"""

from __future__ import annotations

import io
import json
import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calipers.errors import CalipersError, RecordError
from calipers.record.chain import Chain, Check, Trust, altered, held_head
from calipers.record.evidence import Evidence, Model, Point, Question
from calipers.record.schema import APPLICATION_ID, now, prepare
from calipers.record.schema import VERSION as SCHEMA_VERSION

Key = tuple[str, str, str, float]
_COLUMNS = (
    "point, kind, tool, radius, margin, guarantee, prediction, forwards, backwards, seconds, note"
)
_NO_RADIUS = -1.0  # SQLite keeps NaN as null, which a primary key cannot hold
_KEY = "question = ? and point = ? and kind = ? and tool = ? and radius = ?"
_STANDING = """not exists (select 1 from passed p where p.question = evidence.question
    and p.point = evidence.point and p.kind = evidence.kind and p.tool = evidence.tool
    and p.radius = evidence.radius and p.over)"""


class Ledger:
    """The record of one or more questions: points and admitted evidence. `path=None` keeps it in
    memory; `read_only` leaves the file as it is.
    """

    def __init__(self, path: str | Path | None = None, *, read_only: bool = False) -> None:
        self.path = None if path is None else Path(path)
        if read_only and (self.path is None or not self.path.exists()):
            raise RecordError(
                f"no record at {path}: nothing to read. Measure first: calipers measure --record "
                f"{path}"
            )
        if self.path is not None and not self.path.absolute().parent.is_dir():
            raise RecordError(
                f"there is no folder {self.path.parent} to keep the record in: make it first"
            )
        self.read_only = read_only
        self.acquainted: set[str] = set()  # models that were known again since the file was opened
        self._trust: tuple[object, Trust] | None = None
        self._made: sqlite3.Connection | None = None
        if self.path is None or self.path.exists():
            self._connect()

    @property
    def _db(self) -> sqlite3.Connection:
        """The open file. One that does not exist is made only when something is asked: a question
        that is refused at the door leaves none.
        """
        return self._made or self._connect()

    def _connect(self) -> sqlite3.Connection:
        try:
            self._made = self._opened()
            self._prepare(self._made)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self.close()
            told = "Give another file name, or remove it if it is not a calipers record."
            raise RecordError(
                f"{self.path} cannot be used as a record ({error}). {told}"
            ) from error
        return self._made

    def _opened(self) -> sqlite3.Connection:
        if self.path is None or not self.read_only:
            return sqlite3.connect(
                ":memory:" if self.path is None else str(self.path),
                timeout=30,
                isolation_level=None,
            )
        # Readers of a file in write-ahead mode keep a list beside it; where none may be written,
        # nobody else writes either.
        writable = os.access(self.path, os.W_OK) and os.access(self.path.resolve().parent, os.W_OK)
        beside = self.path.with_name(f"{self.path.name}-wal").exists()
        mode = "rw" if writable else "ro" if beside else "ro&immutable=1"
        db = sqlite3.connect(
            f"{self.path.resolve().as_uri()}?mode={mode}",
            uri=True,
            timeout=30,
            isolation_level=None,
        )
        db.execute("pragma query_only = on")
        return db

    def _prepare(self, db: sqlite3.Connection) -> None:
        known = db.execute("pragma application_id").fetchone()[0]
        tables = db.execute("select count(*) from sqlite_master").fetchone()[0]
        if tables and known != APPLICATION_ID:
            raise RecordError(
                f"{self.path} is a database of another program, not a calipers record. Give "
                "another file name."
            )
        version = db.execute("pragma user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise RecordError(
                f"{self.path} was written by a newer calipers (record version {version}, this one "
                f"reads {SCHEMA_VERSION}). Update calipers."
            )
        self._chained = version >= 2 or not self.read_only
        if self.read_only:
            if not tables:
                raise RecordError(
                    f"{self.path} is empty: nothing to read. Measure first: calipers measure "
                    f"--record {self.path}"
                )
            return
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")
        if version < SCHEMA_VERSION:
            prepare(db)

    @contextmanager
    def _writing(self) -> Iterator[Chain]:
        """Hold the file alone, and write all or nothing: rows, and their links of the chain."""
        self._db.execute("begin immediate")
        try:
            chain = Chain(self._db)
            began = chain.count
            yield chain
            if chain.count != began:
                chain.seal()
            self._db.execute("commit")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was appended stays."""
        if self._made is not None:
            self._made.close()

    def ask(self, question: Question, points: Iterable[Point]) -> None:
        """Register a question and its points. Both may be known already: then the facts and radii
        of the latest asking stand (a verdict is a reading of the bracket at a radius), and
        positions stay.
        """
        asked = (question.fingerprint, question.title, json.dumps(question.facts, sort_keys=True))
        with self._writing() as chain:
            held = self._db.execute(
                "select * from question where fingerprint = ?", (question.fingerprint,)
            ).fetchone()
            if held != asked:
                sql = (
                    "insert into question values (?, ?, ?) on conflict do update set title = "
                    "excluded.title, facts = excluded.facts"
                )
                self._db.execute(sql, asked)
                chain.add("question", asked)
            for p in points:
                row = self._db.execute(
                    "select * from point where question = ? and name = ?",
                    (question.fingerprint, p.name),
                ).fetchone()
                if row is None or row[4] != float(p.radius):
                    row = (
                        *(row[:4] if row else (question.fingerprint, p.name, p.position, p.label)),
                        float(p.radius),
                        row[5] if row else _pack(p.array),
                    )
                    self._db.execute(
                        "insert into point values (?, ?, ?, ?, ?, ?) on conflict do update set "
                        "radius = excluded.radius",
                        row,
                    )
                    chain.add("point", row)

    def append(self, fingerprint: str, evidence: Iterable[Evidence]) -> None:
        """Store facts in one transaction; a fact that is there already is passed over."""
        evidence = list(evidence)
        if not evidence:
            return
        with self._writing() as chain:
            self._insert(chain, fingerprint, evidence)

    def _insert(self, chain: Chain, fingerprint: str, evidence: Iterable[Evidence]) -> None:
        for row in (_row(fingerprint, e) for e in evidence):
            if self._db.execute(
                f"insert into evidence values ({', '.join('?' * 14)}) on conflict do nothing", row
            ).rowcount:
                chain.add("evidence", row)

    def finish(
        self, fingerprint: str, tried: Iterable[Evidence], found: Iterable[Evidence]
    ) -> set[Key]:
        """Note that a tool has come to the end of its block: the attempts `tried`, and of what it
        handed over on the way only the facts `found` count.

        Of an earlier pass over these points at these radii, cut short by Ctrl-C or a kill, other
        finds may be in the record. They stay there, but are passed over from now on, so that a run
        that was resumed ends with the brackets of one that was not. Returns the keys of those.
        """
        tried = list(tried)
        keys = {e.key for e in found}
        with self._writing() as chain:
            self._insert(chain, fingerprint, tried)
            left = set[Key]()
            for e in tried:
                sql = (
                    "select point, kind, tool, radius from evidence where question = ? and point = "
                    "? and tool = ? and asked = ?"
                )
                left |= {
                    key
                    for key in self._db.execute(
                        sql, (fingerprint, e.point, e.tool, float(e.radius))
                    )
                    if key not in keys
                }
            sql = (
                "insert into passed values (?, ?, ?, ?, ?, ?) on conflict do update set over = "
                "excluded.over where over != excluded.over"
            )
            back = [
                key
                for key in keys
                if self._db.execute(
                    f"select 1 from passed where {_KEY} and over", (fingerprint, *key)
                ).fetchone()
            ]
            for key, over in [*((k, 1) for k in sorted(left)), *((k, 0) for k in back)]:
                if self._db.execute(sql, (fingerprint, *key, over)).rowcount:
                    chain.add("passed", (fingerprint, *key, over))
        return left

    def decide(self, fingerprint: str, scope: str, key: str, make: Callable[[], Any]) -> Any:
        """Return what was decided under this key, or make the decision now and keep it: whoever
        resumes the run decides alike.

        For whatever a clock, a memory or a measured rate has a say in. `scope` names the run (its
        plan, seed, points and radii), `key` the decision; the value is anything that JSON holds,
        and comes back as JSON gives it. Of two processes that decide at once the first one's word
        stands for both.
        """
        held = self._read(
            "select value from decision where question = ? and scope = ? and key = ?",
            fingerprint,
            scope,
            key,
        )
        if not held:
            row = (fingerprint, scope, key, json.dumps(make(), sort_keys=True))
            with self._writing() as chain:
                if self._db.execute(
                    "insert into decision values (?, ?, ?, ?) on conflict do nothing", row
                ).rowcount:
                    chain.add("decision", row)
            held = self._read(
                "select value from decision where question = ? and scope = ? and key = ?",
                fingerprint,
                scope,
                key,
            )
        return json.loads(held[0][0])

    def meet(self, model: Model) -> None:
        """Keep what a program is known by; the first meeting stands."""
        texts = (json.dumps(model.circumstances, sort_keys=True), json.dumps(model.parts))
        row = (
            model.digest,
            model.name,
            model.met,
            *texts,
            _pack(model.points),
            _pack(model.logits),
        )
        with self._writing() as chain:
            if self._db.execute(
                "insert into model values (?, ?, ?, ?, ?, ?, ?) on conflict do nothing", row
            ).rowcount:
                chain.add("model", row)

    def models(self) -> list[Model]:
        """Return the programs that were measured, oldest first; those of records before version 2
        are not known.
        """
        rows = (
            self._read("select * from model order by rowid") if self._db and self._chained else []
        )
        return [
            Model(digest, name, met, json.loads(c), json.loads(parts), _unpack(x), _unpack(z))
            for digest, name, met, c, parts, x, z in rows
        ]

    def note_check(
        self, fingerprint: str, witnesses: int, certificates: int, failures: int
    ) -> None:
        """Keep that what the record says to a question was replayed now, and with what result."""
        with self._writing() as chain:
            facts = self._db.execute(
                "select count(*) from evidence where question = ?", (fingerprint,)
            ).fetchone()[0]
            number = self._db.execute("select count(*) from checked").fetchone()[0] + 1
            row = (number, fingerprint, now(), witnesses, certificates, failures, facts)
            self._db.execute("insert into checked values (?, ?, ?, ?, ?, ?, ?)", row)
            chain.add("checked", row)

    def trust(self) -> Trust:
        """Return whether the record is as it was written, and when it was replayed. Cost: every row
        is read and hashed; asked again only after changes.
        """
        counts = tuple(
            self._read(
                "select question, count(*) from evidence group by question order by question"
            )
        )
        facts = sum(n for _, n in counts)
        if not self._chained:
            return Trust(facts=facts, unchained=facts, counts=counts)
        state = (self._read("pragma data_version")[0][0], self._db.total_changes)
        if self._trust is None or self._trust[0] != state:
            meta = dict(self._read("select name, value from meta"))
            checks = self._read(
                "select question, at, witnesses, certificates, failures, facts from checked order "
                "by number"
            )
            try:
                wrong = altered(self._db)
            except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
                raise RecordError(
                    f"{self.path} is damaged ({error}). Take a copy of the file, or measure again "
                    "into a new one."
                ) from error
            head = held_head(self._db)[1].hex()
            self._trust = (
                state,
                Trust(
                    wrong,
                    facts,
                    int(meta.get("unchained", 0)),
                    head,
                    tuple(Check(*row) for row in checks),
                    counts,
                ),
            )
        return self._trust[1]

    def questions(self) -> list[Question]:
        """Return what was asked, oldest first."""
        rows = self._read("select fingerprint, title, facts from question order by rowid")
        return [
            Question(fingerprint, title, json.loads(facts)) for fingerprint, title, facts in rows
        ]

    def points(self, fingerprint: str) -> list[Point]:
        """Return the question's points by position."""
        rows = self._read(
            "select name, position, label, radius, array from point where question = ? order by "
            "position, name",
            fingerprint,
        )
        return [
            Point(name, position, label, radius, _unpack(blob))
            for name, position, label, radius, blob in rows
        ]

    def evidence(self, fingerprint: str) -> list[Evidence]:
        """Return every fact admitted for the question, in order of admission, without arrays
        (`witness` reads those); what was passed over (`finish`) is left out.
        """
        asked, standing = (", asked", _STANDING) if self._db and self._chained else ("", "1")
        rows = self._read(
            f"select {_COLUMNS}{asked} from evidence where question = ? and {standing} order by "
            "rowid",
            fingerprint,
        )
        return [_fact(row) for row in rows]

    def witness(self, fingerprint: str, fact: Evidence) -> NDArray[Any] | None:
        """Return the stored array of a fact (a certificate's proof file as bytes, uint8), or None
        if it has none.
        """
        key = (
            fingerprint,
            fact.point,
            fact.kind,
            fact.tool,
            _NO_RADIUS if np.isnan(fact.radius) else fact.radius,
        )
        rows = self._read(f"select array from evidence where {_KEY}", *key)
        return None if not rows or rows[0][0] is None else _unpack(rows[0][0])

    def _read(self, sql: str, *parameters: str | float) -> list[Any]:
        try:
            return self._db.execute(sql, parameters).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise RecordError(
                f"{self.path} is damaged ({error}). Take a copy of the file, or measure again "
                "into a new one."
            ) from error

    def merge(self, other: Ledger) -> None:
        """Add all that `other` holds: two half runs become one whole. New points are placed behind
        the ones held. Refuses a record that was altered.
        """
        if other.trust().altered:
            raise RecordError(
                f"{other.path} was altered after it was written "
                f"({'; '.join(other.trust().altered)}): it is not taken in"
            )
        for model in other.models():
            self.meet(model)
        for question in other.questions():
            held = {p.name for p in self.points(question.fingerprint)}
            fresh = [p for p in other.points(question.fingerprint) if p.name not in held]
            start = len(held)
            moved = [
                Point(p.name, start + i, p.label, p.radius, p.array) for i, p in enumerate(fresh)
            ]
            self.ask(question, moved)
            facts = other.evidence(question.fingerprint)
            self.append(
                question.fingerprint,
                [_with_array(e, other.witness(question.fingerprint, e)) for e in facts],
            )


def _row(fingerprint: str, e: Evidence) -> tuple[Any, ...]:
    radius = _NO_RADIUS if np.isnan(e.radius) else float(e.radius)
    blob = None if e.array is None else _pack(e.array)
    numbers = (
        float(e.margin),
        e.guarantee,
        int(e.prediction),
        int(e.forwards),
        int(e.backwards),
        float(e.seconds),
    )
    margin, *rest = numbers
    asked = None if np.isnan(e.asked) else float(e.asked)
    return (
        fingerprint,
        e.point,
        e.kind,
        e.tool,
        radius,
        None if np.isnan(margin) else margin,
        *rest,
        e.note,
        blob,
        asked,
    )


def _fact(row: tuple[Any, ...]) -> Evidence:
    (
        point,
        kind,
        tool,
        radius,
        margin,
        guarantee,
        prediction,
        forwards,
        backwards,
        seconds,
        note,
        *more,
    ) = row
    radius = float("nan") if radius == _NO_RADIUS else radius
    margin = float("nan") if margin is None else margin
    asked = float("nan") if not more or more[0] is None else more[0]
    return Evidence(
        point,
        kind,
        tool,
        radius,
        margin,
        guarantee,
        prediction,
        forwards,
        backwards,
        seconds,
        note,
        asked=asked,
    )


def _with_array(e: Evidence, array: NDArray[Any] | None) -> Evidence:
    fields = {name: getattr(e, name) for name in Evidence.__dataclass_fields__}
    return Evidence(**{**fields, "array": array})


def _pack(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _unpack(blob: bytes) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(io.BytesIO(blob), allow_pickle=False)
    except Exception as error:  # of odd bytes NumPy raises whatever its parser does
        raise RecordError(
            f"the record holds an array that cannot be read ({type(error).__name__}): it is "
            "damaged, or was altered"
        ) from error
    return array


@contextmanager
def making_sense(ledger: Ledger) -> Iterator[None]:
    """Say that a record was altered where what it holds leads to an error: rows that make no sense
    may raise anything. Of a record as it was written the error is a bug, and keeps its trace.
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
