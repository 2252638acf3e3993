"""All that a node receives for others' streams: which sessions are open, and which are over.

Knows: receivers by (link, session), one per stream. Must not know: what replicas hold, local ranks, the coordinator.
Invariants: a stream has one session, the newest that was granted; no session is older than the promise; every buffer goes out again.
"""

from __future__ import annotations

from kvguard.core.effects import DropReplica, Effect, FreeBuffer, Note, Recheck, Send
from kvguard.core.events import Applied, Arrived, Probed, ReplicaDoubted, ResyncAsked
from kvguard.core.promises import NEWER, SAME, Promises
from kvguard.core.receiver import Receiver, refusal
from kvguard.format.messages import VERSION, Ack, Hello, StreamEnd
from kvguard.types import Epoch, StreamId

ENDED_MAX = 256  # sessions that are over and may still have frames on the way


class Inbound:
    """A Hello of a newer epoch comes here after the node has raised its promise."""

    def __init__(self, promises: Promises) -> None:
        self._promises = promises
        self._sessions: dict[tuple[str, int], Receiver] = {}
        self._streams: dict[StreamId, Receiver] = {}
        self._ended: dict[tuple[str, int], str] = {}  # why, for the counters
        self._strangers: dict[tuple[str, int], Epoch] = {}  # sessions that nobody opened here: told once per turn

    def hello(self, link: str, hello: Hello) -> tuple[Effect, ...]:
        verdict = self._promises.judge(hello.stream.instance, hello.epoch)
        promised = self._promises.of(hello.stream.instance)
        assert verdict != NEWER, "the node raises its promise first"
        if verdict != SAME:
            reason = f"stale epoch {hello.epoch.counter} of {hello.epoch.issuer!r}: {promised.counter} of {promised.issuer!r} is promised here"
            return Note("stale_epoch", str(hello.stream), reason), Send(link, refusal(hello, promised, reason))
        if hello.version != VERSION:
            reason = f"protocol version {hello.version}, this node speaks {VERSION}. Try: upgrade the older side"
            return Note("refused", str(hello.stream), reason), Send(link, refusal(hello, hello.epoch, reason))
        former = self._streams.get(hello.stream)
        if former is not None and (former.link, former.session) == (link, hello.session):
            return (Note("duplicate", str(hello.stream), f"Hello of session {hello.session:#x}"),)
        ended = self._end(former, "superseded", "a newer session is open") if former is not None else ()
        receiver = self._streams[hello.stream] = self._sessions[link, hello.session] = Receiver(link, hello)
        return ended + receiver.start()

    def frame(self, now_ns: int, event: Arrived) -> tuple[Effect, ...]:
        key = (event.link, event.message.session)
        receiver = self._sessions.get(key)
        if receiver is not None:
            return receiver.step(now_ns, event)
        free = (FreeBuffer(event.buffer),) if event.buffer else ()
        if key in self._ended:
            return (Note(self._ended[key], f"session {key[1]:#x}", f"frame {event.message.number} of a session that is over"), *free)
        if len(self._strangers) < ENDED_MAX:
            self._strangers[key] = event.message.epoch
        return (Note("unknown_session", f"session {key[1]:#x}", f"frame {event.message.number} on {event.link}"), *free)

    def completed(self, now_ns: int, event: Probed | Applied) -> tuple[Effect, ...]:
        receiver = self._sessions.get((event.link, event.session))
        if receiver is None:
            return ()
        out = receiver.step(now_ns, event)
        return out + (self._end(receiver, "refused", event.reason) if type(event) is Probed and event.reason else ())

    def turn_ended(self, now_ns: int, event) -> tuple[Effect, ...]:
        out: list[Effect] = []
        for receiver in self._sessions.values():
            out.extend(receiver.step(now_ns, event))
        for (link, session), epoch in self._strangers.items():
            out.append(Send(link, Ack(session, epoch, 0, 0, (), "unknown session")))
        self._strangers.clear()
        return tuple(out)

    def broken(self, link: str, reason: str) -> tuple[Effect, ...]:
        """What was not a frame may have been any stream's."""
        return tuple(effect for receiver in self._on(link) for effect in receiver.broken(f"broken frame: {reason}"))

    def doubted(self, event: ResyncAsked) -> tuple[Effect, ...]:
        """What is held is verified before anybody goes on writing to it: sessions say that they want a Hello, and a Hello waits for it."""
        doubted = [receiver for receiver in self._streams.values() if receiver.stream.instance == event.instance]
        broken = tuple(effect for one in doubted if event.rank in (None, one.stream.rank) for effect in one.broken("an operator asked for a resync"))
        return (*broken, Recheck(event.instance, event.rank))

    def replica_doubted(self, now_ns: int, event: ReplicaDoubted) -> tuple[Effect, ...]:
        """Its sender counts on what may not be whole, and must not go on doing so until it has something to send."""
        receiver = self._streams.get(event.stream)
        return receiver.broken(event.reason) if receiver is not None else ()

    def link_down(self, link: str) -> tuple[Effect, ...]:
        out = tuple(effect for receiver in self._on(link) for effect in self._end(receiver, "after_end", "link down"))
        for ended in [key for key in self._ended if key[0] == link]:
            del self._ended[ended]
        return out

    def fence(self, instance: str) -> tuple[Effect, ...]:
        """The promise rose: sessions of older epochs are over."""
        over = [receiver for receiver in self._streams.values() if receiver.stream.instance == instance and receiver.epoch != self._promises.of(instance)]
        return tuple(effect for receiver in over for effect in self._end(receiver, "stale_epoch", "the epoch is over"))

    def stream_end(self, end: StreamEnd) -> tuple[Effect, ...]:
        if self._promises.judge(end.stream.instance, end.epoch) != SAME:
            return (Note("stale_epoch", str(end.stream), f"StreamEnd of epoch {end.epoch.counter}"),)
        return self.forget(end.stream, end.reason)

    def forget(self, stream: StreamId, reason: str) -> tuple[Effect, ...]:
        """The replica goes, and with it the session that wrote it."""
        receiver = self._streams.get(stream)
        ended = self._end(receiver, "after_end", reason) if receiver is not None else ()
        return (*ended, DropReplica(stream, reason))

    def unpin(self, stream: StreamId, reason: str) -> tuple[Effect, ...]:
        """Nobody asks for the replica any more. Whoever writes it all the same hears that it has begun anew, and doesn't count on it until then."""
        receiver = self._streams.get(stream)
        said = () if receiver is None else (Send(receiver.link, Ack(receiver.session, receiver.epoch, 0, 0, (), reason)),)
        return (*self.forget(stream, reason), *said)

    def check(self) -> None:
        assert set(self._sessions.values()) == set(self._streams.values())
        for receiver in self._streams.values():
            receiver.check()
            assert receiver.epoch == self._promises.of(receiver.stream.instance), "a session of an older epoch"
        assert len(self._ended) <= ENDED_MAX and len(self._strangers) <= ENDED_MAX

    def _on(self, link: str) -> list[Receiver]:
        return [receiver for receiver in self._sessions.values() if receiver.link == link]

    def _end(self, receiver: Receiver, what: str, reason: str) -> tuple[Effect, ...]:
        key = (receiver.link, receiver.session)
        del self._sessions[key]
        del self._streams[receiver.stream]
        self._ended[key] = what
        while len(self._ended) > ENDED_MAX:
            del self._ended[next(iter(self._ended))]
        return receiver.end(what, reason)
