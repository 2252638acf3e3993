"""Deaths that are suspected first: said at once, made true, and reported when they are seen."""

from __future__ import annotations

from kvguard.core import events as ev
from kvguard.core.effects import KillProcess, Note, Send, SendReport
from kvguard.core.node import Node, NodeSettings
from kvguard.format import messages as ms
from kvguard.types import NO_EPOCH, Epoch, Rank, StreamId

R0, R1 = Rank(0, 0, 0), Rank(0, 1, 0)
LOCAL, OTHER = StreamId("i", R0, 7), StreamId("i", R1, 8)
SHAPE = ms.StreamShape(1, 4, 10, 40, 64)
E1, E2 = Epoch(1, "c"), Epoch(2, "c")
MS = 1_000_000
SUSPECTED = ev.DeathSuspected(3, LOCAL, "marked")
DIED = ev.ProcessDied(3, LOCAL, "killed", True)
REPORT = SendReport("coordinator", "i", E1)


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


def test_the_report_waits_for_the_death() -> None:
    world = World()
    world.step(SUSPECTED)
    out = world.fence()
    assert REPORT not in out and KillProcess(3, LOCAL, "its rank is given away: why") in out
    assert REPORT not in world.step(ev.LinkDown("coordinator", "x"))
    assert REPORT not in world.step(ev.LinkUp("coordinator")), "a new link is no death"
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
    assert REPORT not in world.step(ev.ProcessDied(4, OTHER, "killed", True))
    assert world.step(DIED)[-1] == REPORT


def test_a_round_for_another_rank_is_answered_at_once() -> None:
    """This one doesn't know of the suspect yet; the next will."""
    world = World()
    world.step(SUSPECTED)
    assert world.fence(lost=(R1,))[-1] == REPORT
    assert SendReport("coordinator", "i", E2) not in world.fence(E2, (R0, R1))
    assert world.step(DIED)[-1] == SendReport("coordinator", "i", E2)


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
