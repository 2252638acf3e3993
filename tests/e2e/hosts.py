"""Hosts with a network of their own on one machine, and a cluster on them that is installed as docs/operations.md says.

Knows: namespaces, cables, the blocks of the handbook, the demo's world. Must not know: how recovery works, what a test expects.
Invariants: a namespace lives as long as a process of ours in it, and has no name: whatever ends this process ends them all; a host that loses power keeps its
disk (/etc, /var/lib) and nothing else; only processes inside a host's own network namespace are killed with it.

    switch (a bridge) -- eth0 of host-1, host-2, host-3 (daemon, stage, spares) and desk (coordinator, driver)
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from kvguard.errors import KvguardError
from kvguard.pipeline.demo import Demo, Options
from kvguard.pipeline.faults import Fault, protected, resumption
from kvguard.pipeline.world import Node, Process, World, WorldSettings, die_with_parent
from kvguard.transport import keys as keyring
from kvguard.transport.ask import ask

HANDBOOK = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
CLONE_NEWNET = 0x40000000
DESK = "10.77.0.14"
SPARE_PORTS = (7431, 7432, 7433)
KEEP = """
mount --bind "$1/etc" /etc
mount --bind "$1/var" /var/lib
mount -t tmpfs -o mode=755 tmpfs /run
ip link set lo up
echo up
exec cat
"""
_libc = ctypes.CDLL(None, use_errno=True)


def why_not() -> str:
    """What keeps this machine from having hosts; "" where nothing does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    for program, package in (("ip", "iproute2"), ("unshare", "util-linux"), ("nsenter", "util-linux")):
        if shutil.which(program) is None:
            return f"{program} isn't installed. Try: apt-get install {package}"
    script = "mount -t tmpfs tmpfs /run && ip link add br0 type bridge && ip link add cable0 type veth peer name cable1"
    tried = subprocess.run(["unshare", "--net", "--mount", "sh", "-ec", script], capture_output=True, text=True, check=False)
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


class Handbook(dict):
    """The handbook's blocks that have a name (```sh WHERE:WHAT), and which of them somebody has followed."""

    def __init__(self, text: str):
        found = re.findall(r"^```sh (\w+:[\w-]+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
        super().__init__(found)
        assert len(self) == len(found), "two blocks of one name"
        self.followed: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.followed.add(name)
        return super().__getitem__(name)


@contextlib.contextmanager
def inside(pid: int):
    """This thread's network, and that of what it starts, is that of a process; afterwards its own again."""
    with open("/proc/thread-self/ns/net", "rb") as own, open(f"/proc/{pid}/ns/net", "rb") as other:
        _entered(other)
        try:
            yield
        finally:
            _entered(own)


def _entered(namespace) -> None:
    if _libc.setns(namespace.fileno(), CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


class Namespace:
    """A network (and mounts) without a name, kept by one process of ours that waits for the end of its input."""

    def __init__(self, script: str, *arguments: str):
        command = ["unshare", "--net", "--mount", "--propagation", "private", "sh", "-euc", script, "sh", *arguments]
        self._keeper = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )  # fmt: skip
        assert self._keeper.stdout.readline() == "up\n", f"{command} ended with {self._keeper.wait()}"

    @property
    def pid(self) -> int:
        return self._keeper.pid

    def enter(self) -> tuple[str, ...]:
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net", f"--mount=/proc/{self.pid}/ns/mnt", "--")

    def pids(self) -> list[int]:
        """Every process whose network this is."""
        own, found = os.stat(f"/proc/{self.pid}/ns/net").st_ino, []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # it has just ended
                if os.stat(directory / "ns" / "net").st_ino == own:
                    found.append(int(directory.name))
        return found

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess:
        """A block of commands; what it said and its exit code."""
        command = [*self.enter(), "bash", "-euo", "pipefail", "-c", script]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False)

    def end(self) -> None:
        """SIGKILL to everything in it, its keeper last: then the namespace is gone, with its end of every cable."""
        for pid in self.pids():
            if pid != self.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._keeper.kill()
        self._keeper.wait()
        self._keeper.stdin.close()
        self._keeper.stdout.close()


class Host:
    """A machine: its disk is a directory, everything else goes with the power."""

    def __init__(self, name: str, address: str, directory: Path, handbook: Handbook, stage: int = -1):
        self.name, self.address, self.directory, self._handbook = name, address, directory, handbook
        self._port = f"port-{address.rpartition('.')[2]}"  # at the switch
        self.environment = {
            "NAME": name, "ADDRESS": address, "DESK": DESK, "STAGE": str(stage), "LC_ALL": "C.UTF-8", "COLUMNS": "200",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        (directory / "var" / "kvguard").mkdir(parents=True)
        shutil.copytree("/etc", directory / "etc", symlinks=True, ignore=shutil.ignore_patterns("kvguard", "ssl", "shadow*", "gshadow*"))
        self.namespace: Namespace | None = None

    def boot(self, switch: Namespace) -> None:
        """Power, and a cable to the switch."""
        self.namespace = Namespace(KEEP, str(self.directory))
        port = self._port
        self._checked(["ip", "link", "add", port, "netns", str(switch.pid), "type", "veth", "peer", "name", "eth0", "netns", str(self.namespace.pid)])
        self._checked([*switch.enter(), "ip", "link", "set", port, "master", "br0", "up"])
        self._checked([*self.namespace.enter(), "sh", "-ec", f"ip address add {self.address}/24 dev eth0; ip link set eth0 up"])

    @staticmethod
    def _checked(command: list[str]) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"

    def follow(self, block: str) -> str:
        """Does what the handbook says there; the output. It must succeed."""
        done = self.tried(block)
        assert done.returncode == 0, f"{self.name}, {block}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def tried(self, block: str) -> subprocess.CompletedProcess:
        return self.namespace.run(self._handbook[block], **self.environment)

    def power_off(self, switch: Namespace | None) -> None:
        """Everything at once: no process says goodbye to its peers, because the cable is dead before the processes are."""
        if self.namespace is not None:
            if switch is not None:
                self._checked([*switch.enter(), "ip", "link", "del", self._port])
            self.namespace.end()
            self.namespace = None


class HostsWorld(World):
    """The demo's world on hosts: daemons with keys, default settings, everything installed and started by the handbook's blocks."""

    def __init__(self, wanted: WorldSettings):
        self.handbook = Handbook(HANDBOOK.read_text(encoding="utf-8"))
        super().__init__(wanted)
        self.switch: Namespace | None = None
        self.hosts = {node.name: self._host(node.name, f"10.77.0.{11 + node.index}", node.index) for node in self.nodes}
        self.desk = self._host("desk", DESK)

    def _host(self, name: str, address: str, stage: int = -1) -> Host:
        host = Host(name, address, self.root / "hosts" / name, self.handbook, stage)
        shutil.copytree(self.settings.model, host.directory / "var" / "kvguard" / "model")
        return host

    def laid_out(self, count: int) -> tuple[str, str, list[Node]]:
        nodes = [Node(i, f"host-{i + 1}", f"tcp://10.77.0.{11 + i}:7420") for i in range(count)]
        return f"tcp://{DESK}:7400", f"tcp://{DESK}:7500", nodes

    # ---- installing

    def install(self) -> None:
        """Four machines with power and cables; keys carried around; configurations written."""
        self.switch = Namespace("ip link add br0 type bridge; ip link set br0 up; echo up; exec cat")
        everyone = [*self.hosts.values(), self.desk]
        for host in everyone:
            host.boot(self.switch)
        public = {host.name: host.follow("node:keys").split() for host in self.hosts.values()}
        own = self.desk.follow("desk:keys").split()
        public |= {"coordinator": own[:2], "driver": own[2:]}
        for host in everyone:
            peers = host.directory / "etc" / "kvguard" / "peers"
            peers.write_text("".join(f"allow {name} {key}\n" for name, (_, key) in public.items()), encoding="utf-8")
            host.follow("everywhere:peers")
        for host in self.hosts.values():
            host.follow("node:config")
            host.follow("node:engine")
        self.desk.follow("desk:config")
        self.desk.follow("desk:driver-config")

    def start(self) -> None:
        self.install()
        super().start()

    # ---- starting

    def _begin(self, host: Host, name: str, block: str, group: int = 0, pipes: bool = False, replaced: tuple[str, str] = ("", "")) -> Process:
        """A block that is one command which goes on."""
        command = shlex.split(self.handbook[block].replace(*replaced))
        environment = {**host.environment, "KVGUARD_LOG_NAME": name}
        return Process(name, command, self.root / "logs" / f"{name}.log", group, environment, pipes, launcher=host.namespace.enter())

    def start_coordinator(self) -> None:
        self.coordinator = self._begin(self.desk, "coordinator", "desk:coordinator")

    def start_daemon(self, node: Node, **overrides) -> None:
        assert not overrides, "a host's configuration is the handbook's"
        host = self.hosts[node.name]
        if host.namespace is None:
            host.boot(self.switch)
        node.daemon = self._begin(host, node.name, "node:daemon", group=self.group(node))

    def start_stage(self, node: Node, pp: int) -> Process:
        assert pp == node.index
        process = self._begin(self.hosts[node.name], f"stage-{pp}", "node:stage", group=self.group(node))
        return self._engine(node, process, 7430)

    def start_standby(self, node: Node) -> Process:
        taken = {int(engine.endpoint.rpartition(":")[2]) for engine in node.engines if engine.alive()}
        port = next(port for port in SPARE_PORTS if port not in taken)
        replaced = (str(SPARE_PORTS[0]), str(port))
        process = self._begin(self.hosts[node.name], f"standby-{node.name}-{port}", "node:spare", group=self.group(node), replaced=replaced)
        return self._engine(node, process, port)

    def _engine(self, node: Node, process: Process, port: int) -> Process:
        process.endpoint = f"tcp://{self.hosts[node.name].address}:{port}"
        node.engines.append(process)
        return process

    def start_driver(self) -> Process:
        self.driver = self._begin(self.desk, "driver", "desk:driver", pipes=True)
        return self.driver

    # ---- breaking, ending, looking

    def kill_node(self, node: Node) -> None:
        """Power loss of the whole host."""
        self.hosts[node.name].power_off(self.switch)
        for process in node.processes():
            process.popen.wait()
        node.daemon, node.engines = None, []
        node.generation += 1

    def stop(self) -> None:
        super().stop()
        for host in (*self.hosts.values(), self.desk):
            host.power_off(self.switch)
        if self.switch is not None:
            self.switch.end()
            self.switch = None

    def ask(self, verb: str, arguments: dict | None = None, node: Node | None = None, timeout_s: float = 5.0) -> dict:
        """As somebody at the desk, with the driver's key."""
        name, address = (node.name, node.address) if node else ("coordinator", self.coordinator_address)
        keys = keyring.load(self.desk.directory / "etc" / "kvguard" / "driver.key")
        with inside(self.desk.namespace.pid):
            return ask(address, verb, arguments or {}, timeout_s, keys, node=name)


class HostsDemo(Demo):
    """A demo on hosts: the one with the middle stage loses its power, or `cable`: the cable is cut, and plugged in again once the others have gone on."""

    def __init__(self, options: Options, world: HostsWorld, say, cable: bool):
        super().__init__(options, world, say)
        self._cable = cable

    def strike(self) -> None:
        """Afterwards the host is back, and everything protected."""
        if self._cable:
            self._cut()
        else:
            super().strike()
        self.client.wait("everything protected again", lambda: protected(self.world), 120.0)

    def _cut(self) -> None:
        world, client = self.world, self.client
        node, engine = world.engine_at(client.endpoints[self.stage])
        fault = self.fault = Fault("cable", self.stage, node, node.daemon)
        host = world.hosts[node.name]
        self.at_position = client.position("after")
        before = carrier(host)
        fault.struck_ns = time.monotonic_ns()  # a little early: what is said of detection is no less than it was
        host.follow("node:cut")
        fault.evidence = {"carrier": [before, carrier(host)]}
        fault.fired = fault.evidence["carrier"] == ["UP", "DOWN"] and node.daemon.alive()
        resumption(client, fault, client.wait)
        fault.evidence["slept_through"] = engine.alive()
        host.follow("node:plug")
        client.wait("the end of the rank that slept through it", lambda: not engine.alive(), 60.0)
        fault.evidence["waitpid"] = engine.popen.returncode
        world.replenish(client.endpoints)


def carrier(host: Host) -> str:
    """Whether the host's cable carries anything: UP or DOWN."""
    said = host.namespace.run("ip -o link show eth0").stdout
    found = re.search(r" state (\w+)", said)
    if found is None:
        raise KvguardError(f"{host.name} has no eth0: {said!r}")
    return found[1]
