"""All that a node sends: its ranks' streams and those that it pushes on, each to its holders over one link per peer.

Knows: local streams, who shall hold them, links by name. Must not know: promises and plans beyond the epoch it is told, others' streams.
Invariants: one sender per (stream, holder), one link per peer, hung up with its last user; every capture's buffer goes out again; a clean end is said to each
holder, also to one that was away when it came, as long as this process lives.
"""

from __future__ import annotations

from itertools import count

from kvguard.core.effects import Dial, Effect, ForgetStream, FreeBuffer, HangUp, Note, Send
from kvguard.core.events import Arrived, Captured, CarrierChanged, Event, LinkUp, Looked, PoolLost, ResyncAsked
from kvguard.core.local import LocalStream
from kvguard.core.sender import Sender, SenderSettings
from kvguard.format.messages import Assign, Held, StreamEnd
from kvguard.types import Life, NodeId, Rank, StreamId, is_scheduler, scheduler_of

Effects = tuple[Effect, ...]


PEER = "peer:"
UNSAID_MAX = 256  # ends that wait for one holder: whoever is away for more of them keeps what it has


class Outbound:
    """`streams`: local ranks' pools and schedulers' tables, living and dead. `pushes`: replicas held here that go to another node for a plan."""

    def __init__(self, settings: SenderSettings) -> None:
        self._settings = settings
        self.streams: dict[StreamId, LocalStream] = {}
        self.pushes: dict[StreamId, LocalStream] = {}
        self._wanted: dict[tuple[str, Rank], Assign] = {}
        self._dialled: dict[str, str] = {}
        self._up: dict[str, str] = {}  # what their payloads travel over
        self._unsaid: dict[str, dict[StreamId, StreamEnd]] = {}  # by link: clean ends whose holder was away
        self._sessions, self._captures = count(1), count(1)

    def all(self) -> list[LocalStream]:
        return [*self.streams.values(), *self.pushes.values()]

    def of(self, instance: str) -> list[LocalStream]:
        """Local ranks' streams of one instance."""
        return [local for local in self.streams.values() if local.stream.instance == instance]

    def carriers(self) -> tuple[tuple[NodeId, str], ...]:
        """What payloads to each node that was dialled travel over, where the transport says so."""
        return tuple((link.removeprefix(PEER), carrier) for link, carrier in sorted(self._up.items()) if carrier and link.startswith(PEER))

    def next_deadline(self) -> int | None:
        due = [sender.next_deadline() for local in self.all() for sender in local.senders.values()]
        return min((at for at in due if at is not None), default=None)

    def check(self) -> None:
        used = {sender.link: None for local in self.all() for sender in local.senders.values()}
        assert set(used) <= set(self._dialled), "a sender whose link nobody dialled"
        assert set(self._unsaid) <= set(self._dialled) - set(self._up), "an end that could have been said"
        assert all(0 < len(ends) <= UNSAID_MAX for ends in self._unsaid.values())
        for local in self.all():
            local.check()
            mate = local.mate
            assert mate is None or (mate is self.streams.get(mate.stream) and mate.stream.rank == local.as_rank), "copied with a stranger"
            for sender in local.senders.values():
                assert sender.linked == (sender.link in self._up), sender.link

    # ---- holders ----

    def dial(self, node: NodeId, address: str) -> Effects:
        link = f"peer:{node}"
        if self._dialled.get(link) == address:
            return ()
        self._dialled[link] = address
        return (Dial(link, address),)

    def assign(self, now: int, assign: Assign) -> Effects:
        self._wanted[assign.instance, assign.rank] = assign
        locals_ = [local for local in self.of(assign.instance) if local.stream.rank in (assign.rank, scheduler_of(assign.rank.dp)) and local.watched]
        return tuple(effect for local in locals_ for effect in self.place(now, local))

    def place(self, now: int, local: LocalStream) -> Effects:
        """Senders for the holders that were assigned; those that aren't any more end once the new ones, or those of the rank that copies for it, have what they
        had."""
        beside = is_scheduler(local.stream.rank)
        assign = self._wanted.get((local.stream.instance, self._first_beside(local) if beside else local.stream.rank))
        if not beside:
            local.as_rank = assign.as_rank if assign is not None else None
            self._pair(local.stream.instance)
        if assign is None:
            local.unheld_reason = "no rank beside it has a holder yet" if beside else "no holder assigned yet"
            return ()
        local.unheld_reason = assign.reason or "no other node"
        out: Effects = ()
        wanted = {node: address for node, address in assign.holders if node != self._settings.node}
        for node, address in wanted.items():
            local.ending.pop(node, None)
            out += self.dial(node, address)
            if node not in local.senders:
                out += self.send_to(now, local, node)
        for node in local.senders:
            if node not in wanted:
                local.ending[node] = assign.reason or "another holder took over"
        return out

    def _first_beside(self, scheduler: LocalStream) -> Rank | None:
        """The first living rank here of a scheduler's dp that has holders: its ids go where that rank's go."""
        instance, place = scheduler.stream.instance, scheduler.stream.rank
        ranks = [local.stream.rank for local in self.of(instance) if local.alive and scheduler_of(local.stream.rank.dp) == place]
        return min((rank for rank in ranks if (instance, rank) in self._wanted and self._wanted[instance, rank].as_rank is None), default=None)

    def _pair(self, instance: str) -> None:
        """Whose holders count for whom: the last stream that attached as the rank that copies for it, one that isn't fenced before a former life."""
        streams = self.of(instance)
        streams.sort(key=lambda local: not local.fenced)
        last = {local.stream.rank: local for local in streams if local.watched}
        for local in streams:
            local.mate = last.get(local.as_rank) if local.as_rank is not None else None

    def send_to(self, now: int, local: LocalStream, node: NodeId) -> Effects:
        link = f"peer:{node}"
        sender = Sender(local.stream, local.ledger, node, link, local.epoch, self._sessions, self._captures, self._settings)
        local.senders[node] = sender
        self._unsaid.get(link, {}).pop(local.stream, None)
        if link in self._unsaid and not self._unsaid[link]:
            del self._unsaid[link]
        if local.fenced:
            sender.fence()
        return sender.step(now, LinkUp(link)) if link in self._up else ()

    def push_to(self, now: int, local: LocalStream, node: NodeId, address: str) -> Effects:
        """The plan had the node dialled; the link may have lost its last user before this one was there."""
        dialled = () if f"peer:{node}" in self._dialled else self.dial(node, address)
        return (*dialled, *self.send_to(now, local, node))

    def end_replaced(self) -> Effects:
        out: Effects = ()
        for local in self.streams.values():
            for node in local.replaced() if local.ending else ():
                out += self._end(local, node, local.ending.pop(node))
        return out

    def _end(self, local: LocalStream, node: NodeId, reason: str) -> Effects:
        sender = local.senders.pop(node)
        end = StreamEnd(local.stream, local.epoch, reason)
        out: Effects = (Send(sender.link, end),) if sender.linked else self._keep(sender.link, end)
        return (*out, Note("holder_ended", f"{local.stream} -> {node}", reason), *self._hang_up(sender.link))

    def _keep(self, link: str, end: StreamEnd) -> Effects:
        """To be said when the holder is back: nobody else would ever tell it that what it has is of no use."""
        ends = self._unsaid.setdefault(link, {})
        ends[end.stream] = end
        if len(ends) <= UNSAID_MAX:
            return ()
        oldest = next(iter(ends))
        del ends[oldest]
        return (Note("end_unsaid", f"{oldest} -> {link}", f"{UNSAID_MAX} later ends wait for it already"),)

    def _hang_up(self, link: str) -> Effects:
        if link not in self._dialled or link in self._unsaid or any(sender.link == link for local in self.all() for sender in local.senders.values()):
            return ()
        del self._dialled[link]
        self._up.pop(link, None)
        return (HangUp(link),)

    # ---- streams ----

    def detach(self, local: LocalStream, reason: str) -> Effects:
        """A clean end: holders may drop what they have."""
        out: Effects = ()
        for node in list(local.senders):
            out += self._end(local, node, reason)
        del self.streams[local.stream]
        self._pair(local.stream.instance)
        return (*out, ForgetStream(local.stream))

    def forget(self, local: LocalStream, streams: dict[StreamId, LocalStream]) -> Effects:
        """It is no longer needed here; what holders have of it is the coordinator's to unpin."""
        del streams[local.stream]
        self._pair(local.stream.instance)
        out: Effects = (ForgetStream(local.stream),)
        for sender in local.senders.values():
            out += self._hang_up(sender.link)
        return out

    def looked(self, now: int, event: Looked) -> Effects:
        local = self.streams.get(event.stream) or self.pushes.get(event.stream)
        return local.look(now, event) if local is not None else ()

    def captured(self, now: int, event: Captured) -> Effects:
        local = self.streams.get(event.stream) or self.pushes.get(event.stream)
        for sender in local.senders.values() if local is not None else ():
            if event.id in sender.flow.captures:
                return sender.step(now, event)
        return (FreeBuffer(event.buffer),) if event.buffer else ()

    def pool_lost(self, now: int, event: PoolLost) -> Effects:
        local = self.streams.get(event.stream)
        if local is None or not local.alive or local.incarnation != event.incarnation:
            return ()
        local.unreadable = event.reason
        return (Note("unprotected", str(event.stream), local.unreadable),)

    def answered(self, now: int, event: Arrived) -> Effects:
        """Held or Ack, to the sender whose session it names."""
        message = event.message
        for local in self.all():
            for sender in local.senders.values():
                if sender.session == message.session and sender.link == event.link:
                    return sender.step(now, event)
        mine = message.session >> 32 == self._settings.incarnation & 0xFFFFFFFF
        what = "stale_answer" if mine else "protocol_error"
        out: Effects = (Note(what, event.link, f"{type(message).__name__} of session {message.session:#x}, which is not open"),)
        if not mine and type(message) is not Held:  # whoever answers another life's frames has lost its place
            for local in self.all():
                for sender in local.senders.values():
                    if sender.link == event.link:
                        out += sender.resync(now, "protocol error")
        return out

    def doubted(self, now: int, event: ResyncAsked) -> Effects:
        """Holders are asked again what they have."""
        doubted = [local for local in self.of(event.instance) if local.alive and event.rank in (None, local.stream.rank)]
        return tuple(effect for local in doubted for sender in local.senders.values() for effect in sender.resync(now, "an operator asked for a resync"))

    # ---- all of them ----

    def link(self, now: int, event: Event, up: bool) -> Effects:
        if up:
            self._up[event.link] = event.carrier
        else:
            self._up.pop(event.link, None)
        senders = [sender for local in self.all() for sender in local.senders.values() if sender.link == event.link]
        out = tuple(effect for sender in senders for effect in sender.step(now, event))
        ends = self._unsaid.pop(event.link, {}) if up else {}
        return (*out, *(Send(event.link, end) for end in ends.values()), *(self._hang_up(event.link) if ends else ()))

    def carrier_changed(self, now: int, event: CarrierChanged) -> Effects:
        if event.link in self._up:
            self._up[event.link] = event.carrier
        return (Note("carrier", event.link, event.carrier),)

    def tick(self, now: int, event: Event) -> Effects:
        return tuple(effect for local in self.all() for effect in local.tell(now, event))

    def fence(self, instance: str) -> Effects:
        """The epoch is over: local ranks fall silent until they are restored, pushes for the former plan end."""
        for local in self.of(instance):
            local.fence()
        return self.end_pushes(instance)

    def end_pushes(self, instance: str) -> Effects:
        pushes = [local for local in self.pushes.values() if local.stream.instance == instance]
        return tuple(effect for local in pushes for effect in self.forget(local, self.pushes))

    def releasable(self, instance: str, rank: Rank, life: Life) -> int | None:
        """How many ids of it every holder of a local rank has acknowledged: what `ack = "strict"` may let out. None where the rank doesn't live here."""
        return next((local.releasable(life) for local in self.of(instance) if local.stream.rank == rank and local.watched), None)
