"""What every transport does: it moves frames and knows no meaning.

Knows: links, frames. Must not know: streams, epochs, what is in a header beyond format/wire.py's framing.
Invariants of every implementation (tests/contracts/test_transport.py):
- no call blocks; `send` on a link that isn't up answers False and keeps nothing;
- frames of one link and one message type arrive in the order sent, or the link goes down: never a silent gap within an up period;
- a peer's garbage is reported as Broken and never raises; a frame over the bounds is refused before memory is reserved for it;
- a peer that reads nothing makes `send` answer False at a bound (bytes), never grow memory;
- LinkUp is reported when both directions (and the bulk channel, where there is one) are usable.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Up(NamedTuple):
    """`node`: the peer's name as its key proves it, "" where keys are not configured. `carrier`: what payloads travel over, "" where there is one way only."""

    link: str
    node: str
    carrier: str = ""


class Down(NamedTuple):
    link: str
    reason: str


class Frame(NamedTuple):
    """`head`: prefix and header (format/wire.py), not yet decoded. `payload`: writable memory owned by the receiver, or None."""

    link: str
    head: bytes
    payload: memoryview | None


class Broken(NamedTuple):
    link: str
    reason: str


class Carries(NamedTuple):
    """Of a link that is up: its payloads travel over something else now, or there is something new to be said of what they travel over. `carrier`: as in Up."""

    link: str
    carrier: str


Incoming = Up | Down | Frame | Broken | Carries


class Transport(Protocol):
    def listen(self, address: str) -> str:
        """Accept links ("in:..." names) at `address` ("tcp://127.0.0.1:0"); returns the address with its real port. Raises BadConfig when it can't."""

    def dial(self, link: str, address: str) -> None:
        """Keep a link to `address`, reconnecting with back-off until hang_up. Idempotent; another address replaces the former."""

    def hang_up(self, link: str) -> None: ...

    def send(self, link: str, head: bytes, payload: memoryview | None = None) -> bool:
        """Queue one frame. The payload's memory is read until it has left; the caller drops its reference and never writes to it again."""

    def receive(self) -> list[Incoming]:
        """All that has come in since the last call, bounded per call; [] when nothing has."""

    def fileno(self) -> int:
        """Readable when receive() may return something."""

    def close(self) -> None: ...
