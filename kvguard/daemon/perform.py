"""Deeds of both cores: one function per effect, and frames turned into events.

Knows: the protocols Transport and Journal, wire framing, buffers of payload bytes. Must not know: decisions, streams (perform_node.py), real sockets, real
time: the simulation runs this very code over an in-process transport.
Invariants: a deed that fails is counted and logged and completes its effect as failed; only what can't be made durable, and bugs, go through.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from kvguard.core import effects, events
from kvguard.daemon.journal import NotDurable
from kvguard.errors import BadConfig, BadFrame
from kvguard.format import messages, wire
from kvguard.transport import base

log = logging.getLogger(__name__)

Events = Iterable[events.Event]


class Writes(Protocol):
    """What a deed needs of journal.Journal."""

    def persist(self, key: str, value: bytes | None) -> None: ...


class Buffers:
    """Payload bytes by number; what is in them never enters the core. Freed exactly once: taking an unknown one is a bug."""

    def __init__(self) -> None:
        self._held: dict[int, memoryview] = {}
        self._last = 0

    def keep(self, data: memoryview) -> int:
        self._last += 1
        self._held[self._last] = data
        return self._last

    def take(self, number: int) -> memoryview:
        """The bytes, no longer held here."""
        assert number in self._held, f"buffer {number} was freed before"
        return self._held.pop(number)

    def __len__(self) -> int:
        return len(self._held)

    def total_bytes(self) -> int:
        return sum(len(data) for data in self._held.values())


@dataclass
class Shell:
    """What deeds are done with. `clock`: monotonic ns. `counters`: drops, faults and traffic by name. `noted`: called with every Note."""

    transport: base.Transport
    journal: Writes
    clock: Callable[[], int]
    noted: Callable[[effects.Note], None] = lambda note: None
    buffers: Buffers = field(default_factory=Buffers)
    counters: Counter = field(default_factory=Counter)
    up: dict[str, str] = field(default_factory=dict)  # links that are up, and the node that is proved to be behind each
    carriers: dict[str, str] = field(default_factory=dict)  # what their payloads travel over


Deed = Callable[[Shell, effects.Effect], Events]


# ---- frames come in -------------------------------------------------------------------------------------------------------------


def arrived(shell: Shell, incoming: base.Incoming) -> events.Event:
    """What the transport reported, as an event. Never raises: garbage is Broken."""
    if type(incoming) is base.Frame:
        try:
            message, payload_bytes = wire.decode(incoming.head)
            if payload_bytes != (len(incoming.payload) if incoming.payload is not None else 0):
                raise BadFrame(f"payload of {len(incoming.payload or b'')} bytes, header says {payload_bytes}")
            if payload_bytes and type(message) is not messages.KvFrame:
                raise BadFrame(f"{type(message).__name__} with a payload: nobody would free it")
        except BadFrame as error:
            shell.counters["frames_broken"] += 1
            return events.Broken(incoming.link, str(error))
        shell.counters["frames_in"] += 1
        return events.Arrived(incoming.link, message, shell.buffers.keep(incoming.payload) if payload_bytes else 0)
    if type(incoming) is base.Up:
        shell.up[incoming.link], shell.carriers[incoming.link] = incoming.node, incoming.carrier
        return events.LinkUp(incoming.link, incoming.node, incoming.carrier)
    if type(incoming) is base.Carries:
        shell.carriers[incoming.link] = incoming.carrier
        return events.CarrierChanged(incoming.link, incoming.carrier)
    if type(incoming) is base.Down:
        shell.up.pop(incoming.link, None)
        shell.carriers.pop(incoming.link, None)
        shell.counters["links_lost"] += 1
        return events.LinkDown(incoming.link, incoming.reason)
    shell.counters["frames_broken"] += 1
    return events.Broken(incoming.link, incoming.reason)


# ---- deeds ----------------------------------------------------------------------------------------------------------------------


def persist(shell: Shell, effect: effects.Persist) -> Events:
    shell.journal.persist(effect.key, effect.value)
    return ()


def dial(shell: Shell, effect: effects.Dial) -> Events:
    """What the configuration forbids is no reason to end: whom to dial comes from others."""
    try:
        shell.transport.dial(effect.link, effect.address)
    except BadConfig as error:
        shell.counters["dials_refused"] += 1
        return (events.Broken(effect.link, str(error)),)
    return ()


def hang_up(shell: Shell, effect: effects.HangUp) -> Events:
    shell.up.pop(effect.link, None)
    shell.carriers.pop(effect.link, None)
    shell.transport.hang_up(effect.link)
    return ()


def send(shell: Shell, effect: effects.Send) -> Events:
    if not shell.transport.send(effect.link, wire.encode(effect.message)):
        shell.counters["sends_dropped"] += 1
    return ()


def note(shell: Shell, effect: effects.Note) -> Events:
    shell.counters[f"note_{effect.what}"] += 1
    shell.noted(effect)
    return ()


def free_buffer(shell: Shell, effect: effects.FreeBuffer) -> Events:
    if effect.buffer:
        shell.buffers.take(effect.buffer)
    return ()


def send_numbered(shell: Shell, link: str, message: messages.Message, payload: memoryview | None) -> Events:
    """A frame of a numbered lane. One that a live link won't take (its bound is reached) would be a gap for ever: the link's session starts anew."""
    if shell.transport.send(link, wire.encode(message, len(payload) if payload is not None else 0), payload):
        shell.counters["frames_out"] += 1
        shell.counters["payload_bytes_out"] += len(payload) if payload is not None else 0
        return ()
    shell.counters["sends_dropped"] += 1
    if link not in shell.up:
        return ()
    return (events.LinkDown(link, "the link takes no more: the peer doesn't read"), events.LinkUp(link, shell.up[link], shell.carriers[link]))


SHARED: dict[type, Deed] = {
    effects.Persist: persist,
    effects.Dial: dial,
    effects.HangUp: hang_up,
    effects.Send: send,
    effects.Note: note,
    effects.FreeBuffer: free_buffer,
}


def performer(shell: Shell, deeds: dict[type, Deed], failures: dict[type, Callable[[effects.Effect, str], Events]]) -> Callable[[effects.Effect], Events]:
    """What the loop calls for each effect. `failures`: the events that complete an effect whose deed failed, by type."""

    def perform(effect: effects.Effect) -> Events:
        try:
            return deeds[type(effect)](shell, effect)
        except (NotDurable, AssertionError):
            raise  # the core has gone on as if it were true: only a restart makes this process consistent again
        except Exception as error:
            shell.counters[f"deeds_failed_{type(effect).__name__}"] += 1
            log.exception("%s failed", type(effect).__name__)
            complete = failures.get(type(effect))
            return complete(effect, f"{type(error).__name__}: {error}") if complete else ()

    return perform
