"""How soon a live daemon answers: its loop's turn, and the network, as one figure. Bytes are never sent to a live daemon for the sake of a measurement.

Knows: a question that costs a daemon next to nothing. Must not know: what is answered. Invariant: one question is under way at a time, ASKED in all.
"""

from __future__ import annotations

import time
from collections.abc import Callable

ASKED = 50


def answers(ask: Callable[[], object]) -> dict:
    """{"asked", "p50_ms", "p99_ms", "max_ms"} of so many answers over links of their own, each with its handshake. `ask` raises as asking does."""
    took = []
    for _ in range(ASKED):
        started = time.perf_counter()
        ask()
        took.append((time.perf_counter() - started) * 1e3)
    took.sort()
    return {"asked": ASKED, "p50_ms": took[ASKED // 2], "p99_ms": took[-1 - ASKED // 100], "max_ms": took[-1]}
