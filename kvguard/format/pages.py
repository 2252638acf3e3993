"""One replica page: a block's canonical bytes, its generation, and the sums that travelled with it from the pool.

    offset                    field
    0                         canonical bytes of the block (token i at i * token_bytes where tokens are addressable)
    block_bytes               generation of the block, u64 LE
    block_bytes + 8           xxh3_64 per token, u64 LE each; one of the whole block where tokens aren't addressable
    ...                       padding to PAGE_ALIGNMENT_BYTES

Page n starts at n * page_bytes(shape) and holds the sender's block n. Written by store/arena.py, read by whoever restores.
Knows: this arithmetic, and how to read pages out of a descriptor. Must not know: numpy, who holds what, budgets.
Invariants: nothing leaves a PageReader before generation and sums hold.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence

import xxhash

from kvguard.errors import BadFrame, Refused, Stale
from kvguard.format.messages import StreamShape

PAGE_ALIGNMENT_BYTES = 64
BATCH_BYTES = 1024 * 1024


def page_bytes(shape: StreamShape) -> int:
    bare = shape.block_bytes + 8 + 8 * sums_per_page(shape)
    return -(-bare // PAGE_ALIGNMENT_BYTES) * PAGE_ALIGNMENT_BYTES


def sums_per_page(shape: StreamShape) -> int:
    return shape.block_tokens if shape.addressable else 1


def sums_of(data: memoryview, token_bytes: int) -> tuple[int, ...]:
    """xxh3_64 of each run of `token_bytes` in `data`: what travels in KvFrame.sums (there packed little-endian)."""
    digest = xxhash.xxh3_64_intdigest
    if len(data) == token_bytes:
        return (digest(data),)
    return tuple(digest(data[start : start + token_bytes]) for start in range(0, len(data), token_bytes))


def pack_sums(sums: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(sums)}Q", *sums)


def unpack_sums(data) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // 8}Q", data)


class PageReader:
    """Replica pages behind a descriptor, mapped read-only. The descriptor stays the caller's."""

    def __init__(self, descriptor: int, shape: StreamShape) -> None:
        """Raises Refused where the descriptor is too small for `shape`."""
        self.shape = shape
        self._page_bytes = page_bytes(shape)
        needed, held = shape.blocks * self._page_bytes, os.fstat(descriptor).st_size
        if held < needed:
            raise Refused(f"an arena of {held} bytes can't hold {shape.blocks} pages of {self._page_bytes}. Try: the shape that came with the descriptor")
        self._memory = memoryview(mmap.mmap(descriptor, needed, mmap.MAP_SHARED, mmap.PROT_READ))

    def __enter__(self) -> PageReader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Forget the mapping; it goes when the last view that was handed out does."""
        self._memory = memoryview(b"")

    def around(self, blocks: Sequence[int]) -> tuple[int, memoryview]:
        """(where in the arena it begins, bytes) of the smallest range of whole pages of memory that all of these blocks lie in, for who reads them in place."""
        start = min(blocks) * self._page_bytes & -mmap.PAGESIZE
        end = (max(blocks) + 1) * self._page_bytes
        return start, self._memory[start : min(len(self._memory), -(-end // mmap.PAGESIZE) * mmap.PAGESIZE)]

    def place(self, block: int) -> int:
        """Where in the arena a block's bytes begin."""
        return block * self._page_bytes

    def holds(self, block: int, generation: int) -> bool:
        """Whether page `block` is of that generation now."""
        return struct.unpack_from("<Q", self._memory, block * self._page_bytes + self.shape.block_bytes)[0] == generation

    def page(self, block: int, generation: int, tokens: int) -> memoryview:
        """The canonical bytes of the first `tokens` tokens (the whole block where tokens aren't addressable). Raises Stale and BadFrame, naming the block."""
        shape = self.shape
        if not 0 <= block < shape.blocks or not 0 < tokens <= shape.block_tokens:
            raise BadFrame(f"block {block} with {tokens} tokens is not of an arena of {shape.blocks} blocks of {shape.block_tokens}")
        start = block * self._page_bytes
        trailer = start + shape.block_bytes
        (held,) = struct.unpack_from("<Q", self._memory, trailer)
        if held != generation:
            raise Stale(f"page {block} holds generation {held}, wanted {generation}")
        data = self._memory[start : start + (tokens * shape.token_bytes if shape.addressable else shape.block_bytes)]
        count = tokens if shape.addressable else 1
        kept = unpack_sums(self._memory[trailer + 8 : trailer + 8 + 8 * count])
        found = sums_of(data, shape.token_bytes if shape.addressable else shape.block_bytes)
        if found != kept:
            wrong = next(n for n, (a, b) in enumerate(zip(found, kept, strict=True)) if a != b)
            raise BadFrame(f"page {block}: token {wrong}'s bytes don't match the sum taken from the pool")
        return data
