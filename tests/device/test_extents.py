"""Whole blocks as copy engines take them: all bytes, once, in few pieces; and a mirror that reads as the pool does."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import layouts

from kvguard.device import extents
from kvguard.device.extents import PIECE_BYTES_MAX, Extents
from kvguard.device.host import Copies
from kvguard.format.layout import Layout


def carried(found: Extents, pool: np.ndarray, blocks: list[int]) -> np.ndarray:
    mirror = np.full(len(blocks) * found.block_bytes, 0xEE, np.uint8)
    for n, block in enumerate(blocks):
        for piece in found.pieces:
            for row in range(piece.rows):
                at = piece.at + block * piece.block_stride + row * piece.pitch
                to = n * found.block_bytes + piece.to + row * piece.width
                mirror[to : to + piece.width] = pool[at : at + piece.width]
    return mirror


@settings(max_examples=150, deadline=None)
@given(layout=layouts(), data=st.data(), piece_max=st.sampled_from([8, 64, PIECE_BYTES_MAX]), pitch_max=st.sampled_from([40, extents.PITCH_MAX]))
def test_a_mirror_reads_as_the_pool_does(layout, data, piece_max, pitch_max):
    kept = extents.PIECE_BYTES_MAX, extents.PITCH_MAX
    extents.PIECE_BYTES_MAX, extents.PITCH_MAX = piece_max, pitch_max
    try:
        found = Extents.of(layout)
    finally:
        extents.PIECE_BYTES_MAX, extents.PITCH_MAX = kept
    assert all(piece.size <= piece_max for piece in found.pieces)
    assert sum(piece.size for piece in found.pieces) == found.block_bytes == layout.block_bytes
    pool = np.random.default_rng(1).integers(0, 256, layout.pool_bytes, dtype=np.uint8)
    blocks = data.draw(st.lists(st.integers(0, layout.blocks - 1), min_size=1, max_size=3))
    mirror = carried(found, pool, blocks)
    of_mirror = found.mirror(len(blocks))
    of_mirror.check(mirror.size)
    assert of_mirror.fingerprint == layout.fingerprint
    out, wanted = bytearray(len(blocks) * layout.block_bytes), bytearray(len(blocks) * layout.block_bytes)
    Copies(of_mirror, memoryview(mirror)).capture_blocks(list(range(len(blocks))), memoryview(out))
    Copies(layout, memoryview(pool)).capture_blocks(blocks, memoryview(wanted))
    assert out == wanted


def test_a_block_of_an_8b_model_is_a_few_copies():
    usual = Extents.of(Layout.paged("m", "bfloat16", 32, 1000, 16, 8, 128))
    assert [(piece.rows, piece.width) for piece in usual.pieces] == [(32, 32 * 1024)] * 2
    heads_first = Extents.of(Layout.paged("m", "bfloat16", 32, 1000, 16, 8, 128, order="layer,kv,block,head,slot,dim"))
    assert len(heads_first.pieces) == 2
    per_layer = Extents.of(Layout.per_layer("m", "bfloat16", 32, 1000, 16, 8, 128))
    assert [(piece.rows, piece.width) for piece in per_layer.pieces] == [(2, 32 * 1024)] * 32
