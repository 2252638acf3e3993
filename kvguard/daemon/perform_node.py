"""Deeds of a node: captures, frames, replicas, epoch words, orders to engines.

Knows: the protocols of pools, tables, the store and the engines' side of the control socket. Must not know: decisions, sockets, files; the simulation performs
with this code, over an in-process transport and memory of its own.
Invariants: every deed that completes its effect does so exactly once, also where it fails; a buffer is freed exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from kvguard.core import effects, events
from kvguard.core.promises import decode_epoch
from kvguard.daemon import capture as capturing
from kvguard.daemon import pushing
from kvguard.daemon.capture import Stream
from kvguard.daemon.copies import Copies, all_stale
from kvguard.daemon.perform import SHARED, Deed, Events, Shell, note, performer, send_numbered
from kvguard.errors import Refused
from kvguard.format.clashes import clashes
from kvguard.format.messages import Held, Holding, IdsFrame, PlanOrder, Rebuild, Report
from kvguard.store.replica import Replica
from kvguard.store.store import ReplicaStore
from kvguard.types import NO_EPOCH, Epoch, NodeId, StreamId

EMPTY = memoryview(b"")
PROMISE = "promise/"


class Engines(Protocol):
    """The engines of this node: what deeds ask of ranks.Ranks, or of a simulated engine."""

    def look(self, stream: StreamId) -> Events:
        """What changed in a local stream's table since the last look."""

    def holding(self, stream: StreamId) -> Holding: ...

    def known(self, stream: StreamId, sequences: tuple[str, ...], counts: tuple[int, ...]) -> list: ...

    def set_epoch(self, stream: StreamId, epoch: Epoch) -> None: ...

    def order_restore(self, stream: StreamId, plan: PlanOrder) -> None:
        """Raises Refused where the engine of `stream` doesn't live here."""

    def claim(self, plan: PlanOrder, rebuild: Rebuild) -> None:
        """Raises Refused where the standby or the sources aren't here."""

    def kill(self, incarnation: int) -> None: ...

    def forget(self, stream: StreamId) -> None: ...


class Push(NamedTuple):
    """A replica that is read before it is pushed on. `epoch`: of the plan that wants it, as promised here."""

    effect: effects.PushReplica
    replica: Replica
    epoch: Epoch
    scrub: Iterator[int]


@dataclass(kw_only=True)
class NodeShell(Shell):
    """`streams`: all that can be captured from, by id; local ones (also in `local`, in order of attachment) and replicas that are pushed on.

    `probes`, `reports`: what waits until replicas of a former life are verified (daemon/checking.py), by stream and, with the moment, by instance.
    """

    node: NodeId
    store: ReplicaStore
    engines: Engines
    streams: dict[StreamId, Stream] = field(default_factory=dict)
    local: dict[StreamId, Stream] = field(default_factory=dict)
    epochs: dict[str, Epoch] = field(default_factory=dict)  # promised, by instance
    probes: dict[StreamId, effects.Probe] = field(default_factory=dict)
    reports: dict[str, tuple[int, effects.SendReport]] = field(default_factory=dict)
    moved: dict[str, PlanOrder] = field(default_factory=dict)  # by dead instance: what other instances' engines may fetch, and the secret that proves it
    pushes: dict[StreamId, Push] = field(default_factory=dict)  # replicas to be pushed on that are still being read (daemon/checking.py)
    slice_bytes: int = 16 << 20  # of replicas, verified in one go: 3 to 5 ms of hashing
    lend: Callable[[int], memoryview] = capturing.fresh  # memory for payloads; a transport that writes from where they are lends its own
    copies: Copies = field(default_factory=Copies)  # where and when captures are taken
    corrupt_frames: int = 0  # drills: how many of the next KV frames leave with one byte changed


# ---- out ------------------------------------------------------------------------------------------------------------------------


def capture(shell: NodeShell, effect: effects.Capture) -> Events:
    return shell.copies.take(shell, effect)


def send_kv(shell: NodeShell, effect: effects.SendKv) -> Events:
    payload = shell.buffers.take(effect.buffer) if effect.buffer else None
    if shell.corrupt_frames and payload is not None:
        shell.corrupt_frames -= 1
        shell.counters["frames_corrupted"] += 1
        payload = memoryview(bytearray(payload))
        payload[len(payload) // 2] ^= 0x01
    return send_numbered(shell, effect.link, effect.message, payload)


def send_ids(shell: NodeShell, effect: effects.SendIds) -> Events:
    stream = shell.streams.get(effect.stream)
    if stream is None:  # its operations still count, and its number must not be missing
        message = effect.message
        bare = IdsFrame(message.session, message.epoch, message.number, message.ops, after_kv=message.after_kv)
        return send_numbered(shell, effect.link, bare, None)
    return send_numbered(shell, effect.link, capturing.filled(stream, effect), None)


# ---- in -------------------------------------------------------------------------------------------------------------------------


def probe(shell: NodeShell, effect: effects.Probe) -> Events:
    """A newer session's probe takes the place of one that still waits for the verification."""
    if shell.store.unchecked(effect.hello.stream):
        shell.probes[effect.hello.stream] = effect
        return ()
    held = shell.store.probe(effect.hello)
    return (events.Probed(effect.link, effect.hello.session, held, held.reason),)


def probe_failed(effect: effects.Probe, why: str) -> Events:
    hello = effect.hello
    held = Held(hello.session, hello.epoch, Holding(hello.stream, "replica", False, (), (), (), (), ()), why)
    return (events.Probed(effect.link, hello.session, held, why),)


def apply(shell: NodeShell, effect: effects.Apply) -> Events:
    message = effect.message
    payload = shell.buffers.take(effect.buffer) if effect.buffer else EMPTY
    if type(message) is IdsFrame:
        refused, gap = shell.store.apply_ids(effect.session, message)
        lane = "ids"
    else:
        refused, gap = shell.store.apply_kv(effect.session, message, payload)
        lane = "kv"
    shell.counters["payload_bytes_in"] += len(payload)
    return (events.Applied(effect.link, effect.session, lane, message.number, refused, gap),)


def apply_failed(effect: effects.Apply, why: str) -> Events:
    lane = "ids" if type(effect.message) is IdsFrame else "kv"
    return (events.Applied(effect.link, effect.session, lane, effect.message.number, (), why),)


def recheck(shell: NodeShell, effect: effects.Recheck) -> Events:
    shell.store.recheck(effect.instance, effect.rank)
    return ()


def drop_replica(shell: NodeShell, effect: effects.DropReplica) -> Events:
    if effect.stream not in shell.local:
        shell.streams.pop(effect.stream, None)  # it was pushed on
    shell.probes.pop(effect.stream, None)
    shell.pushes.pop(effect.stream, None)
    shell.store.drop(effect.stream)
    return ()


# ---- recovery -------------------------------------------------------------------------------------------------------------------


def streams_of(shell: NodeShell, instance: str) -> list[StreamId]:
    return [stream for stream in shell.local if stream.instance == instance]


def persist(shell: NodeShell, effect: effects.Persist) -> Events:
    """A promise binds the store only once it is written down."""
    shell.journal.persist(effect.key, effect.value)
    if effect.key.startswith(PROMISE) and effect.value is not None:
        promised(shell, effect.key.removeprefix(PROMISE), decode_epoch(effect.value))
    return ()


def promised(shell: NodeShell, instance: str, epoch: Epoch) -> None:
    shell.epochs[instance] = epoch
    shell.store.promise(instance, epoch)


def set_epoch(shell: NodeShell, effect: effects.SetEpoch) -> Events:
    for stream in streams_of(shell, effect.instance):
        shell.engines.set_epoch(stream, effect.epoch)
    return ()


def send_report(shell: NodeShell, effect: effects.SendReport, waited: bool = False) -> Events:
    """Tables are looked at once more, so that the report says what is true now; the core hears of it too. Unverified replicas are waited for once."""
    if not waited and shell.store.unchecked(instance=effect.instance):
        shell.reports[effect.instance] = (shell.reports.get(effect.instance, (shell.clock(), effect))[0], effect)
        return ()
    shell.reports.pop(effect.instance, None)  # one that still waits says less
    seen: list[events.Event] = []
    holdings = []
    for stream in streams_of(shell, effect.instance):
        seen += shell.engines.look(stream)
        holdings.append(shell.engines.holding(stream))
    holdings += shell.store.holdings(effect.instance)
    report = Report(effect.instance, effect.epoch, shell.node, tuple(holdings), effect.pending)
    return (*seen, *SHARED[effects.Send](shell, effects.Send(effect.link, report)))


def carry_plan(shell: NodeShell, effect: effects.CarryPlan) -> Events:
    plan = effect.plan
    if plan.moved:
        shell.moved[plan.instance] = plan
    else:
        shell.moved.pop(plan.instance, None)
    before = shell.store.counters["other_lives_dropped"]
    known = list(shell.store.carry_plan(plan, effect.node))
    dropped = shell.store.counters["other_lives_dropped"] - before
    if dropped:
        note(shell, effects.Note("other_life", plan.instance, f"{dropped} held sequences are others than the plan's of the same names: dropped"))
    for stream in streams_of(shell, plan.instance):
        wanted = [n for n, node in enumerate(plan.ids_node) if node == effect.node and plan.ids_stream[n] == stream]
        if wanted:
            known += shell.engines.known(stream, tuple(plan.sequences[n] for n in wanted), tuple(plan.ids[n] for n in wanted))
    return (events.PlanCarried(plan.instance, plan.epoch, tuple(known)),)


def order_restore(shell: NodeShell, effect: effects.OrderRestore) -> Events:
    shell.engines.order_restore(effect.stream, effect.plan)
    return ()


def order_failed(effect: effects.OrderRestore, why: str) -> Events:
    return (events.EngineRestored(effect.plan.instance, effect.stream.rank, effect.plan.epoch, effect.stream, "", why),)


def claim(shell: NodeShell, effect: effects.Claim) -> Events:
    """What can't be pulled into one pool is found before a standby is spent on it."""
    plan, rebuild = effect.plan, effect.rebuild
    streams = [source.stream for at, source in enumerate(rebuild.sources) if source.kind == "replica" and at in rebuild.source]
    found = clashes(plan, rebuild, {stream: shell.store.replica(stream).pages() for stream in streams}) if len(streams) > 1 else ()
    if found:
        shell.counters["clashes"] += len(found)
        why = f"replicas of two lives of it have other sequences in the same blocks: {found[0].sequence!r} and {len(found) - 1} copies more"
        stream = StreamId(plan.instance, rebuild.rank, 0)
        return (events.EngineRestored(plan.instance, rebuild.rank, plan.epoch, stream, "", why, clashes=found),)
    shell.engines.claim(effect.plan, effect.rebuild)
    return ()


def claim_failed(effect: effects.Claim, why: str) -> Events:
    plan, rank = effect.plan, effect.rebuild.rank
    return (events.EngineRestored(plan.instance, rank, plan.epoch, StreamId(plan.instance, rank, 0), "", why),)


def push_replica(shell: NodeShell, effect: effects.PushReplica) -> Events:
    replica = shell.store.replica(effect.stream)
    if effect.stream in shell.local:
        raise Refused(f"{effect.stream} lives here: it is not a replica")
    # Sums are taken anew from what is pushed: damage would arrive as truth.
    push = shell.pushes[effect.stream] = Push(effect, replica, shell.epochs.get(effect.stream.instance, NO_EPOCH), shell.store.scrub(effect.stream))
    told = go_on(shell, push)
    if told is None:
        shell.store.doubted(())
    return told or ()


def go_on(shell: NodeShell, push: Push) -> Events | None:
    """Read one slice more of a replica that is to be pushed on. What to tell the core once all is read; None until then."""
    cost_bytes, store = shell.slice_bytes, shell.store
    for cost in push.scrub:
        cost_bytes -= cost
        if cost_bytes <= 0:
            return None
    name = push.effect.stream
    del shell.pushes[name]
    if name not in store.streams() or store.replica(name) is not push.replica or shell.epochs.get(name.instance, NO_EPOCH) != push.epoch:
        return ()  # dropped, or of a plan that is over
    stream, told = pushing.source(push.replica, push.effect.node, push.epoch)
    shell.streams[name] = stream
    return told


def kill_process(shell: NodeShell, effect: effects.KillProcess) -> Events:
    shell.engines.kill(effect.incarnation)
    return ()


def forget_stream(shell: NodeShell, effect: effects.ForgetStream) -> Events:
    shell.streams.pop(effect.stream, None)
    if shell.local.pop(effect.stream, None) is not None:
        shell.engines.forget(effect.stream)
    return ()


DEEDS: dict[type, Deed] = {
    **SHARED,
    effects.Persist: persist,
    effects.Capture: capture,
    effects.SendKv: send_kv,
    effects.SendIds: send_ids,
    effects.Probe: probe,
    effects.Apply: apply,
    effects.Recheck: recheck,
    effects.DropReplica: drop_replica,
    effects.SetEpoch: set_epoch,
    effects.SendReport: send_report,
    effects.CarryPlan: carry_plan,
    effects.OrderRestore: order_restore,
    effects.Claim: claim,
    effects.PushReplica: push_replica,
    effects.KillProcess: kill_process,
    effects.ForgetStream: forget_stream,
}

FAILURES = {
    effects.Capture: all_stale,
    effects.Probe: probe_failed,
    effects.Apply: apply_failed,
    effects.OrderRestore: order_failed,
    effects.Claim: claim_failed,
}


def node_performer(shell: NodeShell):
    """performer() with a node's deeds."""
    return performer(shell, DEEDS, FAILURES)


__all__ = ["DEEDS", "FAILURES", "Engines", "NodeShell", "node_performer"]
