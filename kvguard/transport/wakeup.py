"""One descriptor that is readable whenever a transport has something to do: sockets, a bell for what a socket's own descriptor no longer tells, a timer.

Knows: epoll, eventfd, timerfd. Must not know: frames, links.
Invariants: ready() never blocks; whoever is forgotten is not called any more, also not in the turn in which that happens; close() leaves none open.

ZeroMQ's descriptors are edge-triggered in effect: any call on a socket may swallow the edge while messages still wait inside. Whoever touches a socket looks at
EVENTS afterwards and calls `again` for it.
"""

from __future__ import annotations

import ctypes
import os
import select
import time
from collections.abc import Callable, Iterator

IN, OUT = select.EPOLLIN, select.EPOLLOUT
_libc = ctypes.CDLL(None, use_errno=True)


class _Times(ctypes.Structure):
    """struct itimerspec."""

    _fields_ = [("interval_s", ctypes.c_long), ("interval_ns", ctypes.c_long), ("value_s", ctypes.c_long), ("value_ns", ctypes.c_long)]


def _timer() -> int:
    """A timerfd on the monotonic clock: the standard library has none before 3.13."""
    fd = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "timerfd_create failed")
    return fd


class Wakeup:
    """Callables by descriptor; what is due comes out of ready()."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._clock = _timer()
        self._calls: dict[int, Callable[[int], None]] = {}
        self._again: dict[Callable[[int], None], None] = {}
        self._due: dict[Callable[[int], None], int] = {}  # of the last ready(): not called yet, with their events
        self._armed_ns = 0
        for fd in (self._bell, self._clock):
            self._epoll.register(fd, IN)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def watch(self, fd: int, call: Callable[[int], None], events: int = IN) -> None:
        self._calls[fd] = call
        self._epoll.register(fd, events)

    def watch_edge(self, fd: int, call: Callable[[int], None]) -> None:
        """A ZeroMQ socket's descriptor: silent until the socket has been emptied once, so that is asked for now."""
        self.watch(fd, call)
        self.again(call)

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def forget(self, fd: int) -> None:
        """Before the descriptor is closed."""
        call = self._calls.pop(fd)
        self._again.pop(call, None)
        self._due.pop(call, None)
        self._epoll.unregister(fd)

    def again(self, call: Callable[[int], None]) -> None:
        """`call` is in the next ready(), and fileno() stays readable until then."""
        if not self._again:
            os.eventfd_write(self._bell, 1)
        self._again[call] = None

    def arm(self, deadline_ns: int) -> None:
        """fileno() becomes readable at `deadline_ns` of time.monotonic_ns(), or somewhat earlier: one that is put off costs nothing, and is asked for again
        when the former one has rung; 0 disarms."""
        if deadline_ns == self._armed_ns or 0 < self._armed_ns <= deadline_ns:
            return
        self._armed_ns = deadline_ns
        left_ns = max(1, deadline_ns - time.monotonic_ns()) if deadline_ns else 0
        value = _Times(0, 0, left_ns // 1_000_000_000, left_ns % 1_000_000_000)
        if _libc.timerfd_settime(self._clock, 0, ctypes.byref(value), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def ready(self) -> Iterator[tuple[Callable[[int], None], int]]:
        """What to call now, one after the other, with its epoll events (IN for what was asked for again): what an earlier call makes stale is left out.
        The timer only wakes: whoever armed it looks at the clock."""
        due = self._due = dict.fromkeys(self._again, IN)
        self._again.clear()
        for fd, events in self._epoll.poll(0):
            if fd == self._bell:  # also where who asked was forgotten since: it would ring for ever
                os.eventfd_read(fd)
            elif fd == self._clock:
                os.read(fd, 8)
                self._armed_ns = 0
            elif fd in self._calls:
                due[self._calls[fd]] = due.get(self._calls[fd], 0) | events
        return self._still_due()

    def _still_due(self) -> Iterator[tuple[Callable[[int], None], int]]:
        while self._due:
            call = next(iter(self._due))
            yield call, self._due.pop(call)

    def wait(self, timeout_s: float) -> bool:
        """Block until fileno() is readable: for callers that have no loop of their own."""
        return bool(select.select([self._epoll.fileno()], [], [], max(0.0, timeout_s))[0])

    def close(self) -> None:
        self._calls.clear()
        self._again.clear()
        self._due.clear()
        self._epoll.close()
        os.close(self._bell)
        os.close(self._clock)
