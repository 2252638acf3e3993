"""What captures cost a decoding engine: one loop of matrix products of a model's sizes, paired with no guard, with engine-side and with daemon-side captures.

Knows: torch (where there is a GPU), pools, a daemon's side in another process (this file, run as a program). Must not know: reports.
Invariants: the variants take turns in short blocks of steps, so that what else happens to the GPU happens to all; the daemon's process captures every step
that it sees, as a daemon does; medians and 99th percentiles with a bootstrap interval of the ratio.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
from gpu_steps import ROOT, Bench, needed

from kvguard.device import open_device
from kvguard.format.layout import Layout

BLOCK_STEPS, TURNS = 40, 15
ENDING_S = 30
# model -> layers, [(inputs, outputs) of a layer's matrix products], KV heads of this rank
SHAPES = {
    "8b": (32, ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096)), 8),
    "70b-tp8": (80, ((8192, 1280), (1024, 8192), (8192, 7168), (3584, 8192)), 1),
}
TOY = {"toy": (2, ((64, 96), (64, 64)), 2)}


def decode_overhead(bench: Bench) -> dict:
    """By shape and sequences: median step without a guard, and ratios of medians and p99 with each kind of capture."""
    found: dict[str, object] = {}
    for shape, (layers, products, heads) in (TOY if bench.dry else SHAPES).items():
        for sequences in (2,) if bench.dry else (64, 256):
            layout = Layout.paged(shape, "bfloat16", layers, 64 if bench.dry else 2048, 16, heads, 8 if bench.dry else 128)
            wanted = 2 * layers * sum(inputs * outputs for inputs, outputs in products) * 13 // 10 + 2 * layout.pool_bytes
            if not bench.dry and bench.free_bytes() < wanted:
                found[f"{shape}_{sequences}"] = f"not run: needs {wanted >> 30} GiB of free memory"
                continue
            forward = forward_of(bench, layers, products, sequences)
            times, packed = paired(bench, layout, forward, sequences)
            some = {f"{shape}_{sequences}_{name}": value for name, value in {**summary(times), "steps_packed": packed}.items()}
            print("" if bench.dry else some, flush=True)  # were the step ended at its limit, what it has measured would be known
            found.update(some)
    return found


def forward_of(bench: Bench, layers: int, products, sequences: int) -> Callable[[], None]:
    """One step's matrix products, as a CUDA graph where there is a GPU."""
    if bench.dry:
        weights = [np.ones(sizes, np.float32) for sizes in products]
        return lambda: [np.ones((sequences, weight.shape[0]), np.float32) @ weight for _ in range(layers) for weight in weights] and None
    torch = needed("torch")
    weights = [torch.randn(sizes, dtype=torch.bfloat16, device="cuda") for _ in range(layers) for sizes in products]
    inputs = {weight.shape[0]: torch.randn(sequences, weight.shape[0], dtype=torch.bfloat16, device="cuda") for weight in weights}

    def run() -> None:
        for weight in weights:
            inputs[weight.shape[0]] @ weight

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def paired(bench: Bench, layout: Layout, forward: Callable[[], None], sequences: int) -> tuple[dict[str, np.ndarray], str]:
    """Step times in ms of each variant, turn by turn, and how many steps found room in the ring."""
    times: dict[str, list[float]] = {"none": [], "engine": [], "daemon": []}
    sides = {capture: Side(bench, layout, capture) for capture in ("engine", "daemon")}
    random = np.random.default_rng(1)
    try:
        for _ in range(1 if bench.dry else TURNS):
            for variant in times:
                for _ in range(2 if bench.dry else BLOCK_STEPS):
                    slots = random.permutation(layout.blocks * layout.block_tokens)[:sequences]
                    times[variant].append(step(bench, forward, sides.get(variant), slots))
        engine = sides["engine"].pool
        packed = f"{engine.packed} of {engine.packed + engine.skipped}"
        assert engine.packed > 0 and not engine.lost, f"no step was packed: {engine.lost}"
    finally:
        for side in sides.values():
            side.close()
    return {name: np.array(values) for name, values in times.items()}, packed


def step(bench: Bench, forward: Callable[[], None], side: Side | None, slots: np.ndarray) -> float:
    """Milliseconds from the launch to the step's end on the engine's stream, as an engine that samples on the host waits for it."""
    stream = bench.driver.current()
    began = time.perf_counter()
    forward()
    if side is not None:
        side.said(slots)
    bench.driver.synchronise(stream)
    return 1000 * (time.perf_counter() - began)


class Side:
    """A pool of this process, and the daemon's process that captures it. `word`: the step that is written, which that process sees."""

    def __init__(self, bench: Bench, layout: Layout, capture: str) -> None:
        self.pool = bench.device.allocate(layout)
        if not bench.dry:
            torch = needed("torch")
            self.pool.current = lambda: torch.cuda.current_stream().cuda_stream
        table = os.memfd_create("kvguard-step")
        os.ftruncate(table, 1 << 20)
        self.memory = mmap.mmap(table, 1 << 20)
        self.words = memoryview(self.memory).cast("Q")
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, str(Path(__file__).resolve()), bench.kind, capture, str(theirs.fileno())]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=environment)
        theirs.close()
        self.line, self.steps = mine, 0
        fds = [*self.pool.export(), table]
        socket.send_fds(mine, [msgspec.msgpack.encode(layout)], fds)
        _, ring, _, _ = socket.recv_fds(mine, 64, 4)
        if ring:
            self.pool.join(list(ring))
        for fd in fds:
            os.close(fd)

    def said(self, slots: np.ndarray) -> None:
        """As an engine's step: what it wrote, and the word behind it."""
        tokens = self.pool.layout.block_tokens
        self.steps += 1
        area = 16 + (self.steps % 2) * 4096
        self.words[area] = len(slots)
        np.frombuffer(self.memory, np.int64)[area + 1 : area + 1 + len(slots)] = slots
        self.pool.wrote(slots // tokens, slots % tokens, np.ones_like(slots))
        self.pool.publish(self.words[0:1], self.steps)

    def close(self) -> None:
        """The daemon's process ends when its line does; what it captured is checked to have been something."""
        try:
            self.line.settimeout(ENDING_S)
            self.line.send(b"end")
            captured = int(self.line.recv(64) or b"0")
        except OSError:
            captured = 0  # it has ended before, and said why where this step's words are kept
        self.line.close()
        ended = self.process.wait(ENDING_S)
        self.pool.close()
        assert captured > 0 and not ended, f"the daemon's side captured {captured} steps and ended with {ended}"


def summary(times: dict[str, np.ndarray]) -> dict[str, object]:
    """The median step without a guard, and what each kind of capture adds, with 95 % intervals."""
    random, found = np.random.default_rng(1), {"none_ms": round(float(np.median(times["none"])), 3)}

    def drawn(name: str, quantile: int) -> float:
        return float(np.percentile(random.choice(times[name], times[name].size), quantile))

    for name in ("engine", "daemon"):
        for quantile in (50, 99):
            ratio = [drawn(name, quantile) / drawn("none", quantile) for _ in range(400)]
            middle = np.percentile(times[name], quantile) / np.percentile(times["none"], quantile)
            low, high = np.percentile(ratio, [2.5, 97.5])
            found[f"{name}_p{quantile}"] = f"{100 * (middle - 1):+.2f} % ({100 * (low - 1):+.2f} .. {100 * (high - 1):+.2f})"
    return found


def daemon_side(kind: str, capture: str, line: socket.socket) -> None:
    """Captures the slots of the latest step whenever the word has risen, until told to end."""
    packet, fds, _, _ = socket.recv_fds(line, 1 << 20, 4)
    layout = msgspec.msgpack.decode(packet, type=Layout)
    view = open_device(kind, capture=capture).open(layout, fds[:-1], writable=False)
    words = memoryview(mmap.mmap(fds[-1], 1 << 20)).cast("Q")
    ring = view.welcome()
    socket.send_fds(line, [b"ring"], ring)
    for fd in ring:
        os.close(fd)
    line.setblocking(False)
    seen = captured = 0
    out = memoryview(bytearray(512 * layout.token_bytes))
    while True:
        now = int(words[0])
        if now != seen:
            area = 16 + (now % 2) * 4096
            slots = np.frombuffer(words, np.int64)[area + 1 : area + 1 + min(512, int(words[area]))].copy()
            seen = now
            view.capture(slots // layout.block_tokens, slots % layout.block_tokens, np.ones_like(slots), out)
            captured += 1
            continue
        try:
            if line.recv(16) in (b"end", b""):
                break
        except BlockingIOError:
            time.sleep(0.0002)  # as a daemon that is woken by a bell would be late, no more
    line.setblocking(True)
    line.send(str(captured).encode())
    view.close()


if __name__ == "__main__":
    daemon_side(sys.argv[1], sys.argv[2], socket.socket(fileno=int(sys.argv[3])))
