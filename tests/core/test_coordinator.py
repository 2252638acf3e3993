"""The coordinator against a cast of nodes and an emitter: every kind of loss, every phase cut short, every bound."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.core.effects import Persist, Send
from kvguard.core.events import Arrived, Tick
from kvguard.core.known import Settings
from kvguard.format import messages as m
from kvguard.types import NO_EPOCH, Epoch, Rank, StreamId
from tests.core.cast import INSTANCE, MS, Cast, Daemon, Emitter, three_stages

R0, R1, R2 = (Rank(0, pp, 0) for pp in range(3))


def states(cast: Cast) -> dict:
    return {row["rank"]: (row["node"], row["state"]) for row in cast.coordinator.status()["ranks"] if row["rank"]}


def test_start_raises_nothing_and_assigns_round_the_ring():
    cast = three_stages()
    assert cast.epoch() == 0 and not cast.sent(m.Fence) and not cast.sent(m.Resume)
    assert {str(a.rank): [node for node, _ in a.holders] for a in cast.sent(m.Assign)} == {"0.0.0": ["b"], "0.1.0": ["c"], "0.2.0": ["a"]}
    assert cast.emitter.welcomes[-1].recovering is False and [str(e.rank) for e in cast.emitter.welcomes[-1].members] == ["0.0.0", "0.1.0", "0.2.0"]
    assert cast.coordinator.status()["schema"] == "kvguard.status/1"


def test_process_death_adopts_the_pool():
    cast = three_stages()
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.drain()
    (resume,) = cast.emitter.resumes
    assert resume.epoch == Epoch(1, "c") and {e.sequence: (e.position, e.rung) for e in resume.sequences} == {"s": (9, "pool"), "t": (5, "pool")}
    assert resume.timing_ms["detect"] == 3.0 and set(resume.timing_ms) == {"detect", "fence", "plan", "restore", "total"}
    assert [(str(e.rank), e.node, e.endpoint) for e in resume.members][1] == ("0.1.0", "b", "spare 2000")
    (record,) = cast.coordinator.history()
    assert record["epoch"] == 1 and record["rungs"] == {"s": "pool", "t": "pool"} and record["error"] == "" and "died" in record["reason"]
    cast.run(300)
    assert not [key for key in cast.store if key.startswith(("recovery", "resume"))], "nothing is pending any more"


def test_another_sequence_of_the_name_is_noted_and_what_was_decided_survives_a_restart():
    cast = three_stages()
    for daemon in cast.daemons.values():
        daemon.births = {stream: 1 if stream.rank == R1 else 2 for stream in (*daemon.replicas, *(has["stream"] for has in daemon.ranks.values()))}
    cast.kill(cast.daemons["b"])
    cast.run(3000)
    (resume,) = cast.emitter.resumes
    assert {e.sequence: (e.position, e.rung) for e in resume.sequences} == {"s": (0, "tokens"), "t": (0, "tokens")}
    assert sorted({note.subject for note in cast.noted("other_life")}) == ["i s", "i t"]
    assert cast.coordinator.known.births == {INSTANCE: {"s": 2, "t": 2}}
    cast._begin()
    assert cast.coordinator.known.births == {INSTANCE: {"s": 2, "t": 2}}


def test_durable_before_it_is_said():
    cast = three_stages()
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.drain()
    told: dict[str, int] = {}
    for at, effect in enumerate(cast.performed):
        name = effect.key if isinstance(effect, Persist) else type(effect.message).__name__ if isinstance(effect, Send) else ""
        told.setdefault(name, at)
    assert told["recovery/i"] < told["epoch/i"] < told["Fence"] < told["PlanOrder"] < told["RebuildOrder"] < told["resume/i"] < told["Resume"]
    planned = [at for at, effect in enumerate(cast.performed) if isinstance(effect, Persist) and effect.key == "recovery/i"][1]
    assert planned < told["PlanOrder"]


def test_node_death_is_told_within_bounds_and_goes_to_the_holders_node():
    cast = three_stages()
    died = cast.now
    cast.kill(cast.daemons["b"])
    while not cast.noted("node") or not cast.sent(m.Fence):
        cast.run(50)
        assert cast.now - died <= 1500 * MS, "I7: detection has a bound"
    cast.run(300)
    (resume,) = cast.emitter.resumes
    assert {e.sequence: (e.position, e.rung) for e in resume.sequences} == {"s": (8, "replica"), "t": (5, "replica")}
    assert states(cast)["0.1.0"][0] == "c" and 900 <= resume.timing_ms["detect"] <= 1500
    unpinned = cast.daemons["a"].dropped + cast.daemons["c"].dropped
    assert StreamId(INSTANCE, R1, 1) in unpinned, "the new life is protected elsewhere"
    holders = [a for a in cast.sent(m.Assign) if a.rank == R1][-1].holders
    assert [node for node, _ in holders] == ["a"], "neither the dead node nor its own"


def test_daemon_gone_is_not_node_gone():
    cast = three_stages()
    cast.kill(cast.daemons["b"])
    for _ in range(60):
        cast.emitter.progress += 1
        cast.run(50)
    assert not cast.sent(m.Fence) and states(cast)["0.1.0"] == ("b", "unprotected")
    cast.daemons["b"].alive, cast.daemons["b"].incarnation = True, 2
    cast.join(cast.daemons["b"])
    cast.run(3000)
    assert not cast.sent(m.Fence) and states(cast)["0.1.0"][1] == "protected", "the engine re-attached to its new daemon"


def test_idle_waits_and_work_decides():
    cast = three_stages()
    cast.emitter.scheduled = 0
    cast.run(100)
    cast.kill(cast.daemons["b"])
    cast.run(4000)
    assert not cast.sent(m.Fence)
    assert next(n for n in cast.coordinator.status()["nodes"] if n["node"] == "b")["state"] == "suspect"
    cast.emitter.scheduled = 1
    cast.run(1500)
    assert cast.epoch() == 1 and len(cast.emitter.resumes) == 1


def test_a_restarted_node_without_its_ranks_lost_them():
    cast = three_stages()
    reborn = Daemon("b")
    reborn.incarnation, reborn.replicas = 2, {}
    cast.kill(cast.daemons["b"])
    cast.join(reborn)
    cast.run(1500)
    assert not cast.sent(m.Fence), "the grace period lasts"
    cast.run(1500)
    assert cast.epoch() == 1 and len(cast.emitter.resumes) == 1 and "re-attach" in cast.coordinator.history()[0]["reason"]


def test_a_late_loop_holds_its_judgement():
    cast = three_stages()
    cast.now += 5_000 * MS
    cast.take(Tick(4_900 * MS))
    assert not cast.sent(m.Fence) and not cast.noted("emitter")
    cast.run(500)
    assert not cast.sent(m.Fence) and all(node["state"] == "alive" for node in cast.coordinator.status()["nodes"])
    cast.now += 5_000 * MS
    cast.queue.append(Arrived(cast.daemons["a"].link, cast.daemons["a"].beat()))
    cast.run(500)
    assert not cast.sent(m.Fence), "also when frames come before the tick"


def test_a_clean_detach_is_no_failure():
    cast = three_stages()
    has = cast.daemons["b"].ranks.pop(R1)
    cast.say(cast.daemons["b"], m.Fault("b", has["stream"], has["incarnation"], "detached", "bye", False, 0.0))
    cast.run(3000)
    assert not cast.sent(m.Fence) and "0.1.0" not in states(cast)


def test_the_first_live_rank_keeps_its_place():
    cast = three_stages()
    cast.daemons["c"].host(R1, {"x": (1, 2)}, life=7)
    cast.run(500)
    assert len(cast.noted("duplicate_rank")) == 1 and cast.epoch() == 0
    claims = {rank["node"]: rank for rank in cast.coordinator.status()["ranks"] if rank["rank"] == "0.1.0"}
    assert claims["b"]["state"] == "protected" and claims["c"]["state"] == "unprotected" and "lives on b" in claims["c"]["reason"], "loud in the status"
    cast.daemons["c"].ranks.pop(R1)
    cast.run(3000)
    assert [rank["node"] for rank in cast.coordinator.status()["ranks"] if rank["rank"] == "0.1.0"] == ["b"]


def test_emitter_death_keeps_everything_in_the_pools():
    cast = three_stages()
    cast.kill(cast.emitter)
    cast.run(1500)
    assert cast.epoch() == 1 and not cast.emitter.resumes
    cast.connect(Emitter(2))
    cast.run(200)
    (resume,) = cast.emitter.resumes
    assert cast.epoch() == 1, "the Resume was waiting: nobody had heard it"
    assert {e.sequence: (e.position, e.rung, e.known.ids) for e in resume.sequences} == {"s": (9, "pool", bytes(44)), "t": (5, "pool", bytes(28))}
    cast.connect(Emitter(3))
    cast.run(200)
    assert cast.epoch() == 2 and len(cast.emitter.resumes) == 1, "a newer emitter ends the session of the former"
    cast.connect(Emitter(2))
    cast.run(200)
    assert cast.epoch() == 2 and not cast.emitter.resumes and cast.noted("stale_emitter"), "one that was replaced doesn't come back by dialling again"


def test_no_standby_waits_for_one_then_fails_in_so_many_words():
    cast = three_stages(settings=Settings(standby_ns=5_000 * MS))
    for daemon in cast.daemons.values():
        daemon.standbys = []
    cast.run(200)
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.run(1000)
    assert states(cast)["0.1.0"][1] == "recovering" and "no standby fits" in cast.coordinator.status()["instances"][0]["reason"]
    cast.daemons["c"].standbys = [77]
    cast.run(300)
    assert not cast.emitter.resumes[-1].error and states(cast)["0.1.0"][0] == "c"
    cast.daemons["c"].standbys = []
    cast.say(cast.daemons["c"], cast.daemons["c"].kill_rank(R1))
    cast.run(6000)
    assert "no standby fits" in cast.emitter.resumes[-1].error and "Try:" in cast.emitter.resumes[-1].error
    assert cast.coordinator.history()[-1]["error"] and states(cast)["0.1.0"][1] == "lost"


@pytest.mark.parametrize("how", ["error", "silence", "death"])
def test_a_replacement_that_fails_is_gone_round(how):
    cast = three_stages(settings=Settings(restore_ns=2_000 * MS))
    b = cast.daemons["b"]
    {"error": lambda: b.errors.__setitem__("rank 0.1.0", "out of memory"), "silence": lambda: b.silent_parts.append("rank 0.1.0"), "death": lambda: None}[how]()
    if how == "death":
        cast.daemons["a"].silent_parts.append("rank 0.0.0")
    cast.say(b, b.kill_rank(R1))
    cast.run(200)
    if how == "death":
        cast.daemons["a"].silent_parts.clear()
        cast.say(b, b.kill_rank(R1))
    cast.run(4000)
    assert cast.epoch() == 2 and cast.emitter.resumes[-1].error == "" and states(cast)["0.1.0"][0] == "c", "the other standby got it"
    assert cast.coordinator.history()[-1]["attempts"] == 2


def test_a_further_loss_begins_a_new_round():
    cast = three_stages()
    cast.daemons["a"].silent_parts.append("rank 0.0.0")
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.run(200)
    cast.daemons["a"].silent_parts.clear()
    cast.say(cast.daemons["c"], cast.daemons["c"].kill_rank(R2))
    cast.run(500)
    assert cast.epoch() == 2 and [r.epoch.counter for r in cast.emitter.resumes] == [2]
    assert {rank: node for rank, (node, _) in states(cast).items()} == {"0.0.0": "a", "0.1.0": "b", "0.2.0": "c"}


def test_a_silent_node_is_excluded_durably_and_must_promise_when_back():
    cast = three_stages(settings=Settings(exclude_ns=500 * MS))
    a, heard = cast.daemons["a"], []
    a.hears = lambda message: heard.append(message) or []
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.run(1000)
    (note,) = cast.noted("excluded")
    assert note.reason.endswith("from a") and len(cast.emitter.resumes) == 1
    placed = {rank: node for rank, (node, _) in states(cast).items()}
    assert placed["0.0.0"] in "bc" and placed["0.1.0"] != "a", "what the excluded node had is brought back elsewhere"
    assert cast.coordinator.history()[-1]["ranks"] == ["0.0.0", "0.1.0"]
    del a.hears
    a.incarnation, a.standbys, before = 2, [], len(cast.performed)
    cast.join(a)
    cast.run(500)
    assert a.promise.counter == 1 and cast.epoch() == 1, "it promises before anything else, and raises nothing"
    assert not [effect for effect in cast.performed[before:] if isinstance(effect, Send) and isinstance(effect.message, m.PlanOrder)]


def test_a_plan_reaches_an_excluded_node_that_is_back_in_time():
    cast = three_stages()
    cast.daemons["c"].silent_parts.append("rank 0.2.0")
    cast.kill(cast.daemons["b"])
    cast.run(1500)
    assert cast.coordinator.status()["instances"][0]["reason"].startswith("planned")
    b = Daemon("b")
    b.incarnation = 2
    b.silent_parts = ["holders"]
    cast.join(b)
    cast.drain()
    assert b.promise.counter == 1 and b.plan is not None and b.plan.epoch.counter == 1, "fenced, then cut"
    assert cast.noted("stale_report"), "its copies don't count any more"
    cast.daemons["c"].silent_parts.clear()
    cast.join(cast.daemons["c"])
    cast.run(300)
    assert [resume.epoch.counter for resume in cast.emitter.resumes] == [1]


def test_flapping_is_slowed_and_bounded():
    cast = three_stages(settings=Settings(failovers_max=5, backoff_free=2, backoff_ns=200 * MS))
    b = cast.daemons["b"]
    for round_ in range(6):
        b.standbys = [3000 + round_]
        cast.run(200)
        cast.say(b, b.kill_rank(R1))
        cast.run(3000)
    assert "flaps" in cast.emitter.resumes[-1].error and len([r for r in cast.emitter.resumes if not r.error]) == 5
    fences = [h["timing_ms"]["fence"] for h in cast.coordinator.history() if not h["error"]]
    assert fences[0] < 50 and fences[-1] >= 800, "back-off doubles"


def test_an_old_writer_that_nobody_can_vouch_for_ends_explicitly():
    cast = three_stages(settings=Settings(seal_ns=3_000 * MS))
    cast.emitter.hears = lambda message: cast.emitter.resumes.append(message) or [] if isinstance(message, m.Resume) else []
    cast.kill(cast.daemons["b"], torn=False)
    cast.kill(cast.daemons["c"], torn=False)
    cast.run(3000)
    assert "may acknowledge rank 0.1.0" in cast.coordinator.status()["instances"][0]["reason"]
    cast.run(3000)
    assert "could still be acknowledged" in cast.emitter.resumes[-1].error


def test_a_restored_store_does_not_rewind():
    cast = three_stages()
    for daemon in cast.daemons.values():
        daemon.promise = Epoch(41, "older")
    cast.emitter.epoch = Epoch(41, "older")
    cast._begin()
    cast.run(200)
    assert cast.epoch() == 41 and not cast.sent(m.Fence), "starting raises nothing"
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.drain()
    assert cast.sent(m.Fence)[0].epoch == Epoch(42, "c")


def test_pause_holds_back_and_unpause_goes_on():
    cast = three_stages()
    assert cast.ask("pause").body["paused"] is True
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.run(500)
    assert not cast.sent(m.Fence) and "would raise the epoch to 1" in cast.noted("paused")[0].reason and len(cast.noted("paused")) == 1
    cast.ask("unpause")
    cast.run(100)
    assert cast.epoch() == 1 and len(cast.emitter.resumes) == 1


def test_failover_on_order():
    cast = three_stages()
    assert cast.ask("failover", instance=INSTANCE, rank="0.1.0", dry_run=True).body["epoch"] == 1 and cast.epoch() == 0
    assert cast.ask("failover", instance=INSTANCE, rank="0.9.0").code == 4 and cast.ask("failover", instance=INSTANCE, rank="x").code == 2
    assert cast.ask("dance").code == 2
    assert cast.ask("failover", instance=INSTANCE, rank="0.1.0").error == ""
    cast.run(100)
    assert states(cast)["0.1.0"][0] == "c" and cast.emitter.resumes[-1].sequences[0].rung == "replica"


def test_a_former_life_that_is_fenced_on_the_same_node_is_no_new_loss():
    cast = three_stages()
    for name in "ac":
        cast.daemons[name].standbys = []
    cast.run(200)
    old = {**cast.daemons["b"].ranks[R1], "fenced": True}
    cast.ask("failover", instance=INSTANCE, rank="0.1.0")
    cast.drain()
    b = cast.daemons["b"]
    fresh = b.ranks[R1]
    b.ranks = {Rank(0, 1, 0): fresh, Rank(9, 9, 9): old}  # the fenced process still is there, under its old stream
    cast.run(1000)
    assert cast.epoch() == 1 and states(cast)["0.1.0"][0] == "b" and len(cast.noted("stale_rank")) == 1


def test_a_rank_whose_daemon_was_restarted_meanwhile_is_not_lost_for_want_of_a_standby():
    """Another node dies, and the report of the restarted daemon is ahead of its own rank's return: what it reports then counts."""
    cast = three_stages()
    for name in "ac":
        cast.daemons[name].standbys = []
    a = cast.daemons["a"]
    cast.daemons["c"].standbys = [5001]
    cast.run(200)
    cast.kill(cast.daemons["b"])
    cast.run(900)
    away, a.ranks = a.ranks, {}
    while not cast.noted("fenced"):
        cast.run(50)
    cast.run(500)
    assert cast.noted("unplannable") and not cast.emitter.resumes
    a.ranks = away
    cast.say(a, m.Report(INSTANCE, a.promise, "a", a._holdings()))
    cast.run(500)
    (resume,) = cast.emitter.resumes
    assert not resume.error and [entry.node for entry in resume.members] == ["a", "c", "c"]


def test_a_node_that_comes_while_a_round_waits_for_a_standby_brings_one():
    """Long after the deadline of those that were there at the fence: it has its own, it isn't excluded before it can answer."""
    cast = three_stages()
    for name in "ac":
        cast.daemons[name].standbys = []
    cast.run(200)
    cast.kill(cast.daemons["b"])
    cast.run(6000)
    assert cast.noted("unplannable") and not cast.emitter.resumes
    cast.join(Daemon("d"))
    cast.run(500)
    (resume,) = cast.emitter.resumes
    assert not resume.error and [entry.node for entry in resume.members] == ["a", "d", "c"] and not cast.noted("excluded")


def test_a_node_that_comes_late_and_never_answers_is_excluded_all_the_same():
    cast = three_stages()
    for name in "ac":
        cast.daemons[name].standbys = []
    cast.run(200)
    cast.kill(cast.daemons["b"])
    cast.run(6000)
    mute = Daemon("d")
    mute.hears = lambda message: []
    cast.join(mute)
    cast.daemons["c"].standbys = [5001]
    cast.run(1500)
    assert not cast.emitter.resumes and not cast.noted("excluded")
    cast.run(1000)
    (resume,) = cast.emitter.resumes
    assert not resume.error and [entry.node for entry in resume.members] == ["a", "c", "c"] and cast.noted("excluded")


def test_an_excluded_node_that_answers_again_begins_a_round_that_counts_it():
    """Its rank lives, and is lost only because the node was away: the round that excluded it would wait for a standby until it failed."""
    cast = three_stages()
    for name in "ac":
        cast.daemons[name].standbys = []
    cast.run(200)
    a = cast.daemons["a"]
    hears, a.hears = a.hears, lambda message: []  # beats, and answers nothing
    cast.kill(cast.daemons["b"])
    cast.daemons["c"].standbys = [5001]
    cast.run(6000)
    assert cast.noted("excluded") and cast.noted("unplannable") and not cast.emitter.resumes
    a.hears = hears
    fence = cast.sent(m.Fence)[-1]
    for answer in a.hears(fence):
        cast.say(a, answer)
    cast.run(500)
    (resume,) = cast.emitter.resumes
    assert not resume.error and [entry.node for entry in resume.members] == ["a", "c", "c"] and resume.epoch.counter == fence.epoch.counter + 1


def test_a_former_life_that_slept_through_the_recovery_is_ended():
    """It would hold its memory for ever, fenced, for nobody."""
    cast = three_stages()
    b = cast.daemons["b"]
    cast.kill(b)
    while not cast.emitter.resumes:
        cast.run(50)
    cast.run(300)
    b.alive = True
    cast.join(b)
    told = []
    b.hears = lambda message: told.append(message) or []
    cast.run(300)
    ends = [message for message in told if isinstance(message, m.Resumed) and message.ended]
    assert ends and ends[0] == m.Resumed(INSTANCE, Epoch(1, "c"), (), (StreamId(INSTANCE, R1, 1),)) and cast.epoch() == 1


def test_former_lives_stay_until_the_new_one_has_something_acknowledged():
    cast = three_stages()
    cast.kill(cast.daemons["b"])
    while not cast.emitter.resumes:
        cast.run(50)
    cast.daemons["c"].ranks[R1]["looked"] = False
    cast.run(500)
    assert not cast.daemons["c"].dropped, "nothing unprotected, because nobody has looked yet"
    cast.daemons["c"].ranks[R1]["looked"] = True
    cast.run(300)
    assert cast.daemons["c"].dropped == [StreamId(INSTANCE, R1, 1)]


def test_rank_and_holder_together_need_the_emitters_word_and_fall_to_the_tokens():
    cast = three_stages()
    cast.daemons["a"].standbys = [5001, 5002]
    cast.run(100)
    cast.kill(cast.daemons["b"])
    cast.kill(cast.daemons["c"])
    cast.run(2500)
    (resume,) = [resume for resume in cast.emitter.resumes if resume.sequences]
    assert {e.sequence: (e.position, e.rung) for e in resume.sequences} == {"s": (0, "tokens"), "t": (0, "tokens")} and not resume.error


def test_nobody_speaks_for_another_node():
    cast = three_stages()
    cast.queue.append(Arrived(cast.daemons["a"].link, cast.daemons["b"].kill_rank(R1)))
    cast.daemons["b"].ranks[R1]["alive"] = True
    cast.queue.append(Arrived("in:stranger", m.Report(INSTANCE, NO_EPOCH, "b", ())))
    cast.run(300)
    assert cast.epoch() == 0 and len(cast.noted("refused")) == 2


def strike(cast: Cast, kind: str) -> None:
    if kind == "rank":
        if cast.daemons["b"].alive:
            cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    elif kind == "node":
        cast.kill(cast.daemons["b"])
    else:
        cast.kill(cast.emitter)
        cast.run(1300)
        cast.connect(Emitter(2))
    cast.run(1500)


def effects_of(kind: str) -> tuple[int, int]:
    cast = three_stages()
    first = len(cast.performed)
    strike(cast, kind)
    return first, len(cast.performed)


BOUNDS = {kind: effects_of(kind) for kind in ("rank", "node", "emitter")}


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(sorted(BOUNDS)), st.data())
def test_killed_between_any_two_effects_it_ends_the_same(kind, data):
    ends_the_same(kind, data.draw(st.integers(*BOUNDS[kind])))


@pytest.mark.parametrize("kind", sorted(BOUNDS))
def test_killed_between_any_two_effects_of_a_recovery(kind):
    first, last = BOUNDS[kind]
    for at in range(first, last):
        ends_the_same(kind, at)


def ends_the_same(kind: str, at: int) -> None:
    cast = three_stages()
    cast.kill_after = at
    strike(cast, kind)
    cast.run(6000)
    assert cast.emitter.resumes, f"{kind}, killed after effect {at}: never resumed; {cast.coordinator.status()['instances']}"
    last = cast.emitter.resumes[-1]
    assert last.error == "" and cast.emitter.epoch == last.epoch
    expected = {"rank": {"s": 9, "t": 5}, "node": {"s": 8, "t": 5}, "emitter": {"s": 9, "t": 5}}[kind]
    assert {e.sequence: e.position for e in last.sequences} == expected
    assert cast.epoch() == last.epoch.counter and cast.epoch() <= (2 if kind == "emitter" else 1), "the same recovery, the same epoch"
    assert not [key for key in cast.store if key.startswith(("recovery", "resume"))]
    fences = [message.epoch for message in cast.sent(m.Fence)]
    assert fences == sorted(fences), "I3"
