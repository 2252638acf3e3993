"""The coordinator and a death that is suspected first: the round begins at once, and nothing is planned before the node has seen it."""

from __future__ import annotations

import msgspec

from kvguard.core.known import Settings
from kvguard.format import messages as m
from kvguard.types import Rank
from tests.core.cast import MS, Cast, Daemon, three_stages

R1 = Rank(0, 1, 0)


class Awaiting(Daemon):
    """Its rank is dying: it answers a Fence when it is dead."""

    waits = False

    def hears(self, message) -> list:
        said = super().hears(message)
        return [] if self.waits and isinstance(message, m.Fence) else said

    def suspect(self) -> m.Fault:
        self.waits = True
        fault = self.kill_rank(R1)
        self.ranks[R1]["alive"] = True
        return msgspec.structs.replace(fault, kind="suspected", salvageable=False, since_ms=0.5)

    def dead(self) -> list:
        self.waits = False
        fault = self.kill_rank(R1)
        return [fault, m.Report("i", self.promise, self.name, self._holdings())]


def cast_of(exclude_ms: int = 500) -> tuple[Cast, Awaiting, m.Fault]:
    cast = three_stages(settings=Settings(exclude_ns=exclude_ms * MS))
    daemon = cast.daemons["b"]
    daemon.__class__ = Awaiting
    fault = daemon.suspect()
    cast.say(daemon, fault)
    cast.drain()
    return cast, daemon, fault


def test_the_round_begins_with_the_suspicion_and_the_plan_with_the_death() -> None:
    cast, daemon, _ = cast_of()
    assert cast.epoch() == 1 and len(cast.sent(m.Fence)) == 3 and not cast.sent(m.PlanOrder)
    for message in daemon.dead():
        cast.say(daemon, message)
    cast.drain()
    (resume,) = cast.emitter.resumes
    assert {entry.sequence: (entry.position, entry.rung) for entry in resume.sequences} == {"s": (9, "pool"), "t": (5, "pool")}
    assert resume.timing_ms["detect"] == 0.5 and not cast.noted("stale_fault")
    (record,) = cast.coordinator.history()
    assert "suspected" in record["reason"]


def test_a_node_that_says_that_it_waits_is_not_excluded() -> None:
    """Tearing down a large process takes longer than a report may."""
    cast, daemon, fault = cast_of(exclude_ms=300)
    for _ in range(8):
        cast.say(daemon, fault)
        cast.run(200)
    assert not cast.noted("excluded") and not cast.sent(m.PlanOrder)
    for message in daemon.dead():
        cast.say(daemon, message)
    cast.run(300)
    assert {entry.rung for entry in cast.emitter.resumes[-1].sequences} == {"pool"} and cast.epoch() == 1


def test_one_that_falls_silent_about_it_is() -> None:
    cast, daemon, fault = cast_of(exclude_ms=300)
    cast.say(daemon, fault)
    cast.run(600)
    assert [note.subject for note in cast.noted("excluded")] == ["i"]
    assert {entry.rung for entry in cast.emitter.resumes[-1].sequences} == {"replica"}


def test_a_suspect_is_no_dead_writer_until_it_is_seen() -> None:
    cast, daemon, _ = cast_of()
    current = cast.coordinator.known.rounds["i"]
    assert current.record.dead_writers == () and current.record.lost == (R1,)
    cast.say(daemon, daemon.dead()[0])
    cast.drain()
    assert cast.coordinator.known.rounds["i"].record.dead_writers == (R1,) and cast.epoch() == 1, "no second round for the same death"


def test_a_coordinator_that_dies_meanwhile_goes_on_with_the_same_round() -> None:
    for kill_after in range(1, 12):
        cast = three_stages()
        daemon = cast.daemons["b"]
        daemon.__class__ = Awaiting
        fault = daemon.suspect()
        cast.kill_after = len(cast.performed) + kill_after
        cast.say(daemon, fault)
        cast.drain()
        cast.say(daemon, fault)  # with the next heartbeat
        cast.run(200)
        for message in daemon.dead():
            cast.say(daemon, message)
        cast.run(1000)
        assert cast.deaths == (1 if kill_after < 7 else cast.deaths)
        assert cast.emitter.resumes and not cast.emitter.resumes[-1].error and cast.epoch() == 1, kill_after
