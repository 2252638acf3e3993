"""What the kernels are launched with: a layout cut into runs, and the numbers of each launch.

Knows: layouts, runs, how wide a thread may read. Must not know: pointers, streams, cupy.
Invariants: the runs of all groups together are each canonical byte of a unit once; a unit is a token, or a whole block where tokens aren't addressable;
runs stand in order of their layers, so that one layer is one range of them; a launch has fewer than 2**31 items.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvguard.errors import Refused
from kvguard.format.layout import Layout, Region

WIDTHS = (16, 8, 4, 2, 1)
THREADS = 256
GRID_MAX = 2048  # blocks of threads; the rest is the kernel's own loop
ITEMS_MAX = (1 << 31) - (1 << 24)
RUNS_MAX = 1 << 22  # of a unit: a table of 64 MiB on the device


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one length and one pair of strides. `runs`: int64 [n, 2], byte in the pool (of slot 0 of block 0) and byte within the canonical unit.

    `layers`: runs of layer n are [layers[n], layers[n + 1]).
    """

    runs: np.ndarray
    run_bytes: int
    block_stride: int
    slot_stride: int
    width: int
    layers: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch, pointers apart. `skip`: tokens of the columns before the first one of this launch."""

    kernel: str
    group: int  # whose table of runs it is
    blocks: int
    block_tokens: int
    block_stride: int
    slot_stride: int
    unit_bytes: int
    first_run: int
    run_count: int
    run_units: int
    items: int
    lane_bits: int
    skip: int
    tokens: int
    width: int

    @property
    def grid(self) -> int:
        return min(GRID_MAX, -(-self.items // (THREADS >> self.lane_bits)))


@dataclass(frozen=True, slots=True)
class Plan:
    """A layout's runs. `unit_bytes`: canonical bytes of a slot; `block_tokens`: slots to a block, 1 where only whole blocks have canonical bytes."""

    groups: tuple[Group, ...]
    blocks: int
    block_tokens: int
    unit_bytes: int
    layers: int

    @classmethod
    def of(cls, layout: Layout) -> Plan:
        """Raises Refused for a layout that would need a table of more than RUNS_MAX runs."""
        found: dict[tuple[int, int, int], list[np.ndarray]] = {}
        start, layers = 0, 1
        for region in layout.regions:
            run_bytes, runs = _runs(region, layout.itemsize)
            runs[:, 1] += start
            start += region.inner_bytes(layout.itemsize)
            layers = max(layers, int(runs[:, 2].max()) + 1)
            found.setdefault((run_bytes, region.block_stride, region.slot_stride), []).append(runs)
        groups = tuple(_group(layout, start, layers, key, np.concatenate(parts)) for key, parts in found.items())
        return cls(groups, layout.blocks, layout.block_tokens if layout.addressable else 1, start, layers)

    def launches(self, gather: bool, tokens: int, alignment: int = WIDTHS[0], layer: int | None = None) -> Iterator[Launch]:
        """All that is needed for `tokens` slots (of one layer). `alignment`: what pointers and, where there are any, places are multiples of."""
        for number, group in enumerate(self.groups):
            first, end = (0, group.runs.shape[0]) if layer is None else group.layers[layer : layer + 2]
            if end == first:
                continue
            width = math.gcd(group.width, alignment)
            units = group.run_bytes // width
            lane_bits = min(THREADS.bit_length() - 1, (units - 1).bit_length())
            step = max(1, ITEMS_MAX // (end - first))
            for skip in range(0, tokens, step):
                count = min(step, tokens - skip)
                yield Launch(
                    f"kvg_{'gather' if gather else 'scatter'}_{width}", number, self.blocks, self.block_tokens, group.block_stride, group.slot_stride,
                    self.unit_bytes, first, end - first, units, count * (end - first), lane_bits, skip, count, width,
                )  # fmt: skip

    def slots(self, blocks: np.ndarray, within: np.ndarray) -> np.ndarray:
        """Slot numbers as the kernels take them, int64 [n]."""
        return blocks.astype(np.int64) * self.block_tokens + within


def _runs(region: Region, itemsize: int) -> tuple[int, np.ndarray]:
    """(bytes of a run, int64 [n, 3] of its place in the pool, in the region's canonical bytes, and its layer)."""
    run_bytes, kept = itemsize, list(region.inner)
    while kept and kept[-1][0] != "layer" and (kept[-1][2] == run_bytes or kept[-1][1] == 1):
        run_bytes *= kept.pop()[1]
    count = math.prod(size for _, size, _ in kept)
    if count > RUNS_MAX:
        raise Refused(f"a token of this layout is {count} runs of {run_bytes} bytes. Try: an order in which a head's elements lie together")
    named = dict(region.coordinates()).get("layer", 0)
    offsets, layers = np.array([region.offset], np.int64), np.array([named], np.int64)
    for name, size, stride in kept:
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
        layers = (layers[:, None] + (np.arange(size, dtype=np.int64) if name == "layer" else np.zeros(size, np.int64))).reshape(-1)
    return run_bytes, np.stack([offsets, np.arange(count, dtype=np.int64) * run_bytes, layers], axis=1)


def _group(layout: Layout, unit_bytes: int, layers: int, key: tuple[int, int, int], runs: np.ndarray) -> Group:
    run_bytes, block_stride, slot_stride = key
    runs = runs[np.argsort(runs[:, 2], kind="stable")]
    strides = [block_stride if layout.blocks > 1 else 0, slot_stride if layout.addressable and layout.block_tokens > 1 else 0]
    common = math.gcd(run_bytes, unit_bytes, *strides, int(np.gcd.reduce(runs[:, :2].reshape(-1))))
    width = next(width for width in WIDTHS if common % width == 0)
    bounds = np.searchsorted(runs[:, 2], np.arange(layers + 1)).tolist()
    return Group(np.ascontiguousarray(runs[:, :2]), run_bytes, block_stride, slot_stride, width, tuple(bounds))


def tables_bytes(plan: Plan) -> int:
    """Device memory that the plan's runs take."""
    return sum(group.runs.nbytes for group in plan.groups)


def every_launch(plan: Plan, tokens: int) -> list[Launch]:
    """Layer by layer, in the order in which a forward pass needs them."""
    return list(itertools.chain.from_iterable(plan.launches(False, tokens, layer=layer) for layer in range(plan.layers)))
