"""Whole blocks as the few large pieces that a copy engine takes: what lies contiguously, and which pieces lie at one stride.

Knows: layouts. Must not know: drivers, streams, who copies.
Invariants: the pieces of a block are exactly its bytes, each once; a *mirror* (blocks copied so, one behind the other) is itself a Layout of the same canonical
bytes, so that the host device's copies read tokens out of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import msgspec

from kvguard.format.layout import Layout, Region

PITCH_MAX = (1 << 31) - 1  # a copy engine's rows can't lie farther apart
PIECE_BYTES_MAX = 1 << 20  # what one copy may hold up the engine's own for


@dataclass(frozen=True, slots=True)
class Piece:
    """`rows` of `width` bytes, `pitch` apart in the pool (from byte `at` of block 0), one behind the other in the mirror (from byte `to` of a block)."""

    at: int
    pitch: int
    width: int
    rows: int
    block_stride: int
    to: int

    @property
    def size(self) -> int:
        return self.width * self.rows


@dataclass(frozen=True, slots=True)
class Extents:
    """`pieces`: of block 0, each of at most PIECE_BYTES_MAX bytes; `block_bytes`: of the mirror, which has no gaps."""

    layout: Layout
    pieces: tuple[Piece, ...]
    block_bytes: int

    @classmethod
    def of(cls, layout: Layout) -> Extents:
        pieces: list[Piece] = []
        start = 0
        for region in layout.regions:
            run, outer = _nested(region, layout)
            for piece in _rows(region, run, outer, start):
                pieces += _cut(piece)
            start += layout.block_tokens * region.inner_bytes(layout.itemsize) if layout.addressable else region.inner_bytes(layout.itemsize)
        return cls(layout, tuple(pieces), start)

    def mirror(self, blocks: int) -> Layout:
        """The layout of `blocks` blocks in a mirror."""
        regions, start = [], 0
        for region in self.layout.regions:
            moved = _compacted(region, self.layout, start, self.block_bytes)
            regions.append(moved)
            tokens = self.layout.block_tokens if self.layout.addressable else 1
            start += tokens * region.inner_bytes(self.layout.itemsize)
        return msgspec.structs.replace(self.layout, blocks=blocks, regions=tuple(regions), pool_bytes=blocks * self.block_bytes)


def _steps(region: Region, layout: Layout) -> list[tuple[str, int, int]]:
    """(name, size, stride) of every dimension within a block that steps, smallest stride first; the slot is one of them."""
    steps = [(name, size, stride) for name, size, stride in region.inner if size > 1]
    if layout.addressable and layout.block_tokens > 1:
        steps.append(("slot", layout.block_tokens, region.slot_stride))
    return sorted(steps, key=lambda step: step[2])


def _nested(region: Region, layout: Layout) -> tuple[int, list[tuple[int, int]]]:
    """(bytes that lie contiguously, [(size, stride)] of what steps over them, outermost first, neighbours that nest merged into one)."""
    run, steps = layout.itemsize, _steps(region, layout)
    while steps and steps[0][2] == run:
        run *= steps.pop(0)[1]
    outer: list[tuple[int, int]] = []
    for _, size, stride in steps:
        if outer and stride == outer[-1][0] * outer[-1][1]:
            outer[-1] = (outer[-1][0] * size, outer[-1][1])
        else:
            outer.append((size, stride))
    return run, outer[::-1]


def _rows(region: Region, run: int, outer: list[tuple[int, int]], start: int) -> Iterator[Piece]:
    """One piece for each place of all dimensions but the innermost; row by row where the pitch is too large."""
    rows, pitch = outer[-1] if outer else (1, run)
    around = outer[:-1]
    if pitch > PITCH_MAX:
        rows, pitch, around = 1, run, outer
    for index in itertools.product(*(range(size) for size, _ in around)):
        at = region.offset + sum(i * stride for i, (_, stride) in zip(index, around, strict=True))
        yield Piece(at, pitch, run, rows, region.block_stride, start)
        start += run * rows


def _cut(piece: Piece) -> Iterator[Piece]:
    """The same bytes in pieces of at most PIECE_BYTES_MAX."""
    if piece.width > PIECE_BYTES_MAX:
        for row in range(piece.rows):
            for first in range(0, piece.width, PIECE_BYTES_MAX):
                width = min(PIECE_BYTES_MAX, piece.width - first)
                yield Piece(piece.at + row * piece.pitch + first, width, width, 1, piece.block_stride, piece.to + row * piece.width + first)
        return
    step = PIECE_BYTES_MAX // piece.width
    for first in range(0, piece.rows, step):
        rows = min(step, piece.rows - first)
        yield Piece(piece.at + first * piece.pitch, piece.pitch, piece.width, rows, piece.block_stride, piece.to + first * piece.width)


def _compacted(region: Region, layout: Layout, start: int, block_bytes: int) -> Region:
    """The region as it lies in a mirror: the same order of strides, without what lay between."""
    strides, step = {}, layout.itemsize
    for name, size, _ in _steps(region, layout):
        strides[name] = step
        step *= size
    # a dimension of one is never stepped over: its stride only has to be a possible one
    inner = tuple((name, size, strides.get(name, layout.itemsize)) for name, size, _ in region.inner)
    return Region(region.name, start, block_bytes, strides.get("slot", step) if layout.addressable else 0, inner)
