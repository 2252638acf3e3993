"""Load on the reference engine: the same prompts again and again, wave after wave, each compared with the undisturbed one; and a run that is struck.

Knows: the driver's runs, the faults of faults.py. Must not know: drills' names, what a fault should lead to, torch.
Invariants: one wave at a time, and no pause between two that a fault could hide in; every wave is entered whole, whichever driver its tokens came from;
nothing waits without a condition and a deadline.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvguard.pipeline import demo, faults, report
from kvguard.pipeline.client import Client
from kvguard.pipeline.faults import Fault
from kvguard.pipeline.report import Transcript
from kvguard.pipeline.world import World

RUN_TIMEOUT_S = 600.0
IDLE, RUNNING, DIGESTING, RELEASING, HELD = "idle", "running", "digesting", "releasing", "held"


@dataclass
class Wave:
    """One run of all prompts. `digests`: checksums of every position's KV, by rank and sequence, from the live pools at its end."""

    run: str
    transcript: Transcript
    digests: dict = field(default_factory=dict)


class Load:
    """`max_tokens`: of each sequence in each wave."""

    def __init__(self, client: Client, prompts: list, max_tokens: int):
        self.client, self.prompts, self.max_tokens = client, prompts, max_tokens
        self.references: dict[int | None, Wave] = {}
        self.waves: list[Wave] = []
        self.state = IDLE
        self._name, self._seed, self._last = "", None, False

    def reference(self, seed: int | None) -> Wave:
        """The undisturbed twin: run once, before the first run that is compared with it."""
        if seed not in self.references:
            run = f"reference-{'greedy' if seed is None else seed}"
            self.begin(run, seed, waves=1)
            self.references[seed] = self.end()
            self.release()
        return self.references[seed]

    def begin(self, name: str, seed: int | None, waves: int = 0) -> None:
        """Starts. `waves` 1: one and no more; 0: until end()."""
        assert self.state == IDLE, self.state
        self._name, self._seed, self._last, self.waves = name, seed, waves == 1, []
        self._next()

    @property
    def wave(self) -> Wave:
        """The newest."""
        return self.waves[-1]

    def _next(self) -> None:
        run = f"{self._name}.{len(self.waves)}"
        self.client.begin(run, self.prompts, self.max_tokens, self._seed)
        self.waves.append(Wave(run, self.client.transcripts[run]))
        self.state = RUNNING

    def turn(self) -> None:
        """What follows from the events that have come."""
        client, run = self.client, self.waves[-1].run if self.waves else ""
        if self.state == RUNNING and client.last("finished", run):
            client.conversation.say(do="digest", run=run)
            self.state = DIGESTING
        elif self.state == DIGESTING and (told := client.last("digest", run)):
            self.wave.digests = told["digests"]
            if self._last:
                self.state = HELD
            else:
                client.conversation.say(do="release", run=run)
                self.state = RELEASING
        elif self.state == RELEASING and client.last("released", run):
            self._next()

    def wait(self, what: str, condition: Callable[[], object], timeout_s: float) -> None:
        """As Client.wait; the load goes on meanwhile."""

        def turned() -> object:
            self.turn()
            return condition()

        self.client.wait(what, turned, timeout_s)

    def reached(self, at_token: int) -> bool:
        """Whether every sequence of the newest wave has emitted so many; 0: a prompt, or a chunk of one, is computed."""
        if self.state != RUNNING:
            return False
        if at_token == 0:
            return self.client.last("prefill", self.wave.run) is not None
        return min(self.wave.transcript.emitted()) >= at_token

    def end(self) -> Wave:
        """The newest wave runs to its end and stays where it is, in the pools and at the holders, until release()."""
        self._last = True
        self.wait("the end of the load", lambda: self.state == HELD, RUN_TIMEOUT_S)
        return self.wave

    def release(self) -> None:
        """Lets go of the last wave."""
        self.client.release(self.wave.run)
        self.state = IDLE

    # ---- comparisons

    def identical(self) -> bool:
        """All tokens of all waves, each once, equal to the twin's."""
        before = self.reference_of_run()
        return all(report.identical(before.transcript, wave.transcript, self.max_tokens) for wave in self.waves)

    def logits_identical(self) -> bool | None:
        before = self.reference_of_run()
        told = [report.logits_identical(before.transcript, wave.transcript) for wave in self.waves]
        return None if None in told and False not in told else all(told)

    def kv_identical(self, fault: Fault) -> bool | None:
        """What was restored, below each sequence's resume position, against the twin's. Null where nothing was."""
        struck = self.struck_wave(fault)
        return report.kv_identical(self.reference_of_run().digests, struck.digests, demo.positions(fault.resumed, len(self.prompts))) if struck else None

    def struck_wave(self, fault: Fault) -> Wave | None:
        """The wave that a recovery resumed."""
        runs = {one["run"] for one in fault.resumed["sequences"]} if fault.resumed else set()
        return next((wave for wave in self.waves if wave.run in runs), None)

    def reference_of_run(self) -> Wave:
        return self.references[self._seed]

    def conflicts(self) -> list[str]:
        """Tokens that were told twice and differed, positions whose logits came out differently the second time."""
        runs = {wave.run for wave in self.waves}
        told = [conflict for wave in self.waves for conflict in wave.transcript.conflicts]
        return told + [f"diverged: {mark}" for mark in self.client.marks.get("diverged", []) if mark.get("run") in runs]


class Struck(NamedTuple):
    """What came of one run with one kill in it. `recovery`: kvguard.demo/1's part, with its phases."""

    fault: Fault
    recovery: dict
    identical: bool
    logits_identical: bool | None
    kv_identical: bool | None


def strike_run(
    load: Load, name: str, seed: int | None, kind: str, stage: int, moment: Callable[[], object], beside: Callable[[Fault], Callable[[], None]] | None = None
) -> Struck:
    """One run of the load, struck at `moment` by a kill that needs a recovery (faults.KILLS: rank, node, driver), to its end; then the cluster is whole again.

    `beside`: called with the aimed fault before the strike; what it returns is called after. Raises KvguardError, TimedOut.
    """
    client, world = load.client, load.client.world
    load.reference(seed)
    load.begin(name, seed, waves=1)
    load.wait("the moment to strike", moment, RUN_TIMEOUT_S)
    fault = faults.aim(world, client, kind, stage)
    after = beside(fault) if beside else None
    faults.strike(world, client, fault)
    if after:
        after()
    faults.mend(world, client, fault, load.wave.run)
    load.end()
    struck = Struck(fault, recovery(world, client, fault, load.wave.run), load.identical(), load.logits_identical(), load.kv_identical(fault))
    load.release()
    world.wait_until("the cluster whole again", lambda: faults.whole(world), 120.0)
    return struck


def recovery(world: World, client: Client, fault: Fault, run: str) -> dict:
    """The recovery part of a document, from the driver's resumption and the coordinator's history."""
    epoch = fault.resumed["epoch"]
    return report.recovery(fault.resumed, demo.timing_ms(world, client, fault, run), epoch, lost=demo.lost_sequences(world, epoch))
