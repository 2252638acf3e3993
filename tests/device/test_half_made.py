"""Whatever is made on a GPU in several calls leaves nothing behind when one of them fails, whichever: no memory, no registered page, no descriptor."""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable

import numpy as np
import pytest

from kvguard.device import card
from kvguard.device.cuda import Capturing, CudaDevice
from kvguard.device.gpu_pool import Staging
from kvguard.device.layered import LayeredRestore
from kvguard.device.rehearsal import Rehearsal
from kvguard.device.ring import Words
from kvguard.errors import DeviceLost, KvguardError, Refused
from kvguard.format.layout import Layout

LAYOUT = Layout.paged("m", "bfloat16", 2, 6, 4, 2, 8)
CAPTURINGS = {capture: Capturing(capture, ring_bytes=1, staged_bytes=1) for capture in ("engine", "daemon")}
FALLIBLE = ("allocate", "pinned", "registered", "stream", "record", "copy", "synchronise", "compile", "open_handle", "allocation_of", "handle_of")
VIRTUAL = ("reserve", "imported", "map", "create", "descriptor_of", "chunk_of")


class Failing(Rehearsal):
    """Engine and daemon in one process. `left`: so many calls succeed, the next one fails, all others succeed."""

    def __init__(self, error: type[KvguardError] = Refused) -> None:
        super().__init__()
        self.left, self.error = -1, error
        for thing, names in ((self, FALLIBLE), (self.virtual, VIRTUAL)):
            for name in names:
                setattr(thing, name, self._counted(name, getattr(thing, name)))

    def _counted(self, name: str, call: Callable) -> Callable:
        def counted(*arguments, **named):
            self.left -= 1
            if self.left == -1:
                raise self.error(f"{name} fails. Try: nothing, this is a test")
            return call(*arguments, **named)

        return counted

    def open_handle(self, handle: bytes) -> int:
        _, number, _, size = (int(part) for part in handle.split())
        return self._map(os.dup(number), size, False)

    def holds(self) -> tuple[int, int, int, int, int]:
        gc.collect()
        return len(self._mapped), len(self.held_pages), self.virtual.reserved_bytes, self.virtual.handles, len(os.listdir("/proc/self/fd"))


def tried(driver: Failing, make: Callable[[], object]) -> int:
    """`make` with its first call failing, its second one, ...: how many failed it. What it makes has `close`, or `free`."""

    def given_back(made) -> None:
        (made.close if hasattr(made, "close") else made.free)()

    driver.left = -1
    given_back(make())  # what is made once for all
    before, refused, calls = driver.holds(), 0, 0
    while True:
        driver.left = calls
        made = None
        try:
            made = make()
        except KvguardError as error:
            assert "this is a test" in str(error)
            refused += 1
        over, driver.left = driver.left >= 0, -1
        if made is not None:
            given_back(made)
            made = None
        assert driver.holds() == before, f"call {calls} failed, and something is left"
        if over:
            return refused
        calls += 1


@pytest.fixture(params=[Refused, DeviceLost])
def driver(request) -> Failing:
    return Failing(request.param)


@pytest.mark.parametrize("capturing", CAPTURINGS.values(), ids=CAPTURINGS.keys())
def test_a_daemon_s_view(driver, capturing):
    device = CudaDevice(lambda: (driver,), capturing)
    pool = device.allocate(LAYOUT)
    cards = pool.export()
    assert tried(driver, lambda: device.open(LAYOUT, [os.dup(fd) for fd in cards], writable=False)) > 3
    os.close(cards[0])
    pool.close()


@pytest.mark.parametrize("writable", [True, False])
def test_memory_that_outlives_its_engine(driver, writable):
    device = CudaDevice(lambda: (driver,), CAPTURINGS["engine"])
    lent = device.lend(LAYOUT)
    assert tried(driver, lambda: device.open(LAYOUT, [os.dup(fd) for fd in lent], writable=writable)) > 5
    for fd in lent:
        os.close(fd)


def test_an_engine_s_pool(driver):
    device = CudaDevice(lambda: (driver,))
    assert tried(driver, lambda: device.allocate(LAYOUT)) > 5
    memory = driver.allocate(LAYOUT.pool_bytes)
    assert tried(driver, lambda: device.share(LAYOUT, memory)) > 5
    driver.free(memory)


def test_staging(driver):
    assert tried(driver, lambda: Staging(driver, 64, 4096)) == 2


def test_a_restore_layer_by_layer(driver):
    pool = CudaDevice(lambda: (driver,)).allocate(LAYOUT)
    memory = memoryview(mmap.mmap(-1, 1 << 14))
    assert tried(driver, lambda: LayeredRestore(pool, memory, np.array([0, 4096]), np.array([3, 5]), 5.0)) > 5
    pool.close()


def test_a_ring_that_is_joined(driver, caplog):
    """Nothing is raised: the daemon reads the pool."""
    caplog.set_level("CRITICAL", "kvguard.device")  # a record that is kept keeps the error, and its frames what they held
    daemon = Rehearsal()
    pool = CudaDevice(lambda: (driver,)).allocate(LAYOUT)
    memory = daemon.allocate(16 * pool.plan.unit_bytes)
    terms = card.Card("ring", daemon.uuid, daemon.handle_of(memory), 0, 16 * pool.plan.unit_bytes, 16)

    class Joining:
        def __init__(self) -> None:
            pool.join([card.write(terms), Words.create(16).fd])

        def close(self) -> None:
            pool.join([])

    assert tried(driver, Joining) == 0
    other = os.memfd_create("no words")
    before = driver.holds()
    pool.join([card.write(terms), os.dup(other)])
    assert not pool.joined and driver.holds() == before
    os.close(other)
    pool.close()
    daemon.free(memory)


def test_a_layout_that_the_kernels_cannot_take(monkeypatch):
    """What came behind the card is taken, also where nothing was opened yet."""
    driver = Failing()
    device = CudaDevice(lambda: (driver,), CAPTURINGS["engine"])
    lent = device.lend(LAYOUT)
    before = driver.holds()

    def refused(layout):
        raise Refused("a token of this layout is too many runs. Try: another order")

    monkeypatch.setattr("kvguard.device.opened.Plan.of", refused)
    with pytest.raises(Refused, match="too many runs"):
        device.open(LAYOUT, [os.dup(fd) for fd in lent], writable=False)
    assert driver.holds() == before
    for fd in lent:
        os.close(fd)
