"""Flush and fetch: positions of one sequence between a pool and local host memory.

Knows: pools, block lists. Must not know: links, topologies.
Invariants: what flush writes fetch reads: canonical bytes, token-major (device/base.py). DejaVuLib's scatter is gather (the pool's capture) and flush, its
gather is fetch and the pool's scatter.
"""

from __future__ import annotations

import numpy as np

from kvguard.device.base import Pool
from kvguard.errors import Refused
from kvguard.types import Span


def flush(pool: Pool, blocks, span: Span) -> bytearray:
    """Canonical bytes of `span` of the sequence whose block list is `blocks`. Raises Refused beyond the list, or where tokens aren't addressable."""
    out = bytearray((span.end - span.start) * pool.layout.token_bytes)
    pool.capture(*pieces(blocks, span, pool.layout.block_tokens), memoryview(out))
    return out


def fetch(pool: Pool, blocks, span: Span, data) -> None:
    """The reverse of flush."""
    pool.scatter(*pieces(blocks, span, pool.layout.block_tokens), memoryview(data))


def pieces(blocks, span: Span, block_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(blocks, starts, counts) of `span`: the columns of capture and scatter."""
    if not 0 <= span.start <= span.end <= len(blocks) * block_tokens:
        raise Refused(f"positions [{span.start}, {span.end}) are not all in a list of {len(blocks)} blocks of {block_tokens}. Try: all of its blocks")
    indices = np.arange(span.start // block_tokens, -(-span.end // block_tokens), dtype=np.int64)
    firsts = np.maximum(indices * block_tokens, span.start)
    ends = np.minimum((indices + 1) * block_tokens, span.end)
    return np.asarray(blocks, dtype=np.int64)[indices], firsts % block_tokens, ends - firsts
