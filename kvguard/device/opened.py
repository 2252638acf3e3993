"""A pool of another process on a GPU, as its node's daemon sees it: read by copy engines, and from the ring into which the engine packs its steps.

Knows: the mapping, ring and staging on this side, whole blocks as extents. Must not know: which positions are committed, peers, who restores.

Invariants
- With `capture = "engine"` nothing here launches a kernel: bytes come out of the ring, or as whole blocks by copy engines, small pieces, two in flight, paced.
- A slot's bytes come from its latest record in the ring, or from the pool itself; never from an older one.
- After a fault of the GPU nothing is read any more: `lost` says why, and every later call raises DeviceLost with it.
- A pool is opened, read and closed by one thread at a time; its engine is welcomed in any.
- Nothing is given back that a copy may still be writing to: where the GPU doesn't say in time that they are through, it goes with this process.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvguard.device import card, ring
from kvguard.device.driver import Driver
from kvguard.device.exports import close_all
from kvguard.device.extents import Extents
from kvguard.device.gpu_pool import GpuPool
from kvguard.device.host import Copies, HostDevice, HostPool, slots_of, slots_of_blocks
from kvguard.device.kernels.plan import Plan
from kvguard.device.mappings import Mappings
from kvguard.device.paced import Paced, strand
from kvguard.errors import DeviceLost, KvguardError, Refused, TimedOut
from kvguard.format.layout import Layout

log = logging.getLogger(__name__)
RING_BYTES = 64 << 20
STAGED_BYTES = 128 << 20  # of host memory: what was packed stays here until newer steps need the place
MIRROR_BYTES = 8 << 20
ROWS_MIN = 16


class Mirror:
    """Whole blocks of a pool in pinned host memory, `blocks` at a time, read with the host device's copies."""

    def __init__(self, driver: Driver, layout: Layout, paced: Paced, mirror_bytes: int = MIRROR_BYTES) -> None:
        self._paced = paced
        self._extents = Extents.of(layout)
        self.blocks = max(1, mirror_bytes // self._extents.block_bytes)
        memory, self._pinned = driver.pinned(self.blocks * self._extents.block_bytes)
        self.copies = Copies(self._extents.mirror(self.blocks), memory)

    def fetch(self, address: int, blocks: Sequence[int]) -> None:
        """Blocks of the pool at `address` into the mirror's blocks 0, 1, ... At most self.blocks of them. Raises TimedOut, DeviceLost."""
        for n, block in enumerate(blocks):
            to = self._pinned + n * self._extents.block_bytes
            for piece in self._extents.pieces:
                at = address + piece.at + block * piece.block_stride
                self._paced.rows(to + piece.to, piece.width, at, piece.pitch, piece.width, piece.rows)
        self._paced.finish()


class RingEnd:
    """The daemon's end of a ring: device memory that it owns, and what came out of it in host memory."""

    def __init__(self, driver: Driver, layout: Layout, unit_bytes: int, slots_total: int, paced: Paced, ring_bytes: int, staged_bytes: int) -> None:
        self._driver, self._paced, self._unit_bytes = driver, paced, unit_bytes
        self.rows = max(ROWS_MIN, ring_bytes // unit_bytes)
        staged_rows = max(self.rows, staged_bytes // unit_bytes)
        staged, self._pinned = driver.pinned(staged_rows * unit_bytes)  # first: it goes by itself where what follows fails
        self.staged = np.frombuffer(staged, np.uint8).reshape(staged_rows, unit_bytes)
        with contextlib.ExitStack() as undo:
            self.words = ring.Words.create(self.rows)
            undo.callback(self.words.close)
            self.memory = driver.allocate(self.rows * unit_bytes)
            undo.callback(driver.free, self.memory)
            self._terms = self._card()
            self._unpacker = ring.Unpacker(self.words, self.rows, staged_rows, slots_total)
            undo.pop_all()

    @property
    def unpacked(self) -> int:
        return self._unpacker.unpacked

    def _card(self) -> card.Card | None:
        try:
            found = self._driver.allocation_of(self.memory)
            handle = self._driver.handle_of(found.address)
        except Refused as error:  # the engine packs nothing then, and its pool is read
            log.error("no ring can be shared: %s", error)
            return None
        return card.Card("ring", self._driver.uuid, handle, self.memory - found.address, self.rows * self._unit_bytes, self.rows)

    def welcome(self) -> list[int]:
        """[a card, words] for the engine, or nothing where it can't be shared; the caller's to close. Asks nothing of the GPU."""
        return [card.write(self._terms), os.dup(self.words.fd)] if self._terms is not None else []

    def find(self, slots: np.ndarray) -> np.ndarray:
        """Staged row of each slot, -1 where it must be read from the pool; everything that the engine has packed is fetched first."""
        found = self._unpacker.finished()
        for row, some, staged in found:
            if row >= 0:
                self._paced.copy(self._pinned + staged * self._unit_bytes, self.memory + row * self._unit_bytes, len(some) * self._unit_bytes)
        self._paced.finish()
        self._unpacker.copied(found)
        return self._unpacker.find(slots)

    def forget(self) -> None:
        """What the engine packed is void from now on, and everything read from the pool: another engine goes on in it."""
        self._unpacker.forget()

    def close(self) -> None:
        self.words.close()
        self.staged = np.zeros((0, 1), np.uint8)
        self._driver.free(self.memory)


class OpenedPool:
    """See device/base.py; for reading alone. `lost`: why the GPU's memory can't be believed any more. Counts: `from_ring`, `from_pool` units captured."""

    def __init__(
        self, driver: Driver, layout: Layout, mappings: Mappings, terms: card.Card, descriptors: list[int], *, capture: str = "engine", bytes_per_s: int = 0,
        ring_bytes: int = RING_BYTES, staged_bytes: int = STAGED_BYTES,
    ) -> None:  # fmt: skip
        """`descriptors`: what came behind the card, taken. Raises Refused, DeviceLost."""
        self.layout, self.driver = layout, driver
        try:
            self.plan = Plan.of(layout)
        except BaseException:
            close_all(descriptors)
            raise
        self.lost = ""
        self._mappings, self._terms = mappings, terms
        start, size = mappings.open(terms, descriptors)
        self.address = start + terms.offset
        self._ring: RingEnd | None = None
        self._kernels: GpuPool | None = None
        try:
            if size < terms.offset + layout.pool_bytes:
                raise Refused(f"the allocation has {size} bytes, too few for the pool that it is said to hold. Try: Pool.export()")
            self._paced = Paced(driver, driver.stream(urgent=False), bytes_per_s)
            self._mirror = Mirror(driver, layout, self._paced)
            if capture == "daemon":
                self._kernels = GpuPool(driver, layout, self.address)
            else:
                slots = self.plan.blocks * self.plan.block_tokens
                self._ring = RingEnd(driver, layout, self.plan.unit_bytes, slots, self._paced, ring_bytes, staged_bytes)
        except BaseException:
            _quietly(lambda: mappings.close(terms))
            raise
        self._closed = False
        self.from_ring = self.from_pool = 0

    @property
    def gpu(self) -> str:
        """Where it is: what is read from one GPU is read by one thread."""
        return self.driver.uuid

    @property
    def copied_bytes(self) -> int:
        """Rises while copies go on; may be read from any thread."""
        return self._paced.copied_bytes

    def welcome(self) -> list[int]:
        """What the engine is answered with: its ring, or nothing where the daemon gathers itself."""
        return self._ring.welcome() if self._ring is not None and not self.lost else []

    # ---- captures -----------------------------------------------------------------------------------------------------------------

    def capture(self, blocks, starts, counts, out: memoryview) -> int:
        """See device/base.py. Raises Refused, DeviceLost."""
        return self._capture(*slots_of(self.layout, blocks, starts, counts), out)

    def capture_blocks(self, blocks, out: memoryview) -> int:
        return self._capture(*slots_of_blocks(self.layout, blocks), out)

    def _capture(self, blocks: np.ndarray, within: np.ndarray, out: memoryview) -> int:
        unit, total = self.plan.unit_bytes, blocks.size * self.plan.unit_bytes
        if out.nbytes < total:
            raise Refused(f"the pieces are {total} bytes, the buffer has {out.nbytes}")
        self._refuse_lost()
        if not total:
            return 0
        try:
            if self._kernels is not None:
                if self.layout.addressable:
                    return self._kernels.capture(blocks, within, np.ones_like(blocks), out)
                return self._kernels.capture_blocks(blocks, out)
            target = np.frombuffer(out, np.uint8, total).reshape(blocks.size, unit)
            rows = self._ring.find(self.plan.slots(blocks, within))
            staged = rows >= 0
            target[staged] = self._ring.staged[rows[staged]]
            self._from_pool(blocks, within, np.flatnonzero(~staged), target)
            self.from_ring += int(staged.sum())
        except (DeviceLost, TimedOut) as error:  # after a copy that may still be going on no staging can be used again
            self._lose(str(error))
            raise DeviceLost(self.lost) from error
        return total

    def _from_pool(self, blocks: np.ndarray, within: np.ndarray, missing: np.ndarray, target: np.ndarray) -> None:
        """Units that the ring doesn't have: their whole blocks by copy engines, and out of the mirror."""
        wanted = np.unique(blocks[missing])
        for first in range(0, wanted.size, self._mirror.blocks):
            some = wanted[first : first + self._mirror.blocks]
            self._mirror.fetch(self.address, some.tolist())
            here = missing[(blocks[missing] >= some[0]) & (blocks[missing] <= some[-1])]
            places = np.searchsorted(some, blocks[here])
            found = memoryview(bytearray(here.size * self.plan.unit_bytes))
            if self.layout.addressable:
                self._mirror.copies.capture(places, within[here], np.ones_like(places), found)
            else:
                self._mirror.copies.capture_blocks(places, found)
            target[here] = np.frombuffer(found, np.uint8).reshape(here.size, -1)
        self.from_pool += int(missing.size)

    # ---- after the engine's death ---------------------------------------------------------------------------------------------------

    def salvage(self, sequences: Sequence[Sequence[int]], salvage_ms_max: int) -> tuple[HostPool, int]:
        """A host pool of the same layout that holds the sequences' blocks, whole sequences in the order given, as many as come in time: (pool, how many).

        Then this mapping is closed, so that a restart can allocate. Raises DeviceLost after a fault of the GPU: then nothing was read.
        """
        self._refuse_lost()
        deadline = time.monotonic() + salvage_ms_max / 1000
        saved, kept = HostDevice().allocate(self.layout), set()
        count = 0
        try:
            for blocks in sequences:
                wanted = [block for block in dict.fromkeys(blocks) if block not in kept]
                if not self._carry(saved, wanted, deadline):
                    break
                kept.update(wanted)
                count += 1
        except BaseException as error:
            self._lose(str(error))
            saved.close()
            raise
        self.close()
        return saved, count

    def _carry(self, saved: HostPool, blocks: list[int], deadline: float) -> bool:
        for first in range(0, len(blocks), self._mirror.blocks):
            if time.monotonic() >= deadline:
                return False
            some = blocks[first : first + self._mirror.blocks]
            self._mirror.fetch(self.address, some)
            data = memoryview(bytearray(len(some) * self.layout.block_bytes))
            self._mirror.copies.capture_blocks(list(range(len(some))), data)
            saved.scatter_blocks(some, data)
        return True

    # ---- what a daemon's view of a pool doesn't do ------------------------------------------------------------------------------------

    def scatter(self, blocks, starts, counts, source: memoryview) -> None:
        raise Refused("a daemon never writes into an engine's memory. Try: the engine's own pool")

    def scatter_blocks(self, blocks, source: memoryview) -> None:
        raise Refused("a daemon never writes into an engine's memory. Try: the engine's own pool")

    def publish(self, word: memoryview, value: int) -> None:
        raise Refused("a daemon says nothing for an engine. Try: the engine's own pool")

    def export(self) -> list[int]:
        raise Refused("memory that was opened can't be exported again: only its own process can. Try: salvage, which makes a host pool of it")

    def _refuse_lost(self) -> None:
        if self.lost:
            raise DeviceLost(self.lost)
        if self._closed:
            raise Refused("the pool was closed. Try: attach again")

    def _lose(self, why: str) -> None:
        self.lost = self.lost or why

    def close(self) -> None:
        """Unmap, give the ring back. Idempotent; never raises: what a GPU that is lost, or hangs, doesn't give back goes with this process."""
        if self._closed:
            return
        self._closed = True
        try:
            self._paced.settle()
            if self._kernels is not None:
                self._kernels.settle()
        except TimedOut as error:
            log.error("memory on %s isn't given back: %s", self.gpu, error)
            strand(self)
            return
        except KvguardError as error:
            log.warning("not settled: %s", error)
        self._mirror.copies.forget()
        for part in (self._kernels, self._ring):
            if part is not None:
                _quietly(part.close)
        _quietly(lambda: self._mappings.close(self._terms))


def _quietly(close: Callable[[], None]) -> None:
    try:
        close()
    except KvguardError as error:
        log.warning("not given back: %s", error)
