"""The tables in which a record is kept.

Every table numbers its rows; the chain refers to rows by these numbers. Texts that many rows share,
the fingerprints of questions and the names of points and tools, are kept once, in `name`: the rows
of consecutive points then are adjacent in the index too.
"""

from __future__ import annotations

import datetime
import sqlite3

from calipers.record import chain

VERSION = 3
# marks the file as ours; SQLite stores it as a signed 32-bit number
APPLICATION_ID = 0xCA11BE25 - (1 << 32)
_TABLES = f"""
create table name (id integer primary key, text text not null unique);
create table question (id integer primary key, fingerprint text not null unique,
    title text not null, facts text not null, data blob);
create table point (id integer primary key, question integer not null, name integer not null,
    position integer not null, label integer not null, target integer, radius real not null,
    digest text not null, array blob, unique (question, name));
create table run (id integer primary key, question integer not null, time text not null,
    title text not null, seed integer not null, plan text not null, radius text not null,
    radii text not null, versions text not null, argv text not null, notes text not null);
create table evidence (id integer primary key, question integer not null, point integer not null,
    kind text not null, tool integer not null, radius real not null, margin real,
    guarantee text not null, prediction integer not null, forwards integer not null,
    backwards integer not null, seconds real not null, note text not null, array blob, asked real,
    run integer not null, confidence real not null,
    unique (question, point, kind, tool, radius));
create table decision (id integer primary key, question text not null, scope text not null,
    key text not null, value text not null, unique (question, scope, key));
create table passed (fact integer primary key, over integer not null);
create table model (id integer primary key, digest text not null unique, name text not null,
    met text not null, circumstances text not null, parts text not null, points blob not null,
    logits blob not null);
create table checked (number integer primary key, question text not null, at text not null,
    witnesses integer not null, certificates integer not null, failures integer not null,
    facts integer not null);
{chain.SCHEMA}
"""


def now() -> str:
    """Return the time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def create(db: sqlite3.Connection) -> None:
    """Create the tables, and mark the file as a record of this version.

    Runs inside a transaction.
    """
    for statement in _TABLES.split(";"):
        db.execute(statement)
    db.execute(f"pragma application_id = {APPLICATION_ID}")
    db.execute(f"pragma user_version = {VERSION}")
