"""A pool in a GPU's memory, mapped in this process: copies between it and host memory by one kernel and a few large transfers.

Knows: a driver, the kernels' plan, staging. Must not know: whose pool it is, rings, handles.
Invariants: pieces are checked before anything is launched; a call returns when its bytes are there, or raises; calls of several threads take turns; what this
file launches never runs before what was launched on the caller's stream before the call.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np

from kvguard.device.driver import Driver, Stream
from kvguard.device.host import slots_of, slots_of_blocks
from kvguard.device.kernels.plan import Plan, tables_bytes
from kvguard.device.paced import finished, settled
from kvguard.errors import Refused
from kvguard.format.layout import Layout

STAGING_BYTES = 8 << 20
PAGE_BYTES = 4096
WORK_S_MAX = 60.0  # what was launched before, and 8 MiB more
CAPTURED = (
    "the engine's stream is being captured into a CUDA graph, in which nothing runs now, and every replay would do the same again. "
    "Try: what kvguard is told, and steps that end, after the graph's replay"
)
ALIGNMENT = 256  # of every part of a buffer, as cudaMalloc gives


class Tables:
    """The plan's runs on the device, uploaded once. `address(n)`: of group n."""

    def __init__(self, driver: Driver, plan: Plan, stream: Stream) -> None:
        self._driver, self._starts, at = driver, [], 0
        memory, pinned = driver.pinned(tables_bytes(plan))
        for group in plan.groups:
            self._starts.append(at)
            np.frombuffer(memory, np.uint8)[at : at + group.runs.nbytes] = group.runs.reshape(-1).view(np.uint8)
            at += group.runs.nbytes
        self._base = driver.allocate(at)
        try:
            driver.copy(self._base, pinned, at, stream)
            driver.synchronise(stream)
        except BaseException:
            self.free()
            raise

    def address(self, group: int) -> int:
        return self._base + self._starts[group]

    def free(self) -> None:
        self._driver.free(self._base)


class Staging:
    """Units of canonical bytes on both sides, and a column of slots. `units` at a time."""

    def __init__(self, driver: Driver, unit_bytes: int, staging_bytes: int) -> None:
        self.units = max(1, staging_bytes // unit_bytes)
        size = self.units * unit_bytes
        self._driver = driver
        self._slots_at = -(-size // ALIGNMENT) * ALIGNMENT
        self.memory, self.pinned = driver.pinned(self._slots_at + 8 * self.units)  # first: it goes by itself where what follows fails
        self.bytes = np.frombuffer(self.memory, np.uint8, size)
        self._column = np.frombuffer(self.memory, np.int64, self.units, self._slots_at)
        self.flat = driver.allocate(self._slots_at + 8 * self.units)

    def send_slots(self, slots: np.ndarray, stream: Stream) -> int:
        """The device address of a column of slots, there once `stream` has come so far. The column before it must have been used."""
        self._column[: slots.size] = slots
        self._driver.copy(self.flat + self._slots_at, self.pinned + self._slots_at, slots.nbytes, stream)
        return self.flat + self._slots_at

    def free(self) -> None:
        self._driver.free(self.flat)
        self.bytes = self._column = np.zeros(0, np.uint8)


class GpuPool:
    """See device/base.py. `address`: of the pool's first byte. `current`: the stream on which the engine launches; what it launched before
    is waited for, on the GPU.

    Raises Refused (pieces outside, a layout the kernels can't take), DeviceLost, TimedOut.
    """

    def __init__(self, driver: Driver, layout: Layout, address: int, staging_bytes: int = STAGING_BYTES) -> None:
        self.layout, self.driver, self.address = layout, driver, address
        self.plan = Plan.of(layout)
        self.current: Callable[[], Stream] = driver.current
        self.lost = ""
        driver.compile()
        self._stream = driver.stream(urgent=False)
        self._tables = Tables(driver, self.plan, self._stream)
        self._staging_bytes = staging_bytes
        self._staging: Staging | None = None  # made when it is first needed: a daemon that runs copy engines alone never does
        self._lock = threading.Lock()
        self._closed = False

    # ---- copies -------------------------------------------------------------------------------------------------------------------

    def capture(self, blocks, starts, counts, out: memoryview) -> int:
        """See device/base.py: by one gather kernel and one transfer per 8 MiB."""
        return self._gather(self.plan.slots(*slots_of(self.layout, blocks, starts, counts)), out)

    def capture_blocks(self, blocks, out: memoryview) -> int:
        return self._gather(self.plan.slots(*slots_of_blocks(self.layout, blocks)), out)

    def scatter(self, blocks, starts, counts, source: memoryview) -> None:
        """See device/base.py. `source` must hold exactly the pieces' bytes, else Refused."""
        self._spread(self.plan.slots(*slots_of(self.layout, blocks, starts, counts)), source)

    def scatter_blocks(self, blocks, source: memoryview) -> None:
        self._spread(self.plan.slots(*slots_of_blocks(self.layout, blocks)), source)

    def launch(self, gather: bool, slots: int, count: int, flat: int, stream: Stream, places: int = 0, layer: int | None = None) -> None:
        """The kernels for `count` slots whose column is at device address `slots`, on `stream`. `flat`, `places`: as the kernels take them."""
        common = self.address | flat | 16
        for launch in self.plan.launches(gather, count, common & -common, layer):
            self.driver.launch(launch, self.address, flat, slots, places, self._tables.address(launch.group), stream)

    def _gather(self, slots: np.ndarray, out: memoryview) -> int:
        unit, total = self.plan.unit_bytes, slots.size * self.plan.unit_bytes
        if out.nbytes < total:
            raise Refused(f"the pieces are {total} bytes, the buffer has {out.nbytes}")
        target = np.frombuffer(out, np.uint8, total) if total else None
        with self._lock:
            staging = self._ready(slots.size)
            for first in range(0, slots.size, staging.units):
                some = slots[first : first + staging.units]
                self.launch(True, staging.send_slots(some, self._stream), some.size, staging.flat, self._stream)
                self.driver.copy(staging.pinned, staging.flat, some.size * unit, self._stream)
                self._finish()
                target[first * unit : (first + some.size) * unit] = staging.bytes[: some.size * unit]
        return total

    def _spread(self, slots: np.ndarray, source: memoryview) -> None:
        unit, total = self.plan.unit_bytes, slots.size * self.plan.unit_bytes
        if source.nbytes != total:
            raise Refused(f"the pieces are {total} bytes, the source has {source.nbytes}")
        values = np.frombuffer(source, np.uint8) if total else None
        with self._lock:
            staging = self._ready(slots.size)
            for first in range(0, slots.size, staging.units):
                some = slots[first : first + staging.units]
                staging.bytes[: some.size * unit] = values[first * unit : (first + some.size) * unit]
                self.driver.copy(staging.flat, staging.pinned, some.size * unit, self._stream)
                self.launch(False, staging.send_slots(some, self._stream), some.size, staging.flat, self._stream)
                self._finish()

    def _ready(self, units: int) -> Staging:
        """Staging, and this pool's stream behind whatever the engine has launched. Raises Refused for a pool that was closed."""
        if self._closed:
            raise Refused("the pool was closed. Try: another one")
        if self._staging is None:
            self._staging = Staging(self.driver, self.plan.unit_bytes, self._staging_bytes)
        if units:
            self.follow(self._stream)
        return self._staging

    def follow(self, stream: Stream) -> None:
        """What is put on `stream` from now on comes after what the engine has launched. Raises Refused while its stream is captured."""
        engine = self.current()
        if self.driver.is_captured(engine):
            raise Refused(CAPTURED)
        self.driver.wait(stream, self.driver.record(engine))

    def _finish(self) -> None:
        finished(self.driver, self.driver.record(self._stream), time.monotonic() + WORK_S_MAX)

    # ---- bytes by offset --------------------------------------------------------------------------------------------------------------

    def peek(self, at: int, size: int) -> np.ndarray:
        """Uint8 [size] of the pool from byte `at`, behind whatever the engine has launched: for proofs, not for captures. Raises DeviceLost, TimedOut."""
        out = np.empty(size, np.uint8)
        for first, count, staging in self._pieces(size):
            self.driver.copy(staging.pinned, self.address + at + first, count, self._stream)
            self._finish()
            out[first : first + count] = staging.bytes[:count]
        return out

    def poke(self, at: int, values: np.ndarray) -> None:
        """The reverse: there when this returns."""
        for first, count, staging in self._pieces(values.size):
            staging.bytes[:count] = values[first : first + count]
            self.driver.copy(self.address + at + first, staging.pinned, count, self._stream)
            self._finish()

    def _pieces(self, size: int) -> Iterator[tuple[int, int, Staging]]:
        with self._lock:
            staging = self._ready(size)
            for first in range(0, size, staging.bytes.size):
                yield first, min(staging.bytes.size, size - first), staging

    # ---- words --------------------------------------------------------------------------------------------------------------------

    def publish(self, word: memoryview, value: int) -> None:
        """A plain store: whoever only reads a pool has nothing in flight that it would wait for."""
        (word if word.format == "Q" else word.cast("B").cast("Q"))[0] = value

    def export(self) -> list[int]:
        raise Refused("memory that was opened can't be exported again: only its own process can. Try: salvage, which makes a host pool of it")

    def settle(self) -> None:
        """Nothing that was put on this pool's own stream is on its way when this returns. Raises TimedOut, DeviceLost."""
        settled(self.driver, self._stream)

    def close(self) -> None:
        """Free what is this file's own. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._tables.free()
            if self._staging is not None:
                self._staging.free()


def page_of(start: int) -> memoryview:
    """The writable page of this process that begins there. It keeps nothing mapped."""
    return memoryview((ctypes.c_ubyte * PAGE_BYTES).from_address(start)).cast("B")
