"""What a daemon's restart costs with replicas in its arena: how much is kept and verified, how long ranks are unprotected, what the engine notices of it.

    python tools/bench_restart.py [--mebibytes 64,256,1024] [--kills 3] [--daemon holder|own|both] [--delay-ms 100] [-o table|json]

Real processes on loopback: coordinator, two daemons (runtime directories on a tmpfs), and this process as the engine, which steps all the time. A daemon is
killed with SIGKILL and started again after `delay-ms` (a service manager's RestartSec). `unprotected_ms`: from the kill until the rank's daemon says again that
all is held elsewhere (seen by asking it, about every 10 ms). `kept`: positions that were not sent again. `verified`: positions whose pages held.
`step_ms_max`: the engine's slowest step meanwhile, of `before` and `during`. Where the time goes, in ms since the process was started, as the daemon itself
has noted it (stats, `start`): its modules `imported`, replicas `read_back`, `ready` to be talked to, its `coordinator` has answered, the `engine` is attached,
the first `hello` of a sender and `held` of a holder, all replicas `verified`; then `protected`, seen from here. `cpu_ms`: processor time until the last of them.

Modules are compiled beforehand, as an installer leaves them (docs/operations.md): an environment in which they are not pays 0.2 s more at every start.

Knows: configuration files, the engine's API, verbs. Must not know: how replicas are kept. Exit code 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from bench_idle import as_installed, compile_first, free_address
from rich.console import Console
from rich.table import Table

from kvguard import config
from kvguard.engine import Layout, Rank, allocate, attach
from kvguard.errors import KvguardError
from kvguard.limits import MIB
from kvguard.transport.ask import ask

BLOCK_TOKENS, LAYERS, HEADS, DIM = 16, 8, 8, 64  # 16 KiB a token in float16: a quarter of an 8B model
POSITIONS = 1024  # of a sequence
STEP_S = 0.02
UNPROTECTED_MS_MAX = 1000.0
MOMENTS = ("imported", "read_back", "ready", "coordinator", "engine", "hello", "held", "verified")
COLUMNS = (
    "mebibytes", "daemon", "kept_percent", "verified_percent", "unprotected_ms", *(f"{word}_ms" for word in MOMENTS), "protected_ms", "cpu_ms",
    "step_ms_max_before", "step_ms_max_during",
)  # fmt: skip


class Cluster:
    """Daemons as processes; `directory` on a tmpfs."""

    def __init__(self, directory: Path, arena_bytes: int) -> None:
        self.directory = directory
        self.addresses = {name: free_address() for name in ("coordinator", "own", "holder")}
        self.running: dict[str, subprocess.Popen] = {}
        self._environment = as_installed(directory)
        compile_first(self._environment)
        coordinator = self.addresses["coordinator"]
        patient = {"suspect_ms": 30_000, "dead_ms": 60_000, "reattach_ms": 60_000}  # no emitter vouches for the engine here
        self._write(config.CoordinatorConfig, "coordinator", {"listen": coordinator, "state_dir": str(directory / "coordinator"), **patient})
        for name in ("own", "holder"):
            values = {"name": name, "listen": self.addresses[name], "coordinator": coordinator, "runtime_dir": str(directory / name)}
            self._write(config.NodeConfig, name, {**values, "arena_bytes": arena_bytes, "keep_replicas": "files"})

    def start_all(self) -> None:
        for name in self.addresses:
            self.start(name)
        for name in self.addresses:
            self.answer(name)

    def _write(self, cls, name: str, values: dict) -> None:
        (self.directory / f"{name}.toml").write_text(config.template(cls, values))

    def start(self, name: str) -> None:
        verb = "coordinator" if name == "coordinator" else "node"
        with open(self.directory / f"{name}.log", "wb") as log:
            command = [sys.executable, "-m", "kvguard.cli", verb, "--config", str(self.directory / f"{name}.toml")]
            self.running[name] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self._environment)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def ask(self, name: str, verb: str, timeout_s: float = 1.0) -> dict | None:
        try:
            return ask(self.addresses[name], verb, timeout=timeout_s)
        except KvguardError:
            return None

    def answer(self, name: str, timeout_s: float = 60.0) -> None:
        deadline = time.monotonic() + timeout_s
        while self.ask(name, "status", 0.05) is None:
            assert time.monotonic() < deadline, (self.directory / f"{name}.log").read_text()

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def close(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            process.wait(10)


class Engine:
    """A rank that holds `sequences` of POSITIONS each, and one that a thread steps on all the time."""

    def __init__(self, cluster: Cluster, sequences: int) -> None:
        per = POSITIONS // BLOCK_TOKENS
        layout = Layout.paged("bench", "float16", LAYERS, (sequences + 2) * per, BLOCK_TOKENS, HEADS, DIM)
        self.pool = allocate(layout)
        memory = np.frombuffer(self.pool.memory, np.uint64)
        memory[:] = np.arange(memory.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        self.token_bytes = layout.token_bytes
        self.guard = attach("bench", Rank(0, 0, 0), self.pool, socket=str(cluster.directory / "own" / "kvguard.sock"))
        self.positions = 0
        for number in range(sequences):
            with self.guard.step(POSITIONS) as step:
                blocks = range(number * per, (number + 1) * per)
                step.commit(f"s{number}", POSITIONS, blocks=list(blocks), tokens=list(range(POSITIONS)), request=b"")
            self.positions += POSITIONS
        self._next, self._blocks = 0, list(range(sequences * per, (sequences + 2) * per))
        self._stop = threading.Event()
        self.slowest_s = 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(STEP_S):
            began = time.perf_counter()
            with self.guard.step(1) as step:
                if self._next == 2 * POSITIONS:
                    step.truncate("live", POSITIONS)
                    self._next = POSITIONS
                new = [self._blocks[self._next // BLOCK_TOKENS]] if self._next % BLOCK_TOKENS == 0 and self._next < 2 * POSITIONS else []
                self._next += 1
                step.commit("live", self._next, blocks=new, tokens=[7], request=None if self._next > 1 else b"")
            self.slowest_s = max(self.slowest_s, time.perf_counter() - began)

    def slowest_ms(self) -> float:
        """Since the last call."""
        slowest, self.slowest_s = self.slowest_s, 0.0
        return slowest * 1e3

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.guard.detach()


def rank_of(cluster: Cluster) -> dict | None:
    found = cluster.ask("own", "status", 0.1)
    return found["ranks"][0] if found and found["ranks"] else None


def whole(cluster: Cluster, positions: int) -> bool:
    rank = rank_of(cluster)
    return bool(rank) and rank["state"] == "protected" and rank["acked"] >= positions


def wait_whole(cluster: Cluster, positions: int, timeout_s: float = 600.0) -> float:
    """The moment at which all is protected."""
    deadline = time.monotonic() + timeout_s
    while not whole(cluster, positions):
        assert time.monotonic() < deadline, (rank_of(cluster), cluster.log("own")[-2000:], cluster.log("holder")[-2000:])
    return time.monotonic()


def strike(cluster: Cluster, engine: Engine, name: str, delay_s: float) -> dict:
    """One kill and restart."""
    engine.slowest_ms()
    time.sleep(1.0)  # the engine's own measure of an undisturbed second
    before_ms, sent = engine.slowest_ms(), cluster.ask("own", "stats")["replicated_bytes"]
    struck = time.monotonic()
    cluster.kill(name)
    if name == "holder":
        while whole(cluster, engine.positions):
            assert time.monotonic() < struck + 10, "the rank's daemon never said that its holder is gone"
    time.sleep(max(0.0, delay_s - (time.monotonic() - struck)))
    started = time.monotonic()
    cluster.start(name)
    protected = wait_whole(cluster, engine.positions)
    during_ms = engine.slowest_ms()
    sent_again = cluster.ask("own", "stats")["replicated_bytes"] - (sent if name == "holder" else 0)
    grown = 50 * (protected - struck) + 100  # what the engine went on with meanwhile, generously
    store, start = cluster.ask("holder", "stats")["store"], cluster.ask(name, "stats")["start"]
    return {
        "kept_percent": 100.0 * min(1.0, 1 - max(0.0, sent_again / engine.token_bytes - grown) / engine.positions),
        "verified_percent": 100.0 * (1 - store.get("positions_unsound", 0) / engine.positions), "unprotected_ms": (protected - struck) * 1e3,
        **{f"{word}_ms": start[word]["ms"] if word in start else None for word in MOMENTS}, "protected_ms": (protected - started) * 1e3,
        "cpu_ms": max(moment["cpu_ms"] for moment in start.values()),
        "step_ms_max_before": before_ms, "step_ms_max_during": during_ms,
    }  # fmt: skip


def measured(mebibytes: int, daemons: tuple[str, ...], kills: int, delay_s: float) -> list[dict]:
    """One row by daemon, medians over kills; the worst where less is worse."""
    directory = Path(tempfile.mkdtemp(prefix=f"kvguard-bench-{os.getpid()}-", dir="/dev/shm"))
    sequences = max(1, mebibytes * MIB // (POSITIONS * 2 * LAYERS * HEADS * DIM * 2))
    cluster = Cluster(directory, (mebibytes + 64) * MIB * 5 // 4)
    rows = []
    try:
        cluster.start_all()
        engine = Engine(cluster, sequences)
        try:
            wait_whole(cluster, engine.positions)
            for name in daemons:
                runs = [strike(cluster, engine, name, delay_s) for _ in range(kills)]
                worst = {key: min(run[key] for run in runs) for key in ("kept_percent", "verified_percent")}
                seen = {key: [run[key] for run in runs if run[key] is not None] for key in COLUMNS[4:]}
                rest = {key: statistics.median(values) if values else None for key, values in seen.items()}
                rows.append({"mebibytes": mebibytes, "daemon": name, **worst, **rest, "runs": runs})
        finally:
            engine.close()
    finally:
        cluster.close()
        shutil.rmtree(directory)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mebibytes", default="64,256,1024")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--daemon", choices=["holder", "own", "both"], default="both")
    parser.add_argument("--delay-ms", type=float, default=100.0)
    parser.add_argument("-o", "--output", choices=["table", "json"], default="table")
    chosen = parser.parse_args()
    daemons = ("holder", "own") if chosen.daemon == "both" else (chosen.daemon,)
    rows = [row for size in chosen.mebibytes.split(",") for row in measured(int(size), daemons, chosen.kills, chosen.delay_ms / 1e3)]
    reached = all(row["kept_percent"] == row["verified_percent"] == 100.0 and row["unprotected_ms"] <= UNPROTECTED_MS_MAX for row in rows)
    if chosen.output == "json":
        print(json.dumps({"schema": "kvguard.bench_restart/1", "unprotected_ms_max": UNPROTECTED_MS_MAX, "rows": rows, "reached": reached}, indent=1))
    else:
        table = Table("", *(f"{row['daemon']}, {row['mebibytes']} MiB" for row in rows), title="A daemon is killed and restarted")
        for key in COLUMNS[2:]:
            table.add_row(key, *("-" if row[key] is None else f"{row[key]:.1f}" for row in rows))
        Console().print(table)
    return 0 if reached else 1


if __name__ == "__main__":
    sys.exit(main())
