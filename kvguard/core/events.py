"""What happened, in the past tense: the only input of the core. `step(now_ns, event) -> tuple[Effect, ...]`.

Knows: facts in columns (one event per rank and step carries all its records). Must not know: clocks, sockets, bytes of KV, processes.
Invariants: an event that completes an effect carries the effect's id and epoch, so that stale completions are refused in one place.

Links are opaque names: "peer:NODE" and "coordinator" were dialled here, names that start with "in:" were accepted here; replies go where they came from.
Rows are indices in a rank's commit table; buffers are the shell's ids of payload memory.
"""

from __future__ import annotations

import msgspec

from kvguard.format.messages import Message, PlanOrder, Rebuild, StreamShape
from kvguard.types import Clash, Epoch, Lineage, NodeId, Rank, SequenceId, StreamId

Ints = tuple[int, ...]


class Event(msgspec.Struct, frozen=True):
    """Base of all events."""


# ---- both cores -----------------------------------------------------------------------------------------------------------------


class LinkUp(Event, frozen=True):
    """Frames can be sent. `node`: the peer's name where the transport's keys prove it, else what it says of itself, else "". `carrier`: see base.Up."""

    link: str
    node: NodeId = ""
    carrier: str = ""


class CarrierChanged(Event, frozen=True):
    """What the payloads of a link that is up travel over, where that has changed, or what is to be said of it; nothing else about the link has."""

    link: str
    carrier: str


class LinkDown(Event, frozen=True):
    """Everything unacknowledged on this link is lost."""

    link: str
    reason: str


class Arrived(Event, frozen=True):
    """One message, well-formed and with a good header checksum. `buffer`: its payload, 0 for none."""

    link: str
    message: Message
    buffer: int = 0


class Broken(Event, frozen=True):
    """Something arrived that is not a frame; counted, the link goes on or is cut by the transport."""

    link: str
    reason: str


class Tick(Event, frozen=True):
    """Time passed: sent when next_deadline() is due. `late_ns`: how much later than asked; a late loop holds its judgement."""

    late_ns: int = 0


class TurnEnded(Event, frozen=True):
    """All events of one turn of the loop are in: acknowledgements go out now."""


# ---- the node: local ranks ------------------------------------------------------------------------------------------------------


class Opened(msgspec.Struct, frozen=True):
    """A sequence appeared in `row`."""

    row: int
    sequence: SequenceId
    generation: int
    lineage: Lineage
    request: bytes


class Cut(msgspec.Struct, frozen=True):
    """A row was truncated: KV and ids beyond `kept` are void, what follows is of `generation`. `blocks`: how many of its blocks were kept."""

    row: int
    kept: int
    generation: int
    lineage: Lineage
    blocks: int


class Grown(msgspec.Struct, frozen=True):
    """Blocks were appended to a row's list from index `first` on, with their generations."""

    row: int
    first: int
    blocks: Ints
    generations: Ints


class StreamAttached(Event, frozen=True):
    """A pool with its commit table is mapped: a rank attached (or re-attached), or a replica is to be pushed on (`pushing`, towards one node, for a plan).

    `epoch`: what the engine had adopted. `adopted_pool`: a known stream goes on in a new process.
    """

    stream: StreamId
    shape: StreamShape
    incarnation: int
    epoch: Epoch
    endpoint: str = ""
    pushing: NodeId = ""


class Looked(Event, frozen=True):
    """What changed in a stream's table since the last look. Applied in the order released, cut, opened, grown, then the columns.

    Columns by changed row: `rows`, `committed` (positions whose KV is a fact), `ids` (how many ids are known; >= committed).
    """

    stream: StreamId
    released: Ints = ()
    cut: tuple[Cut, ...] = ()
    opened: tuple[Opened, ...] = ()
    grown: tuple[Grown, ...] = ()
    rows: Ints = ()
    committed: Ints = ()
    ids: Ints = ()


class StepsSeen(Event, frozen=True):
    """The engine's step words as read now. entered > left: inside a step of `size` positions. `pulse` rises within long steps. `suspended`: a known pause.

    `stopped`: the process doesn't run at all (SIGSTOP), inside a step or outside.
    """

    stream: StreamId
    entered: int
    left: int
    size: int
    pulse: int
    suspended: bool = False
    stopped: bool = False


class StreamDetached(Event, frozen=True):
    """The engine closed its rank cleanly: nothing is lost, nothing needs recovery."""

    stream: StreamId
    incarnation: int


class ProcessDied(Event, frozen=True):
    """A pidfd fired. `stream` None: a standby's. `killed`: by us, because of a hang. `since_ns`: when the death was seen."""

    incarnation: int
    stream: StreamId | None
    reason: str
    salvageable: bool


class DeathSuspected(Event, frozen=True):
    """A thread that lives as long as its process has ended; the pidfd hasn't fired yet."""

    incarnation: int
    stream: StreamId
    reason: str


class StandbyAttached(Event, frozen=True):
    """A spare process is ready to take a rank. `fingerprints`: by rank text, the shape it would have."""

    instance: str
    standby: int
    endpoint: str
    fingerprints: dict[str, int]


class Captured(Event, frozen=True):
    """Completes Capture. `stale`: indices of pieces thrown away because a generation moved on; `buffer` holds the others' bytes, in order."""

    id: int
    stream: StreamId
    epoch: Epoch
    buffer: int
    payload_bytes: int
    stale: tuple[int, ...]
    sums: bytes


class EngineRestored(Event, frozen=True):
    """A survivor has truncated itself as the plan says, or a claimed standby has its KV and is now the rank on `stream`. `error`: it can't.

    `clashes`: copies that can't all be pulled into one pool; the standby was told of nothing. `behind`: format/local.py, Restored.
    """

    instance: str
    rank: Rank
    epoch: Epoch
    stream: StreamId
    endpoint: str
    error: str = ""
    bytes_by_rung: tuple[tuple[str, int], ...] = ()
    restore_ms: float = 0.0
    clashes: tuple[Clash, ...] = ()
    behind: bool = False


# ---- the node: replicas ---------------------------------------------------------------------------------------------------------


class Probed(Event, frozen=True):
    """Completes Probe: the stream's replica is open here, cut back to what agrees. `reason`: refused."""

    link: str
    session: int
    held: Message
    reason: str = ""


class Applied(Event, frozen=True):
    """Completes Apply. `refused`: (no, reason) of sequences that the store won't keep. `gap`: not empty when the frame didn't fit what is held."""

    link: str
    session: int
    lane: str  # ids | kv
    number: int
    refused: tuple[tuple[int, str], ...] = ()
    gap: str = ""


class ReplicaDoubted(Event, frozen=True):
    """Bytes of this replica were read that don't match their sums: it is verified, and its session in the store is over."""

    stream: StreamId
    reason: str


class PlanCarried(Event, frozen=True):
    """Completes CarryPlan: replicas here are truncated as ordered. `known`: KnownIds of the sequences that this node answers for."""

    instance: str
    epoch: Epoch
    known: tuple


class ReplicasSeen(Event, frozen=True):
    """What the store holds for others, as messages.Beat says it: (stream, sequences, bytes). Told before a Tick that is due, at most once per heartbeat."""

    replicas: tuple[tuple[StreamId, int, int], ...]
    arena_bytes: int
    arena_bytes_max: int


class PoolLost(Event, frozen=True):
    """Nothing of this rank's pool can be read any more, until it attaches with other memory."""

    stream: StreamId
    incarnation: int
    reason: str


class DevicesSeen(Event, frozen=True):
    """All devices of this node that can't be used now, each with the reason."""

    faults: tuple[tuple[str, str], ...]


class ResyncAsked(Event, frozen=True):
    """An operator doubts the replicas of an instance, or of one of its ranks (None: of all): both halves of their streams begin anew."""

    instance: str
    rank: Rank | None = None


# ---- the coordinator ------------------------------------------------------------------------------------------------------------


class Loaded(Event, frozen=True):
    """First event of a coordinator: what its durable store says, by key (see effects.Persist)."""

    values: dict[str, bytes]


class Asked(Event, frozen=True):
    """An operator's order that changes something (pause, unpause, failover ...), checked by the shell for authority."""

    id: int
    verb: str
    arguments: dict


__all__ = [
    "Applied", "Arrived", "Asked", "Broken", "Captured", "CarrierChanged", "Cut", "DeathSuspected", "EngineRestored", "Event", "Grown", "LinkDown", "LinkUp",
    "Loaded", "Looked", "Opened", "PlanCarried", "PlanOrder", "Probed", "ProcessDied", "Rebuild", "ReplicaDoubted", "ReplicasSeen", "ResyncAsked",
    "StandbyAttached", "StepsSeen", "StreamAttached", "StreamDetached", "Tick", "TurnEnded",
]  # fmt: skip
