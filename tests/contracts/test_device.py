"""What every device keeps to (device/base.py), over many layouts. A new device joins DEVICES."""

from __future__ import annotations

import fcntl
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.device import open_device
from kvguard.device.proof import prove
from kvguard.errors import BadConfig, Refused
from kvguard.format.layout import Layout

DEVICES = ["host", "rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)]
TENSOR = ["layer", "kv", "block", "slot", "head", "dim"]


@st.composite
def layouts(draw) -> Layout:
    sizes = {"layers": draw(st.integers(1, 3)), "blocks": draw(st.integers(1, 4)), "block_tokens": draw(st.integers(1, 4))}
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float8_e5m2"]))
    kind = draw(st.sampled_from(["paged", "per_layer", "apart", "offsets", "latent", "opaque"]))
    if kind == "latent":
        order = draw(st.sampled_from(["layer,block,slot,dim", "block,slot,dim", "block,dim,slot"]))
        return Layout.latent("m", dtype, **sizes, latent_dim=draw(st.integers(1, 5)), order=order)
    if kind == "opaque":
        return Layout.opaque("m", dtype, **sizes, page_bytes=draw(st.integers(1, 40)))
    sizes |= {"kv_heads": draw(st.integers(1, 3)), "head_dim": draw(st.integers(1, 5))}
    if kind == "paged":
        return Layout.paged("m", dtype, **sizes, order=",".join(draw(st.permutations(TENSOR)))).with_offset(draw(st.integers(0, 9)))
    names = TENSOR[1:] if kind == "per_layer" else TENSOR[2:]
    if kind == "offsets":
        names = TENSOR[1:]
        dense = Layout.per_layer("m", dtype, **sizes, order=",".join(names))
        step = dense.pool_bytes + draw(st.integers(0, 7))
        return Layout.per_layer("m", dtype, **sizes, order=",".join(names), offsets=tuple(3 + step * layer for layer in reversed(range(sizes["layers"]))))
    return Layout.per_layer("m", dtype, **sizes, order=",".join(draw(st.permutations(names))))


def named(layout: Layout, pieces) -> np.ndarray:
    """Byte numbers of the pieces, in canonical order."""
    tokens = [(block, slot) for block, start, count in pieces for slot in range(start, start + count)]
    ranges = [range(offset, offset + size) for block, slot in tokens for offset, size in layout.ranges(block, slot)]
    return np.array([byte for part in ranges for byte in part], dtype=np.int64)


def content(pool) -> np.ndarray:
    """The pool's bytes as they are now."""
    if hasattr(pool, "memory"):
        return np.frombuffer(pool.memory, np.uint8).copy()
    return moved(pool, None)


def noise(pool, seed: int) -> np.ndarray:
    """Fills the pool; returns its bytes."""
    values = np.random.default_rng(seed).integers(0, 256, pool.layout.pool_bytes, dtype=np.uint8)
    if hasattr(pool, "memory"):
        np.frombuffer(pool.memory, np.uint8)[:] = values
        return values
    return moved(pool, values)


def moved(pool, values: np.ndarray | None) -> np.ndarray:
    """Between a GPU's pool and host memory, without the kernels."""
    memory, address = pool.driver.pinned(pool.layout.pool_bytes)
    stream, here = pool.driver.stream(urgent=True), np.frombuffer(memory, np.uint8)
    if values is not None:
        here[:] = values
    ways = (pool.address, address) if values is not None else (address, pool.address)
    pool.driver.copy(*ways, pool.layout.pool_bytes, stream)
    pool.driver.synchronise(stream)
    return here.copy()


@pytest.mark.parametrize("kind", DEVICES)
@settings(max_examples=120, deadline=None)
@given(data=st.data(), layout=layouts())
def test_capture_then_scatter_moves_the_named_bytes_and_no_others(kind, data, layout):
    device = open_device(kind)
    source, target = device.allocate(layout), device.allocate(layout)
    from_memory, to_memory = noise(source, 1), noise(target, 2)
    before = to_memory.copy()
    if layout.addressable and data.draw(st.booleans()):
        tokens = layout.block_tokens
        piece = st.integers(0, tokens - 1).flatmap(lambda start: st.tuples(st.integers(0, layout.blocks - 1), st.just(start), st.integers(0, tokens - start)))
        pieces = data.draw(st.lists(piece, max_size=6))
        columns = [list(column) for column in zip(*pieces, strict=True)] or [[], [], []]
        size = sum(columns[2]) * layout.token_bytes
        out = memoryview(bytearray(size + 5))
        assert source.capture(*columns, out) == size
        target.scatter(*columns, out[:size])
        bytes_named = named(layout, pieces)
    else:
        blocks = data.draw(st.lists(st.integers(0, layout.blocks - 1), max_size=4))
        size = len(blocks) * layout.block_bytes
        out = memoryview(bytearray(size + 5))
        assert source.capture_blocks(np.array(blocks, dtype=np.int64), out) == size
        target.scatter_blocks(blocks, out[:size])
        bytes_named = named(layout, [(block, 0, layout.block_tokens if layout.addressable else 1) for block in blocks])
    assert bytes(out[:size]) == from_memory[bytes_named].tobytes() and bytes(out[size:]) == bytes(5)
    before[bytes_named] = from_memory[bytes_named]
    assert np.array_equal(content(target), before) and np.array_equal(content(source), from_memory)
    source.close()
    target.close()


@pytest.mark.parametrize("kind", DEVICES)
def test_canonical_bytes_do_not_depend_on_strides(kind):
    device = open_device(kind)
    sizes = {"layers": 2, "blocks": 3, "block_tokens": 4, "kv_heads": 2, "head_dim": 8}
    made = [Layout.paged("m", "float16", **sizes, order=order) for order in ("layer,kv,block,slot,head,dim", "block,head,slot,kv,dim,layer")]
    made.append(Layout.per_layer("m", "float16", **sizes))
    wanted = None
    for layout in made:
        pool = device.allocate(layout)
        if wanted is None:
            noise(pool, 3)
            wanted = bytearray(7 * layout.token_bytes)
            pool.capture([2, 0], [0, 1], [4, 3], memoryview(wanted))
        pool.scatter([2, 0], [0, 1], [4, 3], memoryview(wanted))
        out = bytearray(len(wanted))
        pool.capture([2, 0], [0, 1], [4, 3], memoryview(out))
        assert out == wanted
        pool.close()


@pytest.mark.parametrize("kind", DEVICES)
def test_lent_memory_is_one_memory_for_all_who_open_it_and_outlives_each(kind):
    layout, device = Layout.paged("m", "float16", 2, 3, 4, 1, 2), open_device(kind)
    lent = device.lend(layout)
    view = device.open(layout, [os.dup(fd) for fd in lent], writable=False)  # as a daemon has it
    engine = device.open(layout, lent)
    wanted = bytes(range(layout.block_bytes % 256)) * 8
    engine.scatter_blocks([1], memoryview(wanted[: layout.block_bytes]))
    engine.close()
    out = memoryview(bytearray(layout.block_bytes))
    assert view.capture_blocks([1], out) == layout.block_bytes and bytes(out) == wanted[: layout.block_bytes]
    successor = device.open(layout, view.export())
    view.close()
    out[:] = bytes(len(out))
    successor.capture_blocks([1], out)
    assert bytes(out) == wanted[: layout.block_bytes]
    successor.close()
    with pytest.raises(BadConfig):
        device.lend(Layout.paged("m", "float16", 1, 0, 4, 1, 2))


@pytest.mark.parametrize("kind", DEVICES)
def test_pieces_outside_the_pool_are_refused_before_a_byte_moves(kind):
    layout = Layout.paged("m", "float16", 1, 3, 4, 1, 2)
    pool = open_device(kind).allocate(layout)
    out = memoryview(bytearray(1000))
    for pieces in [([3], [0], [1]), ([-1], [0], [1]), ([0], [2], [3]), ([0], [-1], [2]), ([0], [1], [-1])]:
        with pytest.raises(Refused):
            pool.capture(*pieces, out)
        with pytest.raises(Refused):
            pool.scatter(*pieces, out)
    with pytest.raises(Refused):
        pool.capture_blocks([3], out)
    with pytest.raises(Refused):
        pool.capture([0], [0], [4], out[:10])
    with pytest.raises(Refused):
        pool.scatter([0], [0], [1], out[:9])
    assert not any(out) and not content(pool).any()
    pool.close()


@pytest.mark.parametrize("kind", ["host"])  # of a GPU's: tests/device/test_cuda.py, with two processes
def test_another_process_s_pool_is_the_same_memory(kind):
    device = open_device(kind)
    layout = Layout.paged("m", "float16", 1, 3, 4, 1, 2)
    pool = device.allocate(layout)
    other = device.open(layout, pool.export())
    other.scatter([1], [0], [1], memoryview(b"\5" * layout.token_bytes))
    pool.close()
    out = bytearray(layout.token_bytes)
    other.capture([1], [0], [1], memoryview(out))
    assert bytes(out) == b"\5" * layout.token_bytes
    other.close()
    other.close()


@pytest.mark.parametrize("kind", ["host"])  # of a GPU's: tests/device/test_cuda.py, with two processes
def test_descriptors_that_do_not_fit_are_refused_and_closed(kind):
    device = open_device(kind)
    layout = Layout.paged("m", "float16", 1, 3, 4, 1, 2)

    def memfd(size: int, seals: int) -> int:
        descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
        return descriptor

    small, loose = memfd(layout.pool_bytes - 1, fcntl.F_SEAL_SHRINK), memfd(layout.pool_bytes, 0)
    pipe = os.pipe()
    os.close(pipe[1])
    for descriptors in [[small], [loose], [pipe[0]]]:
        with pytest.raises(Refused):
            device.open(layout, descriptors)
        with pytest.raises(OSError):
            os.fstat(descriptors[0])
    with pytest.raises(Refused):
        device.open(layout, [])


@pytest.mark.parametrize("kind", DEVICES)
def test_where_memory_is_is_known_before_it_is_opened(kind):
    """Whose thread it is that opens or makes it. The descriptors stay the caller's."""
    device, layout = open_device(kind), Layout.paged("m", "float16", 1, 3, 4, 1, 2)
    gpu = "" if kind == "host" else device.driver().uuid
    pool, host = device.allocate(layout), open_device("host").allocate(layout)
    exported, of_host = pool.export(), host.export()
    assert device.where(exported) == device.lends_on() == device.lends_on(gpu) == gpu
    assert device.where(of_host) == device.where([]) == ""
    if gpu:
        with pytest.raises(Refused, match="GPU-of-another-host"):
            device.lends_on("GPU-of-another-host")
    for descriptor in (*exported, *of_host):
        os.close(descriptor)
    pool.close()
    host.close()


def test_a_word_is_published():
    word = memoryview(bytearray(16))
    pool = open_device("host").allocate(Layout.paged("m", "float16", 1, 1, 1, 1, 1))
    pool.publish(word[8:16], 1 << 40)
    assert bytes(word) == bytes(8) + (1 << 40).to_bytes(8, "little")
    pool.close()


def test_a_kind_that_is_not_there_is_told():
    with pytest.raises(BadConfig, match="Try:"):
        open_device("abacus")


@pytest.mark.parametrize("fault", ["none", "other order", "other slot", "stray", "far stray", "silent"])
@pytest.mark.parametrize("addressable", [True, False])
def test_a_layout_is_proved_by_what_the_engine_writes(fault, addressable):
    sizes = {"layers": 2, "blocks": 3, "block_tokens": 4, "kv_heads": 2, "head_dim": 8}
    layout = Layout.paged("m", "float16", **sizes) if addressable else Layout.opaque("m", "float16", 2, 300, 4, 512)
    real = Layout.paged("m", "float16", **sizes, order="layer,kv,block,head,slot,dim") if fault == "other order" and addressable else layout
    pool = open_device("host").allocate(layout)
    kept = noise(pool, 4)
    memory = np.frombuffer(pool.memory, np.uint8)

    def write_token(block: int, slot: int) -> None:
        if fault == "silent":
            return
        shifted = (block + 1) % layout.blocks if fault == "other slot" or (fault == "other order" and not addressable) else block
        for offset, size in real.ranges(shifted, slot if addressable else 0):
            memory[offset : offset + size] = slot + 1
        if fault.endswith("stray"):
            memory[0 if fault == "stray" else -1] ^= 1

    if fault == "none":
        prove(layout, pool.memory, write_token, block=1)
        assert np.array_equal(memory, kept)
    else:
        with pytest.raises(Refused, match="Try:"):
            prove(layout, pool.memory, write_token, block=1)
    del memory
    pool.close()
