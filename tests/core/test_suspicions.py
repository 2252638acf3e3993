"""The coordinator and a death that is suspected first: the round begins at once, and the plan waits for the dying process's pool only as far as it needs it."""

from __future__ import annotations

import msgspec
import pytest

from kvguard.core import dying
from kvguard.core.known import Settings
from kvguard.core.recovery import Unplannable
from kvguard.format import messages as m
from kvguard.types import Rank, StreamId
from tests.core.cast import INSTANCE, MS, Cast, Daemon, three_stages
from tests.core.test_moves import lose, resumed
from tests.core.test_moves import world as moving_world
from tests.core.test_recovery import Has, ask

R0, R1 = Rank(0, 0, 0), Rank(0, 1, 0)


class Dying(Daemon):
    """One of its ranks is being torn down: its reports call that pool pending."""

    pending: tuple[StreamId, ...] = ()

    def hears(self, message) -> list:
        said = super().hears(message)
        return [msgspec.structs.replace(one, pending=self.pending) if isinstance(one, m.Report) else one for one in said]

    def suspect(self, rank: Rank = R1) -> m.Fault:
        fault = self.kill_rank(rank)
        self.ranks[rank]["alive"], self.pending = True, (fault.stream,)
        return msgspec.structs.replace(fault, kind="suspected", salvageable=False, since_ms=0.5)

    def dead(self, rank: Rank = R1) -> list:
        self.pending = ()
        fault = self.kill_rank(rank)
        return [fault, m.Report(INSTANCE, self.promise, self.name, self._holdings())]


def cast_of(**settings) -> tuple[Cast, Dying, m.Fault]:
    cast = three_stages(settings=Settings(**settings))
    daemon = cast.daemons["b"]
    daemon.__class__ = Dying
    fault = daemon.suspect()
    cast.say(daemon, fault)
    cast.drain()
    return cast, daemon, fault


def dies(cast: Cast, daemon: Dying) -> None:
    for message in daemon.dead():
        cast.say(daemon, message)
    cast.drain()


def brought_back(cast: Cast) -> dict:
    return {entry.sequence: (entry.position, entry.rung) for entry in cast.emitter.resumes[-1].sequences}


def test_a_death_that_comes_soon_leaves_its_pool_to_be_adopted() -> None:
    """An adopted pool costs no copy and loses no token: it has a head start."""
    cast, daemon, _ = cast_of()
    current = cast.coordinator.known.rounds["i"]
    assert cast.epoch() == 1 and len(cast.sent(m.Fence)) == 3 and not cast.sent(m.PlanOrder)
    assert current.waiting.startswith("waiting for the memory of i/0.1.0") and len(current.reports) == 3
    assert cast.coordinator.next_deadline() <= cast.now + 50 * MS
    dies(cast, daemon)
    assert brought_back(cast) == {"s": (9, "pool"), "t": (5, "pool")} and len(cast.emitter.resumes) == 1
    assert cast.emitter.resumes[-1].timing_ms["detect"] == 0.5 and not cast.noted("stale_fault")
    (record,) = cast.coordinator.history()
    assert "suspected" in record["reason"]


def test_one_that_takes_its_time_is_not_waited_for_where_replicas_suffice() -> None:
    cast, daemon, fault = cast_of()
    cast.run(50)
    assert brought_back(cast) == {"s": (8, "replica"), "t": (5, "replica")} and cast.epoch() == 1
    cast.say(daemon, msgspec.structs.replace(fault, kind="died", salvageable=True))  # the plan is what it was
    cast.run(200)
    assert cast.epoch() == 1 and len(cast.emitter.resumes) == 1 and len(cast.sent(m.PlanOrder)) == 3 and len(cast.noted("stale_fault")) == 1


def test_it_is_waited_for_where_a_sequence_would_fall_behind() -> None:
    """As long as its node says that it is dying: tearing down a large process takes longer than a report may."""
    cast, daemon, fault = cast_of(exclude_ns=300 * MS, pool_lag_tokens=0)
    for _ in range(8):
        cast.say(daemon, fault)
        cast.run(200)
    assert not cast.noted("excluded") and not cast.sent(m.PlanOrder)
    dies(cast, daemon)
    assert brought_back(cast) == {"s": (9, "pool"), "t": (5, "pool")} and cast.epoch() == 1


def test_but_not_when_its_node_falls_silent_about_it_or_for_ever() -> None:
    cast, daemon, fault = cast_of(exclude_ns=300 * MS, pool_lag_tokens=0)
    cast.say(daemon, fault)
    cast.run(200)
    assert not cast.sent(m.PlanOrder)
    cast.run(400)
    assert brought_back(cast) == {"s": (8, "replica"), "t": (5, "replica")} and not cast.noted("excluded"), "all else that it has counts"

    cast, daemon, fault = cast_of(standby_ns=1000 * MS, pool_lag_tokens=0)
    daemon.ranks[R1]["rows"]["u"] = (3, 4)  # nobody else has heard of it
    cast.say(daemon, m.Report(INSTANCE, daemon.promise, daemon.name, daemon._holdings(), daemon.pending))
    for _ in range(4):
        assert not cast.sent(m.PlanOrder)
        cast.say(daemon, fault)
        cast.run(300)
    assert brought_back(cast) == {"s": (8, "replica"), "t": (5, "replica")} and not cast.noted("failed")
    assert "still dying" in cast.coordinator.history()[-1]["lost"]["u"]


def test_no_head_start_where_nobody_could_adopt_the_pool() -> None:
    cast = three_stages()
    daemon = cast.daemons["b"]
    daemon.__class__, daemon.standbys = Dying, []
    cast.daemons["c"].replicas[daemon.ranks[R1]["stream"]]["s"] = (9, 11)
    cast.run(100)
    cast.say(daemon, daemon.suspect())
    cast.drain()
    assert brought_back(cast) == {"s": (9, "replica"), "t": (5, "replica")}


def test_a_fleet_goes_on_elsewhere_at_once() -> None:
    """Nobody adopts anything there: places are beside the replicas."""
    cast = moving_world()
    a = cast.daemons["a"]
    a.__class__ = Dying
    began = cast.now
    cast.say(a, a.suspect(R0))
    cast.drain()
    resumed(cast)
    assert cast.now - began < 50 * MS
    dies_late = msgspec.structs.replace(a.suspect(R0), kind="died")
    cast.say(a, dies_late)
    cast.run(200)
    assert cast.epoch() == 1 and len(cast.emitter.resumes) == 1
    lose(cast)
    cast.run(100)
    assert cast.epoch() == 1, "what is said of the dead life again begins nothing"


def test_a_dying_process_is_no_survivor_of_another_ranks_loss() -> None:
    """Its daemon knows, the coordinator doesn't yet: it would be told to truncate itself."""
    cast = three_stages()
    daemon = cast.daemons["b"]
    daemon.__class__ = Dying
    daemon.suspect()
    a = cast.daemons["a"]
    cast.say(a, a.kill_rank(R0))
    cast.run(100)
    (plan, *_) = cast.sent(m.PlanOrder)
    assert [stream.rank for stream in plan.survivors] == [Rank(0, 2, 0)] and cast.emitter.resumes and cast.epoch() == 1


def test_a_suspect_is_no_dead_writer_until_it_is_seen() -> None:
    cast, daemon, _ = cast_of()
    current = cast.coordinator.known.rounds["i"]
    assert current.record.dead_writers == () and current.record.lost == (R1,)
    cast.say(daemon, daemon.dead()[0])
    cast.drain()
    assert cast.coordinator.known.rounds["i"].record.dead_writers == (R1,) and cast.epoch() == 1, "no second round for the same death"


def test_a_coordinator_that_dies_meanwhile_goes_on_with_the_same_round() -> None:
    for lag_tokens in (0, 64):
        for kill_after in range(1, 12):
            cast = three_stages(settings=Settings(pool_lag_tokens=lag_tokens))
            daemon = cast.daemons["b"]
            daemon.__class__ = Dying
            fault = daemon.suspect()
            cast.kill_after = len(cast.performed) + kill_after
            cast.say(daemon, fault)
            cast.drain()
            cast.say(daemon, fault)  # with the next heartbeat
            cast.run(200)
            if lag_tokens == 0:
                dies(cast, daemon)
            cast.run(1000)
            assert cast.deaths == (1 if kill_after < 7 else cast.deaths)
            assert cast.emitter.resumes and not cast.emitter.resumes[-1].error and cast.epoch() == 1, (lag_tokens, kill_after)


# ---- what a pool is worth ----


def worth(pool: dict, replica: dict, lag_tokens: int = 4, emitter_lives: bool = True, elsewhere: bool = False) -> int:
    """Of rank 0's pool on a, beside its replica on b; a standby on a, so that it could be adopted."""
    held = [Has("b", R0, replica, "replica")]
    more = {"lost": (R0,), "members": {R0: "a"}, "emitter_lives": emitter_lives}
    later = ask([Has("a", R0, pool, alive=False), *held], **more)
    return dying.gain(ask(held, **more), later, lag_tokens, emitter_lives, elsewhere)


@pytest.mark.parametrize(
    ("pool", "replica", "more", "wanted"),
    [
        ({"s": (9, 11)}, {"s": (9, 11)}, {}, dying.LITTLE),  # adopted, not copied
        ({"s": (9, 11)}, {"s": (5, 11)}, {}, dying.LITTLE),
        ({"s": (9, 11)}, {"s": (4, 11)}, {}, dying.MUCH),
        ({"s": (9, 11)}, {"s": (9, 5)}, {}, dying.LITTLE),  # a living emitter has the ids
        ({"s": (9, 20)}, {"s": (9, 11)}, {"emitter_lives": False}, dying.MUCH),
        ({"s": (9, 11), "t": (2, 3)}, {"s": (9, 11)}, {}, dying.MUCH),  # nobody else has heard of t
        ({"s": (9, 11), "t": (2, 3)}, {"s": (9, 11)}, {"elsewhere": True}, dying.LITTLE),  # its emitter begins it again
        ({"s": (9, 11), "t": (6, 7)}, {"s": (9, 11)}, {"elsewhere": True}, dying.MUCH),
        ({"s": (3, 4)}, {"s": (0, 4)}, {}, dying.MUCH),  # computed from its ids
        ({"s": (3, 4)}, {"s": (0, 4)}, {"elsewhere": True}, dying.LITTLE),
    ],
)
def test_what_a_pool_is_worth(pool: dict, replica: dict, more: dict, wanted: int) -> None:
    assert worth(pool, replica, **more) == wanted


def test_a_pool_that_makes_no_plan_is_worth_nothing() -> None:
    now = ask([Has("b", R0, {"s": (9, 11)}, "replica")], lost=(R0,), members={R0: "a"})
    assert dying.gain(now, Unplannable(("x",)), 0, True, False) == dying.NOTHING == dying.gain(now, now, 0, False, False)
