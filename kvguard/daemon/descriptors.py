"""What a descriptor that an engine passed really is: asked of the kernel, never believed.

Knows: /proc/self/fdinfo, poll; whose they are where threads share them. Must not know: engines, ranks, what the descriptors are for.
"""

from __future__ import annotations

import os
import select
import threading


def process_of(pidfd: int) -> int:
    """The process behind a pidfd; 0 where the descriptor is none."""
    return next((int(line.split()[1]) for line in _lines(pidfd) if line.startswith("Pid:")), 0)


def is_eventfd(descriptor: int) -> bool:
    """Whether a loop can wait for it, and one read makes it quiet: a file can't be waited for, the end of a pipe never gets quiet."""
    return any(line.startswith("eventfd-count:") for line in _lines(descriptor))


def stopped(pidfd: int) -> bool:
    """Whether the process was stopped by a signal (SIGSTOP; not by a debugger, whose user knows): it says nothing of itself any more."""
    try:
        with open(f"/proc/{process_of(pidfd)}/stat", "rb") as stat:
            return stat.read().rpartition(b") ")[2][:1] == b"T"
    except OSError:
        return False  # it has just ended: its pidfd says so


def readable(descriptor: int, wait_ms: int = 0) -> bool:
    """A pidfd is once its process has ended."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(wait_ms))


def same_file(a: int, b: int) -> bool:
    return os.path.sameopenfile(a, b)


def _lines(descriptor: int) -> list[str]:
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as info:
        return info.readlines()


class Lot:
    """Descriptors that two threads may reach for: who takes them has them, and nobody else."""

    def __init__(self, descriptors: list[int]) -> None:
        self._lock = threading.Lock()
        self._descriptors = descriptors

    def __len__(self) -> int:
        return len(self._descriptors)

    @property
    def descriptors(self) -> tuple[int, ...]:
        """Those that nobody has taken, to look at."""
        return tuple(self._descriptors)

    def take(self) -> list[int]:
        """The caller's from now on; [] for whoever comes second."""
        with self._lock:
            taken, self._descriptors = self._descriptors, []
            return taken

    def close(self) -> None:
        for descriptor in self.take():
            os.close(descriptor)
