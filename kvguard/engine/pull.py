"""Copying somebody else's blocks into this process's own pool: verified pages of a replica, or blocks of a dead process's pool.

Knows: pages, pools, batches. Must not know: why (a rank that is restored, a sequence that moved here), tables, the daemon.

Invariants
- Nothing of a page is copied before its generation and sums hold, and a page that lost its generation meanwhile fails the pull.
- `between` is called before every batch and may raise: a pull that has a deadline keeps it to within one batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kvguard.errors import Stale
from kvguard.format.pages import BATCH_BYTES, PageReader


def token_counts(positions: int, block_tokens: int) -> list[int]:
    """How many positions stand in each block of a sequence of `positions`."""
    return [min(block_tokens, positions - start) for start in range(0, positions, block_tokens)]


def pull_pages(
    pool, reader: PageReader, blocks: Sequence[int], generations: Sequence[int], counts: Sequence[int], here: Sequence[int],
    between: Callable[[], None] = lambda: None,
) -> int:  # fmt: skip
    """Page blocks[n], its first counts[n] tokens, into block here[n] of `pool`; returns the bytes copied. Raises Stale, BadFrame, Refused (blocks not here)."""
    shape, copied = reader.shape, 0
    batch = max(1, BATCH_BYTES // shape.block_bytes)
    for first in range(0, len(blocks), batch):
        between()
        pieces = list(zip(blocks[first : first + batch], generations[first : first + batch], counts[first : first + batch], strict=True))
        parts = [reader.page(*piece) for piece in pieces]
        data = parts[0] if len(parts) == 1 else memoryview(b"".join(parts))
        _scatter(pool, shape.addressable, here[first : first + batch], [count for _, _, count in pieces], data)
        for block, generation, _ in pieces:
            if not reader.holds(block, generation):
                raise Stale(f"page {block} was given up while it was copied")
        copied += data.nbytes
    return copied


def pull_pool(pool, source, blocks: Sequence[int], counts: Sequence[int], here: Sequence[int], between: Callable[[], None] = lambda: None) -> int:
    """The same out of a dead process's pool of an equal fingerprint, mapped here as `source`. It has no sums: the memory is the very one that was written."""
    layout, copied = source.layout, 0
    batch = max(1, BATCH_BYTES // layout.block_bytes)
    for first in range(0, len(blocks), batch):
        between()
        some, sizes = list(blocks[first : first + batch]), list(counts[first : first + batch])
        data = memoryview(bytearray(sum(sizes) * layout.token_bytes if layout.addressable else len(some) * layout.block_bytes))
        if layout.addressable:
            source.capture(some, [0] * len(some), sizes, data)
        else:
            source.capture_blocks(some, data)
        _scatter(pool, layout.addressable, here[first : first + batch], sizes, data)
        copied += data.nbytes
    return copied


def _scatter(pool, addressable: bool, here: Sequence[int], counts: Sequence[int], data: memoryview) -> None:
    if addressable:
        pool.scatter(list(here), [0] * len(counts), list(counts), data)
    else:
        pool.scatter_blocks(list(here), data)
