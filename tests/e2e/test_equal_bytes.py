"""Tensor-parallel ranks that hold equal bytes, in real processes: one shard, copied once, from which each of them comes back, bit by bit."""

from __future__ import annotations

from collections import Counter

import pytest

pytestmark = pytest.mark.e2e
BOTH = ("0.0.0", "0.0.1")
COMMITS = [["one", 40], ["two", 5]]


def attached(cluster, node: str) -> dict:
    return {rank: cluster.engine("rank", node, rank, model="latent") for rank in BOTH}


def spares(cluster, node: str, ranks=BOTH) -> dict:
    made = {rank: cluster.engine("standby", node, rank, model="latent") for rank in ranks}
    cluster.until("the standbys known", lambda: sum(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]) == len(ranks))
    return made


def running(cluster):
    cluster.until("the instance running", lambda: cluster.ask("coordinator", "status")["instances"][0]["state"] == "running")


def shared(cluster, positions: int) -> None:
    """Both are protected, and the second by what is copied of the first."""
    for rank in BOTH:
        cluster.protected(rank, positions)
    cluster.until("one copies for both", lambda: [cluster.rank(rank)["copied_as"] for rank in BOTH] == ["0.0.0"] * 2)


def held_by(cluster, node: str) -> dict[str, int]:
    """Sequences held there, by rank."""
    return dict(Counter(one["rank"] for one in cluster.ask(node, "replicas")["replicas"]))


def test_a_lost_node_leaves_one_replica_to_both_ranks(cluster):
    cluster.start()
    engines, standbys = attached(cluster, "a"), spares(cluster, "b")
    shared(cluster, 0)
    sent = cluster.ask("a", "stats")["replicated_bytes"]
    for engine in engines.values():
        engine.tell("step", commits=COMMITS)
    shared(cluster, 45)
    sums = engines["0.0.0"].tell("sums")["sums"]
    width = 3 * 64 * 4
    assert cluster.ask("a", "stats")["replicated_bytes"] - sent == 45 * width, "one rank's bytes, not two's"
    assert held_by(cluster, "b") == {"0.0.0": 2} and sums == engines["0.0.1"].tell("sums")["sums"]
    assert cluster.cli("check")[0] == 0, "who is copied with another is not called unprotected"
    cluster.kill("a")
    for engine in engines.values():
        engine.kill()
    for standby in standbys.values():
        assert standby.hear(30.0) == {"claimed": True, "adopted": False, "lengths": {"one": 40, "two": 5}}
        assert standby.tell("intact")["wrong"] == [] and standby.tell("sums")["sums"] == sums
    running(cluster)
    cluster.start("a")
    for standby in standbys.values():
        standby.tell("step", commits=[["one", 10]])
    shared(cluster, 55)
    cluster.until("one of them is held", lambda: held_by(cluster, "a") == {"0.0.0": 2})
    assert standbys["0.0.1"].tell("sums")["sums"] == cluster.ask("a", "sums", instance="llama", rank="0.0.0")["sums"]


@pytest.mark.parametrize("lost", BOTH)
def test_one_of_them_dies_and_comes_back_elsewhere_from_what_is_held_of_the_shard(cluster, lost):
    """Its memory is gone with it (no spare on its node): the other one lives on, and both are copied for themselves from then on."""
    cluster.start()
    engines, standbys = attached(cluster, "a"), spares(cluster, "b", (lost,))
    for engine in engines.values():
        engine.tell("step", commits=COMMITS)
    shared(cluster, 45)
    engines[lost].kill()
    assert standbys[lost].hear(30.0) == {"claimed": True, "adopted": False, "lengths": {"one": 40, "two": 5}}
    (other,) = [rank for rank in BOTH if rank != lost]
    assert engines[other].tell("restore", timeout_s=20.0)["lengths"] == {"one": 40, "two": 5}
    running(cluster)
    for engine in (standbys[lost], engines[other]):
        assert engine.tell("intact")["wrong"] == []
        engine.tell("step", commits=[["one", 10]])
    for rank in BOTH:
        cluster.protected(rank, 55)
        assert cluster.rank(rank)["copied_as"] == rank
    cluster.until("former lives are let go", lambda: (held_by(cluster, "a"), held_by(cluster, "b")) == ({lost: 2}, {other: 2}))
    assert standbys[lost].tell("sums")["sums"] == engines[other].tell("sums")["sums"]


def test_a_handoff_of_the_second_one_finds_everything_at_its_target(cluster):
    cluster.start()
    engines, standbys = attached(cluster, "a"), spares(cluster, "b", BOTH[1:])
    for engine in engines.values():
        engine.tell("step", commits=COMMITS)
    shared(cluster, 45)
    cluster.ask("coordinator", "handoff", instance="llama", rank="0.0.1", to="b")
    assert standbys["0.0.1"].hear(30.0)["lengths"] == {"one": 40, "two": 5}
    assert standbys["0.0.1"].tell("intact")["wrong"] == []
    assert engines["0.0.0"].tell("restore", timeout_s=20.0)["lengths"] == {"one": 40, "two": 5}
    running(cluster)
