"""A layout proved at attach: the engine writes one token with its own code, and exactly the bytes that the layout names may change.

Knows: layouts, a pool's bytes by offset, on the host or on a GPU. Must not know: how the engine writes.
Invariants: what is looked at byte by byte is what it was afterwards; every named byte must change (it is set to 0x00 and to 0xFF before two writes of the same
token, so that no value can hide), no other byte of the pool that is looked at may. In host memory all of it is; of a pool on a GPU, across the link, no more
than LOOKED_BYTES_MAX: whatever lies beside the named bytes, both ends, and places at even distances.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import xxhash

from kvguard.errors import Refused
from kvguard.format.layout import Layout

CHUNK_BYTES = 64 * 1024  # looked at byte by byte where the layout names something in it, by sum where not
RUN_CHUNKS = 64  # that one sum is taken of
LOOKED_BYTES_MAX = 256 << 20
FILLS = (0x00, 0xFF)


class Peeked(Protocol):
    """gpu_pool.GpuPool, as far as it is looked into."""

    layout: Layout

    def peek(self, at: int, size: int) -> np.ndarray: ...

    def poke(self, at: int, values: np.ndarray) -> None: ...


class _Host:
    """The same of memory that is mapped here."""

    def __init__(self, memory: memoryview) -> None:
        self._bytes = np.frombuffer(memory, dtype=np.uint8)
        self.size = self._bytes.size

    def peek(self, at: int, size: int) -> np.ndarray:
        return self._bytes[at : at + size].copy()

    def poke(self, at: int, values: np.ndarray) -> None:
        self._bytes[at : at + values.size] = values


def prove(layout: Layout, pool: memoryview | Peeked, write_token: Callable[[int, int], None], block: int = 0) -> None:
    """Raises Refused with what differed unless write_token(block, slot) writes what `layout` says, for the first and the last slot of scratch `block`.

    `pool`: a host pool's memory (HostPool.memory), or a pool on a GPU (cuda.CudaDevice.allocate, share), idle but for write_token, which must be done, or be
    launched on the pool's `current` stream, when it returns. Where tokens aren't addressable only strays are faults. Raises DeviceLost, TimedOut on a GPU.
    """
    seen, size, looked = (pool, pool.layout.pool_bytes, LOOKED_BYTES_MAX) if hasattr(pool, "peek") else (_Host(pool), len(pool), len(pool))
    for slot in sorted({0, layout.block_tokens - 1}):
        named = _Named(seen, size, _bytes_of(layout, block, slot))
        others = _Others(seen, size, named.chunks, looked)
        kept, changed = named.read(), np.zeros(named.size, dtype=bool)
        try:
            for fill in FILLS:
                before, sums = named.filled(fill), others.sums()
                write_token(block, slot)
                after = named.read()
                changed |= named.values(after) != fill
                stray = named.stray(before, after)
                if stray is None:
                    stray = others.changed(sums)
                if stray is not None:
                    raise Refused(f"writing block {block} slot {slot} changed byte {stray}, which the layout doesn't name there. {_TRY}")
        finally:
            named.write(kept)
        if not (changed.all() if layout.addressable else changed.any()):
            missed = named.offset(int(np.argmin(changed)))
            unchanged = f"{int((~changed).sum())} of {named.size} bytes as they were, the first is byte {missed}"
            raise Refused(f"writing block {block} slot {slot} left {unchanged}. {_TRY}")


_TRY = "Try: take offset and strides from the tensors that the engine really writes"


def _bytes_of(layout: Layout, block: int, slot: int) -> np.ndarray:
    """Byte numbers of a token (or of the whole block), in canonical order."""
    return np.concatenate([np.arange(offset, offset + size, dtype=np.int64) for offset, size in layout.ranges(block, slot if layout.addressable else 0)])


class _Named:
    """Chunks that hold named bytes, by number; pictures of them are dicts of arrays."""

    def __init__(self, seen: Peeked, size: int, named: np.ndarray) -> None:
        self._seen, self._total, self._named, self.size = seen, size, np.sort(named), named.size
        self._within = {int(chunk): self._named[self._named // CHUNK_BYTES == chunk] % CHUNK_BYTES for chunk in np.unique(named // CHUNK_BYTES)}
        self.chunks = tuple(self._within)

    def offset(self, n: int) -> int:
        """Of the nth named byte, in the order of values()."""
        return int(self._named[n])

    def read(self) -> dict[int, np.ndarray]:
        return {chunk: self._seen.peek(chunk * CHUNK_BYTES, min(CHUNK_BYTES, self._total - chunk * CHUNK_BYTES)) for chunk in self.chunks}

    def write(self, picture: dict[int, np.ndarray]) -> None:
        for chunk, values in picture.items():
            self._seen.poke(chunk * CHUNK_BYTES, values)

    def filled(self, fill: int) -> dict[int, np.ndarray]:
        """What is there once every named byte is `fill`."""
        picture = self.read()
        for chunk, within in self._within.items():
            picture[chunk][within] = fill
        self.write(picture)
        return picture

    def values(self, picture: dict[int, np.ndarray]) -> np.ndarray:
        return np.concatenate([picture[chunk][within] for chunk, within in self._within.items()])

    def stray(self, before: dict[int, np.ndarray], after: dict[int, np.ndarray]) -> int | None:
        """The first byte that changed and isn't named."""
        for chunk, within in self._within.items():
            strays = np.setdiff1d(np.flatnonzero(before[chunk] != after[chunk]), within, assume_unique=True)
            if strays.size:
                return chunk * CHUNK_BYTES + int(strays[0])
        return None


class _Others:
    """What holds no named byte, as far as it is looked at: runs of chunks, by the sum of each."""

    def __init__(self, seen: Peeked, size: int, named: tuple[int, ...], looked_bytes_max: int) -> None:
        self._seen, count, held = seen, -(-size // CHUNK_BYTES), set(named)
        others = [chunk for chunk in range(count) if chunk not in held]
        step = -(-len(others) * CHUNK_BYTES // max(1, looked_bytes_max))
        if step > 1:
            others = sorted({*others[::step], *others[-1:], *(chunk for one in named for chunk in (one - 1, one + 1) if 0 <= chunk < count)} - held)
        self._runs: list[tuple[int, int]] = []  # offset, bytes
        for chunk in others:
            at, left = chunk * CHUNK_BYTES, min(CHUNK_BYTES, size - chunk * CHUNK_BYTES)
            if self._runs and sum(self._runs[-1]) == at and self._runs[-1][1] < RUN_CHUNKS * CHUNK_BYTES:
                self._runs[-1] = self._runs[-1][0], self._runs[-1][1] + left
            else:
                self._runs.append((at, left))

    def sums(self) -> list[int]:
        return [xxhash.xxh3_64_intdigest(self._seen.peek(at, size)) for at, size in self._runs]

    def changed(self, sums: list[int]) -> int | None:
        """The first byte of a run that is another than it was."""
        return next((at for (at, _), now, then in zip(self._runs, self.sums(), sums, strict=True) if now != then), None)
