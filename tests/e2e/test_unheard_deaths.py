"""Ranks that die before the coordinator has heard of them, in real processes: what they had committed is recovered like any other's."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


def attached(cluster):
    """At its daemon: whoever dies before that has shown nobody his memory."""
    cluster.until("the rank attached", lambda: cluster.ask("a", "status")["ranks"])


def recovered(cluster, spare):
    said = spare.hear(30.0)
    assert said == {"claimed": True, "adopted": True, "lengths": {"one": 40}} and spare.tell("intact")["wrong"] == []
    cluster.until("the instance running", lambda: cluster.ask("coordinator", "status")["instances"][0]["state"] == "running")
    (entry,) = cluster.ask("coordinator", "history")["history"]
    assert (entry["epoch"], entry["error"], entry["rungs"], entry["positions"]) == (1, "", {"one": "pool"}, {"one": 40}), entry
    return entry


def test_killed_right_after_its_first_commit(cluster, monkeypatch):
    """Between two heartbeats, which are a minute apart here so that the kill can't come too late."""
    monkeypatch.setenv("KVGUARD_NODE_HEARTBEAT_MS", "60000")
    cluster.configure_coordinator(heartbeat_ms=60_000, suspect_ms=300_000, dead_ms=600_000)
    cluster.start("a")
    spare = cluster.engine("standby", "a", RANK)
    cluster.start("coordinator")
    cluster.until("the standby known", lambda: [one["state"] for one in cluster.ask("coordinator", "status")["ranks"]] == ["standby"])
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    attached(cluster)
    assert not cluster.rank(RANK), "the coordinator has heard of it too early for this test"
    engine.kill()
    entry = recovered(cluster, spare)
    assert "died" in entry["reason"] or "suspected" in entry["reason"]


def test_killed_while_there_was_no_coordinator(cluster):
    cluster.start("a")
    spare = cluster.engine("standby", "a", RANK)
    engine = cluster.engine("rank", "a", RANK)
    engine.tell("step", commits=[["one", 40]])
    attached(cluster)
    engine.kill()
    cluster.until("its daemon has seen the death", lambda: "died: llama" in (cluster.directory / "a.log").read_text())
    cluster.start("coordinator")
    recovered(cluster, spare)
