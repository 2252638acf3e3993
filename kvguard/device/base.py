"""What every device does: memory of a KV pool, mapped here, from which slots are gathered and into which they are scattered.

Knows: layouts (format/layout.py), blocks and slots. Must not know: sequences, streams, peers.
Canonical bytes: what capture writes and scatter reads does not depend on the pool's strides: token-major, within a token region by region in the layout's
order, within a region in the order of its inner dimensions. A whole block of a pool whose tokens aren't addressable is the region-major copy of that block.

Made so that CUDA fits: a capture may complete later (`poll`), the completion word is published by the device, an engine-side capture fills a ring.
Invariants of every implementation (tests/contracts/test_device.py): capture then scatter into an equal pool reproduces the bytes; nothing outside the named
slots is read or written; a descriptor that doesn't fit the layout is refused before it is mapped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from kvguard.format.layout import Layout


class Pool(Protocol):
    """One rank's KV pool, mapped in this process."""

    layout: Layout

    def capture(self, blocks, starts, counts, out: memoryview) -> int:
        """Gather slots [start, start + count) of each block into `out`, in order; returns the bytes written. Columns are int sequences or int64 arrays."""

    def capture_blocks(self, blocks, out: memoryview) -> int:
        """Gather whole blocks: prefill in bulk, and layouts whose tokens aren't addressable."""

    def scatter(self, blocks, starts, counts, source: memoryview) -> None:
        """The reverse of capture: the engine's process pulls with it, the daemon never calls it."""

    def scatter_blocks(self, blocks, source: memoryview) -> None: ...

    def publish(self, word: memoryview, value: int) -> None:
        """Write `value` to the 64-bit word once all KV writes launched before this call are complete: at once on a CPU, in stream order on a GPU.

        Not at all while the caller's stream is captured into a CUDA graph: nothing runs there.
        """

    def export(self) -> list[int]:
        """Descriptors that another process can open the pool with (Device.open)."""

    def close(self) -> None:
        """Unmap. The memory lives while another process maps it. On a GPU the caller's current stream is waited for, others of its own are not."""


class Packing(Pool, Protocol):
    """An engine's pool that packs its steps for its daemon. Asked for by name: a host pool has neither."""

    def wrote(self, blocks, starts=None, counts=None) -> None:
        """The slots that this step writes, all of them, after it was launched. Returns at once; raises Refused for pieces outside the pool, and while the
        caller's stream is captured into a CUDA graph: it comes after the replay."""

    def join(self, descriptors: list[int]) -> None:
        """What came with Attached: the ring to pack into. Owned here. Never raises."""


class Salvageable(Pool, Protocol):
    """A daemon's view of memory that goes with its process's death. Asked for by name: a host pool has nothing of this.

    `gpu`: where it is, so that pools of one GPU are read by one thread, beside the daemon's own. `copied_bytes`: rises while copies go on.
    """

    gpu: str
    copied_bytes: int

    def welcome(self) -> list[int]:
        """Descriptors that travel with Attached; the caller's to close."""

    def salvage(self, sequences, salvage_ms_max: int) -> tuple[Pool, int]:
        """A host pool that holds the block lists `sequences`, whole ones in order, as many as come in time, and how many; this view is closed.

        Memory that outlives its engine (Device.lend) is salvaged where it is: this very view, and all of them.
        """


class Device(Protocol):
    kind: str  # host | cuda | rehearsal

    def allocate(self, layout: Layout) -> Pool: ...

    def lend(self, layout: Layout, gpu: str = "") -> list[int]:
        """Descriptors of new memory for a pool of another process, which outlives that process while anybody has it open; the caller's to close.

        `gpu`: the UUID of the one that it is to be on. What is in it is nobody's business yet. Raises BadConfig, Refused.
        """

    def open(self, layout: Layout, descriptors: list[int]) -> Pool:
        """Map another process's pool. Raises Refused where the descriptors don't fit the layout. Takes ownership of the descriptors."""

    def where(self, descriptors: Sequence[int]) -> str:
        """The UUID of the GPU that their memory is on, "" for host memory: opening it may take long. They stay the caller's. Raises Refused for another's."""

    def lends_on(self, gpu: str = "") -> str:
        """The UUID of the GPU on which `lend` makes memory, "" for host memory. Raises BadConfig, Refused where it isn't here."""
