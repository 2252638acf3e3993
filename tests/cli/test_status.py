"""kvguard status, of documents as coordinators give them: what can't be used is said first, and figures that are old say how old."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvguard.cli import status, top

NODE = {
    "node": "a", "state": "alive", "reason": "heartbeats", "heartbeat_age_ms": 40.0, "version": "1", "carriers": {"b": "tcp"}, "device_faults": [],
    "figures_age_ms": 90.0, "standbys": 0, "arena_bytes": 1, "arena_bytes_max": 2,
}  # fmt: skip
RANK = {
    "instance": "llama", "rank": "0.0.0", "node": "a", "holders": ["b"], "state": "protected", "reason": "", "sequences": 2, "unprotected_sequences": 0,
    "committed": 9, "acked": 9, "lag_tokens": 0, "lag_bytes": 0, "lag_ms": 0.0, "figures_age_ms": 40.0,
}  # fmt: skip
LEAD = {
    "instance": "llama", "dp": 0, "node": "a", "holders": ["b"], "state": "protected", "reason": "", "sequences": 2, "ids": 11, "acked_ids": 11,
    "figures_age_ms": 40.0,
}  # fmt: skip
FRESH = {
    "coordinator": {"issuer": "c", "heartbeat_ms": 100.0}, "paused": False, "nodes": [NODE], "ranks": [RANK, RANK | {"rank": "0.1.0"}], "schedulers": [LEAD],
    "instances": [{"instance": "llama", "epoch": 1, "issuer": "c", "state": "running", "reason": "", "emitter": "linked"}],
}  # fmt: skip


def shown(capsys, found: dict, output: str = "table") -> str:
    status.display(found, output)
    return capsys.readouterr().out


def test_fresh_figures_need_no_telling(capsys) -> None:
    said = shown(capsys, FRESH)
    assert "figures_age_ms" not in said and "can't be used" not in said
    assert [" ".join(line.split()) for line in said.splitlines()] == [
        "Nodes", "node state reason heartbeat_age_ms version", "a alive heartbeats 40.0 1",
        "Instances", "instance epoch issuer", "llama 1 c",
        "Ranks", "instance rank node holders state reason sequences unprotected_sequences lag_tokens",
        "llama 0.0.0 a b protected 2 0 0", "llama 0.1.0 a b protected 2 0 0",
        "Schedulers", "instance dp node holders state reason sequences ids acked_ids", "llama 0 a b protected 2 11 11",
    ]  # fmt: skip


@pytest.mark.parametrize("output", ["table", "wide"])
def test_only_the_rows_that_are_old_say_how_old(capsys, output: str) -> None:
    found = FRESH | {"ranks": [RANK, RANK | {"rank": "0.1.0", "figures_age_ms": 1234.5}], "schedulers": [LEAD | {"figures_age_ms": 201.0}]}
    lines = [line.split() for line in shown(capsys, found, output).splitlines()]
    first, second = (next(words for words in lines if rank in words) for rank in ("0.0.0", "0.1.0"))
    assert (first[-1], second[-1]) == ("-", "1234.5") and lines[-1][-1] == "201.0"
    assert sum(words[-1] == "figures_age_ms" for words in lines) == 2


@pytest.mark.parametrize("age_ms", [None, 0.0, 200.0])
def test_what_is_not_old(age_ms: float | None) -> None:
    row = RANK | {"figures_age_ms": age_ms}
    assert not status.is_old(row, FRESH) and not status.is_old({}, FRESH)
    assert not status.is_old(RANK | {"figures_age_ms": 9999.0}, FRESH | {"coordinator": {"issuer": "of an older version"}})


def test_devices_that_cannot_be_used_are_said(capsys) -> None:
    fault = {"device": "GPU-1", "reason": "Xid 79. Try: drain the node"}
    found = FRESH | {"nodes": [NODE | {"device_faults": [fault]}]}
    assert shown(capsys, found).splitlines()[0] == "Device GPU-1 of node a can't be used: Xid 79. Try: drain the node"
    said = io.StringIO()
    seen = top.Seen(found | {"ranks": [RANK | {"figures_age_ms": 3400.0}]}, [], {"a": {"ranks": []}})
    Console(file=said, width=250).print(top.screen(seen))
    assert "GPU-1 can't be used: Xid 79" in said.getvalue() and "0 ms (3.4 s ago)" in said.getvalue()
