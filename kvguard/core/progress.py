"""Hangs of an engine, from its step words alone: who is inside a step for longer than such steps take.

Knows: what was observed per size of step. Must not know: processes, what a step computes, clocks.
Invariants: no verdict before STEPS_MIN steps have been seen to end, none while suspended, none outside a step (who waits for another stage has left), except
of a process that is stopped: it will neither enter one nor say so; one verdict per step that hangs, one per stop. A late loop holds its judgement: the time in
which nobody looked doesn't count.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvguard.core.events import Event, StepsSeen, Tick

STEPS_MIN = 8
DURATIONS_MAX = 64  # the longest of so many recent steps of a size is what such steps may take


class Verdict(NamedTuple):
    """`since_ns`: the last sign of life."""

    reason: str
    since_ns: int


class Progress:
    """`step` remembers; `verdict` judges. `progress` rises with every step left and every pulse."""

    def __init__(self, hang_min_ns: int, factor: int = 10) -> None:
        self._hang_min_ns, self._factor = hang_min_ns, factor
        self._durations: dict[int, deque[int]] = {}
        self._ended = 0
        self._entered = self._left = self._pulse = 0
        self._known = False
        self._looked_ns = 0
        self._size = 0
        self._begun_ns: int | None = None  # entry of the step that is under way, where it was seen
        self._alive_ns = 0
        self._suspended = False
        self._stopped_ns: int | None = None  # since when the process doesn't run
        self._judged = False
        self.progress = 0

    def step(self, now_ns: int, event: Event) -> tuple[()]:
        if type(event) is StepsSeen:
            self._seen(now_ns, event)
        elif type(event) is Tick and event.late_ns > self._hang_min_ns // 4:
            self._alive_ns += event.late_ns
            self._stopped_ns = None if self._stopped_ns is None else self._stopped_ns + event.late_ns
        return ()

    def _seen(self, now: int, event: StepsSeen) -> None:
        moved = event.entered != self._entered or event.left != self._left
        if event.stopped != (self._stopped_ns is not None):
            self._stopped_ns, self._judged = (now if event.stopped else None), False
        if self._known:
            self.progress += max(0, event.left - self._left) + (1 if event.pulse != self._pulse else 0)
        if moved or event.pulse != self._pulse or event.suspended or self._suspended or not self._known:
            self._alive_ns = now
        if moved:
            if self._begun_ns is not None and event.left == self._entered:
                bucket = self._size.bit_length()
                self._durations.setdefault(bucket, deque(maxlen=DURATIONS_MAX)).append(now - self._begun_ns)
            elif self._begun_ns is None and self._known and event.left > self._left:  # too short to be seen under way: no longer than between two looks
                unseen = min(now - self._looked_ns, self._hang_min_ns // self._factor)
                self._durations.setdefault(event.size.bit_length(), deque(maxlen=DURATIONS_MAX)).append(unseen)
            self._ended = event.left
            self._begun_ns = now if event.entered > event.left else None
            self._judged = False
        if event.suspended:
            self._begun_ns = None  # a step that was paused says nothing of how long such steps take
        self._entered, self._left, self._size, self._pulse = event.entered, event.left, event.size, event.pulse
        self._suspended = event.suspended
        self._known = True
        self._looked_ns = now

    def allowed_ns(self) -> int | None:
        """How long the step under way may go without a sign of life; None while there is nothing to judge by."""
        if self._ended < STEPS_MIN:
            return None
        if not self._durations:  # an engine that ran before anyone looked, and has ended no step since
            return self._hang_min_ns * self._factor
        bucket = self._size.bit_length()
        seen = self._durations.get(bucket)
        if seen:
            longest = max(seen)
        else:  # no step of this size yet: as the nearest smaller one, or else the largest of all, in proportion
            nearest = max((known for known in self._durations if known < bucket), default=max(self._durations))
            longest = max(self._durations[nearest]) << max(0, bucket - nearest)
        return max(self._hang_min_ns, self._factor * longest)

    def next_deadline(self) -> int | None:
        if self._suspended or self._judged:
            return None
        if self._stopped_ns is not None:  # inside a step or outside: its pipeline waits for it, and it can't even say so
            return self._stopped_ns + self._hang_min_ns
        allowed = self.allowed_ns() if self._entered > self._left else None
        return None if allowed is None else self._alive_ns + allowed

    def verdict(self, now_ns: int) -> Verdict | None:
        due = self.next_deadline()
        if due is None or now_ns < due:
            return None
        self._judged = True
        if self._stopped_ns is not None:
            return Verdict(f"its process is stopped for {(now_ns - self._stopped_ns) // 1_000_000} ms", self._stopped_ns)
        silent = (now_ns - self._alive_ns) // 1_000_000
        return Verdict(
            f"inside step {self._entered} of {self._size} positions without progress for {silent} ms, such steps may take {self.allowed_ns() // 1_000_000} ms",
            self._alive_ns,
        )

    def check(self) -> None:
        assert all(durations for durations in self._durations.values())
