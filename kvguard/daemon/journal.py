"""The durable key -> value store of a process: what it promised, and which life of it this is.

Knows: SQLite. Must not know: what keys mean (effects.Persist lists them).
Invariants: `persist` returns only when the value is on the disk (a write-ahead log, synchronous=FULL); what can't be made durable raises, and the value
before it stays; two processes never share a journal (an exclusive lock is held for life). A damaged file is refused, never repaired: an epoch that it forgot
would be used twice.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvguard.errors import BadConfig, KvguardError

INCARNATION = "incarnation"
FIRST_BYTES = 6


class NotDurable(KvguardError):
    """A value couldn't be written down: whatever depends on it must not happen."""


class Journal:
    """Opens or makes the journal at `path`. Raises BadConfig where it is damaged, locked by another process, or its directory can't be written; NotDurable
    where the disk is full: that passes, and whoever starts this process should try again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadConfig(f"{path.parent} can't be made: {error.strerror}. Try: a directory that this user can write") from error
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=0.5)
            self._db.execute("PRAGMA locking_mode=EXCLUSIVE")
            self._db.execute("PRAGMA journal_mode=WAL")  # one fsync a fact instead of four: a recovery writes a dozen of them, one after the other
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute("BEGIN EXCLUSIVE")  # the lock is taken here and, in exclusive mode, kept beyond the commit
            self._db.execute("CREATE TABLE IF NOT EXISTS facts (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID")
            self._db.execute("COMMIT")
            check = self._db.execute("PRAGMA quick_check").fetchone()[0]
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise NotDurable(f"{path} can't be written: {error}. Try: room on its disk") from error
            raise BadConfig(self._refusal(error)) from error
        if check != "ok":
            raise BadConfig(f"{path} is damaged: {check}. Try: restore it, or remove it only if nothing that it served is still running")

    def _refusal(self, error: sqlite3.Error) -> str:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            return f"{self.path} belongs to a process that runs. Try: stop that one, or give this one a directory of its own"
        if isinstance(error, sqlite3.OperationalError):
            return f"{self.path} can't be opened or written: {error}. Try: a directory that this user can write, on a disk with room"
        return f"{self.path} is damaged: {error}. Try: restore it, or remove it only if nothing that it served is still running"

    @contextmanager
    def _durably(self, key: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise NotDurable(f"{key!r} can't be made durable in {self.path}: {error}. Try: room and write permission there, then restart") from error

    def persist(self, key: str, value: bytes | None) -> None:
        """Make key = value durable; None deletes. Raises NotDurable."""
        with self._durably(key):
            if value is None:
                self._db.execute("DELETE FROM facts WHERE key = ?", (key,))
            else:
                self._db.execute("INSERT INTO facts VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value", (key, value))

    def load(self) -> dict[str, bytes]:
        """Everything that is written down, without the incarnation."""
        with self._durably("everything"):
            return {key: bytes(value) for key, value in self._db.execute("SELECT key, value FROM facts WHERE key != ? ORDER BY key", (INCARNATION,))}

    def next_incarnation(self) -> int:
        """The number of this life, one more than the last one's, durable before it is returned. The first of a new journal is drawn at random, so that a
        process that lost its journal isn't taken for its former self."""
        with self._durably(INCARNATION):
            found = self._db.execute("SELECT value FROM facts WHERE key = ?", (INCARNATION,)).fetchone()
        number = int(found[0]) + 1 if found else 1 + int.from_bytes(os.urandom(FIRST_BYTES))
        self.persist(INCARNATION, str(number).encode())
        return number

    def close(self) -> None:
        self._db.close()
