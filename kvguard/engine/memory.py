"""The commit table's memory as numpy views, and the hashes of format/rows.py over arrays.

Knows: mappings, dtypes. Must not know: what a commit is, who looks.
Invariants: a table's file can't shrink under a mapping (sealed at creation, checked before it is mapped); the hashes equal those of format/rows.py bit by bit
(tests/engine/test_table.py compares them).
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading

import numpy as np

from kvguard.errors import BadFrame, Refused
from kvguard.format import rows as fmt
from kvguard.format.rows import Geometry

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
U64 = np.uint64
_GOLDEN, _M1, _M2 = U64(0x9E3779B97F4A7C15), U64(0xBF58476D1CE4E5B9), U64(0x94D049BB133111EB)
_lock = threading.Lock()


def order() -> None:
    """No store moves past this call, on any CPU: taking and releasing a lock is an acquire and a release."""
    with _lock:
        pass


def populate(area: memoryview, stride: int, places: int, used: int) -> None:
    """Have the pages of the first `used` bytes of every place there before they are stored into. Changes nothing, also for who reads at this moment."""
    for at in range(0, stride * places, stride):
        for byte in (*range(at, at + used, fmt.PAGE_BYTES), at + used - 1):
            area[byte] = area[byte]


def create(geometry: Geometry) -> int:
    """A sealed, sparse memfd with a table's header; the caller owns the descriptor."""
    at = fmt.areas(geometry)
    fd = os.memfd_create("kvguard-table", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, at.table_bytes)
        os.pwrite(fd, fmt.encode_header(geometry), 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(fd)
        raise
    return fd


def geometry_of(fd: int) -> Geometry:
    """Raises Refused for a descriptor that is no table, or one that could shrink under us."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        geometry = fmt.decode_header(os.pread(fd, fmt.PAGE_BYTES, 0))
    except (OSError, BadFrame) as error:
        raise Refused(f"the descriptor is not a commit table: {error}. Try: attach with this version's kvguard.engine") from error
    size = os.fstat(fd).st_size
    if seals & SEALS != SEALS or size != fmt.areas(geometry).table_bytes:
        raise Refused(f"the commit table of {size} bytes is not sealed at its size: it could shrink under a reader. Try: kvguard.engine.attach")
    return geometry


class Views:
    """A table mapped here. Arrays are views of shared memory; dropping this object and every view unmaps it.

    `words`: u64 [512], the header page. `selectors`, `row_generations`: u64 [rows]. `block_generations`: u64 [blocks]. `heads`: u64 [rows, 2, HEAD_WORDS].
    `meta`: u64 [rows, 2, META_WORDS]. `row_blocks`: u32 [rows, blocks_per_row]. `row_block_generations`: u64, the same shape. `ids`: u32 [rows, ids_per_row].
    `tape_bytes`, `tape_words`: the tape's area as memoryviews; `header`: the header page as one, its words are cheapest to reach so.
    """

    def __init__(self, fd: int, writable: bool) -> None:
        """Raises Refused (geometry_of). `writable` false: only the header page can be written here (the epoch word)."""
        self.geometry = geometry = geometry_of(fd)
        at = fmt.areas(geometry)
        page = mmap.mmap(fd, fmt.PAGE_BYTES)
        body = mmap.mmap(fd, at.table_bytes, prot=mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0))

        def view(offset: int, dtype, *shape: int) -> np.ndarray:
            return np.frombuffer(body, dtype, int(np.prod(shape)), offset).reshape(shape)

        rows = geometry.rows
        self.page = memoryview(page)
        self.header = self.page.cast("Q")
        self.body = memoryview(body)
        self.words = np.frombuffer(page, U64)
        self.selectors = view(at.selectors, U64, rows)
        self.row_generations = view(at.row_generations, U64, rows)
        self.block_generations = view(at.block_generations, U64, geometry.blocks)
        self.heads = view(at.heads, U64, rows, 2, fmt.HEAD_WORDS)
        self.meta = view(at.meta, U64, rows, 2, fmt.META_WORDS)
        self.row_blocks = view(at.row_blocks, np.uint32, rows, geometry.blocks_per_row)
        self.row_block_generations = view(at.row_block_generations, U64, rows, geometry.blocks_per_row)
        self.ids = view(at.ids, np.uint32, rows, geometry.ids_per_row)
        self.tape_bytes = self.body[at.tape : at.table_bytes]
        self.tape_words = self.tape_bytes.cast("Q")
        self.id_multipliers = multipliers(np.arange(geometry.ids_per_row, dtype=U64) + U64(fmt.IDS_SALT))

    def word(self, offset: int) -> memoryview:
        """One 64-bit word of the header page, writable, as a memoryview of format "Q"."""
        return self.page[offset : offset + 8].cast("Q")


# ---- hashes over arrays ---------------------------------------------------------------------------------------------------------


def multipliers(places: np.ndarray) -> np.ndarray:
    """format.rows.multiplier over u64 places (salt included)."""
    z = (places + U64(1)) * _GOLDEN
    z = (z ^ (z >> U64(30))) * _M1
    z = (z ^ (z >> U64(27))) * _M2
    return (z ^ (z >> U64(31))) | U64(1)


_HEAD = multipliers(np.arange(fmt.HEAD_WORDS, dtype=U64) + U64(fmt.HEAD_SALT))
_HEAD_FOLD = np.where(np.arange(fmt.HEAD_WORDS) == fmt.H_SUM, U64(0), U64(fmt.FOLD))
_HALF = U64(32)
_META = multipliers(np.arange(fmt.META_WORDS, dtype=U64) + U64(fmt.META_SALT))


def head_sums(heads: np.ndarray) -> np.ndarray:
    """Checksums of heads, u64 [n, HEAD_WORDS] -> [n]."""
    mixed = heads * _HEAD
    mixed ^= mixed >> _HALF
    return mixed @ _HEAD_FOLD


def ids_sum(ids: np.ndarray, multipliers_: np.ndarray) -> int:
    """Hash of a run of ids whose places' multipliers are given."""
    return int(((ids.astype(U64) + U64(1)) * multipliers_).sum(dtype=U64))


def block_terms(places: np.ndarray, blocks: np.ndarray, generations: np.ndarray) -> np.ndarray:
    """Each entry's share of a row's blocks hash; they add up modulo 2**64."""
    first = places.astype(U64) * U64(2) + U64(fmt.BLOCKS_SALT)
    return (blocks.astype(U64) + U64(1)) * multipliers(first) + (generations + U64(1)) * multipliers(first + U64(1))


def blocks_sum(blocks: np.ndarray, generations: np.ndarray, first: int = 0) -> int:
    return int(block_terms(np.arange(first, first + len(blocks)), blocks, generations).sum(dtype=U64))


def meta_sum(words: np.ndarray) -> int:
    return int(((words + U64(1)) * _META[: len(words)]).sum(dtype=U64))
