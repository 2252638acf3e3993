"""Replicas of two lives of a rank that name one block for two sequences: the round that finds it ends, and the next one leaves the older copy out from there."""

from __future__ import annotations

import pytest

from kvguard.core.effects import Persist
from kvguard.format import ledger
from kvguard.format import messages as m
from kvguard.types import Clash, Epoch, Fork, Rank, StreamId
from tests.core.cast import INSTANCE, Cast, Daemon, three_stages
from tests.core.test_recovery import R1, Has, ask, column, stream, survivors

FORMER, LAST = StreamId(INSTANCE, R1, 77), StreamId(INSTANCE, R1, 1)
CLASHES = (Clash(FORMER, "old", 4), Clash(LAST, "s", 0))


def test_a_copy_counts_up_to_where_it_clashes_and_its_ids_stay():
    held = [*survivors({"s": (8, 9), "old": (9, 10)}), Has("c", R1, {"s": (8, 9)}, "replica"), Has("c", R1, {"old": (9, 12)}, "replica", life=77)]
    assert column(ask(held), "positions") == {"s": 8, "old": 9}
    answer = ask(held, clashes=(Clash(stream(R1, 77), "old", 8), Clash(stream(R1, 77), "old", 4)))
    assert column(answer, "positions") == {"s": 8, "old": 4} and column(answer, "rungs") == {"s": "replica", "old": "replica"}
    assert "another sequence had its blocks" in column(answer, "explanations")["old"] and "another sequence" not in column(answer, "explanations")["s"]
    answer = ask(held, clashes=(Clash(stream(R1, 77), "old", 0),))
    assert column(answer, "positions") == {"s": 8, "old": 0} and column(answer, "rungs")["old"] == "tokens" and answer.lost == ()
    assert column(answer, "ids") == {"s": 9, "old": 12}, "ids need no block: it is computed again from all of them"


def test_another_copy_takes_its_place():
    held = [*survivors({"old": (9, 10)}), Has("c", R1, {"old": (9, 10)}, "replica", life=77), Has("c", R1, {"old": (6, 10)}, "replica")]
    assert column(ask(held, clashes=(Clash(stream(R1, 77), "old", 4),)), "positions") == {"old": 6}


def test_a_pool_that_is_adopted_whole_is_no_copy_beside_others():
    held = [*survivors({"s": (8, 9)}), Has("b", R1, {"s": (8, 9)}, alive=False)]
    assert column(ask(held, clashes=(Clash(stream(R1), "s", 0),)), "positions") == {"s": 8}


class Finding(Daemon):
    """It finds the clash as long as a plan takes both copies beyond it."""

    found: int

    def _rebuild(self, order: m.RebuildOrder) -> list:
        rebuild, positions = order.rebuild, dict(zip(self.plan.sequences, self.plan.positions, strict=True))
        taken = {name: rebuild.sources[at].stream for name, at in zip(self.plan.sequences, rebuild.source, strict=True) if at >= 0}
        if any(taken.get(clash.sequence) != clash.stream or positions[clash.sequence] <= clash.position for clash in CLASHES):
            return super()._rebuild(order)
        self.found += 1
        return [m.Done(INSTANCE, order.epoch, self.name, f"rank {R1}", "two lives have one block", clashes=CLASHES)]


def second_loss(**more) -> tuple[Cast, Finding]:
    """Rank 1 dies with its node b. Its holder c has its last life's replica, and one of a former life with a sequence that the last one isn't known to have."""
    cast = three_stages(**more)
    a, c = cast.daemons["a"], cast.daemons["c"]
    c.__class__, c.found = Finding, 0
    c.replicas[FORMER] = {"old": (9, 10)}
    for daemon, rank in ((a, Rank(0, 0, 0)), (c, Rank(0, 2, 0))):
        daemon.ranks[rank]["rows"]["old"] = (9, 10)
    cast.run(200)
    cast.kill(cast.daemons["b"])
    return cast, c


def test_the_round_is_repeated_once_with_the_same_standby():
    cast, c = second_loss()
    cast.run(3000)
    (resume,) = cast.emitter.resumes
    assert (resume.error, resume.epoch.counter, c.found) == ("", 2, 1)
    assert {entry.sequence: entry.position for entry in resume.sequences} == {"s": 8, "t": 5, "old": 4}, "the older copy yields, from the clash on"
    assert c.ranks[R1]["incarnation"] == 3000 and cast.coordinator.history()[-1]["attempts"] == 2
    (failed,) = cast.noted("failed_part")
    assert "two lives have one block" in failed.reason
    rounds = [order for order in cast.sent(m.PlanOrder) if order.epoch.counter == 2]
    assert any("another sequence had its blocks" in text for text in rounds[0].explanations)


@pytest.mark.parametrize("kill_after", range(20, 140, 6))
def test_a_coordinator_that_dies_on_the_way_ends_there_too(kill_after):
    cast, c = second_loss()
    cast.kill_after = len(cast.performed) + kill_after
    cast.run(12_000)
    resume = cast.emitter.resumes[-1]
    assert resume.error == "" and {entry.sequence: entry.position for entry in resume.sequences} == {"s": 8, "t": 5, "old": 4}
    assert c.ranks[R1]["incarnation"] == 3000


def test_of_two_former_lives_neither_stays():
    cast, c = second_loss()
    found = (Clash(FORMER, "old", 4), Clash(StreamId(INSTANCE, R1, 66), "s", 0))
    c._rebuild = lambda order: [m.Done(INSTANCE, order.epoch, "c", f"rank {R1}", "two lives", clashes=found)] if order.epoch == Epoch(1, "c") else Finding._rebuild(c, order)
    cast.run(3000)
    kept = [effect.value for effect in cast.performed if isinstance(effect, Persist) and effect.key == f"recovery/{INSTANCE}" and effect.value]
    assert [ledger.unpack("recovery/i", value).clashes for value in kept][-1] == found, "durable, as all that a round begins with"
    assert cast.emitter.resumes[-1].error == "" and Fork(2, 4) in c.lineages["old"]
