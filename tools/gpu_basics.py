"""The first minute on a GPU: every kind of call that the CUDA device makes, alone, the simple before the daring, so that one run says all that fails.

Knows: drivers, a small pool, another process. Must not know: rates, reports.
Invariants: one that fails never keeps the next from being tried; the name of each is said before it is tried, so that one that hangs is known; what a machine
may lack without fault (torch, read-only registration) is told as missing, not as a failure.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial

import msgspec
import numpy as np
from gpu_steps import Bench, Engine, NotRun, needed

from kvguard.device.virtual import Segment, created
from kvguard.errors import Refused
from kvguard.format.layout import Layout

SIZE = 1 << 20
WAIT_S = 20.0
POISON = 0xEE


def basics(bench: Bench) -> dict:
    """{what was tried: "ok", or what is missing}. Raises AssertionError that names all that failed."""
    found: dict[str, str] = {}
    for name, attempt in CHECKS.items():
        print(f"{name} ...", flush=True)
        try:
            found[name] = attempt(bench) or "ok"
        except NotRun as reason:
            found[name] = f"missing: {reason}"
        except Exception as error:  # said with all others at the end
            traceback.print_exc()
            found[name] = f"FAILED: {type(error).__name__}: {error}"[:400]
        print(f"{name}: {found[name]}", flush=True)
    failed = {name: why for name, why in found.items() if why.startswith("FAILED")}
    assert not failed, f"{len(failed)} of {len(found)}: {failed}"
    return found


def until(driver, event) -> None:
    deadline = time.monotonic() + WAIT_S
    while not driver.is_done(event):
        assert time.monotonic() < deadline, "an event was not reached"
        time.sleep(1e-4)


def fetched(driver, address: int, size: int) -> bytes:
    """What is there, by a copy of its own."""
    memory, pinned = driver.pinned(size)
    memory[:] = bytes([POISON]) * size
    stream = driver.stream(urgent=True)
    driver.copy(pinned, address, size, stream)
    driver.synchronise(stream)
    return bytes(memory)


def copies(bench: Bench) -> None:
    """Zeroed memory; to the device, within it, by rows, and back; all behind events of another stream."""
    driver, data = bench.driver, np.random.default_rng().bytes(SIZE)
    one, other = driver.allocate(SIZE), driver.allocate(SIZE)
    assert fetched(driver, one, SIZE) == bytes(SIZE), "memory isn't zeroed"
    bench.upload(one, np.frombuffer(data, np.uint8))
    streams = driver.stream(urgent=False), driver.stream(urgent=True)
    driver.copy(other, one, SIZE // 2, streams[0])
    driver.wait(streams[1], driver.record(streams[0]))
    driver.copy_rows(other + SIZE // 2, 256, one, 1024, 256, 64, streams[1])
    until(driver, driver.record(streams[1]))
    rows = b"".join(data[row * 1024 : row * 1024 + 256] for row in range(64))
    found = fetched(driver, other, SIZE)
    assert found[: SIZE // 2] == data[: SIZE // 2] and found[SIZE // 2 : SIZE // 2 + len(rows)] == rows, "other bytes came back"
    for address in (one, other):
        driver.free(address)


def allocations(bench: Bench) -> str:
    address = bench.driver.allocate(4 << 20)
    inside = bench.driver.allocation_of(address + 12345)
    assert inside.address <= address and inside.address + inside.size >= address + (4 << 20), inside
    assert bench.driver.virtual.chunk_of(address) is None, "memory of cudaMalloc is taken for virtual memory"
    bench.driver.free(address)
    return f"ok, exportable by handle: {inside.exportable}"


def words(bench: Bench, by_kernel: bool) -> str:
    """A stream's word in a registered page of a file that two processes share, as a commit table's."""
    driver, file = bench.driver, os.memfd_create("kvguard-gpu-basics")
    os.ftruncate(file, 3 * mmap.PAGESIZE)
    memory = mmap.mmap(file, 3 * mmap.PAGESIZE)
    page = memoryview(memory)[mmap.PAGESIZE : 2 * mmap.PAGESIZE]
    kept = driver.writes_words
    address = driver.registered(page)
    try:
        driver.writes_words = kept and not by_kernel
        stream = driver.stream(urgent=False)
        for value in (1, (1 << 63) + 5):
            driver.write_word(address + 64, value, stream)
            driver.synchronise(stream)
            assert int.from_bytes(page[64:72], "little") == value, f"{value} was written, {int.from_bytes(page[64:72], 'little')} is there"
    finally:
        driver.writes_words = kept
        driver.unregistered(page)
        os.close(file)
    return "ok" if by_kernel else f"ok, by the stream itself: {kept}"


def read_only(bench: Bench) -> str:
    """An arena as an engine maps it."""
    file = os.memfd_create("kvguard-gpu-basics")
    os.ftruncate(file, SIZE)
    os.pwrite(file, b"arena", 0)
    memory = memoryview(mmap.mmap(file, SIZE, prot=mmap.PROT_READ))
    os.close(file)
    try:
        address = bench.driver.registered(memory)
    except Refused as error:
        return f"missing: restores go in batches ({error})"
    assert fetched(bench.driver, address, 5) == b"arena"
    bench.driver.unregistered(memory)
    return "ok"


def kernels(bench: Bench) -> None:
    """Every width, gathered and scattered, in a pool of this process."""
    for head_dim, dtype in ((64, "float16"), (4, "float16"), (1, "float32"), (1, "float16"), (1, "int8")):
        layout = Layout.paged("basics", dtype, 2, 4, 4, 1, head_dim)
        pool = bench.device.allocate(layout)
        data = np.random.default_rng().bytes(2 * layout.block_bytes)
        pool.scatter_blocks([2, 0], memoryview(data))
        out = memoryview(bytearray(2 * layout.block_bytes))
        pool.capture_blocks([2, 0], out)
        assert out == data, f"{dtype} x {head_dim}: other bytes came back"
        pool.close()


def in_another_thread(bench: Bench) -> None:
    """A thread that has never seen CUDA, as a daemon's for a GPU."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            copies(bench)
            words(bench, by_kernel=True)
        except BaseException as error:  # raised again where it can be told
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def virtual(bench: Bench) -> str:
    """Memory by descriptor: made, exported, imported, mapped twice, read, taken down."""
    made = bench.driver.virtual
    descriptor, size = created(made, 100)
    again = os.dup(descriptor)
    first, second = Segment(made, [size], [[descriptor]]), Segment(made, [size], [[again]])
    bench.driver.clear(first.address, size)
    bench.upload(first.address, np.frombuffer(b"by descriptor", np.uint8))
    assert fetched(bench.driver, second.address, 13) == b"by descriptor", "two mappings of one memory differ"
    chunk = made.chunk_of(second.address + 4097)
    assert chunk is not None and (chunk.address, chunk.size, chunk.shareable) == (second.address, size, True), chunk
    for segment in (first, second):  # all of it was waited for
        segment.close()
    return f"ok, granularity {made.granularity}"


def other_process(bench: Bench, **how) -> None:
    """A pool of another process, read here; then that process is killed, and it is read again."""
    layout = Layout.paged("basics", "bfloat16", 2, 6, 4, 2, 8)
    with Engine() as engine:
        fds = engine.ask("allocate", kind=bench.kind, layout=msgspec.json.encode(layout).decode(), **how)[1]
        view = bench.device.open(layout, fds, writable=False)
        engine.ask("write", seed=3, slots=[0, 1, 2, 3], said=False)
        before, after = memoryview(bytearray(layout.block_bytes)), memoryview(bytearray(layout.block_bytes))
        view.capture_blocks([0], before)
        assert any(before), "nothing of what it wrote is seen"
        engine.kill()
        view.capture_blocks([0], after)
        assert after == before, "a dead process's memory has other bytes"
        view.close()


def torch_sees(bench: Bench) -> None:
    """A pool as torch's tensor, on torch's stream."""
    torch = of_cuda(bench)
    from kvguard.engine.tensors import tensor_of

    pool = bench.device.allocate(bench.layout(1))
    tensor = tensor_of(pool)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # some tens of ms of the GPU's time: what doesn't wait for this stream reads zeros
        tensor.fill_(9)
        assert fetched_by(pool) == bytes([9]) * pool.layout.block_bytes, "a capture ran before what torch had launched"
    torch.cuda.synchronize()
    pool.close()


def fetched_by(pool) -> bytes:
    out = memoryview(bytearray(pool.layout.block_bytes))
    pool.capture_blocks([0], out)
    return bytes(out)


def torch_graph(bench: Bench) -> None:
    """The gather as part of a CUDA graph, on a side stream that is forked and joined by events; meanwhile another thread makes calls that capturing forbids."""
    torch, driver = of_cuda(bench), bench.driver
    layout = Layout.paged("basics", "bfloat16", 2, 6, 4, 2, 8)
    pool, unit = bench.device.allocate(layout), layout.token_bytes
    slots, flat, side = driver.allocate(8), driver.allocate(unit), driver.stream(urgent=False)
    data = np.random.default_rng().bytes(layout.block_bytes)
    pool.scatter_blocks([3], memoryview(data))
    raised: list[BaseException] = []
    made: list[int] = []
    graph = torch.cuda.CUDAGraph()
    pool.current = lambda: torch.cuda.current_stream().cuda_stream
    with torch.cuda.graph(graph):
        refused_within(pool)
        stream = torch.cuda.current_stream().cuda_stream
        driver.wait(side, driver.record(stream))
        pool.launch(True, slots, 1, flat, side)
        driver.wait(stream, driver.record(side))
        thread = threading.Thread(target=partial(_beside, bench, made, raised))
        thread.start()
        thread.join()
    if raised:
        raise raised[0]
    for within in range(layout.block_tokens):
        bench.upload(slots, np.array([3 * layout.block_tokens + within], np.int64))
        graph.replay()
        torch.cuda.synchronize()
        assert fetched(driver, flat, unit) == data[within * unit : (within + 1) * unit], f"slot {within}: a replay gathered other bytes"
    for address in (slots, flat, *made):
        driver.free(address)
    pool.close()


def refused_within(pool) -> None:
    """What would otherwise become part of the graph, and end its capture."""
    try:
        pool.wrote([3], [0], [1])
    except Refused as error:
        assert "CUDA graph" in str(error), error
        return
    raise AssertionError("what a step wrote was taken within a capture")


def _beside(bench: Bench, made: list[int], raised: list[BaseException]) -> None:
    """What an engine's other threads do when its daemon comes back just then."""
    try:
        made.append(bench.driver.allocate(4096))
        memory = mmap.mmap(-1, mmap.PAGESIZE)
        bench.driver.registered(memoryview(memory))
        stream = bench.driver.stream(urgent=False)
        until(bench.driver, bench.driver.record(stream))
        bench.driver.unregistered(memoryview(memory))
    except BaseException as error:  # raised again where it can be told
        raised.append(error)


def of_cuda(bench: Bench):
    if bench.dry:
        raise NotRun("torch has no part in a dry run")
    torch = needed("torch")
    if not torch.cuda.is_available():
        raise NotRun("torch sees no GPU")
    return torch


CHECKS: dict[str, Callable[[Bench], str | None]] = {
    "copies": copies, "allocations": allocations, "kernels": kernels, "words by stream": partial(words, by_kernel=False),
    "words by kernel": partial(words, by_kernel=True), "another thread": in_another_thread, "read-only pages": read_only, "virtual memory": virtual,
    "another process, by handle": other_process, "another process, by descriptor": partial(other_process, chunks=2, offset=256), "torch": torch_sees,
    "in a graph": torch_graph,
}  # fmt: skip
