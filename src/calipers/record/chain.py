"""Was a record altered after it was written? Every row leaves a digest, and each digest is chained
to the one before.

This tells tampering, truncation and slips of the hand; it does not prevent them. Whoever rewrites
the whole chain leaves no trace inside the file: only the head of the chain, which every report
prints, tells such a record from the one that was reported.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

TABLES = {
    "question": 1,
    "point": 2,
    "evidence": 5,
    "decision": 3,
    "passed": 5,
    "model": 1,
    "checked": 1,
}
"""The tables under the chain, and how many of their first columns name a row."""

SCHEMA = """
create table if not exists chain (place integer primary key, kind text not null, name text not null,
    digest blob not null);
create table if not exists meta (name text primary key, value text not null);
"""
_BEGINNING = bytes(16)
_WORDS = {
    "question": "question",
    "point": "point",
    "evidence": "fact",
    "decision": "decision",
    "passed": "note of what an interrupted tool left",
    "model": "model",
    "checked": "note of a check",
}


@dataclass(frozen=True)
class Check:
    """A replay of what the record says to a question: when, what it replayed, how much failed, and
    how many facts there were then.
    """

    question: str
    at: str
    witnesses: int
    certificates: int
    failures: int
    facts: int


@dataclass(frozen=True)
class Trust:
    """How far a record can be believed as it stands.

    `altered` says what was changed by other means than measuring; `unchained` of its `facts` were
    written before records were chained; `head` names the state of the chain ("" for a record
    without one); `checks` are the replays, oldest first; `counts` are the facts of each question.
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
    """Writes digests of rows, inside the transaction that writes the rows themselves."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db
        self.count, self.head = held_head(db)

    def add(self, table: str, row: Sequence[Any]) -> None:
        """Chain a row as it stands now."""
        name, digest = _name(table, row), digest_of(table, row)
        self.head, self.count = _link(self.head, table, name, digest), self.count + 1
        self.db.execute(
            "insert into chain (kind, name, digest) values (?, ?, ?)", (table, name, digest)
        )

    def seal(self) -> None:
        """Note where the chain ends now."""
        value = json.dumps([self.count, self.head.hex()])
        self.db.execute(
            "insert into meta values ('head', ?) on conflict do update set value = excluded.value",
            (value,),
        )


def digest_of(table: str, row: Iterable[Any]) -> bytes:
    """Return the digest of a row of plain numbers, text and bytes, as SQLite gives it back."""
    cells = [
        {"bytes": hashlib.sha256(cell).hexdigest()} if isinstance(cell, bytes) else cell
        for cell in row
    ]
    return hashlib.sha256(json.dumps([table, cells]).encode()).digest()[:16]


def altered(db: sqlite3.Connection) -> tuple[str, ...]:
    """Return in words where a record's rows are not those of its chain, and where the chain itself
    is broken.
    """
    head, count, last = _BEGINNING, 0, dict[tuple[str, str], bytes]()
    for table, name, digest in db.execute("select kind, name, digest from chain order by place"):
        head, count = _link(head, table, name, digest), count + 1
        last[table, name] = digest
    found = [] if (count, head) == held_head(db) else ["its chain of digests was cut or rewritten"]
    for table in TABLES:
        changed, added = list[str](), list[str]()
        for row in db.execute(f"select * from {table}"):
            name = _name(table, row)
            expected = last.pop((table, name), None)
            if expected is None:
                added.append(name)
            elif expected != digest_of(table, row):
                changed.append(name)
        gone = [name for kind, name in last if kind == table]
        for names, what in ((changed, "changed"), (added, "put in"), (gone, "taken out")):
            if names:
                word = _WORDS[table]
                many = (
                    f"{len(names)} {word}s were {what}, the first"
                    if len(names) > 1
                    else f"a {word} was {what}"
                )
                found.append(f"{many}: {', '.join(map(str, json.loads(names[0])[-4:]))}")
    return tuple(found)


def held_head(db: sqlite3.Connection) -> tuple[int, bytes]:
    """Return how many links the chain should have, and its head, as the record notes them."""
    held = db.execute("select value from meta where name = 'head'").fetchone()
    if held is None:
        return 0, _BEGINNING
    try:
        count, head = json.loads(held[0])
        return int(count), bytes.fromhex(head)
    except (ValueError, TypeError):
        return -1, _BEGINNING


def _link(head: bytes, table: str, name: str, digest: object) -> bytes:
    return hashlib.sha256(
        head
        + f"{table}\0{name}\0".encode()
        + (digest if isinstance(digest, bytes) else repr(digest).encode())
    ).digest()[:16]


def _name(table: str, row: Sequence[Any]) -> str:
    return json.dumps(
        [cell.hex() if isinstance(cell, bytes) else cell for cell in row[: TABLES[table]]]
    )
