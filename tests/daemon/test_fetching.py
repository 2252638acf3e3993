"""What is fetched from a dead engine's memory that was kept on a GPU: it is brought out first, once, and what didn't come out is refused for good."""

from __future__ import annotations

import os
import struct
from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest

from kvguard.daemon import fetching
from kvguard.daemon.fetching import Fetching
from kvguard.errors import Refused
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.format.moves import ids_sum
from kvguard.types import NO_EPOCH, Fork, MovedToken, Rank, StreamId

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


def test_a_mates_replica_is_given_where_its_bytes_are_the_same_and_its_pool_is_not():
    """The rank that asks takes tensor-parallel place 1; of its own there is nothing, of place 0 a replica."""
    shape, other = (msgspec.structs.replace(LAYOUT.shape(), fingerprint=fingerprint) for fingerprint in (77, 78))
    held = {StreamId("llama", Rank(0, 0, tp), 5): tp for tp in (0, 1, 2)}
    moved = SimpleNamespace(moved=(Rank(0, 0, 0), Rank(0, 0, 1), Rank(0, 0, 2)))
    shell = SimpleNamespace(store=SimpleNamespace(streams=lambda: tuple(held)), moved={"llama": moved})
    asking = SimpleNamespace(connection=3, layout=LAYOUT, stream=SimpleNamespace(alive=True, id=StreamId("me", Rank(0, 0, 1), 9), shape=shape))
    answers = Fetching(shell, SimpleNamespace(ranks={asking.stream.id: asking}), lambda *_: True)
    answers._checked = lambda token: (LINEAGE, 0)
    pools, shapes = [], {0: shape, 2: other}
    answers._in_pool = lambda stream, *_: pools.append(stream.rank.tp)
    opened = {tp: os.open(os.devnull, os.O_RDONLY) for tp in shapes}

    def in_replica(stream, *_):
        tp = held[stream]
        return fetching._Found(os.dup(opened[tp]), (tp,), (1,), shapes[tp], None) if tp in shapes else None

    answers._in_replica = in_replica
    before = len(os.listdir("/proc/self/fd"))
    found = answers._find(3, token(9))
    assert (found.blocks, found.shape.fingerprint, pools) == ((0,), 77, [1]), "its own first, in a pool as well"
    os.close(found.descriptor)
    shapes[0] = asking.stream.shape = msgspec.structs.replace(shape, fingerprint=76)
    with pytest.raises(Refused, match="not on this node"):
        answers._find(3, token(9))  # equal, but nobody says that the bytes of its mates are
    shapes[0] = asking.stream.shape = shape
    pools.pop()
    del shapes[0]
    with pytest.raises(Refused, match="not on this node"):
        answers._find(3, token(9))
    assert pools == [1, 1] and len(os.listdir("/proc/self/fd")) == before, "what is of another shard is closed again"
    for descriptor in opened.values():
        os.close(descriptor)


def test_what_is_on_its_way_out_is_asked_for_again(dead):
    answers, rank = dead
    with pytest.raises(fetching._Ending, match="copied"):
        answers._in_pool(rank.stream.id, token(9), LINEAGE, 0)


def test_what_does_not_come_out_is_not_asked_for_for_ever(dead):
    answers, rank = dead
    assert answers._in_pool(rank.stream.id, token(10), LINEAGE, 0) is None  # it never had so much
    rank.facts.keep(())
    assert answers._in_pool(rank.stream.id, token(9), LINEAGE, 0) is None


def test_kv_of_other_ids_than_the_askers_is_refused(dead):
    """A genuine token beside another prompt: whoever gave both would have got an answer to neither."""
    answers, rank = dead
    told, before = [], len(os.listdir("/proc/self/fd"))
    answers._shell.counters, answers._ranks.bring_out = Counter(), lambda stream: False
    answers._tell = lambda connection, message, descriptors=(): told.append(message)
    answers._find = lambda connection, token: answers._in_pool(rank.stream.id, token, LINEAGE, 0)
    right, wrong = struct.pack("<9I", *range(9)), struct.pack("<9I", 7, *range(1, 9))
    for known in ((0, 0), (9, ids_sum(right)), (4, ids_sum(right[:16]))):
        answers.fetch(3, local.Fetch(1, token(9), *known))
    for known in ((9, ids_sum(wrong)), (1, ids_sum(wrong[:4])), (9, 0)):
        answers.fetch(3, local.Fetch(1, token(9), *known))
    assert [type(message) for message in told] == [local.FetchGiven] * 3 + [local.FetchRefused] * 3
    assert "ids of 'one' are others" in told[-1].reason and len(os.listdir("/proc/self/fd")) == before
