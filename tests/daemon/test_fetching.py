"""What is fetched from a dead engine's memory that was kept on a GPU: it is brought out first, once, and what didn't come out is refused for good."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from kvguard.daemon import fetching
from kvguard.daemon.fetching import Fetching
from kvguard.format.layout import Layout
from kvguard.types import NO_EPOCH, Fork, MovedToken

LAYOUT = Layout.paged("m", "float16", 1, 12, 4, 1, 2)
LINEAGE = (Fork(0, 0),)


@pytest.fixture
def dead(make_life):
    """(Fetching, the rank): its memory is always on its way out."""
    life = make_life(LAYOUT)
    life.commit("one", 9, range(9), [0, 1, 2])
    life.look()
    life.stream.alive = False
    rank = SimpleNamespace(stream=life.stream, pool=life.stream.pool, reader=life.stream.table, facts=life.facts, layout=LAYOUT)
    ranks = SimpleNamespace(ranks={life.stream.id: rank}, bring_out=lambda stream: True)
    return Fetching(SimpleNamespace(), ranks, lambda *_: True), rank


def token(position: int) -> MovedToken:
    return MovedToken("llama", "one", NO_EPOCH, position, b"")


def test_what_is_on_its_way_out_is_asked_for_again(dead):
    answers, rank = dead
    with pytest.raises(fetching._Ending, match="copied"):
        answers._in_pool(rank.stream.id, token(9), LINEAGE, 0)


def test_what_does_not_come_out_is_not_asked_for_for_ever(dead):
    answers, rank = dead
    assert answers._in_pool(rank.stream.id, token(10), LINEAGE, 0) is None  # it never had so much
    rank.facts.keep(())
    assert answers._in_pool(rank.stream.id, token(9), LINEAGE, 0) is None
