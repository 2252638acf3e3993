"""Replicas outlive their daemon, in real processes: killed or ended, the next one finds them, verifies them, and senders go on where they were."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from kvguard.store.shelf import on_tmpfs

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(not Path("/dev/shm").is_dir() or not on_tmpfs("/dev/shm"), reason="no tmpfs at /dev/shm: nothing keeps replicas without a service manager"),
]
RANK = "0.1.0"


@pytest.fixture
def tmp_path():
    """Where the cluster's runtime directories are: memory, as /run is."""
    directory = Path(tempfile.mkdtemp(prefix=f"kvguard-test-{os.getpid()}-", dir="/dev/shm"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def cluster(cluster):
    cluster.configure_coordinator(dead_ms=60_000, reattach_ms=60_000)  # nobody vouches for the engine here, and a busy machine starts daemons slowly
    return cluster


def sent_bytes(cluster) -> int:
    return cluster.ask("a", "stats")["replicated_bytes"]


def replica_sums(cluster):
    return cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]


def end(cluster, name: str, how: signal.Signals) -> None:
    if how is signal.SIGKILL:
        cluster.kill(name)
        return
    process = cluster.running.pop(name)
    process.send_signal(how)
    assert process.wait(10) == 0


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_holder_comes_back_with_everything(cluster, how):
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["long", 1000], ["short", 30]])
    cluster.protected(RANK, 1030)
    token_bytes = sent_bytes(cluster) // 1030
    assert token_bytes > 100
    end(cluster, "b", how)
    cluster.until("unprotected", lambda: (rank := cluster.rank(RANK)) and rank["state"] == "unprotected")
    engine.tell("step", commits=[["long", 5]])
    cluster.start("b")
    cluster.protected(RANK, 1035)
    assert sent_bytes(cluster) == 1035 * token_bytes  # nothing that was held was sent again
    assert engine.tell("sums")["sums"] == replica_sums(cluster)
    counters = cluster.ask("b", "stats")["store"]
    assert counters["replicas_read_back"] == 1 and not counters.get("positions_unsound") and not counters.get("replicas_unreadable")
    assert all(one["verified"] for one in cluster.cli("replicas", "verify")[1]["replicas"])
    assert "all replicas are verified" in (cluster.directory / "b.log").read_text()


def test_what_a_holder_never_got_goes_again_and_nothing_else(cluster):
    """At least once: what is on its way to a holder that ends is lost with the connection, and its sender can't know whether it was written down."""
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 200]])
    cluster.protected(RANK, 200)
    token_bytes = sent_bytes(cluster) // 200
    stopped = psutil.Process(cluster.running["b"].pid)
    stopped.suspend()
    cluster.until("stopped", lambda: stopped.status() == psutil.STATUS_STOPPED)
    engine.tell("step", commits=[["one", 5]])
    cluster.until("on their way", lambda: sent_bytes(cluster) == 205 * token_bytes)
    cluster.kill("b")
    cluster.start("b")
    cluster.protected(RANK, 205)
    assert sent_bytes(cluster) == (205 + 5) * token_bytes
    stats = cluster.ask("b", "stats")
    assert stats["store"]["positions_read_back"] == 200 and stats["counters"]["payload_bytes_in"] == 5 * token_bytes
    assert engine.tell("sums")["sums"] == replica_sums(cluster)


def test_both_daemons_come_back(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 200]])
    cluster.protected(RANK, 200)
    token_bytes = sent_bytes(cluster) // 200
    cluster.kill("a")
    cluster.kill("b")
    engine.tell("step", commits=[["one", 3]])
    cluster.start("a", "b")
    cluster.protected(RANK, 203)
    assert cluster.ask("a", "stats")["counters"]["payload_bytes_out"] == 3 * token_bytes
    assert engine.tell("sums")["sums"] == replica_sums(cluster)
    assert all(one["epoch"] == 0 for one in cluster.ask("coordinator", "status")["instances"])


def test_a_replica_damaged_while_the_daemon_was_away_is_cut_and_sent_again(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 200]])
    cluster.protected(RANK, 200)
    before = sent_bytes(cluster)
    cluster.kill("b")
    (arena,) = (cluster.directory / "b").glob("*.arena")
    with arena.open("r+b") as file:  # the first position's first byte
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    cluster.start("b")
    cluster.until("what didn't hold sent again", lambda: sent_bytes(cluster) > before)
    cluster.protected(RANK, 200)
    assert cluster.ask("b", "stats")["store"]["positions_unsound"] >= 1
    assert engine.tell("sums")["sums"] == replica_sums(cluster)


def test_a_node_dies_after_its_holder_came_back(cluster):
    """The recovery stands on a replica that only the former life of its daemon received."""
    cluster.configure_coordinator(dead_ms=5000, suspect_ms=2000, emitter_ms=5000)
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    standby = cluster.engine("standby", "b", RANK)
    engine.tell("step", commits=[["one", 150], ["two", 7]])
    cluster.protected(RANK, 157)
    cluster.kill("b")
    cluster.kill("a")
    engine.kill()
    cluster.start("b")
    said = standby.hear(60.0)
    assert said == {"claimed": True, "adopted": False, "lengths": {"one": 150, "two": 7}}
    assert standby.tell("intact")["wrong"] == []
