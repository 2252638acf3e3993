"""The reader's tape: records taken in since the tape began, applied to the reader's heads.

Knows: one tape at a time, which rows are on it, their ids as copies. Must not know: how heads are read, what is reported where.
Invariants: a record counts once it is whole and within bounds for every row that it concerns, and for each row in order; nothing that an engine can write makes
this raise, or reach beyond the table.
"""

from __future__ import annotations

import numpy as np

from kvguard.engine import memory
from kvguard.engine.memory import U64
from kvguard.format import rows as fmt
from kvguard.format import tape as form


class TapeReader:
    """`heads`: the reader's, u64 [rows, HEAD_WORDS], changed here."""

    def __init__(self, views: memory.Views, heads: np.ndarray) -> None:
        self._views, self._heads = views, heads
        self._word = views.word(fmt.TAPE_AT)
        self._number = 0
        self._rows = self._columns = np.zeros(0, np.int64)
        self._applied = np.zeros(views.geometry.rows, np.int64)  # records, by row
        self._ids: list[np.ndarray] = []  # u32 [n], by record
        self._next = 0  # every row on the tape has the records before this one

    def word(self) -> tuple[int, int]:
        """The tape's number and count as they are now: read before the selectors, so that rows which have left the tape are found to have left."""
        return form.split_word(self._word[0])

    def follow(self, number: int, count: int, moved: np.ndarray, grown: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, int]:
        """Apply the records up to `count`. `moved`: rows, int [n], whose heads have been taken in anew. Returns the rows that got on, and how many records
        were not whole; each (row, place in its list, block, generation) that they append goes to `grown`."""
        none = self._columns[:0]
        if number != self._number or len(moved):
            self._applied[moved] = 0
            if number != self._number:
                self._number, self._ids = number, []
                self._applied[:] = 0
            heads = self._heads
            on = np.flatnonzero((heads[:, fmt.H_TAPE] == U64(number)) & ((heads[:, fmt.H_FLAGS] & U64(fmt.OPEN)) != 0)) if number else none
            self._rows, self._columns = on, heads[on, fmt.H_COLUMN].astype(np.int64)
            self._next = int(self._applied[on].min(initial=count)) if count <= self._views.geometry.tape_steps else count
        if self._next >= count or not len(self._rows) or count > self._views.geometry.tape_steps:
            return none, 0
        rows = none
        while self._next < count:
            behind = self._applied[self._rows] == self._next
            whole = bool(behind.all())
            rows, columns = (self._rows, self._columns) if whole else (self._rows[behind], self._columns[behind])
            if not self._apply(self._next, rows, columns, grown):
                return self._rows, 1
            self._applied[rows] += 1
            self._next += 1
        return self._rows, 0

    def _apply(self, place: int, rows: np.ndarray, columns: np.ndarray, grown: list) -> bool:
        geometry, heads = self._views.geometry, self._heads
        body = form.body_bytes(self._views.body, geometry, self._number, place)
        new = form.new_blocks(body, geometry) if body is not None else None
        if new is None:
            return False
        step, ids = form.step_of(body), np.frombuffer(form.ids_bytes(body), U64)
        count = len(ids)
        now = heads[rows]
        known, blocks = now[:, fmt.H_IDS].astype(np.int64), now[:, fmt.H_BLOCKS]
        listed = self._list(new, rows, columns, now)
        accepted = now[:, fmt.H_ACCEPTED] + U64(1)
        if not len(rows):
            return True
        if int(columns.max()) >= count or int(columns.min()) < 0 or int(known.max()) >= geometry.ids_per_row or int(blocks.max()) > geometry.blocks_per_row:
            return False
        if (accepted > now[:, fmt.H_IDS] + U64(1)).any() or (accepted > blocks * U64(geometry.block_tokens)).any():
            return False
        if place < len(self._ids) and len(self._ids[place]) != count:  # rewritten: not the record that other rows have read
            return False
        written = U64(int(self._views.words[fmt.WRITTEN_AT // 8]))
        mine = ids[columns]
        earlier = np.where(written >= now[:, fmt.H_PRIOR_STEP], now[:, fmt.H_PRIOR], now[:, fmt.H_BASE])
        now[:, fmt.H_BASE] = np.where(written >= now[:, fmt.H_STEP], now[:, fmt.H_ACCEPTED], earlier)  # format.rows.shifted
        now[:, fmt.H_PRIOR], now[:, fmt.H_PRIOR_STEP] = now[:, fmt.H_ACCEPTED], now[:, fmt.H_STEP]
        now[:, fmt.H_ACCEPTED], now[:, fmt.H_STEP] = accepted, U64(step)
        now[:, fmt.H_IDS_HASH] += (mine + U64(1)) * self._views.id_multipliers[known]
        now[:, fmt.H_IDS] += U64(1)
        heads[rows] = now
        if place == len(self._ids):
            self._ids.append(ids.astype(np.uint32))
        grown += listed
        return True

    def _list(self, new, rows: np.ndarray, columns: np.ndarray, now: np.ndarray) -> list[tuple[int, int, int, int]]:
        """Add what a record appends to `now`, the heads of `rows`."""
        listed = []
        for column, block, generation in new:
            for n in np.flatnonzero(columns == column).tolist():
                first = int(now[n, fmt.H_BLOCKS])
                added = fmt.blocks_hash((block,), (generation,), first)
                now[n, fmt.H_BLOCKS_HASH] = int(now[n, fmt.H_BLOCKS_HASH]) + added & fmt.MASK
                now[n, fmt.H_BLOCKS] = first + 1
                listed.append((int(rows[n]), first, block, generation))
        return listed

    def ids(self, row: int, start: int, end: int) -> tuple[int, np.ndarray]:
        """Where in [start, end) the row's ids begin to be the tape's, and these, u32."""
        head = self._heads[row]
        known = int(head[fmt.H_IDS])
        applied = int(self._applied[row]) if self._number and head[fmt.H_TAPE] == U64(self._number) else 0
        first = known - applied
        if not applied or end <= first:
            return end, np.zeros(0, np.uint32)
        begin, column = max(start, first), int(head[fmt.H_COLUMN])
        return begin, np.array([ids[column] for ids in self._ids[begin - first : min(end, known) - first]], np.uint32)
