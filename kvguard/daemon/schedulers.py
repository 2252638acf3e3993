"""A scheduler that attached beside the ranks: its table as a stream of ids, without a pool.

Knows: what a scheduler's Attach may say, which of its table's facts count. Must not know: when it is looked at (ranks.py), what the core makes of it.
Invariants: a scheduler's life is its stream, so that generations of two lives are never compared; nothing of it is ever called committed KV.
"""

from __future__ import annotations

import msgspec

from kvguard.core import events
from kvguard.errors import Refused
from kvguard.format import local
from kvguard.format.messages import IDS_ONLY
from kvguard.types import Rank, StreamId, scheduler_of

DESCRIPTORS = 3  # pidfd, bell, table


class NoPool:
    """Stands where a rank has its pool. There is nothing to capture: no position of a scheduler's stream is ever committed."""

    def export(self) -> list[int]:
        return []

    def close(self) -> None:
        return None

    def capture(self, blocks, starts, counts, out: memoryview) -> int:
        raise Refused("a scheduler has no KV to capture")

    def capture_blocks(self, blocks, out: memoryview) -> int:
        raise Refused("a scheduler has no KV to capture")


def described(message: local.Attach, descriptors: int) -> local.Attach:
    """The Attach with the stream that this life of the scheduler has here. Raises Refused where it isn't described as a scheduler."""
    named = message.stream
    if named is None or named.instance != message.instance or named.rank != Rank(named.rank.dp, 0, 0) or message.layouts or descriptors != DESCRIPTORS:
        raise Refused("the scheduler can't be attached as it was described. Try: kvguard.engine.attach_scheduler")
    return msgspec.structs.replace(message, stream=StreamId(message.instance, scheduler_of(named.rank.dp), message.incarnation))


def ids_alone(looked: events.Looked) -> events.Looked:
    """The ids of a look. Blocks are the ranks', and positions are what a scheduler wants, never what a device has."""
    tokens = IDS_ONLY.block_tokens
    cut = tuple(events.Cut(one.row, one.kept, one.generation, one.lineage, -(-one.kept // tokens)) for one in looked.cut)
    return events.Looked(looked.stream, looked.released, cut, looked.opened, (), looked.rows, (0,) * len(looked.rows), looked.ids)
