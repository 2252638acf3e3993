"""Which copies of two lives of a rank can't stand in one pool."""

from __future__ import annotations

import struct

from kvguard.format.clashes import clashes
from kvguard.format.local import ReplicaPages
from kvguard.format.messages import PlanOrder, Rebuild, Source, StreamShape
from kvguard.types import Clash, Epoch, Rank, StreamId

RANK = Rank(0, 0, 0)
FORMER, LAST, OLDEST = (StreamId("i", RANK, life) for life in (1, 2, 3))
SHAPE = StreamShape(1, 4, 2, 8, 64)
PREFIX = [1, 2, 3, 4]


def found(taken: dict, **lives: dict) -> tuple[Clash, ...]:
    """`taken`: {sequence: (life, position)}; `lives`: {sequence: (blocks, ids)} of each."""
    streams = {"former": FORMER, "last": LAST, "oldest": OLDEST}
    replicas = {}
    for life, rows in lives.items():
        columns = list(zip(*rows.values(), strict=True))
        ids = tuple(struct.pack(f"<{len(some)}I", *some) for some in columns[1])
        count = len(rows)
        replicas[streams[life]] = ReplicaPages(
            streams[life], SHAPE, tuple(rows), tuple(columns[0]), ((),) * count, tuple(map(len, columns[1])), ((),) * count, ids, (b"",) * count, (b"",) * count
        )
    sources = tuple(Source("replica", "n", streams[life]) for life in lives)
    at = tuple(list(lives).index(life) for life, _ in taken.values())
    count = len(taken)
    order = PlanOrder("i", Epoch(1, "c"), tuple(taken), tuple(position for _, position in taken.values()), ("replica",) * count, ((),) * count, (9,) * count, ("n",) * count, (FORMER,) * count, (), (), ("",) * count)
    return clashes(order, Rebuild(RANK, "n", 1, sources, at), replicas)


def test_other_blocks_and_a_shared_prefix_stand_beside_each_other() -> None:
    a, b = ((1, 2), [*PREFIX, 5, 6]), ((1, 3), [*PREFIX, 9, 9])
    assert found({"a": ("former", 6), "b": ("last", 6)}, former={"a": a}, last={"b": b}) == ()
    assert found({"a": ("former", 6), "b": ("last", 6)}, former={"a": a}, last={"b": ((5, 3), [9] * 6)}) == ()


def test_another_prefix_or_another_place_clashes_from_there_on() -> None:
    a = ((1, 2), [*PREFIX, 5, 6])
    assert found({"a": ("former", 6), "b": ("last", 6)}, former={"a": a}, last={"b": ((7, 2), [*PREFIX, 9, 9])}) == (Clash(FORMER, "a", 4), Clash(LAST, "b", 4))
    assert found({"a": ("former", 6), "b": ("last", 3)}, former={"a": a}, last={"b": ((2,), [5, 6, 9])}) == (Clash(FORMER, "a", 4), Clash(LAST, "b", 0))
    assert found({"a": ("former", 4), "b": ("last", 3)}, former={"a": a}, last={"b": ((2,), [5, 6, 9])}) == (), "only as far as it is taken"


def test_who_shares_a_block_clashes_with_its_owner() -> None:
    former = {"a": ((1, 2), [*PREFIX, 5, 6]), "twin": ((1, 3), [*PREFIX, 7])}
    assert found({"a": ("former", 6), "twin": ("former", 5), "b": ("last", 2)}, former=former, last={"b": ((1,), [9, 9])}) == (
        Clash(FORMER, "a", 0), Clash(FORMER, "twin", 0), Clash(LAST, "b", 0),
    )  # fmt: skip


def test_copies_that_another_plan_would_take_instead_are_told_too() -> None:
    """Else the next round finds the next clash, and so on: `c` is taken from the former life as soon as `b` isn't."""
    former = {"a": ((1,), [5, 6]), "c": ((2,), [7, 7])}
    last = {"b": ((1,), [9, 9, 9]), "d": ((2,), [8])}
    taken = {"a": ("former", 2), "b": ("last", 3), "c": ("former", 2)}
    assert found({**taken, "d": ("last", 1)}, former=former, last=last) == (
        Clash(FORMER, "a", 0), Clash(LAST, "b", 0), Clash(FORMER, "c", 0), Clash(LAST, "d", 0),
    )  # fmt: skip
    assert found({"c": ("former", 2), "b": ("last", 3)}, former=former, last=last) == (), "but not where nothing that is taken clashes"
    assert found(taken, former=former, last=last) == (Clash(FORMER, "a", 0), Clash(LAST, "b", 0)), "what no plan names counts nothing"


def test_three_lives() -> None:
    answer = found(
        {"a": ("former", 2), "b": ("last", 2), "c": ("oldest", 2)}, former={"a": ((1,), [5, 6])}, last={"b": ((4,), [5, 6])}, oldest={"c": ((1,), [5, 7])}
    )
    assert answer == (Clash(FORMER, "a", 0), Clash(OLDEST, "c", 0))


def test_what_came_without_a_replica_is_the_pulls_to_find() -> None:
    assert found({"a": ("former", 6), "b": ("last", 6)}, former={"a": ((1, 2), [1] * 6)}, last={"z": ((1, 2), [2] * 6)}) == ()
