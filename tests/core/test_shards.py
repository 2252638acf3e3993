"""Ranks that hold equal bytes: one of them is copied, the others are held with it, and each comes back from any one's replica. A hole in any of it is said."""

from __future__ import annotations

import types

import msgspec

from kvguard.core import events as ev
from kvguard.core.effects import Dial, PushReplica, Send
from kvguard.core.known import Settings
from kvguard.core.membership import Member
from kvguard.core.moving import Host
from kvguard.core.recovery import Situation, plan
from kvguard.core.shards import copiers, mates
from kvguard.format import messages as m
from kvguard.format.layout import Layout, Shard
from kvguard.types import Clash, Epoch, Fork, Life, Rank, StreamId
from tests.core.cast import INSTANCE, Cast, Daemon, Emitter
from tests.core.test_node import E1, MS, OLD, SHAPE, World, fence
from tests.core.test_recovery import Has, ask, column, reports, standby, stream

A, B, C = (Rank(0, 0, tp) for tp in range(3))
FAR = Rank(0, 1, 0)
PRINT = 77


# ---- who copies for whom ----


def member(rank: Rank, node: str, print_: int = PRINT, lost: bool = False) -> Member:
    one = Member(node, StreamId("i", rank, 1), 1, "")
    one.fingerprint, one.lost = print_, lost
    return one


def test_the_lowest_living_mate_of_a_node_copies_for_all_of_it():
    places = {rank: member(rank, "a") for rank in (C, B, A)}
    assert copiers(places) == {A: A, B: A, C: A} and mates(places, B) == [A, C]
    places[A].lost = True
    assert copiers(places) == {B: B, C: B}, "a lost rank copies nothing and needs nobody"
    assert mates(places, B) == [A, C], "but what is held of it is as good"
    places[C].node = "b"
    assert copiers(places) == {B: B, C: C}, "a holder could be a mate's node"
    assert copiers(places, {C: "a"}) == {B: B, C: B}, "where it would live"


def test_other_bytes_other_stages_other_groups_and_unknown_ones_are_no_mates():
    for other, print_ in ((B, 78), (B, 0), (Rank(0, 1, 1), PRINT), (Rank(1, 0, 1), PRINT)):
        places = {A: member(A, "a", print_ and PRINT), other: member(other, "a", print_)}
        assert copiers(places) == {A: A, other: other} and mates(places, A) == []


def test_ranks_that_only_forgot_to_name_their_parts_are_no_mates():
    """Each would come back with the first one's bytes."""
    careless = Layout.paged("m", "float32", 2, 4, 4, 1, 2).fingerprint
    places = {rank: member(rank, "a", careless) for rank in (A, B)}
    assert copiers(places) == {A: A, B: B} and mates(places, A) == []
    meant = Layout.paged("m", "float32", 2, 4, 4, 1, 2, shard=Shard((0, 2, 2), (0, 1, 4), shared=True)).fingerprint
    places = {rank: member(rank, "a", meant) for rank in (A, B)}
    assert copiers(places) == {A: A, B: A} and mates(places, A) == [B]


# ---- the coordinator assigns ----


def shaped(daemon: Daemon) -> Daemon:
    """Its ranks' bytes are those of their stage."""
    plain = daemon.beat

    def beat(self) -> m.Beat:
        said = plain()
        ranks = tuple(msgspec.structs.replace(one, fingerprint=PRINT + 2 * one.stream.rank.pp) for one in said.ranks)
        standbys = tuple(msgspec.structs.replace(one, fingerprints={str(rank): PRINT + 2 * rank.pp for rank in (A, B, C, FAR)}) for one in said.standbys)
        return msgspec.structs.replace(said, ranks=ranks, standbys=standbys)

    def holdings(self) -> tuple[m.Holding, ...]:
        return tuple(msgspec.structs.replace(one, fingerprint=PRINT + 2 * one.stream.rank.pp) for one in Daemon._holdings(self))

    daemon.beat, daemon._holdings = types.MethodType(beat, daemon), types.MethodType(holdings, daemon)
    return daemon


def cast_of(**more) -> Cast:
    """Ranks A and B on node a; b and c hold, and have spare processes."""
    cast = Cast(**more)
    a, b, c = (shaped(Daemon(name, 2)) for name in "abc")
    for rank in (A, B):
        a.host(rank, {})
        a.ranks[rank]["incarnation"] = 10 + rank.tp
    for daemon in (a, b, c):
        cast.join(daemon)
    cast.drain()
    cast.connect(Emitter(1))
    cast.run(300)
    return cast


def assigned(cast: Cast, rank: Rank) -> m.Assign:
    return [one for one in cast.sent(m.Assign) if one.rank == rank][-1]


def ranks_of(cast: Cast) -> dict[str, dict]:
    return {one["rank"]: one for one in cast.coordinator.status(cast.now)["ranks"] if one["state"] != "standby"}


def test_only_one_of_them_gets_holders_and_all_are_known_to_be_held_there():
    cast = cast_of()
    assert (assigned(cast, A).holders, assigned(cast, A).as_rank) == ((("b", "tcp://b"),), None)
    assert assigned(cast, B) == m.Assign(INSTANCE, B, (), "its bytes are those of rank 0.0.0 and copied with them", A)
    said = ranks_of(cast)
    assert [(said[text]["holders"], said[text]["copied_as"]) for text in ("0.0.0", "0.0.1")] == [(["b"], "0.0.0")] * 2
    before = len(cast.sent(m.Assign))
    cast._begin()
    cast.run(300)
    again = cast.sent(m.Assign)[before:]
    assert [(one.rank, [node for node, _ in one.holders], one.as_rank) for one in sorted(again, key=lambda one: one.rank)] == [(A, ["b"], None), (B, [], A)], "a restart moves nothing"


def test_who_is_left_alone_gets_holders_of_its_own():
    cast = cast_of()
    a = cast.daemons["a"]
    gone = a.ranks.pop(A)
    cast.say(a, m.Fault("a", gone["stream"], gone["incarnation"], "detached", "closed", False, 0.0))
    cast.run(300)
    assert assigned(cast, B) == m.Assign(INSTANCE, B, (("b", "tcp://b"),), "on a node with a fitting standby"), "where its bytes are held already"
    a.host(A, {}, life=2)
    cast.run(300)
    assert assigned(cast, B).as_rank == A and assigned(cast, A).holders == (("b", "tcp://b"),)


def test_a_handoff_of_any_of_them_copies_to_its_target_first():
    cast = cast_of()
    a, c = cast.daemons["a"], cast.daemons["c"]
    answer = cast.ask("handoff", instance=INSTANCE, rank=str(B), to="c")
    assert not answer.error, answer
    cast.run(200)
    assert [node for node, _ in assigned(cast, A).holders] == ["b", "c"] and assigned(cast, B).as_rank == A
    assert cast.epoch() == 0, "nothing is fenced before c has everything"
    for rank in (A, B):
        a.ranks[rank].update(rows={"s": (9, 11)}, holders=("b", "c"), whole=("b", "c"))
    c.replicas[a.ranks[A]["stream"]] = {"s": (9, 11)}
    cast.run(1500)
    assert cast.coordinator.known.membership.members[INSTANCE][B].node == "c" and cast.emitter.resumes[-1].sequences[0].position == 9
    (order,) = [one for one in cast.sent(m.PlanOrder) if one.rebuilds][:1]
    assert [(source.node, source.stream.rank) for source in order.rebuilds[0].sources] == [("c", A)]
    assert [one.as_rank for one in (assigned(cast, A), assigned(cast, B))] == [None, None], "on two nodes each is copied for itself"


def test_draining_their_holder_is_said_once_for_the_copy():
    cast = cast_of()
    assert cast.ask("drain", node="b", dry_run=True).body["replicas"] == [{"instance": INSTANCE, "rank": "0.0.0", "to": ["c"]}]
    cast.kill(cast.daemons["c"])
    cast.run(7000)
    assert cast.ask("drain", node="b").error.count("would have 0 of 1 replicas") == 1


def test_draining_their_own_node_counts_a_copy_for_each_place_that_they_go_to():
    cast = cast_of()
    cast.daemons["c"].standbys = []
    cast.run(200)
    answer = cast.ask("drain", node="a", dry_run=True)
    assert [one["to"] for one in answer.body["ranks"]] == ["b", "b"] and answer.body["replicas"] == []
    cast.daemons["c"].standbys, cast.daemons["b"].standbys = [3000], [2000]
    cast.run(200)
    assert sorted(one["to"] for one in cast.ask("drain", node="a", dry_run=True).body["ranks"]) == ["b", "c"]


def test_former_lives_stay_until_every_mate_is_protected():
    """B lives on beside nobody when A is rebuilt elsewhere: A's former replica is all that is held of it for a while."""
    cast = cast_of()
    a, b = cast.daemons["a"], cast.daemons["b"]
    for rank in (A, B):
        a.ranks[rank]["rows"]["s"] = (9, 11)
    b.replicas[a.ranks[A]["stream"]] = {"s": (9, 11)}
    former, a.standbys = a.ranks[A]["stream"], []
    cast.run(200)
    a.ranks[B]["state"] = "unprotected"
    lost = a.ranks.pop(A)  # its process, and its memory with it
    cast.say(a, m.Fault("a", lost["stream"], lost["incarnation"], "died", "signal 9", False, 3.0))
    cast.run(1500)
    assert cast.coordinator.known.membership.members[INSTANCE][A].node == "b" and cast.emitter.resumes[-1].error == ""
    assert former not in b.dropped and not cast.noted("unpinned"), "B is not protected by anything else"
    a.ranks[B]["state"] = "protected"
    cast.run(500)
    assert former in b.dropped and cast.noted("unpinned")


def test_what_was_copied_of_a_rank_that_is_copied_with_another_goes():
    """It had holders of its own until A came, and the word that they are ended was lost with its node's daemon."""
    cast = cast_of()
    a, b = cast.daemons["a"], cast.daemons["b"]
    own, plain = a.ranks[B]["stream"], a.beat
    for rank in (A, B):
        a.ranks[rank].update(rows={"s": (9, 11)}, holders=("b",))
    replicas = b.beat
    b.beat = lambda: msgspec.structs.replace(replicas(), replicas=((own, 1, 100), (a.ranks[A]["stream"], 1, 100)))
    cast.run(500)
    assert own not in b.dropped, "as long as its node doesn't say that nothing of it is sent"
    a.beat = lambda: msgspec.structs.replace(plain(), ranks=tuple(msgspec.structs.replace(one, as_rank=A if one.stream == own else None) for one in plain().ranks))
    cast.run(500)
    assert b.dropped and set(b.dropped) == {own}


def test_both_come_back_from_the_one_replica_when_their_node_dies_at_any_point_of_the_coordinators_life():
    for kill_after in (None, *range(40, 130, 9)):
        cast = cast_of()
        a, b = cast.daemons["a"], cast.daemons["b"]
        for rank in (A, B):
            a.ranks[rank]["rows"]["s"] = (9, 11)
        b.replicas[a.ranks[A]["stream"]] = {"s": (8, 11)}
        cast.run(200)
        cast.kill_after = kill_after
        cast.kill(a)
        cast.run(4000)
        resume = cast.emitter.resumes[-1]
        assert (resume.error, [(entry.sequence, entry.position) for entry in resume.sequences]) == ("", [("s", 8)]), kill_after
        assert {rank: place.node for rank, place in cast.coordinator.known.membership.members[INSTANCE].items()} == {A: "b", B: "b"}


def test_two_copies_that_do_not_get_there_do_not_take_turns_to_fail():
    """The only node with a spare process has no room: what lies elsewhere is of no use in this recovery, and is computed again."""
    cast = cast_of(settings=Settings(restore_ns=500 * MS))
    a, b = cast.daemons["a"], cast.daemons["b"]
    former = StreamId(INSTANCE, B, 99)
    for rank in (A, B):
        a.ranks[rank]["rows"]["s"] = (9, 11)
    b.replicas[a.ranks[A]["stream"]], a.replicas[former] = {"s": (9, 11)}, {"s": (7, 9)}
    a.standbys, b.standbys = [], []
    a.silent_parts, b.silent_parts = (f"transfer {former}",), (f"transfer {a.ranks[A]['stream']}",)
    cast.run(200)
    lost = a.ranks.pop(B)
    cast.say(a, m.Fault("a", lost["stream"], lost["incarnation"], "died", "signal 9", False, 3.0))
    cast.run(3000)
    plans = {order.epoch.counter: (order.positions, [holder for holder, *_ in order.transfers]) for order in cast.sent(m.PlanOrder)}
    assert plans == {1: ((9,), ["b"]), 2: ((7,), ["a"]), 3: ((0,), [])}
    assert [(resume.epoch.counter, resume.error) for resume in cast.emitter.resumes] == [(3, "")]


# ---- a node that copies one for two ----

MINE, HIS = StreamId("i", A, 7), StreamId("i", B, 8)


class Node(World):
    """Two ranks, the second with its rows in another order. `births`: what the sequences' requests are, by stream."""

    def two(self) -> None:
        self.coordinator()
        self.attach(MINE)
        self.attach(HIS, incarnation=4)
        self.say(m.Assign("i", A, (("b", "tcp://b"),), ""))
        self.say(m.Assign("i", B, (), "with A", A))

    def row(self, stream_: StreamId, number: int, name: str, committed: int, request: bytes = b"r", lineage=OLD) -> tuple:
        opened, grown = (ev.Opened(number, name, 5, lineage, request),), (ev.Grown(number, 0, (10 * number, 10 * number + 1), (100, 101)),)
        return self.step(ev.Looked(stream_, (), (), opened, grown, (number,), (committed,), (committed + 1,)))

    def covered(self) -> None:
        """Both have a sequence of four positions, and the one holder has acknowledged it."""
        self.two()
        for stream_ in (MINE, HIS):
            self.row(stream_, 0, "s", 4)
        self.ack(self.holder())

    def said(self, rank: Rank) -> m.RankBeat:
        return next(one for one in self.beat().ranks if one.stream.rank == rank)


def test_a_rank_is_protected_as_far_as_its_mate_is_and_nothing_of_it_is_sent():
    world = Node()
    world.two()
    world.row(MINE, 0, "s", 4)
    out = world.row(HIS, 3, "s", 4)
    assert out == () and (world.said(B).state, world.said(B).reason) == ("unprotected", "b: holder unreachable")
    acks = world.holder()
    assert all(effect.message.stream.rank == A for effect in acks if type(effect) is Send and type(effect.message) is m.Hello)
    assert (world.said(B).state, world.said(B).reason) == ("unprotected", "catching up: 1 of 1 sequences")
    world.ack(acks)
    his = world.said(B)
    assert (his.state, his.acked, his.committed, his.holders, his.whole, his.as_rank, his.lag_tokens) == ("protected", 4, 4, ("b",), ("b",), A, 0)
    assert world.node.outbound.releasable("i", B, Life("s")) == 5 == world.node.outbound.releasable("i", A, Life("s"))
    world.row(HIS, 3, "s", 8)
    world.row(HIS, 3, "s", 8)
    his = world.said(B)
    assert (his.state, his.acked, his.reason) == ("unprotected", 4, "catching up: 1 of 1 sequences"), "its mate's holder has no more"
    assert his.whole == () and world.said(A).state == "protected"


def test_another_life_or_a_fork_of_the_mates_row_protects_nothing():
    for request, lineage, held in ((b"other", OLD, 0), (b"r", (Fork(0, 0), Fork(1, 2)), 2), (b"", OLD, 4)):
        world = Node()
        world.two()
        world.row(MINE, 0, "s", 4)
        world.row(HIS, 0, "s", 4, request, lineage)
        world.row(HIS, 0, "s", 4, request, lineage)
        world.ack(world.holder())
        assert world.said(B).acked == held and world.said(B).state == ("protected" if held == 4 else "unprotected")
        assert world.node.outbound.releasable("i", B, Life("s")) == min(held or 0, 5) if held != 4 else 5


def test_without_its_mate_it_says_so():
    world = Node()
    world.covered()
    assert world.said(B).state == "protected"
    world.step(ev.StreamDetached(MINE, 3))
    assert (world.said(B).state, world.said(B).reason) == ("unprotected", "rank 0.0.0, whose copy is this one's too, is not attached here in this epoch")
    assert world.node.outbound.releasable("i", B, Life("s")) == 0
    out = world.say(m.Assign("i", B, (("b", "tcp://b"),), ""))
    assert Dial("peer:b", "tcp://b") in out, "then it gets holders of its own"
    world.ack(world.holder())
    assert (world.said(B).state, world.said(B).as_rank) == ("protected", None)


def test_a_fence_ends_the_mates_word_too():
    world = Node()
    world.covered()
    for stream_ in (MINE, HIS):
        world.row(stream_, 0, "s", 4)
    world.say(fence())
    assert [(world.said(rank).state, world.said(rank).lag_tokens) for rank in (A, B)] == [("recovering", 4)] * 2
    world.node.outbound.streams[HIS].adopt(world.now, E1)
    assert world.said(B).reason.startswith("rank 0.0.0, whose copy") and world.said(B).state == "unprotected"


def test_its_own_holder_stays_until_the_mates_has_what_it_had():
    world = Node()
    world.coordinator()
    world.attach(HIS, incarnation=4)
    world.say(m.Assign("i", B, (("b", "tcp://b"),), ""))
    world.row(HIS, 0, "s", 4)
    world.ack(world.holder())
    world.attach(MINE)
    world.say(m.Assign("i", A, (("c", "tcp://c"),), ""))
    world.say(m.Assign("i", B, (), "with A", A))
    world.holder("c")
    world.step(ev.TurnEnded())
    assert (world.said(B).state, world.said(B).holders, world.said(B).as_rank) == ("protected", ("b", "c"), None), "its mate hasn't this sequence"
    world.ack(world.row(MINE, 0, "s", 3), "c")
    world.step(ev.TurnEnded())
    assert world.said(A).acked == 3 and "b" in world.node.outbound.streams[HIS].senders, "less than b has"
    world.ack(world.row(MINE, 0, "s", 4), "c")
    ended = world.step(ev.TurnEnded())
    assert [effect.message.stream for effect in ended if type(effect) is Send and type(effect.message) is m.StreamEnd] == [HIS]
    assert (world.said(B).state, world.said(B).holders, world.said(B).as_rank) == ("protected", ("c",), A)


def test_one_replica_goes_to_every_node_that_needs_it():
    world = World(i=E1)
    world.coordinator()
    held = StreamId("i", Rank(0, 5, 0), 9)
    transfers = (("a", "b", "tcp://b", held), ("a", "c", "tcp://c", held))
    order = m.PlanOrder("i", E1, ("s",), (4,), ("replica",), ((*OLD, Fork(1, 4)),), (5,), ("b",), (held,), (), transfers, ("why",))
    out = world.say(order)
    assert {effect.link for effect in out if type(effect) is Dial} == {"peer:b", "peer:c"}
    out = world.step(ev.PlanCarried("i", E1, ()))
    assert [(effect.stream, effect.node) for effect in out if type(effect) is PushReplica] == [(held, "b")], "it is opened once"
    world.step(ev.StreamAttached(held, SHAPE, 0, E1, pushing="b"))
    world.step(ev.Looked(held, (), (), (ev.Opened(0, "s", 5, OLD, b""),), (ev.Grown(0, 0, (1,), (1,)),), (0,), (4,), (5,)))
    world.ack(world.holder("b"))
    assert not [effect for effect in world.step(ev.TurnEnded()) if type(effect) is Send], "c has nothing yet"
    world.ack(world.holder("c"), "c")
    (done,) = [effect.message for effect in world.step(ev.TurnEnded()) if type(effect) is Send]
    assert (done.part, done.error) == (f"transfer {held}", "")
    world.now += MS


# ---- plans ----

BOTH = {A: PRINT, B: PRINT, FAR: 1}
MEMBERS = {A: "a", B: "a", FAR: "c"}


def spare(node: str, no: int):
    return standby(node, no, **{str(A): PRINT, str(B): PRINT})


def planned(held, lost, standbys=(spare("b", 11), spare("b", 12)), prints=None, **more):
    beside = [Has("c", FAR, {"s": (20, 21)}, fingerprint=1)]
    return ask([*beside, *held], lost=lost, members=more.pop("members", MEMBERS), standbys=standbys, prints=BOTH if prints is None else prints, **more)


def held_of(node: str, rank: Rank, positions: int, **more) -> Has:
    return Has(node, rank, {"s": (positions, positions + 1)}, "replica", fingerprint=more.pop("fingerprint", PRINT), **more)


def test_two_lost_mates_come_back_from_one_replica():
    answer = planned([held_of("b", A, 9)], (A, B))
    assert column(answer, "positions") == {"s": 9}
    assert [(rebuild.rank, rebuild.node, rebuild.sources) for rebuild in answer.order.rebuilds] == [
        (rank, "b", (m.Source("replica", "b", stream(A)),)) for rank in (A, B)
    ]
    assert answer.order.transfers == () and answer.former == (stream(A),)
    assert "0.0.1 on b pulls the replica of 0.0.0, whose bytes are the same, on b" in answer.order.explanations[0]
    assert column(planned([held_of("b", A, 9)], (A, B), prints={}), "positions") == {"s": 0}, "what isn't known to be equal isn't"
    pool = Has("a", A, {"s": (14, 15)}, fingerprint=PRINT)
    assert column(planned([pool, held_of("b", A, 9, fingerprint=78)], (B,)), "positions") == {"s": 0}


def test_it_goes_to_one_node_once_and_to_two_nodes_twice():
    one = planned([held_of("d", A, 9)], (A, B))
    assert one.order.transfers == (("d", "b", "tcp://b", stream(A)),) and column(one, "positions") == {"s": 9}
    two = planned([held_of("d", A, 9)], (A, B), (spare("b", 11), spare("c", 12)))
    assert sorted(two.order.transfers) == [("d", "b", "tcp://b", stream(A)), ("d", "c", "tcp://c", stream(A))] and column(two, "positions") == {"s": 9}


def test_a_living_mates_replica_serves_too_and_its_pool_does_not():
    pool = Has("a", A, {"s": (14, 15)}, fingerprint=PRINT)
    answer = planned([pool, held_of("b", A, 9)], (B,))
    assert column(answer, "positions") == {"s": 9} and answer.order.survivors == (stream(A), stream(FAR)) and stream(A) not in answer.former
    assert column(planned([pool], (B,)), "positions") == {"s": 0}
    back = planned([pool, held_of("b", A, 9)], (B,), (spare("a", 11),))
    assert back.order.transfers == (("b", "a", None or "tcp://a", stream(A)),) and column(back, "positions") == {"s": 9}


def test_a_replica_beside_its_own_pool_is_not_sent_on():
    """It lies there since it was pushed for a mate; from there nobody can tell it from the pool's own stream."""
    pool = Has("a", A, {"s": (14, 15)}, fingerprint=PRINT)
    answer = planned([pool, held_of("a", A, 12), held_of("d", A, 9)], (B,))
    assert column(answer, "positions") == {"s": 9} and [source.node for source in answer.order.rebuilds[0].sources] == ["d"]
    dying = [Has("c", FAR, {"s": (20, 21)}, fingerprint=1), held_of("a", A, 12), held_of("d", A, 9)]
    pending = tuple(msgspec.structs.replace(report, pending=(stream(A),)) if report.node == "a" else report for report in reports(*dying))
    late = plan(Situation("i", Epoch(8, "c"), MEMBERS, (A, B), pending, (spare("b", 11), spare("b", 12)), prints=BOTH))
    assert column(late, "positions") == {"s": 9}, "nor beside one that is told of as pending alone"
    local = planned([pool, held_of("a", A, 12), held_of("d", A, 9)], (B,), (spare("a", 11),))
    assert column(local, "positions") == {"s": 12} and local.order.transfers == ()


def test_the_best_of_both_mates_replicas_counts_and_lineage_first():
    rows = {"s": (9, 10), "t": (5, 6)}
    held = [Has("b", A, rows, "replica", fingerprint=PRINT), Has("b", B, {"s": (12, 13), "t": (3, 4)}, "replica", fingerprint=PRINT)]
    far = Has("c", FAR, {"s": (20, 21), "t": (20, 21)})
    answer = ask([far, *held], lost=(A, B), members=MEMBERS, standbys=(spare("b", 11), spare("b", 12)), prints=BOTH)
    assert column(answer, "positions") == {"s": 12, "t": 5}
    newer = (Fork(0, 0), Fork(7, 4))
    cut = Has("b", A, {"s": (6, 7, newer)}, "replica", fingerprint=PRINT, life=2)
    answer = ask([Has("c", FAR, {"s": (20, 21, newer)}), held[1], cut], lost=(A, B), members=MEMBERS, standbys=(spare("b", 11), spare("b", 12)), prints=BOTH)
    assert column(answer, "positions")["s"] == 6, "12 of an epoch that is over are 4"


def test_clashes_of_two_mates_streams_yield_to_one_of_them():
    cast = cast_of()
    known = cast.coordinator.known
    from kvguard.core.resuming import _older

    lives = {rank: known.membership.members[INSTANCE][rank].stream for rank in (A, B)}
    older = StreamId(INSTANCE, B, 99)

    def left(*streams: StreamId) -> list[StreamId]:
        done = m.Done(INSTANCE, Epoch(2, "c"), "b", f"rank {B}", "two lives", clashes=tuple(Clash(one, "s", 4) for one in streams))
        m.check_clashes(done)
        return [clash.stream for clash in _older(known, done, B)]

    assert left(lives[A], lives[B]) == [lives[A]] and left(lives[A], older) == [older] and left(older, older._replace(pool=98)) == [older, older._replace(pool=98)]


def test_sequences_that_move_find_a_mates_replica_at_each_ranks_place():
    host = Host("j", 0, (((0, 0), "b"), ((0, 1), "b")))
    held = [held_of("b", A, 9)]
    answer = ask(held, lost=(A, B), members={A: "a", B: "a"}, standbys=(), moves=True, hosts=(host,), emitter_lives=True, prints=BOTH)
    assert column(answer, "positions") == {"s": 9} and column(answer, "places") == {"s": ((A, "b"), (B, "b"))}
    far = ask([held_of("d", A, 9)], lost=(A, B), members={A: "a", B: "a"}, standbys=(), moves=True, hosts=(host,), emitter_lives=True, prints=BOTH)
    assert far.order.transfers == (("d", "b", "tcp://b", stream(A)),) and column(far, "positions") == {"s": 9}
