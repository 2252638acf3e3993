"""Who is called alive, suspect or dead, and why."""

from __future__ import annotations

from kvguard.core.membership import ALIVE, DEAD, MS, SUSPECT, FairClock, Membership, Patience, Session
from kvguard.format.messages import Beat, EmitterBeat, NodeHello, RankBeat, StandbyBeat
from kvguard.types import NO_EPOCH, Rank, StreamId

I = "i"


def rank_beat(pp: int, progress: int, sequences: int = 1, dp: int = 0, life: int = 1) -> RankBeat:
    return RankBeat(StreamId(I, Rank(dp, pp, 0), life), NO_EPOCH, 7, "", "protected", "", (), sequences, 0, 0, 0, 0, 0, 0.0, progress)


class World:
    """Nodes with one rank each; time in ms."""

    def __init__(self, *nodes: str, emitter: bool = False, silence_ms: int = 0):
        self.membership, self.ms = Membership(Patience()), 0
        for pp, node in enumerate(nodes):
            self.membership.hello(0, 0, f"in:{node}", NodeHello(node, 1, f"tcp://{node}", (), "1"))
            self.beat(node, pp, 1)
        if emitter:
            self.membership.sessions[I] = Session(1, "in:e", 0, Patience().of_emitter(silence_ms))

    def beat(self, node: str, pp: int | None, progress: int = 0, sequences: int = 1, dp: int = 0, incarnation: int = 1):
        ranks = () if pp is None else (rank_beat(pp, progress, sequences, dp),)
        new, strange = self.membership.beat(self.ms * MS, self.ms * MS, Beat(node, incarnation, 1, ranks, (StandbyBeat(I, 1, "", {}),), (), 0, 0))
        for one in new:
            self.membership.adopt(self.ms * MS, node, one)
        self.membership.check()
        return new, strange

    def emitter(self, progress: int, scheduled: int = 1) -> None:
        self.membership.emitter_beat(self.ms * MS, self.membership.sessions[I], EmitterBeat(I, 1, NO_EPOCH, scheduled, progress))

    def judge(self, ms: int):
        self.ms = ms
        verdicts = self.membership.judge(ms * MS)
        self.membership.check()
        return {(v.what, v.subject): v for v in verdicts}

    def state(self, node: str) -> str:
        return self.membership.nodes[node].state


def test_silence_with_work_and_no_progress_is_death():
    world = World("a", "b")
    world.judge(400)
    world.beat("a", 0, 1)
    assert world.state("b") == ALIVE
    assert ("state", "b") in world.judge(600) and world.state("b") == SUSPECT
    world.beat("a", 0, 1)
    verdict = world.judge(1000)["node", "b"]
    assert verdict.ranks == ((I, Rank(0, 1, 0)),) and verdict.since_ns == 0 and "nothing of i rises" in verdict.reason
    world.beat("a", 0, 1)
    assert world.state("b") == DEAD and world.judge(1100) == {}, "said once"


def test_progress_of_a_survivor_proves_the_node():
    world = World("a", "b")
    for ms in range(100, 3000, 100):
        verdicts = world.judge(ms)
        world.beat("a", 0, ms)
        assert ("node", "b") not in verdicts
    assert world.state("b") == SUSPECT and "its daemon is gone" in world.membership.nodes["b"].reason
    for ms in range(3000, 3900, 100):
        assert ("node", "b") not in world.judge(ms), "the window runs from the last rise"
        world.beat("a", 0, 2900)
    assert ("node", "b") in world.judge(3950)


def test_the_emitters_progress_proves_it_too_and_its_idleness_waits():
    world = World("a", emitter=True)
    for ms in range(100, 2000, 100):
        assert ("node", "a") not in world.judge(ms)
        world.emitter(ms)
    world.emitter(1900, scheduled=0)
    for ms in range(2000, 5000, 100):
        assert ("node", "a") not in world.judge(ms)
        world.emitter(1900, scheduled=0)
    assert world.state("a") == SUSPECT and "idle" in world.membership.nodes["a"].reason
    world.emitter(1900, scheduled=2)
    assert ("node", "a") not in world.judge(5500)
    world.emitter(1900, scheduled=2)
    assert ("node", "a") in world.judge(5900), "work has been scheduled for the whole threshold"


def test_another_dp_proves_nothing():
    world = World("a", "b", emitter=True)
    world.beat("c", None)
    for ms in range(100, 1500, 100):
        assert ("node", "a") not in world.judge(ms), "of the same dp, and with one dp the emitter too, they do"
        world.beat("b", 1, ms, dp=0)
        world.emitter(ms)
    lonely = World("a", "b", emitter=True)
    del lonely.membership.members[I][Rank(0, 1, 0)]
    lonely.beat("b", 0, 1, dp=1)
    for ms in range(100, 1100, 100):
        assert ("node", "a") not in lonely.judge(ms)
        lonely.beat("b", 0, ms, dp=1)
        lonely.emitter(ms)
    assert ("node", "a") in lonely.judge(1100), "a dp group of its own isn't vouched for by the other group, nor by what the other gives the emitter"


def test_a_node_without_ranks_dies_by_silence_alone():
    world = World("a")
    world.membership.hello(0, 0, "in:h", NodeHello("h", 1, "tcp://h", (), "1"))
    world.beat("h", None)
    world.judge(900)
    world.beat("a", 0, 9)
    assert world.judge(1000)["node", "h"].ranks == ()
    world.beat("h", None)
    assert world.state("h") == ALIVE


def test_a_torn_link_is_a_hint():
    world = World("a", "b")
    assert world.membership.link_down("in:b", "reset", 0)[0].subject == "b" and world.state("b") == SUSPECT
    world.membership.hello(50 * MS, 50 * MS, "in:b2", NodeHello("b", 1, "tcp://b", (), "1"))
    assert world.state("b") == ALIVE and world.judge(100) == {}


def closed(world: World, ms: int, node: str = "a") -> None:
    """The node's kernel closes its daemon's connection: that process ended."""
    world.ms = ms
    world.membership.link_down(f"in:{node}", "connection lost", ms * MS)


def test_a_daemon_that_ended_is_waited_for_where_nobody_else_could_tell():
    """No emitter, no rank of it elsewhere: its engine may well be at work."""
    world = World("a")
    world.judge(90)
    closed(world, 100)
    for ms in range(200, 2000, 100):
        assert ("node", "a") not in world.judge(ms), "a daemon's restart may take so long"
    assert world.state("a") == SUSPECT and "its daemon ended" in world.membership.nodes["a"].reason
    verdict = world.judge(2000)["node", "a"]
    assert verdict.ranks == ((I, Rank(0, 0, 0)),) and "nobody" in verdict.reason


def test_a_node_that_falls_silent_is_dead_all_the_same():
    """Whoever pulls the plug closes no connection; the transport notices later, and says the same."""
    world = World("a")
    world.judge(700)
    closed(world, 800)
    assert ("node", "a") in world.judge(1000)


def test_a_daemon_that_ended_has_witnesses():
    pair = World("a", "b")
    closed(pair, 100)
    pair.ms = 900
    pair.beat("b", 1, 1)
    assert ("node", "a") in pair.judge(1000), "a rank elsewhere would see its progress"
    watched = World("a", emitter=True, silence_ms=3000)
    watched.emitter(1)
    closed(watched, 100)
    watched.ms = 900
    watched.emitter(1)
    assert ("node", "a") in watched.judge(1000), "so would the emitter"
    quiesced = World("a")
    quiesced.membership.recovering[I] = 0
    closed(quiesced, 100)
    assert ("node", "a") in quiesced.judge(1000), "nobody makes progress during a recovery"


def test_witnesses_that_are_silent_themselves_are_none():
    """An emitter within its promise; daemons that are restarted all at once: their engines may well be at work."""
    watched, pair = World("a", emitter=True, silence_ms=5000), World("a", "b")
    watched.emitter(1)
    for world, nodes in ((watched, "a"), (pair, "ab")):
        for node in nodes:
            closed(world, 100, node)
        for ms in range(200, 2000, 100):
            verdicts = world.judge(ms)
            assert not any(what == "node" for what, _ in verdicts), (nodes, ms)
        assert ("node", "a") in world.judge(2000) and "nobody else could see" in world.membership.nodes["a"].reason


def test_a_daemon_that_is_back_is_no_longer_one_that_ended():
    world = World("a")
    closed(world, 100)
    world.judge(900)
    world.membership.hello(950 * MS, 950 * MS, "in:a2", NodeHello("a", 2, "tcp://a", (), "1"))
    world.ms = 950
    world.beat("a", 0, 1, incarnation=2)
    assert world.state("a") == ALIVE
    assert ("node", "a") in world.judge(1950), "this time it fell silent"


def test_a_rank_that_its_node_does_not_list_has_a_grace_period():
    world = World("a", "b")
    assert world.membership.hello(0, 0, "in:b2", NodeHello("b", 2, "tcp://b", (), "1")) is True
    for ms in range(100, 2000, 100):
        assert world.judge(ms) == {}
        world.beat("a", 0, 1)
        world.beat("b", None, incarnation=2)
    verdict = world.judge(2000)["ranks", "b"]
    assert verdict.ranks == ((I, Rank(0, 1, 0)),)
    world.beat("b", 1, 1, incarnation=2)
    assert world.judge(2050) == {}, "it re-attached"


def test_a_rank_without_work_just_leaves():
    world = World("a", "b")
    world.beat("a", 0, 1, sequences=0)
    world.beat("b", 1, 1, sequences=0)
    for ms in range(100, 2100, 100):
        world.judge(ms)
        world.beat("a", 0, 1, sequences=0)
        world.beat("b", None)
    world.beat("b", None)
    assert ("gone", "b") in world.judge(2200)


def test_beats_of_a_former_daemon_are_ignored():
    world = World("a")
    world.membership.hello(0, 0, "in:a2", NodeHello("a", 2, "tcp://a", (), "1"))
    assert world.beat("a", 5, incarnation=1) == ([], [])
    assert Rank(0, 5, 0) not in world.membership.members[I]


def test_during_a_recovery_silence_is_enough():
    world = World("a", "b")
    world.membership.recovering[I] = 0
    world.membership.members[I][Rank(0, 0, 0)].beat = None
    world.judge(500)
    world.beat("a", 0, 1, sequences=0)
    assert ("node", "b") in world.judge(1000)


def test_a_silent_emitter_is_told_once():
    world = World("a", emitter=True)
    assert ("emitter", I) not in world.judge(999) and ("emitter", I) in world.judge(1000) and ("emitter", I) not in world.judge(1100)


def test_an_emitter_s_silence_is_its_own_promise_within_the_coordinators_bounds():
    for promised_ms, borne_ms in ((0, 1000), (200, 1000), (5000, 5000), (1 << 60, 60_000), (-5, 1000)):
        world = World("a", emitter=True, silence_ms=promised_ms)
        world.beat("a", 0, 1, sequences=0)
        assert ("emitter", I) not in world.judge(borne_ms - 1) and world.membership.next_deadline((borne_ms - 1) * MS) <= borne_ms * MS
        assert ("emitter", I) in world.judge(borne_ms), promised_ms


def test_the_clock_takes_out_its_own_sleep():
    clock = FairClock(100 * MS)
    assert clock.read(1000 * MS) == 1000 * MS
    clock.due_ns = 1100 * MS
    assert clock.read(1150 * MS) == 1150 * MS, "a little late is time like any other"
    clock.due_ns = 1250 * MS
    assert clock.read(9250 * MS) == 1250 * MS and clock.lost_ns == 8000 * MS
    assert clock.read(9300 * MS, late_ns=5 * MS) == 1300 * MS
    assert clock.read(9900 * MS, late_ns=600 * MS) == 1300 * MS


def test_ranks_of_one_dp_that_are_missed_together_are_lost_together():
    """One had let the last sequence go, the other hadn't yet, when their node came back without them: whoever was called gone was missing when the other came back."""
    world = World("a", emitter=True)  # which has nothing scheduled
    known = world.membership
    new, _ = known.beat(0, 0, Beat("a", 1, 2, (rank_beat(0, 1), rank_beat(1, 1, sequences=0)), (StandbyBeat(I, 1, "", {}),), (), 0, 0))
    known.adopt(0, "a", *new)
    known.hello(0, 0, "in:a:2", NodeHello("a", 2, "tcp://a", (), "1"))
    told = []
    while not told:
        world.ms += 100
        world.beat("a", None, incarnation=2)
        world.emitter(1, scheduled=0)
        told = [(verdict.what, verdict.ranks) for verdict in known.judge(world.ms * MS) if verdict.ranks]
    assert told == [("ranks", ((I, Rank(0, 0, 0)),)), ("ranks", ((I, Rank(0, 1, 0)),))]
