"""What nodes and the coordinator say to each other.

Knows: fields and their types. Must not know: framing (wire.py), what is done with a message (core/).
Invariants: as of all messages (messages.py).
"""

from __future__ import annotations

import msgspec

from kvguard.format.shapes import Holding, Ints, Message
from kvguard.types import Clash, Epoch, Lineage, NodeId, Places, Rank, SequenceId, StreamId


class RankBeat(msgspec.Struct, frozen=True, array_like=True):
    """One attached rank in a heartbeat. Positions are sums over its sequences; lag is the largest of any decoding sequence.

    `progress` rises whenever the engine does (steps left, pulses): frames prove the daemon alive, only this proves the engine.
    `endpoint`: opaque, what the engine advertised at attach, given to the emitter as the rank's address. `whole`: holders that have acknowledged everything, of
    each sequence the newest position at most excepted: the rank could be handed to one of them without loss.
    `as_rank`: nothing of its own stream is sent; the holders are those of this rank beside it, whose bytes are the same.
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
    fingerprint: int = 0  # of its shape: equal ones of two instances hold interchangeable bytes
    whole: tuple[NodeId, ...] = ()
    as_rank: Rank | None = None


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
    """Every heartbeat_ms. `replicas`: (stream, sequences, bytes) held here for others. `schedulers`: living and dead ones whose tables are mapped here.

    `carriers`: (node, what payloads to it travel over: "tcp", "control", or "nixl" and the transport that UCX chose).
    `device_faults`: (device, why it can't be used). `figures_age_ms`: of `replicas` and the arena's figures when this was said.
    """

    node: NodeId
    incarnation: int
    number: int
    ranks: tuple[RankBeat, ...]
    standbys: tuple[StandbyBeat, ...]
    replicas: tuple[tuple[StreamId, int, int], ...]
    arena_bytes: int
    arena_bytes_max: int
    schedulers: tuple[SchedulerBeat, ...] = ()
    carriers: tuple[tuple[NodeId, str], ...] = ()
    device_faults: tuple[tuple[str, str], ...] = ()
    figures_age_ms: float = 0.0


class Fault(Message, frozen=True):
    """A rank is gone, seen by its daemon. `kind`: died | hung | detached | suspected. `salvageable`: its pool is still mapped here.

    suspected: it was told to die, its death is awaited: this node's report calls its pool pending, and this is said again meanwhile.

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
    """Who holds the replicas of a rank from now on: (node, address), best first. Others are ended once the new ones have acknowledged.

    `as_rank`: then `holders` is empty; its bytes are those of this rank on the same node, and copied once, with that one's.
    """

    instance: str
    rank: Rank
    holders: tuple[tuple[NodeId, str], ...]
    reason: str
    as_rank: Rank | None = None


class Fence(Message, frozen=True):
    """The epoch is raised. Write the promise down, stop accepting older ones, quiesce local ranks, answer with Report."""

    instance: str
    epoch: Epoch
    lost: tuple[Rank, ...]
    reason: str


class Report(Message, frozen=True):
    """All that a node has of an instance, after its promise is durable.

    `pending`: streams whose processes here were told to die and aren't known to be dead. They are fenced: nothing more of them can be acknowledged. What
    `holdings` say of them is of the last look; it can be planned with once it is reported without this, which the node does when the death comes.
    """

    instance: str
    epoch: Epoch
    node: NodeId
    holdings: tuple[Holding, ...]
    pending: tuple[StreamId, ...] = ()


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
    `ids`: how many ids are known; who answers with fewer has failed. A sequence that isn't named is over: survivors release it, holders drop it.
    `explanations`: why this position and this rung, for people. `survivors`: the lives of the ranks that go on; whoever else still lives as one of these
    ranks is a former life that was taken for dead.

    `moved`: ranks that nobody rebuilds: whoever lives as one ends, its sequences go on in other instances. `places`: then, by sequence, every (rank, node) that
    keeps [0, position) for them until it is delivered. `secret`: what moved tokens are proved with; daemons keep it from engines.
    `births`: of which life of each name this is (lineage.birth_of, 0 unknown); what bears the name and is of another life goes. Empty: all unknown.
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
    moved: tuple[Rank, ...] = ()
    places: tuple[Places, ...] = ()
    secret: bytes = b""
    births: Ints = ()

    def births_by_name(self) -> dict[SequenceId, int]:
        return dict(zip(self.sequences, self.births, strict=True)) if self.births else {}


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
    `clashes`: it failed because these copies claim blocks for different sequences; no standby was given away.
    `behind`: it failed because a survivor's last step went back behind what the report had said: the rank lives, and the next report is true.
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
    clashes: tuple[Clash, ...] = ()
    behind: bool = False


class Resumed(Message, frozen=True):
    """The instance runs in `epoch`. `unpinned`: replicas of former lives that may go now (the new ones have acknowledged the plan's positions elsewhere).

    `ended`: lives that another one follows; whoever still lives as one of them slept through the plan, and is killed as the plan would have done.

    `pinned`: sequences that moved may still be fetched: the dead pools of which the plan says so stay.
    """

    instance: str
    epoch: Epoch
    unpinned: tuple[StreamId, ...]
    ended: tuple[StreamId, ...] = ()
    pinned: bool = False
