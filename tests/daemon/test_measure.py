"""What a node measures of its streams: a rank that is copied with another one is measured as that one is."""

from __future__ import annotations

import pytest

from kvguard.core import events as ev
from kvguard.daemon.measure import Measures
from kvguard.format import messages as m
from kvguard.types import StreamId
from tests.core.test_node import OLD
from tests.core.test_shards import HIS, MINE, B, Node


class Measured(Node):
    """Each rank has figures of its own; node and figures are told in the order in which the daemon tells them."""

    def __init__(self) -> None:
        super().__init__()
        self.figures = {stream: Measures(self.node, lambda: self.now) for stream in (MINE, HIS)}

    def step(self, event) -> tuple:
        if type(event) is ev.Looked:
            self.figures[event.stream].looked(event)
        return super().step(event)

    def settle(self) -> None:
        for figures in self.figures.values():
            figures.settle()

    def said(self, stream: StreamId) -> tuple:
        found = self.figures[stream].document()
        return found["lag_samples"], found["lag_tokens_p50"], found["lag_tokens_p99"]


def both(world: Measured, committed: int) -> tuple:
    """A step of the engine; what leaves the node."""
    return world.look(committed, MINE) + world.look(committed, HIS)


def test_a_covered_rank_lags_by_what_the_copy_it_is_held_with_lacks():
    world = Measured()
    world.covered()
    world.now += 5_000_000
    world.settle()
    assert [figures.document()["time_to_protected_ms"] for figures in world.figures.values()] == [5.0, 5.0], "its wait, too"
    world.ack(both(world, 5))
    for committed in (7, 8, 9):
        both(world, committed)
    assert world.said(HIS) == world.said(MINE) == (4, 0, 3), "before each step 0, 0, 2 and 3 of what was committed was not acknowledged"


def test_a_covered_rank_that_is_ahead_of_the_one_that_copies_lags_by_that():
    world = Measured()
    world.covered()
    world.settle()
    for committed in (6, 7):
        world.look(committed, HIS)
    assert world.said(HIS) == (2, 0, 2) and world.said(MINE) == (0, None, None)


def gone(world: Measured) -> None:
    world.step(ev.StreamDetached(MINE, 3))


def unlinked(world: Measured) -> None:
    world.step(ev.LinkDown("peer:b", "gone"))


def unassigned(world: Measured) -> None:
    world.say(m.Assign("i", B, (("c", "tcp://c"),), ""))


@pytest.mark.parametrize("ends", [gone, unlinked, unassigned])
def test_where_no_holder_answers_for_it_nothing_is_measured(ends):
    """It is UNPROTECTED, and that is said elsewhere."""
    world = Measured()
    world.covered()
    world.settle()
    ends(world)
    for committed in (5, 6):
        world.look(committed, HIS)
    assert world.said(HIS) == (0, None, None)


def test_what_is_held_of_another_life_of_the_name_is_no_measure():
    world = Measured()
    world.two()
    world.row(MINE, 0, "s", 4)
    world.row(HIS, 0, "s", 4, b"another request", OLD)
    world.ack(world.holder())
    world.settle()
    for committed in (5, 6):
        both(world, committed)
    assert world.said(MINE)[0] == 2 and world.said(HIS)[0] == 0
