"""What a stream's sender and its holder say to each other.

Knows: fields and their types. Must not know: framing (wire.py), what is done with a message (core/).
Invariants: as of all messages (messages.py).
"""

from __future__ import annotations

import msgspec

from kvguard.format.shapes import VERSION, Holding, Ints, Message, StreamShape
from kvguard.types import Epoch, Lineage, NodeId, SequenceId, StreamId


class Hello(Message, frozen=True):
    """Opens or probes a stream. Both lanes' numbers restart at 1 in the new `session` (random, non-zero)."""

    stream: StreamId
    session: int
    epoch: Epoch
    node: NodeId
    shape: StreamShape
    version: int = VERSION


class Held(Message, frozen=True):
    """The holder's answer to Hello: what it has, with lineage, after dropping what lies beyond a fork it knows of. Refused when `reason` is not empty."""

    session: int
    epoch: Epoch
    holding: Holding
    reason: str = ""


class OpenOp(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """A new sequence; `no` names it on this session. What the holder has under the same (sequence, generation, agreeing lineage) is continued, else dropped."""

    no: int
    sequence: SequenceId
    generation: int
    lineage: Lineage
    request: bytes


class CutOp(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Truncation: KV and ids beyond `position` are void; what follows is of `generation`."""

    no: int
    position: int
    generation: int
    lineage: Lineage


class ReleaseOp(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The sequence's pages go at once; its ids stay for ids_retention_s after delivery."""

    no: int


Op = OpenOp | CutOp | ReleaseOp


class IdsFrame(Message, frozen=True):
    """Lane `ids`: first `ops` in order, then the extensions. `ids`: little-endian u32, concatenated in column order; `samplers` likewise by `sampler_bytes`.

    `after_kv`: the kv frame that must have been applied before this one (set where `ops` cut or release: the lanes overtake each other, and pieces
    captured before a cut must not land after it).
    """

    session: int
    epoch: Epoch
    number: int
    ops: tuple[Op, ...]
    nos: Ints = ()
    starts: Ints = ()
    counts: Ints = ()
    ids: bytes = b""
    sampler_bytes: Ints = ()
    samplers: bytes = b""
    after_kv: int = 0


class KvFrame(Message, frozen=True):
    """Lane `kv`: pieces, each within one block. The payload is the pieces' bytes in column order.

    `requires`: the ids frame that must have been applied before this one. `starts`: first position, `counts`: positions; block index = start // block_tokens.
    `flags`: 0 tokens' bytes follow (counts * token_bytes), 1 reference: no bytes, the holder already has this (block, generation) filled so far,
    2 the whole block follows (block_bytes), of which counts positions from start are new.
    `sums`: little-endian u64 xxh3_64 per token (flag 0), per block (flag 2), none (flag 1): taken from the pool, checked at every hand-over up to the restore.
    """

    session: int
    epoch: Epoch
    number: int
    requires: int
    nos: Ints
    starts: Ints
    counts: Ints
    blocks: Ints
    generations: Ints
    flags: Ints
    sums: bytes


PIECE_TOKENS, PIECE_REFERENCE, PIECE_BLOCK = 0, 1, 2


class Ack(Message, frozen=True):
    """Cumulative, once per loop turn and session. `refused`: sequences the holder won't keep, with the reason.

    `refusals`: how many it has refused in this session, these included: that an acknowledgement was lost is noticed by the next one, else what was refused in
    it would be taken for held. `resync`: why Hello must be said again (a gap, a broken frame), else empty.
    """

    session: int
    epoch: Epoch
    ids_number: int
    kv_number: int
    refused: tuple[tuple[int, str], ...] = ()
    resync: str = ""
    refusals: int = 0


class StreamEnd(Message, frozen=True):
    """A clean end (detach, or another holder took over): drop the stream's pages."""

    stream: StreamId
    epoch: Epoch
    reason: str
