"""What an operator does with a rank that is copied as another one, through the real command line: found, verified and mended under its own name."""

from __future__ import annotations

import pytest

from tests.e2e.test_equal_bytes import BOTH, COMMITS, attached, held_by, shared
from tests.e2e.test_operator_verbs import said

pytestmark = pytest.mark.e2e


def test_what_is_damaged_of_a_covered_rank_is_found_and_sent_again_under_its_name(cluster):
    cluster.start()
    engines = attached(cluster, "a")
    for engine in engines.values():
        engine.tell("step", commits=COMMITS)
    shared(cluster, 45)
    for engine in engines.values():
        engine.tell("step", commits=[["one", 1]])
    shared(cluster, 46)
    assert held_by(cluster, "b") == {"0.0.0": 2} and cluster.ask("a", "stats")["lag_samples"] == 2, "each rank's step is measured"
    assert cluster.ask("b", "corrupt_replica", instance="llama", rank="0.0.0", sequence="one", position=20, bytes_only=True)["changed"]
    code, told = cluster.cli("resync", "llama", "0.0.1", "--dry-run")
    verified = {(one["rank"], one["sequence"]): one["verified"] for one in told["replicas"]}
    assert code == 0 and verified == {("0.0.0", "one"): False, ("0.0.0", "two"): True}, told
    code, told = cluster.cli("resync", "llama", "0.0.1")
    [entry] = told["replicas"]
    assert code == 0 and (entry["rank"], entry["copied_for"], entry["holder"], entry["positions"], entry["dropped"]) == ("0.0.0", ["0.0.1"], "b", 46, 21), told
    shared(cluster, 46)
    assert engines["0.0.1"].tell("sums")["sums"] == cluster.ask("b", "sums", instance="llama", rank="0.0.0")["sums"], "it has the bytes of the pool again"
    code, out, err = said(cluster, "resync", "llama", "0.0.1")
    assert code == 0 and "copied_for" in out and "llama/0.0.1 is copied as 0.0.0" in err
    assert all("copied_as" in said(cluster, "status", *wide)[1] for wide in ((), ("-o", "wide"))) and "0.0.1 as 0.0.0" in said(cluster, "top")[1]
    assert said(cluster, "drain", "b", "--dry-run")[2].count("would have 0 of 1 replicas") == 1, "nobody else could hold them"
