"""What stages append to a state or digest message, packed and unpacked (steps.Message.replies).

Knows: the two forms. Must not know: tables, tensors.
"""

from __future__ import annotations

import msgspec

from kvguard.errors import BadFrame

State = dict[str, tuple[int, tuple[int, ...]]]  # sequence -> (position, blocks that hold it)
Digest = dict[str, list[int]]  # sequence -> xxh3_64 of each position's canonical KV bytes

_state = msgspec.msgpack.Decoder(State)
_digest = msgspec.msgpack.Decoder(Digest)


def pack(reply: State | Digest) -> bytes:
    return msgspec.msgpack.encode(reply)


def unpack_state(reply: bytes) -> State:
    """Raises BadFrame for anything else."""
    return _unpack(_state, reply)


def unpack_digest(reply: bytes) -> Digest:
    """Raises BadFrame for anything else."""
    return _unpack(_digest, reply)


def _unpack(decoder: msgspec.msgpack.Decoder, reply: bytes):
    try:
        return decoder.decode(reply)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"not a stage's reply: {error}") from error
