"""What a report says of a dead engine's GPU memory is what was brought out of it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from kvguard.daemon import salvage
from kvguard.daemon.workers import Workers
from kvguard.device.host import HostDevice
from kvguard.errors import DeviceLost, Refused
from kvguard.format.layout import Layout

LAYOUT = Layout.paged("m", "float16", 1, 12, 4, 1, 2)


class Mapped:
    """A GPU's pool after its engine's death. `whole`: how many sequences come out in time."""

    def __init__(self, whole: int = 9, lost: bool = False) -> None:
        self.whole, self.lost, self.asked, self.closed = whole, lost, None, False

    def salvage(self, sequences, salvage_ms_max):
        self.asked = sequences
        if self.lost:
            raise DeviceLost("Xid 79. Try: drain the node")
        self.closed = True
        return HostDevice().allocate(LAYOUT), min(self.whole, len(sequences))

    def export(self):
        raise Refused("it can't. Try: salvage")

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def rank(make_life):
    life = make_life(LAYOUT)
    life.commit("long", 9, range(9), [0, 1, 2])
    life.commit("short", 3, range(3), [3])
    life.commit("gone", 5, range(5), [4, 5])
    life.look()
    life.writer.release(life.writer.row("gone"))
    made = SimpleNamespace(pool=Mapped(), stream=life.stream, reader=life.stream.table, facts=life.facts, layout=LAYOUT)

    def positions() -> dict[str, int]:
        said = life.facts.holding(life.stream)
        return dict(zip(said.sequences, said.positions, strict=True))

    made.positions = positions
    return made


def brought_out(rank) -> bool:
    """Whether its death says that its pool can be planned with."""
    rank.stream.alive = True
    [died] = salvage.Salvaging(Workers(), 300, lambda one: one is rank).begin(rank, "its process ended")
    assert not rank.stream.alive and died.reason == "its process ended"
    return died.salvageable


def test_whole_sequences_come_out_the_short_ones_first(rank):
    mapped = rank.pool
    assert brought_out(rank)
    assert mapped.asked == [[3], [0, 1, 2]] and mapped.closed
    assert rank.pool is rank.stream.pool and rank.pool.layout == LAYOUT
    assert rank.positions() == {"long": 9, "short": 3, "gone": 0}
    rank.pool.close()


def test_what_did_not_come_out_in_time_is_not_planned_with(rank):
    rank.pool = Mapped(whole=1)
    assert brought_out(rank)
    assert rank.positions() == {"long": 0, "short": 3, "gone": 0} and len(rank.stream.kept) == 1
    rank.pool.close()


def test_after_a_fault_of_the_gpu_there_is_nothing_and_a_successor_brings_its_own(rank):
    mapped = rank.pool = Mapped(lost=True)
    assert not brought_out(rank)
    assert mapped.closed and set(rank.positions().values()) == {0}
    fresh = HostDevice().allocate(LAYOUT)
    descriptors = fresh.export()
    assert salvage.is_elsewhere(rank, descriptors)
    rank.stream.lost = "Xid 79"
    salvage.goes_on_in(rank, fresh)
    assert rank.stream.pool is fresh and not rank.stream.lost and rank.stream.kept is None and not salvage.is_elsewhere(rank, descriptors)
    fresh.close()
    for descriptor in descriptors:
        os.close(descriptor)


def test_a_host_pool_is_what_it_was(rank):
    rank.pool = HostDevice().allocate(LAYOUT)
    assert brought_out(rank) and rank.positions() == {"long": 9, "short": 3, "gone": 5}
    rank.pool.close()
