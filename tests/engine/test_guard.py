"""The engine API against a daemon's socket: steps, fences, restores, claims, clean and unclean lines."""

from __future__ import annotations

import gc
import os
import threading

import msgspec
import numpy as np
import pytest

from kvguard import engine
from kvguard.errors import Fenced, Refused, TimedOut
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.format.lineage import birth_of
from kvguard.format.messages import PlanOrder, Rebuild, Source
from kvguard.format.pages import pack_sums, page_bytes, sums_of
from kvguard.types import Epoch, Fork, Rank, StreamId
from tests.engine.tiny_daemon import TinyDaemon

LAYOUT = Layout.paged("model", "float32", 2, 32, 4, 1, 4)
RANK = Rank(0, 1, 0)
FIVE, SIX = Epoch(5, "coordinator"), Epoch(6, "coordinator")


@pytest.fixture
def guard(path):
    pool = engine.allocate(LAYOUT)
    guard = engine.attach("llama", RANK, pool, LAYOUT, endpoint="here", socket=path)
    yield guard
    guard.detach()
    pool.close()


def plan_of(epoch: Epoch, **positions: int) -> PlanOrder:
    names = tuple(positions)
    lineages = tuple((Fork(0, 0), Fork(epoch.counter, position)) for position in positions.values())
    stream = StreamId("llama", RANK, 7)
    return PlanOrder("llama", epoch, names, tuple(positions.values()), ("replica",) * len(names), lineages, (0,) * len(names), ("n",) * len(names),
                     (stream,) * len(names), (), (), ("",) * len(names))  # fmt: skip


def open_two(guard) -> None:
    with guard.step(10) as step:
        step.commit("a", 6, blocks=[1, 2], tokens=range(7), request=b"{}")
        step.commit("b", 3, blocks=[3], tokens=[5, 6, 7, 8], request=b"")


def attached(daemon: TinyDaemon) -> int:
    return daemon.until(lambda: list(daemon.readers))[0]


def test_a_step_becomes_facts_in_the_daemon(daemon, guard) -> None:
    open_two(guard)
    connection = attached(daemon)
    daemon.until(lambda: daemon.committed.get(connection) == {0: 6, 1: 3})
    attach = daemon.attaches[connection]
    assert (attach.role, attach.instance, attach.endpoint, attach.layouts) == ("rank", "llama", "here", {"0.1.0": LAYOUT})
    with guard.step(2) as step:
        step.commit_batch([guard.row("a"), guard.row("b")], [7, 4], [70, 40])
    with guard.step(2) as step:
        step.commit_batch(["a", "b"], [8, 5], [80, 50], blocks={1: np.array([9])})
        daemon.turn()
        assert daemon.committed[connection] == {0: 7, 1: 4}  # not before the step's end
    daemon.turn()
    assert daemon.committed[connection] == {0: 8, 1: 5}
    reader = daemon.readers[connection]
    assert np.frombuffer(reader.read_ids(1, 0, 6), "<u4").tolist() == [5, 6, 7, 8, 40, 50]
    assert reader.steps()[:2] == (3, 3)
    assert os.eventfd_read(daemon.bells[connection]) == 3


def test_a_pool_can_be_opened_by_the_daemon(daemon, guard) -> None:
    from kvguard.device.host import HostDevice

    seen = []
    daemon.server.close()
    os.environ.pop("KVGUARD_SOCKET", None)
    message, descriptors, temporary = guard.attachment()
    pool = HostDevice().open(LAYOUT, [os.dup(descriptors[3])])
    guard.pool.memory[5] = 77
    seen.append(pool.memory[5])
    pool.close()
    for descriptor in temporary:
        os.close(descriptor)
    assert seen == [77] and message.stream == guard.stream


def test_a_step_that_raises_commits_nothing(daemon, guard) -> None:
    open_two(guard)
    with pytest.raises(ZeroDivisionError), guard.step(3) as step:
        step.commit("a", 7, tokens=[99])
        step.commit("c", 2, blocks=[20], tokens=[1, 2], request=b"")
        step.commit_batch(["b"], [4], [98])
        1 / 0  # noqa: B018
    with pytest.raises(KeyError):
        guard.row("c")
    with guard.step(1) as step:
        step.commit("b", 4, tokens=[44])
    connection = attached(daemon)
    daemon.until(lambda: daemon.committed.get(connection) == {0: 6, 1: 4})
    reader = daemon.readers[connection]
    assert np.frombuffer(reader.read_ids(1, 0, 5), "<u4").tolist() == [5, 6, 7, 8, 44]
    assert reader.steps()[:2] == (3, 3)


def test_wrong_calls_raise_and_leave_the_table_valid(guard) -> None:
    open_two(guard)
    with guard.step(1) as step:
        with pytest.raises(ValueError, match="beyond the block list"):
            step.commit("a", 9, tokens=[1, 2, 3])
        with pytest.raises(ValueError, match="is live"):
            step.commit("a", 1, blocks=[9], tokens=[1], request=b"")
        with pytest.raises(KeyError, match="not known"):
            step.commit("z", 1, tokens=[1])
        with pytest.raises(ValueError, match="behind"):
            step.commit("a", 5)
        with pytest.raises(ValueError, match="token ids are known"):
            step.commit("a", 8)
        with pytest.raises(ValueError, match="within 0"):
            step.commit("a", 7, tokens=[-1])
        with pytest.raises(ValueError, match="not one of the pool"):
            step.commit("a", 7, tokens=[1], blocks=[32])
        with pytest.raises(ValueError, match="64"):
            step.commit("n" * 65, 1, blocks=[9], tokens=[1], request=b"")
        with pytest.raises(ValueError, match="beyond the block list"):
            step.commit("new", 9, blocks=[9], tokens=range(9), request=b"")
        with pytest.raises(ValueError, match="distinct"):
            step.commit_batch([0, 0], [7, 7], [1, 1])
        with pytest.raises(ValueError, match="behind"):
            step.commit_batch([0, 1], [7, 1], [1, 1])
        with pytest.raises(ValueError, match="released"):
            step.commit_batch([0, 5], [7, 1], [1, 1])
        with pytest.raises(ValueError, match="can't truncate"):
            step.truncate("a", 7)
        step.commit("a", 7, tokens=[70])
        with pytest.raises(ValueError, match="truncate first"):
            step.truncate("a", 2)
    assert sorted(guard.table.sequences()) == ["a", "b"]
    reader = engine_reader(guard)
    look = reader.look()
    assert look.committed == (7, 3) and reader.torn == 0


def engine_reader(guard):
    from kvguard.engine.look import TableReader

    return TableReader(os.dup(guard.table.fd))


def test_a_survivor_is_fenced_restores_and_goes_on(daemon, guard) -> None:
    open_two(guard)
    connection = attached(daemon)
    daemon.turn()
    reader = daemon.readers[connection]
    with pytest.raises(Fenced), guard.step(1) as step:
        step.commit("a", 7, tokens=[70])
        reader.set_epoch(5)
    assert guard.fenced
    with pytest.raises(Fenced):
        guard.step(1)
    with pytest.raises(TimedOut):
        guard.restore(0.01)
    daemon.server.send(connection, local.RestoreOrder(plan_of(FIVE, a=5)))
    restored = guard.restore(10.0)
    assert restored.epoch == FIVE
    assert [(s.name, s.position, s.blocks) for s in restored.sequences] == [("a", 5, (1, 2))]
    restored.done()
    daemon.until(lambda: daemon.messages)
    assert daemon.messages[0].epoch == FIVE and daemon.messages[0].error == ""
    with guard.step(1) as step:
        step.commit("a", 6, tokens=[66])
    daemon.turn()
    assert daemon.committed[connection] == {0: 6}
    assert reader.sequence(0).lineage == (Fork(0, 0), Fork(5, 5))
    daemon.server.send(connection, local.RestoreOrder(plan_of(FIVE, a=5)))  # asked again: answered again, nothing cut
    daemon.until(lambda: len(daemon.messages) == 2)
    assert daemon.messages[1] == daemon.messages[0] and guard.table.accepted(0) == 6


def test_a_survivor_gives_up_what_bears_a_planned_name_and_is_another_sequence(daemon, guard) -> None:
    open_two(guard)
    connection = attached(daemon)
    daemon.turn()
    reader = daemon.readers[connection]
    reader.set_epoch(5)
    order = msgspec.structs.replace(plan_of(FIVE, a=0, b=3), births=(birth_of(b"another request"), birth_of(b"b said nothing")))
    daemon.server.send(connection, local.RestoreOrder(order))
    restored = guard.restore(10.0)
    assert [(s.name, s.position) for s in restored.sequences] == [("b", 3)]
    restored.done()
    with guard.step(1) as step:
        step.commit("a", 2, blocks=[4], tokens=[1, 2, 3], request=b"another request")
    assert guard.table.meta(guard.row("a")).request == b"another request"


def test_a_plan_that_wants_more_than_is_here_twice_is_refused_loudly(daemon, guard) -> None:
    open_two(guard)
    connection = attached(daemon)
    daemon.readers[connection].set_epoch(5)
    for _ in range(2):  # its answer may have been lost with a line, and is asked for again
        daemon.server.send(connection, local.RestoreOrder(plan_of(FIVE, a=8)))
        daemon.until(guard._has_order)
        with pytest.raises(TimedOut):
            guard.restore(0.0)
    daemon.readers[connection].set_epoch(6)
    daemon.server.send(connection, local.RestoreOrder(plan_of(SIX, a=7)))
    with pytest.raises(Refused, match="wants more"):
        guard.restore(10.0)
    daemon.until(lambda: len(daemon.messages) == 3)
    assert [(said.epoch.counter, said.behind) for said in daemon.messages] == [(5, True), (5, True), (6, False)]
    assert "a: 6 < 8" in daemon.messages[0].error and guard.fenced


def test_a_step_that_goes_back_after_the_report_costs_another_plan_and_no_rank(daemon, guard) -> None:
    open_two(guard)
    connection = attached(daemon)
    reader = daemon.readers[connection]
    with pytest.raises(Fenced), guard.step(1) as step:
        reader.set_epoch(5)  # and the report is made: a has 6 positions, b 3
        step.truncate("a", 4)
        step.release("b")
    daemon.server.send(connection, local.RestoreOrder(plan_of(FIVE, a=6, b=3)))
    found = []
    waiting = threading.Thread(target=lambda: found.append(guard.restore(10.0)))
    waiting.start()
    daemon.until(lambda: daemon.messages)
    assert daemon.messages[0].behind and daemon.messages[0].epoch == FIVE and "a: 4 < 6, b: 0 < 3" in daemon.messages[0].error
    reader.set_epoch(6)
    daemon.server.send(connection, local.RestoreOrder(plan_of(SIX, a=4)))
    waiting.join(10.0)
    assert [(s.name, s.position) for s in found[0].sequences] == [("a", 4)] and found[0].epoch.counter == 6
    found[0].done()
    daemon.until(lambda: len(daemon.messages) == 2)
    assert not daemon.messages[1].error and not daemon.messages[1].behind and not guard.fenced


def test_an_empty_rank_lives_in_the_epoch_that_it_finds(path) -> None:
    daemon = TinyDaemon(path, epoch=FIVE)
    pool = engine.allocate(LAYOUT)
    guard = engine.attach("llama", RANK, pool, socket=path)
    daemon.until(lambda: guard.epoch == FIVE)
    open_two(guard)
    daemon.until(lambda: any(daemon.committed.values()))
    assert next(iter(daemon.readers.values())).sequence(0).lineage == (Fork(5, 0),)
    guard.detach()
    daemon.until(lambda: [m for m in daemon.messages if isinstance(m, local.Detach)])
    daemon.close()


def test_a_standby_adopts_a_dead_ranks_pool_and_table(daemon, guard, path) -> None:
    open_two(guard)
    spare = engine.attach_standby("llama", {RANK: LAYOUT}, endpoint="spare", socket=path)
    connection = daemon.until(lambda: [c for c, a in daemon.attaches.items() if a.role == "standby"])[0]
    assert spare.wait(0.0) is None
    plan = plan_of(FIVE, a=5)
    rebuild = Rebuild(RANK, "n", spare.incarnation, (Source("pool", "n", guard.stream),), (0,))
    exported = guard.pool.export()
    order = local.ClaimOrder("llama", RANK, FIVE, plan, rebuild, True, guard.stream, LAYOUT, ())
    assert daemon.server.send(connection, order, [guard.table.fd, *exported])
    os.close(exported[0])
    claim = spare.wait(10.0)
    table, pool = claim.adopt
    rank = engine.attach("llama", RANK, pool, claim=claim, endpoint="spare")
    with pytest.raises(Fenced, match="claimed"):
        rank.step(1)
    restored = rank.restore(1.0)
    assert [(s.name, s.position) for s in restored.sequences] == [("a", 5)] and rank.table is table
    restored.done()
    daemon.until(lambda: daemon.messages and connection in daemon.readers)
    assert daemon.attaches[connection].role == "rank" and daemon.attaches[connection].stream == guard.stream
    assert daemon.attaches[connection].epoch == FIVE and isinstance(daemon.messages[0], local.Restored)
    with rank.step(1) as step:
        step.commit("a", 6, tokens=[66])
    daemon.turn()
    assert daemon.committed[connection] == {0: 6}
    rank.detach()
    pool.close()


@pytest.mark.parametrize("device", ["host", "rehearsal"])
@pytest.mark.parametrize("damage", ["", "a page", "too late"])
@pytest.mark.parametrize("remap", [None, lambda block: block + 10])
def test_a_standby_pulls_from_replica_pages(daemon, path, damage: str, remap, device: str) -> None:
    source = engine.allocate(LAYOUT)
    random = np.random.default_rng(1)
    source.memory[:] = random.bytes(LAYOUT.pool_bytes)
    shape = LAYOUT.shape()
    arena = os.memfd_create("arena")
    os.ftruncate(arena, shape.blocks * page_bytes(shape))
    for block in (1, 2, 3):
        data = bytearray(shape.block_bytes)
        source.capture_blocks([block], memoryview(data))
        page = bytes(data) + (40 + block).to_bytes(8, "little") + pack_sums(sums_of(memoryview(data), shape.token_bytes))
        os.pwrite(arena, page, block * page_bytes(shape))
    if damage == "a page":
        os.pwrite(arena, b"\xaa\x55", 2 * page_bytes(shape) + 1)
    stream = StreamId("llama", RANK, 7)
    ids = np.arange(8, dtype="<u4").tobytes()
    pages = local.ReplicaPages(stream, shape, ("a", "b"), ((1, 2), (1, 3)), ((41, 42), (41, 43)), (7, 6), ((), ()), (ids, ids), (b"s", b""), (b"{}", b""))
    spare = engine.attach_standby("llama", {RANK: LAYOUT}, socket=path)
    connection = daemon.until(lambda: [c for c, a in daemon.attaches.items() if a.role == "standby"])[0]
    plan = plan_of(FIVE, a=7, b=5, c=0)
    rebuild = Rebuild(RANK, "n", spare.incarnation, (Source("replica", "n", stream),), (0, 0, -1))
    assert daemon.server.send(connection, local.ClaimOrder("llama", RANK, FIVE, plan, rebuild, False, None, LAYOUT, (pages,)), [arena])
    os.close(arena)
    claim = spare.wait(10.0)
    assert claim.adopt is None
    pool = engine.allocate(LAYOUT, device)
    rank = engine.attach(claim.instance, claim.rank, pool, claim=claim)
    restored = rank.restore(1.0)
    if damage:
        said = "match the sum" if damage == "a page" else "deadline"
        with pytest.raises(Refused, match=said):
            restored.pull(remap, timeout_s=-1.0 if damage == "too late" else 30.0)
        daemon.until(lambda: daemon.messages)
        assert said in daemon.messages[0].error and not rank.table.sequences()
        claim.close()
        spare.session.end()
    else:
        sequences = restored.pull(remap)
        move = remap or (lambda block: block)
        assert [(s.name, s.position, s.blocks) for s in sequences] == [("a", 7, (move(1), move(2))), ("b", 5, (move(1), move(3)))]
        for sequence, blocks in (("a", (1, 2)), ("b", (1, 3))):
            position = next(s.position for s in sequences if s.name == sequence)
            counts = [min(4, position - 4 * n) for n in range(2)]
            there, here = bytearray(position * shape.token_bytes), bytearray(position * shape.token_bytes)
            source.capture(blocks, [0, 0], counts, memoryview(there))
            pool.capture([move(block) for block in blocks], [0, 0], counts, memoryview(here))
            assert there == here
        restored.done()
        daemon.until(lambda: daemon.committed.get(connection) == {0: 7, 1: 5})
        daemon.until(lambda: daemon.messages)
        assert daemon.messages[0].bytes_by_rung == {"replica": 8 * shape.token_bytes}  # the shared block once
        assert daemon.readers[connection].sampler(0) == b"s" and daemon.readers[connection].sequence(0).lineage == (Fork(0, 0), Fork(5, 7))
    rank.detach()
    pool.close()
    source.close()


def test_descriptors_before_and_after(path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    def life() -> None:
        daemon = TinyDaemon(path)
        pool = engine.allocate(LAYOUT)
        guard = engine.attach("llama", RANK, pool, LAYOUT, socket=path)
        spare = engine.attach_standby("llama", {RANK: LAYOUT}, socket=path)
        daemon.until(lambda: len(daemon.attaches) == 2)
        open_two(guard)
        guard.detach()
        spare.detach()
        daemon.until(lambda: len(daemon.lost) == 2)
        daemon.close()
        pool.close()
        for thread in threading.enumerate():
            if thread.name == "kvguard-client":
                thread.join(60)  # its lifeline's descriptor goes after the last session has ended

    gc.collect()  # what earlier tests left in cycles is not to go meanwhile
    life()  # the client's own descriptors are made once
    before = count()
    for _ in range(3):
        life()
    assert count() == before


def test_a_scheduler_commits_without_a_pool(daemon, path) -> None:
    lead = engine.attach_scheduler("llama", blocks=32, block_tokens=4, socket=path)
    with lead.step(4) as step:
        step.commit("a", 4, blocks=[0], tokens=range(5), request=b"{}")
        step.wrote([0], [0], [4])
    with lead.step(0) as step:
        step.release("a")
        step.commit("b", 0, blocks=[0], tokens=[1], request=b"x")
    connection = attached(daemon)
    daemon.until(lambda: daemon.committed.get(connection) == {1: 0})
    assert daemon.attaches[connection].role == "scheduler" and daemon.attaches[connection].stream.pool == 0
    lead.detach()


def test_who_commits_in_the_moment_of_attaching_lives_in_the_epoch_that_it_finds(path):
    """A raised epoch, and an engine that commits before it has heard the daemon's first word: there is no plan for it, so it must not wait for one."""
    daemon, pool = TinyDaemon(path, FIVE), engine.allocate(LAYOUT)
    guard = engine.attach("llama", RANK, pool, LAYOUT, socket=path)
    try:
        open_two(guard)
        connection = attached(daemon)
        daemon.readers[connection].set_epoch(FIVE.counter)
        daemon.until(lambda: guard.epoch == FIVE)
        daemon.until(lambda: daemon.attaches[connection].epoch == FIVE)  # the daemon, too, learns that it lives in this epoch
        assert not guard.fenced and guard.restore(5.0).sequences == ()
        with guard.step(1) as step:
            step.commit("a", 7, tokens=[9])
    finally:
        guard.detach()
        pool.close()
        daemon.close()


def test_a_former_life_stays_fenced_whoever_it_attaches_to(path):
    daemon, pool = TinyDaemon(path), engine.allocate(LAYOUT)
    guard = engine.attach("llama", RANK, pool, LAYOUT, socket=path)
    try:
        open_two(guard)
        daemon.until(lambda: daemon.attaches and guard.connected)
        daemon.close()
        daemon = TinyDaemon(path, FIVE)  # restarted: it knows the epoch, and nothing of this rank
        daemon.readers[attached(daemon)].set_epoch(FIVE.counter)
        daemon.until(lambda: guard.fenced)
        with pytest.raises(TimedOut):
            guard.restore(0.2)
        assert guard.epoch.counter == 0
    finally:
        guard.detach()
        pool.close()
        daemon.close()


def test_a_scheduler_is_cut_to_a_plan_as_far_as_it_knows(daemon, path):
    lead = engine.attach_scheduler("llama", blocks=32, block_tokens=4, socket=path)
    with lead.step(1) as step:
        step.commit("a", 6, blocks=[1, 2], tokens=range(9), request=b"{}")
        step.commit("gone", 1, blocks=[3], tokens=[1], request=b"{}")
    connection = attached(daemon)
    daemon.readers[connection].set_epoch(5)
    plan = plan_of(FIVE, a=7, unknown=9)  # the ranks are further, and have one that it doesn't know
    daemon.server.send(connection, local.RestoreOrder(msgspec.structs.replace(plan, ids=(8, 9))))
    daemon.until(lambda: lead._has_order())
    restored = lead.restore(5.0)
    assert [(one.name, one.position) for one in restored.sequences] == [("a", 6)]
    restored.done()
    assert lead.epoch == FIVE and lead.table.sequences().keys() == {"a"}
    row = lead.row("a")
    assert daemon.readers[connection].read_row(row).head.ids == 8  # the ids that the plan knows stay
    answers = daemon.until(lambda: [one for one in daemon.messages if type(one) is local.Restored])
    assert (answers[0].rank, answers[0].error) == (Rank(0, 0, 0), "")
    lead.detach()
