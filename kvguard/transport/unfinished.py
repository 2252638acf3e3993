"""Messages that never end: ZeroMQ keeps the parts of a message until the last one has come. It has no bound for all of them (ZMQ_MAXMSGSIZE is each part's),
and tells nobody meanwhile.

Knows: what ZeroMQ has read from one connection, by what the kernel says, how many whole messages came. Must not know: sockets of ZeroMQ, links.
Invariants: what came since the last whole message is that which ZeroMQ holds, apart from its own heartbeats; a connection that isn't TCP is not judged.
"""

from __future__ import annotations

from kvguard.limits import KIB, MIB, PAYLOAD_BYTES_MAX
from kvguard.transport import admit, watching

LOOK_NS = 1_000_000_000  # so often: what comes in between is the other half of the bound
BYTES_MAX = 32 * MIB  # of one message, generously: nobody is cut off for what ZeroMQ reads ahead
HEARTBEAT_BYTES_PER_S = 4 * KIB  # ZeroMQ's own, generously: an idle link must not be taken for an endless message after a day

assert admit.HEAD_BYTES_MAX + PAYLOAD_BYTES_MAX < BYTES_MAX


class Unfinished:
    """What one connection has brought since its last whole message. `fd`: ZeroMQ's own descriptor, `address`: who is at its other end."""

    def __init__(self, fd: int, address: tuple[str, int], now_ns: int):
        self._fd, self._address = fd, address
        self._messages = self._from_bytes = 0
        self._looked_ns = now_ns

    def due_ns(self) -> int:
        """When to look again."""
        return self._looked_ns + LOOK_NS

    def is_endless(self, now_ns: int, messages: int) -> bool:
        """Whether more came than one message can have. `messages`: all whole ones that this connection ever brought; none may be waiting to be taken."""
        own_bytes = HEARTBEAT_BYTES_PER_S * (now_ns - self._looked_ns) // 1_000_000_000
        self._looked_ns = now_ns
        taken = watching.taken_bytes(self._fd, self._address)
        if taken is None:
            return False
        if messages != self._messages:
            self._messages, self._from_bytes = messages, taken
        self._from_bytes = min(taken, self._from_bytes + own_bytes)
        return taken - self._from_bytes > BYTES_MAX
