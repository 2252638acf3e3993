"""Hangs, from step words alone."""

from __future__ import annotations

from kvguard.core.events import StepsSeen, Tick
from kvguard.core.progress import STEPS_MIN, Progress
from kvguard.types import Rank, StreamId

STREAM = StreamId("i", Rank(0, 0, 0), 7)
MS = 1_000_000


def seen(entered: int, left: int, size: int = 8, pulse: int = 0, suspended: bool = False) -> StepsSeen:
    return StepsSeen(STREAM, entered, left, size, pulse, suspended)


def warm(steps: int = STEPS_MIN, takes_ms: int = 50) -> tuple[Progress, int]:
    """After `steps` of size 8, `takes_ms` each."""
    progress, now = Progress(200 * MS, 10), 0
    progress.step(now, seen(0, 0))
    for number in range(1, steps + 1):
        progress.step(now, seen(number, number - 1))
        now += takes_ms * MS
        progress.step(now, seen(number, number))
    progress.check()
    return progress, now


def test_none_before_the_first_steps() -> None:
    progress, now = warm(STEPS_MIN - 1)
    progress.step(now, seen(STEPS_MIN, STEPS_MIN - 1))
    assert progress.next_deadline() is None and progress.verdict(now + 10**12) is None


def test_a_step_that_takes_ten_times_the_longest_is_a_hang_once() -> None:
    progress, now = warm()
    assert progress.next_deadline() is None, "outside a step nobody waits"
    progress.step(now, seen(9, 8))
    assert progress.next_deadline() == now + 500 * MS
    assert progress.verdict(now + 499 * MS) is None
    verdict = progress.verdict(now + 500 * MS)
    assert verdict.since_ns == now and "inside step 9 of 8 positions" in verdict.reason
    assert progress.verdict(now + 900 * MS) is None and progress.next_deadline() is None


def test_a_process_that_is_stopped_between_two_steps_is_a_hang() -> None:
    """Its step words say that it waits for another stage, and every other stage waits for it."""
    progress, now = warm()
    stopped = StepsSeen(STREAM, 8, 8, 8, 0, stopped=True)
    progress.step(now, stopped)
    progress.step(now + 100 * MS, stopped)
    assert progress.next_deadline() == now + 200 * MS and progress.verdict(now + 199 * MS) is None
    progress.step(now + 150 * MS, Tick(60 * MS))
    assert progress.next_deadline() == now + 260 * MS, "time in which nobody looked doesn't count"
    verdict = progress.verdict(now + 260 * MS)
    assert "stopped for 200 ms" in verdict.reason and progress.verdict(now + 900 * MS) is None
    progress.step(now + 900 * MS, seen(8, 8))
    assert progress.next_deadline() is None
    progress.step(now + 950 * MS, stopped)
    assert progress.next_deadline() == now + 1150 * MS, "another stop, judged anew"


def test_a_stop_that_ends_in_time_is_none_and_a_known_pause_is_not_judged() -> None:
    progress, now = warm()
    progress.step(now, StepsSeen(STREAM, 8, 8, 8, 0, stopped=True))
    progress.step(now + 150 * MS, seen(9, 8))
    assert progress.next_deadline() == now + 150 * MS + 500 * MS
    progress.step(now + 200 * MS, StepsSeen(STREAM, 9, 8, 8, 0, suspended=True, stopped=True))
    assert progress.next_deadline() is None


def test_never_less_than_the_minimum() -> None:
    progress, now = warm(takes_ms=1)
    progress.step(now, seen(9, 8))
    assert progress.next_deadline() == now + 200 * MS


def test_larger_steps_may_take_longer() -> None:
    progress, now = warm()
    progress.step(now, seen(9, 8, size=64))
    assert progress.next_deadline() == now + 8 * 500 * MS


def test_pulses_are_progress() -> None:
    progress, now = warm()
    progress.step(now, seen(9, 8))
    progress.step(now + 400 * MS, seen(9, 8, pulse=1))
    assert progress.next_deadline() == now + 900 * MS
    assert progress.progress == STEPS_MIN + 1


def test_looking_again_is_no_progress() -> None:
    progress, now = warm()
    progress.step(now, seen(9, 8))
    progress.step(now + 400 * MS, seen(9, 8))
    assert progress.next_deadline() == now + 500 * MS


def test_suspended_holds_judgement_and_teaches_nothing() -> None:
    progress, now = warm()
    progress.step(now, seen(9, 8, suspended=True))
    assert progress.next_deadline() is None
    progress.step(now + 10_000 * MS, seen(9, 8))
    assert progress.next_deadline() == now + 10_500 * MS
    progress.step(now + 10_100 * MS, seen(9, 9))
    progress.step(now + 10_100 * MS, seen(10, 9))
    assert progress.next_deadline() == now + 10_600 * MS


def test_a_late_loop_holds_judgement() -> None:
    """Fault 18."""
    progress, now = warm()
    progress.step(now, seen(9, 8))
    progress.step(now + 3000 * MS, Tick(late_ns=2900 * MS))
    assert progress.verdict(now + 3000 * MS) is None
    assert progress.next_deadline() == now + 3400 * MS
