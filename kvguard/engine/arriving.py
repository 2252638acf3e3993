"""Verified pages on their way into a pool on a GPU, which reads them where they are: one kernel per layer, an event behind each.

Knows: pages, a GPU's pool, places and slots. Must not know: tables, why they are pulled, the daemon.

Invariants
- Nothing is launched before the sums of all pages hold, and nothing counts before `finish`: every layer is there, and every page kept its generation while
  it was read. A stream may run ahead behind `wait(layer)`; what it computes is thrown away where `finish` raises.
- All or nothing: a layer that fails, or is late, fails the whole.
- The arena stays registered and mapped until the last kernel has read it; where the GPU hangs, until this process ends.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from kvguard.device.driver import Stream
from kvguard.device.gpu_pool import GpuPool
from kvguard.device.host import slots_of, slots_of_blocks
from kvguard.device.layered import LayeredRestore
from kvguard.errors import Refused, Stale, TimedOut
from kvguard.format.pages import BATCH_BYTES, PageReader

SPARSE_MAX = 4  # registering pins whole pages of memory: of a range no more than so many times what is wanted from it


class Arriving:
    """Begun when made; a context. As pull.pull_pages takes them: pages `blocks`, `generations`, the first `counts` tokens each, into blocks `here`, by `due`.

    Raises Stale, BadFrame; TimedOut; Refused where the arena can't be read in place (nothing is on its way then): pull it in batches.
    """

    def __init__(
        self, pool: GpuPool, reader: PageReader, blocks: Sequence[int], generations: Sequence[int], counts: Sequence[int], here: Sequence[int], due: float,
    ) -> None:  # fmt: skip
        self._reader, self._pages = reader, list(zip(blocks, generations, strict=True))
        self._restore: LayeredRestore | None = None
        start, memory = reader.around(blocks)
        shape = reader.shape
        self.bytes = sum(counts) * shape.token_bytes if shape.addressable else len(blocks) * shape.block_bytes
        if len(memory) > max(SPARSE_MAX * self.bytes, BATCH_BYTES):
            raise Refused(f"{len(blocks)} pages lie scattered over {len(memory)} bytes of the arena. Try: in batches")
        slots, places = _columns(pool, reader, blocks, counts, here, start)
        self._verify(counts, due)
        self._restore = LayeredRestore(pool, memory, places, slots, due - time.monotonic())

    def _verify(self, counts: Sequence[int], due: float) -> None:
        batch = max(1, BATCH_BYTES // self._reader.shape.block_bytes)
        for n, ((block, generation), count) in enumerate(zip(self._pages, counts, strict=True)):
            if n % batch == 0 and time.monotonic() > due:
                raise TimedOut("the pages weren't verified by the deadline. Try: compute it from its ids")
            self._reader.page(block, generation, count)

    def __enter__(self) -> Arriving:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def wait(self, layer: int, stream: Stream | None = None) -> None:
        """What `stream` (by default the one that the pool says the engine launches on) runs from now on finds the layer in the pool. Returns at once.

        Raises Refused while that stream is captured into a graph."""
        assert self._restore is not None, "closed"
        self._restore.wait(layer, stream)

    def finish(self) -> int:
        """The bytes that are there now, all of them. Raises TimedOut, DeviceLost, Stale: then nothing of them may be used."""
        assert self._restore is not None, "closed"
        self._restore.finish()
        for block, generation in self._pages:
            if not self._reader.holds(block, generation):
                raise Stale(f"page {block} was given up while it was copied")
        return self.bytes

    def close(self) -> None:
        """Waits for what is on its way. Idempotent. Raises TimedOut where the GPU hangs: the arena stays as it is, and the pool is lost; DeviceLost."""
        restore, self._restore = self._restore, None
        if restore is not None:
            restore.close()


def _columns(pool: GpuPool, reader: PageReader, blocks, counts, here, start: int) -> tuple[np.ndarray, np.ndarray]:
    """Int64 slots of the pool, and where in the range that begins at `start` each one's bytes are. Raises Refused for blocks that the pool hasn't."""
    shape, layout = reader.shape, pool.layout
    if not shape.addressable:
        return pool.plan.slots(*slots_of_blocks(layout, list(here))), np.array([reader.place(block) - start for block in blocks], np.int64)
    slots = pool.plan.slots(*slots_of(layout, list(here), [0] * len(here), list(counts)))
    within = np.concatenate([np.arange(count, dtype=np.int64) for count in counts])
    places = np.repeat(np.array([reader.place(block) - start for block in blocks], np.int64), list(counts))
    return slots, places + within * shape.token_bytes
