"""kvguard drill as an operator runs it, in real processes with a small random model: every drill once, the reports, a live cluster.

Knows: interfaces.md's document and exit codes. Must not know: how faults are fired.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from kvguard.drill.scenarios import SCENARIOS
from kvguard.pipeline.weights import make_random
from kvguard.pipeline.world import World, WorldSettings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

# One world serves them all. Those that need nothing to be started again come first, as in a night in which things get worse.
ORDER = (
    "cut-link", "slow-link", "corrupt-frame", "pause-briefly", "kill-coordinator", "kill-daemon", "restart-daemon", "fill-arena", "kill-driver", "kill-rank",
    "pause-rank", "kill-node", "pause-node", "corrupt-replica", "ids-only",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_random(tmp_path_factory.mktemp("model"), "llama", seed=1, layers=6, context=2048)


def kvguard(tmp_path: Path, *arguments: str, meanwhile: Callable[[], object] = lambda: None) -> tuple[int, str, str]:
    """Exit code, stdout, stderr. `meanwhile`: done while it runs."""
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "KVGUARD_DRILL_DIR": str(tmp_path / "reports")}
    command = [sys.executable, "-m", "kvguard.cli", "drill", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as running:
        try:
            meanwhile()
            out, err = running.communicate(timeout=1400)
        except BaseException:
            running.terminate()
            raise
    return running.returncode, out, err


def test_every_drill_passes_and_proves_that_its_fault_fired(model, tmp_path) -> None:
    assert set(ORDER) == set(SCENARIOS)
    code, out, err = kvguard(tmp_path, "run", *ORDER, "--model", str(model), "-o", "json")
    found = json.loads(out) if out else {"drills": []}
    failures = {one["name"]: run["failures"] for one in found["drills"] for run in one["runs"] if not run["passed"]}
    assert code == 0 and not failures, f"{json.dumps(failures, indent=1)}\n{err}"
    assert [one["name"] for one in found["drills"]] == list(ORDER) and all(one["schema"] == "kvguard.drill/1" for one in found["drills"])
    for one in found["drills"]:
        (run,) = one["runs"]
        assert run["fault"]["fired"] and run["identical"] is True and run["logits_identical"] is True and run["kv_identical"] is not False, one["name"]
        assert (run["recovery"] is None) == (SCENARIOS[one["name"]].outcome == "outage") == (run["outage"] is not None), one["name"]
        assert all(run["invariants"][proved] == "held" for proved in SCENARIOS[one["name"]].proves), one["name"]
    assert os.listdir(tmp_path) == ["reports"], "the bench leaves nothing behind"
    check_reports(tmp_path)


def check_reports(tmp_path: Path) -> None:
    """What was kept can be listed, shown, and read by test runners."""
    code, out, _ = kvguard(tmp_path, "report", "-o", "json")
    assert code == 0 and [one["name"] for one in json.loads(out)["reports"]] == list(ORDER)
    code, out, _ = kvguard(tmp_path, "report", "kill-node", "-o", "junit")
    assert code == 0 and ElementTree.fromstring(out).find("testsuite").get("failures") == "0"
    code, out, _ = kvguard(tmp_path, "report", "kill-node")
    assert code == 0 and "kill-node: 1 of 1 passed" in out and "No earlier report" in out


def test_wrong_use_is_told_before_anything_starts(tmp_path) -> None:
    code, out, err = kvguard(tmp_path, "run", "kill-everything")
    assert code == 2 and not out and "Try: kill-rank" in err
    code, out, err = kvguard(tmp_path, "report", "never")
    assert code == 2 and "Try: kvguard drill report" in err
    code, out, err = kvguard(tmp_path, "run", "kill-rank", "--dry-run", "--repeat", "2")
    assert code == 0 and len(out.splitlines()) == 2 and not os.listdir(tmp_path)


# ---- a live cluster ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def world(model, tmp_path):
    made = World(WorldSettings(root=tmp_path / "cluster", model=model, stages=2))
    try:
        made.start()
        made.wait_ready(300.0)
        yield made
    finally:
        made.stop()


def test_a_live_cluster_is_struck_where_it_is_whole_and_refused_where_it_is_not(world, tmp_path) -> None:
    there = ("--coordinator", world.coordinator_address)
    code, out, err = kvguard(tmp_path, "run", "kill-node", *there, "--dry-run")
    assert code == 4 and "not tried against a live cluster" in err
    code, out, err = kvguard(tmp_path, "run", "kill-rank", *there, "--dry-run")
    assert code == 0 and "gets SIGKILL" in out and "standbys" in out, err
    code, out, err = kvguard(tmp_path, "run", "pause-briefly", *there, "--yes", "-o", "json")
    assert code == 0, out + err
    assert json.loads(out)["runs"][0]["fault"]["evidence"] == {"stopped": True}

    struck = next(node for node in world.nodes if f"the daemon on {node.name} " in kvguard(tmp_path, "run", "kill-daemon", *there, "--dry-run")[1])
    def supervise() -> None:  # in this thread: what a thread has started dies with it
        struck.daemon.popen.wait(120)
        world.start_daemon(struck)

    code, out, err = kvguard(tmp_path, "run", "kill-daemon", *there, "--yes", "-o", "json", meanwhile=supervise)
    assert code == 0, out + err
    assert json.loads(out)["runs"][0]["recovery"] is None

    def supervise_coordinator() -> None:
        world.coordinator.popen.wait(120)
        world.start_coordinator()

    world.wait_ready(300.0)
    code, out, err = kvguard(tmp_path, "run", "kill-coordinator", *there, "--yes", "-o", "json", meanwhile=supervise_coordinator)
    assert code == 0 and json.loads(out)["runs"][0]["recovery"] is None, out + err
    code, out, err = kvguard(tmp_path, "run", "restart-daemon", *there, "--dry-run")
    assert code == 4 and "no daemon here is a service of systemd's" in err

    before = world.wait_ready(300.0)["instances"][0]["epoch"]
    code, out, err = kvguard(tmp_path, "run", "pause-rank", *there, "--yes", "-o", "json")
    run = json.loads(out)["runs"][0]
    assert code == 0 and run["recovery"]["epoch"] == before + 1 and run["fault"]["evidence"] == {"stopped": True, "died": True}, out + err
    assert run["recovery"]["rung"] == "pool" and run["observed"]["counters"] == {"processes_killed": 1} and run["invariants"]["I10"] == "not_checked"

    before += 1
    code, out, err = kvguard(tmp_path, "run", "kill-rank", *there, "--yes", "-o", "json")
    run = json.loads(out)["runs"][0]
    assert code == 0 and run["recovery"]["epoch"] == before + 1 and run["fault"]["evidence"] == {"died": True}, out + err
    assert run["identical"] is None and run["invariants"]["I3"] == "held" and run["invariants"]["I9"] == "not_checked"

    subprocess.run([sys.executable, "-m", "kvguard.cli", "pause", *there], check=True, capture_output=True, timeout=60)
    code, out, err = kvguard(tmp_path, "run", "kill-rank", *there, "--yes")
    assert code == 4 and "redundancy is not whole" in err and "paused" in err and not out
