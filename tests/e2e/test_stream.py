"""One rank, one holder, real processes: what the pool has, the replica has; every fault around the stream leaves engine and replica as they were."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from kvguard.format import wire

pytestmark = pytest.mark.e2e
RANK = "0.1.0"


def replica_sums(cluster, holder="b"):
    return cluster.ask(holder, "sums", instance="llama", rank=RANK)["sums"]


def running(cluster):
    cluster.start()
    return cluster.engine("rank", "a", RANK)


def test_the_replica_equals_the_pool(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["long", 100], ["short", 3]])
    for _ in range(30):
        engine.tell("step", commits=[["long", 1], ["short", 1]])
    status = cluster.protected(RANK, 130 + 33)
    assert (status["node"], status["holders"], status["sequences"], status["lag_tokens"]) == ("a", ["b"], 2, 0)
    assert engine.tell("sums")["sums"] == replica_sums(cluster)
    code, listed = cluster.cli("replicas", "list")
    assert code == 0 and listed["schema"] == "kvguard.replicas/1"
    assert [(one["sequence"], one["holder"], one["positions"], one["tier"]) for one in listed["replicas"]] == [("long", "b", 130, "memory"), ("short", "b", 33, "memory")]
    code, verified = cluster.cli("replicas", "verify")
    assert code == 0 and [one["verified"] for one in verified["replicas"]] == [True, True]
    code, shown = cluster.cli("replicas", "show", "long")
    assert code == 0 and len(shown["replicas"][0]["blocks"]) == 9
    code, status = cluster.cli("status")
    assert code == 0 and [(one["node"], one["state"]) for one in status["nodes"]] == [("a", "alive"), ("b", "alive")]
    cluster.until("the wait measured", lambda: cluster.ask("a", "stats")["time_to_protected_ms"])
    engine.tell("step", commits=[["long", 1], ["short", 1]])
    cluster.protected(RANK, 132 + 33)
    assert cluster.ask("a", "stats")["lag_samples"] >= 2


def test_truncate_release_and_reuse_reach_the_replica(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 40], ["two", 40]])
    cluster.protected(RANK, 80)
    engine.tell("truncate", sequence="one", position=21)
    engine.tell("release", sequence="two")
    engine.tell("step", commits=[["one", 30], ["three", 50]])  # into blocks that others had
    cluster.protected(RANK, 51 + 50)
    assert engine.tell("sums")["sums"] == replica_sums(cluster)
    assert set(replica_sums(cluster)) == {"one", "three"}


def test_a_frame_damaged_on_the_way_is_caught_and_sent_again(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    assert cluster.ask("a", "corrupt_frame") == {"armed": 1}
    engine.tell("step", commits=[["one", 5]])
    cluster.protected(RANK, 25)
    assert cluster.ask("a", "stats")["frames_corrupted"] == 1
    assert cluster.ask("b", "stats")["checksum_failures"] == 1
    assert engine.tell("sums")["sums"] == replica_sums(cluster)


def test_a_damaged_replica_is_seen_by_the_comparison_alone(cluster):
    """The negative control: bytes and sum change together, so verify holds and only the pool's own sums tell."""
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    assert cluster.ask("b", "corrupt_replica", instance="llama", rank=RANK, sequence="one", position=3)["changed"]
    assert cluster.cli("replicas", "verify")[1]["replicas"][0]["verified"] is True
    pool, replica = engine.tell("sums")["sums"]["one"], replica_sums(cluster)["one"]
    assert [n for n in range(20) if pool[n] != replica[n]] == [3]


def test_killed_engine_is_seen(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    engine.kill()
    found = cluster.until("the death at the coordinator", lambda: (rank := cluster.rank(RANK)) and rank["state"] in ("recovering", "lost") and rank)
    assert found["reason"]
    instance = cluster.ask("coordinator", "status")["instances"][0]
    assert instance["epoch"] == 1 and "died" in cluster.last_words()
    assert len(replica_sums(cluster)["one"]) == 20  # pinned until the rank lives again


def test_clean_detach_is_no_failure(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    assert engine.tell("detach") == {"detached": True}
    cluster.until("the rank gone", lambda: cluster.rank(RANK) is None)
    assert engine.popen.wait(10) == 0
    assert all(one["epoch"] == 0 for one in cluster.ask("coordinator", "status")["instances"])


def test_daemon_killed_and_restarted(cluster):
    cluster.configure_coordinator(dead_ms=60_000, reattach_ms=60_000)  # no emitter vouches for the engine here, and a busy machine starts daemons slowly
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    cluster.kill("a")
    for _ in range(10):  # the engine notices nothing
        assert engine.tell("step", commits=[["one", 1]]) == {"lengths": {"one": len(engine.tell("sums")["sums"]["one"])}}
    cluster.start("a")
    cluster.protected(RANK, 30)
    assert engine.tell("sums")["sums"] == replica_sums(cluster)
    assert all(one["epoch"] == 0 for one in cluster.ask("coordinator", "status")["instances"])


def test_holder_killed_and_restarted(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    cluster.kill("b")
    engine.tell("step", commits=[["one", 7]])
    found = cluster.until("unprotected", lambda: (rank := cluster.rank(RANK)) and rank["state"] == "unprotected" and rank)
    assert found["reason"]
    cluster.start("b")
    cluster.protected(RANK, 27)
    assert engine.tell("sums")["sums"] == replica_sums(cluster)


def test_coordinator_killed_and_restarted(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    cluster.kill("coordinator")
    engine.tell("step", commits=[["one", 9]])
    cluster.until("replication without a coordinator", lambda: len(replica_sums(cluster)["one"]) == 29)
    cluster.start("coordinator")
    cluster.protected(RANK, 29)
    assert all(one["epoch"] == 0 for one in cluster.ask("coordinator", "status")["instances"])


def test_two_live_processes_as_one_rank(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    second = cluster.engine("rank", "a", RANK)
    cluster.until("the second refused", lambda: "held by a process that lives" in second.tell("status")["refused"])
    engine.tell("step", commits=[["one", 1]])
    cluster.protected(RANK, 21)


GARBAGE = (
    b"",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + bytes(32),  # a ZMTP greeting that goes nowhere
    wire.MAGIC + struct.pack("<HHIIQ", 1, 0, 0xFFFFFFFF, 0xFFFFFFFF, 0),  # absurd lengths
    os.urandom(4096),
)


def test_garbage_on_every_port_and_socket(cluster):
    engine = running(cluster)
    engine.tell("step", commits=[["one", 20]])
    cluster.protected(RANK, 20)
    for address in (cluster.coordinator_address, *cluster.addresses.values()):
        host, port = address.removeprefix("tcp://").split(":")
        for data in GARBAGE:
            with socket.create_connection((host, int(port))) as line:
                line.sendall(data)
    for name in cluster.addresses:
        for data in GARBAGE:
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as line:
                line.connect(str(cluster.directory / name / "kvguard.sock"))
                line.sendall(data or b"x")
                line.settimeout(10)
                assert line.recv(1) == b""  # told to go
    engine.tell("step", commits=[["one", 1]])
    cluster.protected(RANK, 21)
    assert engine.tell("sums")["sums"] == replica_sums(cluster)
