"""Pages that a GPU reads where they are: what arrives is what a host pool would have got; what is damaged, late or given up fails as a whole."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest

from kvguard.device import open_device, paced
from kvguard.device.cuda import CudaDevice
from kvguard.device.rehearsal import Rehearsal
from kvguard.engine.arriving import Arriving
from kvguard.engine.pull import pull_pages
from kvguard.errors import BadFrame, DeviceLost, Refused, Stale, TimedOut
from kvguard.format.layout import Layout
from kvguard.format.pages import PageReader, pack_sums, page_bytes, sums_of

LAYOUTS = {
    "usual": Layout.paged("m", "bfloat16", 3, 12, 4, 2, 8),
    "per layer": Layout.per_layer("m", "bfloat16", 3, 12, 4, 2, 8),
    "heads first": Layout.paged("m", "bfloat16", 3, 12, 4, 2, 8, order="layer,kv,block,head,slot,dim"),
    "opaque": Layout.opaque("m", "bfloat16", 3, 12, 4, 128),
}
BLOCKS, COUNTS, HERE = [7, 2, 5], [4, 4, 2], [1, 11, 6]


class Late(Rehearsal):
    """Where it is held: does what waits once it is asked for more than `patience` events."""

    patience, asked = 0, frozenset()

    def is_done(self, event: int) -> bool:
        if self.held:
            self.asked |= {event}
            if len(self.asked) > self.patience:
                self.run()
        return super().is_done(event)


class Replica:
    """An arena with noise in it, and pools that it is pulled into. Block n is of generation 100 + n."""

    def __init__(self, layout: Layout) -> None:
        self.layout, shape = layout, layout.shape()
        self.fd = os.memfd_create("kvguard-test-pages", os.MFD_CLOEXEC)
        random = np.random.default_rng(3)
        for block in range(shape.blocks):
            data = random.bytes(shape.block_bytes)
            sums = sums_of(memoryview(data), shape.token_bytes if shape.addressable else shape.block_bytes)
            os.pwrite(self.fd, data + (100 + block).to_bytes(8, "little") + pack_sums(sums), block * page_bytes(shape))
        os.ftruncate(self.fd, shape.blocks * page_bytes(shape))
        self.reader = PageReader(self.fd, shape)
        self.driver = Late()
        self.pool = CudaDevice(lambda: (self.driver,)).allocate(layout)
        self.host = open_device("host").allocate(layout)

    def arguments(self, pool, due_s: float = 30.0) -> tuple:
        return pool, self.reader, BLOCKS, [100 + block for block in BLOCKS], COUNTS, HERE, time.monotonic() + due_s

    def give_up(self, block: int) -> None:
        os.pwrite(self.fd, (0).to_bytes(8, "little"), block * page_bytes(self.layout.shape()) + self.layout.block_bytes)

    def bytes_of(self, pool) -> bytes:
        out = memoryview(bytearray(self.layout.blocks * self.layout.block_bytes))
        pool.capture_blocks(range(self.layout.blocks), out)
        return bytes(out)

    def close(self) -> None:
        self.driver.held = False
        for pool in (self.pool, self.host):
            pool.close()
        self.reader.close()
        os.close(self.fd)
        assert not self.driver.held_pages, "memory is still registered"


@pytest.fixture(params=LAYOUTS)
def replica(request):
    made = Replica(LAYOUTS[request.param])
    yield made
    made.close()


@pytest.fixture
def usual():
    made = Replica(LAYOUTS["usual"])
    yield made
    made.close()


def test_what_arrives_layer_by_layer_is_what_a_host_pool_gets(replica):
    assert pull_pages(*replica.arguments(replica.pool)) == pull_pages(*replica.arguments(replica.host))
    launched = list(replica.driver.launched)
    assert len(launched) == replica.pool.plan.layers and all(kernel.startswith("kvg_scatter") for kernel in launched)
    assert replica.bytes_of(replica.pool) == replica.bytes_of(replica.host)
    assert any(replica.bytes_of(replica.host))


def test_a_damaged_page_is_not_even_launched(replica):
    os.pwrite(replica.fd, b"\xff\x00\xff\x01", 5 * page_bytes(replica.layout.shape()) + 1)
    with pytest.raises(BadFrame, match="page 5"):
        pull_pages(*replica.arguments(replica.pool))
    assert replica.driver.launched == [] and not any(replica.bytes_of(replica.pool))


def test_a_page_that_is_given_up_meanwhile_fails_the_whole(usual):
    with Arriving(*usual.arguments(usual.pool)) as arriving:
        usual.give_up(2)
        with pytest.raises(Stale, match="page 2"):
            arriving.finish()


def test_a_layer_can_be_waited_for_before_the_others_are_there(usual):
    usual.driver.held = True
    with Arriving(*usual.arguments(usual.pool)) as arriving:
        arriving.wait(0, usual.driver.stream(urgent=True))
        while usual.driver.launched == []:
            usual.driver.step()
        assert len(usual.driver.launched) == 1
        usual.driver.held = False
        usual.driver.run()
        assert arriving.finish() == sum(COUNTS) * usual.layout.token_bytes


def test_a_late_layer_fails_the_whole_and_nothing_writes_afterwards(usual):
    usual.driver.held, usual.driver.patience = True, 1
    with pytest.raises(TimedOut, match="Try: compute it"):
        pull_pages(*usual.arguments(usual.pool, due_s=0.05))
    assert len(usual.driver.launched) == 3, "it was let go before the kernels were through with it"


def test_a_gpu_that_hangs_is_not_waited_for_and_keeps_what_it_may_touch(usual, monkeypatch):
    """Registered pages, the mapping, the columns: it may go on. Nothing is committed in that pool any more, and what its engine launches comes behind."""
    monkeypatch.setattr(paced, "HANG_S", 0.0)
    driver, waits = usual.driver, []
    driver.held, driver.patience, mapped = True, 99, len(usual.driver._mapped)
    monkeypatch.setattr(driver, "wait", lambda stream, event: waits.append((stream, event)))
    with pytest.raises(TimedOut, match="not finished what was launched"):
        pull_pages(*usual.arguments(usual.pool, due_s=0.05))
    assert driver.launched == [] and "not finished" in usual.pool.lost
    assert len(driver.held_pages) == 1 and len(driver._mapped) == mapped + 1 and waits[-1][0] == driver.current()
    word = memoryview(bytearray(8)).cast("Q")
    usual.pool.publish(word, 7)
    usual.reader.close()
    driver.held = False
    driver.run()  # it goes on after all, and reads what it was given
    assert len(driver.launched) == 3 and not word[0] and any(usual.bytes_of(usual.pool))
    driver.held_pages.clear()


def test_a_layer_that_cannot_be_launched_leaves_none_on_its_way(usual, monkeypatch):
    usual.driver.held = True
    launch, let_go, launched, before = usual.driver.launch, usual.driver.unregistered, [], len(usual.driver._mapped)

    def second_fails(*order) -> None:
        if launched:
            raise DeviceLost("out of launch resources. Try: another one")
        launched.append(launch(*order))

    def seen(memory: memoryview) -> None:
        assert len(usual.driver.launched) == 1, "a kernel still reads what is let go"
        let_go(memory)

    monkeypatch.setattr(usual.driver, "launch", second_fails)
    monkeypatch.setattr(usual.driver, "unregistered", seen)
    with pytest.raises(DeviceLost, match="launch resources"):
        pull_pages(*usual.arguments(usual.pool))
    assert len(launched) == 1 and len(usual.driver._mapped) == before and not usual.driver.held_pages


def test_a_deadline_that_is_over_launches_nothing(usual):
    for pool in (usual.pool, usual.host):
        with pytest.raises(TimedOut, match="Try: compute it"):
            pull_pages(*usual.arguments(pool, due_s=-1.0))
    assert usual.driver.launched == []


def test_a_gpu_that_is_lost_meanwhile_is_said(usual):
    with Arriving(*usual.arguments(usual.pool)) as arriving:
        usual.driver.lose("Xid 79")
        with pytest.raises(DeviceLost, match="Xid 79"):
            arriving.finish()
        usual.driver.lose("")


def test_an_arena_that_cannot_be_registered_is_pulled_in_batches(usual, monkeypatch):
    def refuse(memory: memoryview) -> int:
        raise Refused("read-only memory can't be registered here. Try: nothing")

    monkeypatch.setattr(usual.driver, "registered", refuse)
    assert pull_pages(*usual.arguments(usual.pool)) == pull_pages(*usual.arguments(usual.host))
    assert usual.bytes_of(usual.pool) == usual.bytes_of(usual.host)


def test_pages_that_lie_far_apart_are_pulled_in_batches(monkeypatch):
    monkeypatch.setattr("kvguard.engine.arriving.BATCH_BYTES", 1)
    monkeypatch.setattr("kvguard.engine.arriving.SPARSE_MAX", 1)
    made = Replica(LAYOUTS["usual"])
    with pytest.raises(Refused, match="scattered"):
        Arriving(*made.arguments(made.pool))
    assert pull_pages(*made.arguments(made.pool)) == pull_pages(*made.arguments(made.host))
    assert made.bytes_of(made.pool) == made.bytes_of(made.host)
    made.close()


def test_blocks_that_are_not_here_are_refused(usual):
    pool, reader, blocks, generations, counts, _, due = usual.arguments(usual.pool)
    with pytest.raises(Refused, match="outside"):
        pull_pages(pool, reader, blocks, generations, counts, [1, 12, 6], due)
