"""The chain of digests that shows whether a record was altered.

What is written in one transaction leaves one link for each table: the numbers of its rows and a
digest of each. The head of the chain is a digest of all links in order. It reveals tampering,
truncation and accidental edits; it does not prevent them. Whoever rewrites the whole chain leaves
no trace inside the file: only the head, which every report prints, then distinguishes the record
from the one that was reported.
"""

from __future__ import annotations

import hashlib
import json
import math
import sqlite3
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

TABLES = {
    "question": "select id, fingerprint, title, facts, data from question",
    "point": """select p.id, q.text, n.text, p.position, p.label, p.target, p.radius, p.digest,
        p.array from point p left join name q on q.id = p.question left join name n
        on n.id = p.name""",
    "run": """select r.id, q.text, r.time, r.title, r.seed, r.plan, r.radius, r.radii, r.versions,
        r.argv, r.notes from run r left join name q on q.id = r.question""",
    "evidence": """select e.id, q.text, p.text, e.kind, t.text, e.radius, e.margin, e.guarantee,
        e.prediction, e.forwards, e.backwards, e.seconds, e.note, e.array, e.asked, e.run,
        e.confidence from evidence e left join name q on q.id = e.question left join name p
        on p.id = e.point left join name t on t.id = e.tool""",
    "decision": "select id, question, scope, key, value from decision",
    "passed": """select f.fact, f.over, p.text, e.kind, t.text from passed f left join evidence e
        on e.id = f.fact left join name p on p.id = e.point left join name t on t.id = e.tool""",
    "model": "select id, digest, name, met, circumstances, parts, points, logits from model",
    "checked": """select number, question, at, witnesses, certificates, failures, facts
        from checked""",
}
"""The rows under the chain, each with its number first.

Names that are kept once (`name`) count as part of the rows that use them.
"""

SCHEMA = """
create table if not exists chain (place integer primary key, kind text not null, rows blob not null,
    digests blob not null);
create table if not exists meta (name text primary key, value text not null);
"""
EARLIER = "earlier"
"""The kind of a link that describes the record before a migration.

Its `rows` are JSON: the version, the head, and what had been altered.
"""
_SIZE = 16  # bytes of a digest
_FACT, _NAN = struct.Struct("<qddqqqddqd7q"), math.nan
_BEGINNING = bytes(_SIZE)
_WORDS = {
    "question": "question",
    "point": "point",
    "run": "run",
    "evidence": "fact",
    "decision": "decision",
    "passed": "note of what an interrupted tool left",
    "model": "model",
    "checked": "note of a check",
}
_TOLD = {"question": (1, 3), "point": (1, 3), "run": (1, 4), "evidence": (2, 6), "passed": (2, 5)}
"""The range of cells of a row that identify it to a reader."""


@dataclass(frozen=True)
class Check:
    """A replay of a question's evidence.

    `at` is when it was made, `witnesses` and `certificates` how many were replayed, `failures` how
    many of them failed, and `facts` how many facts the question had then.
    """

    question: str
    at: str
    witnesses: int
    certificates: int
    failures: int
    facts: int


@dataclass(frozen=True)
class Trust:
    """How far a record can be trusted as it stands.

    `altered` lists what was changed by other means than measuring; `unchained` of its `facts` were
    written before records had a chain; `head` names the state of the chain ("" for a record without
    one); `checks` are the replays, oldest first; `counts` are the numbers of facts of each
    question.
    """

    altered: tuple[str, ...] = ()
    facts: int = 0
    unchained: int = 0
    head: str = ""
    checks: tuple[Check, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()

    def last_check(self, question: str) -> Check | None:
        """Return the last replay of a question, None if there was none."""
        return next((c for c in reversed(self.checks) if c.question == question), None)

    def grown(self, check: Check) -> int:
        """Return how many facts were added to the question after a check."""
        return dict(self.counts).get(check.question, 0) - check.facts


class Chain:
    """Writes links, inside the transaction that writes the rows themselves."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.count, self.head = held_head(db)

    def add(self, table: str, rows: Sequence[Sequence[Any]]) -> None:
        """Chain rows as they stand now, each as `TABLES` reads it."""
        if rows:
            numbers = np.array([row[0] for row in rows], "<i8").tobytes()
            self._link(table, numbers, b"".join([digest_of(table, row) for row in rows]))

    def earlier(self, facts: dict[str, Any]) -> None:
        """Chain what is known of the record before it was migrated."""
        self._link(EARLIER, json.dumps(facts, sort_keys=True).encode(), b"")

    def _link(self, kind: str, rows: bytes, digests: bytes) -> None:
        self.head, self.count = _link(self.head, kind, rows, digests), self.count + 1
        self.db.execute(
            "insert into chain (kind, rows, digests) values (?, ?, ?)", (kind, rows, digests)
        )

    def seal(self) -> None:
        """Store where the chain ends now."""
        value = json.dumps([self.count, self.head.hex()])
        self.db.execute(
            "insert into meta values ('head', ?) on conflict do update set value = excluded.value",
            (value,),
        )


def digest_of(table: str, row: Sequence[Any]) -> bytes:
    """Return the digest of a row, given as SQLite returns it."""
    if table == "evidence":
        try:
            return hashlib.sha256(_fact_bytes(_Fact(*row))).digest()[:_SIZE]
        except (struct.error, TypeError, ValueError):
            pass  # a cell of another type: only an edit by hand can have put it there
    cells = [hashlib.sha256(cell).digest() if type(cell) is bytes else cell for cell in row]
    return hashlib.sha256(f"{table}{cells!a}".encode()).digest()[:_SIZE]


class _Fact(NamedTuple):
    """A row of evidence, its cells in the order of `TABLES`."""

    number: int
    question: str
    point: str
    kind: str
    tool: str
    radius: float
    margin: float | None
    guarantee: str
    prediction: int
    forwards: int
    backwards: int
    seconds: float
    note: str
    array: bytes | None
    asked: float | None
    run: int
    confidence: float


def _fact_bytes(fact: _Fact) -> bytes:
    """Return the cells of a fact as bytes, different for different facts.

    Most rows are facts, and this takes a third of the time of writing them as text.
    """
    texts = (fact.question, fact.point, fact.kind, fact.tool, fact.guarantee, fact.note)
    head = _FACT.pack(
        fact.number,
        fact.radius,
        _NAN if fact.margin is None else fact.margin,
        fact.prediction,
        fact.forwards,
        fact.backwards,
        fact.seconds,
        _NAN if fact.asked is None else fact.asked,
        fact.run,
        fact.confidence,
        *map(len, texts),
        -1 if fact.array is None else len(fact.array),
    )
    return head + "".join(texts).encode() + (fact.array or b"")


def altered(db: sqlite3.Connection) -> tuple[str, ...]:
    """Return in words where the rows of a record do not match its chain.

    A chain that is itself broken is reported too.
    """
    head, count, earlier = _BEGINNING, 0, list[str]()
    last: dict[str, dict[int, bytes]] = {table: {} for table in TABLES}
    for kind, rows, digests in db.execute("select kind, rows, digests from chain order by place"):
        head, count = _link(head, kind, rows, digests), count + 1
        if kind == EARLIER:
            earlier += json.loads(rows)["altered"]
        elif kind in last:
            last[kind].update(_taken_apart(rows, digests))
    found = [f"before it was brought up to date: {what}" for what in earlier]
    if (count, head) != held_head(db):
        found.append("its chain of digests was cut or rewritten")
    for table, sql in TABLES.items():
        found += _compared(table, db.execute(sql), last[table])
    return tuple(found)


def _taken_apart(rows: bytes, digests: bytes) -> dict[int, bytes]:
    """Return the digest of each row of a link, {} for a malformed link."""
    if not isinstance(rows, bytes) or not isinstance(digests, bytes) or len(rows) % 8:
        return {}
    numbers = np.frombuffer(rows, "<i8").tolist()
    cut = [digests[i * _SIZE : (i + 1) * _SIZE] for i in range(len(numbers))]
    return dict(zip(numbers, cut, strict=True))


def _compared(table: str, rows: Iterable[Sequence[Any]], expected: dict[int, bytes]) -> list[str]:
    changed, added = list[Sequence[Any]](), list[Sequence[Any]]()
    for row in rows:
        held = expected.pop(row[0], None)
        if held is None:
            added.append(row)
        elif held != digest_of(table, row):
            changed.append(row)
    gone = [(number,) for number in expected]
    found = []
    for some, what in ((changed, "changed"), (added, "put in"), (gone, "taken out")):
        if some:
            word = _WORDS[table]
            many = (
                f"{len(some)} {word}s were {what}, the first"
                if len(some) > 1
                else f"a {word} was {what}"
            )
            found.append(f"{many}: {_named(table, some[0])}")
    return found


def _named(table: str, row: Sequence[Any]) -> str:
    """Return what a row is about, or its number where only that is left."""
    start, end = _TOLD.get(table, (1, 4))
    cells = [cell for cell in row[start:end] if not isinstance(cell, bytes)]
    return ", ".join(map(str, cells)) or f"number {row[0]}"


def held_head(db: sqlite3.Connection) -> tuple[int, bytes]:
    """Return the length of the chain and its head, as the record states them."""
    held = db.execute("select value from meta where name = 'head'").fetchone()
    if held is None:
        return 0, _BEGINNING
    try:
        count, head = json.loads(held[0])
        return int(count), bytes.fromhex(head)
    except (ValueError, TypeError):
        return -1, _BEGINNING


def _link(head: bytes, kind: object, rows: object, digests: object) -> bytes:
    cells = [hashlib.sha256(c).digest() if type(c) is bytes else c for c in (kind, rows, digests)]
    return hashlib.sha256(f"{head!r}{cells!a}".encode()).digest()[:_SIZE]
