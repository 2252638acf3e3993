"""When the start of a daemon reached what, for people who ask what a restart costs.

Knows: this process's age and processor time. Must not know: what the words mean.
Invariant: of one word the first moment counts; words are kept in order, and are few.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable


class Moments:
    """`age_ns`: how long this process has existed, `busy_ns`: the processor time that it has used."""

    def __init__(self, age_ns: Callable[[], int] | None = None, busy_ns: Callable[[], int] = time.process_time_ns) -> None:
        self._age_ns, self._busy_ns = age_ns or process_age(), busy_ns
        self._found: dict[str, tuple[int, int]] = {}

    def reached(self, what: str) -> None:
        if what not in self._found:
            self._found[what] = self._age_ns(), self._busy_ns()

    def document(self) -> dict[str, dict[str, float]]:
        """By word: ms since the process began (to the kernel's tick, 10 ms), and ms of processor time until then."""
        return {what: {"ms": age / 1e6, "cpu_ms": busy / 1e6} for what, (age, busy) in self._found.items()}


def process_age() -> Callable[[], int]:
    """A clock that began with this process; where the kernel doesn't say when that was, with this call."""
    now, began = time.monotonic_ns(), 0
    try:
        with open("/proc/self/stat", "rb") as stat:
            ticks = int(stat.read().rpartition(b")")[2].split()[19])
        began = now - (time.clock_gettime_ns(time.CLOCK_BOOTTIME) - ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError):
        began = now
    return lambda: time.monotonic_ns() - began
