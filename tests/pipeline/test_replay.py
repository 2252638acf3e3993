"""I9 on the model's side: from a copy of the KV cut anywhere, the same logits, KV bytes and ids come out again; a damaged copy shows."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

LENGTHS = {"short": 1, "long": 130, "middle": 40}
TOKENS = 20


@pytest.fixture
def original(files, pipeline, prompts):
    run = pipeline(files)
    for i, (name, length) in enumerate(LENGTHS.items()):
        run.add(name, prompts(length, seed=i))
    run.generate(TOKENS)
    return run


def resumed(files, pipeline, original, cuts, stages=1, known=0, damage=None, **how):
    """A new pipeline, other blocks, every sequence restored at its cut, `known` ids known beyond it (all: -1)."""
    run = pipeline(files, stages=stages, taken=5)
    for name, cut in cuts.items():
        before = original.running[name]
        source = original.kv_of(name, before.position)
        if damage and damage[0] == name:
            source[1, :, damage[1]] = 0.0
        ids = before.ids if known < 0 else before.ids[:max(before.prompt, cut + 1 + known)]
        run.restore(name, ids, before.prompt, source, cut)
    run.generate(TOKENS, **how)
    return run


def assert_same(original, run, names):
    for name in names:
        before, after = original.running[name], run.running[name]
        assert after.ids == before.ids
        assert original.kv_of(name, before.position).numpy().tobytes() == run.kv_of(name, before.position).numpy().tobytes()
        for position in range(before.position):
            if (name, position) in run.checksums:
                assert run.checksums[name, position] == original.checksums[name, position], (name, position)


@pytest.mark.parametrize("cut", [0, 1, 17, 63, 64, 65, 100, 128, 129, 130, 131, 144, 147, 148])
def test_resume_anywhere_replays_bits(files, pipeline, original, cut):
    run = resumed(files, pipeline, original, {"long": cut})
    assert_same(original, run, ["long"])
    assert len(run.checksums) == 149 - (cut if cut >= 130 else cut // 64 * 64)


def test_all_resume_at_different_positions(files, pipeline, original):
    run = resumed(files, pipeline, original, {"middle": 47, "short": 3, "long": 99}, stages=3)
    assert_same(original, run, LENGTHS)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_cuts_in_any_company(files, pipeline, prompts, data):
    """Prompts, companions, cuts and the step's bound are all drawn; what is computed twice is equal."""
    names = [f"s{i}" for i in range(data.draw(st.integers(1, 6)))]
    run = pipeline(files, blocks=100)
    for name in names:
        run.add(name, prompts(data.draw(st.integers(1, 140)), seed=data.draw(st.integers(0, 99))))
    run.generate(TOKENS, positions_max=data.draw(st.integers(64, 300)))
    survivors = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    cuts = {name: data.draw(st.integers(0, run.running[name].position)) for name in survivors}
    again = pipeline(files, stages=data.draw(st.integers(1, 3)), blocks=100, taken=3)
    for name, cut in cuts.items():
        before = run.running[name]
        again.restore(name, before.ids[:data.draw(st.integers(max(before.prompt, cut + 1), len(before.ids)))], before.prompt,
                      run.kv_of(name, before.position), cut)
    again.generate(TOKENS, positions_max=data.draw(st.integers(64, 300)))
    while again.step(generate=False):
        pass
    assert_same(run, again, survivors)


@pytest.mark.parametrize("replay", [1, 3, 8])
def test_known_ids_are_replayed_together_and_exactly(files, pipeline, original, replay):
    """From ids alone: positions beyond the prompt are computed several a step, each as it was computed the first time."""
    run = resumed(files, pipeline, original, {"middle": 0, "short": 0, "long": 132}, known=-1, replay=replay)
    while run.step(generate=False, replay=replay):
        pass
    assert_same(original, run, LENGTHS)


@pytest.mark.parametrize(("damaged", "cut"), [(0, 140), (70, 140), (139, 140), (5, 64)])
def test_a_damaged_position_shows_in_the_logits(files, pipeline, original, damaged, cut):
    """Negative control: were equality blind to the KV, this would pass too."""
    run = resumed(files, pipeline, original, {"long": cut}, damage=("long", damaged))
    assert run.checksums["long", cut] != original.checksums["long", cut]
    assert original.kv_of("long", cut).numpy().tobytes() != run.kv_of("long", cut).numpy().tobytes()
