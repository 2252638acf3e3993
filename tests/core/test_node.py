"""A node: what it says, promises and orders. Event in, effects out."""

from __future__ import annotations

import msgspec
import pytest

from kvguard.core import events as ev
from kvguard.core.effects import (
    Capture, CarryPlan, Claim, Dial, DropReplica, ForgetStream, FreeBuffer, HangUp, KillProcess, Note, OrderRestore, Persist, Probe, PushReplica, Recheck, Send,
    SendIds, SendReport, SetEpoch,
)  # fmt: skip
from kvguard.core.node import Node, NodeSettings
from kvguard.core.promises import decode_epoch
from kvguard.format import messages as ms
from kvguard.types import NO_EPOCH, Clash, Epoch, Fork, Life, Rank, StreamId

R0, R1 = Rank(0, 0, 0), Rank(0, 1, 0)
LOCAL, OTHER = StreamId("i", R0, 7), StreamId("i", R1, 8)
SHAPE = ms.StreamShape(1, 4, 10, 40, 64)
E1, E2 = Epoch(1, "c"), Epoch(2, "c")
MS = 1_000_000
OLD = (Fork(0, 0),)


class World:
    def __init__(self, **promises: Epoch) -> None:
        self.node = Node(NodeSettings("a", 9, "tcp://a", "1.0", heartbeat_ns=200 * MS, hang_min_ns=500 * MS), promises)
        self.now = 0

    def step(self, event) -> tuple:
        out = self.node.step(self.now, event)
        self.node.check()
        return out

    def say(self, message, link: str = "coordinator", buffer: int = 0) -> tuple:
        return self.step(ev.Arrived(link, message, buffer))

    def coordinator(self) -> tuple:
        return self.step(ev.LinkUp("coordinator"))

    def attach(self, stream: StreamId = LOCAL, epoch: Epoch = NO_EPOCH, incarnation: int = 3) -> tuple:
        return self.step(ev.StreamAttached(stream, SHAPE, incarnation, epoch, "tcp://engine"))

    def look(self, committed: int, stream: StreamId = LOCAL) -> tuple:
        opened = (ev.Opened(0, "s", 5, OLD, b""),) if committed <= 4 else ()
        grown = (ev.Grown(0, 0, (10, 11, 12), (110, 111, 112)),) if opened else ()
        return self.step(ev.Looked(stream, (), (), opened, grown, (0,), (committed,), (committed + 1,)))

    def holder(self, node: str = "b") -> tuple:
        """The link to a holder comes up, and it has nothing yet."""
        (hello,) = [effect.message for effect in self.step(ev.LinkUp(f"peer:{node}")) if type(effect.message) is ms.Hello]
        return self.say(ms.Held(hello.session, hello.epoch, ms.Holding(hello.stream, "replica", False, (), (), (), (), ())), f"peer:{node}")

    def ack(self, out: tuple, node: str = "b") -> tuple:
        """Complete the captures in `out` and acknowledge all that left."""
        ids = kv = session = 0
        epoch = NO_EPOCH
        for effect in out:
            if type(effect) is SendIds:
                session, epoch, ids = effect.message.session, effect.message.epoch, effect.message.number
            if type(effect) is Capture:
                (sent,) = self.step(ev.Captured(effect.id, effect.stream, effect.epoch, 0, sum(effect.counts) * 10, (), b""))
                kv = sent.message.number
        return self.say(ms.Ack(session, epoch, ids, kv), f"peer:{node}")

    def beat(self) -> ms.Beat:
        self.now = self.node._beat_ns
        (beat,) = [effect.message for effect in self.step(ev.Tick()) if type(effect) is Send and type(effect.message) is ms.Beat]
        return beat


def assign(*holders: str, reason: str = "") -> ms.Assign:
    return ms.Assign("i", R0, tuple((node, f"tcp://{node}") for node in holders), reason)


def plan(epoch: Epoch = E1, rebuilds=(), transfers=()) -> ms.PlanOrder:
    return ms.PlanOrder("i", epoch, ("s",), (4,), ("replica",), ((*OLD, Fork(1, 4)),), (5,), ("a",), (LOCAL,), tuple(rebuilds), tuple(transfers), ("why",))


def fence(epoch: Epoch = E1) -> ms.Fence:
    return ms.Fence("i", epoch, (R1,), "rank 0.1.0 died")


def releasable(world: World, sequence: str) -> int | None:
    return world.node.outbound.releasable("i", R0, Life(sequence))


def protected() -> World:
    world = World()
    world.coordinator()
    world.attach()
    world.say(assign("b"))
    world.look(4)
    world.ack(world.holder())
    return world


def test_hello_then_beats() -> None:
    world = World(i=E1)
    assert world.coordinator() == (Send("coordinator", ms.NodeHello("a", 9, "tcp://a", (("i", E1),), "1.0")),)
    assert world.node.next_deadline() == 200 * MS
    world.step(ev.ReplicasSeen(((OTHER, 2, 80),), 80, 1000))
    world.step(ev.StandbyAttached("i", 44, "tcp://spare", {"0.1.0": 1}))
    beat = world.beat()
    assert (beat.number, beat.ranks, beat.replicas, beat.arena_bytes) == (1, (), ((OTHER, 2, 80),), 80)
    assert beat.standbys == (ms.StandbyBeat("i", 44, "tcp://spare", {"0.1.0": 1}),)
    world.step(ev.ProcessDied(44, None, "killed", False))
    assert world.beat().standbys == ()
    world.step(ev.LinkDown("coordinator", "gone"))
    assert world.node.next_deadline() is None


def test_rank_states_are_truthful() -> None:
    """Fault 9: what is not acknowledged is never called protected."""
    world = World()
    world.coordinator()
    world.attach()
    assert (world.beat().ranks[0].state, world.beat().ranks[0].reason) == ("unprotected", "no holder assigned yet")
    assert world.say(assign(reason="no other node")) == ()
    assert world.beat().ranks[0].reason == "no other node"
    assert world.say(assign("b")) == (Dial("peer:b", "tcp://b"),)
    assert world.beat().ranks[0].reason == "b: holder unreachable"
    world.look(4)
    out = world.holder()
    rank = world.beat().ranks[0]
    assert (rank.state, rank.reason, rank.unprotected_sequences) == ("unprotected", "catching up: 1 of 1 sequences", 1)
    world.ack(out)
    rank = world.beat().ranks[0]
    assert (rank.state, rank.committed, rank.acked, rank.lag_tokens, rank.holders) == ("protected", 4, 4, 0, ("b",))
    out = world.look(5)
    assert world.beat().ranks[0].state == "protected", "one step on its way is no lag"
    out += world.look(6)
    rank = world.beat().ranks[0]
    assert (rank.state, rank.lag_tokens, rank.lag_bytes, rank.unprotected_sequences) == ("unprotected", 1, 20, 1)
    assert releasable(world, "s") == 5
    world.ack(out)
    assert world.beat().ranks[0].state == "protected" and releasable(world, "s") == 7
    world.step(ev.LinkDown("peer:b", "reset"))
    rank = world.beat().ranks[0]
    assert (rank.state, rank.reason, rank.acked) == ("unprotected", "b: holder unreachable", 0)


def test_full_store_is_named() -> None:
    world = protected()
    (session,) = [sender.session for sender in world.node.outbound.streams[LOCAL].senders.values()]
    world.say(ms.Ack(session, NO_EPOCH, 1, 1, ((1, "arena of 9 bytes is full"),)), "peer:b")
    assert world.beat().ranks[0].reason == "store full at b: arena of 9 bytes is full"


def test_old_holder_ends_only_when_the_new_one_has_what_it_had() -> None:
    world = protected()
    assert world.say(assign("c", reason="b is drained")) == (Dial("peer:c", "tcp://c"),)
    out = world.holder("c")
    assert world.step(ev.TurnEnded()) == ()
    world.ack(out, "c")
    end, note, hang_up = world.step(ev.TurnEnded())
    assert (end, hang_up) == (Send("peer:b", ms.StreamEnd(LOCAL, NO_EPOCH, "b is drained")), HangUp("peer:b"))
    assert list(world.node.outbound.streams[LOCAL].senders) == ["c"]


def test_death_is_said_until_the_coordinator_has_fenced() -> None:
    world = protected()
    world.beat()
    fault, note = world.step(ev.ProcessDied(3, LOCAL, "killed by signal 9", True))
    assert fault == Send("coordinator", ms.Fault("a", LOCAL, 3, "died", "killed by signal 9", True, 0.0))
    assert world.beat().ranks[0].state == "lost"
    world.now += 200 * MS
    again = world.step(ev.Tick())
    assert [effect.message.kind for effect in again if type(effect) is Send and type(effect.message) is ms.Fault] == ["died"]
    world.step(ev.LinkDown("coordinator", "x"))
    hello, fault = world.coordinator()
    assert type(fault.message) is ms.Fault
    world.say(fence())
    world.now += 200 * MS
    assert not any(type(effect) is Send and type(effect.message) is ms.Fault for effect in world.step(ev.Tick()))
    assert LOCAL in world.node.outbound.streams, "its pool may be needed"
    out = world.say(ms.Resumed("i", E1, ()))
    assert ForgetStream(LOCAL) in out and world.node.outbound.streams == {}


def test_death_of_a_former_process_is_no_fault() -> None:
    world = protected()
    assert world.step(ev.ProcessDied(2, LOCAL, "late", True))[0].what == "stale_death"


def test_clean_detach_is_no_death() -> None:
    """Fault 4."""
    world = protected()
    out = world.step(ev.StreamDetached(LOCAL, 3))
    assert out[0] == Send("peer:b", ms.StreamEnd(LOCAL, NO_EPOCH, "detached"))
    assert ForgetStream(LOCAL) in out and HangUp("peer:b") in out
    assert [effect.message.kind for effect in out if type(effect) is Send and type(effect.message) is ms.Fault] == ["detached"]
    world.now += 200 * MS
    assert not any(type(effect) is Send and type(effect.message) is ms.Fault for effect in world.step(ev.Tick()))


def test_a_hung_rank_is_killed_and_called_hung() -> None:
    world = protected()
    world.step(ev.StepsSeen(LOCAL, 0, 0, 1, 0))
    for number in range(1, 9):
        world.step(ev.StepsSeen(LOCAL, number, number - 1, 1, 0))
        world.now += 10 * MS
        world.step(ev.StepsSeen(LOCAL, number, number, 1, 0))
    world.step(ev.StepsSeen(LOCAL, 9, 8, 1, 0))
    world.now += 500 * MS
    out = world.step(ev.Tick())
    (kill,) = [effect for effect in out if type(effect) is KillProcess]
    assert (kill.incarnation, kill.stream) == (3, LOCAL)
    fault = next(effect.message for effect in out if type(effect) is Send and type(effect.message) is ms.Fault)
    assert (fault.kind, fault.since_ms) == ("suspected", 500.0) and fault.reason.startswith("hung: inside step 9"), "one in the kernel may never die"
    world.now += 9000 * MS
    assert not [effect for effect in world.step(ev.Tick()) if type(effect) is KillProcess], "it is judged once"
    fault, _ = world.step(ev.ProcessDied(3, LOCAL, "killed", True))
    assert (fault.message.kind, fault.message.since_ms) == ("hung", 9500.0) and "inside step 9" in fault.message.reason


def test_fence_is_durable_before_it_is_answered_and_silences_everything_older() -> None:
    world = protected()
    world.say(ms.Hello(OTHER, 77, NO_EPOCH, "b", SHAPE), "in:b")
    world.step(ev.Probed("in:b", 77, ms.Held(77, NO_EPOCH, ms.Holding(OTHER, "replica", False, (), (), (), (), ()))))
    out = world.say(fence())
    assert type(out[0]) is Persist and out[0].key == "promise/i" and decode_epoch(out[0].value) == E1
    assert out[1] == SetEpoch("i", E1) and out[-1] == SendReport("coordinator", "i", E1)
    assert world.look(5) == (), "the sender waits for the rank to be restored"
    note, free = world.say(ms.KvFrame(77, NO_EPOCH, 1, 0, (), (), (), (), (), (), b""), "in:b", 8)
    assert (note.what, free) == ("stale_epoch", FreeBuffer(8))
    assert world.beat().ranks[0].state == "recovering"
    assert world.say(fence()) == (SendReport("coordinator", "i", E1),), "the same fence again repeats the answer"
    for epoch in (NO_EPOCH, Epoch(1, "another")):
        (note,) = world.say(fence(epoch))
        assert note.what == "stale_epoch"
    world.step(ev.LinkDown("coordinator", "x"))
    assert world.coordinator()[-1] == SendReport("coordinator", "i", E1)


def test_a_hello_of_a_newer_epoch_binds_a_holder_that_missed_the_fence() -> None:
    world = World()
    hello = ms.Hello(OTHER, 77, E1, "b", SHAPE)
    out = world.say(hello, "in:b")
    assert type(out[0]) is Persist and out[-1] == Probe("in:b", hello)
    assert world.say(ms.Hello(OTHER, 78, NO_EPOCH, "b", SHAPE), "in:b")[0].what == "stale_epoch"


def test_a_rank_that_attaches_in_an_epoch_that_is_over_is_told_so() -> None:
    world = World(i=E2)
    out = world.attach(epoch=E1)
    assert SetEpoch("i", E2) in out
    assert world.say(assign("b")) == (Dial("peer:b", "tcp://b"),)
    assert world.step(ev.LinkUp("peer:b")) == ()
    (hello,) = world.attach(epoch=E2)
    assert hello.message.epoch == E2


def test_a_rank_that_comes_back_before_the_plan_is_reported() -> None:
    """Its daemon was restarted while another node died: the first report knew nothing of it, and it would have been given away as lost."""
    world = World()
    assert world.say(fence())[-1] == SendReport("coordinator", "i", E1)
    assert SendReport("coordinator", "i", E1) in world.attach(epoch=NO_EPOCH)
    world.say(plan())
    assert not [effect for effect in world.attach(epoch=NO_EPOCH) if type(effect) is SendReport]


def test_a_former_life_that_slept_through_its_recovery_is_killed_and_forgotten() -> None:
    world = World(i=E2)
    world.coordinator()
    world.attach(epoch=E1)
    world.say(ms.Resumed("i", E2, ()))
    out = world.say(ms.Resumed("i", E2, (), (LOCAL,)))
    assert [(effect.incarnation, effect.stream) for effect in out if type(effect) is KillProcess] == [(3, LOCAL)]
    assert ForgetStream(LOCAL) in world.step(ev.ProcessDied(3, LOCAL, "killed", True))
    assert not world.beat().ranks


def test_plan_cuts_restores_and_pushes_once() -> None:
    world = protected()
    world.say(fence())
    order = plan(transfers=[("a", "d", "tcp://d", OTHER), ("b", "d", "tcp://d", LOCAL)], rebuilds=[ms.Rebuild(R1, "d", 44, (), ())])
    assert world.say(order) == (Dial("peer:d", "tcp://d"), CarryPlan(order, "a"), OrderRestore(LOCAL, order))
    assert world.say(order) == ()
    known = (ms.KnownIds("s", b"\0" * 20, b"", b""),)
    done, push = world.step(ev.PlanCarried("i", E1, known))
    assert done == Send("coordinator", ms.Done("i", E1, "a", "holders", known=known))
    assert push == PushReplica(OTHER, "d", "peer:d")
    assert world.say(order) == (done,), "the answer again, not the deed"
    assert world.step(ev.PlanCarried("i", NO_EPOCH, ()))[0].what == "stale_epoch"
    hello, restored = world.step(ev.EngineRestored("i", R0, E1, LOCAL, "tcp://engine", bytes_by_rung=(("pool", 4),), restore_ms=2.0))
    assert hello.message.epoch == E1
    assert restored.message == ms.Done("i", E1, "a", "rank 0.0.0", "", "tcp://engine", LOCAL, (), {"pool": 4}, 2.0)
    world.step(ev.StreamAttached(OTHER, SHAPE, 0, E1, "", "d"))
    world.look(4, OTHER)
    out = world.holder("d")
    assert world.step(ev.TurnEnded()) == ()
    world.ack(out, "d")
    (done,) = world.step(ev.TurnEnded())
    assert done.message.part == f"transfer {OTHER}" and done.message.stream == OTHER
    assert world.step(ev.TurnEnded()) == ()
    out = world.say(ms.Resumed("i", E1, (OTHER,)))
    assert out == (ForgetStream(OTHER), HangUp("peer:d"), DropReplica(OTHER, "unpinned in epoch 1"))


@pytest.mark.parametrize("when", ["before the plan", "after it", "twice"])
def test_a_survivor_that_attaches_anew_is_ordered_to_truncate(when: str) -> None:
    """Its daemon was restarted since it reported the rank: the coordinator would have waited for it until it called it lost."""
    world, order = World(i=E1), msgspec.structs.replace(plan(), survivors=(LOCAL,))
    world.coordinator()
    before = world.attach() if when == "before the plan" else ()
    planned = world.say(order)
    later = world.attach() + (world.attach() if when == "twice" else ()) if when != "before the plan" else ()
    assert OrderRestore(LOCAL, order) not in before and (before + planned + later).count(OrderRestore(LOCAL, order)) == 1


@pytest.mark.parametrize("when", ["before the plan", "after it"])
def test_a_survivor_that_began_in_the_plans_epoch_has_nothing_to_truncate(when: str) -> None:
    """Its engine never was in an older one, or has restored itself for this plan and is back: nobody else would answer for it."""
    world, order = World(i=E1), msgspec.structs.replace(plan(), survivors=(LOCAL,))
    world.coordinator()
    before = world.attach(epoch=E1) if when == "before the plan" else ()
    out = before + world.say(order) + (world.attach(epoch=E1) if not before else ())
    assert [effect.message for effect in out if type(effect) is Send and type(effect.message) is ms.Done] == [
        ms.Done("i", E1, "a", "rank 0.0.0", endpoint="tcp://engine", stream=LOCAL)
    ]
    assert not [effect for effect in out if type(effect) is OrderRestore]


def test_a_survivor_that_was_ordered_and_finds_the_epoch_at_its_next_attachment_is_done() -> None:
    """Its line had gone before it heard of either: it has adopted the epoch with the daemon's first word, and answers no order of it."""
    world, order = World(), msgspec.structs.replace(plan(), survivors=(LOCAL,))
    world.coordinator()
    world.attach()
    world.say(fence())
    assert OrderRestore(LOCAL, order) in world.say(order)
    done = Send("coordinator", ms.Done("i", E1, "a", "rank 0.0.0", endpoint="tcp://engine", stream=LOCAL))
    assert done in world.attach(epoch=E1) and done not in world.attach(epoch=E1)


def test_a_push_dials_where_the_last_user_of_its_link_ended_before_it_came() -> None:
    world, mine = World(), StreamId("j", R0, 3)
    world.coordinator()
    world.attach(mine)
    world.say(ms.Assign("j", R0, (("d", "tcp://d"),), ""))
    world.look(4, mine)
    world.ack(world.holder("d"), "d")
    world.say(ms.Assign("j", R0, (("e", "tcp://e"),), "another"))
    out = world.holder("e")
    world.say(plan(transfers=[("a", "d", "tcp://d", OTHER)]))
    world.ack(out, "e")
    assert HangUp("peer:d") in world.step(ev.TurnEnded())
    world.step(ev.PlanCarried("i", E1, ()))
    assert world.step(ev.StreamAttached(OTHER, SHAPE, 0, E1, "", "d")) == (Dial("peer:d", "tcp://d"),)
    world.look(4, OTHER)
    world.ack(world.holder("d"), "d")
    assert [effect.message.part for effect in world.step(ev.TurnEnded())] == [f"transfer {OTHER}"]


def test_rebuild_claims_a_standby_once_and_answers_again() -> None:
    world = World()
    world.coordinator()
    world.step(ev.StandbyAttached("i", 44, "tcp://spare", {}))
    world.say(fence())
    rebuild = ms.Rebuild(R1, "a", 44, (), ())
    order = plan(rebuilds=[rebuild])
    rebuild_order = ms.RebuildOrder("i", E1, rebuild)
    assert world.say(rebuild_order)[0].what == "stale_epoch", "without its plan there is nothing to claim for"
    world.say(order)
    assert world.say(rebuild_order) == (Claim(order, rebuild),)
    assert world.say(rebuild_order) == () and world.node.standbys == {}
    (done,) = world.step(ev.ProcessDied(44, None, "killed", False))
    assert done.message.part == "rank 0.1.0" and "standby died" in done.message.error
    other = ms.Rebuild(R1, "a", 45, (), ())
    assert world.say(ms.RebuildOrder("i", E1, other)) == (Claim(order, other),)
    world.attach(OTHER, E1, 45)
    (done,) = world.step(ev.EngineRestored("i", R1, E1, OTHER, "tcp://spare"))
    assert (done.message.part, done.message.error, done.message.stream) == ("rank 0.1.0", "", OTHER)
    assert world.say(ms.RebuildOrder("i", E1, other)) == (done,)


def test_a_standby_that_was_told_of_nothing_is_there_again() -> None:
    for dies in (False, True):
        world = World()
        world.coordinator()
        world.step(ev.StandbyAttached("i", 44, "tcp://spare", {}))
        world.say(fence())
        rebuild = ms.Rebuild(R1, "a", 44, (), ())
        world.say(plan(rebuilds=[rebuild]))
        world.say(ms.RebuildOrder("i", E1, rebuild))
        if dies:
            world.step(ev.ProcessDied(44, None, "killed", False))
        clashes = (Clash(OTHER, "s", 4), Clash(LOCAL, "t", 0))
        (done,) = world.step(ev.EngineRestored("i", R1, E1, OTHER, "", "two lives", clashes=clashes))
        assert (done.message.error, done.message.clashes) == ("two lives", clashes)
        assert [standby.standby for standby in world.beat().standbys] == ([] if dies else [44])
        assert world.say(ms.RebuildOrder("i", E1, rebuild)) == (done,)  # again, on a new link: it is answered, and takes nothing away
        assert [standby.standby for standby in world.beat().standbys] == ([] if dies else [44])


def test_a_newer_fence_forgets_the_older_plan() -> None:
    world = protected()
    world.say(fence())
    world.say(plan())
    world.say(fence(E2))
    assert world.step(ev.PlanCarried("i", E1, ()))[0].what == "stale_epoch"
    assert world.step(ev.EngineRestored("i", R0, E1, LOCAL, ""))[0].what == "stale_epoch"


def test_coordinators_orders_count_on_its_link_alone() -> None:
    world = World()
    note, free = world.say(fence(), "in:x", 5)
    assert (note.what, free) == ("refused", FreeBuffer(5))
    assert world.node.promises.of("i") == NO_EPOCH


def test_answers_of_another_life_are_no_progress() -> None:
    """Fault 23."""
    world = protected()
    out = world.say(ms.Ack(1 << 40, NO_EPOCH, 9, 9), "peer:b")
    assert [effect.what for effect in out if type(effect) is Note] == ["protocol_error", "resync"]


def test_a_beat_names_the_holders_that_have_everything() -> None:
    """Of each sequence the newest position at most excepted, however many a step brought."""
    world = World()
    world.coordinator()
    world.attach()
    world.say(assign("b", "c"))
    world.look(4)
    assert world.beat().ranks[0].whole == ()
    world.ack(world.holder("b"), "b")
    assert world.beat().ranks[0].whole == ("b",)
    world.ack(world.holder("c"), "c")
    assert world.beat().ranks[0].whole == ("b", "c")
    world.look(5)
    assert world.beat().ranks[0].whole == ("b", "c")
    world.look(6)
    assert world.beat().ranks[0].whole == (), "two positions are on their way"


def test_an_operators_doubt_breaks_sessions_before_replicas_are_verified() -> None:
    world = protected()
    world.say(ms.Hello(OTHER, 77, NO_EPOCH, "b", SHAPE), "in:b:1")
    world.step(ev.Probed("in:b:1", 77, ms.Held(77, NO_EPOCH, ms.Holding(OTHER, "replica", False, (), (), (), (), ()))))
    out = world.step(ev.ResyncAsked("i"))
    assert [effect for effect in out if type(effect) is Recheck] == [Recheck("i", None)]
    assert [effect.message.stream for effect in out if type(effect) is Send and type(effect.message) is ms.Hello] == [LOCAL], "its own holder is asked again"
    (ack,) = [effect.message for effect in world.step(ev.TurnEnded()) if type(effect) is Send and type(effect.message) is ms.Ack]
    assert ack.session == 77 and "asked for a resync" in ack.resync
    late = world.say(ms.IdsFrame(77, NO_EPOCH, 1, ()), "in:b:1")
    assert not [effect for effect in late if type(effect).__name__ == "Apply"], "nothing is written to what is doubted"
    assert world.step(ev.ResyncAsked("i", R1)) == (Recheck("i", R1),) and world.step(ev.ResyncAsked("other")) == (Recheck("other", None),)


def test_the_sender_of_a_replica_that_is_doubted_is_told_at_once() -> None:
    """It may have nothing to send for long, and would call itself protected by what doesn't hold."""
    world = protected()
    world.say(ms.Hello(OTHER, 77, NO_EPOCH, "b", SHAPE), "in:b:1")
    world.step(ev.Probed("in:b:1", 77, ms.Held(77, NO_EPOCH, ms.Holding(OTHER, "replica", False, (), (), (), (), ()))))
    assert world.step(ev.ReplicaDoubted(LOCAL, "damaged")) == (), "nobody writes to it here"
    assert [effect.what for effect in world.step(ev.ReplicaDoubted(OTHER, "damaged"))] == ["resync"]
    (ack,) = [effect.message for effect in world.step(ev.TurnEnded()) if type(effect) is Send and type(effect.message) is ms.Ack]
    assert (ack.session, ack.resync) == (77, "damaged")
    assert not [effect for effect in world.say(ms.IdsFrame(77, NO_EPOCH, 1, ()), "in:b:1") if type(effect).__name__ == "Apply"]
