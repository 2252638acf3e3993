"""Who the ranks are and when the epoch is over, as the driver sees it: with kvguard (its emitter) or without.

Knows: the emitter's calls. Must not know: scheduling, stages' messages.
Invariants: Alone never fences; Guarded hands out what the coordinator said, unchanged.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from kvguard.errors import BadConfig, Fenced, KvguardError, Refused, TimedOut
from kvguard.pipeline.scheduler import Restored
from kvguard.pipeline.settings import DriverSettings
from kvguard.types import Life

POLL_S = 0.02  # between looks at who has attached, at start


class Joined(NamedTuple):
    """`endpoints`: of the stages, in order."""

    epoch: int
    endpoints: tuple[str, ...]
    recovering: bool


class Resumption(NamedTuple):
    epoch: int
    endpoints: tuple[str, ...]
    sequences: tuple[Restored, ...]
    timing_ms: dict[str, float]
    bytes_by_rung: dict[str, int]
    members: list[dict]


class Alone:
    """The engine without kvguard: endpoints from the settings, epoch 0 for ever."""

    def __init__(self, settings: DriverSettings):
        if len(settings.endpoints) != settings.stages:
            raise BadConfig(f"{len(settings.endpoints)} endpoints for {settings.stages} stages. Try: one per stage, or a coordinator")
        self._endpoints = settings.endpoints

    def welcome(self, timeout_s: float) -> Joined:
        return Joined(0, self._endpoints, False)

    def fenced(self) -> bool:
        return False

    def resume(self, timeout_s: float) -> Resumption:
        raise Refused("an engine without kvguard can't resume. Try: set coordinator")

    def report(self, scheduled: int, progress: int) -> None:
        """Nobody asks."""

    def delivered(self, lives: tuple[Life, ...]) -> None:
        """Nobody asks."""

    def close(self) -> None:
        """Nothing is open."""


class Guarded:
    """With kvguard: the coordinator's word, through the emitter."""

    def __init__(self, settings: DriverSettings):
        from kvguard import emitter
        from kvguard.transport import keys as keyring

        self._stages = settings.stages
        keys = keyring.load(settings.keys) if settings.keys else None
        self._emitter = emitter.connect(settings.instance, settings.coordinator, keys, silence_ms=settings.silence_ms)

    def welcome(self, timeout_s: float) -> Joined:
        """Waits until every stage is a member, unless a recovery is going on (then its resumption says who is). Raises TimedOut."""
        deadline = time.monotonic() + timeout_s
        welcome = self._emitter.welcome(timeout_s)
        while not (welcome.recovering or self._emitter.fenced) and len(endpoints := self._endpoints(self._emitter.members)) < self._stages:
            if time.monotonic() > deadline:
                raise TimedOut(f"{len(endpoints)} of {self._stages} stages are attached after {timeout_s:g} s. Try: kvguard status")
            time.sleep(POLL_S)
            welcome = self._emitter.welcome(timeout_s)
        if welcome.recovering or self._emitter.fenced:
            return Joined(self._emitter.epoch.counter, (), True)
        return Joined(self._emitter.epoch.counter, self._endpoints(self._emitter.members), False)

    def fenced(self) -> bool:
        return self._emitter.fenced

    def resume(self, timeout_s: float) -> Resumption:
        """Waits for the newest epoch's resumption and adopts it. Raises TimedOut; KvguardError where the recovery failed for good."""
        while True:
            resumption = self._emitter.resume(timeout_s)
            try:
                self._emitter.adopt(resumption)
                break
            except Fenced:
                continue  # a newer epoch was announced meanwhile: its resumption is the one to wait for
        tokens = resumption.tokens
        sequences = tuple(Restored(token.sequence, token.position, (*token.prefix, *token.tokens), token.rung, token.request) for token in tokens)
        members = [{"rank": str(member.rank), "node": member.node, "endpoint": member.endpoint} for member in resumption.members]
        endpoints = self._endpoints(resumption.members)
        if len(endpoints) != self._stages:
            raise KvguardError(f"epoch {resumption.epoch.counter} has {len(endpoints)} of {self._stages} stages. Try: kvguard history")
        return Resumption(resumption.epoch.counter, endpoints, sequences, dict(resumption.timing_ms), dict(resumption.bytes_by_rung), members)

    def report(self, scheduled: int, progress: int) -> None:
        self._emitter.scheduled(scheduled)
        self._emitter.progress(progress)

    def delivered(self, lives: tuple[Life, ...]) -> None:
        self._emitter.delivered(lives)

    def close(self) -> None:
        self._emitter.close()

    def _endpoints(self, members) -> tuple[str, ...]:
        by_stage = {member.rank.pp: member.endpoint for member in members}
        return tuple(by_stage[pp] for pp in sorted(by_stage))
