"""The one thread that owns a core: collect what happened, step, do what is ordered, feed back what that completed.

Knows: descriptors, deadlines, signals; the contract step/next_deadline/check. Must not know: what events and effects mean.
Invariants: the core is touched by this thread alone; effects run in order; one TurnEnded a turn, after all its events; a turn's work is bounded, what is left
over waits for the next; time is monotonic; a tick says how late it is. A value that can't be made durable ends the process: the core has gone on as if it were.
"""

from __future__ import annotations

import heapq
import logging
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Protocol

from kvguard.core.effects import Effect
from kvguard.core.events import Event, Tick, TurnEnded

log = logging.getLogger(__name__)

EVENTS_PER_TURN_MAX = 4096
CHECK_EVERY = 1024  # events between two runs of the core's own invariants
WAIT_S_MAX = 3600.0
LATE_NOTED_NS = 100_000_000


class Core(Protocol):
    def step(self, now_ns: int, event: Event) -> tuple[Effect, ...]: ...

    def next_deadline(self) -> int | None: ...

    def check(self) -> None: ...


class Loop:
    """`perform`: does one effect and returns the events that it completed."""

    def __init__(self, core: Core, perform: Callable[[Effect], Iterable[Event]], clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.core = core
        self.clock = clock
        self.events = 0
        self._perform = perform
        self._selector = selectors.DefaultSelector()
        self._queue: deque[Event] = deque()
        self._timers: list[tuple[int, int, Callable[[], Iterable[Event]]]] = []
        self._timer_number = 0
        self._stopped = False
        self._wake, self._woken = socket.socketpair()
        for end in (self._wake, self._woken):
            end.setblocking(False)
        self.watch(self._woken.fileno(), self._drain_wake)

    # ---- sources ----------------------------------------------------------------------------------------------------------------

    def watch(self, descriptor: int, ready: Callable[[], Iterable[Event]]) -> None:
        """Call `ready` in every turn in which `descriptor` is readable."""
        self._selector.register(descriptor, selectors.EVENT_READ, ready)

    def forget(self, descriptor: int) -> None:
        """Stop watching; before the descriptor is closed."""
        self._selector.unregister(descriptor)

    def after(self, delay_ns: int, ready: Callable[[], Iterable[Event]]) -> None:
        """Call `ready` once, `delay_ns` from now or a little later."""
        self._timer_number += 1
        heapq.heappush(self._timers, (self.clock() + delay_ns, self._timer_number, ready))

    def feed(self, event: Event) -> None:
        """One more event for this or the next turn. From the loop's own thread only."""
        self._queue.append(event)

    def stop(self) -> None:
        """End run() after this turn. From any thread or a signal."""
        self._stopped = True
        self.wake()

    def wake(self) -> None:
        """Make a waiting turn start. From any thread."""
        try:
            self._wake.send(b"w")
        except BlockingIOError:
            log.debug("the loop was woken already")

    def _drain_wake(self) -> Iterable[Event]:
        while True:
            try:
                if not self._woken.recv(4096):
                    return ()
            except BlockingIOError:
                return ()

    # ---- turns ------------------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        while not self._stopped:
            self.turn()

    def turn(self, wait_s: float | None = None) -> int:
        """One turn that waits at most `wait_s` (until the next deadline where None). Returns how many events there were."""
        before = self.events
        watched = self._selector.get_map()
        for key, _ in self._selector.select(self._wait_s() if wait_s is None else min(wait_s, self._wait_s())):
            if watched.get(key.fd) is key:  # else it was forgotten earlier in this turn; its number may be another's by now
                self._queue.extend(key.data())
        now = self.clock()
        while self._timers and self._timers[0][0] <= now:
            self._queue.extend(heapq.heappop(self._timers)[2]())
        self._steps(EVENTS_PER_TURN_MAX)
        deadline = self.core.next_deadline()
        now = self.clock()
        if deadline is not None and deadline <= now:  # after what came in: silence is judged with all mail read
            if now - deadline > LATE_NOTED_NS:
                log.warning("the loop is %d ms late", (now - deadline) // 1_000_000)
            self._queue.append(Tick(now - deadline))
            self._steps(EVENTS_PER_TURN_MAX)
        if self.events > before:
            self._queue.append(TurnEnded())
            self._steps(EVENTS_PER_TURN_MAX)
        return self.events - before

    def _wait_s(self) -> float:
        if self._queue:
            return 0.0
        due = [when for when in (self.core.next_deadline(), self._timers[0][0] if self._timers else None) if when is not None]
        return min(WAIT_S_MAX, max(0, min(due) - self.clock()) / 1e9) if due else WAIT_S_MAX

    def _steps(self, limit: int) -> None:
        """Step over what is queued and what that completes, at most `limit` events."""
        while self._queue and limit:
            limit -= 1
            event = self._queue.popleft()
            self.events += 1
            for effect in self.core.step(self.clock(), event):
                self._queue.extend(self._perform(effect))
            if self.events % CHECK_EVERY == 0:
                self.core.check()

    def close(self) -> None:
        self._selector.close()
        self._wake.close()
        self._woken.close()


def obey_signals(loop: Loop, reload: Callable[[], None]) -> None:
    """SIGTERM and SIGINT end the loop after its turn; SIGHUP calls `reload` in it. Main thread only."""

    def ended(number: int, _frame) -> None:
        loop.stop()  # before a line that may fail to be written
        log.info("%s: stopping", signal.Signals(number).name)

    def reread() -> Iterable[Event]:
        reload()
        return ()

    def hung_up(_number: int, _frame) -> None:
        loop.after(0, reread)
        loop.wake()

    signal.signal(signal.SIGTERM, ended)
    signal.signal(signal.SIGINT, ended)
    signal.signal(signal.SIGHUP, hung_up)
