"""Memory for payloads that arrive: reused once nobody looks at it any more, because fresh pages cost as much as the bytes that land in them.

Knows: reference counts. Must not know: sockets, frames.
Invariants: memory is handed out again only when no view, slice or array over it is left; what is kept idle is bounded; what is handed out is as large as asked.
"""

from __future__ import annotations

import mmap
import sys
from collections import deque

from kvguard.limits import KIB, MIB

SMALL_BYTES = 32 * KIB  # below, the allocator is as good
KEPT_BYTES_MAX = 32 * MIB
LOOKS_MAX = 8  # per request


def fresh(size: int) -> bytearray | mmap.mmap:
    """`size` writable bytes of any content; where they are many, pages that nobody has touched."""
    return bytearray(size) if size < SMALL_BYTES else mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class PayloadMemory:
    """One receiver's; not shared between threads."""

    def __init__(self) -> None:
        self._kept: dict[int, deque] = {}  # by size class, those seen busy at the back
        self.kept_bytes = 0

    def take(self, size: int) -> memoryview:
        """`size` writable bytes of any content."""
        if size < SMALL_BYTES:
            return memoryview(bytearray(size))
        whole = 1 << (size - 1).bit_length()
        kept = self._kept.setdefault(whole, deque())
        for _ in range(min(LOOKS_MAX, len(kept))):
            block = kept[0]
            if sys.getrefcount(block) == 3:  # the deque's, ours, the call's
                return memoryview(block)[:size]  # it stays in front: what was touched last is still in the cache
            kept.rotate(-1)
        if self.kept_bytes + whole > KEPT_BYTES_MAX:
            self._drop_idle()
        block = fresh(whole)
        if self.kept_bytes + whole <= KEPT_BYTES_MAX:
            self._kept[whole].appendleft(block)
            self.kept_bytes += whole
        return memoryview(block)[:size]

    def _drop_idle(self) -> None:
        """Sizes change over time: make room for those that are asked for now."""
        for whole, kept in self._kept.items():
            busy = deque(block for block in list(kept) if sys.getrefcount(block) > 4)
            self.kept_bytes -= whole * (len(kept) - len(busy))
            self._kept[whole] = busy
