"""Verdicts follow from facts: one fact spoiled, one verdict changed."""

from __future__ import annotations

import pytest
from seen import evidence

from kvguard.drill.judgement import HELD, INVARIANTS, NOT_CHECKED, VIOLATED, judge
from kvguard.drill.scenarios import SCENARIOS


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_drill_in_which_all_went_well_passes_and_proves_what_it_is_for(name) -> None:
    verdict = judge(SCENARIOS[name], evidence(name))
    assert verdict.failures == () and verdict.passed and tuple(verdict.invariants) == INVARIANTS
    assert all(verdict.invariants[proved].state == HELD for proved in SCENARIOS[name].proves)
    assert verdict.invariants["I10"].state == NOT_CHECKED and all(finding.why for finding in verdict.invariants.values())


def spoil(run: dict, path: str, value) -> dict:
    part, keys = run, path.split("/")
    for key in keys[:-1]:
        part = part[key]
    assert keys[-1] in part, path
    part[keys[-1]] = value
    return run


@pytest.mark.parametrize(
    "name, path, value, said, violated",
    [
        ("kill-rank", "fault/fired", False, "did not fire", None),
        ("kill-rank", "identical", False, "identical is false", "I9"),
        ("kill-rank", "logits_identical", False, "logits_identical is false", "I9"),
        ("kill-node", "kv_identical", False, "kv_identical is false", "I1"),
        ("kill-node", "observed/disagreed", ["{}"], "no rank disagreed", "I1"),
        ("kill-node", "observed/resumed", [["drill-1.0", 0, 44, 24, 20]], "I1 is violated", "I1"),
        ("kill-node", "observed/resumed", [["drill-1.0", 0, 39, 24, 20]], "I2 is violated", "I2"),
        ("kill-node", "observed/conflicts", ["logits of sequence 0"], "I2 is violated", "I2"),
        ("kill-node", "recovery/lost_sequences", 1, "sequences are lost", "I2"),
        ("kill-node", "observed/history", [], "no entry of epoch 2", "I2"),
        ("kill-node", "observed/promises", {"node-0": 2, "node-1": 1}, "I3 is violated", "I3"),
        ("kill-node", "observed/watch/epochs_rise", False, "I3 is violated", "I3"),
        ("kill-node", "observed/replicas_equal_pools", False, "I4 is violated", "I4"),
        ("kill-node", "observed/arena", {"node-0": [1001, 1000]}, "I6 is violated", "I6"),
        ("kill-node", "observed/descriptors", {"node-0": [40, 400]}, "I6 is violated", "I6"),
        ("kill-node", "observed/whole_ms", None, "I7 could not be checked", None),
        ("kill-node", "observed/watch/states", {"unprotected": [""]}, "I8 is violated", "I8"),
        ("kill-rank", "recovery/rolled_back", 1, "1 positions were rolled back", None),
        ("kill-rank", "recovery", None, "no recovery followed", "I3"),
        ("pause-briefly", "observed/epoch_after", 2, "nobody should have failed over", "I3"),
        ("kill-daemon", "outage/tokens_meanwhile", 0, "I5 is violated", "I5"),
        ("kill-daemon", "observed/died", ["stage-1#7"], "stage-1#7", "I5"),
        ("kill-daemon", "observed/promises", {"node-0": 1, "node-1": 0}, "I11 is violated", "I11"),
        ("kill-coordinator", "observed/history_after", 3, "I11 is violated", "I11"),
        ("pause-node", "fault/evidence", {"woken": {"stage-1": 0}}, "the woken ranks ended", "I3"),
        ("pause-node", "fault/evidence", {"woken": {}}, "no rank was woken", None),
        ("pause-rank", "observed/counters/processes_killed", 0, "no daemon says that it killed it", None),
        ("cut-link", "observed/watch/states", {"protected": [""]}, "said unprotected", "I8"),
        ("slow-link", "observed/watch/lag_tokens_max", 0, "", None),
        ("fill-arena", "fault/evidence/arena_bytes", 999, "I6 is violated", "I6"),
        ("corrupt-frame", "observed/counters/checksum_failures", 0, "was not found", None),
        ("corrupt-replica", "fault/evidence/resumed_at", 21, "beyond the damaged position", None),
        ("corrupt-replica", "observed/counters/positions_damaged", 0, "I11 is violated", "I11"),
        ("ids-only", "recovery/sequences", [{"rung": "replica"}], "came back from replica, not from tokens", None),
    ],
)
def test_one_fact_decides(name, path, value, said, violated) -> None:
    verdict = judge(SCENARIOS[name], spoil(evidence(name), path, value))
    assert verdict.passed == (not said), verdict.failures
    assert any(said in failure for failure in verdict.failures) or not said, verdict.failures
    assert (VIOLATED in {finding.state for finding in verdict.invariants.values()}) == (violated is not None)
    assert violated is None or verdict.invariants[violated].state == VIOLATED


def test_a_drill_that_could_not_be_carried_out_proves_nothing() -> None:
    verdict = judge(SCENARIOS["kill-rank"], {"error": "the bench ended"})
    assert verdict.failures == ("the bench ended",) and {finding.state for finding in verdict.invariants.values()} == {NOT_CHECKED}


@pytest.mark.parametrize(
    ("strangers", "state"),
    [
        (None, NOT_CHECKED), ({"coordinator": "refused", "a": "refused"}, HELD), ({"coordinator": "refused", "a": "answered"}, VIOLATED),
        ({"a": "away"}, NOT_CHECKED),
    ],
)
def test_who_lets_a_stranger_in_violates_authentication(strangers, state) -> None:
    run = evidence("kill-rank") | {"target": "cluster"}
    run["observed"]["strangers"] = strangers
    verdict = judge(SCENARIOS["kill-rank"], run)
    assert verdict.invariants["I10"].state == state and verdict.passed == (state != VIOLATED)


def test_a_live_clusters_pool_is_waited_for_no_longer_than_its_coordinator_was_told_to() -> None:
    for target, passed in (("bench", False), ("cluster", True)):
        run = spoil(evidence("kill-rank") | {"target": target}, "recovery/sequences", [{"rung": "replica"}])
        assert judge(SCENARIOS["kill-rank"], run).passed == passed


def test_what_a_live_cluster_cannot_show_is_not_called_held() -> None:
    run = evidence("kill-rank") | {"target": "cluster", "identical": None, "logits_identical": None, "kv_identical": None}
    verdict = judge(SCENARIOS["kill-rank"], run)
    assert verdict.passed and {name for name, finding in verdict.invariants.items() if finding.state == HELD} == {"I3", "I7"}


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({}, ""), ({"read_back": 1}, "2 held, 1 read back, 0 unreadable"), ({"unreadable": 1}, "1 unreadable"), ({"unsound": 3}, "3 of their positions"),
        ({"verified": False}, "every byte of them"), ({"read_back": 0, "promised": False}, ""), ({"read_back": 0, "replicas": 0}, ""),
    ],
)
@pytest.mark.parametrize("name", ["kill-daemon", "restart-daemon"])
def test_replicas_that_a_service_manager_did_not_keep_are_no_success(name, kept, said) -> None:
    run = evidence(name) | {"target": "cluster", "identical": None, "logits_identical": None, "kv_identical": None}
    run["observed"]["kept"] = {"promised": True, "replicas": 2, "read_back": 2, "unreadable": 0, "unsound": 0, "verified": True, **kept}
    verdict = judge(SCENARIOS[name], run)
    assert verdict.invariants["I11"].state == (VIOLATED if said else HELD) and verdict.passed == (not said)
    assert any(said in failure for failure in verdict.failures) or not said


@pytest.mark.parametrize(("back", "state"), [(2, NOT_CHECKED), (1, VIOLATED)])
def test_replicas_that_nobody_could_read_again_are_not_called_kept(back, state) -> None:
    run = evidence("kill-daemon") | {"target": "cluster", "identical": None, "logits_identical": None, "kv_identical": None}
    run["observed"]["kept"] = {"promised": True, "replicas": 2, "read_back": back, "unreadable": 0, "unsound": 0, "verified": None, "unread": "no answer"}
    verdict = judge(SCENARIOS["kill-daemon"], run)
    assert verdict.invariants["I11"].state == state and ("no answer" in verdict.invariants["I11"].why) == (state == NOT_CHECKED)
