"""Recovery without a model: a killed process's pool is adopted, a lost node's replica is pulled, survivors truncate; every byte is where it was."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


def lengths_after(cluster, standby, rank=RANK):
    """The claim is carried out, and the instance runs in its new epoch."""
    said = standby.hear(30.0)
    assert said["claimed"]
    cluster.until("the instance running", lambda: cluster.ask("coordinator", "status")["instances"][0]["state"] == "running")
    return said


def test_a_killed_process_leaves_its_pool_to_a_standby(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    standby = cluster.engine("standby", "a", RANK)
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    cluster.protected(RANK, 45)
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    engine.kill()
    said = lengths_after(cluster, standby)
    assert said == {"claimed": True, "adopted": True, "lengths": {"one": 40, "two": 5}}
    assert standby.tell("intact")["wrong"] == []
    standby.tell("step", commits=[["one", 10]])
    cluster.protected(RANK, 55)
    [entry] = cluster.ask("coordinator", "history")["history"]
    assert (entry["epoch"], entry["error"]) == (1, "")
    assert standby.tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank=RANK)["sums"]


def test_a_lost_node_leaves_its_replica_to_a_standby(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    standby = cluster.engine("standby", "b", RANK)
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    cluster.protected(RANK, 45)
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    cluster.kill("a")
    engine.kill()
    said = lengths_after(cluster, standby)
    assert said == {"claimed": True, "adopted": False, "lengths": {"one": 40, "two": 5}}
    assert standby.tell("intact")["wrong"] == []
    assert (rank := cluster.rank(RANK)) and rank["state"] == "unprotected" and rank["reason"]
    cluster.start("a")
    standby.tell("step", commits=[["one", 10]])
    cluster.protected(RANK, 55)
    assert standby.tell("sums")["sums"] == cluster.ask("a", "sums", instance="llama", rank=RANK)["sums"]


def test_a_survivor_truncates_and_goes_on(cluster):
    cluster.start()
    first, second = cluster.engine("rank", "a", "0.0.0"), cluster.engine("rank", "b", "0.1.0")
    standby = cluster.engine("standby", "b", "0.0.0")
    for engine in (first, second):
        engine.tell("step", commits=[["one", 40]])
    second.tell("step", commits=[["one", 3]])  # further than the rank that will be lost
    cluster.protected("0.0.0", 40)
    cluster.protected("0.1.0", 43)
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    cluster.kill("a")
    first.kill()
    cluster.until("the survivor fenced", lambda: second.tell("status")["fenced"])
    assert "fenced" in second.tell("step", commits=[["one", 1]])
    assert second.tell("restore", timeout_s=20.0) == {"epoch": 1, "lengths": {"one": 40}}
    assert lengths_after(cluster, standby)["lengths"] == {"one": 40}
    for engine in (standby, second):
        assert engine.tell("step", commits=[["one", 2]]) == {"lengths": {"one": 42}}
        assert engine.tell("intact")["wrong"] == []
