"""A GPU's driver played by host memory: for tests, drills and dry runs of the CUDA device where there is no GPU.

Knows: memfds, numpy, the kernels' Python twin. Must not know: pools, layouts, why.
Invariants: kernels do what twin.py says, which the tests compare with the source; everything put on streams happens in the order in which it was put there, at
once or, with `held`, when `run` is called; any thread may call; a handle opens while its exporter lives and never after, a mapping lives until it is closed:
as on CUDA. Says nothing about speed.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from kvguard.device.driver import HANDLE_BYTES, Allocation
from kvguard.device.kernels import twin
from kvguard.device.kernels.plan import Launch
from kvguard.device.rehearsed_virtual import RehearsedVirtual
from kvguard.errors import DeviceLost, Refused


@dataclass
class _Mapped:
    """An "allocation": `file` is what another process opens."""

    memory: mmap.mmap
    size: int
    file: int
    exportable: bool = True


class Rehearsal:
    """`held`: work waits for run(). `lose()`: as if the GPU had a fault. `captured`: the engine's stream is captured into a graph."""

    uuid = "GPU-rehearsal"
    name = "rehearsal (host memory)"
    writes_words = True

    def __init__(self, held: bool = False) -> None:
        self.held, self.captured = held, False
        self._lost = ""
        self._mapped: dict[int, _Mapped] = {}
        self._queue: deque[Callable[[], None]] = deque()
        self._lock = threading.RLock()  # a driver may be called from any thread
        self.ends: list[bool] = []  # of each event, whether it was reached
        self.launched: list[str] = []
        self.virtual = RehearsedVirtual(self._refuse_lost)
        self.held_pages: dict[int, range] = {}  # of host memory that is registered, by its address

    def lose(self, why: str) -> None:
        self._lost = why

    def run(self) -> None:
        """Whatever waits, in order."""
        with self._lock:
            while self._queue:
                self.step()

    def step(self) -> None:
        """The next thing that waits, alone."""
        self._queue.popleft()()

    def _refuse_lost(self) -> None:
        if self._lost:
            raise DeviceLost(f"{self._lost}. Try: restart this process once the GPU is well")

    def _put(self, work: Callable[[], None]) -> None:
        self._refuse_lost()
        with self._lock:
            self._queue.append(work)
            if not self.held:
                self.run()

    def ready(self) -> None:
        self._refuse_lost()

    # ---- memory -------------------------------------------------------------------------------------------------------------------

    def allocate(self, size: int, exportable: bool = True) -> int:
        self._refuse_lost()
        file = os.memfd_create("kvguard-rehearsal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return self._map(file, size, exportable)

    def _map(self, file: int, size: int, exportable: bool) -> int:
        memory = mmap.mmap(file, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._mapped[address] = _Mapped(memory, size, file, exportable)
        return address

    def free(self, address: int) -> None:
        self._refuse_lost()
        os.close(self._mapped.pop(address).file)

    def allocation_of(self, address: int) -> Allocation:
        for base, one in list(self._mapped.items()):
            if base <= address < base + one.size:
                return Allocation(base, one.size, one.exportable)
        chunk = self.virtual.chunk_of(address)
        if chunk is not None:
            return Allocation(chunk.address, chunk.size, False)
        raise Refused(f"no allocation holds the address {address:#x}. Try: a pointer of this device")

    def handle_of(self, address: int) -> bytes:
        self._refuse_lost()
        one = self._mapped[address]
        return f"{os.getpid()} {one.file} {os.fstat(one.file).st_ino} {one.size}".encode().ljust(HANDLE_BYTES)

    def open_handle(self, handle: bytes) -> int:
        self._refuse_lost()
        pid, number, inode, size = (int(part) for part in handle.split())
        if pid == os.getpid():
            raise Refused("a handle can't be opened in the process that exported it. Try: the pool itself")
        try:
            file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Refused(f"the exporter of the handle is gone ({error.strerror}). Try: open it while that process lives") from error
        if os.fstat(file).st_ino != inode:
            os.close(file)
            raise Refused("the exporter has closed what the handle names. Try: open it while that process holds it")
        return self._map(file, size, False)

    def clear(self, address: int, size: int) -> None:
        self._refuse_lost()
        ctypes.memset(address, 0, size)

    def close_handle(self, address: int) -> None:
        self.free(address)

    def pinned(self, size: int) -> tuple[memoryview, int]:
        memory = memoryview(mmap.mmap(-1, max(size, 1)))
        return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory))

    def registered(self, memory: memoryview) -> int:
        self._refuse_lost()
        address = np.frombuffer(memory, np.uint8).ctypes.data
        pages = range(address // mmap.PAGESIZE, -(-(address + memory.nbytes) // mmap.PAGESIZE))
        if any(one.start < pages.stop and pages.start < one.stop for one in self.held_pages.values()):  # whole pages are pinned
            raise Refused("that host memory is registered already. Try: unregister it first")
        self.held_pages[address] = pages
        return address

    def unregistered(self, memory: memoryview) -> None:
        del self.held_pages[np.frombuffer(memory, np.uint8).ctypes.data]

    # ---- order --------------------------------------------------------------------------------------------------------------------

    def stream(self, urgent: bool) -> str:
        return "urgent" if urgent else "background"

    def current(self) -> str:
        return "current"

    def is_captured(self, stream: str) -> bool:
        self._refuse_lost()
        return self.captured and stream == self.current()

    def record(self, stream: str) -> int:
        assert not self.is_captured(stream), "what is recorded on a captured stream is never reached, and whoever waits for it is captured, too"
        with self._lock:
            number = len(self.ends)
            self.ends.append(False)
        self._put(lambda: self.ends.__setitem__(number, True))
        return number

    def wait(self, stream: str, event: int) -> None:
        """One queue for all streams keeps every such promise."""

    def is_done(self, event: int) -> bool:
        self._refuse_lost()
        return self.ends[event]

    def synchronise(self, stream: str) -> None:
        self.run()
        self._put(lambda: None)

    # ---- work ---------------------------------------------------------------------------------------------------------------------

    def copy(self, to: int, at: int, size: int, stream: str) -> None:
        self._put(lambda: ctypes.memmove(to, at, size))

    def copy_rows(self, to: int, to_pitch: int, at: int, at_pitch: int, width: int, rows: int, stream: str) -> None:
        def carry() -> None:
            for row in range(rows):
                ctypes.memmove(to + row * to_pitch, at + row * at_pitch, width)

        self._put(carry)

    def compile(self) -> None:
        """The twin needs none."""

    def launch(self, launch: Launch, pool: int, flat: int, slots: int, places: int, runs: int, stream: str) -> None:
        self._put(lambda: self._run_kernel(launch, pool, flat, slots, places, runs))

    def _run_kernel(self, launch: Launch, pool: int, flat: int, slots: int, places: int, runs: int) -> None:
        self.launched.append(launch.kernel)
        size = launch.run_units * launch.width
        tokens = launch.skip + np.arange(launch.tokens, dtype=np.int64)
        of_slots = _int64(slots, launch.skip + launch.tokens)[tokens]
        of_places = _int64(places, launch.skip + launch.tokens)[tokens, None] if places else None
        table = _int64(runs, 2 * (launch.first_run + launch.run_count)).reshape(-1, 2)[launch.first_run :]
        in_pool = twin.in_pool(launch, table[None, :, 0], of_slots[:, None])
        in_flat = np.broadcast_to(twin.in_flat(launch, table[None, :, 1], tokens[:, None], of_places), in_pool.shape)
        good = np.broadcast_to(twin.is_copied(launch, of_slots)[:, None], in_pool.shape)
        gathers = launch.kernel.startswith("kvg_gather")
        for at, there in zip((pool + in_pool[good]).tolist(), (flat + in_flat[good]).tolist(), strict=True):
            ctypes.memmove(there, at, size) if gathers else ctypes.memmove(at, there, size)

    def write_word(self, address: int, value: int, stream: str) -> None:
        self._put(lambda: _int64(address, 1).view(np.uint64).__setitem__(0, value))


def _int64(address: int, count: int) -> np.ndarray:
    """Int64 [count] at an address of this process."""
    return np.frombuffer((ctypes.c_int64 * count).from_address(address), np.int64)
