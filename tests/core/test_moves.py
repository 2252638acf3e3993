"""Sequences that move: plans with places, placement beside hosts, rounds that don't wait for a standby, a coordinator that dies at every point of a move."""

from __future__ import annotations

import json
import types

import msgspec
import pytest

from kvguard.core.effects import CarryPlan, KillProcess, OrderRestore
from kvguard.core.events import Arrived, StreamAttached
from kvguard.core.known import Settings
from kvguard.core.local import LocalStream
from kvguard.core.moving import Host
from kvguard.core.orders import Orders
from kvguard.core.placement import Seat, place
from kvguard.core.recovery import Unplannable
from kvguard.errors import BadFrame
from kvguard.format import ledger, moves
from kvguard.format import messages as m
from kvguard.types import Epoch, MovedToken, Rank, Rung, StreamId
from tests.core.cast import INSTANCE, MS, Cast, Daemon, Emitter
from tests.core.test_recovery import R0, R1, R2, Has, ask, column

SECRET = b"s" * moves.SECRET_BYTES
R10 = Rank(1, 0, 0)
AT_B, AT_D = Host("j", 0, (((0, 0), "b"),)), Host("k", 0, (((0, 0), "d"),))


def moved(held, hosts, members=None, lost=(R0,), **more):
    return ask(held, lost=lost, members=members or {R0: "a"}, standbys=(), moves=True, hosts=tuple(hosts), emitter_lives=True, **more)


# ---- plans ----


def test_without_moves_it_waits_and_with_moves_it_names_every_place_that_has_all_of_it():
    held = [Has("b", R0, {"s": (8, 11)}, "replica"), Has("d", R0, {"s": (9, 11), "t": (4, 5)}, "replica")]
    assert isinstance(ask(held, lost=(R0,), members={R0: "a"}, standbys=()), Unplannable)
    answer = moved(held, [AT_B, AT_D])
    assert column(answer, "positions") == {"s": 9, "t": 4} and column(answer, "rungs") == {"s": "replica", "t": "replica"}
    assert column(answer, "places") == {"s": ((R0, "d"),), "t": ((R0, "d"),)}
    assert answer.order.moved == (R0,) and answer.order.rebuilds == () and answer.order.survivors == () and not answer.order.secret
    assert answer.former == (StreamId(INSTANCE, R0, 1),) and "another instance" in answer.order.explanations[0]
    both = moved([Has("b", R0, {"s": (9, 11)}, "replica"), held[1]], [AT_B, AT_D])
    assert column(both, "places")["s"] == ((R0, "b"), (R0, "d"))


def test_a_place_is_one_instance_with_every_rank():
    """Stage 0 here and stage 1 there are two halves that no engine can go on with."""
    there = {R0: "a", R1: "b"}
    j, k = Host("j", 0, (((0, 0), "c"), ((1, 0), "d"))), Host("k", 0, (((0, 0), "e"), ((1, 0), "f")))
    held = [Has("c", R0, {"s": (9, 9)}, "replica"), Has("d", R1, {"s": (5, 9)}, "replica"), Has("f", R1, {"s": (9, 9)}, "replica")]
    answer = moved(held, [j, k], there, lost=(R0, R1))
    assert column(answer, "positions") == {"s": 5} and column(answer, "places") == {"s": ((R0, "c"), (R1, "d"))}


def test_the_dead_pool_counts_where_a_host_is_and_else_as_the_last_resort():
    dead, replica = Has("a", R0, {"s": (12, 12)}, alive=False), Has("b", R0, {"s": (9, 12)}, "replica")
    beside = moved([dead, replica], [Host("j", 0, (((0, 0), "a"),)), AT_B])
    assert column(beside, "positions") == {"s": 12} and column(beside, "rungs") == {"s": "pool"} and column(beside, "places") == {"s": ((R0, "a"),)}
    elsewhere = moved([dead, replica], [AT_B])
    assert column(elsewhere, "positions") == {"s": 9} and column(elsewhere, "places") == {"s": ((R0, "b"),)}, "a host that lives before a memory that nobody serves"
    alone = moved([dead, replica], [])
    assert column(alone, "positions") == {"s": 12} and column(alone, "places") == {"s": ((R0, "a"),)} and "started again" in alone.order.explanations[0]


def test_a_replica_without_a_host_beside_it_is_sent_to_one():
    answer = moved([Has("c", R0, {"s": (9, 11)}, "replica")], [AT_B])
    assert answer.order.transfers == (("c", "b", "tcp://b", StreamId(INSTANCE, R0, 1)),)
    assert column(answer, "positions") == {"s": 9} and column(answer, "places") == {"s": ((R0, "b"),)}


def test_ids_alone_move_too_and_other_dps_go_on():
    members = {R0: "a", R10: "c"}
    held = [Has("b", R0, {"s": (0, 5)}, "replica"), Has("c", R10, {"t": (7, 8)})]
    answer = moved(held, [AT_B], members)
    assert column(answer, "positions") == {"s": 0, "t": 7} and column(answer, "rungs")["s"] == Rung.TOKENS and column(answer, "places") == {"s": (), "t": ()}
    assert answer.order.moved == (R0,) and answer.order.survivors == (StreamId(INSTANCE, R10, 1),) and answer.lost_ranks == (R0,)


def test_ranks_beside_a_lost_one_end_and_their_pools_count():
    members = {R0: "a", R1: "a", R2: "a"}
    held = [Has("a", R0, {"s": (9, 9)}, alive=False), Has("a", R1, {"s": (8, 9)}), Has("a", R2, {"s": (7, 9)})]
    answer = moved(held, [Host("j", 0, (((0, 0), "a"), ((1, 0), "a"), ((2, 0), "a")))], members)
    assert answer.order.moved == (R0, R1, R2) == answer.lost_ranks and answer.order.survivors == () and column(answer, "positions") == {"s": 7}


def test_what_is_elsewhere_already_is_not_brought_back():
    assert moved([Has("b", R0, {"s": (9, 9), "t": (3, 3)}, "replica")], [AT_B], over={"s": (0,)}).order.sequences == ("t",)


def test_holders_are_placed_beside_hosts_after_standbys():
    seat, key = (Seat(INSTANCE, R0, "a", ()),), (INSTANCE, R0)
    assert place(seat, ("a", "b", "c", "d"), {}, 1, {key: ("d",)})[key].holders == ("d",)
    assert place(seat, ("a", "b", "c", "d"), {key: ("c",)}, 1, {key: ("d",)})[key].holders == ("c",)
    assert place((Seat(INSTANCE, R0, "a", ("b",)),), ("a", "b", "d"), {}, 1, {key: ("d",)})[key].holders == ("b",), "nothing is copied twice"


# ---- tokens ----


def token(**changed) -> MovedToken:
    epoch = Epoch(3, "c")
    return MovedToken("i", "s", epoch, 9, moves.prove(SECRET, "i", "s", epoch, 9), ((R0, "b"), (R1, "c")))._replace(**changed)


def test_a_token_survives_json_and_proves_one_thing_alone():
    assert moves.decode(json.loads(json.dumps(moves.encode(token())))) == token() and moves.proves(SECRET, token())
    for changed in ({"position": 10}, {"sequence": "t"}, {"instance": "j"}, {"epoch": Epoch(4, "c")}, {"epoch": Epoch(3, "d")}, {"proof": bytes(32)}):
        assert not moves.proves(SECRET, token(**changed)), changed
    assert not moves.proves(b"", token()) and not moves.proves(b"t" * 32, token())


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        (None, "is an object"), ([], "is an object"), ({"proof": None}, "proof"), ({"proof": "zz" * 32}, "proof"), ({"proof": "00"}, "proof"),
        ({"epoch": 3}, "epoch"), ({"epoch": [True, "c"]}, "epoch"), ({"epoch": [-1, "c"]}, "epoch"), ({"epoch": [1 << 63, "c"]}, "epoch"),
        ({"position": -1}, "position"), ({"position": 1.5}, "position"), ({"position": 1 << 40}, "position"), ({"instance": ""}, "instance"),
        ({"sequence": "s" * 65}, "sequence"), ({"places": "b"}, "places"), ({"places": [["0.0", "b"]]}, "places"), ({"places": [["0.0.0"]]}, "places"),
        ({"places": [["0.0.0", 7]]}, "places"), ({"more": 1}, "more"),
        ({"sequence": "\ud800"}, "sequence"), ({"instance": "\udfff"}, "instance"), ({"epoch": [1, "\ud800"]}, "epoch"),
        ({"places": [["0.0.0", "\ud800"]]}, "places"), ({"places": [["9" * 58 + ".0.0", "b"]]}, "places"),
    ],
)  # fmt: skip
def test_garbage_is_named(changed, word):
    data = {**moves.encode(token()), **changed} if isinstance(changed, dict) else changed
    with pytest.raises(BadFrame, match=word):
        moves.decode(data)
    with pytest.raises(BadFrame, match="lacks proof"):
        moves.decode({key: value for key, value in moves.encode(token()).items() if key != "proof"})


# ---- orders at a node ----


def test_no_engine_hears_the_secret_and_needed_pools_stay():
    plan = msgspec.structs.replace(moved([Has("b", R0, {"s": (9, 9)}, "replica")], [AT_B]).order, secret=SECRET)
    orders = Orders(plan, "b", "coordinator")
    living = LocalStream(StreamAttached(StreamId(INSTANCE, R10, 1), m.StreamShape(1, 4, 10, 40, 64), 3, Epoch(0, "")), None)
    living.fence()
    told = orders.start([living])
    assert [type(effect) for effect in told] == [CarryPlan, OrderRestore] and told[0].plan.secret == SECRET and told[1].plan.secret == b""
    assert orders.keeps(R0) and not Orders(plan, "a", "coordinator").keeps(R0)
    assert KillProcess not in map(type, told)


# ---- the coordinator ----


def with_shape(daemon: Daemon) -> Daemon:
    """Its heartbeats say what its ranks' bytes are."""
    plain = daemon.beat

    def beat(self) -> m.Beat:
        said = plain()
        return msgspec.structs.replace(said, ranks=tuple(msgspec.structs.replace(one, fingerprint=77) for one in said.ranks))

    daemon.beat = types.MethodType(beat, daemon)
    return daemon


class Moving(Emitter):
    def hello(self) -> m.EmitterHello:
        return msgspec.structs.replace(super().hello(), moves=True)


def world(moving: bool = True, **more) -> Cast:
    """Instance i on node a with two sequences, instance j on node b; no standby anywhere."""
    cast = Cast(**more)
    cast.store["secret"] = ledger.pack(SECRET)
    cast._begin()
    a, b = with_shape(Daemon("a", 0)), with_shape(Daemon("b", 0))
    stream = a.host(R0, {})
    b.host(R0, {})
    b.ranks[R0]["stream"] = StreamId("j", R0, 5)
    for daemon in (a, b):
        cast.join(daemon)
    cast.drain()
    cast.connect(Moving(1) if moving else Emitter(1))
    a.ranks[R0]["rows"].update({"s": (9, 11), "t": (5, 7)})
    b.replicas[stream] = {"s": (8, 11), "t": (5, 7)}
    cast.run(300)
    return cast


def lose(cast: Cast) -> None:
    a = cast.daemons["a"]
    cast.say(a, a.kill_rank(R0))


def resumed(cast: Cast) -> m.Resume:
    last = cast.emitter.resumes[-1]
    assert last.moved and last.error == "" and last.members == ()
    assert {one.sequence: (one.position, one.rung, one.places) for one in last.sequences} == {
        "s": (8, "replica", ((R0, "b"),)), "t": (5, "replica", ((R0, "b"),)),
    }  # fmt: skip
    secret = cast.daemons["b"].plan.secret
    for one in last.sequences:
        assert moves.proves(secret, MovedToken(INSTANCE, one.sequence, last.epoch, one.position, one.proof))
    return last


def test_it_moves_at_once_and_lets_go_when_all_is_delivered():
    cast = world()
    assert {str(a.instance): [node for node, _ in a.holders] for a in cast.sent(m.Assign)} == {"i": ["b"], "j": ["a"]}
    lose(cast)
    cast.run(100)
    resume = resumed(cast)
    assert resume.epoch == Epoch(1, "c") and not cast.sent(m.RebuildOrder)
    [record] = cast.coordinator.history()
    assert record["error"] == "" and record["targets"] == {}
    cast.run(1000)
    assert not cast.daemons["b"].dropped and "recovery/i" in cast.store and "holders/i/0.0.0" not in cast.store
    for sequence in ("s", "t"):
        assert not cast.daemons["b"].dropped
        cast.queue.append(Arrived(cast.emitter.link, m.Delivered(INSTANCE, (sequence,))))
        cast.drain()
    cast.run(100)
    assert cast.daemons["b"].dropped == [StreamId(INSTANCE, R0, 1)] and "recovery/i" not in cast.store


def test_an_emitter_that_doesnt_move_waits_for_a_standby():
    cast = world(moving=False)
    lose(cast)
    cast.run(2000)
    assert not cast.emitter.resumes and cast.noted("unplannable")


def test_the_grace_is_kept_and_what_nobody_says_is_delivered_goes_counted():
    cast = world(settings=Settings(move_ns=800 * MS, moved_ns=2000 * MS))
    lose(cast)
    cast.run(500)
    assert not cast.emitter.resumes
    cast.run(600)
    resumed(cast)
    cast.run(2500)
    assert cast.daemons["b"].dropped and cast.noted("moved_undelivered")[0].fields[-1] == ("sequences", 2)


def test_a_new_engine_begins_empty_and_its_loss_brings_back_nothing_that_is_elsewhere():
    cast = world()
    lose(cast)
    cast.run(300)
    resumed(cast)
    a = cast.daemons["a"]
    a.host(R0, {"new": (3, 5)}, life=2)
    a.ranks[R0]["epoch"] = Epoch(1, "c")
    cast.run(300)
    assert (row := next(row for row in cast.coordinator.status()["ranks"] if row["instance"] == INSTANCE)) and row["node"] == "a"
    lose(cast)
    cast.run(500)
    assert [one.sequence for one in cast.emitter.resumes[-1].sequences] == ["new"] and cast.emitter.resumes[-1].epoch.counter == 2


def test_the_coordinator_may_die_at_every_point_of_a_move():
    whole = world()
    before = len(whole.performed)
    lose(whole)
    whole.run(400)
    points = len(whole.performed) - before
    assert points > 15
    for point in range(points):
        cast = world()
        cast.kill_after = len(cast.performed) + point
        lose(cast)
        cast.run(400)
        if not cast.emitter.resumes:  # the fault was heard by the life that died: the daemon says it again with the next heartbeat
            a = cast.daemons["a"]
            cast.say(a, m.Fault("a", a.ranks[R0]["stream"], 1, "died", "signal 9", True, 3.0))
        cast.run(3000)
        last = resumed(cast)
        assert cast.deaths == 1 and cast.emitter.epoch == last.epoch, point
        assert all(one == cast.emitter.resumes[0] for one in cast.emitter.resumes if one.epoch == last.epoch), "the same tokens, said again"
