"""What an engine's unit waits for before it starts again."""

from __future__ import annotations

import pytest

from kvguard.cli.salvaged import holding

RANKS = [{"instance": "llama", "rank": rank, "stream": f"llama/{rank}#1"} for rank in ("0.0.0", "0.1.0")]


@pytest.mark.parametrize(
    ("served", "releasing", "held"),
    [((), 0, []), (("llama/0.0.0#1",), 0, ["llama/0.0.0#1"]), (("llama/0.1.0#1",), 0, []), ((), 1, ["a former pool"])],
)
def test_memory_is_free_when_its_rank_is_gone_and_nothing_is_being_unmapped(served, releasing: int, held: list[str]) -> None:
    status = {"ranks": RANKS, "processes": {"ranks": dict.fromkeys(served, {}), "releasing": releasing}}
    assert holding(status, "llama", "0.0.0") == held


def test_a_daemon_of_an_older_version_says_nothing_of_it() -> None:
    assert holding({"ranks": RANKS, "processes": {"ranks": {}}}, "llama", None) == []
