"""A node's daemon that ends while its engine works, with nobody else who could tell: no emitter, no rank of the instance on another node."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


def node(cluster, name: str) -> dict:
    return next(one for one in cluster.ask("coordinator", "status")["nodes"] if one["node"] == name)


def test_the_engine_is_not_fenced_while_its_daemon_may_come_back(cluster):
    cluster.configure_coordinator(reattach_ms=120_000)
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    cluster.protected(RANK, 40)
    cluster.kill("a")
    cluster.until("a silence in which a node is dead", lambda: node(cluster, "a")["heartbeat_age_ms"] > 2000)
    found = node(cluster, "a")
    assert found["state"] == "suspect" and "its daemon ended, and nobody else could tell" in found["reason"], found
    assert engine.tell("step", commits=[["one", 1]]) == {"lengths": {"one": 41}}, "it serves on, unprotected"
    cluster.start("a")
    cluster.protected(RANK, 41)
    said = engine.tell("status")
    assert (said["fenced"], said["epoch"]) == (False, 0), said
    assert cluster.ask("coordinator", "history")["history"] == []


def test_a_node_that_doesn_t_come_back_is_dead_in_the_end(cluster):
    cluster.configure_coordinator(reattach_ms=2000)
    cluster.start()
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    cluster.protected(RANK, 40)
    spare = cluster.engine("standby", "b", RANK)
    cluster.kill("a")
    engine.kill()
    said = spare.hear(60.0)
    assert said == {"claimed": True, "adopted": False, "lengths": {"one": 40}} and spare.tell("intact")["wrong"] == []
    cluster.until("the recovery's end", lambda: cluster.ask("coordinator", "history")["history"])
    (entry,) = cluster.ask("coordinator", "history")["history"]
    assert "nobody else could see llama rise" in entry["reason"] and entry["rungs"] == {"one": "replica"}
