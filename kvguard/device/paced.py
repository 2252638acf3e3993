"""Copies that no one feels: small pieces, two in flight, no faster than they may be, and never waited for without an end.

Knows: a driver, a clock. Must not know: pools, layouts, what is copied.
Invariants: at most IN_FLIGHT copies of PIECE_BYTES_MAX are on the copy engine at a time; a wait ends in success, DeviceLost or TimedOut. What a GPU that hangs
may still touch is never given back: it is kept as it is until this process ends (`strand`).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from kvguard.device.driver import Driver, Event, Stream
from kvguard.device.extents import PIECE_BYTES_MAX
from kvguard.errors import TimedOut

IN_FLIGHT = 2
WAIT_S_MAX = 1.0  # for two copies of 1 MiB: far beyond any link that works, and a daemon does nothing else meanwhile
HANG_S = 15.0  # who has not come to the end of what was launched by then won't; longer than a daemon takes to say so (daemon/workers.py)
NAP_S = 20e-6


def finished(driver: Driver, event: Event, deadline: float, clock: Callable[[], float] = time.monotonic, nap: Callable[[float], None] = time.sleep) -> None:
    """Return once `event` is reached. Raises TimedOut at `deadline` (of `clock`), DeviceLost where the GPU had a fault."""
    while not driver.is_done(event):
        if clock() >= deadline:
            raise TimedOut("the GPU didn't finish a copy in time. Try: nvidia-smi; dmesg | grep -i xid")
        nap(NAP_S)


_stranded: list[object] = []


def strand(*held: object) -> None:
    """Keep whatever these hold, for good: a GPU that hangs may read or write it whenever it goes on."""
    _stranded.extend(held)


def settled(driver: Driver, stream: Stream) -> None:
    """Whatever was put on `stream` is through. Raises TimedOut after HANG_S: then nothing that it may touch can be given back; DeviceLost."""
    try:
        finished(driver, driver.record(stream), time.monotonic() + HANG_S)
    except TimedOut:
        raise TimedOut(f"the GPU has not finished what was launched within {HANG_S:g} s. Try: nvidia-smi; dmesg | grep -i xid") from None


class Paced:
    """One stream's copies. `bytes_per_s`: 0 for as fast as they go."""

    def __init__(
        self, driver: Driver, stream: Stream, bytes_per_s: int = 0, clock: Callable[[], float] = time.monotonic, nap: Callable[[float], None] = time.sleep,
    ) -> None:  # fmt: skip
        self._driver, self._stream, self._bytes_per_s = driver, stream, bytes_per_s
        self._clock, self._nap = clock, nap
        self._flying: deque[Event] = deque()
        self._open_bytes = 0  # put on the stream since the last event
        self._due = 0.0
        self.copied_bytes = 0

    def copy(self, to: int, at: int, size: int) -> None:
        """May wait for earlier copies. Raises TimedOut, DeviceLost."""
        for first in range(0, size, PIECE_BYTES_MAX):
            self.rows(to + first, 0, at + first, 0, min(PIECE_BYTES_MAX, size - first), 1)

    def rows(self, to: int, to_pitch: int, at: int, at_pitch: int, width: int, rows: int) -> None:
        """One piece of at most PIECE_BYTES_MAX bytes."""
        size = width * rows
        if self._open_bytes + size > PIECE_BYTES_MAX:
            self._close()
        if not self._open_bytes:
            self._room()
        self._driver.copy_rows(to, to_pitch, at, at_pitch, width, rows, self._stream)
        self._open_bytes += size
        self.copied_bytes += size

    def finish(self, wait_s: float = WAIT_S_MAX) -> None:
        """Everything is there when this returns. Raises TimedOut, DeviceLost; then nothing may be used of it."""
        self._close()
        deadline = self._clock() + wait_s
        while self._flying:
            finished(self._driver, self._flying.popleft(), deadline, self._clock, self._nap)

    def settle(self) -> None:
        """No copy is on its way when this returns, also after one that failed. Raises as `settled`."""
        settled(self._driver, self._stream)

    def _close(self) -> None:
        """The pieces since the last event are one unit in flight."""
        if self._open_bytes:
            self._flying.append(self._driver.record(self._stream))
            if self._bytes_per_s:
                self._due = max(self._due, self._clock()) + self._open_bytes / self._bytes_per_s
            self._open_bytes = 0

    def _room(self) -> None:
        while len(self._flying) >= IN_FLIGHT:
            finished(self._driver, self._flying.popleft(), self._clock() + WAIT_S_MAX, self._clock, self._nap)
        early = self._due - self._clock() if self._bytes_per_s else 0.0
        if early > 0:
            self._nap(early)
