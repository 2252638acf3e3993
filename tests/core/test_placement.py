"""Placement: never the own node, nobody moves without need, load spread, standbys preferred."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.core.placement import NO_OTHER_NODE, Place, Seat, place
from kvguard.types import Rank


def seat(pp: int, node: str, *holders: str) -> Seat:
    return Seat("i", Rank(0, pp, 0), node, holders)


def test_no_other_node_says_so():
    assert place((seat(0, "a"),), ("a",), {}) == {("i", Rank(0, 0, 0)): Place((), NO_OTHER_NODE)}


def test_fewer_nodes_than_replicas_are_named():
    answer = place((seat(0, "a"),), ("a", "b"), {}, replicas=2)["i", Rank(0, 0, 0)]
    assert answer.holders == ("b",) and "1 of 2" in answer.reason


def test_ring_order_spreads_three_ranks_over_three_nodes():
    answer = place((seat(0, "a"), seat(1, "b"), seat(2, "c")), ("c", "b", "a"), {})
    assert [answer["i", Rank(0, pp, 0)].holders for pp in range(3)] == [("b",), ("c",), ("a",)]


def test_current_holder_stays_and_dead_one_is_replaced():
    answer = place((seat(0, "a", "c"), seat(1, "b", "gone")), ("a", "b", "c"), {})
    assert answer["i", Rank(0, 0, 0)].holders == ("c",)
    assert answer["i", Rank(0, 1, 0)].holders == ("a",), "c is loaded already"


def test_a_node_with_a_fitting_standby_is_preferred():
    rank = Rank(0, 0, 0)
    answer = place((seat(0, "a"),), ("a", "b", "c"), {("i", rank): ("c",)})
    assert answer["i", rank].holders == ("c",) and "standby" in answer["i", rank].reason


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abcde"), st.lists(st.sampled_from("abcdefg"), unique=True, max_size=3)), max_size=8),
    st.sets(st.sampled_from("abcde")),
    st.integers(0, 3),
)
def test_properties(ranks, nodes, replicas):
    seats = tuple(seat(pp, node, *holders) for pp, (node, holders) in enumerate(ranks))
    answer = place(seats, tuple(sorted(nodes)), {}, replicas)
    assert answer == place(seats[::-1], tuple(sorted(nodes, reverse=True)), {}, replicas), "independent of the order of the input"
    for entry in seats:
        holders = answer[entry.instance, entry.rank].holders
        assert entry.node not in holders and len(dict.fromkeys(holders)) == len(holders) == min(replicas, len(nodes - {entry.node}))
        assert all(holder in nodes for holder in holders)
        stay = [holder for holder in entry.holders if holder in nodes and holder != entry.node][:replicas]
        assert list(holders[: len(stay)]) == stay
