"""Lifelines at a daemon: who is suspected, who isn't, and what of it stays open. Engines are children that hold one and can die."""

from __future__ import annotations

import os
import select
import threading
from types import SimpleNamespace

import pytest

from kvguard.core import events
from kvguard.daemon.lifelines import Lifelines
from kvguard.engine import lifeline
from kvguard.engine.lifeline import held_by_this_thread
from kvguard.format import local
from tests.daemon.test_ranks import ID, Life, desk, message  # noqa: F401 - desk is a fixture
from tests.engine.test_lifeline import Holder, page


@pytest.fixture
def child(desk):  # noqa: F811 - closed before it: the desk counts descriptors
    made = Holder()
    for watch in made.watches:  # the desk's is the one that counts here
        watch.close()
    made.watches.clear()
    yield made
    desk.ranks.forget(ID)
    made.close()


def attach(desk, life, fd, incarnation=1, role="rank"):  # noqa: F811
    descriptors = [*life.descriptors(), os.dup(fd)]
    return list(desk.ranks.attach(1, life.pid, message(role, incarnation, lifeline=True), descriptors))


def bells(desk):  # noqa: F811
    rank = desk.ranks.ranks[ID]
    return [descriptor for descriptor in desk.watched if descriptor not in (rank.bell, rank.pidfd)]


def marked(desk):  # noqa: F811
    """Wait for the mark; what the daemon tells its core of it."""
    [bell] = bells(desk)
    assert select.select([bell], [], [], 20.0)[0] == [bell]
    return list(desk.watched[bell]())


@pytest.mark.e2e
def test_a_threads_end_is_a_suspicion_and_the_kill_makes_it_a_death(desk, child):  # noqa: F811
    attach(desk, Life(child.process.pid), child.fd)
    assert desk.told[-1][1] == local.Attached((0, ""))
    child.say("end the thread")
    [suspected] = marked(desk)
    assert (type(suspected), suspected.stream, suspected.incarnation) == (events.DeathSuspected, ID, 1)
    assert bells(desk) == [] and child.process.poll() is None, "told once; the process lives"
    for _ in range(2):
        desk.ranks.kill(1)
    assert desk.shell.counters["processes_killed"] == 1, "told once more while it dies it is no second process that was killed"
    assert child.process.wait(20) == -9
    died = list(desk.watched[desk.ranks.ranks[ID].pidfd]())[-1]
    assert (type(died), died.reason) == (events.ProcessDied, "killed by its node's daemon")
    desk.ranks.kill(1)
    assert desk.shell.counters["processes_killed"] == 1, "nobody is left to be killed"


@pytest.mark.e2e
def test_killing_who_is_dead_and_buried_is_no_fault(desk, child):  # noqa: F811
    attach(desk, Life(child.process.pid), child.fd)
    child.process.kill()
    child.process.wait()
    desk.ranks.kill(1)
    assert [type(event) for event in marked(desk)] == [events.DeathSuspected]


@pytest.mark.e2e
def test_a_pidfd_that_fires_in_the_same_turn_comes_alone(desk, child):  # noqa: F811
    attach(desk, Life(child.process.pid), child.fd)
    [bell] = bells(desk)
    late = desk.watched[bell]
    child.process.kill()
    child.process.wait()
    assert type(list(desk.watched[desk.ranks.ranks[ID].pidfd]())[-1]) is events.ProcessDied
    assert list(late()) == [] and bells(desk) == []


@pytest.mark.e2e
def test_the_same_process_over_a_new_line_and_a_clean_end(desk, child):  # noqa: F811
    life = Life(child.process.pid)
    attach(desk, life, child.fd)
    [first] = bells(desk)
    attach(desk, life, child.fd)
    assert len(bells(desk)) == 1, f"one for the rank, not {first} and another"
    assert [type(event) for event in desk.ranks.detach(1)] == [events.StreamDetached]
    assert bells(desk) == []


def test_closing_waits_for_all_together_and_not_for_each_in_turn(monkeypatch):
    """A thread that doesn't come costs a second; with a few dozen ranks a daemon was killed before it had ended."""
    now, watched, closed = [0.0], {}, []

    class Slow:
        def __init__(self, bell):
            self.bell = bell

        def close(self):
            closed.append(self.bell)
            now[0] += 0.6

    monkeypatch.setattr(lifeline, "Watch", Slow)
    desk = SimpleNamespace(watch=watched.__setitem__, forget=watched.__delitem__)
    lines = Lifelines(desk, lambda: now[0])
    for number in range(30):
        lines.hold(SimpleNamespace(id=number), number)
    assert len(watched) == 30
    lines.close()
    assert closed == [0, 1] and not watched
    lines.close()


def test_a_lifeline_that_can_not_be_watched_is_done_without(desk):  # noqa: F811
    life, fd = Life(), page(lifeline.WAITERS | 5)
    desk.room = 2
    assert type(attach(desk, life, fd)[0]) is events.StreamAttached
    os.close(fd)
    assert desk.ranks.ranks[ID].watched and bells(desk) == []


@pytest.mark.parametrize("fd", [lambda: page(1, size=1), lambda: page(1, seals=0), lambda: os.eventfd(0)])
def test_what_is_no_lifeline_is_refused(desk, fd):  # noqa: F811
    life, odd = Life(), fd()
    assert attach(desk, life, odd) == [] and "not a sealed page" in desk.told[-1][1].reason
    os.close(odd)
    assert not desk.watched and not desk.ranks.ranks


def test_a_lifeline_that_is_said_and_not_brought_is_no_pool_less(desk):  # noqa: F811
    life = Life()
    assert list(desk.ranks.attach(1, life.pid, message(lifeline=True), life.descriptors())) == []
    assert "can't be attached" in desk.told[-1][1].reason


@pytest.mark.parametrize("word", [0, lifeline.WAITERS, 0xFFFFFFFF])
def test_garbage_in_the_word_is_no_suspicion(desk, word):  # noqa: F811
    life, fd = Life(), page(word)
    attach(desk, life, fd)
    [bell] = bells(desk)
    assert desk.ranks._lifelines._held[ID]._thread.join(20) is None and not select.select([bell], [], [], 0)[0]
    desk.ranks.forget(ID)
    os.close(fd)


def test_a_daemon_that_stops_waits_for_nobody(desk):  # noqa: F811
    """The word is held, and its holder lives on."""
    holding, leave, made = threading.Event(), threading.Event(), []

    def hold():
        made.append(held_by_this_thread())
        holding.set()
        leave.wait()
        made.pop().end()

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait()
    attach(desk, Life(), made[0].fd)
    watch = desk.ranks._lifelines._held[ID]
    desk.ranks.close()
    assert watch.ended and not desk.watched
    leave.set()
    thread.join()


def test_where_no_thread_can_be_had_the_rank_is_served_all_the_same(desk, monkeypatch):  # noqa: F811
    def none_left(self):
        raise RuntimeError("can't start new thread")

    fd = page(lifeline.WAITERS | 5)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none_left)
        told = attach(desk, Life(), fd)
    assert type(told[0]) is events.StreamAttached and bells(desk) == []
    desk.ranks.forget(ID)
    os.close(fd)
