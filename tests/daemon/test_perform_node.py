"""A node's deeds, one after the other: from a pool through a frame into a replica, promises, reports, plans, and what a failed deed answers."""

from __future__ import annotations

import pytest

from kvguard.core import effects, events
from kvguard.core.promises import encode_epoch
from kvguard.daemon.perform_node import NodeShell, node_performer
from kvguard.format import wire
from kvguard.format.layout import Layout
from kvguard.format.lineage import birth_of
from kvguard.format.messages import PIECE_TOKENS, CutOp, Hello, Holding, IdsFrame, KvFrame, OpenOp, PlanOrder, Rebuild, Source
from kvguard.store.store import ReplicaStore
from kvguard.types import Clash, Epoch, Fork, Rank, StreamId
from tests.store.streams import Sent

ID = StreamId("llama", Rank(0, 1, 0), 7)
EPOCH = Epoch(1, "c")
LINEAGE = (Fork(1, 0),)


class World:
    """Transport, journal and engines that remember."""

    def __init__(self):
        self.sent, self.written, self.done = [], [], []
        self.store = ReplicaStore(None, 1 << 20, 0)
        self.shell = NodeShell(transport=self, journal=self, clock=lambda: 0, node="b", store=self.store, engines=self)
        self.perform = node_performer(self.shell)

    def send(self, link, head, payload=None):
        self.sent.append((link, wire.decode(head)[0], bytes(payload or b"")))
        return True

    def persist(self, key, value):
        self.written.append((key, value))

    def look(self, stream):
        return (events.StepsSeen(stream, 1, 1, 1, 0),)

    def holding(self, stream):
        return Holding(stream, "pool", True, (), (), (), (), ())

    def set_epoch(self, stream, epoch):
        self.done.append(("set_epoch", stream, epoch))

    def kill(self, incarnation):
        self.done.append(("kill", incarnation))

    def forget(self, stream):
        self.done.append(("forget", stream))

    def claim(self, plan, rebuild):
        raise OSError("no descriptors left")


@pytest.fixture
def world():
    made = World()
    yield made
    made.store.close()


@pytest.fixture
def life(make_life):
    return make_life(Layout.paged("m", "float32", 2, 8, 4, 2, 4))


def promise(world, counter=1):
    world.perform(effects.Persist("promise/llama", encode_epoch(Epoch(counter, "c"))))


def opened(world, life):
    """A replica with three positions of one sequence; returns what the apply of its KV said."""
    hello = Hello(ID, 77, EPOCH, "a", life.stream.shape)
    [probed] = world.perform(effects.Probe("in:1", hello))
    assert (probed.reason, probed.held.holding.positions) == ("", ())
    row = life.commit("one", 3, range(3), [5])
    world.shell.streams[ID] = life.stream
    [captured] = world.perform(life.order([(row, 0, 3, 5, PIECE_TOKENS)]))
    frame = IdsFrame(77, EPOCH, 1, (OpenOp(1, "one", 1, LINEAGE, b"r"),), (1,), (0,), (3,))
    generation = int(life.stream.table.row_generation(row))
    life.look()
    assert world.perform(effects.SendIds("peer:b", frame, ID, (row,), (generation,))) == ()
    [_, ids, _] = world.sent[-1]
    [applied] = world.perform(effects.Apply("in:1", 77, ids, 0))
    assert (applied.lane, applied.number, applied.gap) == ("ids", 1, "")
    kv = KvFrame(77, EPOCH, 1, 1, (1,), (0,), (3,), (5,), (1,), (PIECE_TOKENS,), captured.sums)
    assert world.perform(effects.SendKv("peer:b", kv, captured.buffer)) == ()
    _, kv, payload = world.sent[-1]
    buffer = world.shell.buffers.keep(memoryview(bytearray(payload)))
    [applied] = world.perform(effects.Apply("in:1", 77, kv, buffer))
    assert len(world.shell.buffers) == 0
    return applied


def test_from_pool_to_replica(world, life):
    promise(world)
    assert (applied := opened(world, life)).gap == "" and applied.lane == "kv"
    assert world.store.holdings("llama")[0].positions == (3,)
    assert world.shell.counters["captures"] == 1


def test_a_damaged_frame_is_told_as_a_gap(world, life):
    promise(world)
    world.shell.corrupt_frames = 1
    assert opened(world, life).gap.startswith("checksum")
    assert world.shell.counters["frames_corrupted"] == world.store.counters["checksum_failures"] == 1


def test_a_promise_binds_the_store_only_after_it_is_written(world, life):
    promise(world, 5)
    assert world.written == [("promise/llama", encode_epoch(Epoch(5, "c")))]
    [probed] = world.perform(effects.Probe("in:1", Hello(ID, 77, EPOCH, "a", life.stream.shape)))
    assert "epoch 1" in probed.reason
    assert world.shell.epochs == {"llama": Epoch(5, "c")}


def test_report_looks_once_more(world, life):
    promise(world)
    opened(world, life)
    own = StreamId("llama", Rank(0, 0, 0), 9)
    world.shell.local[own] = world.shell.streams[own] = life.stream
    seen = tuple(world.perform(effects.SendReport("coordinator", "llama", EPOCH, (own,))))
    assert seen == (events.StepsSeen(own, 1, 1, 1, 0),)
    report = world.sent[-1][1]
    assert [(holding.kind, holding.stream) for holding in report.holdings] == [("pool", own), ("replica", ID)]
    assert report.pending == (own,)
    world.perform(effects.SetEpoch("llama", Epoch(2, "c")))
    world.perform(effects.KillProcess(4, own, "hung"))
    world.perform(effects.ForgetStream(own))
    assert world.done == [("set_epoch", own, Epoch(2, "c")), ("kill", 4), ("forget", own)]
    assert own not in world.shell.streams


def test_a_replica_pushed_on_is_captured_like_a_pool(world, life):
    promise(world)
    opened(world, life)
    del world.shell.streams[ID]
    attached, looked = world.perform(effects.PushReplica(ID, "c", "peer:c"))
    assert (attached.pushing, attached.epoch) == ("c", EPOCH)  # in the epoch that was promised here: an older one would be refused
    assert (looked.committed, looked.ids, looked.opened[0].sequence) == ((3,), (3,), "one")
    [grown] = looked.grown
    order = effects.Capture(9, ID, EPOCH, (0,), (looked.opened[0].generation,), (0,), (3,), grown.blocks, grown.generations, (PIECE_TOKENS,))
    [captured] = world.perform(order)
    wanted = bytearray(3 * life.stream.shape.token_bytes)
    life.pool.capture([5], [0], [3], memoryview(wanted))
    assert captured.stale == () and bytes(world.shell.buffers.take(captured.buffer)) == bytes(wanted)
    world.perform(effects.DropReplica(ID, "unpinned"))
    [gone] = world.perform(order)
    assert gone.stale == (0,) and gone.buffer == 0


def test_what_a_plan_says_is_another_sequence_goes_and_is_noted(world, life):
    promise(world)
    opened(world, life)
    lineages = ((*LINEAGE, Fork(EPOCH.counter, 3)),)
    order = PlanOrder("llama", EPOCH, ("one",), (3,), ("replica",), lineages, (3,), ("b",), (ID,), (), (), ("",), births=(birth_of(b"another"),))
    [carried] = world.perform(effects.CarryPlan(order, "c"))
    assert carried.known == () and world.store.holdings("llama")[0].sequences == ()
    assert world.shell.counters["note_other_life"] == 1 and world.store.counters["other_lives_dropped"] == 1


def test_two_lives_that_cannot_stand_in_one_pool_cost_no_standby(world):
    """The claim is refused before the engines are asked (World.claim fails), with what the next plan has to leave out."""
    lives = [StreamId("llama", Rank(0, 0, 0), life) for life in (1, 2)]
    for session, (stream, name) in enumerate(zip(lives, ("a", "b"), strict=True), 1):
        sent = Sent(world.store, stream=stream, session=session)
        sent.open(1, name, 8)
        sent.ids(CutOp(1, 4, 2, LINEAGE), extend=((1, 4, (70 + session, 7, 7, 7)),))
        assert sent.fill(1, name, [3, 4], 8) == ((), "")

    def claimed(position):
        rebuild = Rebuild(lives[0].rank, "b", 5, (Source("replica", "b", lives[0]), Source("replica", "b", lives[1])), (0, 1))
        columns = ("replica", "replica"), (LINEAGE, LINEAGE), (8, 8), ("b", "b"), tuple(lives)
        [restored] = world.perform(effects.Claim(PlanOrder("llama", EPOCH, ("a", "b"), (8, position), *columns, (rebuild,), (), ("", "")), rebuild))
        return restored

    assert claimed(8).clashes == (Clash(lives[0], "a", 4), Clash(lives[1], "b", 4)) and "other sequences in the same blocks" in claimed(8).error
    assert claimed(4).clashes == () and claimed(4).error == "OSError: no descriptors left", "what they share is one prefix"


def test_failed_deeds_answer(world):
    rebuild = Rebuild(Rank(0, 0, 0), "b", 5, (), ())
    plan = PlanOrder("llama", EPOCH, (), (), (), (), (), (), (), (rebuild,), (), ())
    [restored] = world.perform(effects.Claim(plan, rebuild))
    assert restored.error == "OSError: no descriptors left" and restored.rank == rebuild.rank
    [stale] = world.perform(effects.Capture(3, ID, EPOCH, (0, 0), (1, 1), (0, 4), (4, 4), (1, 2), (1, 1), (0, 0)))
    assert stale.stale == (0, 1)
    assert tuple(world.perform(effects.PushReplica(ID, "c", "peer:c"))) == ()
    assert world.shell.counters["deeds_failed_PushReplica"] == 1
