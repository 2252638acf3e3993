"""One stream's pages in one sparse file: page n is the sender's block n, so there is no allocator and no map.

Knows: pages (format/pages.py), references, fill, the file. Must not know: sequences, frames.
Invariants: what is written through the mapping was allocated before, so a full tmpfs is an error and never a SIGBUS; the file can't shrink under a
puller's mapping; a page without references has fill 0; freed pages keep their memory until the budget needs it.
Cost: 4 bytes a page here; block lists cost 4 more per reference (store/replica.py), generation and sums live in the page itself.

The file may outlive the process (store/shelf.py); references and fill don't: whoever opens it again says them (`adopt`), and punches the rest.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterable

from kvguard.errors import StoreFull
from kvguard.format import pages
from kvguard.format.messages import StreamShape
from kvguard.store.budget import Budget
from kvguard.store.index import punch

REFS_MAX = 65535
LAZY_BYTES_MIN = 64 * 1024  # pages from here on get their memory token by token: a step in which many sequences enter a block must not zero all of them
_word = struct.Struct("<Q")


def at_once(close: Callable[[], None]) -> None:
    close()


class Arena:
    """Pages of `shape` in `descriptor`, which this object owns from now on."""

    def __init__(self, descriptor: int, shape: StreamShape, budget: Budget) -> None:
        """Raises OSError where the file can't have the shape's size."""
        self.shape = shape
        self.page_bytes = pages.page_bytes(shape)
        self.refs, self.fill = _counters(shape.blocks), _counters(shape.blocks)
        self._live = 0  # pages with references
        self._lazy = self.page_bytes >= LAZY_BYTES_MIN
        self._descriptor = descriptor
        self._budget = budget
        self._retained: set[int] = set()
        os.ftruncate(descriptor, shape.blocks * self.page_bytes)
        self._mapped = mmap.mmap(descriptor, shape.blocks * self.page_bytes)
        self._memory = memoryview(self._mapped)
        self._seal()
        budget.reclaimers.append(self.punch)

    def _seal(self) -> None:
        """A memfd can't shrink under a puller's mapping; a file has no seals (EINVAL), and is opened by this user alone."""
        try:
            if not fcntl.fcntl(self._descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL:
                fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise

    def inode(self) -> int:
        """Which file this is, as long as anybody has it open or mapped."""
        return os.fstat(self._descriptor).st_ino

    def close(self, let_go: Callable[[Callable[[], None]], None] = at_once) -> None:
        """Give the mapping back. Pullers' mappings, and what a shelf keeps, live on. `let_go`: calls what it is given, once, in any thread: the last one to
        unmap and close frees the pages, a quarter of a second a GiB, without the interpreter's lock."""
        self._budget.reclaimers.remove(self.punch)
        self._budget.retained -= len(self._retained) * self.page_bytes
        self._retained.clear()
        self._memory.release()
        let_go(self._unmap)

    def _unmap(self) -> None:
        self._mapped.close()
        os.close(self._descriptor)

    def export(self) -> int:
        """A duplicate of the descriptor: the caller's to close."""
        return os.dup(self._descriptor)

    # ---- references -----------------------------------------------------------------------------------------------------------------

    def generation(self, block: int) -> int:
        """Of a page with references; of one of a former life, what stands there."""
        return _word.unpack_from(self._memory, block * self.page_bytes + self.shape.block_bytes)[0]

    def pages_live(self) -> int:
        """How many pages have references."""
        return self._live

    def begin(self, block: int, generation: int) -> None:
        """First reference to an unused page; its bytes were promised. Raises StoreFull when the system has no memory for it (nothing changed then)."""
        assert not self.refs[block] and not self.fill[block]
        start = block * self.page_bytes
        if block in self._retained:
            self._retained.discard(block)
            self._budget.retained -= self.page_bytes
        self._allocate(block, start)
        self._budget.use(self.page_bytes)
        self.refs[block] = 1
        self._live += 1
        struct.pack_into("<Q", self._memory, start + self.shape.block_bytes, generation)

    def _allocate(self, block: int, start: int) -> None:
        """What will be written through the mapping: the whole page, or its trailer alone where tokens go through the file."""
        first = start + self.shape.block_bytes if self._lazy else start
        size = start + self.page_bytes - first
        try:
            os.posix_fallocate(self._descriptor, first, size)
        except OSError:
            self._budget.reclaim()
            try:
                os.posix_fallocate(self._descriptor, first, size)
            except OSError as error:
                raise StoreFull(f"no memory for page {block}: {error}. Try: a larger tmpfs, or a smaller arena budget") from error

    def adopt(self, block: int, filled: int) -> None:
        """One reference to a page of a former life, which has `filled` slots at least; its bytes were promised."""
        if not self.refs[block]:
            self._budget.use(self.page_bytes)
            self._live += 1
        self.refs[block] += 1
        self.fill[block] = max(self.fill[block], filled)

    def punch_unused(self, adopted: Iterable[int]) -> None:
        """After `adopt` of these: memory of pages that nobody named goes back to the system."""
        run = 0
        for block in (*sorted(set(adopted)), self.shape.blocks):
            if block > run:
                punch(self._descriptor, run * self.page_bytes, (block - run) * self.page_bytes)
            run = block + 1

    def refer(self, block: int) -> None:
        """One more sequence holds this page. Raises StoreFull at the counter's end."""
        if self.refs[block] == REFS_MAX:
            raise StoreFull(f"page {block} is shared by {REFS_MAX} sequences")
        self.refs[block] += 1

    def release(self, block: int) -> None:
        self.refs[block] -= 1
        if not self.refs[block]:
            self._live -= 1
            self.fill[block] = 0
            self._budget.free(self.page_bytes)
            self._retained.add(block)
            self._budget.retained += self.page_bytes

    def punch(self) -> None:
        """Give the memory of unused pages back to the system; runs of them in one call, so that pages narrower than the system's go too."""
        run: list[int] = []
        for block in (*sorted(self._retained), None):
            if run and block != run[-1] + 1:
                punch(self._descriptor, run[0] * self.page_bytes, len(run) * self.page_bytes)
                run = []
            if block is not None:
                run.append(block)
        self._budget.retained -= len(self._retained) * self.page_bytes
        self._retained.clear()

    # ---- bytes ------------------------------------------------------------------------------------------------------------------------

    def write_tokens(self, block: int, slot: int, data: memoryview, sums: tuple[int, ...]) -> None:
        """Tokens from `slot` on, then their sums; the caller raises `fill` when it wants them seen."""
        start = block * self.page_bytes
        self._write(start + slot * self.shape.token_bytes, data)
        struct.pack_into(f"<{len(sums)}Q", self._memory, start + self.shape.block_bytes + 8 + 8 * slot, *sums)

    def write_block(self, block: int, data: memoryview, total: int) -> None:
        start = block * self.page_bytes
        self._write(start, data)
        struct.pack_into("<Q", self._memory, start + self.shape.block_bytes + 8, total)

    def _write(self, at: int, data: memoryview) -> None:
        """Large pages through the file: no page fault per 4 KiB written once (measured: 310 against 780 us for 64 runs of 15 KiB), memory as it is needed."""
        if not self._lazy:
            self._memory[at : at + len(data)] = data
            return
        try:
            written = os.pwrite(self._descriptor, data, at)
        except OSError as error:
            raise StoreFull(f"no memory for {len(data)} bytes of the arena: {error}. Try: a larger tmpfs, or a smaller arena budget") from error
        if written != len(data):
            raise StoreFull(f"the arena's file took {written} of {len(data)} bytes. Try: a larger tmpfs, or a smaller arena budget")

    def sums(self, block: int, slot: int, count: int) -> tuple[int, ...]:
        """As kept: per token, or the block's one where tokens aren't addressable (slot 0, count 1)."""
        return struct.unpack_from(f"<{count}Q", self._memory, block * self.page_bytes + self.shape.block_bytes + 8 + 8 * slot)

    def tokens(self, block: int, slot: int, count: int) -> memoryview:
        """Read-only view of tokens' bytes. Only where tokens are addressable."""
        at = block * self.page_bytes + slot * self.shape.token_bytes
        return self._memory[at : at + count * self.shape.token_bytes].toreadonly()

    def block(self, block: int) -> memoryview:
        at = block * self.page_bytes
        return self._memory[at : at + self.shape.block_bytes].toreadonly()

    def damage(self, block: int, slot: int, bytes_only: bool = False) -> None:
        """Change a byte of a token, for drills: *and* its sum, so that only a comparison with the pool can tell; or the byte alone, which the sum must tell."""
        at = block * self.page_bytes + (slot * self.shape.token_bytes if self.shape.addressable else 0)
        self._memory[at] ^= 0xFF
        if bytes_only:
            return
        if self.shape.addressable:
            self.write_tokens(block, slot, self.tokens(block, slot, 1), pages.sums_of(self.tokens(block, slot, 1), self.shape.token_bytes))
        else:
            self.write_block(block, self.block(block), pages.sums_of(self.block(block), self.shape.block_bytes)[0])


def _counters(count: int) -> memoryview:
    """`count` u16, all zero; memory comes with the first use of each."""
    return memoryview(mmap.mmap(-1, 2 * count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)).cast("H") if count else memoryview(b"").cast("H")
