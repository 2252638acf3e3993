"""Layouts: bytes by arithmetic, identity by canonical content, faults all at once, and resharding."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.errors import BadConfig
from kvguard.format.layout import Layout, Region, Shard
from kvguard.format.reshard import reshard
from kvguard.format.shapes import is_shared

SIZES = {"layers": 3, "blocks": 5, "block_tokens": 4, "kv_heads": 2, "head_dim": 8}
ORDERS = ["layer,kv,block,slot,head,dim", "block,slot,layer,kv,head,dim", "block,head,slot,kv,dim,layer", "dim,slot,block,layer,head,kv"]

TOPOLOGY = st.tuples(st.integers(1, 4), st.integers(1, 4))  # pp, tp


def paged(**changes) -> Layout:
    return Layout.paged("m", "float16", **{**SIZES, **changes})


@pytest.mark.parametrize("order", ORDERS)
def test_every_byte_of_a_dense_pool_belongs_to_one_token(order):
    layout = paged(order=order)
    seen = bytearray(layout.pool_bytes)
    for block, slot in itertools.product(range(5), range(4)):
        taken = 0
        for offset, size in layout.ranges(block, slot):
            assert not any(seen[offset : offset + size])
            seen[offset : offset + size] = b"\1" * size
            taken += size
        assert taken == layout.token_bytes == 3 * 2 * 2 * 8 * 2
    assert all(seen) and layout.block_bytes == 4 * layout.token_bytes


def test_only_the_canonical_content_makes_the_fingerprint():
    first = paged()
    same = [paged(order=order) for order in ORDERS] + [paged(blocks=9), first.with_offset(64)]
    same += [Layout.per_layer("m", "float16", **SIZES, order=order) for order in ("kv,block,slot,head,dim", "block,slot,head,dim", "block,head,slot,kv,dim")]
    assert {layout.fingerprint for layout in same} == {first.fingerprint}
    others = [paged(head_dim=16), paged(block_tokens=8), Layout.paged("m", "bfloat16", **SIZES), Layout.paged("n", "float16", **SIZES)]
    others += [paged(shard=Shard((3, 6, 6), (0, 2, 2))), paged(shard=Shard((3, 6, 6), (0, 2, 2), shared=True)), Layout.latent("m", "float16", 3, 5, 4, 32), Layout.opaque("m", "float16", 3, 5, 4, 256)]
    assert len({layout.fingerprint for layout in (first, *others)}) == len(others) + 1
    assert [layout.fingerprint for layout in others if is_shared(layout.fingerprint)] == [layout.fingerprint for layout in others if layout.shard.shared]
    assert not is_shared(first.fingerprint) and is_shared(Layout.latent("m", "float16", 3, 5, 4, 32).fingerprint), "an engine's word, or what latent vectors are"


def test_a_shape_says_what_a_holder_needs():
    shape = paged().shape()
    assert (shape.block_tokens, shape.token_bytes, shape.block_bytes, shape.blocks, shape.addressable) == (4, 192, 768, 5, True)
    shape = Layout.opaque("m", "float16", 3, 5, 4, 101).shape()
    assert (shape.token_bytes, shape.block_bytes, shape.addressable) == (76, 303, False)


def test_a_layout_travels():
    layout = Layout.per_layer("m", "float16", **SIZES, order="block,slot,head,dim")
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(layout), type=Layout) == layout


def faults(layout: Layout, pool_bytes: int | None = None) -> str:
    with pytest.raises(BadConfig) as caught:
        layout.check(layout.pool_bytes if pool_bytes is None else pool_bytes)
    return str(caught.value)


def test_all_faults_are_told_at_once():
    replace = msgspec.structs.replace
    layout = Layout.per_layer("m", "float16", **SIZES)
    assert "needs" in faults(layout, layout.pool_bytes - 1) and "ends at byte" in faults(layout, layout.pool_bytes - 1)
    assert "blocks is 0" in faults(replace(layout, blocks=0))
    region = layout.regions[0]
    broken = replace(layout, regions=(replace(region, slot_stride=1), replace(region, offset=-1), layout.regions[2]), shard=Shard((0, 4, 3), (0, 1, 1)))
    text = faults(broken)
    for part in ("overlaps itself", "must not be negative", "layers [0, 4) of 3", "1 heads", "Try:"):
        assert part in text
    assert "share bytes" in faults(replace(layout, regions=(region, replace(region, name="layer1"), replace(region, name="layer2", offset=2))))
    assert "addressable" in faults(replace(layout, addressable=False))
    assert "itemsize 3" in faults(replace(layout, itemsize=3))
    huge = Region("", 0, 1, 1, (("layer", 1 << 60, 1), ("kv", 1 << 60, 1)))
    assert "at most" in faults(replace(layout, regions=(huge,)))
    with pytest.raises(BadConfig):
        paged(order="layer,block,slot,head,dim")


def test_interleaved_regions_are_no_overlap():
    layout = paged(order="block,slot,layer,kv,head,dim")
    region = layout.regions[0]
    step = region.inner[0][2]
    apart = tuple(Region(f"layer{n}", region.offset + n * step, region.block_stride, region.slot_stride, region.inner[1:]) for n in range(3))
    split = msgspec.structs.replace(layout, regions=apart)
    split.check(layout.pool_bytes)
    assert split.fingerprint == layout.fingerprint
    assert sorted(byte for start, size in split.ranges(2, 1) for byte in range(start, start + size)) == sorted(
        byte for start, size in layout.ranges(2, 1) for byte in range(start, start + size)
    )


def shards(layers: int, heads: int, pp: int, tp: int, order: str) -> list[Layout]:
    def part(total, n, index):
        return (total * index // n, total * (index + 1) // n, total)

    made = []
    for p, t in itertools.product(range(pp), range(tp)):
        shard = Shard(part(layers, pp, p), part(heads, tp, t))
        size = shard.layers[1] - shard.layers[0], shard.heads[1] - shard.heads[0]
        made.append(Layout.paged("m", "float16", size[0], 2, 2, size[1], 4, shard=shard, order=order))
    return made


def canonical(layout: Layout) -> list[tuple[int, int, int, int]]:
    """What each element of a token is, in canonical order."""
    (first, end, _), (head, head_end, _) = layout.shard.layers, layout.shard.heads
    return [(layer, kv, h, dim) for layer in range(first, end) for kv in range(2) for h in range(head, head_end) for dim in range(4)]


@settings(max_examples=30, deadline=None)
@given(layers=st.integers(4, 7), heads=st.integers(4, 6), old=TOPOLOGY, new=TOPOLOGY, order=st.sampled_from(ORDERS))
def test_resharded_tokens_hold_the_same_elements(layers, heads, old, new, order):
    sources, targets = shards(layers, heads, *old, ORDERS[0]), shards(layers, heads, *new, order)
    held = [canonical(layout) for layout in sources]
    for target, moves in zip(targets, reshard(sources, targets), strict=True):
        found = []
        for move in moves:
            assert move.target == len(found) * 2
            found += held[move.source][move.start // 2 : (move.start + move.size) // 2]
        assert found == canonical(target)


def test_what_nobody_holds_is_told():
    parts = shards(4, 4, 2, 2, ORDERS[0])
    with pytest.raises(BadConfig, match="no old shard holds head 2"):
        reshard(parts[:1] + parts[2:], shards(4, 4, 1, 1, ORDERS[0]))
    with pytest.raises(BadConfig, match="differ in model"):
        reshard(parts, shards(5, 4, 1, 1, ORDERS[0]))
    latent = [Layout.latent("m", "float16", 2, 2, 2, 8, shard=Shard(layers, (0, 1, 1))) for layers in ((0, 2, 4), (2, 4, 4))]
    assert [len(moves) for moves in reshard([latent[0], latent[0], latent[1]], [Layout.latent("m", "float16", 4, 2, 2, 8)])] == [2]
