"""Sampling: a pure function of logits, parameters and position; filters keep what they should."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.pipeline.sampling import Sampling, logits_checksum, sample, uniform


def logits_of(seed, vocab=5000):
    return np.random.default_rng(seed).normal(0, 3, vocab).astype(np.float32)


def test_greedy_takes_the_first_of_equals():
    logits = np.zeros(10, np.float32)
    logits[[4, 7]] = 2.0
    assert sample(logits, Sampling(), 0) == 4


@settings(max_examples=40)
@given(st.integers(0, 2**64 - 1), st.integers(0, 10**6), st.sampled_from([0, 1, 40]), st.sampled_from([0.1, 0.9, 1.0]), st.sampled_from([0.2, 1.0, 5.0]))
def test_same_position_same_draw(seed, position, top_k, top_p, temperature):
    sampling, logits = Sampling(temperature, top_k, top_p, seed), logits_of(3)
    token = sample(logits, sampling, position)
    assert token == sample(logits.copy(), sampling, position)
    assert 0.0 <= uniform(seed, position) < 1.0
    ranked = np.argsort(-logits, kind="stable")
    if top_k:
        assert token in ranked[:top_k]
    weights = np.exp(logits.astype(np.float64)[ranked] / temperature - logits.max() / temperature)
    nucleus = int(np.searchsorted(np.cumsum(weights / weights.sum()), top_p - 1e-9)) + 1
    assert top_k or top_p == 1.0 or token in ranked[:nucleus + 1]


def test_draws_are_fixed_for_ever():
    """A replay on another version of the code must draw the same: these values may not change."""
    assert [round(uniform(1, p), 6) for p in (0, 1, 2)] == [0.303568, 0.900268, 0.408262]
    assert uniform(2**64 + 5, 9) == uniform(5, 9) and uniform(-1, 9) == uniform(2**64 - 1, 9)


def test_draws_follow_the_distribution():
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    counts = np.bincount([sample(logits, Sampling(1.0, seed=11), p) for p in range(4000)], minlength=4) / 4000
    assert np.abs(counts - [0.5, 0.3, 0.15, 0.05]).max() < 0.03
    only = np.bincount([sample(logits, Sampling(1.0, top_p=0.75, seed=11), p) for p in range(300)], minlength=4)
    assert only[2] == only[3] == 0 and only[1] > 0


def test_a_flat_distribution_keeps_a_wide_nucleus():
    logits = np.zeros(5000, np.float32)
    drawn = {sample(logits, Sampling(1.0, top_p=0.9, seed=1), p) for p in range(500)}
    assert max(drawn) > 1024 and max(drawn) < 4501


def test_damaged_logits_and_parameters_are_refused():
    logits = logits_of(1)
    logits[77] = np.nan
    with pytest.raises(FloatingPointError, match="position 5"):
        sample(logits, Sampling(), 5)
    for wrong in ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}):
        with pytest.raises(ValueError, match="Try:"):
            Sampling(**wrong)


def test_checksum_sees_one_bit():
    logits = logits_of(2)
    other = logits.copy()
    other.view(np.uint32)[123] ^= 1
    assert logits_checksum(logits) == logits_checksum(logits.copy()) != logits_checksum(other)
