"""A part of a plan that fails while a standby is taking another rank: the next round keeps what that standby brings."""

from __future__ import annotations

import pytest

from kvguard.core.events import Arrived
from kvguard.core.known import Settings
from kvguard.format import messages as m
from kvguard.types import Clash, Epoch, Rank, StreamId
from tests.core.cast import INSTANCE, MS, Cast, Daemon, three_stages

R0, R1, R2 = (Rank(0, pp, 0) for pp in range(3))


class Pulling(Daemon):
    """Its standbys take their time: what they say stays in `slow`. A standby whose rank is given away again meanwhile is `wasted`."""

    slow: list
    wasted: list

    def hears(self, message) -> list:
        if isinstance(message, m.RebuildOrder):
            said = super().hears(message)
            self.slow += said
            return []
        if isinstance(message, m.Fence):
            for rank in message.lost:
                has = self.ranks.get(rank)
                if has is not None and has["alive"] and has["incarnation"] >= 1000:
                    has["alive"] = False
                    self.wasted.append(has["incarnation"])
        return super().hears(message)


def two_lost(**more) -> tuple[Cast, Pulling, Daemon]:
    """Ranks 0 and 2 are lost with their processes; a's standby is still pulling, c's order has been given."""
    cast = three_stages(settings=Settings(**more))
    a, c = cast.daemons["a"], cast.daemons["c"]
    a.__class__, a.slow, a.wasted = Pulling, [], []
    for daemon in (a, c):
        daemon.standbys.append(daemon.standbys[0] + 1)
    cast.run(200)
    cast.say(a, a.kill_rank(R0))
    cast.say(c, c.kill_rank(R2))
    return cast, a, c


def arrive(cast: Cast, daemon: Pulling) -> None:
    for message in daemon.slow:
        cast.say(daemon, message)
    daemon.slow = []


def assert_nothing_wasted(cast: Cast, a: Pulling, epochs: list[int]) -> None:
    assert [(resume.epoch.counter, resume.error) for resume in cast.emitter.resumes] == [(epoch, "") for epoch in epochs]
    assert a.wasted == [] and a.standbys == [1001] and a.ranks[R0]["incarnation"] == 1000, "one standby took the rank, the other one is still there"


def test_a_failed_part_waits_for_a_done_in_flight():
    cast, a, c = two_lost()
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(500)
    assert a.slow and cast.noted("failed_part") and cast.epoch() == 2, "two losses, two rounds: the second one's plan is being carried out"
    assert "rank 0.0.0" in cast.coordinator.status()["instances"][0]["reason"]
    arrive(cast, a)
    cast.run(500)
    assert cast.epoch() == 3
    assert_nothing_wasted(cast, a, [3])
    assert c.ranks[R2]["incarnation"] == 3001 and cast.coordinator.history()[-1]["ranks"] == ["0.2.0"], "the failed part alone is planned anew"


@pytest.mark.parametrize("loss", ["survivor", "replacement", "node"])
def test_so_does_a_further_loss(loss):
    cast, a, c = two_lost()
    b = cast.daemons["b"]
    if loss == "replacement":
        c.__class__, c.slow, c.wasted = Pulling, [], []
    cast.run(500)
    assert a.slow and cast.epoch() == 2
    if loss == "survivor":
        cast.say(b, b.kill_rank(R1))
    elif loss == "replacement":
        fault = c.kill_rank(R2)
        cast.say(c, fault)
        cast.run(100)
        cast.say(c, fault)  # with the next heartbeat
    else:
        cast.kill(b)
    cast.run(2000 if loss == "node" else 200)
    assert cast.epoch() == 2 and not cast.emitter.resumes
    arrive(cast, a)
    if loss == "replacement":
        cast.run(100)
        arrive(cast, c)
    cast.run(1000)
    assert_nothing_wasted(cast, a, [3])


def test_it_waits_no_longer_than_is_set():
    cast, a, c = two_lost(settle_ns=1000 * MS)
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(800)
    assert cast.epoch() == 2
    cast.run(500)
    assert cast.epoch() == 3, "whoever doesn't come is counted lost"
    arrive(cast, a)
    cast.run(500)
    assert not cast.emitter.resumes[-1].error and a.wasted == [1000]


def test_it_doesn_t_wait_for_what_died_or_failed_too():
    cast, a, c = two_lost()
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(300)
    assert cast.epoch() == 2
    a.slow = [m.Done("i", message.epoch, "a", message.part, "its replica was damaged") for message in a.slow]
    a.ranks[R0]["alive"] = False
    arrive(cast, a)
    cast.run(100)
    assert cast.epoch() == 3
    arrive(cast, a)
    cast.run(500)
    assert not cast.emitter.resumes[-1].error and (a.ranks[R0]["incarnation"], c.ranks[R2]["incarnation"]) == (1001, 3001)


def test_nor_for_one_whose_standby_was_told_of_nothing():
    """Mates pull the same replicas: where two of those clash they clash for each of the mates."""
    cast, a, c = two_lost()
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(300)
    (done,), ordered = a.slow, len(cast.sent(m.RebuildOrder))
    a.slow = [m.Done(INSTANCE, done.epoch, "a", done.part, "two lives", clashes=(Clash(StreamId(INSTANCE, R0, 77), "s", 4),))]
    a.standbys.insert(0, 1000)
    a.ranks[R0]["alive"] = False
    arrive(cast, a)
    cast.run(100)
    again = [order for order in cast.sent(m.RebuildOrder)[ordered:] if order.epoch.counter == 2]
    assert cast.epoch() == 3 and not again, "it isn't ordered again, to be refused again, until the wait is over"


def test_nothing_new_is_given_away_meanwhile():
    """A rank whose replica comes first from elsewhere: its standby stays free for the next plan."""
    cast, a, c = two_lost()
    c.silent_parts.append("holders")
    cast.run(300)
    assert [order.rebuild.rank for order in cast.sent(m.RebuildOrder) if order.epoch.counter == 2] == [R0]
    cast.say(c, m.Done("i", c.promise, "c", "rank 0.1.0", "can't truncate"))
    b = cast.daemons["b"]
    cast.say(b, b.kill_rank(R1))
    cast.run(200)
    c.silent_parts.clear()
    cast.say(c, m.Done("i", c.promise, "c", "holders"))
    cast.run(200)
    assert [order.rebuild.rank for order in cast.sent(m.RebuildOrder) if order.epoch.counter == 2] == [R0]
    arrive(cast, a)
    cast.run(500)
    assert_nothing_wasted(cast, a, [3])
    assert c.standbys == [3001], "c's standby took rank 2 in the next round alone"


def test_a_node_that_is_linked_anew_hears_its_order_again():
    cast, a, c = two_lost()
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(300)
    assert cast.epoch() == 2 and a.slow
    a.slow = []  # the answer was lost with the link
    cast.join(a)
    cast.run(100)
    assert a.slow and cast.epoch() == 2
    arrive(cast, a)
    cast.run(500)
    assert_nothing_wasted(cast, a, [3])


@pytest.mark.parametrize("kill_after", range(1, 14))
def test_a_coordinator_that_dies_meanwhile_hears_of_it_again(kill_after):
    cast, a, c = two_lost()
    refused: list = []
    plain = c.hears

    def hears(message) -> list:
        """As a node's orders do, it says its answers again when the plan or an order is said again."""
        again = [one for one in refused if isinstance(message, m.RebuildOrder) and one.epoch == message.epoch]
        if again:
            return again
        said = plain(message)
        refused.extend(one for one in said if isinstance(one, m.Done) and one.error)
        return [*said, *(one for one in refused if isinstance(message, m.PlanOrder) and one.epoch == message.epoch)]

    c.hears = hears
    c.errors["rank 0.2.0"] = "out of memory"
    cast.drain()
    assert cast.epoch() == 2 and a.slow
    cast.kill_after = len(cast.performed) + kill_after
    cast.run(300)
    arrive(cast, a)
    cast.run(300)
    arrive(cast, a)  # where the coordinator died of the first answer
    cast.run(1000)
    assert cast.deaths == 1
    assert_nothing_wasted(cast, a, [3])


@pytest.mark.parametrize("first", ["standby", "failure"])
def test_a_node_says_its_failures_to_a_new_coordinator_before_anything_else(first):
    """With its hello (core/node.py): then nothing says yet that a standby elsewhere has its order since the coordinator's former life."""
    cast, a, c = two_lost()
    c.errors["rank 0.2.0"] = "out of memory"
    cast.drain()
    assert cast.epoch() == 2 and a.slow
    a.slow = []
    cast._begin()
    of_a, others = [[event for event in cast.queue if (getattr(event, "link", "") == a.link) == mine] for mine in (True, False)]
    at = next(i for i, event in enumerate(others) if isinstance(event, Arrived) and event.link == c.link) + 1
    others.insert(at, Arrived(c.link, m.Done("i", c.promise, "c", "rank 0.2.0", "out of memory")))
    cast.queue = of_a[:2] + others + of_a[2:] if first == "standby" else others + of_a
    cast.run(300)
    assert a.slow and cast.epoch() == 2
    arrive(cast, a)
    cast.run(1000)
    assert_nothing_wasted(cast, a, [3])


def test_paused_meanwhile():
    """What waited is held like any other recovery, and done once nobody pauses it any more."""
    cast, a, c = two_lost()
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(300)
    cast.ask("pause")
    arrive(cast, a)
    cast.run(300)
    assert cast.epoch() == 2 and cast.coordinator.status()["held"]
    cast.ask("unpause")
    cast.run(1000)
    assert cast.epoch() == 3 and not cast.emitter.resumes[-1].error and a.wasted == []


def test_an_epoch_from_elsewhere_waits_for_nobody():
    """A node has promised more: what is in flight is stale already."""
    cast, a, c = two_lost()
    cast.run(300)
    assert cast.epoch() == 2 and a.slow
    beat = c.beat()
    promise = m.NodeHello("c", 1, "tcp://c", (("i", type(c.promise)(9, "other")),), "1")
    cast.queue.append(Arrived(c.link, promise))
    cast.say(c, beat)
    cast.run(100)
    assert cast.epoch() == 10




def test_a_round_that_begins_for_another_reason_meanwhile_knows_what_had_failed():
    """A node comes back with a higher epoch while a standby is waited for: what failed, and who was lost besides, counts in the round above that epoch."""
    cast, a, c = two_lost()
    b = cast.daemons["b"]
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(500)
    cast.say(b, b.kill_rank(R1))
    cast.run(100)
    assert cast.epoch() == 2, "a's standby is waited for"
    cast.take(Arrived(b.link, m.NodeHello("b", b.incarnation, "tcp://b", ((INSTANCE, Epoch(7, "another")),), "1")))
    record = cast.coordinator.known.rounds[INSTANCE].record
    assert record.epoch.counter == 8 and R1 in record.lost and R1 in record.dead_writers and ("c", 3000) in record.refused
    cast.run(500)
    arrive(cast, a)
    cast.run(500)
    assert not cast.emitter.resumes[-1].error and c.ranks[R2]["incarnation"] == 3001


def test_a_pause_keeps_what_had_failed():
    cast, a, c = two_lost()
    b = cast.daemons["b"]
    c.errors["rank 0.2.0"] = "out of memory"
    cast.run(500)
    cast.ask("pause")
    arrive(cast, a)
    cast.run(300)
    cast.say(b, b.kill_rank(R1))
    cast.run(300)
    assert cast.epoch() == 2 and cast.coordinator.held()[0]["ranks"] == ["0.1.0"]
    cast.ask("unpause")
    record = cast.coordinator.known.rounds[INSTANCE].record
    assert record.epoch.counter == 3 and record.lost == (R1, R2) and R1 in record.dead_writers and record.refused == (("c", 3000),)
    cast.run(500)
    assert not cast.emitter.resumes[-1].error and c.ranks[R2]["incarnation"] == 3001 and a.ranks[R0]["incarnation"] == 1000


@pytest.mark.parametrize("behind", [True, False])
def test_a_survivor_whose_last_step_went_back_is_planned_with_anew_and_one_that_fails_is_lost(behind):
    cast = three_stages()
    b = cast.daemons["b"]
    has, b.silent_parts = b.ranks[R1], ["rank 0.1.0"]
    cast.run(200)
    cast.say(cast.daemons["a"], cast.daemons["a"].kill_rank(R0))
    cast.run(300)
    assert cast.epoch() == 1 and not cast.emitter.resumes
    for sequence, (position, ids) in has["rows"].items():
        has["rows"][sequence] = (position - 1, ids)
    b.silent_parts = []
    cast.say(b, m.Done(INSTANCE, b.promise, "b", "rank 0.1.0", "the plan wants more than this rank has", stream=has["stream"], behind=behind))
    cast.run(500)
    assert cast.epoch() == 2 and cast.emitter.resumes[-1].epoch.counter == 2 and not cast.emitter.resumes[-1].error
    assert cast.coordinator.history()[-1]["ranks"] == ([] if behind else ["0.1.0"])
    standbys = [no for daemon in cast.daemons.values() for no in daemon.standbys]
    assert (standbys == [2000, 3000]) == behind, "no standby is spent on a rank that lives"
    assert not behind or cast.coordinator.history()[-1]["positions"] == {"s": 8, "t": 4}


@pytest.mark.parametrize("left", [9, 0])
def test_ids_that_a_last_step_took_back_after_the_report_are_planned_with_anew(left):
    """Whoever didn't take them back would keep more ids than the instance resumes with, and call them its own in the new epoch. `left`: of 12."""
    cast = three_stages()
    a, rows = cast.daemons["a"], cast.daemons["a"].ranks[R0]["rows"]
    rows["s"] = (9, 12)  # nobody knows more than the first rank
    plain = a.hears

    def hears(message):
        said = plain(message)
        if isinstance(message, m.Fence) and message.epoch.counter == 1:
            rows.update(s=(9, left)) if left else rows.pop("s")
        return said

    a.hears = hears
    cast.say(cast.daemons["c"], cast.daemons["c"].kill_rank(R2))
    cast.run(500)
    (resume,) = cast.emitter.resumes
    assert not resume.error and resume.epoch.counter == cast.epoch() == 2 and cast.coordinator.history()[-1]["ranks"] == ["0.2.0"]
    known = {entry.sequence: len(entry.known.ids) // 4 for entry in resume.sequences}
    kept = [has["rows"] for daemon in cast.daemons.values() for has in daemon.ranks.values()]
    assert known["t"] == 7 and all(ids <= known.get(name, 0) for table in kept for name, (_, ids) in table.items())
