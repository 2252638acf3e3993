"""A GPU that opens, makes or closes memory for ever: heartbeats and other ranks go on, the deadline makes a fault, and what comes late is undone.

The GPUs are rehearsed; a gate in one's driver holds its calls until the test lets them go.
"""

from __future__ import annotations

import gc
import os
import threading

import pytest

from kvguard.core import events
from kvguard.daemon import node as starting
from kvguard.daemon import workers as working
from kvguard.daemon.arrivals import NotYet
from kvguard.daemon.lending import Lending
from kvguard.device import open_device
from kvguard.device.cuda import CudaDevice
from kvguard.device.rehearsal import Rehearsal
from kvguard.format import local
from kvguard.format import messages as ms
from kvguard.types import Epoch, Rank
from tests.daemon.test_copies import E1, LAYOUT, QUICK, SLOW, WAIT_S, XID, Engine, World, running

NEW = SLOW._replace(rank=Rank(0, 2, 0), pool=21)


def descriptors() -> set:
    """What this process has open, as the kernel calls it. What waits for the collector has descriptors, too."""
    gc.collect()
    return {os.readlink(one.path) + one.name for one in os.scandir("/proc/self/fd") if os.path.lexists(one.path)}


class Gate:
    """Calls that stop here where it is shut."""

    def __init__(self) -> None:
        self._open, self.reached = threading.Event(), threading.Event()
        self._open.set()

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def let(self) -> None:
        self._open.set()

    def before(self, call):
        def gated(*arguments):
            if not self._open.is_set():
                self.reached.set()
                assert self._open.wait(WAIT_S)
            return call(*arguments)

        return gated


class Door(World):
    """A world in which what is opened, made and closed on the slow GPU may stop at a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.opening, self.closing = Gate(), Gate()
        self.gpu.open_handle, self.gpu.close_handle = self.opening.before(self.gpu.open_handle), self.closing.before(self.gpu.close_handle)
        self.gpu.virtual.create = self.opening.before(self.gpu.virtual.create)
        self.lending = Lending(self.a.ranks._arrivals._device, self.a.workers, self.a.tell)
        self.engines: list[Engine] = []
        self.lost_maps = 0

    def engine(self, stream=NEW, gpu="GPU-1") -> Engine:
        self.engines.append(Engine(stream, gpu))
        return self.engines[-1]

    def hold(self, number: int, engine: Engine) -> int:
        """Its pool is being opened, and is not. How many answers were given before."""
        self.opening.shut()
        before = len(self.a.told)
        self.knock(number, engine)
        self.until(self.opening.reached.is_set)
        assert len(self.a.told) == before and engine.stream not in self.a.ranks.ranks
        return before

    def answer(self, before: int) -> local.Local:
        self.until(lambda: len(self.a.told) > before)
        [answer] = self.a.told[before:]
        return answer

    def idle(self) -> bool:
        return all(worker.is_idle for worker in self.a.workers._by_gpu.values())

    def close(self) -> None:
        for gate in (self.opening, self.closing):
            gate.let()
        super().close()
        for engine in self.engines:
            engine.close()


@pytest.fixture
def world(monkeypatch, let_go):
    """Whatever came of an arrival, nothing of it is mapped or open when its engine has been forgotten."""
    before = descriptors()
    with running(Door(), monkeypatch) as made:
        yield made
    assert len(made.gpu._mapped) == made.lost_maps, "memory of the slow GPU is still mapped"
    while made.gpu._mapped:
        os.close(made.gpu._mapped.popitem()[1].file)
    for known in (made.a.shell.streams, made.a.shell.local):
        known.clear()
    let_go()
    assert descriptors() - before == set(), "descriptors are left"


def test_a_pool_that_is_opened_for_long_holds_up_nobody_else(world):
    engine = world.engine()
    before = world.hold(3, engine)
    world.goes_on()
    world.opening.let()
    assert type(world.answer(before)) is local.Attached
    world.a.hear(ms.Assign("llama", NEW.rank, (("b", "tcp://b"),), ""))
    engine.commit(2)
    world.until(lambda: world.a.acked(NEW) == 2)
    world.a.ranks.forget(NEW)


def test_a_gpu_that_does_not_open_a_pool_in_time_is_a_fault_and_what_it_opens_late_is_closed(world):
    engine = world.engine()
    mapped = len(world.gpu._mapped)
    before = world.hold(3, engine)
    world.a.skew_ns = working.STALL_NS
    refused = world.answer(before)
    assert type(refused) is local.AttachRefused and not refused.final and "GPU-1 has not moved" in refused.reason
    world.until(world.a.faults)
    [(device, reason)] = world.a.faults()
    assert device == "GPU-1" and "has not moved" in reason and world.a.workers.progressing()
    world.goes_on()
    assert "has not moved" in world.attach(4, world.engine(NEW._replace(pool=22))).reason
    world.opening.let()
    world.until(lambda: not world.a.workers._by_gpu["GPU-1"].given_up)
    world.until(world.idle)
    assert len(world.gpu._mapped) == mapped and NEW not in world.a.ranks.ranks  # opened late, closed again
    world.until(lambda: world.a.faults() == ())
    assert type(world.attach(3, engine)) is local.Attached


def test_the_slow_gpu_s_own_ranks_are_unprotected_while_it_does_not_answer(world):
    world.hold(3, world.engine())
    world.a.skew_ns = working.STALL_NS
    world.slow.commit(1)
    world.until(lambda: world.a.ranks.ranks[SLOW].stream.lost)
    rank = world.rank()
    assert rank.state == "unprotected" and "has not moved" in rank.reason
    world.goes_on()
    world.opening.let()
    world.until(lambda: world.a.faults() == ())


def test_a_daemon_that_ends_does_not_wait_for_it(world):
    """What was opened by then is closed in its thread, as soon as that comes back."""
    engine = world.engine()
    world.hold(3, engine)
    world.a.skew_ns = working.STALL_NS
    world.until(world.a.faults)
    [thread] = [thread for thread in threading.enumerate() if thread.name == "kvguard-GPU-1"]
    bell = world.a.workers._bell
    world.a.ranks.close()
    assert thread.is_alive(), "nobody waited for it"
    world.opening.let()
    thread.join(WAIT_S)
    assert not thread.is_alive() and not world.gpu._mapped
    os.close(bell)  # was left to the thread


def test_a_second_attach_waits_for_the_first_and_a_line_that_goes_ends_neither(world):
    engine = world.engine()
    before = world.hold(3, engine)
    for number, other in ((3, engine), (4, world.engine(NEW._replace(pool=22)))):  # its own, over a new line; another process as the same rank
        world.knock(number, other, 50 + number)
        refused = world.a.told.pop()
        assert "being opened" in refused.reason and not refused.final
    world.a.ranks.disconnected(3)
    world.opening.let()
    world.until(lambda: NEW in world.a.ranks.ranks)
    rank = world.a.ranks.ranks[NEW]
    assert rank.connection == 0 and rank.stream.alive
    world.until(lambda: len(world.a.told) > before)
    world.opening.shut()  # nothing is opened for it again
    world.knock(3, engine, 53)
    assert type(world.a.told[-1]) is local.Attached and rank.connection == 53
    refused = world.attach(4, world.engines[1])
    assert "held by a process that lives" in refused.reason and refused.final


@pytest.mark.parametrize("line", ["stands", "goes"])
def test_what_is_said_behind_an_attach_is_heard_behind_it(world, line):
    """A standby that took a rank says at once that it has restored it: heard too soon, the coordinator gave the rank away again."""
    world.hold(3, world.engine())
    restored, heard = local.Restored("llama", NEW.rank, E1), []

    def hear():
        heard.extend(world.a.ranks.restored(3, restored))
        return ()

    assert world.a.ranks.behind(3, hear) and not world.a.ranks.behind(2, hear)
    world.goes_on()
    assert not heard
    if line == "goes":
        world.a.ranks.disconnected(3)
    world.opening.let()
    world.until(lambda: heard)
    assert world.a.ranks.ranks[NEW].connection == (3 if line == "stands" else 0)
    assert [(one.stream, one.error) for one in heard if type(one) is events.EngineRestored] == [(NEW, "")]
    assert not world.a.ranks.behind(3, hear)


def test_who_detaches_before_it_is_attached_leaves_nothing(world):
    mapped = len(world.gpu._mapped)
    before = world.hold(3, world.engine())
    assert world.a.ranks.behind(3, pytest.fail)
    assert list(world.a.ranks.detach(3)) == []
    world.opening.let()
    assert "detached" in world.answer(before).reason
    world.until(lambda: not world.a.workers.releasing)
    assert NEW not in world.a.ranks.ranks and len(world.gpu._mapped) == mapped and not len(world.a.ranks._arrivals)


def test_a_process_that_dies_before_it_is_attached_is_a_death_with_what_it_had_committed(world):
    engine = world.engine()
    engine.commit(3)
    world.hold(3, engine)
    engine.kill()
    world.a.ranks.disconnected(3)
    world.goes_on()
    world.opening.let()
    world.until(lambda: [fault for fault in world.a.saw(ms.Fault) if fault.stream == NEW and fault.kind == "died"])
    assert world.a.saw(ms.Fault)[-1].salvageable and world.a.ranks.holding(NEW).positions == (3,)


def test_one_whose_exporter_is_gone_by_then_is_refused(world):
    engine = world.engine()
    before = world.hold(3, engine)
    world.gpu.lose(XID)  # whatever it is that the driver says then
    world.opening.let()
    refused = world.answer(before)
    assert refused.final and XID in refused.reason and NEW not in world.a.ranks.ranks
    world.until(world.a.faults)
    assert dict(world.a.faults()).keys() == {"GPU-1"}  # lost while it opened: a fault like one of a capture
    world.goes_on()
    world.gpu.lose("")
    world.lost_maps = 1  # what a lost GPU doesn't give back goes with its process


def test_an_error_that_is_logged_takes_nothing_along(world, caplog):
    """Whoever keeps the record kept the error, its frames, and so a table and a pool that were given back long since."""
    world.gpu.lose(XID)
    world.slow.commit(1)
    world.until(world.a.faults)
    said = [record for record in caplog.get_records("call") if XID in record.getMessage()]
    assert said and not [record for record in said if record.exc_info or any(isinstance(argument, BaseException) for argument in record.args)]
    world.gpu.lose("")


@pytest.mark.parametrize("has", ["nothing ever", "an open sequence", "committed positions"])
def test_a_fence_before_it_is_attached_binds_it(world, has):
    engine = world.engine()
    if has == "nothing ever":
        engine.begin_anew()
    elif has == "committed positions":
        engine.commit(3)
    before = world.hold(3, engine)
    world.a.hear(ms.Fence("llama", E1, (QUICK.rank,), "a test"))
    world.until(lambda: world.a.saw(ms.Report))
    assert NEW not in {holding.stream for holding in world.a.saw(ms.Report)[-1].holdings}
    world.opening.let()
    assert world.answer(before) == local.Attached(E1)
    assert world.a.ranks.ranks[NEW].reader.epoch() == E1.counter  # its next step is fenced
    known = world.a.core.outbound.streams[NEW]
    assert known.epoch == (E1 if has == "nothing ever" else Epoch(0, "")), "the engine judges by the same word (Guard._attached)"


def successor(world):
    """Another process at the door with the dead one's table: the engine, its own table, and what had been told before it knocked. Its pool is being opened."""
    world.slow.kill()
    world.until(lambda: not world.a.ranks.ranks[SLOW].stream.alive)
    again = world.engine(SLOW)
    mine, again.writer = again.writer, world.slow.writer
    before = len(world.a.told)
    world.opening.shut()
    world.knock(3, again)
    world.until(world.opening.reached.is_set)
    return again, mine, before


def test_a_successor_whose_pool_is_opened_for_long_goes_on_where_the_dead_one_was(world):
    """It brings another memory: what its predecessor's was is salvaged by then."""
    again, mine, before = successor(world)
    world.goes_on()
    assert not world.a.ranks.ranks[SLOW].stream.alive
    world.opening.let()
    assert type(world.answer(before)) is local.Attached
    rank = world.a.ranks.ranks[SLOW]
    assert rank.stream.alive and rank.pool.gpu == "GPU-1" and rank.stream.incarnation == 3
    again.writer = mine


def test_a_stream_that_is_forgotten_meanwhile_begins_anew(world):
    again, mine, before = successor(world)
    world.a.ranks.forget(SLOW)
    world.opening.let()
    assert type(world.answer(before)) is local.Attached and world.a.ranks.ranks[SLOW].pool.gpu == "GPU-1"
    again.writer = mine


def test_closing_that_hangs_is_a_fault_and_the_next_engine_is_told_to_wait(world):
    world.closing.shut()
    for event in world.a.ranks.detach(1):
        world.a.loop.feed(event)
    world.until(world.closing.reached.is_set)
    world.goes_on()
    world.a.skew_ns = working.STALL_NS
    world.until(world.a.faults)
    assert "has not moved" in dict(world.a.faults())["GPU-1"] and world.a.workers.releasing == 1
    assert "has not moved" in world.attach(3, world.engine()).reason
    world.closing.let()
    world.until(lambda: not world.a.workers.releasing)
    assert type(world.attach(3, world.engines[0])) is local.Attached
    world.until(lambda: world.a.faults() == ())


# ---- memory that is lent ------------------------------------------------------------------------------------------------------------


def wanted(world, connection: int, gpu: str = "GPU-1") -> None:
    for event in world.lending.lend(connection, local.PoolWanted(LAYOUT, "cuda", gpu)):
        world.a.loop.feed(event)


def test_memory_that_is_made_for_long_holds_up_nobody_else(world):
    world.opening.shut()
    before = len(world.a.told)
    wanted(world, 7)
    world.until(world.opening.reached.is_set)
    world.goes_on()
    wanted(world, 7)
    assert "already" in world.a.told.pop().reason
    wanted(world, 8, "GPU-9")
    assert "GPU-9" in world.a.told.pop().reason
    world.opening.let()
    assert type(world.answer(before)) is local.PoolLent
    wanted(world, 7)
    assert type(world.answer(before + 1)) is local.PoolLent


def test_memory_that_is_not_made_in_time_is_refused_and_closed_when_it_comes(world):
    before_it = descriptors()
    world.opening.shut()
    before = len(world.a.told)
    wanted(world, 7)
    world.until(world.opening.reached.is_set)
    world.a.skew_ns = working.STALL_NS
    assert "has not moved" in world.answer(before).reason
    world.until(world.a.faults)
    world.opening.let()
    world.until(lambda: world.a.faults() == ())
    assert descriptors() <= before_it


# ---- a driver that hangs at the start -------------------------------------------------------------------------------------------------


def test_a_driver_that_opens_no_context_in_time_is_a_fault_and_host_pools_are_taken(monkeypatch):
    gate, driver = Gate(), Rehearsal()
    device = CudaDevice(gate.before(lambda: (driver,)), kind="rehearsal")
    monkeypatch.setattr(starting, "open_device", lambda kind, **capturing: device)
    later = starting.LaterDevice("rehearsal")
    gate.shut()
    try:
        later.prepare(wait_s=0.0)
        assert later.said() is None
        host = open_device("host").allocate(LAYOUT)
        [descriptor] = host.export()
        assert later.where([descriptor]) == ""
        later.open(LAYOUT, [descriptor], writable=False).close()
        pool = CudaDevice(lambda: (driver,)).allocate(LAYOUT)
        exported = pool.export()
        for asked in (lambda: later.where(exported), later.lends_on):
            with pytest.raises(NotYet, match="has not opened its contexts"):
                asked()
    finally:
        gate.let()
        later._preparing.join(WAIT_S)
    assert later.where(exported) == later.lends_on() == driver.uuid and later.said() == ""
    os.close(*exported)
    pool.close()
    host.close()
