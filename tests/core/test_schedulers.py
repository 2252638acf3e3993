"""A scheduler's stream in the core: its holders are its rank's, its death raises nothing, its ids count in a plan, its replicas go in the end."""

from __future__ import annotations

from kvguard.core import events as ev
from kvguard.core.effects import ForgetStream, Note, OrderRestore, Send, SendIds
from kvguard.core.recovery import Plan
from kvguard.format import messages as ms
from kvguard.types import NO_EPOCH, Epoch, Fork, Life, Rank, StreamId, scheduler_of
from tests.core.cast import three_stages
from tests.core.test_node import E1, LOCAL, OLD, R0, World, assign, fence, plan
from tests.core.test_recovery import R1, Has, ask, survivors

S0 = scheduler_of(0)
LEAD, NEXT = StreamId("i", S0, 21), StreamId("i", S0, 22)


class Beside(World):
    """A node with a rank, its scheduler, and a holder of both."""

    def __init__(self) -> None:
        super().__init__()
        self.coordinator()
        self.say(ms.NodeWelcome("c"))
        self.attach()

    def lead(self, stream=LEAD, incarnation=21, epoch=NO_EPOCH):
        return self.step(ev.StreamAttached(stream, ms.IDS_ONLY, incarnation, epoch, "lead"))

    def accept(self, ids, stream=LEAD):
        opened = (ev.Opened(0, "s", 5, OLD, b"r"),) if ids <= 4 else ()
        return self.step(ev.Looked(stream, (), (), opened, (), (0,), (0,), (ids,)))

    def answer(self, out):
        """The holder answers every Hello: it has nothing yet."""
        told = ()
        for effect in out:
            if type(effect) is Send and type(effect.message) is ms.Hello:
                hello = effect.message
                holding = ms.Holding(hello.stream, "replica", False, (), (), (), (), ())
                told += self.say(ms.Held(hello.session, hello.epoch, holding), "peer:b")
        return told

    def scheduler(self) -> ms.SchedulerBeat:
        *_, last = self.beat().schedulers
        return last


def ids_of(out, stream=LEAD):
    return [effect for effect in out if type(effect) is SendIds and effect.stream == stream]


def test_its_ids_go_to_its_ranks_holders_and_the_beat_says_so():
    world = Beside()
    world.lead()
    world.accept(4)
    assert (world.scheduler().state, world.scheduler().reason) == ("unprotected", "no rank beside it has a holder yet")
    world.say(assign("b"))
    out = world.answer(world.step(ev.LinkUp("peer:b")))
    [sent] = ids_of(out)
    assert (sent.message.starts, sent.message.counts) == ((0,), (4,))
    beat = world.beat()
    assert [one.stream.rank for one in beat.ranks] == [R0] and beat.schedulers[0].state == "unprotected"
    world.say(ms.Ack(sent.message.session, NO_EPOCH, 1, 0), "peer:b")
    found = world.scheduler()
    assert (found.state, found.holders, found.sequences, found.ids, found.acked_ids) == ("protected", ("b",), 1, 4, 4)
    assert world.node.outbound.releasable("i", R0, Life("s")) == 0  # strict asks the ranks


def test_its_death_is_no_fault_and_its_successor_takes_over():
    world = Beside()
    world.lead()
    world.accept(4)
    world.say(assign("b"))
    out = world.answer(world.step(ev.LinkUp("peer:b")))
    world.say(ms.Ack(ids_of(out)[0].message.session, NO_EPOCH, 1, 0), "peer:b")
    out = world.step(ev.ProcessDied(21, LEAD, "its process ended", False))
    assert [effect.what for effect in out if type(effect) is Note] == ["scheduler_died"]
    assert not [effect for effect in out if type(effect) is Send]
    found = world.scheduler()
    assert found.state == "lost" and "until a scheduler attaches again" in found.reason
    world.answer(world.lead(NEXT, 22))
    assert {one.stream: one.state for one in world.beat().schedulers} == {LEAD: "lost", NEXT: "protected"}  # it has accepted nothing yet
    [sent] = ids_of(world.accept(3, NEXT), NEXT)
    world.beat()
    assert LEAD in world.node.outbound.streams
    world.say(ms.Ack(sent.message.session, NO_EPOCH, 1, 0), "peer:b")
    world.now = world.node._beat_ns
    out = world.step(ev.Tick())
    assert ForgetStream(LEAD) in out and [effect.message.stream for effect in out if type(effect) is Send and type(effect.message) is ms.StreamEnd] == [LEAD]


def test_a_second_death_leaves_one_dead_life():
    world = Beside()
    for stream in (LEAD, NEXT):
        world.lead(stream, stream.pool)
        out = world.step(ev.ProcessDied(stream.pool, stream, "its process ended", False))
    assert ForgetStream(LEAD) in out and NEXT in world.node.outbound.streams


def test_detached_cleanly_it_leaves_nothing():
    world = Beside()
    world.lead()
    out = world.step(ev.StreamDetached(LEAD, 21))
    assert ForgetStream(LEAD) in out and not [effect for effect in out if type(effect) is Send]
    assert world.beat().schedulers == ()


def test_it_is_cut_with_the_plan_and_nobody_waits_for_it():
    world = Beside()
    world.lead()
    world.accept(4)
    world.say(fence())
    assert world.scheduler().state == "recovering"
    out = world.say(plan())
    assert [effect.stream for effect in out if type(effect) is OrderRestore] == [LOCAL, LEAD]
    failed = world.step(ev.EngineRestored("i", S0, E1, LEAD, "", "no"))
    assert [type(effect) for effect in failed] == [Note] and world.scheduler().state == "recovering"
    assert world.step(ev.EngineRestored("i", S0, E1, LEAD, "lead")) == ()
    assert world.node.outbound.streams[LEAD].epoch == E1 and world.scheduler().state == "unprotected"


def test_a_dead_life_goes_with_the_plan_that_knew_it_and_holders_keep_its_ids():
    world = Beside()
    world.lead()
    world.accept(4)
    world.step(ev.ProcessDied(21, LEAD, "its process ended", False))
    world.say(fence())
    world.say(plan())
    out = world.say(ms.Resumed("i", E1, ()))
    assert ForgetStream(LEAD) in out and not [effect for effect in out if type(effect) is Send and type(effect.message) is ms.StreamEnd]
    assert world.beat().schedulers == ()


def test_it_follows_its_rank_to_another_holder():
    world = Beside()
    world.lead()
    for holder in "bc":
        world.say(assign(holder))
    lead = world.node.outbound.streams[LEAD]
    assert list(lead.senders) == ["b", "c"] and list(lead.ending) == ["b"]


def test_a_plan_knows_the_ids_that_only_the_scheduler_had():
    rows = {"s": (9, 10)}
    held = [*survivors(rows), Has("c", R1, rows, "replica"), Has("a", S0, {"s": (0, 14), "new": (0, 3)}, life=21), Has("c", S0, {"s": (0, 13)}, "replica", life=21)]
    found = ask(held)
    assert isinstance(found, Plan)
    order = found.order
    assert (order.sequences, order.positions, order.ids) == (("s", "new"), (9, 0), (14, 3))
    assert order.ids_stream == (StreamId("i", S0, 21),) * 2 and order.ids_node == ("a", "a")
    assert found.lost == () and all(stream.rank != S0 for stream in found.former)
    assert order.lineages == ((*OLD, Fork(8, 9)), (Fork(8, 0),))


def test_a_schedulers_ids_of_another_lineage_count_to_the_fork():
    forked = (*OLD, Fork(3, 6))
    rows = {"s": (9, 10, forked)}
    held = [*survivors(rows), Has("c", R1, rows, "replica"), Has("b", S0, {"s": (0, 14)}, "replica", life=21)]
    found = ask(held)
    assert (found.order.positions, found.order.ids) == ((9,), (10,))


def test_a_lost_rank_0_is_not_taken_for_its_scheduler():
    rows = {"s": (9, 10)}
    held = [Has("b", R1, rows), Has("c", Rank(0, 2, 0), rows), Has("b", R0, rows, "replica"), Has("a", S0, {"s": (0, 10)}, life=21)]
    found = ask(held, lost=(R0,))
    assert found.order.positions == (9,) and found.former == (StreamId("i", R0, 1),)


def test_its_replicas_go_when_no_node_has_had_it_for_a_while():
    cast = three_stages()
    beat = ms.SchedulerBeat(LEAD, Epoch(0, ""), 21, "lead", "protected", "", ("b",), 1, 4, 4)
    listed = [True]
    for name, daemon in cast.daemons.items():

        def said(daemon=daemon, name=name, plain=daemon.beat):
            own = plain()
            leads = (beat,) if name == "a" and listed[0] else ()
            return ms.Beat(own.node, own.incarnation, own.number, own.ranks, own.standbys, ((LEAD, 1, 0),) if name == "b" else (), 0, 0, leads)

        daemon.beat = said
    cast.run(7000)
    assert cast.coordinator.status()["schedulers"][0]["state"] == "protected" and cast.daemons["b"].dropped == []
    assert all(one["rank"] != "0.scheduler" for one in cast.coordinator.status()["ranks"])
    listed[0] = False
    cast.run(4000)
    assert cast.daemons["b"].dropped == []  # its daemon may only be restarting
    cast.run(2500)
    assert LEAD in cast.daemons["b"].dropped and cast.epoch() == 0
