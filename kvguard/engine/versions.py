"""The next version of every row, in private memory, and how it becomes the one that readers find.

Knows: heads, what they refer to, the order of stores that publishes them. Must not know: sequences' names, when which row changes, tapes.

Invariants
- What a reader can see is always a version that was published whole. Ids and blocks are appended beyond what the visible head counts.
- `heads` are the next versions: nothing is ever read back from shared memory except at adoption and to forget what was staged.
"""

from __future__ import annotations

import numpy as np

from kvguard.engine import memory
from kvguard.engine.generations import Generations
from kvguard.engine.memory import U64
from kvguard.format import rows as fmt


class Versions:
    """`heads`: u64 [rows, HEAD_WORDS]. `numbers`: int64 [rows], of the visible versions. `slots`: int64 [rows], positions that a row's blocks can take; -1
    where no sequence is. `staged`: bool [rows], whose next version waits for `publish`. `block_generations`, `references`: single words of what
    `generations` counts, cheaper to reach so."""

    def __init__(self, views: memory.Views) -> None:
        self.views, self.geometry, self.header = views, views.geometry, views.header
        rows = self.geometry.rows
        self.generations = Generations(views)
        self.heads = np.zeros((rows, fmt.HEAD_WORDS), U64)
        self.numbers = np.zeros(rows, np.int64)
        self.slots = np.full(rows, -1, np.int64)
        self.staged = np.zeros(rows, bool)
        self.block_generations, self.references = memoryview(views.block_generations), memoryview(self.generations.references)
        self._row_blocks, self._row_block_generations = memoryview(views.row_blocks), memoryview(views.row_block_generations)
        self._multipliers: dict[int, tuple[int, int]] = {}  # of block places, at most blocks_per_row

    # ---- the next ones ----------------------------------------------------------------------------------------------------------

    def keep(self, rows: np.ndarray, heads: np.ndarray) -> None:
        """The next heads of open rows, u64 [n, HEAD_WORDS], and what is derived from them."""
        self.heads[rows] = heads
        self.slots[rows] = heads.view(np.int64)[:, fmt.H_BLOCKS] * self.geometry.block_tokens

    def set(self, row: int, head) -> None:
        """The next head of one row, open or not."""
        self.heads[row] = head
        head = self.heads[row]
        self.slots[row] = int(head[fmt.H_BLOCKS]) * self.geometry.block_tokens if int(head[fmt.H_FLAGS]) & fmt.OPEN else -1

    def visible(self, row: int) -> np.ndarray:
        """A copy of the head that readers find."""
        return self.views.heads[row, int(self.numbers[row]) & 1].copy()

    def list_block(self, row: int, head: np.ndarray, block: int, generation: int) -> None:
        """Append one block to an open row's list, and to its head, u64 [HEAD_WORDS]: cheaper than arrays of a few."""
        listed = int(head[fmt.H_BLOCKS])
        self.references[block] += 1
        self._row_blocks[row, listed], self._row_block_generations[row, listed] = block, generation
        by_block, by_generation = self._block_multipliers(listed)
        head[fmt.H_BLOCKS] = listed + 1
        head[fmt.H_BLOCKS_HASH] = int(head[fmt.H_BLOCKS_HASH]) + (block + 1) * by_block + (generation + 1) * by_generation & fmt.MASK

    def _block_multipliers(self, place: int) -> tuple[int, int]:
        found = self._multipliers.get(place)
        if found is None:
            first = fmt.BLOCKS_SALT + 2 * place
            found = self._multipliers[place] = int(fmt.multiplier(first)), int(fmt.multiplier(first + 1))
        return found

    def list_blocks(self, rows: np.ndarray, heads: np.ndarray, entries: bytes) -> None:
        """Append what a tape's records list (their entries, one after the other) to `rows`, int64 [n], and to their heads, u64 [n, HEAD_WORDS]."""
        columns, blocks = np.frombuffer(entries, np.uint32).reshape(-1, 4)[:, 1::-1].T.astype(np.int64)
        if not len(columns):
            return
        order = np.argsort(columns, kind="stable")
        columns, blocks, generations = columns[order], blocks[order], np.frombuffer(entries, U64)[1::2][order]
        signed = heads.view(np.int64)
        places = signed[columns, fmt.H_BLOCKS] + np.arange(len(columns)) - np.searchsorted(columns, columns)
        self.views.row_blocks[rows[columns], places], self.views.row_block_generations[rows[columns], places] = blocks, generations
        np.add.at(self.generations.references, blocks, 1)
        np.add.at(heads, (columns, fmt.H_BLOCKS_HASH), memory.block_terms(places, blocks, generations))
        np.add.at(signed, (columns, fmt.H_BLOCKS), 1)

    def append_blocks(self, row: int, listed: int, blocks: np.ndarray) -> int:
        """Append blocks of the pool, int64 [n], to a row's list of `listed`; returns the terms to add to its hash."""
        generations = self.views.block_generations[blocks]
        self.views.row_blocks[row, listed : listed + len(blocks)] = blocks
        self.views.row_block_generations[row, listed : listed + len(blocks)] = generations
        self.generations.references[blocks] += 1
        return memory.blocks_sum(blocks, generations, listed)

    # ---- publishing -------------------------------------------------------------------------------------------------------------

    def publish(self, rows: np.ndarray, heads: np.ndarray) -> None:
        """Make `heads`, u64 [n, HEAD_WORDS] (overwritten here), what readers find of `rows`, int64 [n]."""
        numbers = self.numbers.take(rows)
        numbers += 1
        heads[:, fmt.H_VERSION] = numbers
        heads[:, fmt.H_SUM] = memory.head_sums(heads)
        self.views.heads[rows, numbers & 1] = heads
        memory.order()  # what a selector chooses is there before it; readers check all the same
        self.views.selectors[rows] = numbers
        self.numbers[rows] = numbers

    def publish_one(self, row: int) -> None:
        rows = np.array([row])
        self.publish(rows, self.heads[rows])
        memory.order()  # the raised generation is seen before whatever the caller does next

    def publish_staged(self) -> None:
        rows = np.flatnonzero(self.staged)
        self.publish(rows, self.heads.take(rows, 0))
        self.staged[rows] = False
