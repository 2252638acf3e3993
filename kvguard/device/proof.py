"""A layout proved at attach: the engine writes one token with its own code, and exactly the bytes that the layout names may change.

Knows: layouts and a pool's host memory. Must not know: how the engine writes.
Invariants: the named bytes are what they were afterwards; every named byte must change (it is set to 0x00 and to 0xFF before two writes of the same token,
so that no value can hide), no other byte of the pool may.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import xxhash

from kvguard.errors import Refused
from kvguard.format.layout import Layout

CHUNK_BYTES = 64 * 1024  # compared by sum where the layout names nothing, byte by byte where it does
FILLS = (0x00, 0xFF)


def prove(layout: Layout, memory: memoryview, write_token: Callable[[int, int], None], block: int = 0) -> None:
    """Raises Refused with what differed unless write_token(block, slot) writes what `layout` says, for the first and the last slot of scratch `block`.

    `memory`: the pool (HostPool.memory), idle but for write_token, which must be done when it returns. Where tokens aren't addressable only strays are faults.
    """
    pool = np.frombuffer(memory, dtype=np.uint8)
    for slot in sorted({0, layout.block_tokens - 1}):
        named = _named(layout, block, slot)
        kept = pool[named].copy()
        changed = np.zeros(named.size, dtype=bool)
        try:
            for fill in FILLS:
                pool[named] = fill
                before = _Picture(pool, named)
                write_token(block, slot)
                changed |= pool[named] != fill
                stray = before.stray(pool)
                if stray is not None:
                    raise Refused(f"writing block {block} slot {slot} changed byte {stray}, which the layout doesn't name there. {_TRY}")
        finally:
            pool[named] = kept
        if not (changed.all() if layout.addressable else changed.any()):
            missed = int(named[np.argmin(changed)])
            unchanged = f"{int((~changed).sum())} of {named.size} bytes as they were, the first is byte {missed}"
            raise Refused(f"writing block {block} slot {slot} left {unchanged}. {_TRY}")


_TRY = "Try: take offset and strides from the tensors that the engine really writes"


def _named(layout: Layout, block: int, slot: int) -> np.ndarray:
    """Byte numbers of a token (or of the whole block), in canonical order."""
    return np.concatenate([np.arange(offset, offset + size, dtype=np.int64) for offset, size in layout.ranges(block, slot if layout.addressable else 0)])


class _Picture:
    """What a pool was like: copies of the chunks that hold named bytes, sums of the others."""

    def __init__(self, pool: np.ndarray, named: np.ndarray) -> None:
        self._allowed = np.sort(named)
        self._copied = {int(chunk): self._chunk(pool, chunk).copy() for chunk in np.unique(named // CHUNK_BYTES)}
        self._sums = {chunk: self._sum(pool, chunk) for chunk in range(-(-pool.size // CHUNK_BYTES)) if chunk not in self._copied}

    def stray(self, pool: np.ndarray) -> int | None:
        """The first byte that changed and isn't named (its chunk's first byte, where only the sum is known)."""
        for chunk, copy in self._copied.items():
            different = np.flatnonzero(self._chunk(pool, chunk) != copy) + chunk * CHUNK_BYTES
            strays = different[~np.isin(different, self._allowed)]
            if strays.size:
                return int(strays[0])
        return next((chunk * CHUNK_BYTES for chunk, known in self._sums.items() if self._sum(pool, chunk) != known), None)

    @staticmethod
    def _chunk(pool: np.ndarray, chunk: int) -> np.ndarray:
        return pool[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES]

    @classmethod
    def _sum(cls, pool: np.ndarray, chunk: int) -> int:
        return xxhash.xxh3_64_intdigest(cls._chunk(pool, chunk))
