"""The services under a real systemd: they start, are watched, killed, restarted, reloaded and stopped, and the replicas stay.

One machine for all: the tests stand in the order of an operator's day.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
from machine import ROOT, Machine, unavailable  # noqa: E402

from kvguard.cli import systemd  # noqa: E402

WHY_NOT = unavailable()
REQUIRED = os.environ.get("KVGUARD_REQUIRE_ALL") == "1" and "not installed" in WHY_NOT and "systemd-container" not in os.environ.get("KVGUARD_UNOBTAINABLE", "")
SKIPPED = bool(WHY_NOT) and not REQUIRED
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600), pytest.mark.skipif(SKIPPED, reason=f"no container can be booted: {WHY_NOT}")]
ENGINE = ROOT / "tests/e2e/numpy_engine.py"
RANK = "0.0.0"
POSITIONS_MAX = 1000  # of the engine's sequence
COORDINATOR, HOLDER, OTHER = "tcp://127.0.0.1:7400", "tcp://127.0.0.1:7420", "tcp://127.0.0.1:7421"
NODE = f"""
[node]
name = "b"
listen = "{HOLDER}"
coordinator = "{COORDINATOR}"
uids = [65534]
arena_bytes = "64MiB"
"""
OTHER_NODE = f"""
[node]
name = "a"
listen = "{OTHER}"
coordinator = "{COORDINATOR}"
runtime_dir = "/run/kvguard-a"
keep_replicas = "no"
"""
PATIENT = f"""
[coordinator]
listen = "{COORDINATOR}"
suspect_ms = 10000
dead_ms = 60000
reattach_ms = 60000
"""


class Engine:
    """An engine process in the machine, and the conversation with it."""

    def __init__(self, machine: Machine, socket: str, rank: str, *prefix: str, role: str = "rank") -> None:
        command = (*prefix, "env", f"PYTHONPATH={ROOT}", sys.executable, str(ENGINE), role, "llama", rank, socket)
        self.popen = machine.popen(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._hear() == {"attached" if role == "rank" else role: True}

    def _hear(self) -> dict:
        ready, _, _ = select.select([self.popen.stdout], [], [], 60)
        assert ready, "the engine says nothing"
        return json.loads(self.popen.stdout.readline())

    def tell(self, do: str, **arguments) -> dict:
        self.popen.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
        self.popen.stdin.flush()
        return self._hear()

    def close(self) -> None:
        self.popen.stdin.close()
        self.popen.wait(30)
        self.popen.stdout.close()


class Cluster:
    """Coordinator and holder as services; the other node runs beside them, without a service's care, and an engine on it."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        root = machine.root
        done = CliRunner().invoke(systemd.systemd, ["install", "--root", str(root), "--yes"])
        assert done.exit_code == 0, done.output
        for name, text in (("node", NODE), ("coordinator", PATIENT), ("a", OTHER_NODE)):
            (root / f"etc/kvguard/{name}.toml").write_text(text)
        for path in systemd.closed():  # as the warning says
            os.chmod(root / path.lstrip("/"), 0o711)
        short = root / "etc/systemd/system/kvguard-node.service.d"
        short.mkdir(exist_ok=True)
        (short / "test.conf").write_text("[Service]\nWatchdogSec=2\n")
        machine.boot()
        assert machine.run("systemd-sysusers").returncode == 0
        assert machine.run("systemd-tmpfiles", "--create").returncode in (0, 65, 73)  # of others' files, perhaps
        for service in ("kvguard-coordinator", "kvguard-node"):
            started = machine.run("systemctl", "start", service)
            assert started.returncode == 0, f"{started.stderr}\n{machine.last_words()}"
        command = (sys.executable, "-m", "kvguard.cli", "node", "--config", "/etc/kvguard/a.toml")
        started = machine.run("systemd-run", "--unit=kvguard-a", f"--setenv=PYTHONPATH={ROOT}", *command)
        assert started.returncode == 0, started.stderr
        machine.until("the other node", lambda: machine.ask(OTHER, "status"))
        self.engine = Engine(machine, "/run/kvguard-a/kvguard.sock", RANK)
        self.positions = 0
        self.commit(1)
        self.protected()
        self.width = self.sent_bytes()  # of one position

    def commit(self, count: int) -> None:
        self.positions += count
        self.engine.tell("step", commits=[["one", count]])

    def protected(self) -> None:
        def whole() -> bool:
            ranks = (self.machine.ask(COORDINATOR, "status") or {"ranks": []})["ranks"]
            return any(one["rank"] == RANK and one["state"] == "protected" and one["acked"] == self.positions for one in ranks)

        self.machine.until(f"{self.positions} positions protected", whole)

    def sent_bytes(self) -> int:
        return self.machine.ask(OTHER, "stats")["replicated_bytes"]

    def holder(self, *properties: str) -> dict[str, str]:
        return self.machine.show("kvguard-node", *properties)

    def pid(self) -> int:
        return int(self.holder("MainPID")["MainPID"])

    def signal(self, name: str) -> None:
        assert self.machine.run("kill", f"-{name}", str(self.pid())).returncode == 0

    def replaced(self, pid: int) -> None:
        """Another life of the service runs, with everything that was held, of which nothing was sent again: what it has was read back, or came since, never both.

        Counted by the holder. Where the engine goes on meanwhile the sender may have sent more: what is on its way when the holder ends is lost with the
        connection, unacknowledged, and goes again (tests/e2e/test_restart.py).
        """
        self.machine.until("another life", lambda: (now := self.holder("MainPID", "ActiveState")) and now["ActiveState"] == "active" and now["MainPID"] != str(pid))
        self.commit(3)
        self.protected()
        stats = self.machine.until("an answer", lambda: self.machine.ask(HOLDER, "stats"))
        store, came_bytes = stats["store"], stats["counters"]["payload_bytes_in"]
        assert store["positions_read_back"] * self.width + came_bytes == self.positions * self.width, self.machine.journal("kvguard-a")[-4000:]
        assert store["replicas_read_back"] == 1 and not store.get("positions_unsound") and not store.get("replicas_unreadable")
        assert self.engine.tell("sums")["sums"] == self.machine.ask(HOLDER, "sums", instance="llama", rank=RANK)["sums"]

    def drilled(self, *arguments: str) -> tuple[int, str, str]:
        """`kvguard drill run restart-daemon` against this cluster, as an operator runs it there, while the engine goes on: exit code, stdout, stderr."""
        command = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "kvguard.cli", "drill", "run", "restart-daemon", "--config", "/etc/kvguard/node.toml")
        running = self.machine.popen(*command, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while running.poll() is None and self.positions < POSITIONS_MAX:
            self.commit(1)
            self.machine.run("sleep", "0.05")  # the pace of an engine
        out, err = running.communicate(timeout=120)
        return running.returncode, out, err

    def close(self) -> None:
        if hasattr(self, "engine"):
            self.engine.close()


@pytest.fixture(scope="module")
def cluster():
    assert not WHY_NOT, WHY_NOT  # a missing package is a failure where everything is required
    machine, made = Machine(), None
    try:
        made = Cluster(machine)
        yield made
    finally:
        if made is not None:
            made.close()
        machine.close()


def test_ready_means_reachable(cluster):
    shown = cluster.holder("ActiveState", "StatusText", "NFileDescriptorStore", "User")
    assert shown["ActiveState"] == "active" and "ranks protected" in shown["StatusText"] and shown["User"] == "kvguard"
    cluster.commit(500)
    cluster.protected()
    assert cluster.holder("NFileDescriptorStore") == {"NFileDescriptorStore": "2"}  # an arena and its index
    cluster.machine.until("the status", lambda: "holding 1 streams" in cluster.holder("StatusText")["StatusText"])
    environment = cluster.machine.run("cat", f"/proc/{cluster.pid()}/status").stdout
    assert "CapEff:\t0000000000000020" in environment and "NoNewPrivs:\t1" in environment  # CAP_KILL alone


def test_killed_and_restarted_with_its_replicas(cluster):
    pid = cluster.pid()
    cluster.signal("KILL")
    cluster.replaced(pid)
    assert cluster.holder("NRestarts", "NFileDescriptorStore") == {"NRestarts": "1", "NFileDescriptorStore": "2"}


def test_a_hung_daemon_is_ended_by_the_watchdog(cluster):
    pid = cluster.pid()
    cluster.signal("STOP")
    cluster.machine.until("the watchdog", lambda: cluster.holder("NRestarts")["NRestarts"] == "2")
    assert "Watchdog timeout" in cluster.machine.journal("kvguard-node")
    cluster.replaced(pid)


def test_an_upgrade_keeps_the_replicas(cluster):
    pid = cluster.pid()
    assert cluster.machine.run("systemctl", "restart", "kvguard-node").returncode == 0
    cluster.replaced(pid)


@pytest.fixture
def whole(cluster):
    """The cluster with a standby, and the seed by which the drill restarts the service's daemon, not the other one."""
    spare = Engine(cluster.machine, "/run/kvguard-a/kvguard.sock", RANK, role="standby")
    seen = lambda: any(one["state"] == "standby" for one in (cluster.machine.ask(COORDINATOR, "status") or {"ranks": []})["ranks"])  # noqa: E731
    try:
        cluster.machine.until("the standby", seen)
        cluster.commit(50)
        cluster.protected()
        code, out, err = cluster.drilled("--repeat", "20", "--dry-run")
        assert code == 0 and "the daemon on b" in out, out + err
        yield cluster, next(line.split("seed ")[1].split(":")[0] for line in out.splitlines() if "the daemon on b" in line)
    finally:
        for process in psutil.Process(spare.popen.pid).children(recursive=True):
            process.kill()  # it waits for a rank, and would be told of none
        spare.close()


def test_the_drill_restarts_a_daemon_and_finds_its_replicas_kept(whole):
    cluster, seed = whole
    pid = cluster.pid()
    code, out, err = cluster.drilled("--seed", seed, "--yes", "-o", "json")
    (run,) = json.loads(out)["runs"]
    assert code == 0 and run["passed"] and run["fault"]["fired"] and f"(process {pid})" in run["fault"]["target"], out + err
    assert run["invariants"]["I11"] == "held" and run["recovery"] is None, out
    assert run["observed"]["kept"] == {"promised": True, "replicas": 1, "read_back": 1, "unreadable": 0, "unsound": 0, "verified": True}
    cluster.replaced(pid)
    told = cluster.machine.run("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "kvguard.cli", "drill", "report", "restart-daemon")
    assert told.returncode == 0 and "restart-daemon: 1 of 1 passed" in told.stdout and "I11" in told.stdout, told


def test_the_drill_says_that_nothing_was_kept(whole):
    """A unit whose store somebody has closed: the daemon can't know, and goes on without a word."""
    cluster, seed = whole
    machine, closed = cluster.machine, "/etc/systemd/system/kvguard-node.service.d/closed.conf"
    machine.run("sh", "-c", f"printf '[Service]\nFileDescriptorStoreMax=0\n' > {closed}")
    try:
        for words in ("daemon-reload", "stop kvguard-node", "clean --what=fdstore kvguard-node", "start kvguard-node"):
            machine.run("systemctl", *words.split())
        cluster.protected()
        assert cluster.holder("NFileDescriptorStore", "ActiveState") == {"NFileDescriptorStore": "0", "ActiveState": "active"}
        code, out, err = cluster.drilled("--seed", seed, "--yes", "-o", "json")
        (run,) = json.loads(out)["runs"]
        assert code == 1 and not run["passed"] and run["invariants"]["I11"] == "violated", out + err
        assert any("1 held, 0 read back" in failure for failure in run["failures"]), run["failures"]
    finally:
        machine.run("rm", closed)
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "restart", "kvguard-node")
    cluster.protected()  # what was not kept was sent again from the pool


def test_reload_takes_over_a_good_configuration_and_refuses_a_broken_one(cluster):
    machine, pid, file = cluster.machine, cluster.pid(), cluster.machine.root / "etc/kvguard/node.toml"
    write = lambda text: machine.run("sh", "-c", f"cat > /etc/kvguard/node.toml <<'EOF'\n{text}\nEOF")  # noqa: E731
    assert file.is_file() and write(NODE.replace("64MiB", "48MiB")).returncode == 0
    assert machine.run("systemctl", "reload", "kvguard-node").returncode == 0
    machine.until("the new budget", lambda: (machine.ask(HOLDER, "status") or {}).get("arena_bytes_max") == 48 << 20)
    write(NODE.replace("64MiB", "a lot"))
    refused = machine.run("systemctl", "reload", "kvguard-node")
    assert refused.returncode != 0 and "arena_bytes" in machine.journal("kvguard-node")
    cluster.signal("HUP")  # also past the check before it
    machine.until("the refusal", lambda: "the configuration stays as it was" in cluster.holder("StatusText")["StatusText"] + machine.journal("kvguard-node"))
    assert machine.ask(HOLDER, "status")["arena_bytes_max"] == 48 << 20 and cluster.pid() == pid
    assert cluster.holder("ActiveState") == {"ActiveState": "active"}
    write(NODE)


def test_an_engine_of_another_user_is_killed_through_its_pidfd(cluster):
    machine = cluster.machine
    engine = Engine(machine, "/run/kvguard/kvguard.sock", "0.1.0", "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    engine.tell("step", commits=[["two", 5]])
    machine.until("the rank", lambda: any(one["rank"] == "0.1.0" for one in (machine.ask(COORDINATOR, "status") or {"ranks": []})["ranks"]))
    machine.until("the order taken", lambda: machine.ask(COORDINATOR, "failover", instance="llama", rank="0.1.0"))
    assert engine.popen.wait(60) != 0
    engine.close()
    assert "Operation not permitted" not in machine.journal("kvguard-node")


def test_stopped(cluster):
    machine = cluster.machine
    assert machine.run("systemctl", "stop", "kvguard-node").returncode == 0
    assert cluster.holder("ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    left = machine.run("ls", "/run/kvguard").stdout.split()
    assert "journal.db" in left and "kvguard.sock" not in left and not [name for name in left if name.endswith((".arena", ".index"))]


def test_a_broken_configuration_is_not_tried_again_and_again(cluster):
    machine = cluster.machine
    machine.run("sh", "-c", "echo 'poll_ms = 0' >> /etc/kvguard/node.toml")
    assert machine.run("systemctl", "start", "kvguard-node").returncode != 0
    shown = cluster.holder("ActiveState", "ExecMainStatus", "NRestarts")
    assert shown == {"ActiveState": "failed", "ExecMainStatus": "78", "NRestarts": "0"}
