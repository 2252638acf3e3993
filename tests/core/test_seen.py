"""What can't be read and how old figures are: a pool that is lost, devices that can't be used, heartbeats that say of which moment they speak."""

from __future__ import annotations

from kvguard.core import events as ev
from kvguard.core import overview
from kvguard.core.effects import Note, Send
from kvguard.core.known import Known, Settings
from kvguard.core.membership import Patience
from kvguard.core.node import Node, NodeSettings
from kvguard.format import messages as ms
from kvguard.types import NO_EPOCH, Epoch, Rank, StreamId

MS = 1_000_000
ID = StreamId("i", Rank(0, 0, 0), 7)
SHAPE = ms.StreamShape(1, 4, 10, 40, 64)
FAULT = ("GPU-1", "Xid 79. Try: drain the node")


class One:
    """A node with a rank, linked to its coordinator; `at` ms."""

    def __init__(self) -> None:
        self.node = Node(NodeSettings("a", 9, "tcp://a", "1.0", heartbeat_ns=100 * MS, hang_min_ns=0), {})
        self.step(ev.LinkUp("coordinator"), 0)
        self.attach(3)

    def step(self, event, at: int = 0) -> tuple:
        out = self.node.step(at * MS, event)
        self.node.check()
        return out

    def attach(self, incarnation: int, at: int = 0) -> None:
        self.step(ev.StreamAttached(ID, SHAPE, incarnation, NO_EPOCH, "tcp://engine"), at)

    def beat(self, at: int) -> ms.Beat:
        [beat] = [effect.message for effect in self.step(ev.Tick(), at) if type(effect) is Send and type(effect.message) is ms.Beat]
        return beat


def test_a_rank_whose_pool_is_lost_is_unprotected_with_the_reason_until_it_brings_other_memory():
    one = One()
    [noted] = one.step(ev.PoolLost(ID, 3, FAULT[1]), 10)
    assert (type(noted), noted.what, noted.reason) == (Note, "unprotected", FAULT[1])
    [rank] = one.beat(100).ranks
    assert rank.state == "unprotected" and rank.reason == f"its pool can't be read: {FAULT[1]}"
    one.attach(3, 110)  # its line was away for a moment: the memory is the same
    assert "can't be read" in one.beat(200).ranks[0].reason
    one.step(ev.ProcessDied(3, ID, "its process ended", False), 210)
    one.attach(4, 220)
    assert "can't be read" not in one.beat(300).ranks[0].reason
    assert one.step(ev.PoolLost(ID, 3, "late"), 310) == ()  # of the life before
    assert one.step(ev.PoolLost(ID._replace(pool=8), 3, "of nobody"), 310) == ()


def test_devices_that_cannot_be_used_are_in_every_heartbeat_and_noted_once():
    one = One()
    assert one.beat(100).device_faults == ()
    [noted] = one.step(ev.DevicesSeen((FAULT,)), 110)
    assert (noted.what, noted.subject, noted.reason) == ("device_fault", *FAULT)
    assert one.step(ev.DevicesSeen((FAULT,)), 120) == ()
    assert one.beat(200).device_faults == one.beat(300).device_faults == (FAULT,)
    assert one.step(ev.DevicesSeen(()), 310) == () and one.beat(400).device_faults == ()


def test_a_heartbeat_says_how_old_the_store_s_figures_are():
    one = One()
    one.step(ev.ReplicasSeen((), 5, 10), 60)
    first, second = one.beat(100), one.beat(250)
    assert (first.figures_age_ms, second.figures_age_ms, second.arena_bytes) == (40.0, 190.0, 5)


def test_the_status_says_of_which_moment_each_figure_is():
    known = Known("c", Settings(patience=Patience(heartbeat_ns=100 * MS)))
    rank = ms.RankBeat(ID, NO_EPOCH, 3, "tcp://engine", "protected", "", ("b",), 1, 0, 40, 40, 0, 0, 0.0, 7)
    scheduler = ms.SchedulerBeat(ID, Epoch(0, ""), 4, "", "protected", "", ("b",), 1, 41, 41)
    beat = ms.Beat("a", 9, 1, (rank,), (), (), 5, 10, (scheduler,), (), (FAULT,), 30.0)
    known.membership.hello(0, 0, "in:a", ms.NodeHello("a", 9, "tcp://a", (), "1.0"))
    assert overview.status(known)["nodes"][0]["figures_age_ms"] is None
    new, _ = known.membership.beat(1000 * MS, 1000 * MS, beat)
    known.membership.adopt(1000 * MS, "a", new[0])
    known.membership.beat(1100 * MS, 1100 * MS, ms.Beat("a", 9, 2, (), (), (), 6, 10, figures_age_ms=80.0))  # the rank is not in it
    known.now_ns = 1150 * MS
    found = overview.status(known)
    assert found["coordinator"]["heartbeat_ms"] == 100.0
    [node], [listed] = found["nodes"], found["ranks"]
    assert (node["heartbeat_age_ms"], node["figures_age_ms"], node["arena_bytes"], node["device_faults"]) == (50.0, 130.0, 6, [])
    assert (listed["committed"], listed["figures_age_ms"]) == (40, 150.0) and found["schedulers"] == []
    known.membership.beat(1200 * MS, 1200 * MS, beat)
    known.membership.hello(1300 * MS, 1300 * MS, "in:a2", ms.NodeHello("a", 9, "tcp://a", (), "1.0"))  # the same life, another link: no new figure
    known.now_ns = 1320 * MS
    found = overview.status(known)
    [node], [listed], [lead] = found["nodes"], found["ranks"], found["schedulers"]
    assert (node["heartbeat_age_ms"], listed["figures_age_ms"], lead["figures_age_ms"]) == (20.0, 120.0, 120.0)
    assert node["device_faults"] == [{"device": FAULT[0], "reason": FAULT[1]}]
