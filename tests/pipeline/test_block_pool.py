"""The block allocator: nothing is lost, nothing is in two tables, failures change nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvguard.errors import KvguardError
from kvguard.pipeline.pool import BlockPool, PoolExhausted

calls = st.lists(st.tuples(st.sampled_from(["allocate", "truncate", "free"]), st.sampled_from("abc"), st.integers(0, 90)), max_size=40)


@given(calls)
def test_every_block_is_in_one_place(steps):
    pool, held = BlockPool(10, block_tokens=8), {}
    for verb, name, positions in steps:
        before = {n: pool.table(n) for n in "abc"}
        if verb == "allocate":
            try:
                added = pool.allocate(name, positions)
            except PoolExhausted:
                assert {n: pool.table(n) for n in "abc"} == before
                continue
            assert pool.table(name) == before[name] + added
            held[name] = max(held.get(name, 0), positions)
        else:
            kept = positions if verb == "truncate" else 0
            freed = pool.truncate(name, positions) if verb == "truncate" else pool.free(name)
            assert pool.table(name) + freed == before[name]
            held[name] = min(held.get(name, 0), kept)
        used = [block for n in "abc" for block in pool.table(n)]
        assert len(used) == len(set(used)) == pool.blocks - pool.free_blocks
        assert all(len(pool.table(n)) * 8 >= held.get(n, 0) for n in "abc")
        assert set(pool.sequences) == {n for n in "abc" if pool.table(n)}


def test_exhaustion_says_what_and_what_to_do():
    pool = BlockPool(4)
    pool.allocate("a", 33)
    with pytest.raises(PoolExhausted, match=r"b needs 2 more blocks for 17 positions, 1 of 4 are free\. Try:"):
        pool.allocate("b", 17)
    assert pool.missing("b", 17) == 2 and pool.allocate("a", 48) == () and pool.allocate("b", 16) == (3,)


def test_freed_blocks_are_reused_last():
    pool = BlockPool(4)
    first = pool.allocate("a", 16)
    pool.free("a")
    assert first[0] not in pool.allocate("b", 48)


def test_adopts_a_table_as_it_stands():
    pool = BlockPool(8)
    pool.adopt("a", (5, 2))
    assert pool.table("a") == (5, 2) and pool.allocate("a", 33) == (0,)
    for name, blocks in (("b", (2,)), ("b", (1, 1)), ("b", (8,)), ("a", (1,))):
        with pytest.raises(KvguardError, match="Try:"):
            pool.adopt(name, blocks)
    assert pool.free_blocks == 5
