"""The host device: pools in sealed memfds, copied with numpy over the shared mapping.

Knows: memory, rows of bytes, a few numpy calls per copy however many pieces there are. Must not know: sequences, streams, peers, torch.
Invariants: a descriptor is checked (size, sealed against shrinking) before it is mapped, so that no peer can make this process fault; pieces outside the pool
are refused before a byte is copied; a copy reads or writes the named slots only, in canonical order (device/base.py).

How: the pool is cut into rows as wide as the bytes that lie contiguously in every token. A token is then a fixed list of row numbers relative to its slot, and
a capture is one np.take over all rows of all tokens, straight into the output. Layouts whose tensors don't share such a grid are copied in several groups.
Where rows would be a few bytes (keys that stand in columns) runs of slots are copied through a strided view of the elements instead.
"""

from __future__ import annotations

import fcntl
import math
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvguard.errors import BadConfig, Refused
from kvguard.format.layout import Layout, Region

GRID_BYTES_MIN = 128  # narrower common rows cost more in index than a group apart costs in calls
ROW_BYTES_MIN = 16  # narrower rows cost more in index than a run of slots costs in a call


@dataclass(frozen=True, slots=True)
class _Group:
    """Regions on one grid. `rows`: [number, width] bytes; `token`: row numbers of slot 0 of block 0 in canonical order; steps in rows.

    `elements`: [block, slot, inner...] of the one region, where rows would be too narrow.
    """

    rows: np.ndarray
    token: np.ndarray
    block_step: int
    slot_step: int
    start: int  # of this group's bytes within the canonical token (or block)
    size: int
    elements: np.ndarray | None = None


class Copies:
    """Capture and scatter over memory that is mapped here, whoever owns it. `memory`: at least layout.pool_bytes bytes."""

    def __init__(self, layout: Layout, memory: memoryview) -> None:
        self.layout = layout
        self.memory = memory
        self._groups = _grouped(layout, np.frombuffer(memory, dtype=np.uint8))
        self._unit_bytes = layout.token_bytes if layout.addressable else layout.block_bytes

    def forget(self) -> None:
        """Hold no view of the memory any more."""
        self._groups = ()
        self.memory = memoryview(b"")

    def capture(self, blocks, starts, counts, out: memoryview) -> int:
        """See device/base.py. Raises Refused for pieces outside the pool, an `out` that is too small, or a layout whose tokens aren't addressable."""
        return self._gather(*slots_of(self.layout, blocks, starts, counts), out)

    def capture_blocks(self, blocks, out: memoryview) -> int:
        return self._gather(*slots_of_blocks(self.layout, blocks), out)

    def scatter(self, blocks, starts, counts, source: memoryview) -> None:
        """See device/base.py. `source` must hold exactly the pieces' bytes, else Refused."""
        self._spread(*slots_of(self.layout, blocks, starts, counts), source)

    def scatter_blocks(self, blocks, source: memoryview) -> None:
        self._spread(*slots_of_blocks(self.layout, blocks), source)

    # ---- copies -------------------------------------------------------------------------------------------------------------------

    def _gather(self, blocks: np.ndarray, slots: np.ndarray, out: memoryview) -> int:
        total = blocks.size * self._unit_bytes
        if out.nbytes < total:
            raise Refused(f"the pieces are {total} bytes, the buffer has {out.nbytes}")
        if not total:
            return 0
        target = np.frombuffer(out, dtype=np.uint8, count=total)
        for group in self._groups:
            if group.elements is not None:
                for here, there in _runs(group, blocks, slots, target.reshape(blocks.size, -1)):
                    there[...] = here
                continue
            rows = _row_numbers(group, blocks, slots)
            if group.size == self._unit_bytes:
                # mode="clip" writes straight into `out`; bounds were checked on the pieces
                np.take(group.rows, rows, axis=0, out=target.reshape(rows.size, -1), mode="clip")
            else:
                found = group.rows[rows].reshape(blocks.size, group.size)
                target.reshape(blocks.size, -1)[:, group.start : group.start + group.size] = found
        return total

    def _spread(self, blocks: np.ndarray, slots: np.ndarray, source: memoryview) -> None:
        total = blocks.size * self._unit_bytes
        if source.nbytes != total:
            raise Refused(f"the pieces are {total} bytes, the source has {source.nbytes}")
        if not total:
            return
        values = np.frombuffer(source, dtype=np.uint8).reshape(blocks.size, self._unit_bytes)
        for group in self._groups:
            if group.elements is not None:
                for here, there in _runs(group, blocks, slots, values):
                    here[...] = there
                continue
            part = values[:, group.start : group.start + group.size]
            rows = _row_numbers(group, blocks, slots)
            group.rows[rows] = part.reshape(rows.size, -1)


class HostPool(Copies):
    """One pool, mapped. `memory`: writable (unless opened read-only) bytes of the whole pool, from which an engine makes its own tensors."""

    def __init__(self, layout: Layout, descriptor: int, writable: bool) -> None:
        self._descriptor = descriptor
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        super().__init__(layout, memoryview(mmap.mmap(descriptor, layout.pool_bytes, mmap.MAP_SHARED, access)))

    def publish(self, word: memoryview, value: int) -> None:
        """A plain aligned 64-bit store: on a CPU the writes before it are already in memory when this is called."""
        (word if word.format == "Q" else word.cast("B").cast("Q"))[0] = value

    def export(self) -> list[int]:
        """A duplicate of the pool's descriptor: the caller's to close (or to hand to Device.open, which owns it)."""
        return [os.dup(self._descriptor)]

    def close(self) -> None:
        """Forget the mapping; it goes when the last tensor over `memory` does. Idempotent."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self.forget()


class HostDevice:
    """Pools in shareable host memory."""

    kind = "host"

    def allocate(self, layout: Layout) -> HostPool:
        """A zeroed pool in a memfd that can't change its size. Raises BadConfig for a layout with faults."""
        layout.check(layout.pool_bytes)
        descriptor = os.memfd_create("kvguard-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, layout.pool_bytes)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return HostPool(layout, descriptor, writable=True)
        except BaseException:
            os.close(descriptor)
            raise

    def lend(self, layout: Layout, gpu: str = "") -> list[int]:
        """See device/base.py."""
        pool = self.allocate(layout)
        try:
            return pool.export()
        finally:
            pool.close()

    def open(self, layout: Layout, descriptors: list[int], writable: bool = True) -> HostPool:
        """See device/base.py. `writable` false: a daemon's view. Raises Refused, and closes the descriptors, where they don't fit the layout."""
        try:
            self._refuse_misfit(layout, descriptors)
            return HostPool(layout, descriptors[0], writable)
        except BaseException as error:
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(error, OSError):
                raise Refused(f"the pool can't be mapped: {error}. Try: descriptors from Pool.export()") from error
            raise

    def where(self, descriptors: Sequence[int]) -> str:
        """See device/base.py."""
        return ""

    def lends_on(self, gpu: str = "") -> str:
        """See device/base.py."""
        return ""

    def _refuse_misfit(self, layout: Layout, descriptors: list[int]) -> None:
        if len(descriptors) != 1:
            raise Refused(f"a host pool comes as one descriptor, not {len(descriptors)}. Try: Pool.export()")
        held = os.fstat(descriptors[0]).st_size
        try:
            layout.check(held)
        except BadConfig as error:
            raise Refused(f"the pool of {held} bytes doesn't fit its layout: {error}") from error
        if not fcntl.fcntl(descriptors[0], fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise Refused("the pool's memory could be cut under its readers. Try: HostDevice.allocate, or a memfd with F_SEAL_SHRINK")


# ---- pieces to units --------------------------------------------------------------------------------------------------------------


def slots_of(layout: Layout, blocks, starts, counts) -> tuple[np.ndarray, np.ndarray]:
    """Block and slot of each token of the pieces, in order, int64 [n]. Raises Refused for what lies outside the pool, or isn't addressable."""
    if not layout.addressable:
        raise Refused("single tokens of this layout aren't addressable. Try: capture_blocks, scatter_blocks")
    blocks, starts, counts = (np.asarray(column, dtype=np.int64) for column in (blocks, starts, counts))
    lowest = min(int(column.min(initial=0)) for column in (blocks, starts, counts))
    highest = int(blocks.max(initial=0)), int((starts + counts).max(initial=0))
    if lowest < 0 or highest[0] >= layout.blocks or highest[1] > layout.block_tokens:
        raise Refused(f"a piece lies outside the pool's {layout.blocks} blocks of {layout.block_tokens} tokens")
    first = np.cumsum(counts) - counts
    slots = np.arange(int(counts.sum()), dtype=np.int64) + np.repeat(starts - first, counts)
    return np.repeat(blocks, counts), slots


def slots_of_blocks(layout: Layout, blocks) -> tuple[np.ndarray, np.ndarray]:
    """The same of whole blocks: one slot, 0, for each where tokens aren't addressable. Raises Refused for a block outside the pool."""
    blocks = np.asarray(blocks, dtype=np.int64)
    if blocks.size and (blocks.min() < 0 or blocks.max() >= layout.blocks):
        raise Refused(f"a block lies outside the pool's {layout.blocks} blocks")
    if not layout.addressable:
        return blocks, np.zeros(blocks.size, dtype=np.int64)
    tokens = layout.block_tokens
    return np.repeat(blocks, tokens), np.tile(np.arange(tokens, dtype=np.int64), blocks.size)


# ---- the grid -------------------------------------------------------------------------------------------------------------------


def _row_numbers(group: _Group, blocks: np.ndarray, slots: np.ndarray) -> np.ndarray:
    base = blocks * group.block_step + slots * group.slot_step
    return (base[:, None] + group.token[None, :]).reshape(-1)


def _runs(group: _Group, blocks: np.ndarray, slots: np.ndarray, units: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Views of each run of slots in the pool, and of its place in canonical `units` [n, unit bytes]."""
    elements = group.elements
    ends = np.flatnonzero((np.diff(blocks) != 0) | (np.diff(slots) != 1)) + 1
    first = 0
    for end in (*ends.tolist(), blocks.size):
        slot = int(slots[first])
        here = elements[int(blocks[first]), slot : slot + end - first]
        yield here, units[first:end, group.start : group.start + group.size].view(elements.dtype).reshape(here.shape)
        first = end


def _elements(region: Region, layout: Layout, pool: np.ndarray) -> np.ndarray | None:
    """[block, slot, inner...] of a region whose tokens are addressable, None where its elements aren't aligned."""
    steps = (region.block_stride, region.slot_stride, *(stride for _, _, stride in region.inner))
    if not layout.addressable or layout.itemsize not in (1, 2, 4, 8) or any(step % layout.itemsize for step in (region.offset, *steps)):
        return None
    shape = (layout.blocks, layout.block_tokens, *(size for _, size, _ in region.inner))
    return np.ndarray(shape, np.dtype(f"u{layout.itemsize}"), pool, region.offset, steps)


def _grouped(layout: Layout, pool: np.ndarray) -> tuple[_Group, ...]:
    """One group where all regions share a grid of useful width, else one per region."""
    widths = [_width(region, layout) for region in layout.regions]
    first = layout.regions[0]
    alike = all((region.block_stride, region.slot_stride) == (first.block_stride, first.slot_stride) for region in layout.regions)
    base = min(region.offset for region in layout.regions)
    common = math.gcd(*widths, *(region.offset - base for region in layout.regions))
    if alike and common >= min(GRID_BYTES_MIN, *widths):
        return (_group(layout, pool, layout.regions, base, common, 0),)
    groups, start = [], 0
    for region, width in zip(layout.regions, widths, strict=True):
        elements = _elements(region, layout, pool) if width < ROW_BYTES_MIN else None
        if elements is not None:
            groups.append(_Group(pool[:0], pool[:0], 0, 0, start, region.inner_bytes(layout.itemsize), elements))
        else:
            groups.append(_group(layout, pool, (region,), region.offset, width, start))
        start += groups[-1].size
    return tuple(groups)


def _width(region: Region, layout: Layout) -> int:
    """The widest row that a region's contiguous runs and strides are multiples of."""
    run, kept = layout.itemsize, list(region.inner)
    while kept and (kept[-1][2] == run or kept[-1][1] == 1):
        run *= kept.pop()[1]
    strides = [stride for _, size, stride in kept if size > 1]
    if layout.blocks > 1:
        strides.append(region.block_stride)
    if layout.addressable and layout.block_tokens > 1:
        strides.append(region.slot_stride)
    return math.gcd(run, *strides)


def _group(layout: Layout, pool: np.ndarray, regions, base: int, width: int, start: int) -> _Group:
    token = np.concatenate([_token_rows(region, layout.itemsize, base, width) for region in regions])
    number = (pool.size - base) // width
    rows = pool[base : base + number * width].reshape(number, width)
    first = regions[0]
    return _Group(rows, token, first.block_stride // width, first.slot_stride // width, start, token.size * width)


def _token_rows(region: Region, itemsize: int, base: int, width: int) -> np.ndarray:
    """Row numbers of the region's canonical bytes at slot 0 of block 0."""
    offsets = np.array([region.offset - base], dtype=np.int64)
    for _, size, stride in region.inner:
        offsets = (offsets[:, None] + np.arange(size, dtype=np.int64) * stride).reshape(-1)
    if width >= itemsize:
        return offsets[:: width // itemsize] // width
    within = np.arange(itemsize // width, dtype=np.int64) * width  # an element wider than the grid, at odd offsets
    return (offsets[:, None] + within).reshape(-1) // width
