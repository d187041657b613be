"""In which tables is a record kept, and how does an older file become a new one?"""

from __future__ import annotations

import datetime
import json
import sqlite3

from calipers.record import chain

VERSION = 2
# marks the file as ours; SQLite stores it as a signed 32-bit number
APPLICATION_ID = 0xCA11BE25 - (1 << 32)
_TABLES = f"""
create table if not exists question (fingerprint text primary key, title text not null,
    facts text not null);
create table if not exists point (question text not null, name text not null,
    position integer not null,
    label integer not null, radius real not null,
    array blob not null, primary key (question, name));
create table if not exists evidence (question text not null, point text not null,
    kind text not null,
    tool text not null, radius real not null,
    margin real, guarantee text not null, prediction integer not null, forwards integer not null,
    backwards integer not null, seconds real not null,
    note text not null, array blob, asked real, primary key (question, point, kind, tool, radius));
create table if not exists decision (question text not null, scope text not null, key text not null,
    value text not null,
    primary key (question, scope, key));
create table if not exists passed (question text not null, point text not null, kind text not null,
    tool text not null, radius real not null,
    over integer not null, primary key (question, point, kind, tool, radius));
create table if not exists model (digest text primary key, name text not null, met text not null,
    circumstances text not null, parts text not null,
    points blob not null, logits blob not null);
create table if not exists checked (number integer primary key, question text not null,
    at text not null,
    witnesses integer not null,
    certificates integer not null, failures integer not null, facts integer not null);
{chain.SCHEMA}
"""


def now() -> str:
    """Return the time, to the second, in UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def prepare(db: sqlite3.Connection) -> None:
    """Make the tables of a new file, or bring an older one up to date; both in one transaction, of
    which nobody sees a half.
    """
    db.execute("begin immediate")
    try:
        version = db.execute("pragma user_version").fetchone()[0]
        if version < VERSION:
            for statement in _TABLES.split(";"):
                db.execute(statement)
            if version == 1:
                _chain_the_old(db)
            db.execute(f"pragma application_id = {APPLICATION_ID}")
            db.execute(f"pragma user_version = {VERSION}")
        db.execute("commit")
    except BaseException:
        if db.in_transaction:
            db.execute("rollback")
        raise


def _chain_the_old(db: sqlite3.Connection) -> None:
    """Begin the chain with the rows as they stand: what happened to them before, nobody knows."""
    db.execute("alter table evidence add column asked real")
    links = chain.Chain(db)
    for table in chain.TABLES:
        for row in db.execute(f"select * from {table} order by rowid").fetchall():
            links.add(table, row)
    links.seal()
    count = db.execute("select count(*) from evidence").fetchone()[0]
    db.execute("insert into meta values ('unchained', ?)", (json.dumps(count),))
