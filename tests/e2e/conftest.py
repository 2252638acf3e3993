"""Real processes on loopback: coordinator, nodes and engines with configuration files of the form that real hosts use."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kvguard import config
from kvguard.errors import KvguardError
from kvguard.pipeline.ports import free_ports
from kvguard.transport.ask import ask

ENGINE = Path(__file__).with_name("numpy_engine.py")
ROOT = Path(__file__).resolve().parents[2]


def free_addresses(count: int) -> list[str]:
    return [f"tcp://127.0.0.1:{port}" for port in free_ports(count)]


class Engine:
    """An engine process and the conversation with it."""

    def __init__(self, popen: subprocess.Popen) -> None:
        self.popen = popen

    def hear(self, timeout_s: float = 20.0) -> dict:
        """The next line it says."""
        ready, _, _ = select.select([self.popen.stdout], [], [], timeout_s)
        assert ready, "the engine says nothing"
        line = self.popen.stdout.readline()
        assert line, f"the engine ended with {self.popen.wait()}"
        return json.loads(line)

    def tell(self, do: str, **arguments) -> dict:
        self.popen.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.popen.stdin.flush()
        return self.hear()

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        assert self.popen.wait() == -signal.SIGKILL


class Cluster:
    """`nodes` by name; everything that is started here ends with the test."""

    def __init__(self, directory: Path, names: tuple[str, ...] = ("a", "b")) -> None:
        self.directory = directory
        self.coordinator_address, *addresses = free_addresses(1 + len(names))
        self.addresses = dict(zip(names, addresses, strict=True))
        self.running: dict[str, subprocess.Popen] = {}
        self.engines: list[Engine] = []
        self.metrics = dict(zip(("coordinator", *names), free_addresses(1 + len(names)), strict=True))
        self.configure_coordinator()
        for name, address in self.addresses.items():
            values = {"name": name, "listen": address, "coordinator": self.coordinator_address, "runtime_dir": str(directory / name), "fault_injection": True}
            self._write(config.NodeConfig, name, {**values, "metrics": self.metrics[name], "arena_bytes": 64 << 20})

    def configure_coordinator(self, **values) -> None:
        """What else the coordinator's file says; before it is started. Pools are waited for on a busy machine, too: tests say which rung they are about."""
        own = {"pool_ms": 10_000, "listen": self.coordinator_address, "state_dir": str(self.directory / "coordinator"), "metrics": self.metrics["coordinator"]}
        self._write(config.CoordinatorConfig, "coordinator", {**own, **values})

    def _write(self, cls, name: str, values: dict) -> None:
        (self.directory / f"{name}.toml").write_text(config.template(cls, values))

    def start(self, *names: str) -> None:
        """The named daemons (all without names)."""
        for name in names or ("coordinator", *self.addresses):
            verb = "coordinator" if name == "coordinator" else "node"
            with open(self.directory / f"{name}.log", "ab") as log:
                arguments = [sys.executable, "-m", "kvguard.cli", verb, "--config", str(self.directory / f"{name}.toml")]
                self.running[name] = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=ROOT)

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL

    def engine(self, role: str, node: str, rank: str, instance: str = "llama", model: str = "numpy") -> Engine:
        arguments = [sys.executable, str(ENGINE), role, instance, rank, str(self.directory / node / "kvguard.sock"), model]
        with open(self.directory / f"engine-{len(self.engines)}.log", "ab") as log:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}  # packages may come by it
            process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment)
        engine = Engine(process)
        self.engines.append(engine)
        assert engine.hear() in ({"attached": True}, {"standby": True})
        return engine

    def ask(self, name: str, verb: str, /, **arguments) -> dict:
        return ask(self.coordinator_address if name == "coordinator" else self.addresses[name], verb, arguments, timeout=5.0)

    def cli(self, *arguments: str) -> tuple[int, dict]:
        """A verb's exit code and JSON document."""
        command = [sys.executable, "-m", "kvguard.cli", *arguments, "--coordinator", self.coordinator_address, "-o", "json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
        return done.returncode, json.loads(done.stdout) if done.stdout else {"error": done.stderr}

    def until(self, what: str, condition, timeout_s: float = 20.0):
        """The first true value of `condition()`; where a daemon can't be asked yet, it is asked again."""
        deadline, last = time.monotonic() + timeout_s, None
        while time.monotonic() < deadline:
            try:
                last = condition()
            except KvguardError as error:
                last = error
            else:
                if last:
                    return last
            time.sleep(0.02)  # between two looks at a condition with a deadline
        raise AssertionError(f"{what} did not come about; last seen: {last!r}\n{self.last_words()}")

    def last_words(self) -> str:
        return "\n".join(f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-25:]) for log in sorted(self.directory.glob("*.log")))

    def rank(self, rank: str) -> dict | None:
        """A rank in the coordinator's status."""
        found = [one for one in self.ask("coordinator", "status")["ranks"] if one["rank"] == rank and one["state"] != "standby"]
        return found[0] if found else None

    def protected(self, rank: str, positions: int) -> dict:
        """Wait until the status says that so many positions of a rank are committed, and protected."""

        def whole() -> dict | None:
            found = self.rank(rank)
            return found if found and found["state"] == "protected" and found["committed"] == found["acked"] == positions else None

        try:
            return self.until(f"rank {rank} protected at {positions}", whole)
        except AssertionError as error:
            raise AssertionError(f"{self.rank(rank)}\n{error}") from error

    def stop(self) -> None:
        for engine in self.engines:
            if engine.popen.poll() is None:
                engine.popen.kill()
            engine.popen.wait()
            with contextlib.suppress(BrokenPipeError):  # what was said last to one that is dead
                engine.popen.stdin.close()
            engine.popen.stdout.close()
        for process in self.running.values():
            process.terminate()
        codes = {name: process.wait(10) for name, process in self.running.items()}
        assert set(codes.values()) <= {0}, f"a daemon did not end cleanly: {codes}\n{self.last_words()}"


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    try:
        yield made
    finally:
        made.stop()
