"""kvguard check judges a status; nothing is asked here."""

from __future__ import annotations

import pytest

from kvguard.cli.check import CRITICAL, OK, UNKNOWN, WARNING, Limits, figures, findings, line, run

LIMITS = Limits(64, 90.0)
RANK = {
    "instance": "llama", "rank": "0.0.0", "node": "a", "holders": ["b"], "state": "protected", "reason": "", "sequences": 2, "unprotected_sequences": 0,
    "committed": 9, "acked": 9, "lag_tokens": 0, "lag_bytes": 0, "lag_ms": 0.0,
}  # fmt: skip
NODE = {"node": "a", "state": "alive", "reason": "", "arena_bytes": 10, "arena_bytes_max": 100}
INSTANCE = {"instance": "llama", "epoch": 1, "issuer": "c", "state": "running", "reason": ""}


def status(**changed) -> dict:
    return {"paused": False, "nodes": [NODE], "instances": [INSTANCE], "ranks": [RANK], "schedulers": []} | changed


def test_nothing_is_found_where_all_is_well() -> None:
    assert findings(status(), LIMITS) == []
    assert figures(status()) == {"ranks": 1, "protected": 1, "standbys": 0, "unprotected_sequences": 0, "lag_tokens": 0}
    assert line(0, [], figures(status())).startswith("KVGUARD OK - 1 ranks protected, 0 standbys | ranks=1 protected=1")


@pytest.mark.parametrize(
    ("changed", "severity", "subject"),
    [
        ({"nodes": [NODE | {"state": "suspect", "reason": "silent"}]}, WARNING, "node a"),
        ({"nodes": [NODE | {"state": "dead", "reason": "silent"}]}, CRITICAL, "node a"),
        ({"nodes": [NODE | {"arena_bytes": 91}]}, WARNING, "node a"),
        ({"nodes": [NODE | {"device_faults": [{"device": "GPU-1", "reason": "Xid 79"}]}]}, CRITICAL, "device GPU-1 of node a"),
        ({"instances": [INSTANCE | {"state": "failed", "reason": "no standby"}]}, CRITICAL, "instance llama"),
        ({"ranks": [RANK | {"state": "unprotected", "reason": "no other node"}]}, WARNING, "rank 0.0.0 of llama"),
        ({"ranks": [RANK | {"state": "lost", "reason": "gone"}]}, CRITICAL, "rank 0.0.0 of llama"),
        ({"ranks": [RANK | {"lag_tokens": 65}]}, WARNING, "rank 0.0.0 of llama"),
        ({"schedulers": [{"instance": "llama", "dp": 0, "state": "lost", "reason": "gone"}]}, WARNING, "scheduler 0 of llama"),
        ({"paused": True}, WARNING, "automatic failovers"),
    ],
)
def test_each_fault_is_found_with_its_severity(changed: dict, severity: int, subject: str) -> None:
    [finding] = findings(status(**changed), LIMITS)
    assert (finding.severity, finding.subject) == (severity, subject) and finding.reason


def test_the_worst_comes_first_and_a_reason_cannot_forge_figures() -> None:
    found = findings(status(ranks=[RANK | {"state": "unprotected", "reason": "a | lag_tokens=0"}, RANK | {"state": "lost", "reason": "gone"}]), LIMITS)
    assert [finding.severity for finding in found] == [CRITICAL, WARNING]
    assert line(CRITICAL, found, {"ranks": 2}).count("|") == 1


class Told:
    """A coordinator that says one status."""

    def __init__(self, said: dict) -> None:
        self._said = said

    def coordinator(self, verb: str) -> dict:
        assert verb == "status"
        return self._said


@pytest.mark.parametrize(
    ("changed", "code", "begins"),
    [
        ({}, OK, "KVGUARD OK - "),
        ({"ranks": []}, UNKNOWN, "KVGUARD UNKNOWN - ranks: none is attached anywhere"),
        ({"ranks": [], "nodes": [NODE | {"state": "dead", "reason": "silent"}]}, CRITICAL, "KVGUARD CRITICAL - node a: dead: silent; ranks: none is attached"),
        ({"ranks": [], "paused": True}, WARNING, "KVGUARD WARNING - automatic failovers: paused"),
        ({"ranks": [RANK | {"state": "standby"}]}, OK, "KVGUARD OK - 0 ranks protected, 1 standbys"),
    ],
)
def test_what_is_known_to_be_wrong_stands_before_what_is_not_known(capsys, changed: dict, code: int, begins: str) -> None:
    """A monitor pages for critical: that nobody is attached must not turn a dead node into a shrug."""
    assert run(Told(status(**changed)), LIMITS, "table") == code
    assert capsys.readouterr().out.startswith(begins)
