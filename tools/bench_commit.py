"""What a commit costs the engine: `python tools/bench_commit.py [--sequences 64] [--steps 300] [-o json|table]`.

Knows: the engine API and a clock. Must not know: the table's inside.
Two loops: *real* steps at about --hertz, with a matrix product between commits that pushes everything out of the caches, and *hot*, back to back.
`step` is all that `with guard.step()` adds to a step; `doorbell` is the eventfd write inside it, measured in its place (its code is as cold there as the rest);
`commit` is the one less the other; `cpu` is what of `step` was this thread's processor time, which a crowded machine doesn't inflate as much.
`floor` is the least that publishes a step from this interpreter, taken in turns with `commit` in the same loop: a `with` whose entry reads the epoch and stores
two words, then the ids' bytes, one checksum, one copy into shared memory and three words; nothing is checked, compared or remembered, no block is listed, no bell
rung. What `commit` takes beyond it is what kvguard does; the floor itself is the interpreter's own code, cold.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import statistics
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # a second thread would go on spinning beside the commit after every product

import numpy as np
import xxhash

from kvguard import engine
from kvguard.format.layout import Layout

BLOCK_TOKENS = 16
clock, processor = time.perf_counter_ns, time.thread_time_ns


def percentiles(samples_ns: list[int]) -> dict[str, float]:
    ordered = sorted(samples_ns)
    return {"p50_us": statistics.median(ordered) / 1e3, "p99_us": ordered[int(0.99 * (len(ordered) - 1))] / 1e3, "min_us": ordered[0] / 1e3}


def open_sequences(sequences: int, positions: int) -> tuple[engine.Guard, object, np.ndarray]:
    per_row = -(-positions // BLOCK_TOKENS)
    layout = Layout.paged("bench", "float16", 1, sequences * per_row, BLOCK_TOKENS, 1, 8)
    pool = engine.allocate(layout)
    guard = engine.attach("bench", engine.Rank(0, 0, 0), pool, layout, socket="/nonexistent/kvguard.sock", positions_max=positions)
    with guard.step(sequences) as step:
        for n in range(sequences):
            step.commit(f"request-{n}", 16, range(n * per_row, n * per_row + 1), range(17), request=b"{}")
    return guard, pool, np.array([guard.row(f"request-{n}") for n in range(sequences)])


class Floor:
    """The smallest publication: the stores of a commit, in its order, and nothing else."""

    __slots__ = ("epoch", "number", "page", "words")

    def __init__(self) -> None:
        self.page = memoryview(mmap.mmap(-1, 1 << 20))
        self.page[:] = bytes(1 << 20)  # its pages are there, as the commit table's are
        self.words = self.page.cast("Q")
        self.epoch = self.number = 0

    def __enter__(self) -> Floor:
        words = self.words
        assert words[0] <= self.epoch
        self.number = number = self.number + 1
        words[8], words[16] = 64, number
        return self

    def publish(self, ids: np.ndarray) -> None:
        body, at, words = ids.tobytes(), 4096 * (1 + self.number % 128), self.words
        self.page[at : at + len(body)] = body
        words[at + len(body) >> 3] = xxhash.xxh3_64_intdigest(body)
        words[24] = self.number

    def __exit__(self, kind, error, trace) -> None:
        words = self.words
        words[32] = words[40] = self.number


class Samples:
    """Of one loop, ns. `bells`, `whole`, `busy`: by step; `floors`: of the smallest publications between them."""

    def __init__(self) -> None:
        self.bells: list[int] = []
        self.whole: list[int] = []
        self.busy: list[int] = []
        self.floors: list[int] = []

    def percentiles(self) -> dict[str, dict[str, float]]:
        commits = [step - bell for step, bell in zip(self.whole, self.bells, strict=True)]
        found = {"commit": commits, "doorbell": self.bells, "step": self.whole, "cpu": self.busy, "floor": self.floors}
        return {what: percentiles(samples) for what, samples in found.items()}


def pause_until(due: int) -> None:
    if (rest := due - clock()) > 0:
        time.sleep(rest / 1e9)


def run(sequences: int, steps: int, hertz: float) -> dict:
    """The samples of one loop; hertz 0: back to back. Every 16th step a row gets its next block, as in a real decode loop (spread over the steps)."""
    per_row = -(-(steps + 64) // BLOCK_TOKENS)
    guard, pool, rows = open_sequences(sequences, per_row * BLOCK_TOKENS)
    random = np.random.default_rng(0)
    matrix = random.random((1024, 1024), dtype=np.float32)
    samples, floor, period = Samples(), Floor(), int(1e9 / hertz) if hertz else 0
    ring = guard._ring

    def timed_ring() -> None:
        before = clock()
        ring()
        samples.bells.append(clock() - before)

    guard._ring = timed_ring
    listed = np.ones(sequences, np.int64)
    offsets = np.arange(sequences) % BLOCK_TOKENS  # sequences cross block borders at different steps
    lengths = np.full(sequences, 16)
    for n in range(steps):
        due = clock() + period
        tokens = random.integers(0, 50000, sequences)
        lengths = lengths + 1
        needed = -(-(lengths + offsets) // BLOCK_TOKENS)
        fresh = {int(row): [int(row) * per_row + int(listed[row])] for row in np.flatnonzero((needed > listed) & (listed < per_row))}
        listed[list(fresh)] += 1
        if hertz:
            matrix @ matrix
        begun = processor()
        clock()  # what is cold of the clock itself is not the commit's
        entered = clock()
        with guard.step(sequences) as step:
            step.commit_batch(rows, lengths, tokens, fresh)
        left = clock()
        samples.busy.append(processor() - begun)
        samples.whole.append(left - entered)
        if hertz:
            pause_until(due)
            matrix @ matrix
        clock()
        entered = clock()
        with floor as step:
            step.publish(tokens)
        samples.floors.append(clock() - entered)
        if hertz:
            pause_until(due + period)
    guard.detach()
    pool.close()
    return samples.percentiles()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--hertz", type=float, default=20.0)
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    result = {
        "schema": "kvguard.bench_commit/1", "sequences": arguments.sequences, "steps": arguments.steps, "hertz": arguments.hertz, "machine": platform.machine(),
        "cores": os.cpu_count(), "load_1m": os.getloadavg()[0], "python": platform.python_version(),
        "real": run(arguments.sequences, arguments.steps, arguments.hertz), "hot": run(arguments.sequences, arguments.steps * 4, 0.0),
    }  # fmt: skip
    if arguments.output == "json":
        print(json.dumps(result, indent=1))
        return
    print(f"{arguments.sequences} sequences, {arguments.steps} steps at {arguments.hertz:g} Hz, {os.cpu_count()} cores, load {result['load_1m']:.2f}")
    print(f"{'loop':6} {'what':9} {'p50 us':>8} {'p99 us':>8} {'min us':>8}")
    for loop in ("real", "hot"):
        for what, numbers in result[loop].items():
            print(f"{loop:6} {what:9} {numbers['p50_us']:8.1f} {numbers['p99_us']:8.1f} {numbers['min_us']:8.1f}")


if __name__ == "__main__":
    main()
