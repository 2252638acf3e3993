"""Pools on a GPU under real daemons: packed by the engine, salvaged at its death, adopted or pulled by a standby. Without a GPU, rehearsed in host memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


@pytest.fixture(params=["rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)])
def on_gpu(request, cluster, monkeypatch):
    """A cluster whose pools live there. `node`: more lines of its [node] sections."""
    monkeypatch.setenv("ENGINE_DEVICE", request.param)

    def started(**node):
        (cluster.directory / "conf.d").mkdir()
        lines = "".join(f"{key} = {value!r}\n".replace("'", '"') for key, value in {"device": request.param, "ring_bytes": 1 << 20, **node}.items())
        (cluster.directory / "conf.d" / "gpu.toml").write_text(f"[node]\n{lines}")
        cluster.start()
        return cluster

    return started


def spare_is_known(cluster) -> None:
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))


@pytest.mark.parametrize("capture", ["engine", "daemon"])
def test_every_step_reaches_the_holder(on_gpu, capture):
    cluster = on_gpu(capture=capture)
    engine = cluster.engine("rank", "a", RANK)
    if capture == "engine":
        cluster.until("the ring", lambda: engine.tell("counts")["joined"])
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    for _ in range(20):
        engine.tell("step", commits=[["one", 1], ["two", 1]])
    engine.tell("truncate", sequence="two", position=9)
    engine.tell("step", commits=[["two", 3]])
    engine.tell("release", sequence="one")
    engine.tell("step", commits=[["three", 50]])
    cluster.protected(RANK, 62)
    assert engine.tell("intact")["wrong"] == []
    assert engine.tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]
    counts = engine.tell("counts")
    assert not counts["lost"] and (counts["packed"] > 0) == (capture == "engine")


def test_a_killed_engine_s_gpu_memory_is_salvaged_and_adopted(on_gpu):
    cluster = on_gpu()
    engine = cluster.engine("rank", "a", RANK)
    standby = cluster.engine("standby", "a", RANK)
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    cluster.protected(RANK, 45)
    spare_is_known(cluster)
    engine.kill()
    said = standby.hear(30.0)
    assert said == {"claimed": True, "adopted": True, "lengths": {"one": 40, "two": 5}}
    assert standby.tell("intact")["wrong"] == []
    standby.tell("step", commits=[["one", 10]])
    cluster.protected(RANK, 55)
    assert standby.tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]
    assert "2 of 2 sequences salvaged" in (cluster.directory / "a.log").read_text()


def test_a_pool_in_many_pieces_goes_over_the_socket_and_is_salvaged(on_gpu, monkeypatch):
    """As torch's expandable segments: more descriptors than a message takes."""
    monkeypatch.setenv("ENGINE_IN_PIECES", "1")
    cluster = on_gpu()
    engine = cluster.engine("rank", "a", RANK)
    standby = cluster.engine("standby", "a", RANK)
    cluster.until("the ring", lambda: engine.tell("counts")["joined"])
    engine.tell("step", commits=[["one", 900], ["two", 5]])
    engine.tell("step", commits=[["one", 1], ["two", 1]])
    cluster.protected(RANK, 907)
    assert engine.tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]
    spare_is_known(cluster)
    engine.kill()
    assert standby.hear(30.0) == {"claimed": True, "adopted": True, "lengths": {"one": 901, "two": 6}}
    assert standby.tell("intact")["wrong"] == []
    assert "2 of 2 sequences salvaged" in (cluster.directory / "a.log").read_text()


def test_an_engine_s_unit_waits_for_its_memory(on_gpu):
    cluster = on_gpu()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    cluster.protected(RANK, 40)
    command = [sys.executable, "-m", "kvguard.cli", "wait-salvaged", "llama", RANK, "--config", str(cluster.directory / "a.toml")]
    lives = subprocess.run([*command, "--wait", "0"], capture_output=True, text=True, timeout=60, check=False)
    assert lives.returncode == 5 and "is still served" in lives.stderr
    engine.kill()
    assert subprocess.run([*command, "--wait", "20"], timeout=60, check=False).returncode == 0
    assert "1 of 1 sequences salvaged" in (cluster.directory / "a.log").read_text()


def test_a_lost_node_s_replica_is_pulled_into_a_gpu(on_gpu):
    cluster = on_gpu()
    engine = cluster.engine("rank", "a", RANK)
    standby = cluster.engine("standby", "b", RANK)
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    cluster.protected(RANK, 45)
    spare_is_known(cluster)
    cluster.kill("a")
    engine.kill()
    assert standby.hear(30.0) == {"claimed": True, "adopted": False, "lengths": {"one": 40, "two": 5}}
    assert standby.tell("intact")["wrong"] == []


def test_a_daemon_that_comes_again_gives_another_ring(on_gpu, cluster):
    cluster.configure_coordinator(suspect_ms=10_000, dead_ms=30_000)
    on_gpu()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    cluster.kill("a")
    engine.tell("step", commits=[["one", 5]])  # nobody reads it; nobody waits
    cluster.start("a")
    cluster.protected(RANK, 25)
    cluster.until("another ring", lambda: engine.tell("counts")["joined"])
    before = engine.tell("counts")["packed"]
    engine.tell("step", commits=[["one", 1]])
    cluster.protected(RANK, 26)
    assert engine.tell("counts")["packed"] == before + 1
    assert engine.tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU here")
def test_a_daemon_without_its_gpu_refuses_engines_says_so_and_serves_those_in_host_memory(cluster, monkeypatch):
    monkeypatch.setenv("ENGINE_DEVICE", "rehearsal")
    (cluster.directory / "conf.d").mkdir()
    (cluster.directory / "conf.d" / "gpu.toml").write_text('[node]\ndevice = "cuda"\n')
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    refused = cluster.until("the refusal", lambda: engine.tell("status")["refused"])
    assert "Try:" in refused and ("cupy" in refused or "driver" in refused)
    assert engine.tell("step", commits=[["one", 3]]) == {"lengths": {"one": 3}}  # it serves on, without protection
    assert cluster.ask("a", "status")["ranks"] == []
    assert "no engine with a pool on a GPU can be protected" in (cluster.directory / "a.log").read_text()
    cluster.until("a heartbeat", lambda: [fault for node in cluster.ask("coordinator", "status")["nodes"] for fault in node["device_faults"]])
    code, told = cluster.cli("check")
    found = {finding["subject"]: finding for finding in told["findings"]}
    assert code == 2 and found["device cuda of node a"]["severity"] == "critical" and "Try:" in found["device cuda of node a"]["reason"]
    monkeypatch.setenv("ENGINE_DEVICE", "host")
    other = cluster.engine("rank", "a", "0.0.0", instance="other")
    other.tell("step", commits=[["one", 7]])
    cluster.protected("0.0.0", 7)
