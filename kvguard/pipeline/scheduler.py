"""The driver's state machine: which sequences run, what the next step says to the ranks, what its results mean, where a resumption goes on.

Knows: tracks, block tables, chunks, sampling. Must not know: sockets, clocks, processes, torch.
Invariants: one step in flight at a time; an id is handed out (its event returned) once, and the step that tells it to the ranks is planned before that event
is written; what a step says of a sequence is a delta to what the ranks were told; whoever is admitted can run to its end with the blocks reserved for it;
logits of a position computed again are compared with those of the first time, never adopted silently.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from kvguard.errors import BadFrame, KvguardError
from kvguard.pipeline.batch import Need, Planned, plan_step, resume_position
from kvguard.pipeline.pool import BlockPool
from kvguard.pipeline.replies import State
from kvguard.pipeline.runs import SEQUENCES_KEPT_MAX, Request, Track, pack_request, unpack_request
from kvguard.pipeline.sampling import logits_checksum, sample
from kvguard.pipeline.steps import Facts
from kvguard.types import Rung



class Bounds(NamedTuple):
    """What the model and the pools allow. `eos`: ids that end a text; `vocab`: ids are below it."""

    blocks: int
    block_tokens: int
    chunk: int
    sequences_max: int
    context: int
    vocab: int
    eos: tuple[int, ...] = ()


class Step(NamedTuple):
    """One step's message, without route and epoch. Rows of its logits follow `facts` in order."""

    number: int
    facts: tuple[Facts, ...]
    released: tuple[str, ...]

    @property
    def logit_rows(self) -> int:
        return sum(fact.logits for fact in self.facts)


class Restored(NamedTuple):
    """One sequence of a resumption: KV is there for [0, position); `ids`: all known ones."""

    sequence: str
    position: int
    ids: tuple[int, ...]
    rung: str
    request: bytes





class Scheduler:
    """Everything that is decided in a driver. Methods return events (dictionaries, without time) in the order in which they are to be written."""

    def __init__(self, bounds: Bounds, first_number: int = 1):
        assert bounds.chunk >= 1 and bounds.sequences_max >= 1, bounds
        self.bounds = bounds
        self.pool = BlockPool(bounds.blocks, bounds.block_tokens)
        self.tracks: dict[str, Track] = {}  # oldest first
        self.in_flight: Step | None = None
        self.progress = 0
        self._number = first_number
        self._releasing: dict[str, str] = {}  # sequence -> run whose release is to be confirmed, "" for none
        self._open_runs: dict[str, int] = {}  # runs that have not finished: steps taken

    # ---- commands ---------------------------------------------------------------------------------------------------------------

    def add_run(self, requests: Sequence[Request], prompts: Sequence[Sequence[int]]) -> list[dict]:
        """Takes a run in: one request and one list of prompt ids per sequence. A sequence that can never run gets an error event, the others go on."""
        run = requests[0].run
        if any(track.request.run == run for track in self.tracks.values()) or run in self._releasing.values():
            return [_error(f"run {run!r} is there already. Try: another name, or release it first")]
        if len(self.tracks) + len(requests) > SEQUENCES_KEPT_MAX:
            return [_error(f"run {run!r}: {len(requests)} sequences more than the {SEQUENCES_KEPT_MAX} that are kept. Try: release finished runs")]
        events = []
        self._open_runs[run] = 0
        for request, ids in zip(requests, prompts, strict=True):
            track = Track(request, list(ids), self.bounds.eos)
            self.tracks[track.name] = track
            fault = self._fault(track)
            if fault:
                events += self._fail(track, fault)
        return events + self._finished()

    def release(self, run: str) -> list[dict]:
        """Ends a run, finished or not; the released event follows when the ranks have let go."""
        names = [name for name, track in self.tracks.items() if track.request.run == run]
        if not names:
            return [_error(f"run {run!r} is not there. Try: the name that the run was started with")]
        self._open_runs.pop(run, None)
        for name in names:
            self.pool.free(name)
            del self.tracks[name]
            self._releasing[name] = run
        return []

    def names(self, run: str) -> tuple[str, ...]:
        """The sequences of `run` that live."""
        return tuple(name for name, track in self.tracks.items() if track.request.run == run and not track.error)

    @property
    def scheduled(self) -> int:
        """Sequences with work to do."""
        return sum(not track.rests for track in self.tracks.values())

    # ---- steps ------------------------------------------------------------------------------------------------------------------

    def next_step(self) -> Step | None:
        """What the ranks are to do next; None while a step is in flight or there is nothing to do."""
        if self.in_flight is not None:
            return None
        self._admit()
        needs = [Need(track.name, track.position, track.computable, track.prompt) for track in self.tracks.values() if track.admitted and not track.error]
        planned = plan_step(needs, positions_max=2 * self.bounds.chunk, chunk=self.bounds.chunk)
        facts = [self._share(plan) for plan in planned]
        computed = {plan.sequence for plan in planned}
        # Ids and requests are told at once, also of sequences that wait: a driver that dies takes nothing with it that the ranks don't know.
        for track in self.tracks.values():
            if track.name not in computed and not track.error and (not track.opened or track.told < len(track.ids)):
                facts.append(self._told(track, track.position, track.position, False, 0, ()))
        if not facts and not self._releasing:
            return None
        self._number += 1
        self.in_flight = Step(self._number, tuple(facts), tuple(self._releasing))
        for run in {self.tracks[name].request.run: None for name in sorted(computed)}:
            if run in self._open_runs:
                self._open_runs[run] += 1
        return self.in_flight

    def result(self, number: int, logits: np.ndarray) -> list[dict]:
        """The in-flight step's logits, float32 [logit_rows, vocab], came back. Raises BadFrame (nothing changed) for rows that it didn't ask for."""
        step = self.in_flight
        assert step is not None and step.number == number, (step, number)
        if logits.shape != (step.logit_rows, self.bounds.vocab):
            raise BadFrame(f"step {number}: logits {logits.shape}, expected {(step.logit_rows, self.bounds.vocab)}")
        self.in_flight = None
        self.progress += 1
        events, row = [], 0
        for fact in step.facts:
            rows = logits[row : row + fact.logits]
            row += fact.logits
            track = self.tracks.get(fact.sequence)
            if track is None or track.error:
                continue  # released or failed meanwhile
            track.position = fact.end
            if fact.prefill:
                events.append({"event": "prefill", **track.labels(), "position": fact.end})
            events += self._adopt_logits(track, fact, rows)
        events += self._confirm_releases(step)
        return events + self._finished()

    def stuck(self) -> list[dict]:
        """Error events for waiting sequences that nothing in flight could ever make room for; call when next_step() gave None."""
        if self.in_flight is not None or any(track.admitted and not track.rests for track in self.tracks.values()):
            return []
        events = []
        for track in list(self.tracks.values()):
            if not track.rests:
                events += self._fail(track, "the pool is held by finished runs. Try: release them, or a larger pool")
        return events + self._finished()

    # ---- recovery ---------------------------------------------------------------------------------------------------------------

    def fenced(self) -> None:
        """The epoch is over: whatever is in flight will not come back."""
        self.in_flight = None

    def resume(self, restored: Iterable[Restored], states: Sequence[State], fresh: bool = False) -> tuple[list[dict], list[dict]]:
        """Goes on in a new epoch: where each sequence stands now, and the events that follow the resumed one.

        `states`: what each rank says it has. `fresh`: this driver has no memory of its own, runs are rebuilt from the restored requests and ids, which are
        all handed out (again). A sequence on which the ranks don't agree, or that `restored` doesn't name, starts over from its ids.
        """
        assert states, "no rank said what it has"
        self.in_flight = None
        self.pool = BlockPool(self.bounds.blocks, self.bounds.block_tokens)
        events: list[dict] = []
        named = {token.sequence: token for token in restored}
        if fresh:
            events += self._rebuild(named.values())
        where = []
        for track in self.tracks.values():
            if track.error:
                continue
            token = named.get(track.name)
            if token is not None and _is_other(track.request, token.request):
                why = {"position": token.position, "agreed": 0, "ranks": [], "message": "what came back is another run's of this name"}
                events.append({"event": "disagreed", **track.labels(), **why})
                del named[track.name]  # what the ranks have of it goes before this one is told to them
                token = None
            if token is None and not track.opened:
                continue  # the ranks never heard of it: nothing to resume
            where.append(self._place(track, token, states, events))
        present = {name: None for state in states for name in state}
        for name in [*named, *present]:
            if name not in self.tracks or name not in named:
                self._releasing.setdefault(name, "")  # over, or to be opened anew: releases are applied before facts
        if fresh:
            events += self._again()
        return where, events + self._finished()

    def forget(self, states: Sequence[State]) -> None:
        """Ranks still have sequences that no driver knows: they are released with the first step."""
        for name in {name: None for state in states for name in state}:
            if name not in self.tracks:
                self._releasing.setdefault(name, "")

    # ---- inside -----------------------------------------------------------------------------------------------------------------

    def _fault(self, track: Track) -> str:
        if track.request.fault():
            return track.request.fault()
        if len(track.ids) != track.prompt or not all(0 <= token < self.bounds.vocab for token in track.ids):
            return f"ids must be from 0 to {self.bounds.vocab - 1}"
        if track.positions_max > self.bounds.context:
            return f"{track.positions_max} positions, the model's context is {self.bounds.context}. Try: a shorter prompt, or fewer tokens"
        if self.pool.blocks_for(track.positions_max) > self.bounds.blocks:
            return f"{track.positions_max} positions don't fit a pool of {self.bounds.blocks} blocks. Try: a larger pool"
        return ""

    def _admit(self) -> None:
        """Oldest first, while blocks for the whole of it can be set aside; a later one doesn't overtake."""
        live = [track for track in self.tracks.values() if track.admitted and not track.error]
        reserved = sum(self.pool.blocks_for(track.positions_max) for track in live)
        running = sum(not track.complete for track in live)
        for track in self.tracks.values():
            if track.admitted or track.error:
                continue
            wanted = self.pool.blocks_for(track.positions_max)
            if running >= self.bounds.sequences_max or reserved + wanted > self.bounds.blocks:
                return
            track.admitted = True
            reserved += wanted
            running += not track.complete

    def _share(self, plan: Planned) -> Facts:
        track = self.tracks[plan.sequence]
        blocks = self.pool.allocate(track.name, plan.span.end)
        logits = plan.logits
        # Positions that were computed before show their logits again, to be compared.
        known = [position for position in range(*plan.span) if position in track.checksums]
        if known:
            logits = max(logits, plan.span.end - known[0])
        return self._told(track, plan.span.start, plan.span.end, plan.prefill, logits, blocks)

    def _told(self, track: Track, start: int, end: int, prefill: bool, logits: int, blocks: tuple[int, ...]) -> Facts:
        request = b"" if track.opened else pack_request(track.request)
        fact = Facts(track.name, start, end, prefill, logits, blocks, track.told, tuple(track.ids[track.told :]), request)
        track.told, track.opened = len(track.ids), True
        return fact

    def _adopt_logits(self, track: Track, fact: Facts, rows: np.ndarray) -> list[dict]:
        events = []
        for position, row in enumerate(rows, fact.end - fact.logits):
            checksum = logits_checksum(row)
            first = track.checksums.setdefault(position, checksum)
            if first != checksum:
                events.append({"event": "diverged", **track.labels(), "position": position, "logits": f"{checksum:016x}", "expected": f"{first:016x}"})
            if position + 1 != len(track.ids) or track.complete:
                continue
            try:
                token = sample(row, track.request.sampling(), position + 1)
            except FloatingPointError as error:
                return events + self._fail(track, str(error))
            track.ids.append(token)
            events.append(_token(track, track.generated - 1, f"{checksum:016x}"))
        return events

    def _fail(self, track: Track, reason: str) -> list[dict]:
        track.error = reason
        self.pool.free(track.name)
        if track.opened:
            self._releasing.setdefault(track.name, "")
        return [{"event": "error", "message": f"{track.name}: {reason}", **track.labels()}]

    def _confirm_releases(self, step: Step) -> list[dict]:
        runs = {self._releasing.pop(name, ""): None for name in step.released}
        left = set(self._releasing.values())
        return [{"event": "released", "run": run} for run in runs if run and run not in left]

    def _finished(self) -> list[dict]:
        events = []
        for run in list(self._open_runs):
            tracks = [track for track in self.tracks.values() if track.request.run == run]
            if all(track.rests for track in tracks):
                tokens: list[list[int]] = [[] for _ in range(max(track.request.count for track in tracks))]
                prompts = [0] * len(tokens)
                for track in tracks:
                    tokens[track.request.index], prompts[track.request.index] = track.ids[track.prompt :], track.prompt
                events.append({"event": "finished", "run": run, "steps": self._open_runs.pop(run), "tokens": tokens, "prompt_tokens": prompts})
        return events

    def _place(self, track: Track, token: Restored | None, states: Sequence[State], events: list[dict]) -> dict:
        """Sets `track` to where it goes on, and says so."""
        before, position, rung = track.position, 0, Rung.TOKENS
        track.told, track.opened, track.position = 0, False, 0
        if token is not None:
            if tuple(track.ids[: len(token.ids)]) != tuple(token.ids):
                reason = "the replicated ids are not those handed out"
                events.append({"event": "diverged", **track.labels(), "position": token.position, "message": reason})
            rows = [state.get(track.name) for state in states]
            track.opened = all(row is not None for row in rows)
            position, rung = self._agreed(token, rows), token.rung
            start = resume_position(min(position, len(track.ids) - 1), track.prompt, self.bounds.chunk)
            if not start or not self._adopt_blocks(track, start, rows[0][1]):
                position = 0 if start else position
            if position < token.position:
                ranks = [list(row) if row else None for row in rows]
                events.append({"event": "disagreed", **track.labels(), "position": token.position, "agreed": position, "ranks": ranks})
            rung = rung if position else Rung.TOKENS
        emitted = track.generated
        # KV may be there for every known id, where a death took only the newest position's logits: that one is computed once more.
        position = min(position, len(track.ids) - 1)
        return {
            **track.labels(), "rung": rung, "resume_position": position, "prompt_tokens": track.prompt, "emitted": emitted,
            "rolled_back": max(0, track.prompt + emitted - 1 - position), "recomputed": max(0, before - track.position),
        }  # fmt: skip

    def _agreed(self, token: Restored, rows: list) -> int:
        """The position below which all ranks have the sequence in the same blocks. A fence between two ranks' share of a step that rewrites a chunk leaves
        tails in different ones; any other difference from the plan means that nothing is to be believed.
        """
        if any(row is None or row[0] != token.position for row in rows):
            return 0
        common = 0
        for column in zip(*(row[1] for row in rows), strict=False):
            if len(set(column)) > 1 or not 0 <= column[0] < self.bounds.blocks:
                break
            common += 1
        return min(token.position, common * self.bounds.block_tokens)

    def _adopt_blocks(self, track: Track, start: int, blocks: tuple[int, ...]) -> bool:
        try:
            self.pool.adopt(track.name, blocks[: self.pool.blocks_for(start)])
        except KvguardError:
            return False  # named by two sequences: neither table is to be believed, and the ids are there
        track.position = track.told = start
        track.admitted = True
        return True

    def _rebuild(self, tokens: Iterable[Restored]) -> list[dict]:
        """Runs out of what the ranks and their replicas kept."""
        events, rebuilt = [], []
        for token in tokens:
            try:
                request = unpack_request(token.request)
            except BadFrame as error:
                events.append(_error(f"{token.sequence} can't be resumed: {error}"))
                continue
            if request.name != token.sequence or len(token.ids) < request.prompt_tokens:
                events.append(_error(f"{token.sequence} can't be resumed: its request is of {request.name}, {len(token.ids)} ids are known"))
                continue
            rebuilt.append(Track(request, list(token.ids), self.bounds.eos, position=token.position, opened=True))
        counts = {}
        for track in sorted(rebuilt, key=lambda track: (track.request.run, track.request.index)):
            self.tracks[track.name] = track
            counts[track.request.run] = track.request.count
            self._open_runs[track.request.run] = 0
        for run, count in counts.items():
            missing = [index for index in range(count) if f"{run}-{index}" not in self.tracks]
            if missing:
                events.append(_error(f"run {run!r}: sequences {missing} were never with a rank, or were released. Try: run them again"))
        return events

    def _again(self) -> list[dict]:
        """Everything handed out before, once more: whoever reads drops by index what it has."""
        return [_token(track, index, "") | {"again": True} for track in self.tracks.values() for index in range(track.generated)]


def _token(track: Track, index: int, logits: str) -> dict:
    return {
        "event": "token", **track.labels(), "index": index, "id": track.ids[track.prompt + index], "logits": logits, "position": track.prompt + index - 1,
        "last": track.complete and index == track.generated - 1,
    }  # fmt: skip


def _is_other(request: Request, packed: bytes) -> bool:
    """Whether what comes back bears the name of this request and is another's: an older one's, whose end the ranks or holders had not heard of."""
    try:
        return bool(packed) and unpack_request(packed) != request
    except BadFrame:
        return True


def _error(message: str) -> dict:
    return {"event": "error", "message": message}
