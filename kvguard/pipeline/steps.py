"""What driver and stages say to each other: one message, sent by the driver to the first stage, handed on from stage to stage, back to the driver.

Knows: fields, types, their bytes. Must not know: sockets, models.
Invariants: every message carries the epoch; who has adopted a newer one drops it (house rule "One emitter per stream"). The scheduler's facts travel
with the step that uses them, to every rank.

Over ZeroMQ: PUSH to the next endpoint of `route`, PULL at every stage and at the driver; two parts, this message and the tensor's bytes (hidden states
float32 [rows, hidden] between stages, logits float32 [logit rows, vocab] to the driver), the second empty where there is none.
"""

from __future__ import annotations

import msgspec

from kvguard.errors import BadFrame

STEP, STATE, DIGEST = "step", "state", "digest"


class Facts(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's share of a step, and what its rows must say after it.

    Positions [start, end) are computed; after it KV is complete for [0, end). `blocks`: newly listed ones. `tokens`: ids not yet told to the ranks,
    from index `first_token` on: at least up to `end`. `request`: with the first share only. `logits`: of how many last positions.
    """

    sequence: str
    start: int
    end: int
    prefill: bool
    logits: int
    blocks: tuple[int, ...]
    first_token: int
    tokens: tuple[int, ...]
    request: bytes = b""
    sampler: bytes = b""


class Message(msgspec.Struct, frozen=True, array_like=True):
    """`kind`: step | state | digest. `route`: endpoints of the stages in order, then the driver's. `hop`: index of the receiver in it.

    step: `facts` in the batch's order; `released`: sequences that are over, applied before them.
    state: every stage appends to `replies` what its table says: {sequence: [position, blocks]}, as MessagePack.
    digest: every stage appends {sequence: [xxh3_64 of each position's canonical KV bytes]} of the sequences named in `released`, which stay.
    """

    kind: str
    epoch: int
    number: int
    route: tuple[str, ...]
    hop: int
    facts: tuple[Facts, ...] = ()
    released: tuple[str, ...] = ()
    replies: tuple[bytes, ...] = ()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Message)


def pack(message: Message) -> bytes:
    return _encoder.encode(message)


def unpack(data) -> Message:
    """Raises BadFrame for anything else."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"not a message between stages: {error}") from error
