"""What an engine process and its node's daemon say over the daemon's Unix socket (SOCK_SEQPACKET, one message a packet, descriptors beside it).

Knows: fields, types and which descriptors travel with which message. Must not know: sockets.
Invariants: a message over limits.SOCKET_BYTES_MAX travels as Body with a sealed memfd that holds it; the engine never waits for any of these inside a step.

Descriptor order: Attach rank [pidfd, bell eventfd, table memfd, pool..., a lifeline's memfd where `lifeline`];
Attach scheduler [pidfd, bell, table]; Attach standby [pidfd].
PoolLent [pool...]. A pool is one memfd (host), or a card and what is behind it (device/exports.py).
ClaimOrder [table, pool...] when `adopt`, else one arena descriptor per entry of `replicas`.
"""

from __future__ import annotations

import msgspec

from kvguard.errors import BadFrame
from kvguard.format.layout import Layout
from kvguard.format.messages import PlanOrder, Rebuild, StreamShape
from kvguard.types import Epoch, Lineage, MovedToken, Rank, SequenceId, StreamId


class Local(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of all local messages."""


class Attach(Local, frozen=True):
    """engine -> daemon. `role`: rank | scheduler | standby. A re-attach says the same again with the epoch adopted since.

    `stream`: for a rank (pool drawn at allocation); for a scheduler its rank is (dp, 0, 0) and pool 0. `layouts`: one for a rank; for a standby by rank text.
    `lifeline`: the last descriptor is a page with a word that the kernel marks when the process dies, before its pidfd says so (engine/lifeline.py).
    """

    role: str
    instance: str
    incarnation: int
    epoch: Epoch
    endpoint: str
    stream: StreamId | None
    layouts: dict[str, Layout]
    version: int = 1
    lifeline: bool = False


class Attached(Local, frozen=True):
    """daemon -> engine: mapped and streamed from now on. `epoch`: the instance's epoch as this node knows it."""

    epoch: Epoch


class AttachRefused(Local, frozen=True):
    """daemon -> engine: a duplicate live rank, a layout that doesn't fit, an epoch that is over. `final`: don't try again."""

    reason: str
    final: bool


class Detach(Local, frozen=True):
    """engine -> daemon: a clean end."""


class RestoreOrder(Local, frozen=True):
    """daemon -> surviving engine: truncate to the plan, answer Restored."""

    plan: PlanOrder


class ReplicaPages(msgspec.Struct, frozen=True, array_like=True):
    """One replica as the puller sees it: page n of the arena descriptor holds block n of `stream` (store/arena.py says how a page is laid out).

    Columns by sequence: names, block lists, block generations, how many positions are whole, ids (u32 LE), sampler, request.
    """

    stream: StreamId
    shape: StreamShape
    sequences: tuple[SequenceId, ...]
    blocks: tuple[tuple[int, ...], ...]
    generations: tuple[tuple[int, ...], ...]
    positions: tuple[int, ...]
    lineages: tuple[Lineage, ...]
    ids: tuple[bytes, ...]
    samplers: tuple[bytes, ...]
    requests: tuple[bytes, ...]


class ClaimOrder(Local, frozen=True):
    """daemon -> standby: take this rank. `adopt`: the dead process's table and pool come along, `stream` stays; else pull from `replicas` into a new pool."""

    instance: str
    rank: Rank
    epoch: Epoch
    plan: PlanOrder
    rebuild: Rebuild
    adopt: bool
    stream: StreamId | None
    layout: Layout | None
    replicas: tuple[ReplicaPages, ...]


class Restored(Local, frozen=True):
    """engine -> daemon: truncated, or pulled and ready as `rank` (after the Attach of its new stream). `error`: it can't.

    `behind`: only because a step that was under way at the fence went back behind what the report had said; the next report says what is there.
    """

    instance: str
    rank: Rank
    epoch: Epoch
    error: str = ""
    bytes_by_rung: dict[str, int] = {}
    restore_ms: float = 0.0
    behind: bool = False


class Fetch(Local, frozen=True):
    """rank -> daemon: where is the KV of this moved sequence, for the (pp, tp) of the rank that asks? `number`: chosen by the engine, comes back.

    `ids`, `ids_sum`: of the first so many of its ids as the engine has them (moves.ids_sum): KV of others is refused. 0: not said.
    """

    number: int
    token: MovedToken
    ids: int = 0
    ids_sum: int = 0


class FetchGiven(Local, frozen=True):
    """daemon -> rank, with one descriptor, opened for reading alone: of an arena of `shape` (format/pages.py), or of a dead pool where there is a `layout`.

    `blocks`, `generations`: of [0, position), where they stand in that arena or pool. A pool has no sums: nothing writes it any more.
    """

    number: int
    position: int
    blocks: tuple[int, ...]
    generations: tuple[int, ...]
    shape: StreamShape
    layout: Layout | None = None


class FetchRefused(Local, frozen=True):
    """daemon -> rank. `again`: it may be there in a moment (the old process is being ended)."""

    number: int
    reason: str
    again: bool = False


class PoolWanted(Local, frozen=True):
    """engine -> daemon, before it attaches: memory for a pool that is to outlive this process. `device`: kind; `gpu`: UUID of the one that it is to be on."""

    layout: Layout
    device: str
    gpu: str = ""


class PoolLent(Local, frozen=True):
    """daemon -> engine, with the pool's descriptors: they come back with the Attach, and to whoever adopts the pool."""


class LendRefused(Local, frozen=True):
    """daemon -> engine."""

    reason: str


class Body(Local, frozen=True):
    """The message itself is in the memfd that comes first; `descriptors` of it follow."""

    bytes: int


ALL = (
    Attach | Attached | AttachRefused | Detach | RestoreOrder | ClaimOrder | Restored | Body | Fetch | FetchGiven | FetchRefused
    | PoolWanted | PoolLent | LendRefused
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ALL)


def pack(message: Local) -> bytes:
    return _encoder.encode(message)


def unpack(data) -> Local:
    """Raises BadFrame for anything that is not exactly one well-typed message."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"not a message of the local protocol: {error}") from error
