"""Two sequences of one name, one of them delivered: what is over is a life, not a name. Old peers say names alone, and mean all of its lives."""

from __future__ import annotations

import pytest

from kvguard.core.events import Arrived
from kvguard.format import messages as m
from kvguard.format.lineage import life_of
from kvguard.types import Life, Rank
from tests.core.cast import INSTANCE, Cast, three_stages
from tests.core.test_moves import AT_B, lose, moved, world
from tests.core.test_moves import R0 as M0
from tests.core.test_node import protected
from tests.core.test_recovery import R0, R1, R2, Has, ask, column

FORMER, NOW = 1, 2  # births


def born(cast: Cast, birth: int) -> Cast:
    for daemon in cast.daemons.values():
        daemon.births = {stream: birth for stream in (*daemon.replicas, *(has["stream"] for has in daemon.ranks.values()))}
    return cast


def delivered(cast: Cast, *lives: tuple[str, int]) -> None:
    names, births = zip(*lives, strict=True)
    cast.queue.append(Arrived(cast.emitter.link, m.Delivered(INSTANCE, names, births)))
    cast.drain()


@pytest.mark.parametrize(("births", "planned"), [((FORMER,), ("s", "t")), ((NOW,), ("t",)), ((FORMER, NOW), ("t",)), ((0,), ("t",))])
def test_a_plan_without_emitter_leaves_out_the_life_that_was_delivered_and_no_other(births, planned):
    cast = born(three_stages(), NOW)
    delivered(cast, *(("s", birth) for birth in births))
    cast.kill(cast.emitter)
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(Rank(0, 1, 0)))
    cast.run(5000)
    assert cast.daemons["a"].plan.sequences == planned
    assert [dict(zip(one.sequences, one.births, strict=True)) for one in cast.sent(m.Delivered)[:1]] == [{"s": births[-1]}], "passed on as it was said"


def test_of_too_many_names_those_go_that_were_said_longest_ago(monkeypatch):
    monkeypatch.setattr("kvguard.core.sessions.DELIVERED_MAX", 2)
    cast = three_stages()
    for life in (("s", FORMER), ("x", 1), ("s", NOW), ("y", 1)):
        delivered(cast, life)
    assert cast.coordinator.known.delivered[INSTANCE] == {"s": (FORMER, NOW), "y": (1,)}


@pytest.mark.parametrize(("births", "planned"), [((FORMER,), ("s", "t")), ((NOW,), ("t",)), ((0,), ("s", "t"))])
def test_with_a_living_emitter_a_plan_leaves_out_what_is_known_to_be_the_delivered_life(births, planned):
    """A former replica may still have it, in blocks that others have by now."""
    cast = born(three_stages(), NOW)
    delivered(cast, *(("s", birth) for birth in births))
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(Rank(0, 1, 0)))
    cast.run(5000)
    assert cast.daemons["a"].plan.sequences == planned


def test_a_former_life_said_again_does_not_forget_what_a_plan_decided_of_the_name():
    cast = born(three_stages(), NOW)
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(Rank(0, 1, 0)))
    cast.run(300)
    forks = dict(cast.coordinator.known.forks[INSTANCE])
    assert set(forks) == {"s", "t"}
    delivered(cast, ("s", FORMER))
    assert cast.coordinator.known.forks[INSTANCE] == forks
    delivered(cast, ("s", NOW))
    assert set(cast.coordinator.known.forks[INSTANCE]) == {"t"}


def test_what_moved_stays_until_it_is_delivered_itself():
    cast = born(world(), NOW)
    lose(cast)
    cast.run(100)
    delivered(cast, ("s", FORMER), ("t", FORMER))
    cast.run(300)
    assert not cast.daemons["b"].dropped and "recovery/i" in cast.store
    delivered(cast, ("s", NOW), ("t", NOW))
    cast.run(100)
    assert cast.daemons["b"].dropped and "recovery/i" not in cast.store


def test_a_name_that_moved_elsewhere_may_be_anothers_here():
    """Also for a coordinator that was restarted meanwhile: which life moved is durable."""
    for restarts in (False, True):
        cast = born(world(), FORMER)
        lose(cast)
        cast.run(300)
        a = cast.daemons["a"]
        a.births[a.host(M0, {"s": (3, 5)}, life=2)] = NOW
        a.ranks[M0]["epoch"] = cast.emitter.epoch
        cast.run(300)
        if restarts:
            cast._begin()
            cast.run(300)
        lose(cast)
        cast.run(500)
        assert [(one.sequence, one.position) for one in cast.emitter.resumes[-1].sequences] == [("s", 3)], restarts
        assert cast.emitter.resumes[-1].epoch.counter == 2


def test_copies_of_a_delivered_life_do_not_decide_whose_the_name_is():
    """Every rank is lost; the first copy of the name that is found is of the life that is over."""
    held = [Has("c", R0, {"s": (9, 10)}, "replica", birth=FORMER), Has("a", R1, {"s": (4, 5)}, "replica", birth=NOW)]
    answer = ask(held, lost=(R0, R1, R2), over={"s": (FORMER,)})
    assert column(answer, "births") == {"s": NOW} and column(answer, "positions") == {"s": 0} and column(answer, "ids") == {"s": 5}
    assert ask(held, lost=(R0, R1, R2), over={"s": (FORMER, NOW)}).order.sequences == ()
    gone = moved([Has("b", M0, {"s": (9, 9)}, "replica", birth=NOW)], [AT_B], over={"s": (FORMER,)})
    assert gone.order.sequences == ("s",)


def test_a_copy_that_says_no_birth_is_any_life():
    held = [Has("a", R0, {"s": (9, 10)}, "replica")]
    assert ask(held, lost=(R0, R1, R2), over={"s": (FORMER,)}).order.sequences == ()
    assert ask(held, lost=(R0, R1, R2), over={"s": (FORMER,)}, emitter_lives=True).order.sequences == ("s",), "only what is known to be that life"


def test_what_may_leave_is_a_matter_of_the_life():
    """A daemon that hasn't looked since the name was given away knows the former life's positions."""
    local = protected().node.outbound
    row = next(iter(local.streams.values())).ledger.rows[0]
    row.request = b"now"
    assert local.releasable("i", R0, life_of("s", b"now")) == local.releasable("i", R0, Life("s")) == 5
    assert local.releasable("i", R0, life_of("s", b"then")) == local.releasable("i", R0, Life("t")) == 0
    assert local.releasable("i", R1, Life("s")) is None
