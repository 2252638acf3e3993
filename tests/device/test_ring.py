"""The staging ring: whatever engine and daemon do in which order, a slot that is found has its latest bytes."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.device import ring
from kvguard.device.ring import Packer, Unpacker, Words
from kvguard.errors import Refused

SLOTS = 12


class Pair:
    """Both ends with memories of ints: a slot's content is the step that wrote it last."""

    def __init__(self, rows: int, staged: int) -> None:
        self.words = Words.create(rows)
        other = Words(os.dup(self.words.fd))
        self.other = other
        self.packer, self.unpacker = Packer(other, rows), Unpacker(self.words, rows, staged, SLOTS)
        self.pool = np.zeros(SLOTS, np.int64)
        self.ring, self.staged = np.zeros(rows, np.int64), np.zeros(staged, np.int64)
        self.launched: list[tuple[int, int, np.ndarray]] = []
        self.step = 0

    def write(self, slots: list[int], said: bool) -> None:
        self.step += 1
        self.pool[slots] = self.step
        if not said:
            self.packer.gap()
            return
        found = self.packer.record(np.array(slots, np.int64))
        if found is not None:
            self.launched.append((*found, self.pool[slots].copy()))

    def gather(self) -> None:
        """The device comes to the oldest launch: stream order."""
        if self.launched:
            number, row, values = self.launched.pop(0)
            self.ring[row : row + len(values)] = values
            self.other.words[ring.AT_DONE] = number

    def drain(self) -> None:
        found = self.unpacker.finished()
        for row, slots, staged in found:
            if row >= 0:
                self.staged[staged : staged + len(slots)] = self.ring[row : row + len(slots)]
        self.unpacker.copied(found)

    def come_again(self) -> None:
        """Another engine in the dead one's place: what that one had launched is never done, and nobody knows what it wrote last."""
        self.launched.clear()
        self.step += 1
        self.pool[:] = self.step
        self.packer = Packer(self.other, self.ring.size)

    def close(self) -> None:
        self.words.close()
        self.other.close()


slots = st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=4, unique=True)
writes = st.tuples(st.just("write"), slots, st.sampled_from([True] * 9 + [False]))
moves = st.lists(st.one_of(writes, writes, st.just(("gather",)), st.just(("drain",)), st.just(("come_again",))), max_size=60)


@settings(max_examples=200, deadline=None)
@given(moves=moves, rows=st.integers(2, 9), staged=st.integers(2, 12), records=st.integers(2, 6), area=st.integers(4, 16))
def test_a_slot_that_is_found_has_its_latest_bytes(moves, rows, staged, records, area):
    kept = ring.RECORDS, ring.SLOTS, ring.CONTROL_BYTES
    ring.RECORDS, ring.SLOTS = records, area
    ring.CONTROL_BYTES = ring.PAGE_BYTES + 8 * records * ring.RECORD_WORDS + 8 * area
    pair = Pair(rows, staged)
    try:
        for name, *arguments in moves:
            getattr(pair, name)(*arguments)
            if name == "drain":
                found = pair.unpacker.find(np.arange(SLOTS))
                there = found >= 0
                assert np.array_equal(pair.staged[found[there]], pair.pool[there])
        while pair.launched:
            pair.gather()
        pair.drain()
        pair.write([3], said=True)  # whatever happened before, what is written when all is consumed finds room, and is found
        pair.gather()
        pair.drain()
        row = int(pair.unpacker.find(np.array([3]))[0])
        assert row >= 0 and pair.staged[row] == pair.step
    finally:
        pair.close()
        ring.RECORDS, ring.SLOTS, ring.CONTROL_BYTES = kept


def test_another_engine_s_steps_never_finish_its_predecessor_s():
    pair = Pair(rows=8, staged=8)
    pair.write([5], True)
    pair.drain()  # seen, and never done
    pair.come_again()
    pair.write([6], True)
    pair.gather()
    pair.drain()
    assert pair.unpacker.find(np.array([5, 6])).tolist() == [-1, -1]  # whatever was said before the gap was seen is void
    pair.write([6], True)
    pair.gather()
    pair.drain()
    assert pair.staged[pair.unpacker.find(np.array([6]))[0]] == pair.step
    pair.close()


def test_a_full_ring_skips_and_the_daemon_knows():
    pair = Pair(rows=4, staged=8)
    pair.write([0, 1, 2], True)
    pair.write([3, 4], True)
    assert pair.packer.skipped == 1 and len(pair.launched) == 1
    pair.gather()
    pair.drain()
    assert pair.unpacker.find(np.arange(5)).tolist() == [0, 1, 2, -1, -1]
    pair.write([3, 4], True)
    pair.gather()
    pair.drain()
    assert (pair.unpacker.find(np.array([3, 4])) >= 0).all() and pair.packer.skipped == 1
    pair.close()


def test_an_unfinished_gather_voids_what_was_there():
    pair = Pair(rows=8, staged=8)
    pair.write([5], True)
    pair.gather()
    pair.drain()
    assert pair.unpacker.find(np.array([5]))[0] >= 0
    pair.write([5], True)  # launched, not done
    pair.drain()
    assert pair.unpacker.find(np.array([5]))[0] == -1
    pair.gather()
    pair.drain()
    assert pair.staged[pair.unpacker.find(np.array([5]))[0]] == 2
    pair.close()


def test_nobody_s_words_are_believed():
    pair = Pair(rows=4, staged=4)
    pair.write([1], True)
    pair.gather()
    pair.other.records[0] = (2, 1 << 40, 0, 0)
    pair.drain()
    assert (pair.unpacker.find(np.arange(SLOTS)) == -1).all()
    pair.write([1], True)
    pair.other.records[1] = (3, 4, 0, 0)  # beyond the ring's end
    pair.other.words[ring.AT_DONE] = 2
    pair.drain()
    assert (pair.unpacker.find(np.arange(SLOTS)) == -1).all()
    pair.other.words[ring.AT_HEAD] = 1 << 63
    pair.drain()
    pair.close()
    fd = os.memfd_create("test")
    with pytest.raises(Refused, match="Try:"):
        Words(fd)
    os.close(fd)
