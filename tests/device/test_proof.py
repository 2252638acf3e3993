"""A layout proved on a pool that is on a GPU (or rehearsed): what the engine's own code writes there, read back across the link."""

from __future__ import annotations

import numpy as np
import pytest

from kvguard.device import open_device, proof
from kvguard.device.cuda import CudaDevice
from kvguard.device.rehearsal import Rehearsal
from kvguard.errors import DeviceLost, Refused
from kvguard.format.layout import Layout

KINDS = ["rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {"layers": 2, "blocks": 40, "block_tokens": 16, "kv_heads": 4, "head_dim": 64}
SAID = Layout.paged("m", "float16", **SIZES)
OTHER = Layout.paged("m", "float16", **SIZES, order="layer,kv,block,head,slot,dim")


class Model:
    """An engine's code that writes a token where `real` says, with a stray byte at `stray`. Everything it does goes through the driver's stream."""

    def __init__(self, pool, real: Layout, stray: int = -1) -> None:
        self.pool, self.real, self.stray = pool, real, stray
        self.memory, self.pinned = pool.driver.pinned(real.token_bytes)
        np.frombuffer(self.memory, np.uint8)[:] = np.random.default_rng(5).integers(1, 255, real.token_bytes)

    def write(self, block: int, slot: int) -> None:
        at, stream = 0, self.pool.current()
        for offset, size in self.real.ranges(block, slot):
            self.pool.driver.copy(self.pool.address + offset, self.pinned + at, size, stream)
            at += size
        if self.stray >= 0:
            self.pool.driver.copy(self.pool.address + self.stray, self.pinned, 1, stream)


def noise(pool) -> bytes:
    data = np.random.default_rng(4).integers(0, 256, pool.layout.pool_bytes, np.uint8)
    pool.poke(0, data)
    return data.tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_layout_that_is_right_is_proved_and_nothing_is_changed(kind):
    pool = open_device(kind).allocate(SAID)
    kept = noise(pool)
    proof.prove(SAID, pool, Model(pool, SAID).write, block=7)
    assert pool.peek(0, SAID.pool_bytes).tobytes() == kept
    pool.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["other order", "silent", "beside it", "far away"])
def test_a_layout_that_is_wrong_is_refused(kind, fault):
    pool = open_device(kind).allocate(SAID)
    noise(pool)
    named = next(iter(SAID.ranges(7, 0)))
    stray = {"beside it": sum(named), "far away": SAID.pool_bytes - 1}.get(fault, -1)
    write = Model(pool, OTHER if fault == "other order" else SAID, stray).write
    with pytest.raises(Refused, match="Try:"):
        proof.prove(SAID, pool, (lambda *_: None) if fault == "silent" else write, block=7)
    pool.close()


def test_of_a_large_pool_a_part_is_looked_at(monkeypatch):
    """All that is named, what lies beside it, and no more than may be read."""
    large = Layout.paged("m", "float16", **SIZES | {"blocks": 400})
    monkeypatch.setattr(proof, "LOOKED_BYTES_MAX", 128 << 10)
    pool = CudaDevice(lambda: (Rehearsal(),)).allocate(large)
    noise(pool)
    read: list[int] = []
    peek = pool.peek
    pool.peek = lambda at, size: read.append(size) or peek(at, size)
    proof.prove(large, pool, Model(pool, large).write, block=100)
    assert sum(read) < large.pool_bytes  # all of it, for two slots and two fills, before and after, would be eight times as much
    named = next(iter(large.ranges(100, 0)))
    with pytest.raises(Refused, match="doesn't name"):
        proof.prove(large, pool, Model(pool, large, (named[0] & -proof.CHUNK_BYTES) - 1).write, block=100)
    pool.close()


def test_a_proof_on_a_lost_gpu_proves_nothing():
    driver = Rehearsal()
    pool = CudaDevice(lambda: (driver,)).allocate(SAID)

    def write(block: int, slot: int) -> None:
        driver.lose("Xid 63")

    with pytest.raises(DeviceLost, match="Xid 63"):
        proof.prove(SAID, pool, write)
    pool.close()
