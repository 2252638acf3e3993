"""The one emitter of each instance: its session begins, ends, and is told where its streams go on.

Knows: sessions, pending Resumes. Must not know: how a recovery proceeds.
Invariants: one session per instance, named by a durable incarnation; a new incarnation ends the old one and raises the epoch, because what the old one adopted
but did not say can't be known; the first emitter of an instance without sequences raises nothing; a Resume is said again until it is adopted; no emitter waits
for a process that another one followed.
"""

from __future__ import annotations

from collections import deque

from kvguard.core.effects import Send
from kvguard.core.known import BIRTHS_MAX, DELIVERED_MAX, Known
from kvguard.core.membership import Session
from kvguard.format.lineage import is_other
from kvguard.format.messages import Adopted, Delivered, EmitterBeat, EmitterHello, Fenced, Welcome
from kvguard.types import NodeId, Rank

REPLACED_MAX = 64


def on_hello(known: Known, link: str, message: EmitterHello, start) -> None:
    instance = message.instance
    before = known.emitters.get(instance)
    old = known.membership.sessions.get(instance)
    again = before == message.incarnation
    replaced = known.replaced.setdefault(instance, deque(maxlen=REPLACED_MAX))
    if message.incarnation in replaced and not again:
        # Two that live would else end each other in turn for ever, an epoch each time.
        known.note_once("stale_emitter", instance, f"incarnation {message.incarnation} was replaced and dialled again", message.incarnation)
        known.out.append(Send(link, Fenced(instance, known.epoch(instance), "another emitter took over")))
        return
    if before is not None and not again:
        replaced.append(before)
    if old is not None and old.link and old.link != link and not again:
        known.tell_emitter(instance, Fenced(instance, known.epoch(instance), "another emitter took over"))
    session = Session(message.incarnation, link, known.fair_ns, known.settings.patience.of_emitter(message.silence_ms))
    session.fenced = message.epoch.counter
    if again and old is not None:
        session.progress, session.rose_ns, session.scheduled, session.busy_ns = old.progress, old.rose_ns, old.scheduled, old.busy_ns
        session.fenced = max(session.fenced, old.fenced)
    known.membership.sessions[instance] = session
    known.movers[instance] = message.moves
    if again:
        _adopted(known, instance, message.epoch.counter)
    pending = known.resumes.get(instance)
    unheard = pending is not None and not pending.error and instance in known.unheard
    raised = False
    untold = known.untold.get(instance, "")
    if not known.phase(instance) and (untold or (not unheard and _must_raise(known, message, before, again))):
        why = f"the emitter is in epoch {message.epoch.counter}, the instance in {known.epoch(instance).counter}"
        why = "a new emitter" if not again else untold or why
        _begin(known, instance, why, start)
        raised = not known.paused
    if not again:
        begun_anew(known, instance)
        known.emitters[instance] = message.incarnation
        known.persist(f"emitter/{instance}", message.incarnation)
    welcome(known, instance)
    pending = known.resumes.get(instance)
    if not known.phase(instance) and pending is not None and not raised:
        known.unheard.pop(instance, None)
        known.tell_emitter(instance, pending)


def _must_raise(known: Known, message: EmitterHello, before: int | None, again: bool) -> bool:
    instance = message.instance
    if not known.membership.members.get(instance):
        return False
    if before is None:
        return known.sequences(instance) > 0
    if not again:
        return True
    return message.epoch.counter < known.epoch(instance).counter and instance not in known.resumes


def welcome(known: Known, instance: str) -> None:
    """Who the members are; said again whenever that changes."""
    recovering = bool(known.phase(instance)) or (instance in known.resumes and not known.resumes[instance].error)
    known.tell_emitter(instance, Welcome(instance, known.epoch(instance), known.directory(instance), recovering, known.sequences(instance)))


def _mine(known: Known, link: str, message) -> Session | None:
    """The session that the message belongs to; a former emitter is told that it is over."""
    session = known.membership.sessions.get(message.instance)
    if session is not None and session.incarnation == message.incarnation:
        session.link = session.link or link
        return session
    known.note_once("stale_emitter", message.instance, f"incarnation {message.incarnation} is not the emitter (any more)", message.incarnation)
    return None


def on_beat(known: Known, link: str, message: EmitterBeat, start) -> None:
    session = _mine(known, link, message)
    if session is None:
        return
    known.membership.emitter_beat(known.fair_ns, session, message)
    session.fenced = max(session.fenced, message.epoch.counter, message.fenced)
    if session.ended:
        session.ended = False
        known.note("emitter", message.instance, "the emitter that was called silent is heard again")
        pending = known.resumes.get(message.instance)
        if message.instance in known.untold and not known.phase(message.instance):
            _begin(known, message.instance, known.untold[message.instance], start)
        elif pending is not None and not known.phase(message.instance):
            known.tell_emitter(message.instance, pending)


def on_adopted(known: Known, link: str, message: Adopted) -> None:
    session = _mine(known, link, message)
    if session is not None:
        session.seen_ns, session.fenced = known.fair_ns, max(session.fenced, message.epoch.counter)
        _adopted(known, message.instance, message.epoch.counter)


def _adopted(known: Known, instance: str, counter: int) -> None:
    """The emitter goes on in that epoch: its Resume needs no saying again."""
    pending = known.resumes.get(instance)
    if pending is not None and counter >= pending.epoch.counter:
        del known.resumes[instance]
        known.persist(f"resume/{instance}", None)


def on_delivered(known: Known, message: Delivered) -> None:
    """Also of lives whose name is another sequence's by now: that one is not over."""
    delivered = known.delivered.setdefault(message.instance, {})
    forks, births = known.forks.get(message.instance, {}), known.births.get(message.instance, {})
    current = known.rounds.get(message.instance)
    undelivered = (current.undelivered if current is not None else None) or {}
    for name, birth in message.lives():
        delivered[name] = (*(other for other in delivered.pop(name, ()) if other != birth), birth)[-BIRTHS_MAX:]  # newest last
        if not is_other(births.get(name, 0), birth):
            forks.pop(name, None)
        if not is_other(undelivered.get(name, 0), birth):
            undelivered.pop(name, None)
    while len(delivered) > DELIVERED_MAX:
        del delivered[next(iter(delivered))]
    for node in known.membership.nodes:  # whoever holds their ids may let them go
        known.tell_node(node, message)


def on_silence(known: Known, instance: str, reason: str, silent_ms: float, start) -> None:
    """The session ended by silence. With nothing in flight there is nothing to fence: the next emitter's hello decides."""
    known.note("emitter", instance, reason)
    session = known.membership.sessions[instance]
    if known.phase(instance) or not known.membership.members.get(instance) or (not session.scheduled and not known.sequences(instance)):
        return
    if instance in known.unheard:
        return
    _begin(known, instance, reason, start, silent_ms)


def on_replaced(known: Known, instance: str, rank: Rank, node: NodeId, start) -> None:
    """Another process is the rank. Told by an epoch: the emitter may have sent work to the former one since it was last heard, and dials whom its last
    resumption named. One that is known from the store alone will hear of it when it dials; one that was called silent only if it is back, for then it was not
    dead."""
    session = known.membership.sessions.get(instance)
    if instance not in known.emitters or known.phase(instance):
        return
    why = f"rank {rank} on {node} is another process, with an empty pool"
    if session is not None and session.ended:
        known.untold[instance] = why
    else:
        _begin(known, instance, why, start)


def may_await(known: Known, instance: str, left_ns: int) -> bool:
    """Whether the emitter may wait for a process that left at `left_ns` (fair): it has work in flight, or has hardly been heard since."""
    session = known.membership.sessions.get(instance)
    return session is None or session.scheduled > 0 or session.seen_ns - left_ns < known.settings.patience.suspect_ns


def begun_anew(known: Known, instance: str) -> None:
    """An epoch, or another emitter: nobody waits for what was before."""
    known.untold.pop(instance, None)
    for key in [key for key in known.left if key[0] == instance]:
        del known.left[key]


def _begin(known: Known, instance: str, why: str, start, silent_ms: float = 0.0) -> None:
    lost = tuple(rank for rank, place in sorted(known.membership.members.get(instance, {}).items()) if place.lost)
    start(known, instance, lost, why, silent_ms)
