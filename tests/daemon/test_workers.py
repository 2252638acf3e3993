"""A GPU's thread: what it finds comes back to the loop in order, what fails is a result, and one that stands still is given up with a reason."""

from __future__ import annotations

import errno
import gc
import os
import select
import threading

import pytest

from kvguard.core import events
from kvguard.daemon import workers as working
from kvguard.daemon.workers import Job, Workers
from kvguard.errors import DeviceLost, Refused

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
    assert not left_threads()


def left_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith(("kvguard-GPU", "kvguard-host"))]


def no_thread(_thread):
    raise RuntimeError("can't start new thread")


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


def seen(*faults: tuple[str, str]) -> events.DevicesSeen:
    return events.DevicesSeen(faults)


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
    assert turns.rung() == [events.Broken("a", "Xid 79. Try: drain the node"), seen(("GPU-1", "Xid 79. Try: drain the node"))]
    workers.put("GPU-1", Job(lambda: 1, told("b")))
    assert turns.rung() == [events.Broken("b", "1")] and workers.progressing() and workers.faults  # it proved nothing
    workers.put("GPU-1", Job(lambda: 1, told("c"), proves=True))
    assert turns.rung() == [events.Broken("c", "1"), seen()] and not workers.faults


def test_a_device_that_refuses_because_its_gpu_is_lost_is_a_fault_and_any_other_refusal_is_none(turns, workers):
    def refuses():
        try:
            raise DeviceLost("Xid 79")
        except DeviceLost as error:
            raise Refused("no pool") from error

    workers.put("GPU-1", Job(refuses, told("a")))
    assert turns.rung() == [events.Broken("a", "no pool"), seen(("GPU-1", "Xid 79"))]

    def full():
        raise Refused("no memory left")

    workers.put("GPU-2", Job(full, told("b")))
    assert turns.rung() == [events.Broken("b", "no memory left")] and list(workers.faults) == ["GPU-1"]


def test_what_is_on_no_gpu_is_done_at_once_and_so_is_everything_without_a_loop(workers):
    ran = []
    for at_once, gpu in ((workers, ""), (Workers(), "GPU-1"), (Workers(), "")):
        assert list(at_once.put(gpu, Job(threading.get_ident, told("it")))) == [events.Broken("it", str(threading.get_ident()))]
    for gpu in ("GPU-1", ""):
        Workers().release(gpu, lambda: ran.append(1))
    assert ran == [1, 1] and not left_threads()


def test_host_memory_is_given_back_beside_the_loop_and_taking_long_is_no_fault(turns, workers):
    """The kernel frees the pages of 100 GB in tens of seconds: fences and plans waited behind it."""
    gate = Gate()
    workers.release("", gate)
    assert gate.begun.wait(WAIT_S) and workers.releasing == 1
    assert list(workers.put("", Job(lambda: 1, told("it")))) == [events.Broken("it", "1")]
    for _ in range(3):
        assert turns.look(working.STALL_NS) == [] and workers.progressing() and not workers.faults
    gate.let.set()
    while workers.releasing:
        assert turns.rung() == []


def test_host_memory_is_given_back_at_once_where_no_thread_can_be_had(workers, monkeypatch):
    ran = []
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    workers.release("", lambda: ran.append(1))
    assert ran == [1] and not workers.releasing


@pytest.mark.parametrize("missing", ["eventfd", "watch"])
def test_host_memory_is_given_back_at_once_where_no_bell_can_be_had(turns, workers, monkeypatch, missing):
    """It raised, and what was to be forgotten stayed open; a bell that nobody watched was taken for one that somebody does."""
    def none_left(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    ran = []
    with monkeypatch.context() as patch:
        patch.setattr(*((os, "eventfd") if missing == "eventfd" else (turns, "watch")), none_left)
        workers.release("", lambda: ran.append(1))
        [refused, _fault] = workers.put("GPU-1", Job(lambda: 1, told("none")))
    assert ran == [1] and not workers.releasing and "Too many open files" in refused.reason
    workers.release("", lambda: ran.append(2))
    while workers.releasing:
        turns.rung()
    assert ran == [1, 2]


def test_one_that_stands_still_is_given_up_with_all_that_waits_and_comes_back(turns, workers):
    gate, late, threads = Gate(), [], []
    workers.put("GPU-1", Job(gate, told("stuck"), lambda: gate.moved, lambda value: late.append(value) or threads.append(threading.current_thread().name)))
    assert gate.begun.wait(WAIT_S)
    workers.put("GPU-1", Job(lambda: 1, told("waits")))
    workers.release("GPU-1", lambda: late.append("closed"))
    assert turns.look(0) == []
    for _ in range(3):  # slow is not stuck
        gate.moved += 1
        assert turns.look(working.STALL_NS - 1) == [] and workers.progressing() and not workers.faults
    turns.now += working.STALL_NS
    assert not workers.progressing()  # a loop that doesn't find out starves the watchdog
    fault, *found = turns.look(0)
    assert [event.link for event in found] == ["stuck", "waits"] and all("GPU-1 has not moved" in event.reason for event in found)
    assert workers.progressing() and fault == seen(*workers.faults.items()) and list(workers.faults) == ["GPU-1"]
    [refused] = workers.put("GPU-1", Job(lambda: 1, told("refused")))
    assert refused.link == "refused" and "has not moved" in refused.reason
    assert turns.look(working.STALL_NS) == []  # said once
    gate.let.set()
    while workers.releasing:
        assert turns.rung() == []  # nobody hears of it twice
    assert sorted(late) == ["closed", "late"] and threads == ["kvguard-GPU-1"]
    workers.put("GPU-1", Job(lambda: 2, told("again"), proves=True))
    assert turns.rung() == [events.Broken("again", "2"), seen()] and not workers.faults


def test_memory_that_cannot_be_given_back_is_a_fault_of_its_gpu_and_ends_with_the_process(turns, workers, monkeypatch):
    gate, closing = Gate(), []
    workers.release("GPU-1", gate)
    assert gate.begun.wait(WAIT_S) and turns.look(0) == []
    [fault] = turns.look(working.STALL_NS)
    assert fault == seen(*workers.faults.items()) and "GPU-1 has not moved" in workers.faults["GPU-1"]
    stop, [bell] = working.Worker.stop, turns.watched
    monkeypatch.setattr(working.Worker, "stop", lambda self, wait_s: closing.append(wait_s) or stop(self, wait_s))
    workers.close()
    assert closing == [0.0], "nobody waits for a thread that was given up"
    gate.let.set()
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("kvguard-GPU")]:
        thread.join(WAIT_S)
    os.close(bell)  # left for the thread, which would have rung another descriptor


@pytest.mark.parametrize("fault", ["", "no driver"])
def test_a_driver_that_does_not_answer_is_a_fault_until_it_does(turns, workers, fault):
    """It was one for good: a node whose GPUs served again was critical for its monitor until it was restarted."""
    said = [None]
    assert list(workers.prepared("cuda", lambda: said[0], "silent")) == [seen(("cuda", "silent"))]
    assert turns.look(working.LOOK_NS) == [] and workers.faults == {"cuda": "silent"}
    said[0] = fault
    assert turns.look(working.LOOK_NS) == [seen(*([("cuda", fault)] if fault else ()))] and not turns.timers
    assert list(workers.prepared("cuda", lambda: fault, "silent")) == []


def test_a_thread_that_ends_is_given_up(turns, workers, monkeypatch):
    def ends():
        raise SystemExit

    monkeypatch.setattr(threading, "excepthook", lambda arguments: None)
    workers.put("GPU-1", Job(ends, told("it")))
    workers._by_gpu["GPU-1"]._thread.join(WAIT_S)
    workers.put("GPU-1", Job(lambda: 1, told("waits")))
    _fault, *found = turns.look(0)
    assert [event.link for event in found] == ["it", "waits"] and all("has ended" in event.reason for event in found)
    assert workers.progressing() and "has ended" in workers.faults["GPU-1"]


def test_a_queue_is_bounded_and_no_thread_is_a_reason(turns, workers, monkeypatch):
    monkeypatch.setattr(working, "JOBS_MAX", 2)
    gate = Gate()
    workers.put("GPU-1", Job(gate, told("first")))
    assert gate.begun.wait(WAIT_S)
    for _ in range(2):
        workers.put("GPU-1", Job(lambda: 1, told("waits")))
    ends = []
    assert list(workers.put("GPU-1", Job(lambda: 1, lambda outcome: ends.append(outcome) or ()))) == []
    [(_, error, begun)] = ends
    assert type(error) is OverflowError and not begun
    workers.put("GPU-1", Job(lambda: 1, told("salvage")), first=True)
    gate.let.set()
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    refused, fault = workers.put("GPU-2", Job(lambda: 1, told("none")))
    assert "can't start new thread" in refused.reason and fault == seen(("GPU-2", refused.reason))


def test_closing_throws_away_what_nobody_took(turns, workers):
    gone = []
    workers.put("GPU-1", Job(lambda: "pool", told("salvage"), discard=lambda value: gone.append((value, threading.current_thread().name))))
    workers.close()
    assert gone == [("pool", "kvguard-GPU-1")]
