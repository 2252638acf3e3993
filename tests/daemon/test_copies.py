"""A GPU whose copies stand still, under real cores, loops, deeds and frames: everything else of the daemon goes on, and what comes too late is thrown away.

The GPUs are rehearsed; a gate in one's driver holds its copies until the test lets them go.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import threading
import time
import weakref

import pytest

from kvguard.core import effects, events
from kvguard.core.node import COORDINATOR, Node, NodeSettings
from kvguard.daemon import copies as copying
from kvguard.daemon import workers as working
from kvguard.daemon.copies import Copies
from kvguard.daemon.loop import Loop
from kvguard.daemon.measure import Measures
from kvguard.daemon.metrics import NodeFigures
from kvguard.daemon.perform import arrived
from kvguard.daemon.perform_node import NodeShell, node_performer
from kvguard.daemon.ranks import Ranks
from kvguard.daemon.whereabouts import processes
from kvguard.daemon.workers import Workers
from kvguard.device.cuda import Capturing, CudaDevice
from kvguard.device.rehearsal import Rehearsal
from kvguard.engine.table import TableWriter
from kvguard.errors import DeviceLost
from kvguard.format import local, wire
from kvguard.format import messages as ms
from kvguard.format.layout import Layout
from kvguard.format.messages import PIECE_TOKENS
from kvguard.format.rows import WRITTEN_AT, Geometry
from kvguard.store.store import ReplicaStore
from kvguard.transport.base import Frame
from kvguard.types import NO_EPOCH, Epoch, Fork, Rank, StreamId

LAYOUT = Layout.paged("m", "float32", 2, 8, 4, 2, 4)
SLOW, QUICK = StreamId("llama", Rank(0, 0, 0), 7), StreamId("llama", Rank(0, 1, 0), 8)
WAIT_S = 30
BEAT_NS = 10_000_000
E1 = Epoch(1, "c")
XID = "Xid 79: the GPU has fallen off the bus"


class Gpu(Rehearsal):
    """`gate` not set: its copies wait. A handle opens in this process, too, which is on both sides here."""

    def __init__(self, uuid: str) -> None:
        super().__init__()
        self.uuid = uuid
        self.gate, self.held = threading.Event(), False
        self.gate.set()
        self.waits = threading.Event()

    def open_handle(self, handle: bytes) -> int:
        _, number, _, size = (int(part) for part in handle.split())
        return self._map(os.dup(number), size, False)

    def copy_rows(self, *arguments) -> None:
        if not self.gate.is_set():
            self.waits.set()
            assert self.gate.wait(WAIT_S)
        super().copy_rows(*arguments)


class Engine:
    """A process that can die, and what it shares."""

    def __init__(self, stream: StreamId, gpu: str) -> None:
        self.stream = stream
        self.process = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
        self.pool = CudaDevice(lambda: (Gpu(gpu),)).allocate(LAYOUT)
        self.bytes = os.urandom(LAYOUT.pool_bytes)
        self.pool.scatter_blocks(range(8), memoryview(self.bytes))
        self.writer = TableWriter.create(Geometry(4, 8, 8, 64, 4))
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.row, self.length = self.writer.open("one", (Fork(0, 0),), b"r"), 0

    def begin_anew(self) -> None:
        """With a table in which no sequence ever was."""
        self.writer.close()
        self.writer = TableWriter.create(Geometry(4, 8, 8, 64, 4))

    def descriptors(self) -> list[int]:
        return [os.pidfd_open(self.process.pid), os.dup(self.bell), os.dup(self.writer.fd), *self.pool.export()]

    def commit(self, count: int) -> None:
        self.writer.step += 1
        length = self.length + count
        known = -(-self.length // 4)
        self.writer.commit(self.row, length, range(self.length, length), range(known, -(-length // 4)))
        self.writer.publish()
        self.writer.views.words[WRITTEN_AT // 8] = self.writer.step
        self.length = length
        os.eventfd_write(self.bell, 1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        self.process.stdin.close()
        self.pool.close()
        self.writer.close()
        os.close(self.bell)


class Daemon:
    """A node: `said` to the coordinator, in order; frames to a peer arrive there in its next turn."""

    def __init__(self, name: str, gpus=()) -> None:
        self.name, self.peers, self.inbox, self.said, self.told, self.skew_ns = name, {}, [], [], [], 0
        self.core = Node(NodeSettings(name, 9, f"tcp://{name}", "1", heartbeat_ns=BEAT_NS, hang_min_ns=0), {})
        self.store = ReplicaStore(None, 1 << 20, 0)
        self.shell = NodeShell(transport=self, journal=self, clock=time.monotonic_ns, node=name, store=self.store, engines=None)
        self.loop = Loop(self.core, node_performer(self.shell))
        self.workers = Workers(self.loop, lambda: time.monotonic_ns() + self.skew_ns)
        self.shell.copies = Copies(self.workers, self.loop.after)
        device = CudaDevice(lambda: gpus, Capturing(ring_bytes=1, staged_bytes=1))
        self.ranks = Ranks(device, self.store, self.loop, self.tell, self.shell.streams, self.shell.local, self.shell.epochs, 5000, self.workers)
        self.shell.engines = self.ranks

    def persist(self, key, value):
        """Nothing outlives a test."""

    def dial(self, link, address):
        self.shell.up[link] = link.removeprefix("peer:")
        self.loop.feed(events.LinkUp(link))

    def hang_up(self, link):
        self.shell.up.pop(link, None)

    def send(self, link, head, payload=None) -> bool:
        if link == COORDINATOR:
            self.said.append(wire.decode(head)[0])
        else:
            peer = self.peers[link.partition(":")[2]]
            back = f"in:{self.name}" if link.startswith("peer:") else f"peer:{self.name}"
            peer.inbox.append(Frame(back, bytes(head), memoryview(bytearray(payload)) if payload is not None else None))
        return True

    def tell(self, connection, message, descriptors=()) -> bool:
        self.told.append(message)
        return True

    def hear(self, message) -> None:
        self.loop.feed(events.Arrived(COORDINATOR, message))

    def turn(self) -> None:
        while self.inbox:
            self.loop.feed(arrived(self.shell, self.inbox.pop(0)))
        self.loop.turn(0.001)
        self.core.check()

    def saw(self, kind) -> list:
        return [message for message in self.said if type(message) is kind]

    def faults(self) -> tuple | None:
        """Devices that can't be used, as the last heartbeat said; None before the first."""
        beats = self.saw(ms.Beat)
        return beats[-1].device_faults if beats else None

    def acked(self, stream: StreamId) -> int:
        known = self.core.outbound.streams.get(stream)
        return known.best(0) if known is not None and 0 in known.ledger.rows else 0

    def close(self) -> None:
        self.ranks.close()
        self.store.close()
        self.loop.close()


class World:
    """Node a with a rank on each of two GPUs, node b that holds their replicas."""

    def __init__(self) -> None:
        self.gpu, self.other = Gpu("GPU-1"), Gpu("GPU-2")
        self.a, self.b = Daemon("a", (self.gpu, self.other)), Daemon("b")
        self.a.peers["b"], self.b.peers["a"] = self.b, self.a
        self.slow, self.quick = Engine(SLOW, "GPU-1"), Engine(QUICK, "GPU-2")

    def start(self) -> None:
        for daemon in (self.a, self.b):
            daemon.loop.feed(events.LinkUp(COORDINATOR))
        for number, engine in enumerate((self.slow, self.quick), 1):
            assert type(self.attach(number, engine)) is local.Attached
            self.a.hear(ms.Assign("llama", engine.stream.rank, (("b", "tcp://b"),), ""))
            engine.commit(2)
        self.until(lambda: self.a.acked(SLOW) == self.a.acked(QUICK) == 2)

    def knock(self, number: int, engine: Engine, connection: int = 0) -> None:
        """Its Attach, over a connection of its own."""
        message = local.Attach("rank", "llama", number, NO_EPOCH, "endpoint", engine.stream, {"0.0.0": LAYOUT})
        for event in self.a.ranks.attach(connection or number, engine.process.pid, message, engine.descriptors()):
            self.a.loop.feed(event)

    def attach(self, number: int, engine: Engine) -> local.Local:
        """What it is answered."""
        before = len(self.a.told)
        self.knock(number, engine)
        self.until(lambda: len(self.a.told) > before)
        return self.a.told[before]

    def until(self, seen) -> None:
        deadline = time.monotonic() + WAIT_S
        while not seen():
            assert time.monotonic() < deadline, self.a.said[-3:]
            self.a.turn()
            self.b.turn()

    def goes_on(self) -> None:
        """Heartbeats leave, and the other rank's positions are acknowledged."""
        beats, wanted = len(self.a.saw(ms.Beat)), self.a.acked(QUICK) + 3
        self.quick.commit(3)
        self.until(lambda: self.a.acked(QUICK) == wanted and len(self.a.saw(ms.Beat)) >= beats + 3)

    def hold(self) -> None:
        """A copy of the slow one stands still."""
        self.gpu.gate.clear()
        self.slow.commit(3)
        self.until(self.gpu.waits.is_set)

    def rank(self) -> ms.RankBeat:
        """The slow one in a heartbeat from now."""
        beats = len(self.a.saw(ms.Beat))
        self.until(lambda: len(self.a.saw(ms.Beat)) > beats)
        return next(rank for rank in self.a.saw(ms.Beat)[-1].ranks if rank.stream == SLOW)

    def close(self) -> None:
        self.gpu.gate.set()
        for part in (self.a, self.b, self.slow, self.quick):
            part.close()


@contextlib.contextmanager
def running(made, monkeypatch):
    """That world, started. Its end waits for the GPUs' threads, however busy the machine is, and whatever became of the test."""
    monkeypatch.setattr(working, "JOIN_S", WAIT_S)
    try:
        made.start()
        yield made
    finally:
        made.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("kvguard-GPU")]


@pytest.fixture
def world(monkeypatch):
    with running(World(), monkeypatch) as made:
        yield made


def test_a_copy_that_stands_still_holds_up_nothing_else(world):
    world.hold()
    world.goes_on()
    assert world.a.acked(SLOW) == 2
    world.gpu.gate.set()
    world.until(lambda: world.a.acked(SLOW) == 5)
    replica = world.b.store.replica(SLOW)
    wanted = memoryview(bytearray(5 * LAYOUT.token_bytes))
    world.slow.pool.capture([0, 1], [0, 0], [4, 1], wanted)
    held = b"".join(bytes(replica.arena.tokens(block, 0, count)) for block, count in zip(replica.sequences["one"].blocks, (4, 1), strict=True))
    assert held == bytes(wanted)


def test_what_comes_after_a_fence_is_thrown_away(world):
    world.hold()
    frames = world.a.shell.counters["frames_out"]
    world.a.hear(ms.Fence("llama", E1, (QUICK.rank,), "a test"))
    world.until(lambda: world.a.saw(ms.Report))
    world.gpu.gate.set()
    world.until(lambda: world.a.shell.counters["captures_late"])
    assert world.a.shell.counters["frames_out"] == frames and not len(world.a.shell.buffers) and world.a.acked(SLOW) == 0  # nobody answers in the old epoch


def test_what_comes_after_a_detach_is_thrown_away_and_the_memory_given_back(world):
    world.hold()
    for event in world.a.ranks.detach(1):
        world.a.loop.feed(event)
    world.until(lambda: SLOW not in world.a.ranks.ranks)
    assert world.a.workers.releasing == processes(world.a.ranks)["releasing"] == 1
    world.goes_on()
    mapped = len(world.gpu._mapped)
    world.gpu.gate.set()
    world.until(lambda: not world.a.workers.releasing)
    assert world.a.shell.counters["captures_late"] == 1 and not len(world.a.shell.buffers) and len(world.gpu._mapped) == mapped - 2  # its pool, its ring


def test_salvage_runs_beside_the_loop_and_the_pool_is_pending_until_it_is_over(world):
    world.gpu.gate.clear()
    world.slow.kill()
    world.until(world.gpu.waits.is_set)
    world.goes_on()
    [fault] = {(fault.kind, fault.reason) for fault in world.a.saw(ms.Fault)}
    assert fault == ("suspected", "its process ended") and world.a.ranks.ranks[SLOW].stream.leaving
    world.a.hear(ms.Fence("llama", E1, (SLOW.rank,), "suspected"))
    world.until(lambda: E1 in world.a.shell.epochs.values())
    world.quick.commit(1)
    assert [report.pending for report in world.a.saw(ms.Report)] == [(SLOW,)]
    again = Engine(SLOW, "GPU-1")
    again.writer.close()
    again.writer = world.slow.writer
    refused = world.attach(3, again)
    assert "still being read" in refused.reason and not refused.final
    world.gpu.gate.set()
    world.until(lambda: not world.a.saw(ms.Report)[-1].pending)
    [holding] = [holding for holding in world.a.saw(ms.Report)[-1].holdings if holding.stream == SLOW]
    assert (holding.alive, holding.sequences, holding.positions) == (False, ("one",), (2,))
    assert world.a.saw(ms.Fault)[-1].salvageable and not world.a.ranks.ranks[SLOW].stream.leaving
    again.writer = TableWriter.create(Geometry(4, 8, 8, 64, 4))
    again.close()


def test_a_capture_that_waited_for_the_salvage_is_taken_from_what_was_salvaged(world):
    world.hold()
    world.slow.kill()
    world.until(lambda: world.a.ranks.ranks[SLOW].stream.leaving)
    world.gpu.gate.set()
    # What was under way when it died may be all that was missing: then it is acknowledged before the salvage is over.
    world.until(lambda: copying.gpu_of(world.a.ranks.ranks[SLOW].pool) == "" and world.a.core.outbound.streams[SLOW].death and world.a.acked(SLOW) == 5)
    replica = world.b.store.replica(SLOW)
    wanted = memoryview(bytearray(LAYOUT.token_bytes))
    world.slow.pool.capture([1], [0], [1], wanted)
    assert bytes(replica.arena.tokens(replica.sequences["one"].blocks[1], 0, 1)) == bytes(wanted)


def test_a_lost_gpu_is_an_unprotected_rank_with_a_reason_and_the_daemon_lives(world):
    world.gpu.lose(XID)
    world.slow.commit(3)
    world.until(world.a.faults)
    rank = world.rank()
    assert rank.state == "unprotected" and XID in rank.reason and "can't be read" in rank.reason
    [(device, reason)] = world.a.faults()
    assert device == "GPU-1" and XID in reason
    figures = NodeFigures(world.a.core, world.a.shell, Measures(world.a.core, time.monotonic_ns), dict)
    [sample] = next(family for family in figures.families() if family.name == "kvguard_device_faults").samples
    assert (sample.labels, sample.value) == ({"device": "GPU-1"}, 1)
    world.slow.commit(2)
    world.goes_on()
    world.slow.kill()
    world.until(lambda: world.a.saw(ms.Fault) and world.a.saw(ms.Fault)[-1].kind == "died")
    assert not world.a.saw(ms.Fault)[-1].salvageable and world.a.ranks.holding(SLOW).positions == (0,)
    world.goes_on()


def test_a_thread_that_hangs_is_an_unprotected_rank_and_its_death_waits_for_nothing(world):
    world.hold()
    world.a.skew_ns = working.STALL_NS
    world.until(world.a.faults)
    assert "GPU-1 has not moved a byte" in world.rank().reason and world.a.workers.progressing()
    world.goes_on()
    world.slow.kill()
    world.until(lambda: world.a.saw(ms.Fault) and world.a.saw(ms.Fault)[-1].kind == "died")
    assert not world.a.saw(ms.Fault)[-1].salvageable and world.a.workers.releasing == 1  # its memory is given back should the thread come back
    other = Engine(SLOW._replace(pool=9), "GPU-1")
    refused = world.attach(3, other)
    assert "has not moved" in refused.reason and not refused.final
    world.gpu.gate.set()
    world.until(lambda: not world.a.workers.releasing and not world.a.workers.faults)
    assert type(world.attach(3, other)) is local.Attached
    world.a.hear(ms.Assign("llama", SLOW.rank, (("b", "tcp://b"),), ""))
    other.commit(2)
    world.until(lambda: world.a.acked(other.stream) == 2 and world.a.faults() == ())
    other.close()


# ---- host memory --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def host(make_life, monkeypatch):
    """A host pool, and copies whose later turns are taken by hand."""
    monkeypatch.setattr(copying, "SLICE_BYTES", 4 * LAYOUT.token_bytes)
    made = make_life(LAYOUT)
    made.later = []
    made.shell = NodeShell(transport=None, journal=None, clock=lambda: 0, node="a", store=None, engines=None)
    made.shell.copies = Copies(None, lambda delay_ns, ready: made.later.append(ready), 2 * LAYOUT.token_bytes)
    made.shell.streams[made.stream.id] = made.stream
    made.perform = node_performer(made.shell)
    return made


def test_large_captures_of_host_memory_take_turns_and_small_ones_do_not_wait(host):
    row = host.commit("one", 20, range(20), [0, 1, 2, 3, 4])
    large = [effects.Capture(number, *_columns(host.order([(row, 4 * number, 4, number, PIECE_TOKENS)]))) for number in range(3)]
    assert [tuple(host.perform(one)) for one in large] == [(), (), ()]
    [small] = host.perform(effects.Capture(9, *_columns(host.order([(row, 16, 1, 4, PIECE_TOKENS)]))))
    assert (small.id, small.payload_bytes) == (9, LAYOUT.token_bytes) and len(host.later) == 1
    for number in range(3):  # one slice a turn
        [done] = host.later.pop(0)()
        assert (done.id, done.payload_bytes, done.stale) == (number, 4 * LAYOUT.token_bytes, ())
        assert len(host.later) == (number < 2)


def test_one_that_waited_for_its_turn_is_stale_where_its_block_was_given_up(host):
    row = host.commit("one", 4, range(4), [0])
    assert tuple(host.perform(host.order([(row, 0, 4, 0, PIECE_TOKENS)]))) == ()
    host.writer.release(row)
    [done] = host.later.pop()()
    assert done.stale == (0,) and not done.buffer
    row = host.commit("two", 4, range(4), [1])
    order = host.order([(row, 0, 4, 1, PIECE_TOKENS)])
    assert tuple(host.perform(order)) == ()
    del host.shell.streams[host.stream.id]
    [done] = host.later.pop()()
    assert done.stale == (0,) and host.shell.counters["captures_late"] == 1


def test_a_pool_that_is_lost_is_said_once_and_never_read_again(host, caplog):
    row = host.commit("one", 1, [1], [0])
    asked = []

    class Lost:
        def capture(self, blocks, starts, counts, out):
            asked.append(1)
            raise DeviceLost(XID)

    host.stream.pool = Lost()
    order = host.order([(row, 0, 1, 0, PIECE_TOKENS)])
    [stale, lost] = host.perform(order)
    assert stale.stale == (0,) and lost == events.PoolLost(host.stream.id, 1, XID) and host.stream.lost == XID
    [stale] = host.perform(order)
    assert stale.stale == (0,) and asked == [1] and caplog.text.count(XID) == 1


@pytest.mark.parametrize("large", [False, True])
def test_a_capture_that_failed_keeps_no_memory_until_the_collector_comes(host, large):
    row = host.commit("one", 4, range(4), [0])

    class Lost:
        def capture(self, blocks, starts, counts, out):
            raise DeviceLost(XID)

    gc.disable()
    try:
        pool = host.stream.pool = Lost()
        gone = weakref.ref(pool)
        done = [*host.perform(host.order([(row, 0, 4 if large else 1, 0, PIECE_TOKENS)])), *(host.later.pop()() if large else ())]
        assert type(done[-1]) is events.PoolLost
        del pool
        host.stream.pool = None
        assert gone() is None
    finally:
        gc.enable()


def _columns(order: effects.Capture) -> tuple:
    return tuple(getattr(order, name) for name in order.__struct_fields__[1:])
