"""From logits to the next id, reproducibly, and the checksum that proves two runs' logits equal.

Knows: temperature, top_k, top_p, a counter-based generator. Must not know: sequences, engines, torch.
Invariants: the id is a pure function of (logits, parameters, position): no state is carried from token to token, so a resume at a position
draws what the first run drew; ties go to the lower id.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xxhash

_NUCLEUS_FIRST = 1024  # candidates sorted before the whole vocabulary is: a nucleus is rarely wider


@dataclass(frozen=True, slots=True)
class Sampling:
    """How ids are chosen. temperature 0 is greedy; top_k 0 and top_p 1.0 switch their filters off; seed is any integer (64 bits count)."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0.0 and np.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or positive. Try: 0.7")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (off) or positive. Try: 40")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p is {self.top_p}: it must be above 0 and at most 1. Try: 0.95")


def sample(logits: np.ndarray, sampling: Sampling, position: int) -> int:
    """The id at `position` (absolute, of the token to be chosen). `logits` float32 [vocab]. Raises FloatingPointError if any is not a number:
    the KV or the weights behind it are broken, and an id drawn from it would hide that.
    """
    if np.isnan(logits).any():
        raise FloatingPointError(f"logits for position {position} hold NaN: KV or weights are damaged. Try: recompute the sequence")
    if sampling.temperature == 0.0:
        return int(np.argmax(logits))
    ids, weights = _candidates(logits, sampling)
    cumulative = np.cumsum(weights)
    point = uniform(sampling.seed, position) * cumulative[-1]
    return int(ids[min(int(np.searchsorted(cumulative, point, side="right")), len(ids) - 1)])


def uniform(seed: int, position: int) -> float:
    """A draw in [0, 1) that depends on (seed, position) alone: the first word of Philox keyed by seed at counter position."""
    word = int(np.random.Philox(key=seed & (2**64 - 1), counter=position).random_raw())
    return (word >> 11) * 2.0**-53


def logits_checksum(logits: np.ndarray) -> int:
    """xxh3 (64 bits) of the float32 bytes of `logits`, any shape: equal for bitwise equal logits, else different."""
    assert logits.dtype == np.float32, logits.dtype
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(logits).view(np.uint8).data)


def _candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids that pass top_k and then top_p, most likely first where a filter is on, and their weights (float64, not normalised)."""
    scaled = logits.astype(np.float64) / sampling.temperature
    weights = np.exp(scaled - scaled.max())
    if not sampling.top_k and sampling.top_p >= 1.0:
        return np.arange(len(weights)), weights
    total = float(weights.sum())
    width = min(sampling.top_k or _NUCLEUS_FIRST, len(weights))
    ids = _most_likely(weights, width)
    if sampling.top_k:
        total = float(weights[ids].sum())
    elif weights[ids].sum() < sampling.top_p * total:
        ids = _most_likely(weights, len(weights))
    chosen = weights[ids]
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(np.cumsum(chosen), sampling.top_p * total, side="left")) + 1
        ids, chosen = ids[:kept], chosen[:kept]
    return ids, chosen


def _most_likely(weights: np.ndarray, count: int) -> np.ndarray:
    """The `count` heaviest ids, heaviest first, ties by id; never cuts between equal weights by chance."""
    if count < len(weights):
        floor = np.partition(weights, len(weights) - count)[len(weights) - count]
        above = np.flatnonzero(weights >= floor)
    else:
        above = np.arange(len(weights))
    return above[np.argsort(-weights[above], kind="stable")][:count]
