"""What a drill's name and seed stand for."""

from __future__ import annotations

import pytest

from kvguard.drill import runner
from kvguard.drill.judgement import INVARIANTS
from kvguard.drill.scenarios import SCENARIOS, UnknownDrill, drawn, named
from kvguard.pipeline import strikes


def test_the_bench_can_strike_what_is_described_and_nothing_else() -> None:
    assert set(strikes.STRIKES) == set(SCENARIOS)
    assert set(strikes.OUTAGES) == {name for name, one in SCENARIOS.items() if one.outcome == "outage"}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_drill_is_drawn_from_its_name_and_seed_alone(name) -> None:
    many = [drawn(SCENARIOS[name], seed, 3, 40) for seed in range(200)]
    assert many == [drawn(SCENARIOS[name], seed, 3, 40) for seed in range(200)]
    assert {one.stage for one in many} == {0, 1, 2} and {one.sampled for one in many} == {None, 7}
    assert all(4 <= one.at_token < 28 and 0.0 <= one.share < 1.0 for one in many)
    assert set(SCENARIOS[name].proves) <= set(INVARIANTS) and SCENARIOS[name].hypothesis


def test_an_unknown_drill_is_named_with_those_that_there_are() -> None:
    with pytest.raises(UnknownDrill, match=r"kill-everything.*Try: kill-rank"):
        named("kill-everything")


def test_a_dry_run_says_what_the_run_would_do() -> None:
    said = runner.would(SCENARIOS["kill-rank"], 5, 2, runner.Options())
    assert [one["seed"] for one in said] == [5, 6] and said[0]["stage"] == drawn(SCENARIOS["kill-rank"], 5, 3, 40).stage
