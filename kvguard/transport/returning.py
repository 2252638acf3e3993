"""When a way for payloads that failed is tried again, and what is said of it meanwhile.

Knows: times that it is told. Must not know: clocks, links, which way it is.
Invariants: the wait doubles with every failure, from WAIT_MIN_NS to WAIT_MAX_NS, without chance in it; it begins anew only after the way has carried for longer
than it was last waited for, and for STEADY_NS: a way that carries a little and fails again is left alone for longer and longer.
"""

from __future__ import annotations

WAIT_MIN_NS, WAIT_MAX_NS = 3_000_000_000, 600_000_000_000
STEADY_NS = 60_000_000_000


class Returning:
    """`why`: what was wrong, "" while nothing is. `due_ns`: not before then."""

    def __init__(self) -> None:
        self.why = ""
        self.due_ns = 0
        self._waited_ns = 0
        self._carries_since_ns: int | None = None

    def failed(self, now_ns: int, why: str) -> None:
        since, self._carries_since_ns = self._carries_since_ns, None
        if since is not None and now_ns - since >= max(STEADY_NS, self._waited_ns):
            self._waited_ns = 0
        self._waited_ns = min(max(2 * self._waited_ns, WAIT_MIN_NS), WAIT_MAX_NS)
        self.why, self.due_ns = why, now_ns + self._waited_ns

    def carries(self, now_ns: int) -> None:
        self.why, self.due_ns, self._carries_since_ns = "", 0, now_ns

    def is_due(self, now_ns: int) -> bool:
        return bool(self.why) and now_ns >= self.due_ns
