"""Which canonical ranges of which old shards make up a new shard, when pp or tp change.

Knows: layouts. Must not know: where the bytes are, who moves them (stream/).
Invariants: the moves of one new shard cover its canonical token exactly once, in order; equal shards (MLA under tp) may serve as one another's source.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kvguard.errors import BadConfig
from kvguard.format.layout import NAMED, Layout


class Move(NamedTuple):
    """`size` bytes of one token, from `start` in the canonical token of old shard `source` to `target` in the new one's."""

    source: int
    start: int
    target: int
    size: int


def reshard(old: Sequence[Layout], new: Sequence[Layout]) -> tuple[tuple[Move, ...], ...]:
    """By new layout, the moves of its canonical token. Raises BadConfig where bytes can't be carried over: another model or dtype, a part nobody holds."""
    everyone = (*old, *new)
    if not all(layout.addressable for layout in everyone):
        raise BadConfig("a pool whose tokens aren't addressable can't be resharded. Try: the same pp and tp on both sides")
    if len({(layout.model, layout.dtype, layout.itemsize, layout.shard.layers[2], layout.shard.heads[2]) for layout in everyone}) > 1:
        raise BadConfig("the two sides differ in model, dtype, or number of layers or heads. Try: the same model and dtype on both sides")
    held: dict[tuple, tuple[int, int, int]] = {}
    for index, layout in enumerate(old):
        for key, offset, size in leaves(layout):
            held.setdefault(key, (index, offset, size))
    return tuple(tuple(_moves(layout, held)) for layout in new)


def leaves(layout: Layout) -> Iterator[tuple[tuple, int, int]]:
    """(coordinates in the whole model, offset, bytes) of the smallest parts of a canonical token that a shard boundary can cut, in order."""
    offset = 0
    firsts = {"layer": layout.shard.layers[0], "head": layout.shard.heads[0]}
    for region in layout.regions:
        last = max((n + 1 for n, (name, _, _) in enumerate(region.inner) if name in NAMED), default=0)
        size = layout.itemsize
        for _, count, _ in region.inner[last:]:
            size *= count
        outer = region.inner[:last]
        for index in itertools.product(*(range(count) for _, count, _ in outer)):
            named = region.coordinates() + tuple((dimension[0], i) for dimension, i in zip(outer, index, strict=True))
            yield tuple(sorted((name, i + firsts.get(name, 0)) for name, i in named)), offset, size
            offset += size


def _moves(layout: Layout, held: dict) -> Iterator[Move]:
    pending: Move | None = None
    for key, target, size in leaves(layout):
        found = held.get(key)
        if found is None or found[2] != size:
            part = ", ".join(f"{name} {i}" for name, i in key)
            raise BadConfig(f"no old shard holds {part} as {size} bytes. Try: name all ranks of the old topology")
        source, start, _ = found
        if pending and pending.source == source and pending.start + pending.size == start:
            pending = pending._replace(size=pending.size + size)
            continue
        if pending:
            yield pending
        pending = Move(source, start, target, size)
    if pending:
        yield pending
