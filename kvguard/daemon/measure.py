"""What a node measures of its own streams: lag, and how long a sequence waits for its first whole replica.

Knows: the core's streams, read only. Must not know: how it is published.
Invariants: lag is committed - acked just before the next commit is taken in (house: names of numbers), of sequences that have caught up once,
at a holder that answers (without one they are UNPROTECTED, which is said elsewhere): one of the rank's own, or of the mate's that is copied for it; memory is
bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterable

from kvguard.core import covering, events
from kvguard.core.ledger import Row
from kvguard.core.local import LocalStream
from kvguard.core.node import Node
from kvguard.types import StreamId, is_scheduler

WAITS_MAX = 1024
OPEN_MAX = 65536
FORGET_NS = 10_000_000_000
SECONDS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0, 60.0)  # upper bounds of the histograms' buckets


class Histogram:
    """Durations by bucket of SECONDS, for as long as the process lives. `counts` has one more: what is above all bounds."""

    def __init__(self) -> None:
        self.counts = [0] * (len(SECONDS) + 1)
        self.sum_s = 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(SECONDS, seconds)] += 1
        self.sum_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Bounds as texts, the last "+Inf"; each counts all up to its bound."""
        total, found = 0, []
        for bound, count in zip((*map(str, SECONDS), "+Inf"), self.counts, strict=True):
            total += count
            found.append((bound, float(total)))
        return found


class Measures:
    """`looked` is called with every Looked before the core is."""

    def __init__(self, core: Node, clock: Callable[[], int]) -> None:
        self._core = core
        self._clock = clock
        self._lags: Counter[int] = Counter()  # tokens -> how many (sequence, step)
        self._waits_ms: deque[float] = deque(maxlen=WAITS_MAX)
        self._opened: dict[tuple[StreamId, int], int] = {}
        self.waits = Histogram()

    def looked(self, event: events.Looked) -> None:
        if is_scheduler(event.stream.rank):
            return  # ids alone: lag and protection are of KV
        local = self._core.outbound.streams.get(event.stream)
        waiting = self._opened
        for row in event.rows if local is not None else ():
            known = local.ledger.rows.get(row)
            if known is not None and known.committed and not (waiting and (event.stream, row) in waiting) and _followed(local, row, known):
                self._lags[known.committed - min(local.best(row), known.committed)] += 1
        for row in event.released:
            self._opened.pop((event.stream, row), None)
        if len(self._opened) < OPEN_MAX:
            now = self._clock()
            for opened in event.opened:
                self._opened[event.stream, opened.row] = now

    def settle(self) -> None:
        """Sequences that are whole elsewhere for the first time; called once a turn in which something was acknowledged."""
        now = self._clock()
        for (stream, row), since in list(self._opened.items()):
            local = self._core.outbound.streams.get(stream)
            known = local.ledger.rows.get(row) if local is not None else None
            if known is None and now - since > FORGET_NS:  # gone, or its Looked is still on the way to the core
                del self._opened[stream, row]
            elif known is None:
                continue
            elif known.committed and local.best(row) >= known.committed:
                self._waits_ms.append((now - since) / 1e6)
                self.waits.add((now - since) / 1e9)
                del self._opened[stream, row]

    @property
    def waiting(self) -> bool:
        return bool(self._opened)

    def document(self) -> dict:
        return {
            "lag_tokens_p50": percentile(self._lags, 0.5), "lag_tokens_p99": percentile(self._lags, 0.99), "lag_samples": sum(self._lags.values()),
            "time_to_protected_ms": max(self._waits_ms, default=None),
        }  # fmt: skip

    def reset(self) -> None:
        self._lags.clear()
        self._waits_ms.clear()


def _followed(local: LocalStream, number: int, row: Row) -> bool:
    """Whether a holder that answers has caught up with a row once."""
    if _caught(local, number):
        return True
    same = covering.row_of(local.cover, row) if local.cover is not None else None
    return same is not None and _caught(local.cover, same[0])


def _caught(local: LocalStream, number: int) -> bool:
    return any(sender.state == "stream" and number in sender.flow.copies and sender.flow.copies[number].caught for sender in local.senders.values())


def percentile(counts: Counter, share: float) -> int | None:
    """The smallest value that at least `share` of all samples don't exceed; None without samples."""
    left = share * sum(counts.values())
    for value in sorted(counts):
        left -= counts[value]
        if left <= 0:
            return value
    return None


def watched(told: Iterable[events.Event], measures: Measures) -> Iterable[events.Event]:
    """Pass events on, measuring on the way."""
    for event in told:
        if type(event) is events.Looked:
            measures.looked(event)
        yield event
