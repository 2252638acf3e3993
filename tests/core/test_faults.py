"""Deaths that are suspected first: said at once, made true, and reported at once; the pool can be planned with when they are seen."""

from __future__ import annotations

from kvguard.core import events as ev
from kvguard.core.effects import ForgetStream, KillProcess, Note, Persist, Send, SendReport
from kvguard.core.node import Node, NodeSettings
from kvguard.format import messages as ms
from kvguard.types import NO_EPOCH, Epoch, Life, Rank, StreamId

R0, R1 = Rank(0, 0, 0), Rank(0, 1, 0)
LOCAL, OTHER = StreamId("i", R0, 7), StreamId("i", R1, 8)
SHAPE = ms.StreamShape(1, 4, 10, 40, 64)
E1, E2 = Epoch(1, "c"), Epoch(2, "c")
MS = 1_000_000
SUSPECTED = ev.DeathSuspected(3, LOCAL, "marked")
DIED = ev.ProcessDied(3, LOCAL, "killed", True)
REPORT = SendReport("coordinator", "i", E1)
PENDING = SendReport("coordinator", "i", E1, (LOCAL,))


class World:
    """`told`: a heartbeat has said that the rank is attached."""

    def __init__(self, linked: bool = True, told: bool = True) -> None:
        self.node, self.now = Node(NodeSettings("a", 9, "tcp://a", "1.0", heartbeat_ns=200 * MS), {}), 0
        if linked:
            self.step(ev.LinkUp("coordinator"))
        self.step(ev.StreamAttached(LOCAL, SHAPE, 3, NO_EPOCH, "tcp://engine"))
        if linked and told:
            self.step(ev.Arrived("coordinator", ms.NodeWelcome("c")))

    def step(self, event) -> tuple:
        out = self.node.step(self.now, event)
        self.node.check()
        return out

    def fence(self, epoch: Epoch = E1, lost: tuple = (R0,)) -> tuple:
        return self.step(ev.Arrived("coordinator", ms.Fence("i", epoch, lost, "why")))

    def beats(self) -> tuple:
        self.now += 200 * MS
        return self.step(ev.Tick())


def faults(out: tuple) -> list[tuple[str, float]]:
    return [(effect.message.kind, effect.message.since_ms) for effect in out if type(effect) is Send and type(effect.message) is ms.Fault]


def test_a_suspect_is_killed_and_told_of_at_once() -> None:
    world = World()
    kill, fault, note = world.step(SUSPECTED)
    assert kill == KillProcess(3, LOCAL, "marked")
    assert fault == Send("coordinator", ms.Fault("a", LOCAL, 3, "suspected", "marked", False, 0.0))
    assert type(note) is Note and note.what == "suspected"
    assert world.step(SUSPECTED) == (), "once"


def test_one_that_a_fence_kills_is_said_to_be_dying_until_it_is_dead() -> None:
    """Nobody had suspected it: an operator's failover, a node that was silent. Its pool was waited for no longer than a node that falls silent is."""
    world = World()
    out = world.fence()
    assert faults(out) == [("suspected", 0.0)] and out[-1] == PENDING and KillProcess(3, LOCAL, "its rank is given away: why") in out
    assert faults(world.beats()) == [("suspected", 200.0)]
    assert faults(world.fence()) == [], "told to die twice, it is dying as before"
    out = world.step(DIED)
    assert faults(out) == [("died", 200.0)] and out[-1] == REPORT
    assert faults(world.beats()) == [], "the epoch in which it died is over"


def test_the_report_is_given_at_once_and_the_pool_is_pending_until_the_death() -> None:
    world = World()
    world.step(SUSPECTED)
    out = world.fence()
    assert out[-1] == PENDING and KillProcess(3, LOCAL, "its rank is given away: why") in out
    assert type(out[0]) is Persist and world.node.outbound.streams[LOCAL].fenced, "nothing more of it can be acknowledged when that is said"
    world.step(ev.LinkDown("coordinator", "x"))
    assert world.step(ev.LinkUp("coordinator"))[-1] == PENDING, "a new link is no death"
    world.now += 40 * MS
    out = world.step(DIED)
    assert faults(out) == [("died", 40.0)] and out[-1] == REPORT
    assert out[0].message.reason == "marked" and out[0].message.salvageable
    assert world.step(DIED)[0].what == "stale_death"


def test_a_death_between_the_suspicion_and_the_fence() -> None:
    world = World()
    world.step(SUSPECTED)
    assert faults(world.step(DIED)) == [("died", 0.0)]
    assert world.fence()[-1] == REPORT


def test_it_is_said_again_until_it_is_seen_even_when_the_round_has_begun() -> None:
    """The coordinator excludes who is silent; who waits for a death isn't."""
    world = World()
    world.step(SUSPECTED)
    assert faults(world.beats()) == [("suspected", 200.0)]
    world.fence()
    assert faults(world.beats()) == [("suspected", 400.0)]
    world.step(DIED)
    assert faults(world.beats()) == [], "its epoch is over, and the death was said"


def test_the_other_ranks_of_the_node_report_with_it() -> None:
    world = World()
    world.step(ev.StreamAttached(OTHER, SHAPE, 4, NO_EPOCH, ""))
    world.step(SUSPECTED)
    world.fence()
    assert world.step(ev.ProcessDied(4, OTHER, "killed", True))[-1] == PENDING
    assert world.step(DIED)[-1] == REPORT


def test_a_round_for_another_rank_is_answered_at_once() -> None:
    """Its coordinator doesn't know of the suspect yet, and must not take it for a survivor; the next will."""
    world = World()
    world.step(SUSPECTED)
    assert world.fence(lost=(R1,))[-1] == PENDING
    assert world.fence(E2, (R0, R1))[-1] == SendReport("coordinator", "i", E2, (LOCAL,))
    assert world.step(DIED)[-1] == SendReport("coordinator", "i", E2)


def test_what_is_killed_for_a_fence_is_pending_too() -> None:
    world = World()
    out = world.fence()
    assert out[-1] == PENDING and [type(effect) for effect in out if type(effect) is KillProcess] == [KillProcess]


def plan(rank: Rank = R0) -> ms.PlanOrder:
    rebuild = ms.Rebuild(rank, "a", 5, (), ())
    return ms.PlanOrder("i", E1, (), (), (), (), (), (), (), (rebuild,), (), ())


def test_a_death_after_the_plan_lets_the_pool_go_and_nothing_else() -> None:
    for resumed_first in (False, True):
        world = World()
        world.step(SUSPECTED)
        world.fence()
        world.step(ev.Arrived("coordinator", plan()))
        steps = [ev.Arrived("coordinator", ms.Resumed("i", E1, ())), DIED]
        first, second = steps if resumed_first else steps[::-1]
        out = world.step(first)
        assert ForgetStream(LOCAL) not in out
        out += world.step(second)
        assert ForgetStream(LOCAL) in out and not world.node.outbound.streams
        assert not [effect for effect in out if type(effect) is SendReport] and faults(out) == [("died", 0.0)]
        assert world.fence()[-1] == REPORT


def test_another_life_of_the_rank_is_served_while_the_former_is_dying() -> None:
    """An engine that was started again at once, or a standby that pulled a replica: on the node of the process that is torn down."""
    world, new = World(), StreamId("i", R0, 9)
    world.step(SUSPECTED)
    world.fence()
    world.step(ev.Arrived("coordinator", plan()))
    world.step(ev.StreamAttached(new, SHAPE, 5, E1, "tcp://again"))
    world.step(ev.Arrived("coordinator", ms.Resumed("i", E1, ())))
    out = world.step(ev.Arrived("coordinator", ms.Assign("i", R0, (("b", "tcp://b"),), "")))
    out += world.step(ev.LinkUp("peer:b", "b"))
    assert [effect.message.stream for effect in out if type(effect) is Send and type(effect.message) is ms.Hello] == [new]
    assert not world.node.outbound.streams[LOCAL].senders
    assert world.node.outbound.releasable("i", R0, Life("s")) == 0, "the living one's word"
    assert world.fence(E2, ())[-1] == SendReport("coordinator", "i", E2, (LOCAL,))
    assert ForgetStream(LOCAL) not in world.step(DIED)


def test_a_life_that_began_and_ended_in_one_epoch_goes_when_it_is_called_ended() -> None:
    world = World()
    world.step(DIED)
    assert ForgetStream(LOCAL) not in world.step(ev.Arrived("coordinator", ms.Resumed("i", NO_EPOCH, ())))
    assert ForgetStream(LOCAL) in world.step(ev.Arrived("coordinator", ms.Resumed("i", NO_EPOCH, (), (LOCAL,))))


def test_who_is_not_linked_says_it_later() -> None:
    world = World(linked=False)
    assert [type(effect) for effect in world.step(SUSPECTED)] == [KillProcess, Note]
    world.step(DIED)
    assert faults(world.step(ev.LinkUp("coordinator"))) == [("died", 0.0)], "the last word counts"


def test_a_suspicion_of_nobody_who_lives_is_nothing() -> None:
    world = World()
    assert world.step(ev.DeathSuspected(3, OTHER, "marked")) == ()
    assert world.step(ev.DeathSuspected(2, LOCAL, "marked")) == (), "a former life"
    world.step(DIED)
    assert world.step(SUSPECTED) == ()


def test_a_clean_end_that_was_on_its_way_ends_the_waiting() -> None:
    world = World()
    world.step(SUSPECTED)
    world.fence()
    out = world.step(ev.StreamDetached(LOCAL, 3))
    assert faults(out) == [("detached", 0.0)] and out[-1] == REPORT
    assert faults(world.beats()) == []


def test_its_next_life_is_not_suspected() -> None:
    world = World()
    world.step(SUSPECTED)
    world.step(DIED)
    world.step(ev.StreamAttached(LOCAL, SHAPE, 5, NO_EPOCH, "tcp://engine"))
    assert world.fence(lost=(R1,))[-1] == REPORT
    assert world.step(ev.DeathSuspected(5, LOCAL, "marked"))[0] == KillProcess(5, LOCAL, "marked")


def told_of(out: tuple) -> list[str]:
    """What the coordinator hears of the rank, in order."""
    said = [effect.message for effect in out if type(effect) is Send]
    return [one.kind if type(one) is ms.Fault else one.ranks[0].state for one in said if type(one) is ms.Fault or one.ranks]


def test_a_death_before_the_first_heartbeat_is_told_after_the_attachment() -> None:
    """A coordinator that hears of a death alone doesn't know whose it is."""
    world = World(told=False)
    world.node.outbound.streams[LOCAL].beat(0, NO_EPOCH)  # a status that somebody asked this node for is no heartbeat
    assert told_of(world.step(DIED)) == ["unprotected", "died"]
    suspected = World(told=False)
    assert told_of(suspected.step(SUSPECTED)) == ["unprotected", "suspected"]
    assert told_of(suspected.step(DIED)) == ["died"], "once"


def test_attachment_and_death_while_the_coordinator_is_away_are_told_when_it_is_back_until_they_are_over() -> None:
    world = World(linked=False)
    assert told_of(world.step(DIED)) == []
    world.step(ev.LinkUp("coordinator"))
    assert told_of(world.step(ev.Arrived("coordinator", ms.NodeWelcome("c")))) == ["lost"]
    assert told_of(world.beats()) == told_of(world.beats()) == ["lost", "died"], "again and again"
    world.fence()
    assert "died" not in told_of(world.beats()), "its epoch is over"
