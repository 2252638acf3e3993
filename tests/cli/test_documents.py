"""Answers that aren't what was asked for: whatever somebody at a coordinator's address says, a verb ends with what is wrong, why, and what to try."""

from __future__ import annotations

import json

import pytest

from kvguard.cli import documents

RUBBISH = [{}, {"nodes": 3}, {"schema": "kvguard.status/1", "paused": "no", "nodes": [{}], "ranks": [None]}, json.loads("[" * 200 + "]" * 200)]
VERBS = (
    ("status",), ("status", "-o", "wide"), ("history",), ("top",), ("replicas", "list"), ("replicas", "verify"), ("failover", "llama", "0.0.0", "--yes"),
    ("handoff", "llama", "0.0.0", "--to", "b", "--yes"), ("drain", "a", "--yes"), ("resync",), ("unpause", "--dry-run"), ("bench", "--quick", "--to", "a"),
    ("drill", "run", "kill-rank", "--yes"),
)  # fmt: skip


@pytest.mark.parametrize("words", VERBS, ids=" ".join)
def test_rubbish_is_said_to_be_rubbish(cli, monkeypatch, words) -> None:
    for rubbish in RUBBISH:
        said = rubbish if isinstance(rubbish, dict) else {"nodes": rubbish}
        monkeypatch.setattr("kvguard.transport.ask.ask", lambda *_, said=said, **__: said)
        code, out, err = cli(*words, "--coordinator", "tcp://127.0.0.1:1", "--keys", "")
        assert code == 1 and not out and "not understood here" in err and "Try: " in err, (rubbish, err)


def test_rubbish_is_unknown_to_a_monitor(cli, monkeypatch) -> None:
    monkeypatch.setattr("kvguard.transport.ask.ask", lambda *_, **__: {"nodes": 3})
    code, out, _ = cli("check", "--coordinator", "tcp://127.0.0.1:1", "--keys", "")
    assert code == 3 and "UNKNOWN" in out and "not understood here" in out and len(out.splitlines()) == 1


def test_what_a_newer_daemon_says_beyond_it_passes() -> None:
    status = {"schema": "kvguard.status/1", "coordinator": {"issuer": "c", "more": 1}, "paused": False, "nodes": [], "instances": [], "ranks": [], "news": 1}
    assert documents.understood(status, "coordinator", "tcp://a:1", "status") is status
    assert documents.understood({"anything": 1}, "a", "tcp://a:1", "sums") == {"anything": 1}
