"""Memory that another process writes into: pages on this side, who owns which on that side, and what becomes of it when the link is over.

Knows: mappings, pages, frame numbers. Must not know: NIXL, links, what lands.
Invariants: a page has at most one frame at a time; a frame's number is its pages' generation and is never used twice; the address range of a zone is given
to nobody else once a peer has known it (for as long as was said, and at most QUARANTINE_MAX of them), so that a write that comes late faults at the writer
instead of landing in memory that belongs to somebody else by then.
"""

from __future__ import annotations

import bisect
import ctypes
import mmap
import time
import weakref
from collections import deque
from itertools import count

import numpy as np

from kvguard.errors import BadFrame

PAGE_BYTES = 4096
LARGE_BYTES = 2 << 20
LENT_BYTES_MIN = 32 << 10
QUARANTINE_MAX = 4096  # zones; without their memory, so this bounds addresses alone (128 GiB of 128 TiB)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
MAP_FIXED, MAP_NORESERVE, PROT_NONE, MADV_HUGEPAGE = 0x10, 0x4000, 0, 14
FAILED = ctypes.c_void_p(-1).value
_quarantined: deque[tuple[int, int, int]] = deque()  # address, bytes, until when (0: for ever): a process's, not a transport's, because addresses are


def pages_of(size: int) -> int:
    return -(-size // PAGE_BYTES)


class Zone:
    """`size` bytes at `address`, as an array of bytes in `bytes`. Large ones are of large pages where the kernel has some: half the work of writing there."""

    def __init__(self, size: int):
        self.size, spare = pages_of(size) * PAGE_BYTES, 0
        if self.size >= LARGE_BYTES:
            self.size, spare = -(-self.size // LARGE_BYTES) * LARGE_BYTES, LARGE_BYTES - PAGE_BYTES
        start = _map(0, self.size + spare, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.address = -(-start // LARGE_BYTES) * LARGE_BYTES if spare else start
        for at, end in ((start, self.address), (self.address + self.size, start + self.size + spare)):
            if end > at:
                _libc.munmap(at, end - at)
        if spare:
            _libc.madvise(self.address, self.size, MADV_HUGEPAGE)  # refused where the kernel has none: then they are small
        self.bytes = np.frombuffer((ctypes.c_uint8 * self.size).from_address(self.address), np.uint8)

    def close(self) -> None:
        """Unmap: only where no peer has known the address, and no view is left."""
        del self.bytes
        _libc.munmap(self.address, self.size)

    def quarantine(self, until_ns: int = 0) -> None:
        """Give the memory back and keep the addresses, unusable, until then (time.monotonic_ns(); 0: for as long as the process lives)."""
        del self.bytes
        _map(self.address, self.size, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED)
        _quarantined.append((self.address, self.size, until_ns))
        while len(_quarantined) > QUARANTINE_MAX:
            _libc.munmap(*_quarantined.popleft()[:2])


def _map(address: int, size: int, access: int, flags: int) -> int:
    found = _libc.mmap(address, size, access, flags, -1, 0)
    if found == FAILED:
        raise OSError(ctypes.get_errno(), f"{size} bytes can't be mapped")
    return found


def quarantined() -> list[tuple[int, int]]:
    """(address, bytes) of what is held back, the oldest first."""
    return [held[:2] for held in _quarantined]


def release(now_ns: int) -> None:
    """Let the addresses go whose time is over."""
    for held in [held for held in _quarantined if 0 < held[2] <= now_ns]:
        _quarantined.remove(held)
        _libc.munmap(*held[:2])


class Extents:
    """The writer's side: which pages of the peer's zone are free. First fit, so that few pages stay in the processor's cache."""

    def __init__(self, pages: int):
        self._free = [(0, pages)]  # (first, count), sorted, never touching
        self._taken: dict[int, tuple[int, int]] = {}  # by frame number
        self.pages = pages

    def take(self, number: int, count: int, below: int | None = None) -> int | None:
        """The first of `count` pages in a row for frame `number`, all of them `below` a page; None when there are none."""
        end = self.pages if below is None else below
        for index, (first, free) in enumerate(self._free):
            if first + count > end:
                return None
            if free >= count:
                if free == count:
                    del self._free[index]
                else:
                    self._free[index] = (first + count, free - count)
                self._taken[number] = (first, count)
                return first
        return None

    def give_back(self, number: int) -> None:
        """Raises BadFrame for a frame that has no pages: said twice, or never sent."""
        if number not in self._taken:
            raise BadFrame(f"frame {number} is returned, which has no pages")
        first, count = self._taken.pop(number)
        index = bisect.bisect(self._free, (first, 0))
        if index < len(self._free) and self._free[index][0] == first + count:
            count += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == first:
            before = self._free.pop(index - 1)
            first, count = before[0], before[1] + count
        bisect.insort(self._free, (first, count))

    def taken(self) -> int:
        return len(self._taken)


class Lending:
    """Memory that payloads are made in, so that they are written from where they are: one registered zone, reused once nobody looks at it any more."""

    def __init__(self, size: int):
        self.zone = Zone(size)
        self._extents = Extents(self.zone.size // PAGE_BYTES)
        self._numbers = count(1)
        self._lent: dict[int, weakref.ref] = {}
        self._unseen: deque[int] = deque()

    def take(self, size: int) -> memoryview | None:
        """`size` writable bytes of any content; None when there is no room, or so few that copying them is cheaper."""
        while self._unseen:
            number = self._unseen.popleft()
            del self._lent[number]
            self._extents.give_back(number)
        if size < LENT_BYTES_MIN:
            return None
        number = next(self._numbers)
        first = self._extents.take(number, pages_of(size))
        if first is None:
            return None
        array, unseen = self.zone.bytes[first * PAGE_BYTES : first * PAGE_BYTES + size], self._unseen
        self._lent[number] = weakref.ref(array, lambda _: unseen.append(number))
        return memoryview(array)

    def address_of(self, payload: memoryview) -> int:
        """Where a payload is that was made here, 0 for any other."""
        address = np.frombuffer(payload, np.uint8).__array_interface__["data"][0]
        return address if 0 <= address - self.zone.address <= self.zone.size - len(payload) else 0

    def close(self) -> None:
        """Unmapped with its last view."""
        self.take(0)
        if not self._lent:
            self.zone.close()


class Landing:
    """The reader's side of a zone: pages that hold a frame until nobody looks at it any more. `quarantine_s`: see NixlSettings."""

    def __init__(self, size: int, quarantine_s: int = 0):
        self.zone, self._quarantine_s = Zone(size), quarantine_s
        self._owned = bytearray(self.zone.size // PAGE_BYTES)  # 1 for a page that a frame is in
        self._pages: dict[int, tuple[int, int]] = {}
        self.freed = 0  # pages, since the user of this last set it to 0
        self._views: dict[int, weakref.ref] = {}
        self._unseen: deque[int] = deque()  # numbers whose last view is gone; appended to by whichever thread drops it

    @property
    def pages(self) -> int:
        return len(self._owned)

    def is_watched(self) -> bool:
        """Somebody still looks at a payload, or did until just now."""
        return bool(self._views)

    def claim(self, number: int, first: int, count: int, size: int) -> None:
        """Frame `number` has landed in these pages. Raises BadFrame where it can't have."""
        if not 0 < count <= len(self._owned) - first or first < 0 or not 0 < size <= count * PAGE_BYTES:
            raise BadFrame(f"frame {number} of {size} bytes in pages {first} to {first + count}, of {len(self._owned)}")
        if self._owned.count(1, first, first + count):
            raise BadFrame(f"frame {number} in pages that hold another one")
        self._owned[first : first + count] = b"\1" * count
        self._pages[number] = (first, count)

    def bytes_of(self, number: int, start: int, end: int):
        """An array over bytes [start, end) of the frame's pages."""
        first = self._pages[number][0] * PAGE_BYTES
        return self.zone.bytes[first + start : first + end]

    def view_of(self, number: int, start: int, end: int) -> memoryview:
        """As bytes_of, to be handed over: the pages are taken back when the last view is gone."""
        array = self.bytes_of(number, start, end)
        unseen = self._unseen
        self._views[number] = weakref.ref(array, lambda _: unseen.append(number))
        return memoryview(array)

    def in_front(self, number: int) -> bool:
        """In the half that may be handed over: the other one comes back whatever others hold on to, so that the largest frame finds room."""
        first, count = self._pages[number]
        return 2 * (first + count) <= len(self._owned)

    def free(self, number: int) -> None:
        first, count = self._pages.pop(number)
        self._owned[first : first + count] = bytes(count)
        self.freed += count

    def unseen(self) -> list[int]:
        """Frames that were handed over and are looked at no more: their pages are free."""
        gone = []
        while self._unseen:
            number = self._unseen.popleft()
            del self._views[number]
            self.free(number)
            gone.append(number)
        return gone

    def retire(self, now_ns: int = 0) -> bool:
        """The link is over: quarantine from `now_ns` on, once nobody looks at what has landed. False while somebody does: call again."""
        self.unseen()
        if self._views:
            return False
        self.zone.quarantine(now_ns + self._quarantine_s * 1_000_000_000 if self._quarantine_s else 0)
        return True


_retiring: list[Landing] = []


def retire(landing: Landing) -> None:
    """Quarantine this zone, and those whose last payloads have been dropped since the last time."""
    now_ns = time.monotonic_ns()
    release(now_ns)
    _retiring[:] = [former for former in (*_retiring, landing) if not former.retire(now_ns)]
