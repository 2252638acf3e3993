"""What the demo's screen says at its end."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kvguard.pipeline.report import render


@pytest.mark.parametrize(("protected_ms", "said"), [(43.115752, "prompts protected after 43.1 ms, 10 bytes"), (None, "prompts protected after - ms")])
def test_numbers_are_for_people(protected_ms: float | None, said: str) -> None:
    numbers = {"lag_tokens_p50": 0, "lag_tokens_p99": 1, "time_to_protected_ms": protected_ms, "bytes": 10, "frames": 2}
    same = dict.fromkeys(("identical", "logits_identical", "kv_identical"), True)
    shown = Console(file=io.StringIO(), width=200)
    render({"fault": None, "recovery": None, "outage": None, "corruption": None, **same, "replication": numbers}, shown)
    assert said in shown.file.getvalue() and shown.file.getvalue().count("identical") == 3
