"""A small cluster on loopback: nodes, a coordinator and a driver as real processes, started, killed and started again.

Knows: processes, process groups, directories, configuration files of the same form that real hosts use. Must not know: torch, what the model says.
Invariants: every process started here ends with this one (it dies with its parent, and stop() waits for it); a node is one process group and one
runtime directory; only processes started here are ever signalled, through their own process group or handle.

    node = daemon + the rank that lives there + one hot standby, all in the daemon's process group.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from kvguard import config
from kvguard.errors import BadConfig, KvguardError, TimedOut
from kvguard.pipeline import settings
from kvguard.pipeline.ports import free_ports
from kvguard.pipeline.proxy import Gate, Proxy
from kvguard.transport.ask import ask

INSTANCE = "demo"
ANSWER_S = 5.0
LOOK_S = 0.05
LAST_LINES = 12
PR_SET_PDEATHSIG = 1
POOL_MS = 10_000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class WorldSettings:
    """What the cluster looks like."""

    root: Path  # a directory of its own; removed by whoever made it
    model: Path
    stages: int
    blocks: int = 1024
    chunk: int = 64
    threads: int = 1
    invariant: bool = True
    guarded: bool = True
    arena_bytes: int = 1 << 30
    standbys: bool = True
    gated: bool = False  # peers reach each daemon through a cable of ours that can be cut and slowed (proxy.py)
    node_overrides: dict = field(default_factory=dict)
    coordinator_overrides: dict = field(default_factory=dict)
    device: str = "host"  # of pools, for nodes and engines


def die_with_parent(parent: int) -> None:
    """In the child, before exec: SIGKILL when the supervisor goes, however it goes. One that went before this call sends nothing."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


class Process:
    """One started process: its handle, its log."""

    def __init__(
        self, name: str, arguments: list[str], log: Path, group: int = 0, environment: dict[str, str] | None = None, pipes: bool = False,
        launcher: tuple[str, ...] = (sys.executable, "-m"),
    ):  # fmt: skip
        """`launcher`: what `arguments` are given to; by default they name a module."""
        self.name = name
        self.log = log
        self.endpoint = ""  # of an engine process: what it advertises
        with open(log, "ab") as out:
            self.popen = subprocess.Popen(
                [*launcher, *arguments],
                stdin=subprocess.PIPE if pipes else subprocess.DEVNULL,
                stdout=subprocess.PIPE if pipes else out,
                stderr=out,
                process_group=group,
                preexec_fn=functools.partial(die_with_parent, os.getpid()),
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", **(environment or {})},
            )

    @property
    def pid(self) -> int:
        return self.popen.pid

    def alive(self) -> bool:
        return self.popen.poll() is None

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()

    def terminate(self, timeout_s: float = 5.0) -> None:
        """SIGTERM, then SIGKILL for one that doesn't listen."""
        if self.alive():
            self.popen.terminate()
        try:
            self.popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def last_words(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LAST_LINES:])


class Node:
    """A node's processes. `generation` counts its lives: a node that comes back has a new, empty runtime directory."""

    def __init__(self, index: int, name: str, address: str):
        self.index, self.name, self.address = index, name, address
        self.generation = 0
        self.bulk_port = 0
        self.gate: Gate | None = None
        self.daemon: Process | None = None
        self.engines: list[Process] = []

    def processes(self) -> list[Process]:
        return [*self.engines, *([self.daemon] if self.daemon else [])]


class World:
    """Starts, watches, breaks and mends the cluster."""

    def __init__(self, wanted: WorldSettings):
        self.settings = wanted
        self.root = wanted.root
        (self.root / "logs").mkdir(parents=True, exist_ok=True)
        count = max(2, wanted.stages) if wanted.guarded else wanted.stages
        self.coordinator_address, self.driver_address, self.nodes = self.laid_out(count)
        self.proxy: Proxy | None = None
        if wanted.gated:
            self._lay_cables()
        self.coordinator: Process | None = None
        self.driver: Process | None = None
        self._started = 0
        self.endpoints: list[str] = []

    def laid_out(self, count: int) -> tuple[str, str, list[Node]]:
        """Where the coordinator, the driver and `count` daemons listen. On other hosts than this one: overridden, with everything that starts or asks."""
        coordinator, driver, *ports = free_ports(2 + count)
        nodes = [Node(i, f"node-{i}", f"tcp://127.0.0.1:{port}") for i, port in enumerate(ports)]
        return f"tcp://127.0.0.1:{coordinator}", f"tcp://127.0.0.1:{driver}", nodes

    def _lay_cables(self) -> None:
        """A gate in front of each daemon, at a loopback address of its own and the daemon's port numbers."""
        self.proxy = Proxy()
        for node, bulk in zip(self.nodes, free_ports(len(self.nodes)), strict=True):
            port = int(node.address.rpartition(":")[2])
            node.bulk_port = bulk
            node.gate = self.proxy.gate(f"127.0.1.{node.index + 1}", "127.0.0.1", {port: port, bulk: bulk})

    # ---- starting

    def start(self) -> None:
        """Everything but the driver, which wants its ranks attached."""
        if self.settings.guarded:
            self.start_coordinator()
            for node in self.nodes:
                self.start_daemon(node)
        for stage in range(self.settings.stages):
            self.start_stage(self.nodes[stage], stage)
        if self.settings.guarded and self.settings.standbys:
            for node in self.nodes:
                self.start_standby(node)

    def start_coordinator(self) -> None:
        state = self.root / "coordinator"
        state.mkdir(exist_ok=True)
        path = self.root / "coordinator.toml"
        own = {"pool_ms": POOL_MS}  # a drill says which rung it proves, however busy the machine is
        values = {"listen": self.coordinator_address, "state_dir": str(state), **own, **self.settings.coordinator_overrides}
        path.write_text(config.template(config.CoordinatorConfig, values), encoding="utf-8")
        self.coordinator = self._process("coordinator", ["kvguard.cli", "coordinator", "--config", str(path)])

    def start_daemon(self, node: Node, **overrides) -> None:
        """`overrides`: of its configuration, for this life of it."""
        runtime = self.runtime_dir(node)
        runtime.mkdir(mode=0o700, exist_ok=True)
        path = self.root / f"{node.name}.toml"
        values = {
            "name": node.name, "runtime_dir": str(runtime), "listen": node.address, "coordinator": self.coordinator_address,
            "arena_bytes": self.settings.arena_bytes, "fault_injection": True, "device": self.settings.device, **self.settings.node_overrides, **overrides,
        }  # fmt: skip
        if node.gate is not None:
            values |= {"advertise": node.address.replace("127.0.0.1", node.gate.host), "bulk_port": node.bulk_port}
        path.write_text(config.template(config.NodeConfig, values), encoding="utf-8")
        alive = next((process for process in node.processes() if process.alive()), None)
        node.daemon = self._process(node.name, ["kvguard.cli", "node", "--config", str(path)], group=self.group(node) if alive else 0)

    def start_stage(self, node: Node, pp: int) -> Process:
        return self._start_engine(node, pp, f"stage-{pp}")

    def start_standby(self, node: Node) -> Process:
        return self._start_engine(node, -1, f"standby-{node.name}")

    def _start_engine(self, node: Node, pp: int, name: str) -> Process:
        self._started += 1
        endpoint = f"tcp://127.0.0.1:{free_ports(1)[0]}"
        wanted = settings.StageSettings(
            instance=INSTANCE, model=str(self.settings.model), stages=self.settings.stages, pp=pp, listen=endpoint,
            socket=str(self.runtime_dir(node) / "kvguard.sock"), blocks=self.settings.blocks, chunk=self.settings.chunk,
            threads=self.settings.threads, invariant=self.settings.invariant, guarded=self.settings.guarded,
            device=self.settings.device,
        )  # fmt: skip
        if pp >= 0:
            self.endpoints.append(endpoint)
        path = self.root / f"{name}-{self._started}.toml"
        settings.write(path, wanted)
        process = self._process(name, ["kvguard.pipeline.stage", str(path)], group=self.group(node))
        process.endpoint = endpoint
        node.engines.append(process)
        return process

    def start_driver(self) -> Process:
        path = self.root / "driver.toml"
        wanted = settings.DriverSettings(
            instance=INSTANCE, model=str(self.settings.model), stages=self.settings.stages, listen=self.driver_address,
            coordinator=self.coordinator_address if self.settings.guarded else "",
            endpoints=() if self.settings.guarded else tuple(self.endpoints), blocks=self.settings.blocks, chunk=self.settings.chunk,
        )  # fmt: skip
        settings.write(path, wanted)
        self.driver = self._process("driver", ["kvguard.pipeline.driver", str(path)], pipes=True)
        return self.driver

    def _process(self, name: str, arguments: list[str], group: int = 0, pipes: bool = False) -> Process:
        environment = {"KVGUARD_LOG_NAME": name}
        return Process(name, arguments, self.root / "logs" / f"{name}.log", group, environment, pipes)

    def runtime_dir(self, node: Node) -> Path:
        return self.root / f"{node.name}.{node.generation}"

    def group(self, node: Node) -> int:
        """The process group that the node's living processes share; 0 (a new one) when there is none."""
        for process in node.processes():
            if process.alive():
                return os.getpgid(process.pid)
        return 0

    # ---- breaking and mending

    def kill_node(self, node: Node) -> None:
        """Power loss: SIGKILL to the whole group, its runtime directory and all its memory gone."""
        group = self.group(node)
        assert group > 1 and group != os.getpgid(0), f"{node.name} has no process group of its own"
        os.killpg(group, signal.SIGKILL)
        for process in node.processes():
            process.popen.wait()
        shutil.rmtree(self.runtime_dir(node))
        node.daemon, node.engines = None, []
        node.generation += 1

    def replenish(self, endpoints: list[str]) -> None:
        """A daemon on every node again, and spare processes enough for the loss of any one of them.

        `endpoints`: of the ranks in use; other engines are spare.
        """
        for node in self.nodes:
            node.engines = [engine for engine in node.engines if engine.alive()]  # who was killed on purpose is no longer the node's
        crowd = max(sum(engine.endpoint in endpoints for engine in node.engines) for node in self.nodes)
        wanted = max(1, -(-crowd // (len(self.nodes) - 1)))
        for node in self.nodes:
            if node.daemon is None:
                self.start_daemon(node)  # the host is back, empty
            for _ in range(wanted - sum(engine.endpoint not in endpoints for engine in node.engines)):
                self.start_standby(node)

    def stop(self) -> None:
        """Ends everything that start() and its companions started, the driver first so that nothing is taken for a failure that matters."""
        everything = [process for node in self.nodes for process in node.processes()]
        everything += [process for process in (self.driver, self.coordinator) if process]
        for process in everything:
            if process.alive():
                process.popen.terminate()
        deadline = time.monotonic() + 5.0
        for process in everything:
            process.terminate(max(0.1, deadline - time.monotonic()))
            for pipe in (process.popen.stdin, process.popen.stdout):
                if pipe:
                    pipe.close()
        if self.proxy is not None:
            self.proxy.close()
            self.proxy = None

    # ---- looking

    def status(self) -> dict:
        return self.ask("status", timeout_s=2.0)

    def history(self) -> list[dict]:
        """The coordinator's recoveries, oldest first."""
        return self.ask("history")["history"]

    def query(self, node: Node, verb: str, arguments: dict) -> dict:
        """A node's answer."""
        return self.ask(verb, arguments, node)

    def ask(self, verb: str, arguments: dict | None = None, node: Node | None = None, timeout_s: float = ANSWER_S) -> dict:
        """The coordinator's answer, or a node's. A world whose hosts can't be reached from here asks in another way."""
        return ask(node.address if node else self.coordinator_address, verb, arguments or {}, timeout=timeout_s)

    def wait_until(self, what: str, condition, timeout_s: float):
        """The first true value of `condition()`. Raises TimedOut, or KvguardError at once, with its last words, if a process died meanwhile."""
        deadline = time.monotonic() + timeout_s
        while True:
            value = condition()
            if value:
                return value
            for process in [*(process for node in self.nodes for process in node.processes()), self.coordinator]:
                if process and not process.alive():
                    kind = BadConfig if process.popen.returncode == BadConfig.exit_code else KvguardError
                    raise kind(f"{process.name} ended with {process.popen.returncode} while waiting for {what}:\n{process.last_words()}")
            if time.monotonic() > deadline:
                raise TimedOut(f"{what} did not come about within {timeout_s:g} s. Try: the logs in {self.root / 'logs'}")
            time.sleep(LOOK_S)  # between two looks at a condition with a deadline

    def wait_ready(self, timeout_s: float = 120.0) -> dict:
        """All ranks attached and every standby known to the coordinator; returns the status."""

        def ready():
            status = self.status_or_none()
            if status is None:
                return None
            states = [rank["state"] for rank in status["ranks"]]
            ranks = sum(state not in ("standby", "lost") for state in states)
            standbys = states.count("standby") >= (len(self.nodes) if self.settings.standbys else 0)
            return status if ranks >= self.settings.stages and standbys else None

        return self.wait_until("every rank and standby attached", ready, timeout_s)

    def status_or_none(self) -> dict | None:
        try:
            return self.status()
        except KvguardError:
            return None

    def engine_at(self, endpoint: str) -> tuple[Node, Process]:
        """The node and process behind an endpoint that the driver uses."""
        return next((node, engine) for node in self.nodes for engine in node.engines if engine.endpoint == endpoint)

    def node_named(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)


class Conversation:
    """The driver's pipes: commands as JSON lines in, events as JSON lines out, read without ever blocking past a deadline."""

    def __init__(self, process: Process):
        self.process = process
        self._out = process.popen.stdout
        os.set_blocking(self._out.fileno(), False)
        self._rest = b""
        self.closed = False

    def say(self, **command) -> None:
        self.process.popen.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.popen.stdin.flush()

    def read(self) -> list[dict]:
        """Whole lines that are there now; closed becomes true at the end of the pipe."""
        events = []
        while True:
            chunk = self._out.read(1 << 16)
            if chunk is None:
                return events
            if chunk == b"":
                self.closed = True
                return events
            *lines, self._rest = (self._rest + chunk).split(b"\n")
            events += [json.loads(line) for line in lines if line.strip()]

    def fileno(self) -> int:
        return self._out.fileno()
