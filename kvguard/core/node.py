"""A node: the parts put together. What is sent, received, promised and ordered here, event by event.

Knows: local ranks, their faults, promises, the coordinator's link and orders. Must not know: sockets, tables, pages, clocks.
Invariants: a promise is durable before anything follows from it, and only rises (I3); the same order of an (instance, epoch) repeats the answer, not the deed;
every buffer that comes in goes out again; a dead rank's pool stays until the recovery that may need it is over; a fence is answered at once, and a pool whose
process was told to die is called pending until the death is seen.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvguard.core import events, schedulers
from kvguard.core.effects import Effect, FreeBuffer, Note, Send, SendReport, SetEpoch
from kvguard.core.faults import Faults
from kvguard.core.inbound import Inbound
from kvguard.core.local import LocalStream
from kvguard.core.orders import Orders
from kvguard.core.outbound import Outbound
from kvguard.core.progress import Progress
from kvguard.core.promises import NEWER, SAME, Promises
from kvguard.core.seen import Seen
from kvguard.core.sender import SenderSettings
from kvguard.format import messages
from kvguard.limits import WINDOW_BYTES_DEFAULT
from kvguard.types import Epoch, NodeId, StreamId, is_scheduler

COORDINATOR = "coordinator"
FROM_COORDINATOR = (messages.NodeWelcome, messages.Assign, messages.Fence, messages.PlanOrder, messages.RebuildOrder, messages.Resumed)
Effects = tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class NodeSettings:
    """`hang_min_ns` 0: hangs aren't looked for. `retry_ns`, `answer_ns`: core/sender.py."""

    node: NodeId
    incarnation: int
    address: str
    version: str = ""
    heartbeat_ns: int = 200_000_000
    window_bytes: int = WINDOW_BYTES_DEFAULT
    hang_min_ns: int = 2_000_000_000
    hang_factor: int = 10
    retry_ns: int = 5_000_000_000
    answer_ns: int = 2_000_000_000


class Node:
    """`promises`: what the journal says (core/promises.py decodes it)."""

    def __init__(self, settings: NodeSettings, promises: dict[str, Epoch]) -> None:
        self.settings = settings
        self.promises = Promises(promises)
        self.inbound = Inbound(self.promises)
        self.outbound = Outbound(SenderSettings(settings.node, settings.incarnation, settings.window_bytes, settings.retry_ns, settings.answer_ns))
        self.orders: dict[str, Orders] = {}
        self.standbys: dict[int, messages.StandbyBeat] = {}
        self.linked = False  # to the coordinator
        self._faults = Faults(settings.node, COORDINATOR, self.promises)
        self._running: dict[str, Epoch] = {}  # the epoch whose recovery is known to be over
        self._fences: dict[str, messages.Fence] = {}  # to be answered with a report, or answered and not yet followed by a plan
        self._seen = Seen()
        self._beat_ns: int | None = None
        self._beats = 0
        out, into = self.outbound, self.inbound
        self._steps = {
            events.LinkUp: self._link_up, events.LinkDown: self._link_down, events.Arrived: self._arrived, events.Broken: self._broken, events.Tick: self._tick,
            events.TurnEnded: self._turn_ended, events.StreamAttached: self._attached, events.Looked: out.looked, events.StepsSeen: self._steps_seen,
            events.StreamDetached: self._detached, events.ProcessDied: self._died, events.StandbyAttached: self._standby, events.Captured: out.captured,
            events.EngineRestored: self._restored, events.Probed: into.completed, events.Applied: into.completed, events.PlanCarried: self._carried,
            events.ReplicasSeen: self._seen.store, events.DeathSuspected: self._suspected, events.PoolLost: out.pool_lost,
            events.DevicesSeen: self._seen.devices, events.ReplicaDoubted: into.replica_doubted,
            events.ResyncAsked: lambda now, event: into.doubted(event) + out.doubted(now, event), events.CarrierChanged: out.carrier_changed,
        }  # fmt: skip
        self._messages = {
            messages.Hello: self._hello, messages.IdsFrame: into.frame, messages.KvFrame: into.frame, messages.Held: out.answered, messages.Ack: out.answered,
            messages.StreamEnd: self._stream_end, messages.NodeWelcome: self._welcome, messages.Assign: self._assign, messages.Fence: self._fence,
            messages.PlanOrder: self._plan, messages.RebuildOrder: self._rebuild, messages.Resumed: self._resumed,
        }  # fmt: skip

    # ---- the contract of a core ----

    def step(self, now_ns: int, event: events.Event) -> Effects:
        return self._steps[type(event)](now_ns, event)

    def next_deadline(self) -> int | None:
        due = [self._beat_ns, self.outbound.next_deadline()]
        due += [local.progress.next_deadline() for local in self.outbound.streams.values() if local.watched] if self.settings.hang_min_ns else []
        return min((at for at in due if at is not None), default=None)

    def check(self) -> None:
        self.inbound.check()
        self.outbound.check()
        for local in self.outbound.all():
            assert local.fenced or local.epoch == self.promises.of(local.stream.instance), "a stream of an epoch that is over goes on"
        assert (self._beat_ns is not None) == self.linked

    # ---- links ----

    def _link_up(self, now: int, event: events.LinkUp) -> Effects:
        if event.link != COORDINATOR:
            return self.outbound.link(now, event, True)
        self.linked, self._beat_ns = True, now + self.settings.heartbeat_ns
        settings = self.settings
        promises = tuple(sorted(self.promises.known.items()))
        out: list[Effect] = [Send(COORDINATOR, messages.NodeHello(settings.node, settings.incarnation, settings.address, promises, settings.version))]
        out.extend(self._faults.again(now))
        out.extend(effect for instance in self._fences for effect in self._report_again(instance))
        for orders in self.orders.values():
            out.extend(() if orders.finished else orders.again())
        return tuple(out)

    def _link_down(self, now: int, event: events.LinkDown) -> Effects:
        if event.link == COORDINATOR:
            self.linked, self._beat_ns = False, None
            return ()
        return self.outbound.link(now, event, False) + self.inbound.link_down(event.link)

    def _broken(self, now: int, event: events.Broken) -> Effects:
        return (Note("broken_frame", event.link, event.reason), *self.inbound.broken(event.link, event.reason))

    def _arrived(self, now: int, event: events.Arrived) -> Effects:
        kind = type(event.message)
        react = self._messages.get(kind)
        if react is None or (kind in FROM_COORDINATOR) != (event.link == COORDINATOR):
            free = (FreeBuffer(event.buffer),) if event.buffer else ()
            return (Note("refused", event.link, f"{kind.__name__} is not for a node, or not from this link"), *free)
        if kind is messages.IdsFrame or kind is messages.KvFrame or not event.buffer:
            return react(now, event)
        return (FreeBuffer(event.buffer), *react(now, event))

    def _turn_ended(self, now: int, event: events.TurnEnded) -> Effects:
        out = self.inbound.turn_ended(now, event) + self.outbound.end_replaced()
        for stream, local in self.outbound.pushes.items():
            orders = self.orders.get(stream.instance)
            targets = orders.targets(stream) if orders is not None else ()
            if targets and all(local.transferred(node) for node in targets):
                out += orders.transferred(stream)
        return out

    # ---- others' streams ----

    def _hello(self, now: int, event: events.Arrived) -> Effects:
        hello = event.message
        out: Effects = ()
        if self.promises.judge(hello.stream.instance, hello.epoch) == NEWER:  # this node had no part in that round, and is bound by it all the same
            out = self._rise(hello.stream.instance, hello.epoch)
        return out + self.inbound.hello(event.link, hello)

    def _stream_end(self, now: int, event: events.Arrived) -> Effects:
        return self.inbound.stream_end(event.message)

    # ---- time ----

    def _tick(self, now: int, event: events.Tick) -> Effects:
        out = self.outbound.tick(now, event)
        for local in self.outbound.streams.values():
            if local.watched and self.settings.hang_min_ns:
                local.progress.step(now, event)
                verdict = local.progress.verdict(now)
                if verdict is not None:
                    out += (Note("hung", str(local.stream), verdict.reason), *self._doomed(now, local, "hung", verdict.reason, verdict.since_ns))
        if self._beat_ns is not None and now >= self._beat_ns:
            self._beat_ns = now + self.settings.heartbeat_ns
            out += (*schedulers.succeeded(self.outbound), self._beat(now), *self._faults.again(now))
        return out

    def _beat(self, now: int) -> Send:
        settings, seen, held = self.settings, self._seen, self._seen.replicas
        self._beats += 1
        own = [local for local in self.outbound.streams.values() if not is_scheduler(local.stream.rank) and not self._kept(local, finished=True)]
        ranks = tuple(local.tell_beat(now, self.promises.of(local.stream.instance)) for local in own)
        return Send(
            COORDINATOR,
            messages.Beat(
                settings.node, settings.incarnation, self._beats, ranks, tuple(self.standbys.values()), held.replicas, held.arena_bytes, held.arena_bytes_max,
                schedulers.beats(self.outbound, now, self.promises), self.outbound.carriers(), seen.device_faults, seen.age_ms(now),
            ),
        )

    # ---- local ranks ----

    def _attached(self, now: int, event: events.StreamAttached) -> Effects:
        instance = event.stream.instance
        verdict = self.promises.judge(instance, event.epoch)
        if event.pushing:
            return self._push(now, event, verdict)
        out = self._rise(instance, event.epoch) if verdict == NEWER else ()
        local = self.outbound.streams.get(event.stream)
        known = local is not None
        if not known:
            local = self.outbound.streams[event.stream] = LocalStream(event, self._progress())
        elif local.incarnation != event.incarnation or not local.alive:
            local.progress, local.condemned = self._progress(), None
            local.alive, local.death, local.unreadable = True, "", ""
        local.incarnation, local.endpoint = event.incarnation, event.endpoint
        if verdict not in (SAME, NEWER):
            local.epoch = event.epoch
            local.fence()
            promised = self.promises.of(instance)
            out += Note("stale_epoch", str(event.stream), f"attached in epoch {event.epoch.counter}"), SetEpoch(instance, promised)
        elif known and (local.fenced or local.epoch != event.epoch):
            out += local.adopt(now, event.epoch)
        orders = self.orders.get(instance)  # this daemon may have been restarted since it reported the rank
        late = orders.go_on(local) if orders is not None and local.stream in orders.plan.survivors else ()
        return out + self.outbound.place(now, local) + self._report_again(instance) + late

    def _progress(self) -> Progress:
        return Progress(self.settings.hang_min_ns, self.settings.hang_factor)

    def _push(self, now: int, event: events.StreamAttached, verdict: str) -> Effects:
        pushes = self.outbound.pushes
        if verdict != SAME:
            return (Note("stale_epoch", str(event.stream), f"pushed in epoch {event.epoch.counter}"),)
        local = pushes.setdefault(event.stream, LocalStream(event, None))
        orders = self._current(event.stream.instance, event.epoch)
        targets = [(node, address) for node, address, stream in orders.transfers() if stream == event.stream] if orders is not None else []
        return tuple(effect for node, address in targets if node not in local.senders for effect in self.outbound.push_to(now, local, node, address))

    def _steps_seen(self, now: int, event: events.StepsSeen) -> Effects:
        local = self.outbound.streams.get(event.stream)
        return local.progress.step(now, event) if local is not None and local.alive else ()

    def _detached(self, now: int, event: events.StreamDetached) -> Effects:
        local = self.outbound.streams.get(event.stream)
        if local is None or local.incarnation != event.incarnation:
            return ()
        out = self.outbound.detach(local, "detached")
        if is_scheduler(event.stream.rank):
            return (*out, Note("detached", str(event.stream), "the scheduler closed its table"))
        return out + self._fault(now, local, "detached", "the engine closed its rank", False, now) + self._report_again(event.stream.instance)

    def _suspected(self, now: int, event: events.DeathSuspected) -> Effects:
        local = self.outbound.streams.get(event.stream)
        if local is None or not local.alive or local.incarnation != event.incarnation or local.condemned is not None:
            return ()
        return self._doomed(now, local, "died", event.reason, now)

    def _doomed(self, now: int, local: LocalStream, kind: str, reason: str, since_ns: int) -> Effects:
        """It is told to die, and that is said at once: a round begins before its memory is torn down, which takes seconds on a busy machine."""
        said = reason if kind == "died" else f"{kind}: {reason}"
        return (*self._introduced(now, local), local.condemn(kind, reason, since_ns), *self._fault(now, local, "suspected", said, False, since_ns))

    def _died(self, now: int, event: events.ProcessDied) -> Effects:
        if event.stream is None:
            self.standbys.pop(event.incarnation, None)
            return tuple(effect for orders in self.orders.values() for effect in orders.died(event.incarnation, event.reason))
        local = self.outbound.streams.get(event.stream)
        if local is None or not local.alive or local.incarnation != event.incarnation:
            return (Note("stale_death", str(event.stream), event.reason),)
        if is_scheduler(event.stream.rank):
            return schedulers.died(self.outbound, local, event.reason)
        kind, reason, since = local.condemned or ("died", event.reason, now)
        introduced = self._introduced(now, local)
        local.alive, local.death, local.salvageable = False, f"{kind}: {reason}", event.salvageable
        out = introduced + self._fault(now, local, kind, reason, event.salvageable, since)
        instance = local.stream.instance
        if local.epoch != self.promises.of(instance) == self._running.get(instance) and not self._kept(local):  # a former life, ended after its recovery
            return out + self.outbound.forget(local, self.outbound.streams)
        return out + self._report_again(instance)

    def _report_again(self, instance: str) -> Effects:
        """A report that no plan has followed yet said less than is known now: a rank was not back from its daemon's restart, or its pool was pending."""
        fence = self._fences.get(instance)
        return (self._report(instance, fence.epoch),) if fence is not None else ()

    def _report(self, instance: str, epoch: Epoch) -> SendReport:
        return SendReport(COORDINATOR, instance, epoch, tuple(local.stream for local in self.outbound.of(instance) if local.dying))

    def _introduced(self, now: int, local: LocalStream) -> Effects:
        """Of a life that no heartbeat has told of: first that it attached, then that it ended. Nobody recovers a rank that he doesn't know."""
        return (self._beat(now),) if self.linked and not local.told else ()

    def _fault(self, now: int, local: LocalStream, kind: str, reason: str, salvageable: bool, since_ns: int) -> Effects:
        return self._faults.struck(now, local, kind, reason, salvageable, since_ns, self.linked)

    def _standby(self, now: int, event: events.StandbyAttached) -> Effects:
        self.standbys[event.standby] = messages.StandbyBeat(event.instance, event.standby, event.endpoint, event.fingerprints)
        return ()

    # ---- the coordinator's orders ----

    def _welcome(self, now: int, event: events.Arrived) -> Effects:
        self._beat_ns = now + self.settings.heartbeat_ns
        return (self._beat(now),)

    def _assign(self, now: int, event: events.Arrived) -> Effects:
        return self.outbound.assign(now, event.message)

    def _rise(self, instance: str, epoch: Epoch) -> Effects:
        """The promise rises: durable first; then the engines are told, and everything of older epochs is over."""
        durable = self.promises.rise(instance, epoch)
        self.orders.pop(instance, None)
        self._fences.pop(instance, None)
        return (durable, SetEpoch(instance, epoch), *self.inbound.fence(instance), *self.outbound.fence(instance))

    def _bound(self, instance: str, epoch: Epoch, what: str) -> tuple[bool, Effects]:
        """Whether an order of `epoch` counts here; one of a newer epoch binds even if its fence was missed."""
        verdict = self.promises.judge(instance, epoch)
        if verdict == NEWER:
            return True, self._rise(instance, epoch)
        if verdict == SAME:
            return True, ()
        promised = self.promises.of(instance)
        reason = f"{what} of epoch {epoch.counter} of {epoch.issuer!r}, {promised.counter} of {promised.issuer!r} is promised"
        return False, (Note("stale_epoch", instance, reason),)

    def _fence(self, now: int, event: events.Arrived) -> Effects:
        fence = event.message
        bound, out = self._bound(fence.instance, fence.epoch, "Fence")
        if not bound:
            return out
        if out:
            out += (Note("fenced", fence.instance, fence.reason, (("epoch", fence.epoch.counter),)),)
        if fence.instance not in self.orders:
            self._fences[fence.instance] = fence
        for local in [local for local in self.outbound.of(fence.instance) if local.alive and local.fenced and local.stream.rank in fence.lost]:
            why = f"its rank is given away: {fence.reason}"
            out += (local.condemn("died", why, now),) if local.dying else self._doomed(now, local, "died", why, now)
        return (*out, self._report(fence.instance, fence.epoch))

    def _plan(self, now: int, event: events.Arrived) -> Effects:
        plan = event.message
        bound, out = self._bound(plan.instance, plan.epoch, "PlanOrder")
        if not bound:
            return out
        self._fences.pop(plan.instance, None)
        orders = self.orders.get(plan.instance)
        if orders is not None:
            return out + orders.again()
        orders = self.orders[plan.instance] = Orders(plan, self.settings.node, COORDINATOR)
        for target, address, _ in orders.transfers():
            out += self.outbound.dial(target, address)
        going_on = {stream.rank: stream for stream in plan.survivors}
        ending = dict.fromkeys((*(rebuild.rank for rebuild in plan.rebuilds), *plan.moved))
        living = [local for local in self.outbound.of(plan.instance) if local.alive]
        former = [local for local in living if local.fenced and (local.stream.rank in ending or going_on.get(local.stream.rank, local.stream) != local.stream)]
        survivors = [local for local in living if local not in former and (local.fenced or local.stream in plan.survivors)]
        return out + _given_away(now, former, f"plan of epoch {plan.epoch.counter}") + orders.start(survivors)

    def _carried(self, now: int, event: events.PlanCarried) -> Effects:
        orders = self._current(event.instance, event.epoch)
        return orders.carried(event) if orders is not None else (Note("stale_epoch", event.instance, f"plan of epoch {event.epoch.counter} was carried out"),)

    def _rebuild(self, now: int, event: events.Arrived) -> Effects:
        order = event.message
        orders = self._current(order.instance, order.epoch)
        if orders is None:
            return (Note("stale_epoch", order.instance, f"RebuildOrder of epoch {order.epoch.counter}, whose plan isn't known here"),)
        return orders.rebuild(order, None if orders.left(order) else self.standbys.pop(order.rebuild.standby, None))

    def _restored(self, now: int, event: events.EngineRestored) -> Effects:
        orders = self._current(event.instance, event.epoch)
        if orders is None:
            return (Note("stale_epoch", event.instance, f"rank {event.rank} was restored in epoch {event.epoch.counter}"),)
        local = self.outbound.streams.get(event.stream)
        out: Effects = ()
        if local is not None and not event.error and (local.fenced or local.epoch != event.epoch):
            out = local.adopt(now, event.epoch)
        if is_scheduler(event.stream.rank):  # nothing waits for a scheduler
            return (*out, Note("restored", str(event.stream), event.error)) if event.error else out
        untold = orders.untold(event)
        if untold is not None:
            self.standbys[untold.standby] = untold
        return out + orders.restored(event)

    def _kept(self, local: LocalStream, finished: bool = False) -> bool:
        """Whether it is a dead pool that other instances fetch from; `finished`: and nothing else any more."""
        orders = self.orders.get(local.stream.instance)
        dead = orders is not None and not local.alive and local.epoch != orders.plan.epoch
        return dead and orders.keeps(local.stream.rank) and (orders.finished or not finished)

    def _current(self, instance: str, epoch: Epoch) -> Orders | None:
        orders = self.orders.get(instance)
        return orders if orders is not None and orders.plan.epoch == epoch else None

    def _resumed(self, now: int, event: events.Arrived) -> Effects:
        """The instance runs: dead pools go, and replicas that nobody needs any more."""
        resumed = event.message
        bound, out = self._bound(resumed.instance, resumed.epoch, "Resumed")
        if not bound:
            return out
        self._fences.pop(resumed.instance, None)
        self._running[resumed.instance] = resumed.epoch
        if resumed.instance in self.orders:
            self.orders[resumed.instance].finished = True
        mine = self.outbound.of(resumed.instance)
        out += _given_away(now, [local for local in mine if local.watched and local.fenced and local.stream in resumed.ended], "a former life")
        for local in mine:
            over = local.epoch != resumed.epoch or local.stream in resumed.ended
            if not local.alive and over and not (resumed.pinned and self._kept(local)):
                out += self.outbound.forget(local, self.outbound.streams)
        out += self.outbound.end_pushes(resumed.instance)
        why = f"unpinned in epoch {resumed.epoch.counter}"
        return out + tuple(effect for stream in resumed.unpinned for effect in self.inbound.unpin(stream, why))


def _given_away(now: int, ranks: list[LocalStream], reason: str) -> Effects:
    return tuple(local.condemn("died", f"its rank is given away: {reason}", now) for local in ranks)
