"""Restores layer by layer: each layer's event is behind its bytes and before the next one's; a deadline is kept."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from kvguard.device.cuda import CudaDevice
from kvguard.device.layered import LayeredRestore
from kvguard.device.rehearsal import Rehearsal
from kvguard.errors import Refused, TimedOut
from kvguard.format.layout import Layout
from kvguard.format.pages import page_bytes

LAYOUTS = {
    "usual": Layout.paged("m", "bfloat16", 3, 6, 4, 2, 8),
    "per layer": Layout.per_layer("m", "bfloat16", 3, 6, 4, 2, 8),
    "heads first": Layout.paged("m", "bfloat16", 3, 6, 4, 2, 8, order="layer,kv,block,head,slot,dim"),
}


class Arena:
    """Pages of an arena with noise, and a pool on a GPU that they are restored into."""

    def __init__(self, layout: Layout) -> None:
        self.driver = Rehearsal()
        self.pool = CudaDevice(lambda: (self.driver,)).allocate(layout)
        step, tokens = page_bytes(layout.shape()), layout.block_tokens
        self.memory = memoryview(mmap.mmap(-1, 6 * step))
        np.frombuffer(self.memory, np.uint8)[:] = np.random.default_rng(1).integers(0, 256, 6 * step, np.uint8)
        self.slots = np.array([0, 1, 2, 3, 20, 21])
        self.places = np.array([page * step + token * layout.token_bytes for page, token in [(5, 0), (5, 1), (5, 2), (5, 3), (2, 0), (2, 1)]])
        self.wanted = b"".join(self.memory[place : place + layout.token_bytes] for place in self.places.tolist())
        assert tokens == 4

    def now(self) -> bytes:
        out = memoryview(bytearray(len(self.wanted)))
        self.pool.capture([0, 5], [0, 0], [4, 2], out)
        return bytes(out)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_everything_is_there_in_the_end(layout):
    arena = Arena(layout)
    with LayeredRestore(arena.pool, arena.memory, arena.places, arena.slots, 5.0) as restore:
        restore.wait(0)
        restore.finish()
        assert restore.is_there(2)
    assert arena.now() == arena.wanted
    arena.pool.close()


def test_a_layer_is_there_before_the_next_one():
    arena = Arena(LAYOUTS["usual"])
    arena.driver.held = True
    restore = LayeredRestore(arena.pool, arena.memory, arena.places, arena.slots, 0.0)
    assert not restore.is_there(0)
    with pytest.raises(TimedOut, match="Try: compute"):
        restore.finish()
    while not restore.is_there(1):
        arena.driver.step()
    assert not restore.is_there(2)
    arena.driver.held = False
    restore.close()
    restore.close()
    assert arena.now() == arena.wanted
    arena.pool.close()


def test_places_outside_the_pages_are_refused():
    arena = Arena(LAYOUTS["usual"])
    for places in ([-16], [len(arena.memory) - 16], [8], [0, 0]):
        with pytest.raises(Refused, match="Try:"):
            LayeredRestore(arena.pool, arena.memory, np.array(places), np.array([0]), 1.0)
    arena.pool.close()


def test_memory_that_shares_a_page_with_registered_memory_is_refused_as_cuda_does():
    arena = Arena(LAYOUTS["usual"])
    first = LayeredRestore(arena.pool, arena.memory[:-8], arena.places, arena.slots, 5.0)
    kept = len(arena.driver._mapped)
    with pytest.raises(Refused, match="registered already"):
        LayeredRestore(arena.pool, arena.memory[64:], arena.places - 64, arena.slots, 5.0)
    assert len(arena.driver._mapped) == kept  # nothing of the second is left
    first.close()
    with LayeredRestore(arena.pool, arena.memory, arena.places, arena.slots, 5.0) as restore:
        restore.finish()
    assert arena.now() == arena.wanted
    arena.pool.close()
