"""An operator's programs, run by a real coordinator; and its log as JSON lines."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.e2e


def test_a_recovery_and_a_loss_of_protection_are_told(cluster, tmp_path):
    heard = tmp_path / "heard"
    program = tmp_path / "told"
    program.write_text(f'#!/bin/sh\nread line; echo "$line" >> {heard}\n')
    program.chmod(0o700)
    cluster.configure_coordinator(**dict.fromkeys(("on_failover", "on_recovered", "on_unprotected"), str(program)), log_format="json")
    cluster.start()
    engine = cluster.engine("rank", "a", "0.0.0")
    standby = cluster.engine("standby", "a", "0.0.0")
    engine.tell("step", commits=[["one", 40]])
    cluster.protected("0.0.0", 40)
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    engine.kill()
    assert standby.hear(30.0)["claimed"]

    def told(event: str) -> list[dict]:
        documents = [json.loads(line) for line in heard.read_text().splitlines()] if heard.exists() else []
        return [document for document in documents if document["event"] == event]

    [began] = cluster.until("on_failover", lambda: told("on_failover"))
    [ended] = cluster.until("on_recovered", lambda: told("on_recovered"))
    assert (began["instance"], began["epoch"]) == (ended["instance"], ended["epoch"]) == ("llama", 1) and ended["error"] == ""
    cluster.protected("0.0.0", 40)
    cluster.until("the watch to have seen it", lambda: cluster.ask("coordinator", "stats")["hooks"]["ranks_watched"])
    cluster.kill("b")
    [lost] = cluster.until("on_unprotected", lambda: told("on_unprotected"), 30.0)
    assert (lost["rank"], lost["node"]) == ("0.0.0", "a") and lost["reason"]
    entries = [json.loads(line) for line in (cluster.directory / "coordinator.log").read_text().splitlines()]
    [fenced] = [entry for entry in entries if entry.get("what") == "fenced"]
    assert fenced["severity"] == "warning" and fenced["epoch"] == 1 and fenced["process"] == "coordinator"
