"""Every message that crosses a link between daemons, coordinator, emitters and the command line.

Knows: the fields and their types; msgspec refuses anything else before it reaches the core.
Must not know: framing (wire.py), what is done with a message (core/).
Invariants: fields are only ever added at the end with a default (a peer one version older ignores them); columns of one message have equal length
(`check_columns`). Messages are values: two that say the same are equal.

Conversations
- stream, sender -> holder: Hello, IdsFrame, KvFrame, StreamEnd; holder -> sender: Held, Ack.
- node -> coordinator: NodeHello, Beat, Fault, Report, Done; coordinator -> node: NodeWelcome, Assign, Fence, PlanOrder, RebuildOrder, Resumed.
- emitter -> coordinator: EmitterHello, EmitterBeat, Adopted, Delivered; coordinator -> emitter: Welcome, Fenced, Resume.
- anyone with a key: Query -> Answer.
"""

from __future__ import annotations

import msgspec

from kvguard.errors import BadFrame
from kvguard.limits import EPOCH_MAX
from kvguard.types import NO_EPOCH, Epoch, Lineage, NodeId, Rank, SequenceId, StreamId

VERSION = 1
Ints = tuple[int, ...]


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True, omit_defaults=False):
    """Base: an array on the wire, its first element the type's name."""


# ---- shapes ---------------------------------------------------------------------------------------------------------------------


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


IDS_ONLY = StreamShape(0, 65535, 0, 0, 1, False)  # of a scheduler's stream: ids, samplers and requests, no KV


class Holding(msgspec.Struct, frozen=True, array_like=True):
    """What one pool or replica has of one stream, by sequence; columns of equal length.

    `kind`: "pool" | "replica". `alive`: the pool's process lives. `positions`: committed (pool) or complete and verified on arrival (replica).
    `ids`: how many token ids are known. `fingerprint`: of the stream's shape, 0 where it isn't known (then it is checked at the claim).
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


# ---- streams --------------------------------------------------------------------------------------------------------------------


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

    `resync`: why Hello must be said again (a gap, a broken frame), else empty.
    """

    session: int
    epoch: Epoch
    ids_number: int
    kv_number: int
    refused: tuple[tuple[int, str], ...] = ()
    resync: str = ""


class StreamEnd(Message, frozen=True):
    """A clean end (detach, or another holder took over): drop the stream's pages."""

    stream: StreamId
    epoch: Epoch
    reason: str


# ---- node <-> coordinator -------------------------------------------------------------------------------------------------------


class RankBeat(msgspec.Struct, frozen=True, array_like=True):
    """One attached rank in a heartbeat. Positions are sums over its sequences; lag is the largest of any decoding sequence.

    `progress` rises whenever the engine does (steps left, pulses): frames prove the daemon alive, only this proves the engine.
    `endpoint`: opaque, what the engine advertised at attach, given to the emitter as the rank's address.
    """

    stream: StreamId
    epoch: Epoch
    incarnation: int
    endpoint: str
    state: str  # protected | unprotected | recovering | lost | standby
    reason: str
    holders: tuple[NodeId, ...]
    sequences: int
    unprotected_sequences: int
    committed: int
    acked: int
    lag_tokens: int
    lag_bytes: int
    lag_ms: float
    progress: int


class StandbyBeat(msgspec.Struct, frozen=True, array_like=True):
    """A spare process: weights loaded, no rank yet. `fingerprints`: by rank text, of the layouts that it can take."""

    instance: str
    standby: int  # its incarnation
    endpoint: str
    fingerprints: dict[str, int]


class SchedulerBeat(msgspec.Struct, frozen=True, array_like=True):
    """A scheduler's stream in a heartbeat. `state`: protected | unprotected | recovering | lost, of its ids. `ids`, `acked_ids`: sums over its sequences."""

    stream: StreamId
    epoch: Epoch
    incarnation: int
    endpoint: str
    state: str
    reason: str
    holders: tuple[NodeId, ...]
    sequences: int
    ids: int
    acked_ids: int


class NodeHello(Message, frozen=True):
    """First on a link to the coordinator. `promises`: the highest epoch this node has written down, per instance: the floor of a restored coordinator."""

    node: NodeId
    incarnation: int
    address: str
    promises: tuple[tuple[str, Epoch], ...]
    version: str


class NodeWelcome(Message, frozen=True):
    """The coordinator knows this node now."""

    coordinator: str


class Beat(Message, frozen=True):
    """Every heartbeat_ms. `replicas`: (stream, sequences, bytes) held here for others. `schedulers`: living and dead ones whose tables are mapped here."""

    node: NodeId
    incarnation: int
    number: int
    ranks: tuple[RankBeat, ...]
    standbys: tuple[StandbyBeat, ...]
    replicas: tuple[tuple[StreamId, int, int], ...]
    arena_bytes: int
    arena_bytes_max: int
    schedulers: tuple[SchedulerBeat, ...] = ()


class Fault(Message, frozen=True):
    """A rank is gone, seen by its daemon. `kind`: died | hung | detached. `salvageable`: its pool is still mapped here.

    `since_ms`: fault to this message, where known.
    """

    node: NodeId
    stream: StreamId
    incarnation: int
    kind: str
    reason: str
    salvageable: bool
    since_ms: float


class Assign(Message, frozen=True):
    """Who holds the replicas of a rank from now on: (node, address), best first. Others are ended once the new ones have acknowledged."""

    instance: str
    rank: Rank
    holders: tuple[tuple[NodeId, str], ...]
    reason: str


class Fence(Message, frozen=True):
    """The epoch is raised. Write the promise down, stop accepting older ones, quiesce local ranks, answer with Report."""

    instance: str
    epoch: Epoch
    lost: tuple[Rank, ...]
    reason: str


class Report(Message, frozen=True):
    """All that a node has of an instance, after its promise is durable."""

    instance: str
    epoch: Epoch
    node: NodeId
    holdings: tuple[Holding, ...]


class Source(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank's KV comes from: the mapped pool of a dead process on the target node, or a replica on `node`."""

    kind: str  # pool | replica
    node: NodeId
    stream: StreamId


class Rebuild(msgspec.Struct, frozen=True, array_like=True):
    """One lost rank: the standby that takes it, and by sequence (plan order) the index into `sources`, -1 for none (position 0)."""

    rank: Rank
    node: NodeId
    standby: int
    sources: tuple[Source, ...]
    source: Ints


class PlanOrder(Message, frozen=True):
    """The durable plan, sent to every node of the instance: a truncation order to holders and survivors. Columns by sequence.

    `lineages`: after the plan, so each ends with (epoch, position). `ids_node`: who answers with the sequence's ids, sampler and request in its Done.
    `ids`: how many ids are known. A sequence that isn't named is over: survivors release it, holders drop it.
    `explanations`: why this position and this rung, for people. `survivors`: the lives of the ranks that go on; whoever else still lives as one of these
    ranks is a former life that was taken for dead.
    """

    instance: str
    epoch: Epoch
    sequences: tuple[SequenceId, ...]
    positions: Ints
    rungs: tuple[str, ...]
    lineages: tuple[Lineage, ...]
    ids: Ints
    ids_node: tuple[NodeId, ...]
    ids_stream: tuple[StreamId, ...]
    rebuilds: tuple[Rebuild, ...]
    transfers: tuple[tuple[NodeId, NodeId, str, StreamId], ...]  # holder, target, target's address, stream
    explanations: tuple[str, ...]
    survivors: tuple[StreamId, ...] = ()


class RebuildOrder(Message, frozen=True):
    """To the target node once its sources are there: give this rank to that standby."""

    instance: str
    epoch: Epoch
    rebuild: Rebuild


class KnownIds(msgspec.Struct, frozen=True, array_like=True):
    """A sequence's ids (little-endian u32), sampler state and request, as committed."""

    sequence: SequenceId
    ids: bytes
    sampler: bytes
    request: bytes


class Done(Message, frozen=True):
    """One part of a plan is carried out on `node`; idempotent by (epoch, node, part).

    `part`: "holders" (replicas truncated; carries `known` for the sequences whose ids_node this is), "rank D.P.T" (restored and ready, at `endpoint`, on
    `stream`), "transfer STREAM" (all planned positions acknowledged by the target). `error`: not empty when it failed for good. `bytes`: KV moved, by rung.
    """

    instance: str
    epoch: Epoch
    node: NodeId
    part: str
    error: str = ""
    endpoint: str = ""
    stream: StreamId | None = None
    known: tuple[KnownIds, ...] = ()
    bytes_by_rung: dict[str, int] = {}
    restore_ms: float = 0.0


class Resumed(Message, frozen=True):
    """The instance runs in `epoch`. `unpinned`: replicas of former lives that may go now (the new ones have acknowledged the plan's positions elsewhere).

    `ended`: lives that another one follows; whoever still lives as one of them slept through the plan, and is killed as the plan would have done.
    """

    instance: str
    epoch: Epoch
    unpinned: tuple[StreamId, ...]
    ended: tuple[StreamId, ...] = ()


# ---- emitters -------------------------------------------------------------------------------------------------------------------


class Member(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank lives now: its node, the engine's endpoint, the daemon's address (for `releasable`)."""

    rank: Rank
    node: NodeId
    endpoint: str
    address: str


class EmitterHello(Message, frozen=True):
    """A session of the one emitter of an instance; a new incarnation ends the old one."""

    instance: str
    incarnation: int
    epoch: Epoch


class Welcome(Message, frozen=True):
    """`recovering`: wait for Resume before the first step."""

    instance: str
    epoch: Epoch
    members: tuple[Member, ...]
    recovering: bool
    sequences: int = 0


class EmitterBeat(Message, frozen=True):
    """`scheduled`: sequences with work in flight; `progress`: rises with every result that reached the emitter. Also says that the emitter lives.

    `fenced`: the counter of the newest epoch announced to it: nothing of an older one reaches a client any more. Said at once after Fenced, because a round
    may wait for it (house rule: "or the emitter has adopted the new epoch").
    """

    instance: str
    incarnation: int
    epoch: Epoch
    scheduled: int
    progress: int
    fenced: int = 0


class Fenced(Message, frozen=True):
    """Stop: adopt nothing more of older epochs, wait for Resume."""

    instance: str
    epoch: Epoch
    reason: str


class ResumeSequence(msgspec.Struct, frozen=True, array_like=True):
    """A resume token without what all tokens of one recovery share."""

    sequence: SequenceId
    position: int
    rung: str
    known: KnownIds


class Resume(Message, frozen=True):
    """The end of a recovery; or, with `error`, its explicit failure. `timing_ms`: detect, fence, plan, restore."""

    instance: str
    epoch: Epoch
    members: tuple[Member, ...]
    sequences: tuple[ResumeSequence, ...]
    timing_ms: dict[str, float]
    bytes_by_rung: dict[str, int]
    error: str = ""


class Adopted(Message, frozen=True):
    """The emitter goes on in `epoch`. Answered by nothing; said again with every beat's epoch."""

    instance: str
    incarnation: int
    epoch: Epoch


class Delivered(Message, frozen=True):
    """These sequences' answers have reached their clients: their ids may go after ids_retention_s. Passed on by the coordinator to all nodes."""

    instance: str
    sequences: tuple[SequenceId, ...]


# ---- questions ------------------------------------------------------------------------------------------------------------------


class Query(Message, frozen=True):
    """A question of the command line or an emitter: `verb` with JSON arguments."""

    id: int
    verb: str
    arguments: bytes = b"{}"


class Answer(Message, frozen=True):
    """`body`: JSON. `error`: not empty when there is none; `code` is the exit code it stands for."""

    id: int
    body: bytes
    error: str = ""
    code: int = 0


ALL = (
    Hello | Held | IdsFrame | KvFrame | Ack | StreamEnd | NodeHello | NodeWelcome | Beat | Fault | Assign | Fence | Report | PlanOrder | RebuildOrder | Done
    | Resumed | EmitterHello | Welcome | EmitterBeat | Fenced | Resume | Adopted | Delivered | Query | Answer
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ALL)


def pack(message: Message) -> bytes:
    """The message's bytes, without framing."""
    return _encoder.encode(message)


def pack_tag(kind: type[Message]) -> bytes:
    """The type's name as it stands at the head of every message of this type."""
    return _encoder.encode(kind.__struct_config__.tag)


def unpack(data) -> Message:
    """Raises BadFrame for anything that is not exactly one well-typed message."""
    try:
        message = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"not a message of this protocol: {error}") from error
    check_epochs(message)
    check_columns(message)
    return message


def check_epochs(message: Message) -> None:
    """Raises BadFrame where an epoch is beyond limits.EPOCH_MAX: one such promise would fence an instance for ever."""
    epoch = getattr(message, "epoch", NO_EPOCH)
    promises = message.promises if type(message) is NodeHello else ()
    if max(epoch.counter, *(promised.counter for _, promised in promises), 0) > EPOCH_MAX or epoch.counter < 0:
        raise BadFrame(f"{type(message).__name__}: an epoch that no coordinator ever issued")


def check_columns(message: Message) -> None:
    """Raises BadFrame where columns that belong together differ in length."""
    if type(message) is KvFrame:
        lengths = {len(message.nos), len(message.starts), len(message.counts), len(message.blocks), len(message.generations), len(message.flags)}
    elif type(message) is IdsFrame:
        lengths = {len(message.nos), len(message.starts), len(message.counts), len(message.sampler_bytes)}
    else:
        return
    if len(lengths) > 1:
        raise BadFrame(f"{type(message).__name__}: columns of unequal length {sorted(lengths)}")
