"""Copying somebody else's blocks into this process's own pool: verified pages of a replica, or blocks of a dead process's pool.

Knows: pages, pools, batches. Must not know: why (a rank that is restored, a sequence that moved here), tables, the daemon.

Invariants
- Nothing of a page is copied before its generation and sums hold, and a page that lost its generation meanwhile fails the pull.
- A pull keeps its deadline to within one batch.
- A pool on a GPU takes pages layer by layer, straight out of the arena (arriving.py), where the arena can be registered; else batch by batch, as every pool.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from kvguard.device.gpu_pool import GpuPool
from kvguard.engine.arriving import Arriving
from kvguard.errors import Refused, Stale, TimedOut
from kvguard.format.pages import BATCH_BYTES, PageReader


_log = logging.getLogger("kvguard.engine")


def token_counts(positions: int, block_tokens: int) -> list[int]:
    """How many positions stand in each block of a sequence of `positions`."""
    return [min(block_tokens, positions - start) for start in range(0, positions, block_tokens)]


def pieces_of(blocks: Sequence[int], first: int, end: int, block_tokens: int) -> list[tuple[int, int, int]]:
    """Positions [first, end) of a sequence with these blocks as (block, start, count) each: what Step.wrote takes, column by column."""
    found = []
    while first < end:
        count = min(block_tokens - first % block_tokens, end - first)
        found.append((blocks[first // block_tokens], first % block_tokens, count))
        first += count
    return found


def pull_pages(
    pool, reader: PageReader, blocks: Sequence[int], generations: Sequence[int], counts: Sequence[int], here: Sequence[int], due: float,
) -> int:  # fmt: skip
    """Page blocks[n], its first counts[n] tokens, into block here[n] of `pool` by `due` (monotonic); returns the bytes copied.

    Raises Stale, BadFrame, Refused (blocks not here), TimedOut, DeviceLost: then the blocks here hold nothing that may be used.
    """
    if not blocks:
        return 0
    if isinstance(pool, GpuPool):
        try:
            arriving = Arriving(pool, reader, blocks, generations, counts, here, due)
        except Refused as error:
            _log.info("kvguard: not pulled layer by layer, but in batches: %s", error)
        else:
            with arriving:
                return arriving.finish()
    shape, copied = reader.shape, 0
    batch = max(1, BATCH_BYTES // shape.block_bytes)
    for first in range(0, len(blocks), batch):
        _in_time(due)
        pieces = list(zip(blocks[first : first + batch], generations[first : first + batch], counts[first : first + batch], strict=True))
        parts = [reader.page(*piece) for piece in pieces]
        data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        _scatter(pool, shape.addressable, here[first : first + batch], [count for _, _, count in pieces], data)
        for block, generation, _ in pieces:
            if not reader.holds(block, generation):
                raise Stale(f"page {block} was given up while it was copied")
        copied += data.nbytes
    return copied


def pull_pool(pool, source, blocks: Sequence[int], counts: Sequence[int], here: Sequence[int], due: float) -> int:
    """The same out of a dead process's pool of an equal fingerprint, mapped here as `source`. It has no sums: the memory is the very one that was written."""
    layout, copied = source.layout, 0
    batch = max(1, BATCH_BYTES // layout.block_bytes)
    for first in range(0, len(blocks), batch):
        _in_time(due)
        some, sizes = list(blocks[first : first + batch]), list(counts[first : first + batch])
        data = memoryview(bytearray(sum(sizes) * layout.token_bytes if layout.addressable else len(some) * layout.block_bytes))
        if layout.addressable:
            source.capture(some, [0] * len(some), sizes, data)
        else:
            source.capture_blocks(some, data)
        _scatter(pool, layout.addressable, here[first : first + batch], sizes, data)
        copied += data.nbytes
    return copied


def _in_time(due: float) -> None:
    if time.monotonic() > due:
        raise TimedOut("not everything was pulled by its deadline. Try: compute it from its ids")


def _scatter(pool, addressable: bool, here: Sequence[int], counts: Sequence[int], data: memoryview) -> None:
    if addressable:
        pool.scatter(list(here), [0] * len(counts), list(counts), data)
    else:
        pool.scatter_blocks(list(here), data)
