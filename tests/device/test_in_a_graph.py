"""An engine that captures a CUDA graph, and what it must not ask for meanwhile: nothing of kvguard's becomes part of the graph, nothing is committed by it."""

from __future__ import annotations

import mmap
import os

import numpy as np
import pytest

from kvguard.device import paced
from kvguard.device.cuda import Capturing, CudaDevice
from kvguard.device.layered import LayeredRestore
from kvguard.device.rehearsal import Rehearsal
from kvguard.errors import Refused
from kvguard.format.layout import Layout

LAYOUT = Layout.paged("m", "bfloat16", 2, 6, 4, 2, 8)


class BothSides(Rehearsal):
    """Engine and daemon in one process."""

    def open_handle(self, handle: bytes) -> int:
        _, number, _, size = (int(part) for part in handle.split())
        return self._map(os.dup(number), size, False)


class Pair:
    """An engine's pool, and its daemon's view."""

    def __init__(self) -> None:
        self.driver = BothSides()
        self.pool = CudaDevice(lambda: (self.driver,)).allocate(LAYOUT)
        daemon = CudaDevice(lambda: (BothSides(),), Capturing(ring_bytes=1 << 16, staged_bytes=1 << 16))
        self.view = daemon.open(LAYOUT, self.pool.export(), writable=False)
        self.pool.join(self.view.welcome())
        self.word = memoryview(mmap.mmap(-1, 4096)).cast("Q")[24:25]

    def write(self, slot: int, value: int) -> None:
        """Without a word of it."""
        self.pool.scatter([0], [slot], [1], memoryview(bytes([value]) * LAYOUT.token_bytes))

    def captured(self, slot: int) -> int:
        out = memoryview(bytearray(LAYOUT.token_bytes))
        self.view.capture([0], [slot], [1], out)
        return out[0]

    def close(self) -> None:
        self.pool.close()
        self.view.close()


@pytest.fixture
def pair():
    made = Pair()
    yield made
    made.close()


def test_what_a_step_wrote_is_not_said_into_a_capture(pair):
    pair.driver.captured, packed = True, pair.pool.packed
    with pytest.raises(Refused, match="CUDA graph.*Try:.*after the graph's replay"):
        pair.pool.wrote([0], [0], [1])
    assert pair.pool.packed == packed and pair.pool.skipped == 0 and not pair.pool.lost
    pair.driver.captured = False
    pair.write(0, 7)
    pair.pool.wrote([0], [0], [1])
    pair.pool.publish(pair.word, 1)
    assert pair.word[0] == 1 and pair.captured(0) == 7 and pair.view.from_ring == 1


def test_it_is_refused_without_a_daemon_too():
    """An engine that is put together wrongly hears of it before it is protected."""
    driver = Rehearsal()
    pool = CudaDevice(lambda: (driver,)).allocate(LAYOUT)
    driver.captured = True
    with pytest.raises(Refused, match="CUDA graph"):
        pool.wrote([0], [0], [1])
    driver.captured = False
    pool.close()


def test_a_step_that_ends_within_a_capture_is_said_by_the_next_one(pair, caplog):
    pair.driver.captured = True
    pair.pool.publish(pair.word, 1)
    assert pair.word[0] == 0 and "step 1 isn't published" in caplog.text and not pair.pool.lost
    pair.driver.captured = False
    pair.write(3, 9)
    pair.pool.wrote([0], [3], [1])
    pair.pool.publish(pair.word, 2)
    assert pair.word[0] == 2 and pair.captured(3) == 9


def test_nothing_is_gathered_scattered_or_restored_within_one(pair):
    memory = memoryview(mmap.mmap(-1, 1 << 14))
    held, out = len(pair.driver._mapped), memoryview(bytearray(LAYOUT.block_bytes))
    pair.pool.capture_blocks([0], out)  # its staging is there from here on
    held = len(pair.driver._mapped)
    pair.driver.captured = True
    for forbidden in (
        lambda: pair.pool.capture_blocks([0], out),
        lambda: pair.pool.scatter_blocks([0], out),
        lambda: LayeredRestore(pair.pool, memory, np.array([0]), np.array([0]), 5.0),
    ):
        with pytest.raises(Refused, match="CUDA graph"):
            forbidden()
    pair.driver.captured = False
    assert len(pair.driver._mapped) == held and not [page for page in pair.driver.held_pages.values() if len(page) > 1]


def test_a_layer_is_not_waited_for_within_one(pair):
    """CUDA forbids a captured stream to wait for an event from outside: the engine's capture ended with it."""
    memory = memoryview(mmap.mmap(-1, 1 << 14))
    with LayeredRestore(pair.pool, memory, np.array([0]), np.array([0]), 5.0) as restore:
        pair.driver.captured = True
        for stream in (None, pair.driver.current()):
            with pytest.raises(Refused, match="CUDA graph"):
                restore.wait(0, stream)
        pair.driver.captured = False
        restore.wait(0)
        restore.finish()


def test_a_pool_that_is_closed_within_one_goes_with_its_process(caplog):
    driver = Rehearsal()
    pool = CudaDevice(lambda: (driver,)).allocate(LAYOUT)
    mapped, driver.captured = dict(driver._mapped), True
    pool.close()
    pool.close()
    assert driver._mapped == mapped and paced._stranded[-1] is pool and "goes with its process" in caplog.text


class Busy(Rehearsal):
    """A kernel of the engine's that doesn't end: what its stream has come to is never reached, nor what waits for it."""

    busy, behind = False, frozenset()

    def record(self, stream: str) -> int:
        number = super().record(stream)
        if self.busy and (stream == self.current() or stream in self.behind):
            self.ends[number] = False
        return number

    def wait(self, stream: str, event: int) -> None:
        if not self.ends[event]:
            self.behind |= {stream}


@pytest.mark.parametrize("lent", [False, True])
def test_what_the_engine_still_runs_is_waited_for_before_its_memory_goes(lent, monkeypatch):
    """For as long as everything else is, without a word to the rest of the GPU."""
    monkeypatch.setattr(paced, "HANG_S", 0.0)
    driver = Busy()
    device = CudaDevice(lambda: (driver,))
    pool = device.open(LAYOUT, device.lend(LAYOUT)) if lent else device.allocate(LAYOUT)
    mapped, reserved = dict(driver._mapped), driver.virtual.reserved_bytes
    driver.busy = True
    pool.close()
    assert driver._mapped == mapped and driver.virtual.reserved_bytes == reserved and paced._stranded[-1] is pool
    assert (reserved > 0) == lent
