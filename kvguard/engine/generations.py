"""The numbers that are never used again: of rows, and of blocks that rows refer to.

Knows: the table's counter, who references which block. Must not know: what a row says.
Invariants: the counter is stored before a number of it is used; a block that no row references any more has a new generation before the call
that let go of it returns.
"""

from __future__ import annotations

import numpy as np

from kvguard.engine import memory
from kvguard.engine.memory import U64
from kvguard.format import rows as fmt


class Generations:
    """`counter`: the last number given out. `references`: int32 [blocks], how many rows list each block."""

    def __init__(self, views: memory.Views) -> None:
        self._words, self._rows, self._blocks = views.words, views.row_generations, views.block_generations
        self.counter = int(views.words[fmt.COUNTER_AT // 8])
        self.references = np.zeros(views.geometry.blocks, np.int32)

    def take(self, count: int) -> int:
        """The first of `count` new numbers."""
        first = self.counter + 1
        self.counter += count
        self._words[fmt.COUNTER_AT // 8] = self.counter
        memory.order()
        return first

    def raise_row(self, row: int) -> int:
        generation = self.take(1)
        self._rows[row] = generation
        return generation

    def raise_blocks(self, blocks: np.ndarray) -> None:
        """New generations for distinct blocks, int [n]."""
        if len(blocks):
            first = self.take(len(blocks))
            self._blocks[blocks] = np.arange(first, first + len(blocks), dtype=U64)

    def drop(self, blocks: np.ndarray) -> None:
        """Take references away; unreferenced blocks may be overwritten from now on, so their generations rise now."""
        if len(blocks):
            np.subtract.at(self.references, blocks, 1)
            self.raise_blocks(np.unique(blocks[self.references[blocks] == 0]))
