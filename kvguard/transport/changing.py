"""NIXL, tried beside the bulk channel of a link that is up; where it carries, the link's payloads change over to it, without a gap and without ending the link.

Knows: one bulk channel, one channel over NIXL, what the two sides say of the change. Must not know: sockets, who dialled, when it is tried.
Invariants: nothing of the link's takes NIXL before TRIAL_BYTES have arrived each way, as they were sent; every frame that was given to the bulk channel comes
before those that take NIXL: the writer says how many they are (greeting.Changed) and the reader takes them first; a trial that fails before either side
has changed is over, and nothing else; one that fails later ends the link.
"""

from __future__ import annotations

from collections.abc import Callable

from kvguard.errors import BadFrame
from kvguard.limits import MIB
from kvguard.transport import greeting
from kvguard.transport.bulk import BulkChannel

TRIAL_BYTES = MIB  # as large as most frames: a way that lets pages through and nothing larger isn't one
TRIAL_NS = 10_000_000_000


class Trial:
    """One attempt. `channel`: a NixlChannel of its own; this object is its user until is_over()."""

    def __init__(self, bulk: BulkChannel, channel, say: Callable[[greeting.Control], None], now_ns: int):
        self._bulk, self.channel, self._say = bulk, channel, say
        self.deadline_ns = now_ns + TRIAL_NS
        self.has_changed = False  # this side sends over NIXL
        self._peers: int | None = None  # frames of the peer's over the bulk channel, once it sends over NIXL
        self._reads = False

    def told(self, message: greeting.Control) -> None:
        """Raises BadFrame for what makes no sense."""
        if type(message) is greeting.Zone:
            self.channel.meet(message, TRIAL_BYTES)
        elif type(message) is greeting.Changed:
            if self._peers is not None or message.frames < self._bulk.got:
                raise BadFrame(f"a change after {message.frames} frames, of which {self._bulk.got} are here, or a second one")
            self._peers = message.frames

    def is_alone(self) -> bool:
        """Nobody depends on it yet."""
        return not self.has_changed and self._peers is None

    def proceed(self) -> bool:
        """Whatever can be done now. True once, when payloads are to be sent over NIXL from now on. Raises BadFrame."""
        changes = not self.has_changed and self.channel.is_met()
        if changes:
            self.has_changed = True
            self._say(greeting.Changed(self._bulk.sent))
        if self._peers is not None and not self._reads:
            if self._bulk.got > self._peers:
                raise BadFrame(f"frame {self._bulk.got} over the bulk channel, after a change at {self._peers}")
            if self._bulk.got == self._peers:
                self._reads = True
                self.channel.start()
        return changes

    def is_over(self) -> bool:
        """Both sides have changed and the bulk channel is empty both ways."""
        return self.has_changed and self._reads and not self._bulk.queued_bytes
