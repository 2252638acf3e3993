"""The staging ring: device memory of the daemon into which the engine packs each step's new slots, and the words in shared host memory that say what is in it.

Knows: rows, slots, records, the order of their stores. Must not know: layouts (a row is one slot's canonical bytes), sequences, steps.

Invariants
- The engine never waits: without room it says which slots it did not pack (a record without rows) or, where not even that fits, that there is a gap.
- A slot is looked up in the latest record that names it or not at all: every record, finished or not, first makes what older ones said of its slots void.
- Rows count from the beginning of time; row n lies at n modulo the ring's rows. What the engine may reuse is below the tail's words, which the daemon
  writes after its copies are complete; what the daemon may read is up to the word `done`, which the device writes behind each gather.
- Nobody's words are believed: a record that lies outside the ring is a gap.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading

import numpy as np

from kvguard.errors import Refused

MAGIC = int.from_bytes(b"KVGRING1", "little")
PAGE_BYTES = 4096
RECORDS, SLOTS = 256, 1 << 16
RECORD_WORDS = 4
NOT_PACKED = MASK = (1 << 64) - 1
AT_MAGIC, AT_ROWS, AT_HEAD, AT_HEAD_ROWS, AT_TAIL, AT_TAIL_ROWS, AT_DONE, AT_GAPS, AT_SKIPPED = 0, 1, 8, 9, 16, 17, 24, 32, 33
CONTROL_BYTES = PAGE_BYTES + 8 * RECORDS * RECORD_WORDS + 8 * SLOTS
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_lock = threading.Lock()


def _order() -> None:
    """No store moves past this call, on any CPU."""
    with _lock:
        pass


class Words:
    """The shared words, mapped. `fd`: their file, owned here."""

    def __init__(self, fd: int) -> None:
        if os.fstat(fd).st_size != CONTROL_BYTES or fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS != SEALS:
            raise Refused("the descriptor isn't a ring's words. Try: the same kvguard version in engine and daemon")
        self.fd = fd
        self.memory = memoryview(mmap.mmap(fd, CONTROL_BYTES))
        self.words = self.memory[:PAGE_BYTES].cast("Q")
        if self.words[AT_MAGIC] != MAGIC:
            raise Refused("the descriptor holds no ring's words. Try: the same kvguard version in engine and daemon")
        body = np.frombuffer(self.memory, np.uint64, offset=PAGE_BYTES)
        self.records = body[: RECORDS * RECORD_WORDS].reshape(RECORDS, RECORD_WORDS)
        self.slots = body[RECORDS * RECORD_WORDS :]

    @classmethod
    def create(cls, rows: int) -> Words:
        fd = os.memfd_create("kvguard-ring", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, CONTROL_BYTES)
            os.pwrite(fd, MAGIC.to_bytes(8, "little") + rows.to_bytes(8, "little"), 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Idempotent."""
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1
        self.records = self.slots = np.zeros(0, np.uint64)
        self.words = self.memory = memoryview(b"")


class Packer:
    """The engine's end. `skipped`: steps whose slots were said and not packed; `gaps`: steps that were not even said."""

    def __init__(self, words: Words, rows: int) -> None:
        """Another engine may have packed into this ring before: its records are kept clear of, and void."""
        self.words, self.rows = words, rows
        self._head, self._row = int(words.words[AT_HEAD]), int(words.words[AT_HEAD_ROWS])
        tail = max(int(words.words[AT_TAIL]), self._head - RECORDS)
        said = [words.records[number % RECORDS].tolist() for number in range(tail, self._head)]
        self._starts = [first for _, _, first, _ in said]  # of the records that the daemon hasn't consumed: where their slots begin
        self._slot = said[-1][2] + said[-1][1] if said else 0
        self.skipped, self.gaps = int(words.words[AT_SKIPPED]), int(words.words[AT_GAPS])
        if self._head:
            self.gap()

    def record(self, slots: np.ndarray) -> tuple[int, int] | None:
        """Say that int64 `slots` are written now: (record number, first row modulo rows) to gather them into, or None where there is no room."""
        words, count = self.words.words, len(slots)
        tail = int(words[AT_TAIL])
        del self._starts[: max(0, len(self._starts) - (self._head - tail))]
        first_slot = self._starts[0] if self._starts else self._slot
        if not self._head - tail < RECORDS or count > SLOTS - (self._slot - first_slot):
            self.gap()
            return None
        row = self._room(count, int(words[AT_TAIL_ROWS]))
        places = (self._slot + np.arange(count)) % SLOTS
        self.words.slots[places] = slots
        self.words.records[self._head % RECORDS] = (NOT_PACKED if row is None else row, count, self._slot, 0)
        self._starts.append(self._slot)
        self._slot += count
        self._head += 1
        if row is None:
            self.skipped += 1
            words[AT_SKIPPED] = self.skipped
        else:
            self._row = row + count
        words[AT_HEAD_ROWS] = self._row
        _order()
        words[AT_HEAD] = self._head
        return None if row is None else (self._head, row % self.rows)

    def gap(self) -> None:
        """What was written since the last record is not said: whatever the ring holds is void."""
        self.gaps += 1
        self.words.words[AT_GAPS] = self.gaps

    def _room(self, count: int, tail: int) -> int | None:
        """The first of `count` rows that lie side by side and are free."""
        row = self._row
        if row % self.rows + count > self.rows:
            row += self.rows - row % self.rows
        return row if count <= self.rows and row + count - tail <= self.rows else None


class Unpacker:
    """The daemon's end: which slot's latest bytes are in which row of host staging. `slots_total`: of the pool."""

    def __init__(self, words: Words, rows: int, staged_rows: int, slots_total: int) -> None:
        self.words, self.rows = words, rows
        self._where = np.full(slots_total, -1, np.int64)  # staged row of each slot, -1 none
        self._owner = np.full(staged_rows, -1, np.int64)  # slot of each staged row
        self._staged = 0
        self._seen = self._tail = self._tail_rows = self._gaps = 0
        self._waiting: list[tuple[int, int, np.ndarray, int]] = []  # (number, row, slots, end of its rows) that were seen and aren't copied
        self.unpacked = 0  # rows

    def look(self) -> None:
        """Take note of every record that is there: what it names is void until its own bytes are staged."""
        words = self.words.words
        head, gaps = int(words[AT_HEAD]), int(words[AT_GAPS])
        _order()
        if gaps != self._gaps or not 0 <= head - self._tail <= RECORDS:
            self._forget_all(gaps, head)
            return
        while self._seen < head:
            row, count, first, _ = self.words.records[self._seen % RECORDS].tolist()
            self._seen += 1
            if count > SLOTS:
                self._forget_all(gaps, head)
                return
            slots = self.words.slots[(first + np.arange(count)) % SLOTS].astype(np.int64)
            slots[(slots < 0) | (slots >= self._where.size)] = -1
            self._where[slots[slots >= 0]] = -1
            packed = row != NOT_PACKED and row % self.rows + count <= self.rows and count <= self._owner.size
            end = row + count if row != NOT_PACKED else 0
            self._waiting.append((self._seen, row if packed else -1, slots, end))

    def finished(self) -> list[tuple[int, np.ndarray, int]]:
        """[(ring row, slots, staged row)] in order, to be copied and then told to `copied`; a ring row below zero: nothing to copy. Calls look().

        `done` is read first: a later one may be of another engine, which says a gap before it packs anything.
        """
        done, out = int(self.words.words[AT_DONE]), []
        _order()
        self.look()
        for number, row, slots, end in self._waiting:
            if row >= 0 and number > done:
                break
            out.append((row % self.rows, slots, self._stage(len(slots))) if row >= 0 else (-1, slots, -1))
            self._tail = number
            self._tail_rows = max(self._tail_rows, end)
        self._waiting = [one for one in self._waiting if one[0] > self._tail]
        return out

    def copied(self, finished: list[tuple[int, np.ndarray, int]]) -> None:
        """Their bytes are in host staging: they can be looked up, and the engine may use their rows again."""
        for row, slots, staged in finished:
            if row >= 0:
                self._owner[staged : staged + len(slots)] = slots
        later = np.concatenate([np.zeros(0, np.int64), *(one[2] for one in self._waiting)])
        for row, slots, staged in finished:
            if row < 0:
                self._where[slots[slots >= 0]] = -1
                continue
            rows = np.arange(staged, staged + len(slots))
            good = (slots >= 0) & (self._owner[rows] == slots) & ~np.isin(slots, later)
            self._where[slots[good]] = rows[good]
            self.unpacked += len(slots)
        words = self.words.words
        words[AT_TAIL_ROWS] = self._tail_rows & MASK
        _order()
        words[AT_TAIL] = self._tail

    def forget(self) -> None:
        """Whoever packed until now has ended: what follows it may write slots before it says so here."""
        words = self.words.words
        self._forget_all(int(words[AT_GAPS]), int(words[AT_HEAD]))

    def find(self, slots: np.ndarray) -> np.ndarray:
        """Staged row of each slot, -1 where its latest bytes aren't staged. Slots must be the pool's."""
        return self._where[slots]

    def _stage(self, count: int) -> int:
        """`count` staged rows side by side; what they held is forgotten."""
        if self._staged + count > self._owner.size:
            self._staged = 0
        first, self._staged = self._staged, self._staged + count
        rows = np.arange(first, first + count)
        owners = self._owner[rows]
        held = owners >= 0
        still = held.copy()
        still[held] = self._where[owners[held]] == rows[held]
        self._where[owners[still]] = -1
        self._owner[rows] = -1
        return first

    def _forget_all(self, gaps: int, head: int) -> None:
        """Everything up to now is void, and consumed."""
        self._where.fill(-1)
        self._waiting.clear()
        words = self.words.words
        self._gaps, self._seen, self._tail, self._tail_rows = gaps, head, head, int(words[AT_HEAD_ROWS])
        words[AT_TAIL_ROWS] = self._tail_rows & MASK
        _order()
        words[AT_TAIL] = head
