"""What all links and both sides of one transport have in common: its settings, what it reports, what it counts, how its sockets are made.

Knows: ZeroMQ's options, the events of base.py. Must not know: links, greetings.
Invariants: every event reaches the next receive(), which is woken for it; addresses that are counted are bounded; callers that are turned away are all
counted and only some of them told, because each that is told becomes a line of a log, and anybody may call.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import zmq

from kvguard.limits import PAYLOAD_BYTES_MAX
from kvguard.transport import admit
from kvguard.transport.base import Broken, Incoming
from kvguard.transport.keys import ADDRESSES_MAX, Keys
from kvguard.transport.nixl_agent import NixlSettings, Registered
from kvguard.transport.wakeup import Wakeup

if TYPE_CHECKING:
    from kvguard.transport.nixl_zone import Lending


TOLD_AT_ONCE, TOLD_PER_S = 20, 2  # of those who were turned away


@dataclass(frozen=True)
class Settings:
    """One transport's, from its constructor."""

    node: str
    incarnation: int
    keys: Keys | None
    insecure: bool
    bulk: bool
    bulk_port: int
    queue_bytes_max: int
    heartbeat_ms: int
    silence_ms: int
    greeting_ms: int
    nixl: NixlSettings | None = None  # its module alone is loaded where it is not used


@dataclass
class Shared:
    """What all parts of one transport have in common."""

    context: zmq.Context
    wakeup: Wakeup
    settings: Settings
    out: deque[Incoming] = field(default_factory=deque)
    counters: dict[str, int] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)  # by address
    registered: list[Registered] = field(default_factory=list)
    lending: Lending | None = None  # with NIXL: memory that every channel has registered
    _may_tell: float = TOLD_AT_ONCE
    _told_ns: int = field(default_factory=time.monotonic_ns)
    _untold: int = 0

    def tell(self, event: Incoming) -> None:
        """Hand an event to the next receive()."""
        self.out.append(event)
        self.wakeup.again(_nothing)

    def count(self, what: str) -> None:
        self.counters[what] = self.counters.get(what, 0) + 1

    def broken(self, link: str, what: str, reason: str) -> None:
        self.count(what)
        self.tell(Broken(link, reason))

    def refused(self, address: str, what: str, reason: str) -> None:
        """A caller was turned away before it was anybody."""
        host = address.rpartition(":")[0] or address.removesuffix(":0") or "?"  # ":0": gone before it could be asked who it was
        if host not in self.refusals and len(self.refusals) >= ADDRESSES_MAX:
            host = "others"
        self.refusals[host] = self.refusals.get(host, 0) + 1
        now_ns = time.monotonic_ns()
        self._may_tell = min(TOLD_AT_ONCE, self._may_tell + (now_ns - self._told_ns) * TOLD_PER_S / 1e9)
        self._told_ns = now_ns
        if self._may_tell < 1:
            self.count(what)
            self.count("refusals_untold")
            self._untold += 1
            return
        self._may_tell, untold, self._untold = self._may_tell - 1, self._untold, 0
        self.broken("in:", what, f"{reason} ({untold} more before it were turned away)" if untold else reason)

    def open_socket(self, kind: int) -> zmq.Socket:
        """A socket with the options that all connections share."""
        settings, opened = self.settings, self.context.socket(kind)
        opened.linger = 0
        opened.immediate = 1
        opened.handshake_ivl = 2000
        opened.heartbeat_ivl = settings.heartbeat_ms
        opened.heartbeat_timeout = settings.silence_ms
        opened.heartbeat_ttl = settings.silence_ms
        opened.maxmsgsize = max(admit.HEAD_BYTES_MAX, PAYLOAD_BYTES_MAX)
        opened.sndhwm = opened.rcvhwm = 1000
        if settings.keys is not None:
            opened.curve_publickey, opened.curve_secretkey = settings.keys.public, settings.keys.secret
        return opened


def _nothing(events: int) -> None:
    """What there is to do has been done: receive() only has to return it."""
