"""The form of what coordinator and nodes answer, as far as the command line reads it.

Knows: fields that verbs look at, and their kinds. Must not know: what they mean, how an answer came here.
Invariants: what passes has every field listed here, of its kind; fields that aren't listed pass as they are: a newer daemon may say more.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from kvguard.errors import KvguardError

Size = Annotated[int, msgspec.Meta(ge=1)]


class BadAnswer(KvguardError):
    """Somebody answers, and it is not what was asked for."""


class DeviceFault(msgspec.Struct):
    device: str
    reason: str


class NodeRow(msgspec.Struct):
    node: str
    state: str
    reason: str
    address: str
    heartbeat_age_ms: float
    arena_bytes: int
    arena_bytes_max: int
    standbys: int
    drain: str = ""
    version: str = ""
    carriers: dict[str, str] = {}
    device_faults: list[DeviceFault] = []
    figures_age_ms: float | None = None


class InstanceRow(msgspec.Struct):
    instance: str
    epoch: int
    issuer: str
    state: str
    reason: str
    emitter: str


class RankRow(msgspec.Struct):
    instance: str
    rank: str
    node: str
    holders: list[str]
    state: str
    reason: str
    sequences: int
    unprotected_sequences: int
    committed: int
    acked: int
    lag_tokens: int
    lag_bytes: int
    lag_ms: float
    figures_age_ms: float | None = None
    copied_as: str = ""


class SchedulerRow(msgspec.Struct):
    instance: str
    dp: int
    state: str
    reason: str
    figures_age_ms: float | None = None


class Held(msgspec.Struct):
    instance: str
    epoch: int
    ranks: list[str]
    reason: str


class Handoff(msgspec.Struct, rename={"from_": "from"}):
    handoff: int
    instance: str
    rank: str
    from_: str
    to: str
    state: str
    reason: str
    recomputed: int = 0
    epoch: int = 0
    total_ms: float | None = None


class Issuer(msgspec.Struct):
    issuer: str
    heartbeat_ms: float = 0.0


class Status(msgspec.Struct):
    """kvguard.status/1."""

    coordinator: Issuer
    paused: bool
    nodes: list[NodeRow]
    instances: list[InstanceRow]
    ranks: list[RankRow]
    schedulers: list[SchedulerRow] = []
    handoffs: list[Handoff] = []
    held: list[Held] = []


class Recovery(msgspec.Struct):
    instance: str
    epoch: int
    issuer: str
    reason: str
    ranks: list[str]
    targets: dict[str, str]
    timing_ms: dict[str, float]
    positions: dict[str, int]
    rungs: dict[str, str]
    lost: dict[str, str]
    bytes_by_rung: dict[str, int]
    error: str
    recomputed: int


class History(msgspec.Struct):
    """kvguard.history/1."""

    history: list[Recovery]
    held: list[Held]


class Process(msgspec.Struct):
    pid: int
    began: int


class Processes(msgspec.Struct):
    boot_id: str
    pid_namespace: int
    daemon: Process
    ranks: dict[str, Process]
    releasing: int = 0


class OwnRank(msgspec.Struct):
    instance: str
    rank: str
    stream: str
    window_bytes: int


class Node(msgspec.Struct):
    """kvguard.node/1."""

    ranks: list[OwnRank]
    epochs: dict[str, int]
    processes: Processes
    hang_ms: int


class Replica(msgspec.Struct):
    instance: str
    rank: str
    sequence: str
    holder: str
    stream: str
    epoch: int
    positions: int
    bytes: int
    tier: str
    released: bool
    verified: bool | None


class Replicas(msgspec.Struct):
    """kvguard.replicas/1."""

    replicas: list[Replica]


class Doubted(msgspec.Struct):
    instance: str
    rank: str
    holder: str
    sequences: int
    positions: int
    dropped: int


class Resync(msgspec.Struct):
    """kvguard.resync/1."""

    replicas: list[Doubted]


class Bytes(msgspec.Struct):
    """A piece of one replica."""

    start: int
    end: int
    kv: bytes
    ids: bytes
    request: bytes
    token_bytes: Size
    block_bytes: Size
    block_tokens: Size
    addressable: bool


class Moved(msgspec.Struct):
    instance: str
    rank: str
    to: list[str] | str


class Drain(msgspec.Struct):
    node: str
    replicas: list[Moved] = []
    ranks: list[Moved] = []


class Ordered(msgspec.Struct):
    does: str


class Here(msgspec.Struct):
    boot_id: str
    pid_namespace: int
    pid: int
    began: int


class CoordinatorStats(msgspec.Struct):
    process: Here


class NodeStats(msgspec.Struct):
    counters: dict[str, int]
    store: dict[str, int]


COORDINATOR = {"status": Status, "history": History, "stats": CoordinatorStats, "handoff": Ordered, "drain": Drain}
NODE = {"status": Node, "replicas": Replicas, "verify": Replicas, "resync": Resync, "read": Bytes, "stats": NodeStats}


def understood(answer: dict, name: str, address: str, verb: str) -> dict:
    """The answer, which has the form that `verb` has at the coordinator or a node. Raises BadAnswer."""
    form = (COORDINATOR if name == "coordinator" else NODE).get(verb)
    if form is not None:
        try:
            msgspec.convert(answer, form)
        except (msgspec.ValidationError, RecursionError) as error:
            raise BadAnswer(
                f"{name} at {address} answered {verb!r} with something that is not understood here: {error}. "
                "Try: the same version of kvguard here and there (kvguard --version), or another address"
            ) from error
    return answer
