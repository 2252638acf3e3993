"""What an operator asks at night, through the real command line against real daemons: check, top, history, replicas export."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]


def said(cluster, *arguments: str) -> tuple[int, str, str]:
    command = [sys.executable, "-m", "kvguard.cli", *arguments, "--coordinator", cluster.coordinator_address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_protected_cluster_is_ok_and_what_it_holds_can_be_taken_out(cluster, tmp_path):
    code, out, _ = said(cluster, "check", "--timeout", "0.5")
    assert code == 3 and out.startswith("KVGUARD UNKNOWN")
    cluster.start()
    engine = cluster.engine("rank", "a", "0.0.0")
    engine.tell("step", commits=[["one", 40], ["two", 5]])
    cluster.protected("0.0.0", 45)
    code, out, _ = said(cluster, "check")
    assert code == 0 and "1 ranks protected" in out and "| ranks=1 protected=1" in out
    code, out, _ = said(cluster, "top")
    assert code == 0 and "protected" in out and "2/2" in out and "Recoveries, the last 5 of 0" in out

    file = tmp_path / "one.npz"
    code, document = cluster.cli("replicas", "export", "one", str(file))
    assert code == 0, document
    assert [entry["positions"] for entry in document["replicas"]] == [40] and document["file_bytes"] == file.stat().st_size
    sums = cluster.ask("b", "sums", instance="llama", rank="0.0.0")["sums"]["one"]
    with np.load(file) as exported:
        assert sorted(exported) == ["llama/0.0.0@b/ids", "llama/0.0.0@b/kv", "llama/0.0.0@b/request"]
        kv, ids = exported["llama/0.0.0@b/kv"], exported["llama/0.0.0@b/ids"]
    from xxhash import xxh3_64_intdigest

    assert [xxh3_64_intdigest(token.tobytes()) for token in kv] == sums and list(ids) == list(range(41))  # the last one's KV is yet to come
    assert cluster.cli("replicas", "export", "nobody", str(file))[0] == 4
    assert said(cluster, "replicas", "export", "one", str(file))[0] == 1  # it exists, and nobody can be asked


def test_what_was_lost_is_critical_and_the_history_says_why(cluster):
    cluster.start()
    engine = cluster.engine("rank", "a", "0.0.0")
    engine.tell("step", commits=[["one", 40]])
    cluster.protected("0.0.0", 40)
    cluster.kill("b")
    code, document = cluster.cli("check")
    cluster.until("the dead node", lambda: cluster.cli("check")[0] == 2, 30.0)
    code, document = cluster.cli("check")
    assert (code, document["state"]) == (2, "critical")
    assert {finding["subject"] for finding in document["findings"]} == {"node b", "rank 0.0.0 of llama"} and document["figures"]["protected"] == 0
    cluster.start("b")
    cluster.protected("0.0.0", 40)
    standby = cluster.engine("standby", "a", "0.0.0")
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    engine.kill()
    assert standby.hear(30.0)["claimed"]
    cluster.until("the recovery told", lambda: cluster.ask("coordinator", "history")["history"])
    code, out, _ = said(cluster, "history")
    assert code == 0 and "0.0.0 -> a" in out and "pool" in out
    code, out, _ = said(cluster, "history", "-o", "json")
    [entry] = json.loads(out)["history"]
    assert entry["recomputed"] == 0 and entry["lost"] == {}


def test_bench_asks_a_live_daemon_and_names_those_that_there_are(cluster):
    cluster.start()
    cluster.until("all nodes are known", lambda: len(cluster.ask("coordinator", "status")["nodes"]) == 2)
    code, found = cluster.cli("bench", "--quick", "--to", "a")
    assert code == 0 and found["node"]["node"] == "a" and found["node"]["address"] == cluster.addresses["a"] and found["link"]["loopback"]
    code, refused = cluster.cli("bench", "--to", "nobody")
    assert code == 4 and "Try: a, b" in refused["error"]
