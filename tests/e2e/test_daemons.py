"""Daemons as an operator meets them: wrong configurations, a second daemon in the same place, signals, modules that must not be loaded."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run([sys.executable, "-m", "kvguard.cli", *arguments], capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)


def answers(cluster, name):
    return lambda: cluster.ask(name, "stats")


def test_a_wrong_configuration_names_every_key(tmp_path):
    file = tmp_path / "node.toml"
    file.write_text('[node]\nname = "a"\nlisten = "10.0.0.1"\npoll_ms = 0\n')
    done = run("node", "--config", str(file))
    assert done.returncode == 78
    assert f"{file}:3: listen: " in done.stderr and f"{file}:4: poll_ms: " in done.stderr
    assert run("coordinator", "--config", str(tmp_path / "none.toml")).returncode == 78
    assert run("node").returncode == 2


def test_a_second_daemon_refuses_the_same_place(cluster):
    cluster.start("coordinator", "a")
    cluster.until("the node", answers(cluster, "a"))
    cluster.until("the coordinator", answers(cluster, "coordinator"))
    for verb, name in (("node", "a"), ("coordinator", "coordinator")):
        done = run(verb, "--config", str(cluster.directory / f"{name}.toml"))
        assert done.returncode == 78 and "belongs to a process that runs" in done.stderr
    assert cluster.ask("a", "status")["node"] == "a"


def test_an_address_that_is_taken(cluster):
    cluster.start("a")
    cluster.until("the node", answers(cluster, "a"))
    text = (cluster.directory / "a.toml").read_text().replace(str(cluster.directory / "a"), str(cluster.directory / "elsewhere"))
    (cluster.directory / "twin.toml").write_text(text)
    done = run("node", "--config", str(cluster.directory / "twin.toml"))
    assert done.returncode == 78 and cluster.addresses["a"].removeprefix("tcp://") in done.stderr


def test_signals(cluster):
    cluster.start("a")
    cluster.until("the node", answers(cluster, "a"))
    process, file, log = cluster.running["a"], cluster.directory / "a.toml", cluster.directory / "a.log"
    good = file.read_text()
    file.write_text(good + "poll_ms = 0\n")
    process.send_signal(signal.SIGHUP)
    cluster.until("the refusal", lambda: "the configuration stays as it was" in log.read_text())
    file.write_text(good)
    process.send_signal(signal.SIGHUP)
    cluster.until("the new one", lambda: "configuration read again" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
    assert sorted(path.name for path in (cluster.directory / "a").iterdir()) == ["journal.db"]


def test_nothing_heavy_is_loaded(cluster):
    cluster.start()
    for name in cluster.running:
        cluster.until(name, answers(cluster, name))
        maps = Path(f"/proc/{cluster.running[name].pid}/maps").read_text()
        assert not [word for word in ("/torch/", "/cupy/", "/transformers/") if word in maps]


def test_orders_to_the_coordinator(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", "0.0.0")
    engine.tell("step", commits=[["one", 5]])
    cluster.protected("0.0.0", 5)
    assert cluster.cli("pause", "--dry-run")[1]["dry_run"] and cluster.ask("coordinator", "status")["paused"] is False
    assert cluster.cli("pause") == (0, {"schema": "kvguard.order/1", "order": "pause", "paused": True, "dry_run": False})
    assert cluster.ask("coordinator", "status")["paused"] is True
    assert cluster.cli("failover", "llama", "0.0.0", "--yes")[0] == 4
    assert cluster.cli("unpause", "--yes") == (0, {"schema": "kvguard.order/1", "order": "unpause", "paused": False, "dry_run": False})
    code, would = cluster.cli("failover", "llama", "0.0.0", "--dry-run")
    assert code == 0 and would["would"] == "fence and rebuild" and would["node"] == "a"
    assert cluster.cli("failover", "llama", "9.9.9", "--yes")[0] == 4
    code, said = cluster.cli("failover", "llama", "0.0.0", "--yes")
    assert code == 0 and said["epoch"] == 1
    assert engine.popen.wait(20) == -signal.SIGKILL  # a rank that lives is ended, through its pidfd, before another takes its place
