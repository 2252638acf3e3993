"""The steps of the GPU check, one function each: what is promised is asserted, what is measured is returned.

Knows: the CUDA device's own parts, another process beside this one (tests/device/exporter.py). Must not know: reports.
Invariants: outputs are poisoned before they are filled, inputs are fresh random bytes; a rate is bytes over the time of many rounds between two
synchronisations, and the limit that it is compared with is measured in the same run; sizes of a dry run are tiny, everything else is the same.
"""

from __future__ import annotations

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

ROOT = Path(__file__).resolve().parent.parent
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
        """GB/s of `work(stream)`, which moves `size` bytes."""
        stream = self.driver.stream(urgent=True)
        work(stream)
        self.driver.synchronise(stream)
        began = time.perf_counter()
        for _ in range(1 if self.dry else rounds):
            work(stream)
        self.driver.synchronise(stream)
        return round(size * (1 if self.dry else rounds) / (time.perf_counter() - began) / 1e9, 2)

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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-500:]
    return {"pytest": done.stdout.strip().splitlines()[-1]}


def kernels_compile(bench: Bench) -> dict:
    """The source, for this GPU; in a dry run, that it is there."""
    assert "kvg_gather_16" in kernels.source()
    if bench.dry:
        return {}
    began = time.perf_counter()
    bench.driver.compile()
    return {"compile_ms": round(1000 * (time.perf_counter() - began), 1), "stream_writes_words": bench.driver.writes_words}


def contracts(bench: Bench) -> dict:
    """The device's contract, and the tests of two real processes that share a pool."""
    return tested("tests/contracts/test_device.py", "tests/device/test_cuda.py", *bench.selected)


def daemons(bench: Bench) -> dict:
    """Real daemons, an engine that is killed, a standby: every byte where it was."""
    return tested("tests/e2e/test_gpu_pools.py", *bench.selected)


def torch_pools(bench: Bench) -> dict:
    """A tensor of torch's own allocator is exported by its offset; expandable segments are refused with what to set."""
    layout = bench.layout(64)
    if bench.dry:
        address = bench.driver.allocate(layout.pool_bytes + 512)
        bench.device.share(layout, address + 512).close()
        refused = bench.device.share(layout, bench.driver.allocate(layout.pool_bytes, exportable=False))
    else:
        torch = needed("torch")
        torch.empty(1 << 20, device="cuda")  # what comes next stands behind it in a segment
        tensor = torch.zeros(layout.pool_bytes, dtype=torch.uint8, device="cuda")
        shared = bench.device.share(layout, tensor.data_ptr())
        for descriptor in shared.export():
            os.close(descriptor)
        shared.close()
        torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        expandable = torch.zeros(64 << 20, dtype=torch.uint8, device="cuda")
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
        refused = bench.device.share(bench.layout(1), expandable.data_ptr())
    try:
        refused.export()
    except Refused as error:
        assert "expandable_segments" in str(error)
    else:
        raise AssertionError("memory without a handle was exported")
    finally:
        refused.close()
    return {"export": "by offset", "expandable_segments": "refused"}


def survival(bench: Bench) -> dict:
    """A mapping after SIGKILL of its exporter: still there, byte for byte? And the memory, is it free once the mapping is closed?"""
    from tests.device.exporter import values_of

    layout = bench.layout(64)
    before = bench.free_bytes()
    with Engine() as engine:
        fds = engine.ask("allocate", kind=bench.kind, layout=msgspec.json.encode(layout).decode())[1]
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
    return {"mapping": "survives", "not_free_after_close_bytes": leaked}


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
    """GB/s of what a step does, and of the limits of this very run."""
    driver, layout = bench.driver, bench.layout(4096)
    pool, tokens = bench.device.allocate(layout), 16 if bench.dry else 256
    size = tokens * layout.token_bytes
    flat, other = driver.allocate(size), driver.allocate(size)
    _, pinned = driver.pinned(size)
    column, places = driver.pinned(8 * tokens)
    random = np.random.default_rng()
    np.frombuffer(column, np.int64)[:tokens] = random.permutation(layout.blocks * layout.block_tokens)[:tokens]
    slots = driver.allocate(8 * tokens)
    driver.copy(slots, places, 8 * tokens, driver.stream(urgent=True))

    def step(stream) -> None:
        pool.launch(True, slots, tokens, flat, stream)
        for first in range(0, size, PIECE_BYTES_MAX):
            driver.copy(pinned + first, flat + first, min(PIECE_BYTES_MAX, size - first), stream)

    limit = bench.rate(lambda stream: driver.copy(pinned, flat, size, stream), size)
    found = {
        "device_to_device_gb_s": bench.rate(lambda stream: driver.copy(other, flat, size, stream), size),
        "gather_gb_s": bench.rate(lambda stream: pool.launch(True, slots, tokens, flat, stream), size),
        "scatter_gb_s": bench.rate(lambda stream: pool.launch(False, slots, tokens, flat, stream), size),
        "pinned_d2h_gb_s": limit, "pinned_h2d_gb_s": bench.rate(lambda stream: driver.copy(flat, pinned, size, stream), size),
        "gather_and_d2h_of_256_gb_s": bench.rate(step, size),
    }  # fmt: skip
    found["gather_and_d2h_to_limit"] = round(found["gather_and_d2h_of_256_gb_s"] / limit, 3)
    for address in (flat, other, slots):
        driver.free(address)
    pool.close()
    return found


def restore(bench: Bench) -> dict:
    """64 sequences of 2,000 tokens out of mapped host pages, layer by layer, against the pinned copy of as many bytes in this run."""
    sequences, tokens = (2, 8) if bench.dry else (64, 2000)
    layout = bench.layout(sequences * tokens // 16 + 64)
    total = min(sequences * tokens, layout.blocks * layout.block_tokens)
    unit = layout.token_bytes
    pool, source = bench.device.allocate(layout), memoryview(bytearray(min(total, 16384) * unit))  # pages are read again where the host has less than 16 GB
    np.frombuffer(source, np.uint8)[:] = np.frombuffer(np.random.default_rng().bytes(1 << 20) * (source.nbytes // (1 << 20) + 1), np.uint8)[: source.nbytes]
    places = (np.arange(total) % (source.nbytes // unit)) * unit
    began = time.perf_counter()
    address = bench.driver.registered(source)
    registered = time.perf_counter()
    with LayeredRestore(pool, source, places, np.arange(total), 60.0, address) as restoring:
        restoring.finish()
        ended = time.perf_counter()
    bench.driver.unregistered(source)
    out = memoryview(bytearray(unit))
    pool.capture([0], [0], [1], out)
    assert out == source[:unit], "the first token isn't what its page has"
    size = min(64 << 20, total * unit)
    _, pinned = bench.driver.pinned(size)
    limit = bench.rate(lambda stream: bench.driver.copy(pool.address, pinned, size, stream), size)
    pool.close()
    rate = total * unit / (ended - registered) / 1e9
    return {
        "bytes": total * unit, "register_ms": round(1000 * (registered - began), 1), "restore_ms": round(1000 * (ended - registered), 1),
        "restore_gb_s": round(rate, 2), "pinned_h2d_gb_s": limit, "restore_to_limit": round(rate / limit, 3),
    }  # fmt: skip


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


def models(bench: Bench) -> dict:
    """The reference engine and the transformers adapter with their pools on the GPU."""
    raise NotRun("the reference engine and the transformers adapter keep their pools in host memory in this version")


def needed(name: str):
    """A package that a step can't do without."""
    try:
        return __import__(name)
    except ImportError as error:
        raise NotRun(f"{name} isn't installed: {error}") from error


STEPS: dict[str, Callable[[Bench], dict]] = {
    "kernels": kernels_compile, "contracts": contracts, "daemons": daemons, "torch": torch_pools, "survival": survival, "correctness": correctness,
    "bandwidth": bandwidth, "restore": restore, "salvage": salvage, "models": models,
}  # fmt: skip
