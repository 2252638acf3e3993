"""Who has which block of the KV pools: ids only; every stage's pool uses the same ids.

Knows: how many blocks there are, which are free, each sequence's table. Must not know: memory, generations, layouts, torch.
Invariants: a block is in exactly one table or free; a table covers its sequence's positions without a hole; freed blocks are reused last, so
that a copy in flight of a freed block rarely meets new contents (generations catch it when it does).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from kvguard.errors import KvguardError
from kvguard.pipeline.batch import BLOCK_TOKENS
from kvguard.types import SequenceId


class PoolExhausted(KvguardError):
    """No free block is left for what was asked; nothing was changed."""


class BlockPool:
    """Allocates blocks of `block_tokens` positions each. Not thread-safe: the driver's loop owns it."""

    def __init__(self, blocks: int, block_tokens: int = BLOCK_TOKENS):
        assert blocks > 0 and block_tokens > 0, (blocks, block_tokens)
        self.blocks = blocks
        self.block_tokens = block_tokens
        self._free: deque[int] = deque(range(blocks))
        self._tables: dict[SequenceId, list[int]] = {}

    @property
    def free_blocks(self) -> int:
        return len(self._free)

    @property
    def sequences(self) -> tuple[SequenceId, ...]:
        return tuple(self._tables)

    def table(self, sequence: SequenceId) -> tuple[int, ...]:
        """The blocks of `sequence` in order of position; empty for one that has none."""
        return tuple(self._tables.get(sequence, ()))

    def blocks_for(self, positions: int) -> int:
        return -(-positions // self.block_tokens)

    def missing(self, sequence: SequenceId, positions: int) -> int:
        """How many more blocks `sequence` needs to hold [0, positions)."""
        return max(0, self.blocks_for(positions) - len(self._tables.get(sequence, ())))

    def allocate(self, sequence: SequenceId, positions: int) -> tuple[int, ...]:
        """Grows the table of `sequence` to hold [0, positions); returns the new blocks only. Raises PoolExhausted, all or nothing."""
        missing = self.missing(sequence, positions)
        if missing > len(self._free):
            raise PoolExhausted(f"{sequence} needs {missing} more blocks for {positions} positions, {len(self._free)} of {self.blocks} are free. "
                                "Try: fewer or shorter sequences at once, or a larger pool")
        added = [self._free.popleft() for _ in range(missing)]
        if added:
            self._tables.setdefault(sequence, []).extend(added)
        return tuple(added)

    def truncate(self, sequence: SequenceId, positions: int) -> tuple[int, ...]:
        """Frees the blocks that [0, positions) does not touch, and returns them."""
        table = self._tables.get(sequence, [])
        kept = self.blocks_for(positions)
        freed = table[kept:]
        if freed:
            del table[kept:]
            self._free.extend(freed)
        if not table:
            self._tables.pop(sequence, None)
        return tuple(freed)

    def free(self, sequence: SequenceId) -> tuple[int, ...]:
        """Frees all blocks of `sequence` and returns them; none for one that has none."""
        return self.truncate(sequence, 0)

    def adopt(self, sequence: SequenceId, blocks: Iterable[int]) -> None:
        """Takes over a table as it stands in live pools (a new driver). Raises KvguardError if a block is not free; nothing was changed."""
        wanted = list(blocks)
        if sequence in self._tables:
            raise KvguardError(f"{sequence} has blocks already: two sequences under one id. Try: free it first")
        taken = set(wanted) - set(self._free)
        if taken or len(set(wanted)) != len(wanted):
            raise KvguardError(f"{sequence}: blocks {sorted(taken) or wanted} are in use or named twice: its table is not true any more. "
                               "Try: recompute it from its ids")
        if wanted:
            self._tables[sequence] = wanted
            mine = set(wanted)
            self._free = deque(block for block in self._free if block not in mine)
