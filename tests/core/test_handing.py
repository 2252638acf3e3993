"""Handoffs and draining, decision by decision: what is refused, what is copied first, who gets the rank, what a restart or a death leaves."""

from __future__ import annotations

import msgspec
import pytest

from kvguard.core.effects import Persist, Send
from kvguard.core.events import Asked
from kvguard.core.known import Settings
from kvguard.format import messages as m
from kvguard.types import Rank
from tests.core.cast import INSTANCE, MS, Cast, Daemon, three_stages

R0, R1, R2 = (Rank(0, pp, 0) for pp in range(3))


def with_a_spare_node(**more) -> Cast:
    """Three stages on a, b, c, and d beside them with standbys."""
    cast = three_stages(**more)
    cast.join(Daemon("d", standbys=2))
    cast.run(300)
    return cast


def everything_is_at(cast: Cast, rank: Rank, *nodes: str) -> None:
    """The rank's daemon says that these have acknowledged everything; their stores have it."""
    home = next(daemon for daemon in cast.daemons.values() if rank in daemon.ranks and daemon.ranks[rank]["alive"])
    has = home.ranks[rank]
    has["whole"] = nodes
    for node in nodes:
        cast.daemons[node].replicas[has["stream"]] = dict(has["rows"])


def place_of(cast: Cast, rank: Rank) -> str:
    """Where it lives, as the coordinator knows it (a former life may still claim it)."""
    return cast.coordinator.known.membership.members[INSTANCE][rank].node


def last_handoff(cast: Cast) -> dict:
    return cast.coordinator.status()["handoffs"][-1]


def holders_said(cast: Cast, rank: Rank) -> list[str]:
    return [node for node, _ in [message for message in cast.sent(m.Assign) if message.rank == rank][-1].holders]


def node_of(cast: Cast, name: str) -> dict:
    return next(node for node in cast.coordinator.status()["nodes"] if node["node"] == name)


def end_process(cast: Cast, node: str, rank: Rank) -> None:
    """What the fence does to a rank that is given away."""
    cast.daemons[node].ranks.pop(rank, None)


# ---- handoff ----


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        ({"rank": "0.9.0", "to": "d"}, 4, "no such rank"), ({"rank": "x", "to": "d"}, 2, "dp.pp.tp"), ({"rank": "0.1.0", "to": "b"}, 4, "lives on b already"),
        ({"rank": "0.1.0", "to": "z"}, 4, "node z is unknown"), ({"rank": "0.1.0", "to": "a"}, 4, "no standby on a fits"), ({"rank": "0.1.0"}, 4, "unknown"),
    ],
)  # fmt: skip
def test_a_handoff_that_can_not_be_is_refused_with_its_reason(arguments, code, why):
    cast = with_a_spare_node()
    cast.daemons["a"].standbys = []
    cast.run(200)
    for dry in (True, False):
        answer = cast.ask("handoff", instance=INSTANCE, dry_run=dry, **arguments)
        assert (answer.code, why in answer.error) == (code, True), answer
    assert not cast.coordinator.status()["handoffs"] and cast.epoch() == 0


def test_refused_while_paused_recovering_drained_or_away():
    cast = with_a_spare_node()
    cast.ask("pause")
    assert "paused" in cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d").error
    cast.ask("unpause")
    cast.ask("drain", node="d")
    assert "drained by an operator" in cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d").error
    cast.ask("drain", node="d", undo=True)
    cast.kill(cast.daemons["d"])
    cast.run(1500)
    assert "node d is dead" in cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d").error


def test_a_dry_run_says_what_would_happen_and_does_nothing():
    cast = with_a_spare_node()
    before = len(cast.performed)
    body = cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d", dry_run=True).body
    assert (body["from"], body["to"], body["epoch"]) == ("b", "d", 1) and "replica first (held so far by c)" in body["does"]
    cast.run(1000)
    assert not [one for one in cast.performed[before:] if isinstance(one, Persist) or isinstance(one, Send) and isinstance(one.message, m.Assign)]


def test_it_is_copied_before_it_is_fenced_and_goes_where_it_was_told():
    cast = with_a_spare_node()
    number = cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d").body["handoff"]
    cast.run(1000)
    assert holders_said(cast, R1) == ["c", "d"], "the old holder stays"
    assert cast.epoch() == 0 and last_handoff(cast)["state"] == "copying"
    assert "another handoff" in cast.ask("handoff", instance=INSTANCE, rank="0.2.0", to="d").error
    everything_is_at(cast, R1, "c")
    cast.run(500)
    assert cast.epoch() == 0, "the target is what counts"
    everything_is_at(cast, R1, "c", "d")
    cast.run(1000)
    assert cast.epoch() == 1 and place_of(cast, R1) == "d"
    told = last_handoff(cast)
    assert (told["handoff"], told["state"], told["epoch"], told["lost"], told["sequences"]) == (number, "done", 1, [], 2), told
    (resume,) = cast.emitter.resumes
    assert {entry.sequence: (entry.position, entry.rung) for entry in resume.sequences} == {"s": (9, "replica"), "t": (5, "replica")}
    assert "handed off from b to d: ordered by an operator" in cast.coordinator.history()[-1]["reason"]
    end_process(cast, "b", R1)
    cast.run(500)
    assert cast.epoch() == 1 and "d" not in holders_said(cast, R1)


def test_a_target_that_holds_already_needs_no_copy():
    cast = with_a_spare_node()
    everything_is_at(cast, R1, "c")
    cast.run(200)
    cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="c")
    cast.run(500)
    assert cast.epoch() == 1 and place_of(cast, R1) == "c" and last_handoff(cast)["state"] == "done"


def test_a_target_that_dies_before_ends_it_and_nothing_was_fenced():
    cast = with_a_spare_node()
    cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d")
    cast.run(300)
    cast.kill(cast.daemons["d"])
    cast.run(2000)
    assert last_handoff(cast)["state"] == "failed" and "node d is dead" in last_handoff(cast)["reason"] and cast.noted("handoff_failed")
    assert cast.epoch() == 0 and place_of(cast, R1) == "b" and holders_said(cast, R1) == ["c"]


def test_a_target_that_never_has_everything_is_waited_for_no_longer_than_told():
    cast = with_a_spare_node(settings=Settings(handoff_ns=3_000 * MS))
    cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d")
    cast.run(2500)
    assert last_handoff(cast)["state"] == "copying"
    cast.run(1000)
    assert last_handoff(cast)["state"] == "failed" and "did not have everything within 3000 ms" in last_handoff(cast)["reason"]
    assert cast.epoch() == 0 and holders_said(cast, R1) == ["c"]


def test_a_standby_that_goes_before_ends_it():
    cast = with_a_spare_node()
    cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d")
    cast.daemons["d"].standbys = []
    cast.run(300)
    assert last_handoff(cast)["state"] == "failed" and "no standby on d fits" in last_handoff(cast)["reason"] and cast.epoch() == 0


def test_a_rank_that_dies_while_it_is_copied_is_an_ordinary_failover():
    cast = with_a_spare_node()
    cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d")
    cast.run(300)
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.run(500)
    assert last_handoff(cast)["state"] == "failed" and "lost" in last_handoff(cast)["reason"]
    assert cast.epoch() == 1 and place_of(cast, R1) == "b" and cast.emitter.resumes[-1].sequences[0].rung == "pool"


def test_a_target_that_fails_after_the_fence_leaves_the_rank_elsewhere_and_says_so():
    cast = with_a_spare_node()
    cast.daemons["d"].standbys = [4000]
    cast.run(200)
    cast.daemons["d"].errors["rank 0.1.0"] = "out of memory"
    cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d")
    everything_is_at(cast, R1, "c", "d")
    cast.run(3000)
    told = last_handoff(cast)
    assert told["state"] == "failed" and "instead of d" in told["reason"] and told["lost"] == []
    assert cast.epoch() == 2 and place_of(cast, R1) != "d" and not cast.emitter.resumes[-1].error


def test_a_coordinator_that_restarts_while_copying_gives_up_and_takes_the_extra_holder_back():
    cast = with_a_spare_node()
    cast.ask("handoff", instance=INSTANCE, rank="0.1.0", to="d")
    cast.run(300)
    assert holders_said(cast, R1) == ["c", "d"]
    cast._begin()
    cast.run(500)
    assert not cast.coordinator.status()["handoffs"] and cast.epoch() == 0 and holders_said(cast, R1) == ["c"]


def handed_off(kill_after: int | None) -> Cast:
    cast = with_a_spare_node()
    everything_is_at(cast, R1, "c", "d")
    cast.daemons["b"].ranks[R1]["whole"] = ()
    cast.run(200)
    cast.kill_after = None if kill_after is None else len(cast.performed) + kill_after
    cast.take(Asked(1, "handoff", {"instance": INSTANCE, "rank": "0.1.0", "to": "d"}))
    if cast.daemons["b"].ranks.get(R1, {}).get("alive"):
        cast.daemons["b"].ranks[R1]["whole"] = ("c", "d")
    cast.run(4000)
    return cast


def test_killed_between_any_two_effects_of_a_handoff_it_is_either_given_up_or_carried_out():
    whole = handed_off(None)
    assert place_of(whole, R1) == "d"
    fenced = 0
    for at in range(1, 60):
        cast = handed_off(at)
        if not cast.deaths:
            break  # it was over before
        went = cast.epoch()
        fenced += went
        assert went in (0, 1) and place_of(cast, R1) == ("d" if went else "b"), f"killed after effect {at}"
        if went:
            assert not cast.emitter.resumes[-1].error and {e.sequence: e.position for e in cast.emitter.resumes[-1].sequences} == {"s": 9, "t": 5}
        assert not [key for key in cast.store if key.startswith(("recovery", "resume"))]
    assert at > 10 and 0 < fenced < at


# ---- drain ----


def test_draining_is_refused_where_something_would_be_left_unprotected():
    cast = Cast()
    for name in "ab":
        cast.daemons[name] = Daemon(name, standbys=0)
    cast.daemons["a"].host(R0, {})
    for daemon in list(cast.daemons.values()):
        cast.join(daemon)
    cast.run(500)
    answer = cast.ask("drain", node="b")
    assert answer.code == 4 and "i/0.0.0 would have 0 of 1 replicas" in answer.error
    answer = cast.ask("drain", node="a", dry_run=True)
    assert answer.code == 4 and "no standby fits on another node" in answer.error
    assert cast.ask("drain", node="z").code == 4 and not [key for key in cast.store if key.startswith("drained")]


def test_draining_moves_replicas_then_ranks_and_lasts():
    cast = with_a_spare_node()
    for daemon in "ac":
        cast.daemons[daemon].standbys = []
    cast.run(200)
    answer = cast.ask("drain", node="b", dry_run=True)
    assert answer.body["ranks"] == [{"instance": INSTANCE, "rank": "0.1.0", "to": "d"}] and [one["rank"] for one in answer.body["replicas"]] == ["0.0.0"]
    assert not node_of(cast, "b")["drain"]
    cast.daemons["a"].ranks[R0]["holders"] = ("b", "d")
    assert not cast.ask("drain", node="b").error
    cast.run(300)
    assert holders_said(cast, R0) != ["b"] and "replicas are being placed elsewhere" in node_of(cast, "b")["reason"], "held there until the new one has it"
    assert node_of(cast, "b")["state"] == "alive" and node_of(cast, "b")["drain"] == "draining" and not cast.coordinator.status()["handoffs"]
    cast.daemons["a"].ranks[R0]["holders"] = ("d",)  # the former one has ended
    cast.run(300)
    assert last_handoff(cast)["state"] == "copying" and last_handoff(cast)["to"] == "d" and "is being handed off to d" in node_of(cast, "b")["reason"]
    everything_is_at(cast, R1, "d")
    cast.run(600)
    assert place_of(cast, R1) == "d" and last_handoff(cast)["state"] == "done"
    end_process(cast, "b", R1)
    cast.run(1000)
    assert node_of(cast, "b")["reason"] == "drained by an operator: empty" and node_of(cast, "b")["drain"] == "drained" and cast.noted("drained")
    assert all("b" not in holders_said(cast, rank) for rank in (R0, R1, R2))
    cast._begin()
    cast.run(500)
    assert node_of(cast, "b")["drain"] == "drained", "durable"
    assert cast.ask("drain", node="b", undo=True).body["was_drained"] is True and not node_of(cast, "b")["drain"]
    assert not [key for key in cast.store if key.startswith("drained")] and cast.ask("drain", node="b", undo=True).body["was_drained"] is False


def test_draining_is_refused_where_a_replica_has_no_room():
    cast = with_a_spare_node()
    beat, stream = cast.daemons["b"].beat, cast.daemons["a"].ranks[R0]["stream"]
    cast.daemons["b"].beat = lambda: msgspec.structs.replace(beat(), replicas=((stream, 2, 1000),))
    for name in "cd":
        plain = cast.daemons[name].beat
        cast.daemons[name].beat = lambda plain=plain: msgspec.structs.replace(plain(), arena_bytes=3500, arena_bytes_max=4000)
    cast.run(300)
    assert "has no room for the replica of i/0.0.0" in cast.ask("drain", node="b").error and not node_of(cast, "b")["drain"]


def test_undone_while_copying_nothing_is_fenced():
    cast = with_a_spare_node()
    cast.ask("drain", node="d")
    cast.run(300)
    assert node_of(cast, "d")["drain"] == "drained", "there was nothing on it"
    cast.ask("drain", node="d", undo=True)
    cast.ask("drain", node="b")
    cast.run(500)
    assert last_handoff(cast)["state"] == "copying"
    cast.ask("drain", node="b", undo=True)
    cast.run(1000)
    assert last_handoff(cast)["state"] == "failed" and "undone" in last_handoff(cast)["reason"] and cast.epoch() == 0 and place_of(cast, R1) == "b"


def test_a_drained_node_keeps_what_nobody_else_can_take():
    cast = three_stages(emitter=False)
    cast.join(Daemon("d", standbys=0))
    cast.run(300)
    cast.daemons["a"].ranks[R0]["holders"] = ("b", "d")
    cast.ask("drain", node="b")
    assert holders_said(cast, R0) != ["b"]
    for name in "cd":
        cast.kill(cast.daemons[name])
    cast.run(7000)
    member = cast.coordinator.known.membership.members[INSTANCE][R0]
    assert member.holders == ("b",), "rather there than nowhere"


def test_a_failover_prefers_a_node_that_is_not_drained():
    cast = with_a_spare_node()
    cast.ask("drain", node="d")
    cast.run(200)
    cast.kill(cast.daemons["b"])
    cast.run(2500)
    assert cast.emitter.resumes and place_of(cast, R1) in "ac"


def test_paused_says_what_it_would_have_done():
    cast = three_stages()
    cast.ask("pause")
    cast.say(cast.daemons["b"], cast.daemons["b"].kill_rank(R1))
    cast.run(500)
    status = cast.coordinator.status()
    (held,) = status["held"]
    assert held["ranks"] == ["0.1.0"] and held["epoch"] == 1 and "died" in held["reason"]
    assert status["instances"][0]["reason"].startswith("paused: would raise the epoch to 1 and recover 0.1.0")
    cast.ask("unpause")
    cast.run(300)
    assert not cast.coordinator.status()["held"] and "held while paused" in cast.coordinator.history()[-1]["reason"]
