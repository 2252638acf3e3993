"""What a node's daemon costs while nothing happens: memory, processor time, and which modules it has loaded.

    python tools/bench_idle.py [--seconds 20] [-o json]

Knows: psutil, processes that it starts itself on loopback. Must not know: what a daemon does. Exit code 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from kvguard import config
from kvguard.errors import KvguardError
from kvguard.transport.ask import ask

RSS_MIB_MAX, CPU_PERCENT_MAX = 60.0, 1.0
AT_REST_PERCENT = 4.0  # over one second: four of the kernel's ticks
HEAVY = ("torch", "cupy", "transformers")


def free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as held:
        return f"tcp://127.0.0.1:{held.getsockname()[1]}"


def as_installed(directory: Path) -> dict[str, str]:
    """An environment in which modules are compiled once and for all, as an installer leaves them."""
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}, "PYTHONPYCACHEPREFIX": str(directory / "compiled")}


def compile_first(environment: dict[str, str]) -> None:
    """What is measured starts as every start but an installation's very first does."""
    subprocess.run([sys.executable, "-c", "from kvguard.daemon import coordinator, node; node.warm()"], env=environment, check=True)


def start(directory: Path, cls, name: str, values: dict) -> subprocess.Popen:
    file = directory / f"{name}.toml"
    file.write_text(config.template(cls, values))
    command = [sys.executable, "-m", "kvguard.cli", cls.SECTION, "--config", str(file)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, env=as_installed(directory))


def wait_linked(address: str) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if any(node["state"] == "alive" for node in ask(address, "status", {}, timeout=1.0)["nodes"]):
                return
        except KvguardError:
            continue
    raise SystemExit("the node didn't link to its coordinator")


def measured(process: psutil.Process, seconds: float) -> dict:
    before = process.cpu_times()
    begun = time.monotonic()
    time.sleep(seconds)  # the thing measured is what happens meanwhile
    after, wall = process.cpu_times(), time.monotonic() - begun
    cpu = after.user + after.system - before.user - before.system
    memory = process.memory_full_info()
    return {"rss_mib": memory.rss / 2**20, "uss_mib": memory.uss / 2**20, "cpu_percent": 100 * cpu / wall, "threads": process.num_threads(), "seconds": wall}


def heavy_modules(process: psutil.Process) -> list[str]:
    """Heavy packages of which a file is mapped."""
    return sorted({name for name in HEAVY for mapped in process.memory_maps() if f"/{name}/" in mapped.path})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("-o", dest="output", choices=("table", "json"), default="table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvguard-idle.") as name:
        directory, coordinator, node = Path(name), free_address(), free_address()
        compile_first(as_installed(directory))
        values = {"name": "a", "listen": node, "coordinator": coordinator, "runtime_dir": str(directory / "a")}
        running = [
            start(directory, config.CoordinatorConfig, "coordinator", {"listen": coordinator, "state_dir": str(directory / "c")}),
            start(directory, config.NodeConfig, "a", values),
        ]
        try:
            wait_linked(coordinator)
            found = psutil.Process(running[1].pid)
            deadline = time.monotonic() + 20
            while measured(found, 1.0)["cpu_percent"] > AT_REST_PERCENT and time.monotonic() < deadline:
                pass  # what engines will need is still being imported: that is start, not rest
            document = {"schema": "kvguard.bench_idle/1", **measured(found, arguments.seconds), "heavy_modules": heavy_modules(found)}
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait(10)
    document["targets_met"] = document["rss_mib"] <= RSS_MIB_MAX and document["cpu_percent"] <= CPU_PERCENT_MAX and not document["heavy_modules"]
    if arguments.output == "json":
        print(json.dumps(document))
    else:
        for key, value in document.items():
            print(f"{key:14} {value:.2f}" if isinstance(value, float) else f"{key:14} {value}")
    return 0 if document["targets_met"] else 1


if __name__ == "__main__":
    sys.exit(main())
