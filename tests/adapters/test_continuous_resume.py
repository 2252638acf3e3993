"""A script with a batch whose requests come and go is killed and started again, with real daemons: ids, logits and KV bytes of a run that nobody disturbed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not transformers.__version__.startswith("5.23."):
    pytest.skip("its private objects are those of another release", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

import continuous_script  # noqa: E402
from test_transformers_resume import RANK, Script, kill_known  # noqa: E402

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SCRIPT = Path(__file__).with_name("continuous_script.py")
WHAT = {"family": "llama", "prompts": [9, 21, 5, 30], "new": 60, "batch": 40}  # the last prompt is computed in two parts, beside the others' decoding


@pytest.fixture
def scripts(cluster):
    started: list[Script] = []

    def start(node: str, what: dict) -> Script:
        started.append(Script(cluster, node, what, SCRIPT))
        return started[-1]

    cluster.configure_coordinator(standby_ms=600_000, emitter_ms=10_000)  # patience for a machine that is busy
    cluster.start()
    cluster.until("both nodes", lambda: len(cluster.ask("coordinator", "status")["nodes"]) == 2)
    yield start
    for script in started:
        script.close()


def undisturbed(what: dict) -> dict:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return continuous_script.plain(what)
    finally:
        torch.set_num_threads(before)


def assert_undisturbed(found: dict, wanted: dict) -> None:
    """All ids, and of every batch since: its logits, and all KV of its requests, restored or new."""
    assert found["answers"] == wanted["answers"] and found["unprotected"] == ""
    assert found["logits"] and found["logits"] == wanted["logits"][-len(found["logits"]) :]
    assert found["kv"] == wanted["kv"][-len(found["kv"]) :]


# By batches computed: the last prompt waits; it is computed in part; all decode.
@pytest.mark.parametrize(("batch", "at", "there"), [(35, 1, [9, 21, 5, 0]), (40, 1, [9, 21, 5, 5]), (40, 20, [28, 40, 24, 48])])
def test_a_killed_script_goes_on_in_its_own_pool(cluster, scripts, batch, at, there):
    what = {**WHAT, "batch": batch}
    first = scripts("a", {**what, "hold_at": at})
    first.until("step", at)
    kill_known(cluster, first)
    second = scripts("a", {**what, "hold_at": -1})
    joined = second.until("joined")
    assert (joined["joined"], sorted(joined["positions"])) == (True, sorted(there))
    found, wanted = second.until("answers"), undisturbed(what)
    assert_undisturbed(found, wanted)
    assert (found["rungs"], found["resumed_at"], found["recomputed"]) == (["pool"], there, 0)
    assert len(found["logits"]) == len(wanted["logits"]) - at
    [entry] = cluster.ask("coordinator", "history")["history"]
    assert (entry["error"], entry["lost"]) == ("", {})


@pytest.mark.parametrize(("batch", "at", "there"), [(35, 1, [9, 21, 5, 0]), (40, 20, [28, 40, 24, 48])])
def test_a_lost_node_s_script_goes_on_from_the_replica(cluster, scripts, batch, at, there):
    what = {**WHAT, "batch": batch}
    first = scripts("a", {**what, "hold_at": at})
    first.until("step", at)
    cluster.protected(RANK, sum(there))
    cluster.kill("a")
    first.kill()
    second = scripts("b", {**what, "hold_at": -1, "sizes": {"requests": 5, "positions": 96}})  # other sizes: blocks are named anew
    found, wanted = second.until("answers"), undisturbed(what)
    assert_undisturbed(found, wanted)
    assert found["rungs"] == (["replica"] if all(there) else ["pool", "replica"])  # of the one that waited no KV was to be fetched: the cheapest rung
    assert (found["resumed_at"], found["recomputed"]) == (there, 0)
    assert len(found["logits"]) == len(wanted["logits"]) - at


def test_killed_at_any_moment_and_twice(cluster, scripts):
    """Not at rest: whatever it was doing when the signal came. Some answers are whole by then."""
    what = {**WHAT, "new": 100}
    wanted = undisturbed(what)
    ends = [wanted["answers"]["req_0"][1][25]]
    what["ends"], wanted = ends, undisturbed({**what, "ends": ends})
    first = scripts("a", {**what, "hold_at": -1})
    first.until("step", 15)
    first.kill()
    second = scripts("a", {**what, "hold_at": -1})
    second.until("step", 20)
    second.kill()
    third = scripts("a", {**what, "hold_at": -1})
    found = third.until("answers")
    assert_undisturbed(found, wanted)
    assert (found["rungs"], found["recomputed"]) == (["pool"], 0)
    assert [entry["epoch"] for entry in cluster.ask("coordinator", "history")["history"]] == [1, 2]
