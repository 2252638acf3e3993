"""What all messages are made of: their base, and what is said of a pool or a replica of it.

Knows: fields and their types. Must not know: who says what to whom (messages.py).
Invariant: fields are only ever added at the end with a default.
"""

from __future__ import annotations

import msgspec

from kvguard.types import Lineage, SequenceId, StreamId

VERSION = 1
Ints = tuple[int, ...]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, omit_defaults=False):
    """Base: an array on the wire, its first element the type's name."""


class StreamShape(msgspec.Struct, frozen=True, array_like=True):
    """What a holder must know of a pool to keep its blocks. Bytes are of this rank's shard.

    `fingerprint`: of model, layout, dtype and shard; only equal fingerprints hold interchangeable bytes.
    `addressable`: a token's bytes can be told apart inside its block; else a dirty block travels whole (`block_bytes`, not `slots * token_bytes`).
    """

    fingerprint: int
    block_tokens: int
    token_bytes: int
    block_bytes: int
    blocks: int
    addressable: bool = True


SHARED = 1  # the bit of a fingerprint that says so


def is_shared(fingerprint: int) -> bool:
    """Whether the ranks of a stage that have this fingerprint hold equal bytes, by their engine's word (layout.Shard). False for 0, which is no fingerprint."""
    return bool(fingerprint & SHARED)


IDS_ONLY = StreamShape(0, 65535, 0, 0, 1, False)  # of a scheduler's stream: ids, samplers and requests, no KV


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """What one pool or replica has of one stream, by sequence; columns of equal length.

    `kind`: "pool" | "replica". `alive`: the pool's process lives. `positions`: committed (pool) or complete and verified on arrival (replica).
    `ids`: how many token ids are known. `fingerprint`: of the stream's shape, 0 where it isn't known (then it is checked at the claim).
    `births`: lineage.birth_of each sequence; empty where nobody says.
    """

    stream: StreamId
    kind: str
    alive: bool
    sequences: tuple[SequenceId, ...]
    generations: Ints
    lineages: tuple[Lineage, ...]
    positions: Ints
    ids: Ints
    fingerprint: int = 0
    births: Ints = ()
