"""What is asked of a GPU's driver, in a few calls: the seam between the CUDA device (cuda.py and its neighbours) and cupy (cupy_driver.py, cuda_virtual.py).

Knows: addresses, streams, events, handles. Must not know: layouts, pools, cupy.
Invariants: nothing here waits except `synchronise`; what was put on one stream happens in order; an error of the GPU itself is DeviceLost and final for this
process, any other Refused or BadConfig, with a `Try:`. The rehearsal (rehearsal.py, rehearsed_virtual.py) keeps to the same without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from kvguard.device.kernels.plan import Launch

Stream = Any  # what a driver gave; opaque to everyone else
Event = Any
HANDLE_BYTES = 64


@dataclass(frozen=True, slots=True)
class Allocation:
    """`address` of the whole allocation that a pointer lies in, `size` in bytes, `exportable` by handle. Of virtual memory: of the chunk, which is not."""

    address: int
    size: int
    exportable: bool


@dataclass(frozen=True, slots=True)
class Chunk:
    """Memory of virtual memory management that is mapped in one piece: `address`, `size` in bytes; `shareable` by descriptor."""

    address: int
    size: int
    shareable: bool


class Virtual(Protocol):
    """Addresses and the memory behind them, apart (CUDA's virtual memory management): the memory can be handed to another process as a descriptor.

    Memory lives while it is mapped anywhere, a handle to it is held, or a descriptor of it is open: whoever made it may be gone.
    """

    granularity: int  # bytes that sizes and addresses are multiples of

    def chunk_of(self, address: int) -> Chunk | None:
        """What is mapped there; None where it is memory of another kind, or nothing."""

    def create(self, size: int) -> int:
        """A handle to memory that can be shared by descriptor; what is in it is nobody's business. Raises Refused where there isn't enough."""

    def retained(self, address: int) -> int:
        """A handle to the memory that is mapped there."""

    def release(self, handle: int) -> None: ...

    def descriptor_of(self, handle: int) -> int:
        """A descriptor for another process; the caller's to close. Raises Refused for memory that was not made to be shared so."""

    def imported(self, descriptor: int) -> int:
        """A handle to the memory behind a descriptor, which stays the caller's. Raises Refused for anything else."""

    def reserve(self, size: int) -> int:
        """Addresses with nothing behind them."""

    def unreserve(self, address: int, size: int) -> None: ...

    def map(self, address: int, size: int, handle: int) -> None:
        """From the memory's beginning, readable and writable. Raises Refused for more bytes than it has."""

    def unmap(self, address: int, size: int) -> None:
        """Of one `map`; nothing may be using it any more: nothing is waited for here."""


class Driver(Protocol):
    """One GPU of this process. Addresses are ints, as the device takes them; a host address that was given out by `pinned` or `registered` is one, too."""

    uuid: str
    name: str
    writes_words: bool  # whether a stream can write a 64-bit word without a kernel
    virtual: Virtual

    def ready(self) -> None:
        """Take now what the first use of the GPU would take of its memory: a context. Raises Refused, DeviceLost."""

    # ---- memory -------------------------------------------------------------------------------------------------------------------

    def allocate(self, size: int) -> int:
        """Device memory, zeroed, aligned to 256 bytes, that can be exported by handle. Raises Refused where there isn't enough."""

    def free(self, address: int) -> None: ...

    def clear(self, address: int, size: int) -> None:
        """Zeros, there when this returns; nothing else that runs is waited for."""

    def allocation_of(self, address: int) -> Allocation: ...

    def handle_of(self, address: int) -> bytes:
        """HANDLE_BYTES for another process; `address`: of a whole allocation."""

    def open_handle(self, handle: bytes) -> int:
        """Another process's allocation, mapped here: its address. Raises Refused for this process's own, or one that is gone."""

    def close_handle(self, address: int) -> None: ...

    def pinned(self, size: int) -> tuple[memoryview, int]:
        """Host memory that copies reach without the CPU, and its device address; it lives as long as the view does."""

    def registered(self, memory: memoryview) -> int:
        """Device address of host memory that is mapped anyway (a commit table, an arena); until `unregistered`."""

    def unregistered(self, memory: memoryview) -> None: ...

    # ---- order --------------------------------------------------------------------------------------------------------------------

    def stream(self, urgent: bool) -> Stream:
        """A new stream, for as long as somebody holds it; not `urgent`: whatever else runs goes first."""

    def current(self) -> Stream:
        """The stream on which the caller's framework launches now."""

    def is_captured(self, stream: Stream) -> bool:
        """Whether what is launched there now becomes part of a CUDA graph instead of running."""

    def record(self, stream: Stream) -> Event: ...

    def wait(self, stream: Stream, event: Event) -> None:
        """Nothing put on `stream` from now on begins before `event`; the caller doesn't wait."""

    def is_done(self, event: Event) -> bool:
        """Raises DeviceLost where the GPU had a fault meanwhile."""

    def synchronise(self, stream: Stream) -> None: ...

    # ---- work ---------------------------------------------------------------------------------------------------------------------

    def copy(self, to: int, at: int, size: int, stream: Stream) -> None:
        """Between any two addresses, by a copy engine."""

    def copy_rows(self, to: int, to_pitch: int, at: int, at_pitch: int, width: int, rows: int, stream: Stream) -> None: ...

    def compile(self) -> None:
        """Do now what the first launch would do: compile the kernels."""

    def launch(self, launch: Launch, pool: int, flat: int, slots: int, places: int, runs: int, stream: Stream) -> None:
        """One kernel of pool.cu. `slots`, `places` (0: none), `flat`: of the whole columns; what the launch skips is added here."""

    def write_word(self, address: int, value: int, stream: Stream) -> None:
        """A 64-bit store that the host sees once everything before it on `stream` is done."""
