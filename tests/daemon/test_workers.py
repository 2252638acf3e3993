"""A GPU's thread: what it finds comes back to the loop in order, what fails is a result, and one that stands still is given up with a reason."""

from __future__ import annotations

import gc
import os
import select
import threading

import pytest

from kvguard.core import events
from kvguard.daemon import workers as working
from kvguard.daemon.workers import Job, Workers
from kvguard.errors import DeviceLost

WAIT_S = 30


class Turns:
    """A loop of which each turn is taken by hand; `now` is the workers' clock."""

    def __init__(self) -> None:
        self.now, self.watched, self.timers = 0, {}, []

    def watch(self, descriptor, ready):
        self.watched[descriptor] = ready

    def forget(self, descriptor):
        del self.watched[descriptor]

    def after(self, delay_ns, ready):
        self.timers.append(ready)

    def rung(self) -> list:
        """What the next bell brings."""
        [bell] = self.watched
        assert select.select([bell], [], [], WAIT_S)[0], "nothing has ended"
        return list(self.watched[bell]())

    def look(self, later_ns: int) -> list:
        self.now += later_ns
        timers, self.timers = self.timers, []
        return [event for ready in timers for event in ready()]


@pytest.fixture
def turns():
    return Turns()


@pytest.fixture
def workers(turns):
    gc.collect()  # what other tests left to the collector has descriptors, too
    before = len(os.listdir("/proc/self/fd"))
    made = Workers(turns, lambda: turns.now)
    yield made
    made.close()
    assert not turns.watched and len(os.listdir("/proc/self/fd")) == before
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvguard-GPU")]


class Gate:
    """Work that ends when it is let; `moved` rises as it says."""

    def __init__(self) -> None:
        self.begun, self.let, self.moved = threading.Event(), threading.Event(), 0

    def __call__(self):
        self.begun.set()
        assert self.let.wait(WAIT_S)
        return "late"


def told(word: str):
    """`ended` of a job, as an event that says how it ended."""
    return lambda outcome: (events.Broken(word, str(outcome.error or outcome.value)),)


def test_results_come_in_order_to_the_loop_s_thread_and_what_frees_memory_goes_first(turns, workers):
    gate, ran = Gate(), []
    here = threading.get_ident()
    workers.put("GPU-1", Job(gate, lambda outcome: ran.append(("first", threading.get_ident() == here)) or ()))
    assert gate.begun.wait(WAIT_S)
    workers.put("GPU-1", Job(lambda: ran.append(("second", threading.get_ident() == here)), lambda outcome: ()))
    workers.release("GPU-1", lambda: ran.append(("closed", threading.get_ident() == here)))
    assert workers.releasing == 1 and not ran
    workers.put("GPU-2", Job(lambda: 7, told("other")))
    assert turns.rung() == [events.Broken("other", "7")]  # another GPU's work waits for nothing here
    gate.let.set()
    while workers.releasing or len(ran) < 3:
        turns.rung()
    assert [word for word, _ in ran if word != "first"] == ["closed", "second"] and dict(ran) == {"first": True, "closed": False, "second": False}


def test_what_a_job_raises_is_its_result_and_the_thread_goes_on(turns, workers):
    def fails():
        raise DeviceLost("Xid 79. Try: drain the node")

    workers.put("GPU-1", Job(fails, told("a")))
    assert turns.rung() == [events.Broken("a", "Xid 79. Try: drain the node")]
    workers.put("GPU-1", Job(lambda: 1, told("b")))
    assert turns.rung() == [events.Broken("b", "1")] and workers.progressing() and not workers.faults()


def test_one_that_stands_still_is_given_up_with_all_that_waits_and_comes_back(turns, workers):
    gate, late = Gate(), []
    workers.put("GPU-1", Job(gate, told("stuck"), lambda: gate.moved, late.append))
    assert gate.begun.wait(WAIT_S)
    workers.put("GPU-1", Job(lambda: 1, told("waits")))
    workers.release("GPU-1", lambda: late.append("closed"))
    assert turns.look(0) == []
    for _ in range(3):  # slow is not stuck
        gate.moved += 1
        assert turns.look(working.STALL_NS - 1) == [] and workers.progressing() and not workers.faults()
    turns.now += working.STALL_NS
    assert not workers.progressing()  # a loop that doesn't find out starves the watchdog
    found = turns.look(0)
    assert [event.link for event in found] == ["stuck", "waits"] and all("GPU-1 has not moved" in event.reason for event in found)
    assert workers.progressing() and list(workers.faults()) == ["GPU-1"]
    with pytest.raises(DeviceLost, match="has not moved"):
        workers.put("GPU-1", Job(lambda: 1, told("refused")))
    gate.let.set()
    while workers.releasing:
        assert turns.rung() == []  # nobody hears of it twice
    assert sorted(late) == ["closed", "late"] and not workers.faults()
    workers.put("GPU-1", Job(lambda: 2, told("again")))
    assert turns.rung() == [events.Broken("again", "2")]


def test_a_thread_that_ends_is_given_up(turns, workers, monkeypatch):
    def ends():
        raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    workers.put("GPU-1", Job(ends, told("it")))
    workers._by_gpu["GPU-1"]._thread.join(WAIT_S)
    workers.put("GPU-1", Job(lambda: 1, told("waits")))
    found = turns.look(0)
    assert [event.link for event in found] == ["it", "waits"] and all("has ended" in event.reason for event in found)
    assert workers.progressing() and "has ended" in workers.faults()["GPU-1"]


def test_a_queue_is_bounded_and_no_thread_is_a_reason(turns, workers, monkeypatch):
    monkeypatch.setattr(working, "JOBS_MAX", 2)
    gate = Gate()
    workers.put("GPU-1", Job(gate, told("first")))
    assert gate.begun.wait(WAIT_S)
    for _ in range(2):
        workers.put("GPU-1", Job(lambda: 1, told("waits")))
    with pytest.raises(OverflowError):
        workers.put("GPU-1", Job(lambda: 1, told("too much")))
    workers.put("GPU-1", Job(lambda: 1, told("salvage")), first=True)
    gate.let.set()

    def none_left(self):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", none_left)
    with pytest.raises(DeviceLost, match="can't start new thread"):
        workers.put("GPU-2", Job(lambda: 1, told("none")))


def test_closing_throws_away_what_nobody_took(turns, workers):
    gone = []
    workers.put("GPU-1", Job(lambda: "pool", told("salvage"), discard=gone.append))
    workers.close()
    assert gone == ["pool"]
