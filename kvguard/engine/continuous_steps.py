"""Where a batch whose requests come and go is taken up again: the newest step from which every one of them can go on as it did.

Knows: how many ids and positions each request has, in which step it got them. Must not know: tensors, tables, engines.
Invariants: behind that step the batch is composed as it was the first time, so the same bits are computed; what a request had beyond it is chosen again;
an answer that was whole by then is never touched.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from kvguard.errors import BadFrame

_AT = struct.Struct("<III")


class At(NamedTuple):
    """What a commit's sampler bytes say: in step `step` the request had `ids` ids, and KV of `length` positions."""

    step: int
    ids: int
    length: int

    def pack(self) -> bytes:
        return _AT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> At:
        if len(data) != _AT.size:
            raise BadFrame(f"{len(data)} bytes don't say in which step a request stood")
        return cls(*_AT.unpack(data))


class Left(NamedTuple):
    """What is left of one request: `ids` known, `prompt` of them its prompt, KV of [0, position). `ended`: its last id ended it."""

    prompt: int
    ids: int
    position: int
    ended: bool
    at: At

    @property
    def told(self) -> int:
        """The ids whose step is known: a decoding request gets one in every step; a prompt's own have none."""
        return self.ids if self.at.ids > self.prompt else self.prompt

    def step_of(self, ids: int) -> int:
        """In which step it had so many ids; for its prompt alone, the last in which it had no more."""
        return self.at.step + ids - self.at.ids

    @property
    def newest(self) -> int:
        """The most ids with which it can decode: the last of them is computed next."""
        return max(self.prompt, min(self.told, self.position + 1))


def go_back(left: Sequence[Left]) -> tuple[int, list[tuple[int, int]]]:
    """The step, and (ids, positions of KV) of each request there; no positions: from its prompt's beginning."""
    generating = [one for one in left if one.told > one.prompt]
    step = max((one.at.step for one in left), default=0)
    while True:
        lower = [one.step_of(one.newest) for one in generating if not one.ended or one.step_of(one.ids) > step]
        if min(lower, default=step) >= step:
            break
        step = min(lower)
    return step, [_at(one, step) for one in left]


def _at(one: Left, step: int) -> tuple[int, int]:
    if one.told > one.prompt:
        ids = min(one.ids, one.ids - (one.step_of(one.ids) - step))
        if ids > one.prompt:
            return ids, one.position if one.ended and ids == one.ids else ids - 1
    elif one.at.ids == one.prompt and one.at.step <= step and one.at.length <= one.position:
        return one.prompt, min(one.at.length, one.prompt - 1)  # part of its prompt was computed
    return one.prompt, 0
