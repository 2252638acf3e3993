"""The steps of the GPU check, one function each: what is promised is asserted, what is measured is returned.

Knows: the CUDA device's own parts, another process beside this one (tests/device/exporter.py). Must not know: reports.
Invariants: outputs are poisoned before they are filled, inputs are fresh random bytes; a rate is bytes over the time of many rounds between two
synchronisations, and the limit that it is compared with is measured in the same run; sizes of a dry run are tiny, everything else is the same.
"""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from kvguard.device import kernels, open_device
from kvguard.device.extents import PIECE_BYTES_MAX
from kvguard.device.host import Copies
from kvguard.device.layered import LayeredRestore
from kvguard.errors import Refused
from kvguard.format.layout import Layout
from kvguard.format.pages import PageReader, pack_sums, page_bytes, sums_of

ROOT = Path(__file__).resolve().parent.parent
BATCHES = 5
TEST_S = 100  # the longest that one test may take: the others run, then
TOGETHER = 4  # tests at a time, where pytest-xdist is there
EXPORTER = ROOT / "tests" / "device" / "exporter.py"


class NotRun(Exception):
    """Why a step can't be run here."""


class Bench:
    """The device under test. `dry`: host memory in the GPU's place. Raises KvguardError where there is no GPU that works."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.kind = "rehearsal" if dry else "cuda"
        self.selected = ("-k", "rehearsal") if dry else ("-m", "gpu")  # of the tests that are run
        self.device = open_device(self.kind)
        self.driver = self.device.driver()
        self.name, self.uuid = self.driver.name, self.driver.uuid

    def layout(self, blocks: int, order: str = "layer,kv,block,slot,head,dim") -> Layout:
        """An 8B model's shape; of a dry run a toy's."""
        if self.dry:
            return Layout.paged("8b", "bfloat16", 2, min(blocks, 32), 4, 2, 8, order=order)
        return Layout.paged("8b", "bfloat16", 32, blocks, 16, 8, 128, order=order)

    def rate(self, work: Callable[[object], None], size: int, rounds: int = 20) -> float:
        """GB/s of `work(stream)`, which moves `size` bytes: the median of some batches of `rounds`."""
        stream, rates = self.driver.stream(urgent=True), []
        rounds = 1 if self.dry else rounds
        work(stream)
        self.driver.synchronise(stream)
        for _ in range(1 if self.dry else BATCHES):
            began = time.perf_counter()
            for _ in range(rounds):
                work(stream)
            self.driver.synchronise(stream)
            rates.append(size * rounds / (time.perf_counter() - began) / 1e9)
        return round(float(np.median(rates)), 2)

    def upload(self, address: int, values: np.ndarray) -> None:
        """`values` are at `address` of the device when this returns."""
        host, pinned = self.driver.pinned(values.nbytes)
        np.frombuffer(host, values.dtype)[: values.size] = values
        stream = self.driver.stream(urgent=True)
        self.driver.copy(address, pinned, values.nbytes, stream)
        self.driver.synchronise(stream)

    def free_bytes(self) -> int:
        """Of the GPU's memory; 0 in a dry run."""
        if self.dry:
            return 0
        import cupy

        return int(cupy.cuda.runtime.memGetInfo()[0])


class Engine:
    """Another process with a pool."""

    def __init__(self) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen([sys.executable, EXPORTER, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self.line = mine

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_) -> None:
        self.kill()
        self.line.close()

    def ask(self, do: str, **arguments) -> tuple[dict, list[int]]:
        socket.send_fds(self.line, [json.dumps({"do": do, **arguments}).encode()], [])
        packet, fds, _, _ = socket.recv_fds(self.line, 1 << 20, 4)
        answer = json.loads(packet)
        if "refused" in answer:
            raise Refused(answer["refused"])
        return answer, list(fds)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


def tested(*arguments: str) -> dict:
    """A run of pytest in a process of its own: {passed: n}."""
    together = ["-n", str(TOGETHER)] if importlib.util.find_spec("xdist") is not None else []  # most of a test is processes that start
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-v", "--tb=short", f"--timeout={TEST_S}", *together, *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "KVGUARD_OTHERS_WORK_HERE": "1"}  # others' mounts and shared memory are no failure of this GPU's
    said = b""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as pytest:
        while some := pytest.stdout.read1(1 << 16):  # passed on as it comes: were this ended, it would be known which test it was
            sys.stdout.buffer.write(some)
            sys.stdout.buffer.flush()
            said += some
    lines = said.decode(errors="replace").strip().splitlines() or ["no output"]
    assert pytest.returncode == 0 and " passed" in lines[-1], "\n".join(lines)[-2000:]
    return {"pytest": lines[-1].strip("= ")}


def kernels_compile(bench: Bench) -> dict:
    """The source, for this GPU; in a dry run, that it is there."""
    assert "kvg_gather_16" in kernels.source()
    if bench.dry:
        return {}
    began = time.perf_counter()
    bench.driver.compile()
    return {"compile_ms": round(1000 * (time.perf_counter() - began), 1), "stream_writes_words": bench.driver.writes_words}


def contracts(bench: Bench) -> dict:
    """The device's contract, the tests of two real processes that share a pool, torch's tensors over one; that every call of the libraries is there."""
    device = (f"tests/device/test_{name}.py" for name in ("cuda", "virtual", "proof"))
    names = ("tests/contracts/test_device.py", *device, "tests/pipeline/test_on_a_gpu.py")
    found = tested(*names, *bench.selected)
    return found if bench.dry else {**found, "calls_and_arguments": tested("tests/device/test_cupy_signatures.py")["pytest"]}


def daemons(bench: Bench) -> dict:
    """Real daemons, an engine that is killed, a standby, memory that outlives its engine: every byte where it was."""
    return tested("tests/e2e/test_gpu_pools.py", "tests/e2e/test_lent_pools.py", *bench.selected)


def torch_pools(bench: Bench) -> dict:
    """A tensor of torch's own allocator is exported by its offset; expandable segments by descriptor, or refused with what to set."""
    layout = bench.layout(64)
    if bench.dry:
        address = bench.driver.allocate(layout.pool_bytes + 512)
        bench.device.share(layout, address + 512).close()
        refused = bench.device.share(layout, bench.driver.allocate(layout.pool_bytes, exportable=False))
    else:
        torch = needed("torch")
        from kvguard.engine.tensors import tensor_of

        before = torch.empty(1 << 20, device="cuda")  # what comes next stands behind it in a segment
        tensor = torch.zeros(layout.pool_bytes, dtype=torch.uint8, device="cuda")
        shared = bench.device.share(layout, tensor.data_ptr())
        for descriptor in shared.export():
            os.close(descriptor)
        shared.close()
        seen = tensor_of(bench.device.allocate(layout))  # and the other way round: our pool, torch's tensor
        seen[-64:] = 7
        assert seen.device == tensor.device and seen.numel() == layout.pool_bytes and before.numel()
        torch.cuda.synchronize()
        setting = getattr(torch.cuda.memory, "_set_allocator_settings", None) or torch._C._accelerator_setAllocatorSettings
        setting("expandable_segments:True")
        expandable = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        setting("expandable_segments:False")
        refused = bench.device.share(bench.layout(1), expandable.data_ptr())
    how = "by descriptor"
    try:
        for descriptor in refused.export():
            os.close(descriptor)
    except Refused as error:
        assert "expandable_segments" in str(error)
        how = f"refused: {error}"
    finally:
        refused.close()
    return {"export": "by offset", "expandable_segments": how}


def survival(bench: Bench) -> dict:
    """A mapping after SIGKILL of its exporter: still there, byte for byte? And the memory, is it free once the mapping is closed?"""
    from tests.device.exporter import values_of

    layout = bench.layout(64)
    before = bench.free_bytes()
    with Engine() as engine:
        fds = engine.ask("allocate", kind=bench.kind, layout=msgspec.json.encode(layout).decode())[1]
        other = before - bench.free_bytes() - layout.pool_bytes  # its context, a few MB of columns and tables beside it
        view = bench.device.open(layout, fds, writable=False)
        slots = list(range(layout.block_tokens))
        engine.ask("write", seed=9, slots=slots, said=False)
        engine.kill()
        out = memoryview(bytearray(layout.block_bytes))
        view.capture_blocks([0], out)
        unit = view.plan.unit_bytes
        assert all(bytes(out[slot * unit : (slot + 1) * unit]) == values_of(9, slot, unit) for slot in slots), "the mapping's bytes are gone"
        view.close()
    leaked = before - bench.free_bytes()
    return {"mapping": "survives", "not_free_after_close_bytes": leaked, "context_of_a_process_on_gpu_bytes": other}


def correctness(bench: Bench) -> dict:
    """Gather and scatter of random slots of random bytes, on three layouts, against the host's copies; what nobody named stays poisoned."""
    random, checked = np.random.default_rng(), 0
    for order in ("layer,kv,block,slot,head,dim", "layer,kv,block,head,slot,dim", "block,layer,kv,slot,head,dim"):
        layout = bench.layout(128, order)
        pool = bench.device.allocate(layout)
        memory, pinned = bench.driver.pinned(layout.pool_bytes)
        here = np.frombuffer(memory, np.uint8)
        here[:] = np.frombuffer(random.bytes(layout.pool_bytes), np.uint8)
        stream = bench.driver.stream(urgent=True)
        bench.driver.copy(pool.address, pinned, layout.pool_bytes, stream)
        bench.driver.synchronise(stream)
        oracle = Copies(layout, memory)
        slots = random.permutation(layout.blocks * layout.block_tokens)[: 300 if not bench.dry else 20]
        columns = slots // layout.block_tokens, slots % layout.block_tokens, np.ones_like(slots)
        size = slots.size * layout.token_bytes
        found, wanted = memoryview(bytearray(b"\xee" * (size + 64))), memoryview(bytearray(b"\xee" * (size + 64)))
        pool.capture(*columns, found)
        oracle.capture(*columns, wanted)
        assert found == wanted, f"gather differs on {order}"
        fresh = memoryview(random.bytes(size))
        pool.scatter(*columns, fresh)
        oracle.scatter(*columns, fresh)
        expected = here.copy()
        here[:] = 0xEE
        bench.driver.copy(pinned, pool.address, layout.pool_bytes, stream)
        bench.driver.synchronise(stream)
        assert np.array_equal(here, expected), f"scatter differs on {order}"
        checked += 2 * size
        pool.close()
    return {"bytes_compared": checked}


def bandwidth(bench: Bench) -> dict:
    """GB/s of what a step does, and of the limits of this very run. 256 slots are 32 MiB of an 8B model; kernels alone are also given 16 times that."""
    driver, layout = bench.driver, bench.layout(4096)
    pool, tokens = bench.device.allocate(layout), 16 if bench.dry else 256
    most = tokens if bench.dry else 16 * tokens
    size, size_most = tokens * layout.token_bytes, most * layout.token_bytes
    flat, other, slots = driver.allocate(size_most), driver.allocate(size_most), driver.allocate(8 * most)
    host, pinned = driver.pinned(size)
    chosen = np.random.default_rng().permutation(layout.blocks * layout.block_tokens)[:most]
    bench.upload(slots, chosen.astype(np.int64))

    def step(stream) -> None:
        pool.launch(True, slots, tokens, flat, stream)
        for first in range(0, size, PIECE_BYTES_MAX):
            driver.copy(pinned + first, flat + first, min(PIECE_BYTES_MAX, size - first), stream)

    found = {
        "pinned_d2h_gb_s": bench.rate(lambda stream: driver.copy(pinned, flat, size, stream), size),
        "pinned_h2d_gb_s": bench.rate(lambda stream: driver.copy(flat, pinned, size, stream), size),
        "gather_and_d2h_of_256_gb_s": bench.rate(step, size),
        "device_to_device_gb_s": bench.rate(lambda stream: driver.copy(other, flat, size_most, stream), size_most),
    }  # fmt: skip
    for verb, gather in (("gather", True), ("scatter", False)):
        for count in (tokens, most):
            found[f"{verb}_of_{count}_gb_s"] = bench.rate(lambda stream, g=gather, n=count: pool.launch(g, slots, n, flat, stream), count * layout.token_bytes)
    found["gather_and_d2h_to_limit"] = round(found["gather_and_d2h_of_256_gb_s"] / found["pinned_d2h_gb_s"], 3)
    for address in (flat, other, slots):
        driver.free(address)
    pool.close()
    host.release()
    return found


def restore(bench: Bench) -> dict:
    """64 sequences of 2,000 tokens out of mapped host pages, layer by layer, against a pinned copy in this run; then a pull as an engine does it."""
    sequences, tokens = (2, 8) if bench.dry else (64, 2000)
    layout = bench.layout(sequences * tokens // 16 + 64)
    total = min(sequences * tokens, layout.blocks * layout.block_tokens)
    unit, random = layout.token_bytes, np.random.default_rng()
    pool, source = bench.device.allocate(layout), memoryview(bytearray(min(total, 16384) * unit))  # pages are read again where the host has less than 16 GB
    some = np.frombuffer(random.bytes(1 << 20), np.uint8)
    np.frombuffer(source, np.uint8)[:] = np.resize(some, source.nbytes)
    places = random.permutation(np.arange(total) % (source.nbytes // unit)) * unit
    began = time.perf_counter()
    address = bench.driver.registered(source)
    registered = time.perf_counter()
    with LayeredRestore(pool, source, places, np.arange(total), 60.0, address) as restoring:
        restoring.finish()
        ended = time.perf_counter()
    bench.driver.unregistered(source)
    for slot in random.permutation(total)[:64].tolist():
        out = memoryview(bytearray(unit))
        pool.capture([slot // layout.block_tokens], [slot % layout.block_tokens], [1], out)
        assert out == source[places[slot] : places[slot] + unit], f"slot {slot} isn't what its page has"
    size = min(64 << 20, total * unit)
    host, pinned = bench.driver.pinned(size)
    limit = bench.rate(lambda stream: bench.driver.copy(pool.address, pinned, size, stream), size)
    rate = total * unit / (ended - registered) / 1e9
    found = {
        "bytes": total * unit, "register_ms": round(1000 * (registered - began), 1), "restore_ms": round(1000 * (ended - registered), 1),
        "restore_gb_s": round(rate, 2), "pinned_h2d_gb_s": limit, "restore_to_limit": round(rate / limit, 3), **pulled(bench, pool, layout),
    }  # fmt: skip
    host.release()
    pool.close()
    return found


def pulled(bench: Bench, pool, layout: Layout) -> dict:
    """A replica's pages out of an arena that is mapped read-only, as an engine pulls them: verified, registered, layer by layer; and in batches beside it."""
    from kvguard.engine import arriving, pull

    shape, blocks = layout.shape(), list(range(4 if bench.dry else 512))
    data = np.random.default_rng().bytes(shape.block_bytes)
    page = data + (7).to_bytes(8, "little") + pack_sums(sums_of(memoryview(data), shape.token_bytes))
    fd = os.memfd_create("kvguard-gpu-check")
    try:
        os.ftruncate(fd, shape.blocks * page_bytes(shape))
        for block in blocks:
            os.pwrite(fd, page, block * page_bytes(shape))
        arguments = blocks, [7] * len(blocks), [shape.block_tokens] * len(blocks), blocks[::-1]
        found: dict[str, object] = {"pull_bytes": len(blocks) * shape.block_bytes}
        with PageReader(fd, shape) as reader:
            began = time.perf_counter()
            try:
                with arriving.Arriving(pool, reader, *arguments, time.monotonic() + 60) as coming:
                    launched = time.perf_counter()
                    coming.finish()
                found |= {"pull_verify_and_register_ms": round(1000 * (launched - began), 1), "pull_layered_ms": round(1000 * (time.perf_counter() - began), 1)}
            except Refused as error:  # a driver may not register read-only memory: engines then pull in batches
                found["pull_layered_refused"] = str(error)
            for verb, whole in (("layered", pull.pull_pages), ("batched", batched)):
                pool.scatter_blocks(blocks, memoryview(bytes(len(blocks) * shape.block_bytes)))  # nothing of what came before is left
                began = time.perf_counter()
                whole(pool, reader, *arguments, time.monotonic() + 60)
                found[f"pull_pages_{verb}_ms"] = round(1000 * (time.perf_counter() - began), 1)
                out = memoryview(bytearray(shape.block_bytes))
                pool.capture_blocks([blocks[-1]], out)
                assert out == data, f"a pull ({verb}) brought other bytes"
    finally:
        os.close(fd)
    return found


def batched(pool, reader: PageReader, blocks, generations, counts, here, due: float) -> None:
    """What pull_pages does where an arena can't be read in place."""
    for first in range(0, len(blocks), 8):
        part = slice(first, first + 8)
        data = b"".join(reader.page(*piece) for piece in zip(blocks[part], generations[part], counts[part], strict=True))
        pool.scatter(here[part], [0] * len(counts[part]), counts[part], memoryview(data))


def salvage(bench: Bench) -> dict:
    """What a killed engine had committed, into host memory: how long, and that none of it is missing; what the daemon's side of it takes of the GPU."""
    layout = bench.layout(1024)
    blocks = [list(range(n, n + 8)) for n in range(0, layout.blocks // 2, 8)]
    with Engine() as engine:
        fds = engine.ask("allocate", kind=bench.kind, layout=msgspec.json.encode(layout).decode())[1]
        before = bench.free_bytes()
        view = bench.device.open(layout, fds, writable=False)
        taken = before - bench.free_bytes()
        engine.kill()
    began = time.perf_counter()
    saved, whole = view.salvage(blocks, 10_000)
    seconds = time.perf_counter() - began
    assert whole == len(blocks), f"{whole} of {len(blocks)} sequences"
    size = sum(map(len, blocks)) * layout.block_bytes
    saved.close()
    return {"bytes": size, "salvage_ms": round(1000 * seconds, 1), "gb_s": round(size / seconds / 1e9, 2), "daemon_ring_and_staging_on_gpu_bytes": taken}


def needed(name: str):
    """A package that a step can't do without."""
    try:
        return __import__(name)
    except ImportError as error:
        raise NotRun(f"{name} isn't installed: {error}") from error


STEPS: dict[str, Callable[[Bench], dict]] = {
    "kernels": kernels_compile, "contracts": contracts, "daemons": daemons, "torch": torch_pools, "survival": survival, "correctness": correctness,
    "bandwidth": bandwidth, "restore": restore, "salvage": salvage,
}  # fmt: skip
