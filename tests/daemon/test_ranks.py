"""Attachments: what is refused before it is mapped, who may come back, and what a death tells. The engine is this process, or a child that can die."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading

import msgspec
import pytest

from kvguard.core import events
from kvguard.daemon import ranks as attaching
from kvguard.daemon.perform_node import NodeShell
from kvguard.daemon.ranks import Ranks
from kvguard.daemon.workers import Workers
from kvguard.device.host import HostDevice, HostPool
from kvguard.engine.table import TableWriter
from kvguard.format import local
from kvguard.format.layout import Layout, Shard
from kvguard.format.messages import PlanOrder, Rebuild, Source
from kvguard.format.rows import WRITTEN_AT, Geometry
from kvguard.store.store import ReplicaStore
from kvguard.types import NO_EPOCH, Epoch, Fork, Rank, StreamId
from tests.daemon.test_workers import Turns

LAYOUT = Layout.paged("m", "float32", 1, 8, 4, 1, 4)
ID = StreamId("llama", Rank(0, 0, 0), 7)


class Desk:
    """Ranks with everything around it: what was watched, what engines were told. `room`: how many more descriptors can be watched."""

    def __init__(self):
        self.watched = {}
        self.room = 99
        self.told = []
        self.store = ReplicaStore(None, 1 << 20, 0)
        self.shell = NodeShell(transport=None, journal=None, clock=lambda: 0, node="a", store=self.store, engines=None)
        self.ranks = Ranks(
            HostDevice(), self.store, self, self.tell, self.shell.streams, self.shell.local, self.shell.epochs, counters=self.shell.counters
        )

    def watch(self, descriptor, ready):
        if len(self.watched) >= self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.watched[descriptor] = ready

    def forget(self, descriptor):
        del self.watched[descriptor]

    def tell(self, connection, message, descriptors=()):
        self.told.append((connection, message, len(descriptors)))
        return True


class Life:
    """An engine's memories, attached for a process."""

    made: list[Life] = []

    def __init__(self, pid=0, layout=LAYOUT, geometry=None):
        self.pid = pid or os.getpid()
        self.pool = HostDevice().allocate(layout)
        self.writer = TableWriter.create(geometry or Geometry(4, layout.blocks, 8, 64, layout.block_tokens))
        self.bell = os.eventfd(0, os.EFD_NONBLOCK)
        self.made.append(self)

    def close(self):
        self.pool.close()
        self.writer.close()
        os.close(self.bell)
        self.pool = self.writer = None

    def descriptors(self, pidfd=None):
        return [os.pidfd_open(pidfd or self.pid), os.dup(self.bell), os.dup(self.writer.fd), *self.pool.export()]

    def commit(self, sequence, count):
        self.writer.step += 1
        row = self.writer.open(sequence, (Fork(0, 0),), b"r")
        self.writer.commit(row, count, range(count), [0])
        self.writer.publish()
        self.writer.views.words[WRITTEN_AT // 8] = self.writer.step


def message(role="rank", incarnation=1, stream=ID, layouts=None, **changed):
    return local.Attach(role, "llama", incarnation, NO_EPOCH, "endpoint", stream, {"0.0.0": LAYOUT} if layouts is None else layouts, **changed)


@pytest.fixture
def desk(let_go):
    """Whatever an engine does, nothing of it stays open when its ranks are forgotten."""
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    made = Desk()
    yield made
    made.ranks.close()
    assert not made.watched
    made.shell.streams.clear()
    made.shell.local.clear()
    for life in Life.made:
        life.close()
    Life.made.clear()
    let_go()
    assert len(os.listdir("/proc/self/fd")) == before
    made.store.close()


def attach(desk, life, said=None, **keywords):
    return list(desk.ranks.attach(1, life.pid, said or message(), life.descriptors(**keywords)))


def test_attach_look_and_detach(desk):
    life = Life()
    life.commit("one", 3)
    [attached, looked, steps] = attach(desk, life)
    assert (type(attached), attached.stream, attached.endpoint) == (events.StreamAttached, ID, "endpoint")
    assert (looked.opened[0].sequence, looked.committed) == ("one", (3,))
    assert type(steps) is events.StepsSeen
    assert desk.told == [(1, local.Attached(NO_EPOCH), 0)]
    life.commit("two", 2)
    os.eventfd_write(life.bell, 1)
    [looked] = desk.watched[desk.ranks.ranks[ID].bell]()
    assert looked.opened[0].sequence == "two"
    assert list(desk.ranks.detach(1)) == [events.StreamDetached(ID, 1)]
    desk.ranks.forget(ID)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        (message(version=2), "protocol version 2"),
        (message(role="gpu"), "can't be attached"),
        (message(stream=None), "can't be attached"),
        (message(stream=ID._replace(instance="other")), "can't be attached"),
        (message(layouts={}), "can't be attached"),
        (message(layouts={"0.0.0": Layout.paged("m", "float32", 1, 9, 4, 1, 4)}), "doesn't fit"),
        (message(layouts={"0.0.0": Layout.paged("m", "float32", 1, 4, 4, 1, 4)}), "the layout says otherwise"),
    ],
)
def test_refused_before_it_counts(desk, said, word):
    life = Life()
    assert attach(desk, life, said) == []
    [(_, refused, _)] = desk.told
    assert type(refused) is local.AttachRefused and refused.final and word in refused.reason
    assert not desk.ranks.ranks and not desk.shell.streams


REGION = LAYOUT.regions[0]
EVIL = [
    msgspec.structs.replace(LAYOUT, regions=(msgspec.structs.replace(REGION, inner=(("layer", -5, 4), *REGION.inner[1:])),), shard=Shard((0, 0, 1), (0, 1, 1))),
    msgspec.structs.replace(LAYOUT, regions=(msgspec.structs.replace(REGION, name="layer" + "9" * 5000),)),
    msgspec.structs.replace(LAYOUT, regions=(msgspec.structs.replace(REGION, inner=(("layer", 1 << 60, 4), *REGION.inner[1:])),)),
    msgspec.structs.replace(LAYOUT, regions=(msgspec.structs.replace(REGION, inner=(("dim", 1, (1 << 64) - 1), *REGION.inner)),)),
]


@pytest.mark.parametrize("role", ["rank", "standby"])
@pytest.mark.parametrize("layout", EVIL, ids=["nothing", "digits", "endless", "wide"])
def test_a_layout_that_makes_no_sense_is_refused(desk, role, layout):
    """Each of them ended the daemon: an error that nobody expected, or memory for all the layers that a standby claimed."""
    said = message(role=role, stream=ID if role == "rank" else None, layouts={"0.0.0": layout})
    assert attach(desk, Life(), said) == []
    assert type(desk.told[0][1]) is local.AttachRefused and not desk.ranks.ranks and not desk.ranks.spares


@pytest.mark.parametrize("rank", ["", "0.0", "x.y.z", "9" * 5000 + ".0.0"])
def test_a_standby_for_no_rank_is_refused(desk, rank):
    assert attach(desk, Life(), message(role="standby", stream=None, layouts={rank: LAYOUT})) == []
    assert type(desk.told[0][1]) is local.AttachRefused and not desk.ranks.spares


def test_a_daemon_without_descriptors_refuses_for_now(desk, monkeypatch):

    def none_left(descriptor):
        os.close(descriptor)
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("kvguard.engine.look.TableReader", none_left)
    assert attach(desk, Life()) == []
    monkeypatch.undo()
    [(_, refused, _)] = desk.told
    assert type(refused) is local.AttachRefused and not refused.final and "Too many open files" in refused.reason
    assert not desk.ranks.ranks and not desk.shell.streams


@pytest.mark.parametrize("room", [0, 1])
def test_a_rank_that_can_not_be_watched_is_refused_for_now_and_nothing_of_it_is_kept(desk, room):
    """The kernel bounds what an epoll may watch. A rank that was kept all the same was a seat that no bell and no death could reach."""
    desk.room = room
    life = Life()
    for attempt in range(2):
        assert attach(desk, life) == []
        refused = desk.told[attempt][1]
        assert type(refused) is local.AttachRefused and not refused.final and "No space left" in refused.reason
        assert not desk.ranks.ranks and not desk.shell.streams and not desk.shell.local and not desk.watched
    desk.room = 2
    assert type(attach(desk, life)[0]) is events.StreamAttached


@pytest.mark.parametrize("room", [2, 3])
def test_a_successor_that_can_not_be_watched_takes_no_death_along(desk, room):
    life = dead(desk)
    desk.room, rank = room, desk.ranks.ranks[ID]
    life.pid = os.getpid()
    assert attach(desk, life, message(incarnation=2)) == []
    assert "No space left" in desk.told[-1][1].reason and (rank.stream.incarnation, rank.stream.alive) == (1, True)
    died = list(desk.watched[rank.pidfd]())[-1]
    assert (type(died), died.stream, died.incarnation) == (events.ProcessDied, ID, 1)
    assert attach(desk, life, message(incarnation=2))[0].incarnation == 2


def test_a_rank_that_left_and_comes_back_can_not_be_watched(desk):
    life = Life()
    attach(desk, life)
    list(desk.ranks.detach(1))
    desk.room = 1
    assert attach(desk, life) == [] and not desk.ranks.ranks[ID].stream.alive and not desk.watched
    desk.room = 2
    assert attach(desk, life)[0].incarnation == 1 and desk.ranks.ranks[ID].watched


def test_a_standby_that_can_not_be_watched_is_refused_for_now(desk):
    """Its record kept a descriptor that the refusal had closed."""
    desk.room = 0
    assert attach(desk, Life(), message(role="standby", stream=None)) == []
    assert type(desk.told[0][1]) is local.AttachRefused and not desk.told[0][1].final and not desk.ranks.spares


def test_a_pidfd_of_somebody_else(desk):
    life = Life()
    assert attach(desk, life, pidfd=os.getppid()) == []
    assert "own pidfd" in desk.told[0][1].reason


def test_a_stopped_process_is_told_once_and_so_is_its_end(desk):
    child = subprocess.Popen([sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    try:
        attach(desk, Life(child.pid))
        assert list(desk.ranks.look_at_all()) == []
        for number, stopped in ((signal.SIGSTOP, True), (signal.SIGCONT, False)):
            child.send_signal(number)
            os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WCONTINUED)
            assert list(desk.ranks.look_at_all()) == [events.StepsSeen(ID, 0, 0, 0, 0, False, stopped)]
            assert list(desk.ranks.look_at_all()) == []
    finally:
        child.kill()
        child.communicate()
    desk.ranks.forget(ID)


def test_death_is_told_after_a_last_look_and_a_second_life_adopts(desk):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    life = Life(child.pid)
    attach(desk, life)
    other = Life()
    assert attach(desk, other, message(incarnation=2, stream=ID._replace(pool=8))) == []
    assert "held by a process that lives" in desk.told[-1][1].reason
    life.commit("one", 3)
    child.kill()
    child.wait()
    child.stdin.close()
    [looked, _steps_or_died, *rest] = list(desk.watched[desk.ranks.ranks[ID].pidfd]())
    died = rest[-1] if rest else _steps_or_died
    assert looked.committed == (3,) and (type(died), died.stream, died.salvageable) == (events.ProcessDied, ID, True)
    assert desk.ranks.holding(ID).positions == (3,) and desk.ranks.holding(ID).alive is False
    life.pid = os.getpid()
    again = attach(desk, life, message(incarnation=3))
    assert again[0].incarnation == 3 and desk.ranks.ranks[ID].stream.alive
    desk.ranks.forget(ID)


def test_a_process_that_was_killed_and_is_still_dying_keeps_its_memory_and_not_its_rank(desk, monkeypatch):
    """Tearing a large memory down takes seconds; whoever takes the rank with a memory of its own doesn't wait for that."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    life, other = Life(child.pid), Life()
    attach(desk, life)
    monkeypatch.setattr(attaching.signal, "pidfd_send_signal", lambda *_: None)
    desk.ranks.kill(desk.ranks.ranks[ID].stream.incarnation)
    new = ID._replace(pool=8)
    told = attach(desk, other, message(incarnation=2, stream=new))
    assert told[0].stream == new and desk.ranks.ranks[new].stream.alive and desk.ranks.ranks[ID].stream.alive
    life.pid = os.getpid()
    assert attach(desk, life, message(incarnation=3)) == []
    assert "still dying" in desk.told[-1][1].reason and not desk.told[-1][1].final
    child.kill()
    child.communicate()
    desk.ranks.forget(new)
    again = attach(desk, life, message(incarnation=3))
    assert again[-1].incarnation == 3 and type(again[0]) is events.ProcessDied and not desk.ranks.ranks[ID].killed
    desk.ranks.forget(ID)


def test_a_stream_with_another_table_is_refused(desk):
    life, other = Life(), Life()
    attach(desk, life)
    assert attach(desk, other) == []
    assert "another table" in desk.told[-1][1].reason


def plan(rebuild):
    return PlanOrder("llama", Epoch(1, "c"), ("one",), (3,), ("pool",), ((Fork(0, 0),),), (3,), ("a",), (ID,), (rebuild,), (), ("",))


def test_a_claim_brings_the_dead_pool(desk):
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    life = Life(child.pid)
    attach(desk, life)
    assert list(desk.ranks.attach(2, os.getpid(), message("standby", 5, None), [os.pidfd_open(os.getpid())])) == [
        events.StandbyAttached("llama", 5, "endpoint", {"0.0.0": LAYOUT.fingerprint})
    ]
    child.kill()
    child.wait()
    child.stdin.close()
    list(desk.watched[desk.ranks.ranks[ID].pidfd]())
    rebuild = Rebuild(ID.rank, "a", 5, (Source("pool", "a", ID),), (0,))
    desk.ranks.claim(plan(rebuild), rebuild)
    connection, order, count = desk.told[-1]
    assert (connection, count, order.adopt, order.stream, order.layout) == (2, 2, True, ID, LAYOUT)
    with pytest.raises(attaching.Refused, match="not attached here"):
        desk.ranks.claim(plan(rebuild), Rebuild(ID.rank, "a", 99, (), ()))
    desk.ranks.ranks[ID].stream.leaving, before = True, len(desk.told)
    with pytest.raises(attaching.Refused, match="copied to the host"):
        desk.ranks.claim(plan(rebuild), rebuild)
    assert len(desk.told) == before
    [restored] = desk.ranks.restored(2, local.Restored("llama", ID.rank, Epoch(1, "c"), "no room"))
    assert (type(restored), restored.error) == (events.EngineRestored, "no room")


def test_a_stopped_standby_that_was_handed_the_memory_is_ended_before_another_is(desk):
    """It would rebuild the table, when it goes on, beside the one that writes there by then."""
    programs = [subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE) for _ in range(2)]
    engine, slow = programs
    attach(desk, Life(engine.pid))
    for number, pid in ((5, slow.pid), (6, os.getpid())):
        list(desk.ranks.attach(number, pid, message("standby", number, None), [os.pidfd_open(pid)]))
    engine.kill()
    engine.wait()
    list(desk.watched[desk.ranks.ranks[ID].pidfd]())
    orders = {standby: Rebuild(ID.rank, "a", standby, (Source("pool", "a", ID),), (0,)) for standby in (5, 6)}
    slow.send_signal(signal.SIGSTOP)
    for _ in range(2):  # said again
        desk.ranks.claim(plan(orders[5]), orders[5])
    list(desk.ranks.restored(5, local.Restored("llama", ID.rank, Epoch(1, "c"), "it says so")))
    desk.ranks.claim(plan(orders[6]), orders[6])
    list(desk.ranks.restored(6, local.Restored("llama", ID.rank, Epoch(1, "c"), "it says so")))
    assert slow.poll() is None and not desk.shell.counters["processes_killed"], "who has given up writes nothing"
    desk.ranks.claim(plan(orders[5]), orders[5])
    desk.ranks.claim(plan(orders[6]), orders[6])
    assert slow.wait(10) == -signal.SIGKILL and desk.told[-1][0] == 6
    desk.ranks.kill(5)
    assert desk.shell.counters["processes_killed"] == 1, "processes, whoever ends them; not signals"
    [died] = desk.watched[desk.ranks.spares[5].pidfd]()
    assert (died.incarnation, died.reason) == (5, "killed by its node's daemon")
    for program in programs:
        program.stdin.close()


def dead(desk) -> Life:
    """Of a process whose end nobody has looked at yet."""
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    life = Life(child.pid)
    attach(desk, life)
    child.kill()
    child.wait()
    child.stdin.close()
    return life


def test_a_successor_whose_pool_is_refused_takes_no_death_along(desk):
    life = dead(desk)
    other = os.memfd_create("no pool")
    descriptors = [os.pidfd_open(os.getpid()), os.dup(life.bell), os.dup(life.writer.fd), other]
    assert list(desk.ranks.attach(2, os.getpid(), message(incarnation=2), descriptors)) == []
    assert type(desk.told[-1][1]) is local.AttachRefused
    died = list(desk.watched[desk.ranks.ranks[ID].pidfd]())[-1]
    assert (type(died), died.stream, died.incarnation) == (events.ProcessDied, ID, 1)


def test_a_pool_is_unmapped_beside_the_loop_and_who_comes_back_meanwhile_maps_it_anew(desk, monkeypatch):
    begun, let = threading.Event(), threading.Event()
    close = HostPool.close

    def closed(pool):
        if threading.current_thread().name == "kvguard-host":
            begun.set()
            assert let.wait(30)
        close(pool)

    monkeypatch.setattr(HostPool, "close", closed)
    turns, shell = Turns(), desk.shell
    desk.ranks = Ranks(HostDevice(), desk.store, desk, desk.tell, shell.streams, shell.local, shell.epochs, workers=Workers(turns))
    life = Life()
    attach(desk, life)
    former = desk.ranks.ranks[ID].pool
    list(desk.ranks.detach(1))
    desk.ranks.forget(ID)
    assert begun.wait(30) and desk.ranks.releasing == 1 and former.memory
    assert attach(desk, life)[0].stream == ID and desk.ranks.ranks[ID].pool is not former
    let.set()
    while desk.ranks.releasing:
        assert turns.rung() == []
    assert not former.memory and desk.ranks.ranks[ID].pool.memory


def test_who_never_committed_lives_in_the_epoch_that_it_finds(desk):
    desk.shell.epochs["llama"] = Epoch(4, "c")
    fresh, late = Life(), Life()
    late.commit("one", 3)
    assert attach(desk, fresh)[0].epoch == Epoch(4, "c")
    assert desk.told[-1][1] == local.Attached(Epoch(4, "c"))
    other = ID._replace(rank=Rank(0, 1, 0))
    assert attach(desk, late, message(stream=other))[0].epoch == NO_EPOCH
    assert desk.ranks.ranks[other].reader.epoch() == 4  # its next step is fenced


def test_so_does_one_whose_line_had_gone_when_the_epoch_was_raised(desk):
    life = Life()
    assert attach(desk, life)[0].epoch == NO_EPOCH
    desk.ranks.disconnected(1)
    desk.shell.epochs["llama"] = Epoch(4, "c")
    assert attach(desk, life)[0].epoch == Epoch(4, "c"), "its engine adopts it with Attached, and says no more"
    life.commit("one", 3)
    assert attach(desk, life)[0].epoch == NO_EPOCH


@pytest.mark.parametrize("how", ["released", "rolled back"])
def test_who_has_nothing_left_lives_on_in_its_own_epoch(desk, how):
    """The engine, whose table was touched, waits for a plan: a daemon that calls it a rank of the newer epoch has one that enters no step any more."""
    desk.shell.epochs["llama"] = Epoch(4, "c")
    life = Life()
    if how == "released":
        life.commit("one", 3)
        life.writer.release(life.writer.row("one"))
    else:
        life.writer.open("one", (Fork(0, 0),), b"r")
        life.writer.roll_back()
    assert not life.writer.is_untouched and not life.writer.sequences()
    assert attach(desk, life)[0].epoch == NO_EPOCH


@pytest.mark.parametrize("kind", ["memfd", "a pipe's end", "a pidfd"])
def test_a_bell_that_is_none_is_refused(desk, kind):
    """A file can't be waited for (the daemon's loop would raise, and end), the end of a pipe never gets quiet, a pidfd can't be read."""
    life = Life()
    for attempt in range(2):  # the second finds nothing left of the first
        pidfd, bell, *rest = life.descriptors()
        os.close(bell)
        if kind == "memfd":
            bell = os.memfd_create("bell")
        elif kind == "a pidfd":
            bell = os.pidfd_open(os.getpid())
        else:
            bell, other = os.pipe()
            os.close(other)
        assert list(desk.ranks.attach(1, life.pid, message(), [pidfd, bell, *rest])) == []
        assert "not an eventfd" in desk.told[attempt][1].reason
        assert not desk.watched and not desk.ranks.ranks
