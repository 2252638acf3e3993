"""Memory that a peer writes into: pages, who has them, when they and their addresses come back.

Knows: nixl_zone.py alone; NIXL isn't needed. Must not know: links, frames.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import time

import numpy as np
import pytest

from kvguard.errors import BadFrame
from kvguard.limits import KIB, MIB
from kvguard.transport import nixl_zone
from kvguard.transport.nixl_zone import PAGE_BYTES, Extents, Landing, Lending, Zone, quarantined, release

def test_extents_are_first_fit_and_grow_together_again():
    extents = Extents(10)
    assert [extents.take(number, count) for number, count in ((1, 4), (2, 3), (3, 4), (4, 3))] == [0, 4, None, 7]
    extents.give_back(1)
    assert extents.take(5, 5) is None and extents.take(6, 1) == 0
    for number in (4, 6, 2):
        extents.give_back(number)
    assert extents.take(7, 10) == 0
    extents.give_back(7)
    for number in (7, 99):
        with pytest.raises(BadFrame, match="has no pages"):
            extents.give_back(number)


def test_extents_against_a_plain_map_of_pages():
    random = np.random.default_rng(1)
    extents, pages, number = Extents(64), [0] * 64, 0
    for _ in range(3000):
        if random.random() < 0.55:
            number, count = number + 1, int(random.integers(1, 9))
            first = extents.take(number, count)
            fits = [start for start in range(64 - count + 1) if not any(pages[start : start + count])]
            assert first == (fits[0] if fits else None)
            if fits:
                pages[first : first + count] = [number] * count
        elif owners := sorted(set(pages) - {0}):
            gone = owners[int(random.integers(len(owners)))]
            extents.give_back(gone)
            pages = [0 if owner == gone else owner for owner in pages]


def test_a_frame_is_refused_where_another_one_is_or_beyond_the_zone():
    landing = Landing(8 * PAGE_BYTES)
    landing.claim(1, 2, 3, 2 * PAGE_BYTES + 1)
    for first, count, size in ((0, 3, 1), (4, 1, 1), (7, 2, 1), (8, 1, 1), (0, 0, 0), (0, 1, PAGE_BYTES + 1), (0, 1 << 31, 1)):
        with pytest.raises(BadFrame):
            landing.claim(2, first, count, size)
    landing.free(1)
    landing.claim(2, 4, 1, 1)
    assert not landing.in_front(2)
    assert landing.retire()


def test_pages_come_back_when_the_last_view_is_gone_and_addresses_never():
    landing = Landing(8 * PAGE_BYTES)
    address = landing.zone.address
    landing.claim(1, 0, 2, 100)
    view = landing.view_of(1, 10, 60)
    kept = view[5:9]
    del view
    assert landing.unseen() == [] and landing.is_watched() and not landing.retire()
    kept[:] = b"mine"  # still there: the zone isn't retired under whoever looks at it
    del kept
    gc.collect()
    assert landing.unseen() == [1] and not landing.is_watched()
    assert landing.retire() and (address, 8 * PAGE_BYTES) in quarantined()
    assert late_write(address) == errno.EFAULT
    others = [Zone(8 * PAGE_BYTES) for _ in range(50)]
    assert all(other.address >= address + 8 * PAGE_BYTES or other.address + other.size <= address for other in others)
    for other in others:
        assert late_write(other.address) == 0
        other.close()


def late_write(address: int) -> int:
    """What the kernel says to one who writes into this process by address, as CMA does: 0 or an errno."""

    class Iovec(ctypes.Structure):
        _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]

    libc = ctypes.CDLL(None, use_errno=True)
    source = ctypes.create_string_buffer(b"late", 4)
    here, there = Iovec(ctypes.addressof(source), 4), Iovec(address, 4)
    wrote = libc.process_vm_writev(os.getpid(), ctypes.byref(here), ctypes.c_ulong(1), ctypes.byref(there), ctypes.c_ulong(1), ctypes.c_ulong(0))
    return 0 if wrote == 4 else ctypes.get_errno()


def test_the_quarantine_is_bounded(monkeypatch):
    monkeypatch.setattr(nixl_zone, "QUARANTINE_MAX", len(quarantined()) + 2)
    for _ in range(5):
        assert Landing(PAGE_BYTES).retire()
    assert len(quarantined()) == nixl_zone.QUARANTINE_MAX


def test_addresses_come_back_when_their_quarantine_is_over():
    now_ns = time.monotonic_ns()
    landing, for_ever = Landing(8 * PAGE_BYTES, quarantine_s=5), Landing(8 * PAGE_BYTES)
    address = landing.zone.address, landing.zone.size
    assert landing.retire(now_ns) and for_ever.retire(now_ns)
    release(now_ns + 5_000_000_000 - 1)
    assert address in quarantined()
    others = quarantined()
    release(now_ns + 5_000_000_000)
    assert quarantined() == [held for held in others if held != address]


def test_lent_memory_comes_back_and_runs_out():
    lending = Lending(1 * MIB)
    start = lending.zone.address
    views = [lending.take(256 * KIB) for _ in range(lending.zone.size // (256 * KIB))]
    assert lending.take(256 * KIB) is None and lending.take(KIB) is None
    assert [lending.address_of(view) - start for view in views] == [index * 256 * KIB for index in range(len(views))]
    assert lending.address_of(memoryview(bytes(100))) == 0
    part = views[0][5:9]
    views[0] = None
    assert lending.take(256 * KIB) is None
    del part
    assert lending.address_of(lending.take(256 * KIB)) == start
    lending.close()  # somebody still looks: it stays
    views[1][:] = bytes(256 * KIB)
