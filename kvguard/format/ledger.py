"""What the coordinator's durable store holds, as bytes: the values of Persist by key.

Knows: the records and their keys. Must not know: databases, when a record is written (core/coordinator.py).
Invariants: fields are only added at the end with a default; a record that can't be read raises BadFrame, it is never taken for an empty one.

Keys: epoch/INSTANCE -> Epoch; holders/INSTANCE/RANK -> MemberRecord; recovery/INSTANCE -> RecoveryRecord; resume/INSTANCE -> messages.Resume;
forks/INSTANCE -> lineages by sequence; births/INSTANCE -> their births; emitter/INSTANCE -> the incarnation of its session; history/N -> HistoryRecord;
paused -> bool; drained/NODE -> True; secret -> bytes, made by the shell (never by the core), from which each recovery's secret is made.
"""

from __future__ import annotations

import msgspec

from kvguard.errors import BadFrame
from kvguard.format.messages import Ints, PlanOrder, Resume
from kvguard.types import Clash, Epoch, Life, Lineage, NodeId, Rank, SequenceId, StreamId

FENCING, PLANNED, RESUMED = "fencing", "planned", "resumed"


class MemberRecord(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank lives and who may acknowledge its stream. `former`: replaced holders that may still acknowledge."""

    node: NodeId
    stream: StreamId
    incarnation: int
    endpoint: str
    holders: tuple[NodeId, ...]
    former: tuple[NodeId, ...] = ()
    fingerprint: int = 0


class RecoveryRecord(msgspec.Struct, frozen=True, array_like=True):
    """One round of one recovery. `attempt` counts rounds since the instance last ran; `dead_writers`: lost ranks whose process is known to be gone.

    `refused`: (node, standby) that failed in an earlier round; `former`: streams pinned until the rebuilt ranks are protected; times are of this round.
    `order` of sequences that moved stays until they are delivered; `away`: what earlier recoveries moved elsewhere, which no later one brings back
    (`away_births`: which life of each name; empty: unknown).
    `targets`: where an operator wants ranks to go, if a standby is there. `clashes`: copies that are of use below a position only, found in earlier rounds.
    `stuck`: replicas (holder, stream) that an earlier round didn't get to where they were wanted.
    """

    instance: str
    epoch: Epoch
    phase: str
    reason: str
    lost: tuple[Rank, ...]
    members: dict[str, MemberRecord]
    excluded: tuple[NodeId, ...]
    dead_writers: tuple[Rank, ...]
    attempt: int = 1
    refused: tuple[tuple[NodeId, int], ...] = ()
    order: PlanOrder | None = None
    lost_sequences: tuple[tuple[SequenceId, str], ...] = ()
    former: tuple[StreamId, ...] = ()
    timing_ms: dict[str, float] = {}
    verdict_ns: int = 0
    away: tuple[SequenceId, ...] = ()
    targets: tuple[tuple[Rank, NodeId], ...] = ()
    away_births: Ints = ()
    clashes: tuple[Clash, ...] = ()
    stuck: tuple[tuple[NodeId, StreamId], ...] = ()

    def away_lives(self) -> tuple[Life, ...]:
        return tuple(map(Life, self.away, self.away_births or (0,) * len(self.away)))


class HistoryRecord(msgspec.Struct, frozen=True, array_like=True):
    """A recovery that ended, well or with `error`. `positions`, `rungs`: by sequence; `lost`: sequences that nothing knew the ids of, with the reason."""

    instance: str
    epoch: Epoch
    reason: str
    ranks: tuple[Rank, ...]
    targets: dict[str, NodeId]
    timing_ms: dict[str, float]
    positions: dict[SequenceId, int]
    rungs: dict[SequenceId, str]
    lost: dict[SequenceId, str]
    bytes_by_rung: dict[str, int]
    attempt: int
    error: str = ""
    verdict_ns: int = 0  # the coordinator's monotonic clock when the loss was told; comparable on its machine alone
    recomputed: int = 0  # known positions, but for each sequence's last, whose KV has to be computed again
    moved: int = 0  # sequences that went on in other instances
    ended: tuple[StreamId, ...] = ()  # then, the lives that ended with it: none of them is a rank of the instance any more


_encoder = msgspec.msgpack.Encoder()
_decoders = {
    "epoch": msgspec.msgpack.Decoder(Epoch),
    "holders": msgspec.msgpack.Decoder(MemberRecord),
    "recovery": msgspec.msgpack.Decoder(RecoveryRecord),
    "resume": msgspec.msgpack.Decoder(Resume),
    "forks": msgspec.msgpack.Decoder(dict[SequenceId, Lineage]),
    "births": msgspec.msgpack.Decoder(dict[SequenceId, int]),
    "emitter": msgspec.msgpack.Decoder(int),
    "history": msgspec.msgpack.Decoder(HistoryRecord),
    "paused": msgspec.msgpack.Decoder(bool),
    "drained": msgspec.msgpack.Decoder(bool),
    "secret": msgspec.msgpack.Decoder(bytes),
}


def pack(record) -> bytes:
    return _encoder.encode(record)


def unpack(key: str, data: bytes):
    """The record under `key`. Raises BadFrame when the bytes aren't one, or the key is of no known kind."""
    decoder = _decoders.get(key.partition("/")[0])
    if decoder is None:
        raise BadFrame(f"the store has a key {key!r} that this version doesn't know. Try: the version that wrote it")
    try:
        return decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"the record under {key!r} can't be read: {error}. Try: restore the store from a copy; epochs are found again at the nodes") from error
