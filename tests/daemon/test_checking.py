"""Who waits while replicas of a former life are verified, and what they are told when."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kvguard.core import effects, events
from kvguard.daemon.checking import REPORT_WAIT_NS, Checking
from kvguard.daemon.perform_node import NodeShell, node_performer
from kvguard.format import wire
from kvguard.format.messages import Hello
from kvguard.store.store import ReplicaStore
from kvguard.types import Epoch

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
from streams import EPOCH, SHAPE, STREAM, Kept, Sent  # noqa: E402

ONE_PAGE = 1  # the least cost: a page a slice


class Life:
    """The second life of a daemon whose first one held two sequences; time and timers by hand."""

    def __init__(self) -> None:
        self.shelf, self.sent, self.timers, self.now = Kept(), [], [], 0
        first = ReplicaStore(self.shelf, 1 << 20, 0)
        sent = Sent(first)
        for no, name in ((1, "a"), (2, "b")):
            sent.open(no, name, 8)
            sent.fill(no, name, [2 * no, 2 * no + 1], 8)
        first.close()
        self.store = ReplicaStore(self.shelf, 1 << 20, 0)
        assert self.store.read_back() == ()
        self.shell = NodeShell(transport=self, journal=None, clock=lambda: self.now, node="b", store=self.store, engines=None, slice_bytes=ONE_PAGE)
        self.perform = node_performer(self.shell)
        self.checking = Checking(self.shell, lambda delay, ready: self.timers.append(ready))

    def send(self, link, head, payload=None) -> bool:
        self.sent.append(wire.decode(head)[0])
        return True

    def slice(self) -> list:
        due, self.timers = self.timers, []
        return [event for ready in due for event in ready()]

    def rest(self) -> list:
        told = []
        while self.timers:
            told += self.slice()
        return told


@pytest.fixture
def life():
    made = Life()
    yield made
    made.store.close()
    made.shelf.close()


def hello(session: int, epoch: Epoch = EPOCH) -> effects.Probe:
    return effects.Probe("in:1", Hello(STREAM, session, epoch, "a", SHAPE))


def test_a_hello_waits_until_its_replica_is_verified(life):
    assert list(life.perform(hello(5))) == [] and list(life.perform(hello(6))) == []  # the newer session takes the older one's place
    assert life.slice() == []
    [probed] = life.rest()
    assert (type(probed), probed.session, probed.reason) == (events.Probed, 6, "")
    assert probed.held.holding.positions == (8, 8)
    [again] = life.perform(hello(7))
    assert again.session == 7 and life.timers == []


def test_a_hello_of_an_epoch_that_is_over_by_then_is_refused(life):
    life.perform(hello(5))
    life.store.promise(STREAM.instance, Epoch(EPOCH.counter + 1, "c"))
    [probed] = life.rest()
    assert "fenced" in probed.reason


def test_a_replica_that_is_dropped_meanwhile_is_not_made_anew(life):
    life.perform(hello(5))
    life.perform(effects.DropReplica(STREAM, "unpinned"))
    assert life.rest() == [] and life.store.streams() == ()


def test_a_report_waits_for_what_it_states(life):
    report = effects.SendReport("coordinator", STREAM.instance, EPOCH)
    assert list(life.perform(report)) == [] and life.sent == []
    life.rest()
    [said] = life.sent
    assert said.holdings[0].positions == (8, 8)


def test_a_report_does_not_wait_for_ever(life):
    life.perform(effects.SendReport("coordinator", STREAM.instance, EPOCH))
    life.slice()
    life.now = REPORT_WAIT_NS
    life.slice()
    [said] = life.sent
    assert said.holdings[0].sequences == ("a", "b") and said.holdings[0].positions == (8, 0) and said.holdings[0].ids == (8, 8)
    life.rest()
    assert len(life.sent) == 1


def test_a_report_that_waits_is_not_said_after_a_newer_one(life):
    """The older one calls a pool pending whose process has died meanwhile: the coordinator would believe that until it gave the pool up."""
    life.perform(effects.SendReport("coordinator", STREAM.instance, EPOCH, (STREAM,)))
    life.perform(effects.DropReplica(STREAM, "unpinned"))  # nothing is unverified any more, and no slice has come yet
    life.perform(effects.SendReport("coordinator", STREAM.instance, EPOCH))
    life.rest()
    assert [report.pending for report in life.sent] == [()]


def test_another_instances_report_does_not_wait(life):
    life.perform(effects.SendReport("coordinator", "other", EPOCH))
    assert [report.holdings for report in life.sent] == [()]


def pushed(life, epoch: Epoch = EPOCH) -> list:
    life.rest()
    life.shell.epochs[STREAM.instance] = epoch
    return list(life.perform(effects.PushReplica(STREAM, "c", "peer:c")))


def test_a_replica_is_read_in_slices_before_it_is_pushed_on_and_stays_stated_meanwhile(life):
    assert pushed(life) == [] and STREAM not in life.shell.streams
    assert life.store.holding(STREAM).positions == (8, 8) and life.slice() == []
    life.store.damage(STREAM, "b", 6, bytes_only=True)
    attached, looked = life.rest()
    assert (attached.pushing, attached.epoch, looked.committed) == ("c", EPOCH, (8, 6)) and life.store.counters["positions_damaged"] == 2
    assert STREAM in life.shell.streams and not life.shell.pushes and life.timers == []


def test_a_push_of_a_plan_that_is_over_or_of_a_replica_that_has_gone_does_not_begin(life):
    pushed(life)
    life.shell.epochs[STREAM.instance] = Epoch(EPOCH.counter + 1, "c")
    assert life.rest() == [] and not life.shell.streams
    pushed(life)
    life.perform(effects.DropReplica(STREAM, "unpinned"))
    assert life.rest() == [] and not life.shell.streams and not life.shell.pushes


def test_a_report_waits_until_a_replica_that_was_found_damaged_is_verified(life):
    life.rest()
    life.store.damage(STREAM, "a", 2, bytes_only=True)
    life.store.damaged(STREAM)
    assert list(life.perform(effects.SendReport("coordinator", STREAM.instance, EPOCH))) == [] and life.sent == []
    life.rest()
    [said] = life.sent
    assert said.holdings[0].positions == (2, 8) and life.store.counters["positions_damaged"] == 6 and not life.store.counters["positions_unsound"]


def test_who_sends_to_a_replica_that_is_found_damaged_is_told_in_the_next_turn(life):
    life.rest()
    life.perform(hello(5))
    life.store.damage(STREAM, "a", 3, bytes_only=True)
    life.store.damaged(STREAM)
    life.perform(hello(6))
    doubted, *_ = life.slice()
    assert (type(doubted), doubted.stream) == (events.ReplicaDoubted, STREAM)
    [probed] = life.rest()
    assert probed.session == 6 and probed.held.holding.positions == (3, 8), "once, and then what holds"
    life.store.recheck(STREAM.instance, None)
    assert life.rest() == [], "an operator's doubt has been told by the core"
