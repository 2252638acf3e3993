"""The places where generate() lets others look and steer: the ids that it chose, rows that had ended before it was resumed, the state that it draws from.

Knows: transformers' processors and criteria, torch's random states. Must not know: commits, pools.
Invariants: looking stops nothing and changes nothing; a row that had ended gets padding, from the first id on, and ends the call no later than it would have.
"""

from __future__ import annotations

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria


def random_state(device: torch.device) -> bytes:
    """Of the generator that draws for tensors of `device`."""
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
    return state.numpy().tobytes()


def set_random_state(device: torch.device, state: bytes) -> None:
    found = torch.frombuffer(bytearray(state), dtype=torch.uint8)
    if device.type == "cuda":
        torch.cuda.set_rng_state(found, device)
    else:
        torch.set_rng_state(found)


class Told(StoppingCriteria):
    """Stops nothing: it is where generate() shows what it chose."""

    def __init__(self, sampled) -> None:
        self._sampled = sampled

    def __call__(self, input_ids: torch.LongTensor, scores, **_) -> torch.BoolTensor:
        self._sampled(input_ids)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class Ended(StoppingCriteria):
    """Rows that had ended before the resumption stay ended."""

    def __init__(self, ended: torch.Tensor) -> None:
        self._ended = ended

    def __call__(self, input_ids: torch.LongTensor, scores, **_) -> torch.BoolTensor:
        return self._ended


class Padded(LogitsProcessor):
    """And get padding, also from the first token on, which is chosen before anything can be stopped."""

    def __init__(self, ended: torch.Tensor, pad: int) -> None:
        self._ended, self._pad = ended, pad

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[self._ended] = float("-inf")
        scores[self._ended, self._pad] = 0.0
        return scores


def with_ended(again: dict, ended: torch.Tensor, options: GenerationConfig, ends: torch.Tensor) -> dict:
    if not bool(ended.any()):
        return again
    pad = options.pad_token_id if options.pad_token_id is not None else int(ends[0])
    processors = LogitsProcessorList([*(again.get("logits_processor") or ()), Padded(ended, pad)])
    return {**again, "logits_processor": processors, "stopping_criteria": [*(again.get("stopping_criteria") or ()), Ended(ended)]}
