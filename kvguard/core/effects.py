"""What is to be done, in the imperative: the only output of the core. The shell performs effects in order; Persist completes before a later one starts.

Knows: orders in columns. Must not know: how they are carried out.
Invariants: an effect that ends later names the event that completes it.
"""

from __future__ import annotations

import msgspec

from kvguard.format.messages import Hello, IdsFrame, KvFrame, Message, PlanOrder, Rebuild
from kvguard.types import Epoch, NodeId, Rank, StreamId

Ints = tuple[int, ...]


class Effect(msgspec.Struct, frozen=True):
    """Base of all effects."""


# ---- both cores -----------------------------------------------------------------------------------------------------------------


class Persist(Effect, frozen=True):
    """Make key = value durable (fsync) before anything after this in the same tuple. None deletes.

    Node: "promise/INSTANCE" -> Epoch. Coordinator: "epoch/INSTANCE", "recovery/INSTANCE", "holders/INSTANCE/RANK", "forks/INSTANCE", "history/N",
    "resume/INSTANCE", "emitter/INSTANCE", "paused", "drained/NODE" (format/ledger.py says what is in them).
    """

    key: str
    value: bytes | None


class Dial(Effect, frozen=True):
    """Keep a link named `link` to `address`, reconnecting; LinkUp and LinkDown follow."""

    link: str
    address: str


class HangUp(Effect, frozen=True):
    link: str


class Send(Effect, frozen=True):
    """A message without payload. On a link that is down it is dropped: whoever needs an answer has a deadline."""

    link: str
    message: Message


class Note(Effect, frozen=True):
    """For logs, counters and history: never acted on. `what`: a word such as unprotected, resync, stale_epoch, refused, fenced."""

    what: str
    subject: str
    reason: str
    fields: tuple[tuple[str, object], ...] = ()


# ---- the node: out --------------------------------------------------------------------------------------------------------------


class Capture(Effect, frozen=True):
    """Gather pieces of a stream's pool (or of a replica that is pushed on) into a buffer; Captured follows. Columns as in messages.KvFrame.

    `rows`, `row_generations`: read before and after, with each block's generation; a piece whose generation moved is stale.
    References (flag 1) are only checked.
    """

    id: int
    stream: StreamId
    epoch: Epoch
    rows: Ints
    row_generations: Ints
    starts: Ints
    counts: Ints
    blocks: Ints
    generations: Ints
    flags: Ints


class SendKv(Effect, frozen=True):
    """The frame with the buffer's bytes; the buffer is freed when the transport is done with it."""

    link: str
    message: KvFrame
    buffer: int


class SendIds(Effect, frozen=True):
    """The frame, its `ids` and `samplers` still empty: the shell fills them from `rows` of the stream, reading each row's generation before and after.

    Rows whose generation is not `row_generations` any more are left out (a Cut or Release is on its way)."""

    link: str
    message: IdsFrame
    stream: StreamId
    rows: Ints
    row_generations: Ints


class FreeBuffer(Effect, frozen=True):
    buffer: int


# ---- the node: in ---------------------------------------------------------------------------------------------------------------


class Probe(Effect, frozen=True):
    """Open (or make) the replica of hello.stream; Probed follows with messages.Held."""

    link: str
    hello: Hello


class Apply(Effect, frozen=True):
    """Apply a frame to the replica that this session opened; Applied follows. Payload sums are checked before anything becomes visible."""

    link: str
    session: int
    message: IdsFrame | KvFrame
    buffer: int


class Recheck(Effect, frozen=True):
    """Verify the replicas of an instance (of one rank, where `rank` isn't None) against their sums; what doesn't hold goes. A Probe waits for it."""

    instance: str
    rank: Rank | None


class DropReplica(Effect, frozen=True):
    """All pages and ids of this stream's replica go. `epoch`: refused when the replica's promise is newer."""

    stream: StreamId
    reason: str


# ---- the node: recovery ---------------------------------------------------------------------------------------------------------


class SetEpoch(Effect, frozen=True):
    """Write the epoch word of the local ranks' tables of this instance: the engine sees it at its next step's entry or exit."""

    instance: str
    epoch: Epoch


class SendReport(Effect, frozen=True):
    """Gather all holdings of the instance (live pools, dead pools still mapped, replicas) and send messages.Report. `pending`: as there."""

    link: str
    instance: str
    epoch: Epoch
    pending: tuple[StreamId, ...] = ()


class CarryPlan(Effect, frozen=True):
    """Truncate and release replicas as ordered, gather the ids asked of `node`; PlanCarried follows."""

    plan: PlanOrder
    node: NodeId


class OrderRestore(Effect, frozen=True):
    """Tell the live engine of `stream` to truncate itself to the plan; EngineRestored follows."""

    stream: StreamId
    plan: PlanOrder


class Claim(Effect, frozen=True):
    """Give a rank to a standby, with the dead pool's descriptors or the replicas' pages; EngineRestored follows."""

    plan: PlanOrder
    rebuild: Rebuild


class PushReplica(Effect, frozen=True):
    """Open a replica held here as the source of a stream towards another node; StreamAttached(pushing=node) and Looked follow."""

    stream: StreamId
    node: NodeId
    link: str


class KillProcess(Effect, frozen=True):
    """SIGKILL through the pidfd of a hung process; ProcessDied follows."""

    incarnation: int
    stream: StreamId
    reason: str


class ForgetStream(Effect, frozen=True):
    """Unmap a local pool and its table: dead, and adopted or no longer needed."""

    stream: StreamId


# ---- the coordinator ------------------------------------------------------------------------------------------------------------


class AnswerAsked(Effect, frozen=True):
    """Completes Asked."""

    id: int
    body: dict
    error: str = ""
    code: int = 0
