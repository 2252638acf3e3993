"""The rows that decode together, step after step: their heads by word instead of by row, so that a commit is two dozen short array operations.

Knows: the plain case, in which every row of the same batch gets one id and everything before is written. Must not know: rows outside it, and any other case:
then `stage` says no, changes nothing, and the table's general way is taken.
A usual step, in which every row goes on by one position as in the step before, adds the same to every head: that is one addition.
Invariants: while a batch exists it, not the table's private heads, is what its rows' next versions are made from (`TableWriter._settle` writes it back).
"""

from __future__ import annotations

import numpy as np

from kvguard.engine import memory
from kvguard.engine.memory import U64
from kvguard.format import rows as fmt

_HALF, _FOLD = U64(32), U64(fmt.FOLD)
_USUAL = np.zeros((fmt.HOT_WORDS, 1), U64)  # what a usual step adds to a head: one more of everything but hashes and blocks
_USUAL[[fmt.H_VERSION, fmt.H_ACCEPTED, fmt.H_STEP, fmt.H_PRIOR, fmt.H_PRIOR_STEP, fmt.H_BASE, fmt.H_IDS]] = 1


class DecodeBatch:
    """`rows`: int [n]. `words`: u64 [HEAD_WORDS, n], the rows' heads. `slots`: int64 [n]. `key`: the rows' bytes. `staged`: between stage and publish."""

    def __init__(self, writer, rows: np.ndarray, key: bytes) -> None:
        views, count = writer.views, len(rows)
        self._writer, self.rows, self.key, self.staged = writer, rows.copy(), key, False
        versions = writer._versions.take(rows)
        self.words = words = np.ascontiguousarray(writer._heads.take(rows, 0).T)
        words[fmt.H_VERSION] = versions
        self._cells = memoryview(words.T)  # single words are cheaper to reach so
        self.slots = writer._slots.take(rows)
        signed = words.view(np.int64)
        self._known, self._accepted = signed[fmt.H_IDS], signed[fmt.H_ACCEPTED]
        self._hot = words[: fmt.HOT_WORDS]
        self._told = words[: fmt.HOT_WORDS + 1].T  # what changes from step to step, checksum included
        self._cold_sums = writer._cold_sums.take(rows)
        self._room = writer.geometry.ids_per_row - int(self._known.max())
        self._first_id = self.rows * writer.geometry.ids_per_row
        self._ids, self._multipliers, self._selectors = views.ids.reshape(-1), views.id_multipliers, views.selectors
        self._heads = views.heads.reshape(-1, fmt.HEAD_WORDS)
        self._hot_heads = self._heads[:, : fmt.HOT_WORDS + 1]
        self._places = 2 * self.rows + (versions & 1)
        self._whole = 2  # publications that write all words, until both heads of every row have the cold ones
        self._at = self._first_id + self._known  # where each row's next id goes
        self._total, self._bound = (np.zeros(count, np.int64) for _ in range(2))
        self._next = self._accepted + 1  # the lengths of a usual step
        self._step = -1  # the last stage's, where all its words but the hash moved on by one; else -1
        self._usual = 0  # usual steps that every row has slots for, from the present one on
        self._high, self._low = np.zeros(count, bool), np.zeros(count, bool)
        self._mixed, self._shifted = np.zeros_like(self._hot), np.zeros_like(self._hot)
        self._sums = np.zeros(count, U64)

    def stage(self, step: int, lengths: np.ndarray, ids: np.ndarray, blocks: dict | None) -> bool:
        """One id per row (u64 [n], overwritten here), int64 [n] lengths, appended blocks. False: not plain, nothing has changed.

        Raises ValueError for blocks that can't be."""
        if self._room <= 0:
            return False
        if step != self._step + 1 or lengths.tobytes() != self._next.tobytes() or not (blocks or self._usual > 0):
            return self._stage(step, lengths, ids, blocks)
        if blocks:
            slots = self.slots.copy()
            self._writer._count_blocks(blocks, self._cells, memoryview(slots))
            left = int(np.minimum.reduce(slots - lengths))
            if left < 0:
                return False
            self._writer._list_blocks(self.rows, blocks, self._cells)
            self.slots, self._usual = slots, left
        else:
            self._usual -= 1
        self._hot += _USUAL
        self._next += 1
        self._append(ids)
        self._step = step
        return True

    def _stage(self, step: int, lengths: np.ndarray, ids: np.ndarray, blocks: dict | None) -> bool:
        """stage() for whatever lengths and blocks."""
        words, known = self.words, self._known
        slots = self.slots
        if blocks:
            slots = slots.copy()
            self._writer._count_blocks(blocks, self._cells, slots)
        np.add(known, 1, out=self._total)
        np.minimum(self._total, slots, out=self._bound)
        np.greater(lengths, self._bound, out=self._high)
        np.less(lengths, self._accepted, out=self._low)
        self._high |= self._low
        if self._high.any():
            return False
        if blocks:
            self._writer._list_blocks(self.rows, blocks, self._cells)
            self.slots = slots
        known += 1
        words[fmt.H_VERSION] += 1
        words[fmt.H_BASE] = words[fmt.H_PRIOR] = words[fmt.H_ACCEPTED]
        words[fmt.H_PRIOR_STEP] = words[fmt.H_STEP]
        words[fmt.H_STEP] = step
        self._accepted[:] = lengths
        self._append(ids)
        # The next step is usual if all that it changes moves on by one from here: each row's two lengths, and the two steps.
        moved = lengths.tobytes() == self._next.tobytes() and int(words[fmt.H_PRIOR_STEP].min()) == step - 1
        self._step = step if moved else -1
        self._usual = int((slots - lengths).min())
        np.add(lengths, 1, out=self._next)
        return True

    def _append(self, ids: np.ndarray) -> None:
        """One id per row behind the ids that it has."""
        self._ids[self._at] = ids
        multipliers = self._multipliers.take(self._at - self._first_id)
        ids *= multipliers
        ids += multipliers  # (id + 1) * multiplier
        self.words[fmt.H_IDS_HASH] += ids
        self._at += 1
        self._room -= 1
        self.staged = True

    def publish(self) -> None:
        """Make the staged versions visible."""
        words, mixed = self.words, self._mixed
        self._places ^= 1
        np.multiply(self._hot, memory.HOT_COLUMN, out=mixed)
        np.right_shift(mixed, _HALF, out=self._shifted)
        mixed ^= self._shifted
        np.add.reduce(mixed, axis=0, out=self._sums)
        self._sums *= _FOLD
        np.add(self._sums, self._cold_sums, out=words[fmt.H_SUM])
        if self._whole:
            self._heads[self._places] = words.T
            self._whole -= 1
        else:
            self._hot_heads[self._places] = self._told
        memory.order()  # what a selector chooses is there before it; readers check all the same
        self._selectors[self.rows] = words[fmt.H_VERSION]
        self.staged = False

    def write_back(self) -> None:
        """Give the rows back to the table's private heads."""
        writer, rows = self._writer, self.rows
        writer._heads[rows] = self.words.T
        writer._slots[rows] = self.slots
        writer._versions[rows] = self.words[fmt.H_VERSION] - U64(self.staged)  # a staged one is nobody's yet
