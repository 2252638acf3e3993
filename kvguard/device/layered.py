"""A restore that a forward pass can run after: replica pages in mapped host memory, scattered layer by layer, with an event behind each layer.

Knows: a pool's kernels, host memory that the GPU reads across the link. Must not know: what the pages are worth (who calls has verified them), sequences.
Invariants: layer n is in the pool once its event is reached, and nothing waits for a later one; the host memory stays registered until every layer is there or
the restore was given up, or failed half way; a restore that isn't there by its deadline is given up, and says so: what it was for is recomputed. Of a GPU that
hangs nothing is waited for without a bound: what it may still touch is kept for good, and the pool is lost.
"""

from __future__ import annotations

import time

import numpy as np

from kvguard.device.driver import Event, Stream
from kvguard.device.gpu_pool import ALIGNMENT, CAPTURED, GpuPool
from kvguard.device.paced import finished, settled, strand
from kvguard.errors import KvguardError, Refused, TimedOut


class LayeredRestore:
    """Begun when made; a context. `memory`: mapped pages (an arena), `places`: int64 [n], where each slot's canonical bytes begin in it; `slots`: their slots.

    `wait(layer, stream)`: that stream goes on behind the layer; `finish()`: all layers, by the deadline. Raises Refused for places outside `memory`.
    """

    def __init__(self, pool: GpuPool, memory: memoryview, places: np.ndarray, slots: np.ndarray, deadline_s: float, source: int = 0) -> None:
        """`source`: the device's address of `memory` where the caller has registered it, which takes longer than a restore; 0: it is registered here."""
        places, slots = np.asarray(places, np.int64), np.asarray(slots, np.int64)
        unit = pool.plan.unit_bytes
        if places.size != slots.size or (places.size and (places.min() < 0 or places.max() + unit > memory.nbytes)):
            raise Refused(f"{slots.size} slots, {places.size} places in {memory.nbytes} bytes of pages. Try: places from format/pages.py")
        if places.size and np.bitwise_or.reduce(places) % _alignment(pool):
            raise Refused(f"places must be multiples of {_alignment(pool)} bytes for this layout. Try: pages as format/pages.py lays them out")
        self._pool, self._driver, self._memory = pool, pool.driver, memory
        self._deadline = time.monotonic() + deadline_s
        self._stream: Stream = self._driver.stream(urgent=True)
        self._host, pinned = self._driver.pinned(2 * 8 * max(1, slots.size))  # first: it goes by itself where what follows fails
        self._columns = self._driver.allocate(2 * 8 * max(1, slots.size) + ALIGNMENT)
        np.frombuffer(self._host, np.int64)[: 2 * slots.size] = np.concatenate([slots, places])
        self._registered = False
        self._events: list[Event] = []
        try:
            if not source:
                source, self._registered = self._driver.registered(memory), True
            self._launch(slots, source, pinned)
        except BaseException:  # nothing may go on reading what the caller lets go now
            self.close()
            raise

    def _launch(self, slots: np.ndarray, source: int, pinned: int) -> None:
        pool = self._pool
        pool.follow(self._stream)
        self._driver.copy(self._columns, pinned, 16 * slots.size, self._stream)
        for layer in range(pool.plan.layers):
            if slots.size:
                pool.launch(False, self._columns, slots.size, source, self._stream, places=self._columns + 8 * slots.size, layer=layer)
            self._events.append(self._driver.record(self._stream))

    def __enter__(self) -> LayeredRestore:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def wait(self, layer: int, stream: Stream | None = None) -> None:
        """What `stream` (the engine's own) runs from now on finds the layer in the pool; the caller doesn't wait. Raises Refused while it is captured."""
        behind = self._pool.current() if stream is None else stream
        if self._driver.is_captured(behind):  # an event from outside would end the capture
            raise Refused(CAPTURED)
        self._driver.wait(behind, self._events[layer])

    def is_there(self, layer: int) -> bool:
        return self._driver.is_done(self._events[layer])

    def finish(self) -> None:
        """Every layer is there when this returns. Raises TimedOut at the deadline, DeviceLost."""
        try:
            finished(self._driver, self._events[-1], self._deadline)
        except TimedOut:
            raise TimedOut("the restore isn't there by its deadline. Try: compute it from its ids") from None

    def close(self) -> None:
        """Waits for what is on its way, so that nothing writes into the pool, or reads the pages, afterwards. Idempotent.

        Raises TimedOut where the GPU hangs: it may still do both, so the pages must stay mapped and registered, and nothing of the pool is committed any more.
        """
        if self._memory is None:
            return
        memory, self._memory = self._memory, None
        try:
            settled(self._driver, self._stream)
        except TimedOut as error:
            strand(self, memory)
            self._pool.lost = self._pool.lost or str(error)
            self._driver.wait(self._pool.current(), self._driver.record(self._stream))  # should it go on, what is launched from now on comes after that
            raise
        except KvguardError:  # nothing runs there any more
            self._unregister(memory)
            raise
        self._unregister(memory)
        self._driver.free(self._columns)

    def _unregister(self, memory: memoryview) -> None:
        if self._registered:
            self._registered = False
            self._driver.unregistered(memory)


def _alignment(pool: GpuPool) -> int:
    """What places must be multiples of: as wide as the kernels' accesses."""
    return max(group.width for group in pool.plan.groups)
