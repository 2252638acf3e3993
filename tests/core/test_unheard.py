"""The coordinator and ranks that died before any heartbeat told of them: attached, then died, and recovered like any other."""

from __future__ import annotations

import msgspec
import pytest

from kvguard.format import ledger
from kvguard.format import messages as m
from kvguard.format.ledger import HistoryRecord
from kvguard.types import NO_EPOCH, Epoch, Rank
from tests.core.cast import INSTANCE, Cast, Daemon, Emitter

R0, R1 = Rank(0, 0, 0), Rank(0, 1, 0)


def lone(standbys: int = 1, **more) -> tuple[Cast, Daemon]:
    """Node a without ranks, and an emitter that waits."""
    cast = Cast(**more)
    a = Daemon("a", standbys)
    cast.join(a)
    cast.drain()
    cast.connect(Emitter(1))
    cast.run(200)
    return cast, a


def lives_and_dies(a: Daemon) -> list:
    """What its daemon says of a rank that attached, committed and died between two heartbeats."""
    a.host(R0, {"s": (9, 11)})
    beat = a.beat()
    return [beat, a.kill_rank(R0)]


def assert_recovered(cast: Cast, a: Daemon) -> None:
    (resume,) = cast.emitter.resumes
    assert resume.epoch == Epoch(1, "c") and [(e.sequence, e.position, e.rung) for e in resume.sequences] == [("s", 9, "pool")] and not resume.error
    assert [(str(e.rank), e.node, e.endpoint) for e in resume.members] == [("0.0.0", "a", "spare 1000")]
    (record,) = cast.coordinator.history()
    assert "died: signal 9" in record["reason"] or "lost" in record["reason"]
    assert not cast.noted("stale_fault") or cast.noted("attached")


def test_attached_then_died():
    cast, a = lone()
    for message in lives_and_dies(a):
        cast.say(a, message)
    cast.run(300)
    assert_recovered(cast, a)
    assert cast.emitter.resumes[0].timing_ms["detect"] == 3.0


def test_the_death_is_all_that_is_left_to_tell():
    """The link was down meanwhile: the fault comes first, the rank is listed as lost."""
    cast, a = lone()
    _, fault = lives_and_dies(a)
    cast.say(a, fault)
    cast.run(300)
    assert [note.subject for note in cast.noted("stale_fault")] == ["i/0.0.0"], "nobody recovers a rank that he doesn't know"
    assert_recovered(cast, a)


@pytest.mark.parametrize("kill_after", range(1, 8))
def test_a_coordinator_that_dies_over_it_hears_it_again(kill_after):
    cast, a = lone()
    cast.kill_after = len(cast.performed) + kill_after
    for message in lives_and_dies(a):
        cast.say(a, message)
    cast.run(1000)
    assert cast.deaths == 1
    assert_recovered(cast, a)


def test_it_waits_for_a_standby_like_any_other():
    cast, a = lone(standbys=0)
    for message in lives_and_dies(a):
        cast.say(a, message)
    cast.run(300)
    assert not cast.emitter.resumes and "no standby fits" in cast.coordinator.status()["instances"][0]["reason"]
    a.standbys.append(1000)
    cast.run(300)
    assert_recovered(cast, a)


def test_what_is_left_of_an_epoch_that_is_over_is_no_attachment():
    """A store that was restored: the coordinator doesn't know the rank, the nodes have promised more than the dead life had."""
    cast, a = lone()
    lives_and_dies(a)
    a.ranks[R0]["fenced"], a.promise = True, Epoch(7, "c")
    cast.join(a)
    cast.run(500)
    assert cast.epoch() == 7 and not cast.sent(m.Fence) and INSTANCE not in cast.coordinator.known.membership.members
    assert [note.subject for note in cast.noted("stale_rank")] == ["i/0.0.0"]


def test_a_loss_during_a_recovery_counts():
    """Another rank of the instance, never heard of, dies while the first one is recovered."""
    cast, a = lone(standbys=2)
    a.host(R0, {"s": (9, 11)})
    cast.run(200)
    a.silent_parts.append("rank 0.0.0")
    cast.say(a, a.kill_rank(R0))
    cast.run(100)
    assert cast.sent(m.RebuildOrder)
    a.silent_parts.clear()
    second = a.host(Rank(0, 1, 0), {"s": (9, 11)}, life=2)
    a.ranks[Rank(0, 1, 0)]["epoch"] = NO_EPOCH
    fault = a.kill_rank(Rank(0, 1, 0))
    assert fault.stream == second
    cast.run(12_000)  # the first order is not answered any more: so long it is waited for
    assert cast.emitter.resumes and {str(e.rank) for e in cast.emitter.resumes[-1].members} == {"0.0.0", "0.1.0"}


def after_a_move(epoch: int) -> tuple[Cast, Daemon]:
    """Epoch 2 moved what rank 0 had elsewhere, and named its life; a's daemon is back since, with a rank that lives in `epoch`."""
    cast, a = lone()
    stream = a.host(R0, {})
    a.ranks[R0]["epoch"] = Epoch(epoch, "c")
    moved = HistoryRecord(INSTANCE, Epoch(2, "c"), "a node died", (R0,), {}, {}, {}, {}, {}, {}, 1, moved=1, ended=(stream,))
    cast.emitter.epoch = Epoch(2, "c")
    cast.store |= {f"history/{INSTANCE}/2": ledger.pack(moved), f"epoch/{INSTANCE}": ledger.pack(Epoch(2, "c"))}
    cast._begin()
    return cast, a


def test_a_life_that_had_nothing_and_took_up_the_newer_epoch_begins_in_it():
    """It was named among those that end; its daemon, which came back, found nothing committed. Nobody would ever end it, and nobody would know it."""
    cast, _ = after_a_move(epoch=2)
    cast.run(300)
    assert [note.subject for note in cast.noted("attached")] == ["i/0.0.0"] and not cast.noted("stale_rank") and cast.epoch() == 2


@pytest.mark.parametrize("rank", [R0, R1])
def test_a_life_of_an_excluded_node_ended_with_the_plan_that_did_not_know_it(rank):
    """Also as a rank that the plan didn't know at all, new since an earlier move: it was fenced, and no order would ever have let it go on."""
    cast, a = after_a_move(epoch=1)
    del a.ranks[R0]
    other = a.host(rank, {"s": (9, 11)}, life=2)
    a.ranks[rank]["epoch"], a.ranks[rank]["fenced"] = Epoch(1, "c"), True
    cast.run(300)
    assert not cast.noted("attached") and f"i/{rank}" in {note.subject for note in cast.noted("stale_rank")}
    assert other in {stream for resumed in cast.sent(m.Resumed) for stream in resumed.ended}, "so that its node ends it"


def replaced(scheduled: int, standbys: int = 0) -> tuple[Cast, Daemon]:
    """Two ranks without sequences so far; b dies with its daemon, is back, and another process attaches in its rank's place before anybody missed the first."""
    cast, a = lone(standbys=0)
    b = Daemon("b", 0)
    a.host(R0, {})
    b.host(R1, {})
    cast.emitter.scheduled = 0
    cast.join(b)
    cast.run(300)
    cast.emitter.scheduled = scheduled
    cast.run(200)
    cast.kill(b)
    b.incarnation, b.alive = 2, True
    b.host(R1, {}, life=2)
    b.standbys = [3000 + no for no in range(standbys)]
    cast.join(b)
    return cast, b


def test_work_may_be_on_its_way_to_a_rank_that_had_none_and_is_another_process_now():
    """The emitter has scheduled a step, which went to the one that died: without an epoch it would wait for it for ever."""
    cast, _ = replaced(scheduled=1, standbys=1)
    cast.run(1000)
    (resume,) = cast.emitter.resumes
    assert resume.epoch == Epoch(1, "c") and [(str(e.rank), e.endpoint) for e in resume.members] == [("0.0.0", "engine of 0.0.0"), ("0.1.0", "spare 3000")]
    assert "replaced" in cast.coordinator.history()[0]["reason"]


def test_the_emitter_of_an_idle_instance_hears_of_another_process_by_an_epoch():
    """What it has sent since it was last heard can't be known, and it dials whom its last resumption named. Nobody is lost, no standby is needed."""
    cast, _ = replaced(scheduled=0)
    cast.run(1000)
    (resume,) = cast.emitter.resumes
    assert resume.epoch == Epoch(1, "c") and [str(e.rank) for e in resume.members] == ["0.0.0", "0.1.0"] and not cast.sent(m.RebuildOrder)
    assert cast.coordinator.history()[0]["reason"] == "rank 0.1.0 on b is another process, with an empty pool"
    cast.run(1000)
    assert cast.epoch() == 1


def test_with_two_of_them_one_epoch_is_enough():
    """One heartbeat tells of both: what begins with the first knows the second."""
    cast, a = lone(standbys=0)
    cast.emitter.scheduled = 0
    for life in (1, 2):
        for rank in (R0, R1):
            a.host(rank, {}, life)
        cast.run(1000)
    assert cast.epoch() == 1 and len(cast.emitter.resumes) == 1 and len(cast.noted("attached")) == 4
    assert [str(e.rank) for e in cast.emitter.resumes[0].members] == ["0.0.0", "0.1.0"]


def test_without_an_emitter_there_is_nobody_to_tell():
    """Whoever is the next says hello, and that raises an epoch."""
    cast, a = lone(standbys=0)
    a.host(R0, {})
    cast.emitter.scheduled = 0
    cast.run(300)
    cast.kill(cast.emitter)
    cast.run(1500)
    a.host(R0, {}, life=2)
    cast.run(500)
    assert cast.epoch() == 0 and len(cast.noted("attached")) == 2
    cast.connect(Emitter(2))
    cast.run(500)
    assert cast.epoch() == 1 and len(cast.emitter.resumes) == 1


def idle(patient: bool = False) -> tuple[Cast, Daemon]:
    """One rank without sequences on a; an emitter that has nothing in flight, as far as it is known. `patient`: it may be silent for a minute."""
    cast, a = lone(standbys=0)
    a.host(R0, {})
    plain = cast.emitter.hello
    cast.emitter.hello = lambda: msgspec.structs.replace(plain(), silence_ms=60_000 if patient else 0)
    cast.connect(cast.emitter)
    cast.emitter.scheduled = 0
    cast.run(300)
    return cast, a


def assert_told(cast: Cast) -> None:
    cast.run(500)
    assert cast.epoch() == 1 and [str(e.rank) for e in cast.emitter.resumes[-1].members] == ["0.0.0"]
    assert "another process" in cast.coordinator.history()[0]["reason"]
    cast.run(1000)
    assert cast.epoch() == 1


def test_a_coordinator_that_was_restarted_tells_an_emitter_that_has_not_dialled_again_yet():
    """It knows the member and the emitter from its store alone; the emitter waits for a step of the process that is gone."""
    cast, a = idle()
    cast.emitter.alive = False
    cast._begin()
    a.host(R0, {}, life=2)
    cast.run(300)
    cast.emitter.alive, cast.emitter.scheduled = True, 1
    cast.connect(cast.emitter)
    assert_told(cast)


@pytest.mark.parametrize("again", ["heard", "dialled"])
def test_an_emitter_that_was_called_silent_hears_of_another_process_when_it_is_back(again):
    cast, a = idle()
    cast.emitter.alive = False
    cast.run(1500)
    a.host(R0, {}, life=2)
    cast.run(300)
    assert cast.epoch() == 0
    cast.emitter.alive, cast.emitter.scheduled = True, 1
    if again == "dialled":
        cast.connect(cast.emitter)
    assert_told(cast)


@pytest.mark.parametrize("cleanly", [False, True])
def test_a_rank_that_left_and_comes_again_is_told_to_an_emitter_that_may_wait_for_the_former_process(cleanly):
    """It was cut off, within its promise, when the rank left; what it had sent meanwhile went to nobody."""
    cast, a = idle(patient=True)
    cast.emitter.alive = False
    if cleanly:
        cast.say(a, m.Fault("a", a.ranks[R0]["stream"], a.ranks[R0]["incarnation"], "detached", "", False, 0.0))
    del a.ranks[R0]
    cast.run(3000)
    assert [note.subject for note in cast.noted("left")] == ["i/0.0.0"]
    a.host(R0, {}, life=2)
    cast.run(300)
    cast.emitter.alive, cast.emitter.scheduled = True, 1
    cast.connect(cast.emitter)
    assert_told(cast)


def test_an_emitter_that_was_heard_idle_since_has_nothing_to_hear():
    cast, a = idle()
    del a.ranks[R0]
    cast.run(3500)
    assert cast.noted("left")
    a.host(R0, {}, life=2)
    cast.run(1000)
    assert cast.epoch() == 0 and len(cast.noted("attached")) == 2


def test_what_began_and_ended_in_this_epoch_beside_the_rank_may_go():
    """Both attached while the coordinator was away, one after the other: nobody recovers the first, and its node would keep it mapped (seed 3991875266)."""
    cast, a = lone()
    a.host(R0, {}, life=2)
    cast.run(200)
    said = a.beat()
    first = msgspec.structs.replace(said.ranks[0], stream=said.ranks[0].stream._replace(pool=1), incarnation=7, state="lost", reason="died: signal 9")
    cast.say(a, msgspec.structs.replace(said, ranks=(first, *said.ranks)))
    cast.drain()
    assert [resumed.ended for resumed in cast.sent(m.Resumed)][-1:] == [(first.stream,)] and cast.epoch() == 0
