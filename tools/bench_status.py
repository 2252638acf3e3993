"""How long an operator waits for `kvguard status` and `kvguard check` where the coordinator knows many ranks.

    python tools/bench_status.py [--ranks 64] [--nodes 8] [--runs 15] [-o json]

A real coordinator on loopback; nodes that send the heartbeats of real ones from this process, by the same transport. Told are the whole command with its process,
where to ask said on its command line or in a file; the question alone over a fresh link; and the start of an interpreter that does nothing. Of the commands also the
processor time, which other work on the machine doesn't stretch as much, and how many starts of an interpreter that is: what compares between machines.

Knows: heartbeats, processes that it starts itself. Must not know: what a coordinator does with them. Exit code 1 where the target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from kvguard import __version__, config
from kvguard.errors import KvguardError
from kvguard.format import messages, wire
from kvguard.transport.ask import ask
from kvguard.transport.base import Up
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import NO_EPOCH, Rank, StreamId

TARGET_MS = 200.0
LINK = "coordinator"
BEAT_S = 0.1
INSTANCE_RANKS = 8  # ranks of one instance: its pipeline goes over all nodes


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return f"tcp://127.0.0.1:{held.getsockname()[1]}"


class SimulatedNode:
    """What a coordinator hears of a node: a greeting and heartbeats, with every rank protected by the next node."""

    def __init__(self, index: int, nodes: int, ranks: list[tuple[str, Rank]], coordinator: str):
        self.name, self._after, self._ranks = f"node-{index}", f"node-{(index + 1) % nodes}", ranks
        self._transport = ZeromqTransport(self.name, bulk=False, incarnation=1)
        self._transport.dial(LINK, coordinator)
        self._number = 0

    def turn(self) -> None:
        """Takes in what came and says the next heartbeat."""
        for event in self._transport.receive():
            if isinstance(event, Up):
                self._send(messages.NodeHello(self.name, 1, f"tcp://{self.name}", (), __version__))
        self._number += 1
        self._send(messages.Beat(self.name, 1, self._number, tuple(map(self._rank, self._ranks)), (), (), 1 << 29, 1 << 30))

    def _rank(self, rank: tuple[str, Rank]) -> messages.RankBeat:
        stream = StreamId(*rank, 1)
        numbers = (64, 0, 64 * 900 + self._number, 64 * 900 + self._number, 0, 0, 0.0)
        return messages.RankBeat(stream, NO_EPOCH, 1, "", "protected", "everything committed is acknowledged", (self._after,), *numbers, self._number)

    def _send(self, message: messages.Message) -> None:
        self._transport.send(LINK, wire.encode(message))

    def close(self) -> None:
        self._transport.close()


class SimulatedNodes:
    """All of them, in a thread."""

    def __init__(self, nodes: int, ranks: int, coordinator: str):
        places = [(f"llama-{one // INSTANCE_RANKS}", Rank(0, one % INSTANCE_RANKS, 0)) for one in range(ranks)]
        self._arguments = [(index, nodes, places[index::nodes], coordinator) for index in range(nodes)]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> SimulatedNodes:
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        nodes = [SimulatedNode(*arguments) for arguments in self._arguments]
        while not self._over.wait(BEAT_S):
            for node in nodes:
                node.turn()
        for node in nodes:
            node.close()


def wait_for(address: str, ranks: int) -> None:
    """Until the coordinator calls every rank protected."""
    deadline, last = time.monotonic() + 60, ""
    while time.monotonic() < deadline:
        try:
            status = ask(address, "status", {}, timeout=2.0)
        except KvguardError as error:
            last = str(error)
            continue
        states = [rank["state"] for rank in status["ranks"]]
        if states.count("protected") == ranks:
            return
        last = f"{len(states)} ranks, {states.count('protected')} of them protected"
    raise SystemExit(f"the coordinator doesn't know {ranks} protected ranks: {last}")


def spread(values_ms: list[float]) -> dict:
    return {"median_ms": statistics.median(values_ms), "min_ms": min(values_ms), "max_ms": max(values_ms), "runs": len(values_ms)}


def commands(runs: int, *arguments: str, module: tuple[str, ...] = ("-m", "kvguard.cli")) -> dict:
    """Wall and processor time of a verb, process and all."""
    wall, cpu = [], []
    for _ in range(runs):
        before, begun = os.times(), time.monotonic_ns()
        done = subprocess.run([sys.executable, *module, *arguments], capture_output=True, check=False)
        wall.append((time.monotonic_ns() - begun) / 1e6)
        after = os.times()
        cpu.append(1e3 * (after.children_user + after.children_system - before.children_user - before.children_system))
        if done.returncode:
            raise SystemExit(f"kvguard {' '.join(arguments)}: exit {done.returncode}: {(done.stdout + done.stderr).decode()}")
    return {"wall": spread(wall), "cpu": spread(cpu)}


def questions(runs: int, address: str) -> dict:
    found = []
    for _ in range(runs):
        begun = time.monotonic_ns()
        ask(address, "status", {}, timeout=5.0)
        found.append((time.monotonic_ns() - begun) / 1e6)
    return {"wall": spread(found)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=64)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=15)
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvguard-status.") as name:
        address, file = free_address(), Path(name) / "coordinator.toml"
        file.write_text(config.template(config.CoordinatorConfig, {"listen": address, "state_dir": name, "log_level": "error"}), encoding="utf-8")
        coordinator = subprocess.Popen([sys.executable, "-m", "kvguard.cli", "coordinator", "--config", str(file)], stderr=subprocess.DEVNULL)
        try:
            with SimulatedNodes(options.nodes, options.ranks, address):
                wait_for(address, options.ranks)
                measured = {
                    "status": commands(options.runs, "status", "--coordinator", address), "check": commands(options.runs, "check", "--coordinator", address),
                    "status, by its configuration": commands(options.runs, "status", "--config", str(file)), "question alone": questions(options.runs, address),
                    "python -c pass": commands(options.runs, module=("-c", "pass")),
                }  # fmt: skip
        finally:
            coordinator.terminate()
            coordinator.wait(10)
    start_ms = measured["python -c pass"]["cpu"]["median_ms"]
    for kinds in measured.values():
        if "cpu" in kinds:
            kinds["cpu"]["starts"] = kinds["cpu"]["median_ms"] / start_ms if start_ms else None
    met = all(measured[verb]["wall"]["median_ms"] <= TARGET_MS for verb in ("status", "check"))
    document = {"ranks": options.ranks, "nodes": options.nodes, "target_ms": TARGET_MS, "met": met, "load": os.getloadavg()[0], "measured": measured}
    if options.output == "json":
        print(json.dumps(document, indent=1))
    else:
        for what, kinds in measured.items():
            for kind, found in kinds.items():
                starts = f"   {found['starts']:.1f} starts" if found.get("starts") else ""
                print(f"{what:28} {kind:5} median {found['median_ms']:7.1f} ms   min {found['min_ms']:7.1f}   max {found['max_ms']:7.1f}{starts}")
        print(f"target: status and check within {TARGET_MS:g} ms: {'met' if met else 'NOT met'} (load of the machine {document['load']:.1f})")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
