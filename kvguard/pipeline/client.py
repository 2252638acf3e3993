"""The client's side of a driver: runs asked for, tokens entered as they come, whichever driver they come from.

Knows: the driver's events. Must not know: faults, nodes, torch.
Invariants: a token is new to the client once; every wait has a condition and a deadline; a driver that ends unasked ends the wait with its last words.
"""

from __future__ import annotations

import selectors
import time

from kvguard.errors import KvguardError, TimedOut
from kvguard.pipeline.report import Transcript
from kvguard.pipeline.world import Conversation, World


class Client:
    """Transcripts by run, other events by kind, arrivals as (t_ns, run) of every token that was new."""

    def __init__(self, world: World):
        self.world = world
        self.conversation: Conversation | None = None
        self.transcripts: dict[str, Transcript] = {}
        self.marks: dict[str, list[dict]] = {}
        self.arrivals: list[tuple[int, str]] = []
        self.endpoints: list[str] = []  # of the stages, in order, as the driver last said
        self.driver_may_end = False

    def connect(self, until: str) -> dict:
        """Starts a driver and waits for its first word: "ready", or "resumed" after a predecessor was killed."""
        seen = len(self.marks.get(until, []))
        self.driver_may_end = False
        self.conversation = Conversation(self.world.start_driver())
        self.wait(f"a new driver's {until}", lambda: len(self.marks.get(until, [])) > seen, 120.0)
        return self.marks[until][-1]

    def disconnect(self) -> None:
        """What a driver that was killed had said is read to the end; its pipes are closed."""
        while not self.conversation.closed:
            self.pump(0.05)
        for pipe in (self.world.driver.popen.stdin, self.world.driver.popen.stdout):
            pipe.close()

    # ---- runs

    def begin(self, run: str, prompts: list, max_tokens: int, seed: int | None) -> None:
        self.transcripts[run] = Transcript(len(prompts))
        sampling = {} if seed is None else {"temperature": 0.8, "top_k": 50, "seed": seed}
        self.conversation.say(do="run", run=run, prompts=prompts, max_tokens=max_tokens, ignore_eos=True, chat=True, **sampling)

    def finished(self, run: str, timeout_s: float) -> dict:
        return self.await_event("finished", timeout_s, run)

    def digest(self, run: str) -> dict:
        """Sums of every position's KV, by rank and sequence, from the live pools."""
        self.conversation.say(do="digest", run=run)
        return self.await_event("digest", 60.0, run)["digests"]

    def release(self, run: str) -> None:
        self.conversation.say(do="release", run=run)
        self.await_event("released", 30.0, run)

    # ---- events

    def pump(self, timeout_s: float) -> None:
        """Takes in what arrives within the timeout."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.conversation, selectors.EVENT_READ)
            selector.select(timeout_s)
        for event in self.conversation.read():
            self._enter(event)
        if self.conversation.closed and not self.driver_may_end:
            self.world.driver.popen.wait()
            raise KvguardError(f"the driver ended unasked. Try: its log, {self.world.driver.log}, which ends with\n{self.world.driver.last_words()}")

    def _enter(self, event: dict) -> None:
        kind = event["event"]
        if kind == "token":
            if self.transcripts[event["run"]].add(event):
                self.arrivals.append((event["t_ns"], event["run"]))
            return
        self.marks.setdefault(kind, []).append(event)
        if "endpoints" in event:
            self.endpoints = event["endpoints"]
        if kind == "error":
            raise KvguardError(f"the driver says: {event['message']}. Try: the logs in {self.world.root / 'logs'}")

    def wait(self, what: str, condition, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise TimedOut(f"{what} did not come within {timeout_s:g} s. Try: the logs in {self.world.root / 'logs'}")
            self.pump(0.02)

    def await_event(self, kind: str, timeout_s: float, run: str | None = None) -> dict:
        self.wait(f"the driver's event {kind}", lambda: self.last(kind, run), timeout_s)
        return self.last(kind, run)

    def last(self, kind: str, run: str | None = None) -> dict | None:
        return next((mark for mark in reversed(self.marks.get(kind, [])) if run is None or mark.get("run") == run), None)

    def position(self, run: str) -> int:
        """Committed positions of the run's first sequence, as far as its tokens tell."""
        prefilled = max((mark["position"] for mark in self.marks.get("prefill", []) if (mark["run"], mark["sequence"]) == (run, 0)), default=0)
        return prefilled + max(0, self.transcripts[run].emitted()[0] - 1)
