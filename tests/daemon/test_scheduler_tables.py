"""A scheduler beside the ranks at the daemon: what is refused, ids alone, death and a second life; and orders that wait for a line that is down."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kvguard.core import events
from kvguard.daemon.measure import Measures
from kvguard.errors import Refused
from kvguard.format import local
from kvguard.format.messages import IDS_ONLY, Hello, IdsFrame, KvFrame, OpenOp, PlanOrder, StreamShape
from kvguard.store.store import ReplicaStore
from kvguard.types import NO_EPOCH, Epoch, Fork, Rank, StreamId, is_scheduler, scheduler_of
from tests.daemon.test_ranks import ID, LAYOUT, Life, attach, desk, message  # noqa: F401 - desk is a fixture

LEAD = StreamId("llama", scheduler_of(0), 21)
PLAN = PlanOrder("llama", Epoch(1, "c"), ("one",), (2,), ("pool",), ((Fork(0, 0), Fork(1, 2)),), (3,), ("a",), (ID,), (), (), ("",))


def lead(incarnation=21, stream=StreamId("llama", Rank(0, 0, 0), 0), layouts=None):
    return local.Attach("scheduler", "llama", incarnation, NO_EPOCH, "lead", stream, layouts or {})


def attach_lead(desk, life, said=None, connection=2):  # noqa: F811
    descriptors = life.descriptors()
    for descriptor in descriptors[3:]:
        os.close(descriptor)
    return list(desk.ranks.attach(connection, life.pid, said or lead(), descriptors[:3]))


def test_ids_of_a_scheduler_are_seen_and_never_its_positions(desk):  # noqa: F811
    life = Life()
    attach(desk, Life())
    life.commit("one", 3)
    [attached, looked] = attach_lead(desk, life)
    assert (attached.stream, attached.shape) == (LEAD, IDS_ONLY)
    assert (looked.stream, looked.opened[0].sequence, looked.grown, looked.committed, looked.ids) == (LEAD, "one", (), (0,), (3,))
    assert desk.told[-1] == (2, local.Attached(NO_EPOCH), 0)
    holding = desk.ranks.holding(LEAD)
    assert (holding.sequences, holding.positions, holding.ids, holding.fingerprint) == (("one",), (0,), (3,), 0)
    [known] = desk.ranks.known(LEAD, ("one",), (3,))
    assert (len(known.ids), known.request) == (12, b"r")
    life.writer.truncate(0, 2)
    [looked] = desk.ranks.look(LEAD)
    assert (looked.cut[0].kept, looked.cut[0].blocks, looked.ids) == (2, 1, (2,))
    with pytest.raises(Refused, match="no KV"):
        desk.ranks.ranks[LEAD].pool.capture((), (), (), memoryview(b""))


@pytest.mark.parametrize(
    "said",
    [lead(stream=None), lead(stream=StreamId("other", Rank(0, 0, 0), 0)), lead(stream=StreamId("llama", Rank(0, 1, 0), 0)), lead(layouts={"0.0.0": LAYOUT})],
)
def test_a_scheduler_that_is_not_described_as_one(desk, said):  # noqa: F811
    assert attach_lead(desk, Life(), said) == []
    assert "can't be attached" in desk.told[-1][1].reason and not desk.ranks.ranks


def test_no_rank_takes_the_schedulers_place(desk):  # noqa: F811
    assert attach(desk, Life(), message(stream=ID._replace(rank=scheduler_of(0)))) == []
    assert "can't be attached" in desk.told[-1][1].reason


def test_a_schedulers_death_is_told_and_another_takes_over(desk):  # noqa: F811
    child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    first, second = Life(child.pid), Life()
    attach_lead(desk, first)
    assert attach_lead(desk, second, lead(22), 3) == []
    assert "held by a process that lives" in desk.told[-1][1].reason
    first.commit("one", 3)
    child.kill()
    child.wait()
    child.stdin.close()
    looked, died = desk.watched[desk.ranks.ranks[LEAD].pidfd]()
    assert looked.ids == (3,) and (died.stream, died.salvageable) == (LEAD, False)
    assert desk.ranks.holding(LEAD).ids == (3,)  # what it accepted before it died counts
    [attached] = attach_lead(desk, second, lead(22), 3)
    assert attached.stream == LEAD._replace(pool=22)


def test_an_order_waits_for_the_line(desk):  # noqa: F811
    life = Life()
    attach(desk, life)
    desk.ranks.disconnected(1)
    desk.told.clear()
    desk.ranks.order_restore(ID, PLAN)
    assert desk.told == []
    attach(desk, life)
    assert [type(said) for _, said, _ in desk.told] == [local.Attached, local.RestoreOrder]
    attach(desk, life)  # the line broke before it was carried out: it is said again
    assert [type(said) for _, said, _ in desk.told[2:]] == [local.Attached, local.RestoreOrder]
    [restored] = [one for one in desk.ranks.restored(1, local.Restored("llama", ID.rank, PLAN.epoch)) if type(one) is events.EngineRestored]
    assert (restored.stream, restored.error) == (ID, "")
    desk.told.clear()
    attach(desk, life)
    assert [type(said) for _, said, _ in desk.told] == [local.Attached]


def test_a_scheduler_restores_itself_and_says_so_as_rank_0(desk):  # noqa: F811
    attach_lead(desk, Life())
    desk.ranks.order_restore(LEAD, PLAN)
    assert desk.told[-1] == (2, local.RestoreOrder(PLAN), 0)
    [restored] = desk.ranks.restored(2, local.Restored("llama", Rank(0, 0, 0), PLAN.epoch))
    assert (restored.stream, restored.rank) == (LEAD, scheduler_of(0))


def test_an_order_for_nobody_is_refused(desk):  # noqa: F811
    with pytest.raises(Refused, match="no engine"):
        desk.ranks.order_restore(ID, PLAN)


def test_a_holder_keeps_ids_alone():
    store = ReplicaStore(None, 1 << 20, 0)
    held = store.probe(Hello(LEAD, 5, NO_EPOCH, "b", IDS_ONLY))
    assert held.reason == ""
    frame = IdsFrame(5, NO_EPOCH, 1, (OpenOp(1, "one", 1, (Fork(0, 0),), b"r"),), (1,), (0,), (3,), bytes(12), (0,))
    assert store.apply_ids(5, frame) == ((), "")
    assert (store.holding(LEAD).ids, store.holding(LEAD).positions) == ((3,), (0,))
    store.check()
    piece = KvFrame(5, NO_EPOCH, 1, 1, (1,), (0,), (3,), (0,), (1,), (1,), b"")
    assert "ids alone" in store.apply_kv(5, piece, memoryview(b""))[1]
    assert "ids alone" in store.probe(Hello(ID, 6, NO_EPOCH, "b", IDS_ONLY)).reason
    assert "ids alone" in store.probe(Hello(LEAD._replace(pool=9), 7, NO_EPOCH, "b", StreamShape(1, 4, 10, 40, 64))).reason
    store.close()


def test_lag_is_of_kv():
    measures = Measures(None, lambda: 0)
    measures.looked(events.Looked(LEAD, opened=(events.Opened(0, "one", 1, (), b""),), rows=(0,), committed=(0,), ids=(3,)))
    assert not measures.waiting and is_scheduler(LEAD.rank) and str(LEAD.rank) == "0.scheduler"
