"""The file of a record: opening, migrating and transactions.

Every write is one transaction in write-ahead mode with full synchronisation: after `kill -9` the
file holds every row whose write returned.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from calipers.errors import RecordError
from calipers.record.chain import Chain
from calipers.record.migrations import migrate
from calipers.record.schema import APPLICATION_ID, VERSION, create


class Database:
    """A record's file; with `path=None` a database in memory.

    With `read_only` the file is left as it is.
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
        self._made: sqlite3.Connection | None = None
        self._ids: dict[str, int] = {}  # text -> number in `name`, as far as read so far
        self._texts: dict[int, str] = {}  # number -> text, complete up to its largest number
        # the state (`_state`) in which the rows were last known to match the chain
        self._sound: tuple[int, int] | None = None
        if self.path is None or self.path.exists():
            self._connect()

    @property
    def _db(self) -> sqlite3.Connection:
        """The open file, which is created only when it is first needed.

        A question that is refused before it is measured thus leaves no file.
        """
        return self._made or self._connect()

    def _connect(self) -> sqlite3.Connection:
        try:
            self._made = self._opened()
            self._made = self._prepared(self._made)
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            self.close()
            told = "Give another file name, or remove it if it is not a calipers record."
            raise RecordError(
                f"{self.path} cannot be used as a record ({error}). {told}"
            ) from error
        return self._made

    def _opened(self) -> sqlite3.Connection:
        if self.path is None or not self.read_only:
            return _connection(":memory:" if self.path is None else str(self.path))
        # Readers of a file in write-ahead mode need an index file beside it. Where this process may
        # not create one, the file is opened as immutable: nobody else writes there either.
        writable = os.access(self.path, os.W_OK) and os.access(self.path.resolve().parent, os.W_OK)
        beside = self.path.with_name(f"{self.path.name}-wal").exists()
        mode = "rw" if writable else "ro" if beside else "ro&immutable=1"
        db = _connection(f"{self.path.resolve().as_uri()}?mode={mode}", uri=True)
        db.execute("pragma query_only = on")
        return db

    def _prepared(self, db: sqlite3.Connection) -> sqlite3.Connection:
        """Return the connection to a record of this version.

        It is the file itself, or, where an older file is only to be read, a copy in memory that was
        migrated.
        """
        known = db.execute("pragma application_id").fetchone()[0]
        tables = db.execute("select count(*) from sqlite_master").fetchone()[0]
        if tables and known != APPLICATION_ID:
            raise RecordError(
                f"{self.path} is a database of another program, not a calipers record. Give "
                "another file name."
            )
        version = db.execute("pragma user_version").fetchone()[0]
        if version > VERSION:
            raise RecordError(
                f"{self.path} was written by a newer calipers (record version {version}, this one "
                f"reads {VERSION}). Update calipers."
            )
        if self.read_only:
            if not tables:
                raise RecordError(
                    f"{self.path} is empty: nothing to read. Measure first: calipers measure "
                    f"--record {self.path}"
                )
            return db if version == VERSION else _copied(db)
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")
        if version < VERSION:
            _bring_up_to_date(db)
        if not tables:
            self._sound = (
                db.execute("pragma data_version").fetchone()[0],
                db.total_changes,
            )
        return db

    @contextmanager
    def _writing(self) -> Iterator[Chain]:
        """Hold the file alone, and write rows and their links, or nothing."""
        self._db.execute("begin immediate")
        try:
            sound = self._sound == self._state()
            chain = Chain(self._db)
            began = chain.count
            yield chain
            if chain.count != began:
                chain.seal()
            self._db.execute("commit")
            if sound:
                self._sound = self._state()
        except BaseException:
            self._ids.clear()
            self._texts.clear()
            if self._db.in_transaction:
                self._db.execute("rollback")
            raise

    def _state(self) -> tuple[int, int]:
        """Return what changes with every write, of this connection or another one."""
        return self._db.execute("pragma data_version").fetchone()[0], self._db.total_changes

    def _read(self, sql: str, *parameters: str | float | None) -> list[Any]:
        try:
            return self._db.execute(sql, parameters).fetchall()
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
            raise RecordError(
                f"{self.path} is damaged ({error}). Take a copy of the file, or measure again "
                "into a new one."
            ) from error

    def _id(self, text: str, *, make: bool = False) -> int:
        """Return the number of a text in the table `name`, 0 if it has none.

        With `make` the text is added, inside a transaction.
        """
        return self._ids_of((text,), make=make).get(text, 0)

    def _ids_of(self, texts: Iterable[str], *, make: bool = False) -> Mapping[str, int]:
        """Return the numbers of at least these texts, as far as they are kept."""
        missing = [text for text in texts if text not in self._ids]
        if missing and make:
            sql = "insert into name (text) values (?) on conflict do nothing"
            self._db.executemany(sql, [(text,) for text in missing])
        if missing:
            sql = "select text, id from name where text in (select value from json_each(?))"
            self._ids.update(self._read(sql, json.dumps(missing)))
        return self._ids

    def _names(self) -> Mapping[int, str]:
        """Return the texts of all numbers."""
        last = next(reversed(self._texts), 0)
        self._texts.update(self._read("select id, text from name where id > ? order by id", last))
        return self._texts

    def _next(self, table: str) -> int:
        """Return the number of a table's next row, inside a transaction."""
        last: int = self._db.execute(f"select coalesce(max(id), 0) from {table}").fetchone()[0]
        return last + 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; what was written stays."""
        if self._made is not None:
            self._made.close()


def _connection(name: str, *, uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(name, uri=uri, timeout=30, isolation_level=None)


def _copied(db: sqlite3.Connection) -> sqlite3.Connection:
    copy = _connection(":memory:")
    db.backup(copy)
    db.close()
    _bring_up_to_date(copy)
    copy.execute("pragma query_only = on")
    return copy


def _bring_up_to_date(db: sqlite3.Connection) -> None:
    """Create the tables of a new file, or migrate those of an older one.

    It is one transaction, so that nobody sees half of it.
    """
    db.execute("begin immediate")
    try:
        version = db.execute("pragma user_version").fetchone()[0]
        if 0 < version < VERSION:
            migrate(db, version)
        elif version < VERSION:
            create(db)
        db.execute("commit")
    except BaseException:
        if db.in_transaction:
            db.execute("rollback")
        raise
