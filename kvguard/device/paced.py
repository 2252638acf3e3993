"""Copies that no one feels: small pieces, two in flight, no faster than they may be, and never waited for without an end.

Knows: a driver, a clock. Must not know: pools, layouts, what is copied.
Invariants: at most IN_FLIGHT copies of PIECE_BYTES_MAX are on the copy engine at a time; a wait ends in success, DeviceLost or TimedOut.
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
NAP_S = 20e-6


def finished(driver: Driver, event: Event, deadline: float, clock: Callable[[], float] = time.monotonic, nap: Callable[[float], None] = time.sleep) -> None:
    """Return once `event` is reached. Raises TimedOut at `deadline` (of `clock`), DeviceLost where the GPU had a fault."""
    while not driver.is_done(event):
        if clock() >= deadline:
            raise TimedOut("the GPU didn't finish a copy in time. Try: nvidia-smi; dmesg | grep -i xid")
        nap(NAP_S)


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
