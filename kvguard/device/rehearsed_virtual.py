"""Virtual memory management played by host memory: physical memory is a memfd, addresses are a mapping of nothing into which memfds are mapped.

Knows: memfds, mmap of the C library. Must not know: pools, who asks.
Invariants: as CUDA: sizes and addresses are multiples of the granularity, memory that was not made shareable gives no descriptor, addresses are not given back
while something is mapped there, memory lives as long as a mapping, a handle or a descriptor of it.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass

from kvguard.device.driver import Chunk
from kvguard.errors import Refused

GRANULARITY = 64 << 10
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_FIXED, _NO_RESERVE, _PROT_NONE = 0x10, 0x4000, 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


@dataclass
class _Memory:
    """`file`: open while `users` (handles and mappings) are more than none."""

    file: int
    size: int
    shareable: bool
    users: int = 0


class RehearsedVirtual:
    """See driver.Virtual. `refuse_lost`: raises DeviceLost once the GPU had a fault."""

    granularity = GRANULARITY

    def __init__(self, refuse_lost: Callable[[], None] = lambda: None) -> None:
        self._refuse_lost = refuse_lost
        self._lock = threading.Lock()
        self._handles: dict[int, _Memory] = {}
        self._mapped: dict[int, tuple[int, _Memory]] = {}  # address -> size, memory
        self._reserved: dict[int, int] = {}
        self._next = 1

    @property
    def reserved_bytes(self) -> int:
        """All that is not given back yet."""
        return sum(self._reserved.values())

    @property
    def handles(self) -> int:
        """How many are held."""
        return len(self._handles)

    # ---- memory -------------------------------------------------------------------------------------------------------------------

    def create(self, size: int, shareable: bool = True) -> int:
        self._refuse_lost()
        _refuse_odd(size)
        file = os.memfd_create("kvguard-rehearsal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(file, size)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
        return self._handle(_Memory(file, size, shareable))

    def _handle(self, memory: _Memory) -> int:
        with self._lock:
            memory.users += 1
            number, self._next = self._next, self._next + 1
            self._handles[number] = memory
            return number

    def retained(self, address: int) -> int:
        self._refuse_lost()
        found = self._at(address)
        if found is None:
            raise Refused(f"nothing is mapped at {address:#x}. Try: an address of the pool")
        return self._handle(found[1][1])

    def release(self, handle: int) -> None:
        with self._lock:
            _let_go(self._handles.pop(handle))

    def descriptor_of(self, handle: int) -> int:
        self._refuse_lost()
        memory = self._handles[handle]
        if not memory.shareable:
            raise Refused("the memory was not made to be shared by descriptor. Try: memory that was")
        return os.dup(memory.file)

    def imported(self, descriptor: int) -> int:
        self._refuse_lost()
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            raise Refused(f"the descriptor is no memory: {error}. Try: Pool.export()") from error
        if seals & _SEALS != _SEALS:
            raise Refused("the descriptor is no memory of this device. Try: Pool.export()")
        return self._handle(_Memory(os.dup(descriptor), os.fstat(descriptor).st_size, True))

    # ---- addresses ----------------------------------------------------------------------------------------------------------------

    def reserve(self, size: int) -> int:
        self._refuse_lost()
        _refuse_odd(size)
        address = _map(None, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE, -1)
        with self._lock:
            self._reserved[address] = size
        return address

    def unreserve(self, address: int, size: int) -> None:
        self._refuse_lost()
        with self._lock:
            assert self._reserved[address] == size, "addresses are given back as they were reserved"
            assert not any(address <= at < address + size for at in self._mapped), "something is still mapped there"
            del self._reserved[address]
        _libc.munmap(address, size)

    def map(self, address: int, size: int, handle: int) -> None:
        self._refuse_lost()
        memory = self._handles[handle]
        _refuse_odd(size)
        if size > memory.size:
            raise Refused(f"{size} bytes can't be mapped of memory that has {memory.size}. Try: Pool.export()")
        with self._lock:
            assert any(at <= address and address + size <= at + whole for at, whole in self._reserved.items()), "addresses are reserved first"
            assert self._at(address) is None and self._at(address + size - 1) is None, "something is mapped there"
            _map(address, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED, memory.file)
            memory.users += 1
            self._mapped[address] = size, memory

    def unmap(self, address: int, size: int) -> None:
        self._refuse_lost()
        with self._lock:
            whole, memory = self._mapped.pop(address)
            assert whole == size, "what was mapped in one piece is unmapped in one"
            _map(address, size, _PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE | _FIXED, -1)
            _let_go(memory)

    def chunk_of(self, address: int) -> Chunk | None:
        found = self._at(address)
        return None if found is None else Chunk(found[0], found[1][0], found[1][1].shareable)

    def _at(self, address: int) -> tuple[int, tuple[int, _Memory]] | None:
        return next(((at, one) for at, one in list(self._mapped.items()) if at <= address < at + one[0]), None)


def _let_go(memory: _Memory) -> None:
    memory.users -= 1
    if not memory.users:
        os.close(memory.file)


def _refuse_odd(size: int) -> None:
    if size <= 0 or size % GRANULARITY:
        raise Refused(f"{size} bytes are no multiple of {GRANULARITY}. Try: sizes in whole granules")


def _map(address: int | None, size: int, access: int, flags: int, file: int) -> int:
    found = _libc.mmap(address, size, access, flags, file, 0)
    if found is None or found == ctypes.c_void_p(-1).value:
        raise Refused(f"{size} bytes can't be mapped: {os.strerror(ctypes.get_errno())}. Try: less memory")
    return found
