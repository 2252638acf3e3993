"""Who is let in: requests whose bodies are arriving, and those that are being served.

Knows: bounds, the gateway's state, counters. Must not know: paths, what a body means, how anything is answered.
Invariants: a place is taken when a body has come whole, and given back however its answer ends; bodies that are arriving hold no more than bodies_bytes_max
together, each counted with COST from its head on, so that they are bounded in number, too; where one more byte doesn't fit the oldest body ends: whoever is
quick is never the oldest, and is not kept out by whoever is slow.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator

from starlette.requests import Request

from kvguard.errors import KvguardError
from kvguard.gateway.journey import Surroundings
from kvguard.limits import KIB

COST = 64 * KIB  # of a request without a byte of its body: a connection's buffers, a task


class NotAdmitted(KvguardError):
    """`reason`: in_flight | ending | no_instance | slow | too_large: the label it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Admission:
    """`ending`: whether this process takes nothing new."""

    def __init__(self, around: Surroundings, ending: Callable[[], bool]) -> None:
        self._around, self._ending = around, ending
        self._in_flight = 0
        settings, counters = around.settings, around.counters
        self.arrivals = Arrivals(settings.bodies_bytes_max, settings.body_bytes_max, settings.client_ms / 1000)
        counters.in_flight.set_function(lambda: self._in_flight)
        counters.bodies.set_function(lambda: self.arrivals.count)
        counters.bodies_bytes.set_function(lambda: self.arrivals.bytes)

    def check(self) -> None:
        """Raises NotAdmitted unless a request would be served now. Asked before its body is read, which need not be sent then, and when it is whole."""
        if self._ending():
            self._refuse("ending", "The gateway is ending. Try: again")
        if self._in_flight >= self._around.settings.in_flight_max:
            self._refuse("in_flight", "Too many requests are under way. Try: again in a moment")
        if not self._around.fleet.active:
            self._refuse("no_instance", "No instance can take the request now. Try: again in a moment")

    def _refuse(self, reason: str, message: str) -> None:
        self._around.counters.refused.labels(reason).inc()
        raise NotAdmitted(reason, message)

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """To be held while an answer is under way. Raises NotAdmitted."""
        self.check()
        self._in_flight += 1
        try:
            yield
        finally:
            self._in_flight -= 1


class Arrivals:
    """`bytes_max`: of all bodies together, never less than one takes; `body_bytes_max`: of one; `whole_s`: how long one may take."""

    def __init__(self, bytes_max: int, body_bytes_max: int, whole_s: float) -> None:
        self._bytes_max, self._body_bytes_max, self._whole_s = max(bytes_max, COST + body_bytes_max), body_bytes_max, whole_s
        self._held: dict[asyncio.Timeout, int] = {}  # by the deadline that ends one; oldest first
        self.bytes = 0

    @property
    def count(self) -> int:
        return len(self._held)

    async def whole(self, request: Request) -> bytearray:
        """A request's body. Raises NotAdmitted, starlette's ClientDisconnect."""
        taken = bytearray()
        said = request.headers.get("content-length", "").strip()
        if said.isdigit() and (len(said) > 18 or int(said) > self._body_bytes_max):
            raise self._too_large()
        deadline = asyncio.timeout(self._whole_s)
        try:
            async with deadline:
                self._held[deadline] = 0
                self._grow(deadline, COST)
                async for some in request.stream():
                    if len(taken) + len(some) > self._body_bytes_max:
                        raise self._too_large()
                    self._grow(deadline, len(some))
                    taken += some
        except TimeoutError:
            message = f"The body did not come within {self._whole_s:g} s, or was the slowest of too many. Try: again, with the body at once"
            raise NotAdmitted("slow", message) from None
        finally:
            self._drop(deadline)
        return taken

    def _grow(self, deadline: asyncio.Timeout, count: int) -> None:
        """So many bytes more; the oldest bodies make room for them, were it this very one."""
        if deadline not in self._held:
            return  # it has been given up, and doesn't know it yet
        self._held[deadline] += count
        self.bytes += count
        while self.bytes > self._bytes_max:
            oldest = next(iter(self._held))
            self._drop(oldest)
            if not oldest.expired():
                oldest.reschedule(asyncio.get_running_loop().time())

    def _drop(self, deadline: asyncio.Timeout) -> None:
        self.bytes -= self._held.pop(deadline, 0)

    def _too_large(self) -> NotAdmitted:
        return NotAdmitted("too_large", f"The body has more than {self._body_bytes_max} bytes. Try: a shorter one")
