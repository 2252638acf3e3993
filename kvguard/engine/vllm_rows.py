"""What a worker, or the scheduler, of vLLM writes into its commit table, whatever happens to the table's epoch meanwhile.

Knows: guards and their tables, facts. Must not know: vLLM, torch, how KV is fetched.

Invariants
- Nothing here raises into the engine, and nothing waits (but for a new epoch's cut, which the client thread makes while no step is under way: an idle engine
  has none, and would be taken for dead): what can't be committed is counted, said once, and retried or left unprotected.
- A fault of this code's own ends the attachment: within a step it is raised to the connector, which does that; between two it is done here, and raised then.
- Releases and cuts are applied before the step that could overwrite their blocks, whether or not the epoch is over.
- What the engine knows of a sequence is kept here until it is over, so that a table that was cut by a plan, rolled back or adopted anew is brought up to date
  with the next step: the table is never believed to hold more than it says.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter

import numpy as np

from kvguard.engine.guard import Guard, Step
from kvguard.engine.vllm_facts import StepFacts
from kvguard.errors import KvguardError, TimedOut

_log = logging.getLogger("kvguard.engine")


class _Sequence:
    """All that is known of one: `ids`, `blocks`, `length`. In the table: `row` (-1: none), of which `known` ids and `listed` blocks."""

    __slots__ = ("name", "request", "ids", "blocks", "length", "row", "known", "listed")

    def __init__(self, name: str, request: bytes, ids: list[int], blocks: list[int], length: int) -> None:
        self.name, self.request, self.ids, self.blocks, self.length = name, request, ids, blocks, length
        self.row, self.known, self.listed = -1, 0, 0


class Rows:
    """One guard's rows. `before` and `after` every step, from the engine's own thread. `counts`: what went wrong, by what."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.counts: Counter[str] = Counter()
        self._sequences: dict[int, _Sequence] = {}
        self._step: Step | None = None
        self._facts: StepFacts | None = None
        self._was_connected = self._said_unprotected = False
        self._fault: Exception | None = None  # what ended the attachment between two steps
        self._turn = threading.Lock()  # the table is written by one thread at a time
        guard.on_order = self._between_steps

    # ---- a step -----------------------------------------------------------------------------------------------------------------

    def before(self, facts: StepFacts) -> None:
        """Before the forward pass of the step that `facts` were made for."""
        with self._turn:
            if self._fault is not None:
                raise self._fault
            self._say_protection()
            if self._step is not None:  # the forward pass of the last one never ended
                self._after(failed=True)
            self._before(facts)

    def after(self, failed: bool = False) -> None:
        """Behind the last KV write of the step; `failed`: it did not come to that."""
        with self._turn:
            self._after(failed)
            if self.guard.fenced:  # what came within the step is carried out now: there may be no other step
                self._restored()

    def _between_steps(self) -> None:
        """In the client thread: an order to restore has come."""
        with self._turn:
            if self._step is not None:
                return
            try:
                self._restored()
            except Exception as error:  # raised from here it would cost the line alone: a new one brings the same order, and the same fault
                self._fault = error
                _log.exception("kvguard: UNPROTECTED from now on: %s of %r can't join a new epoch", self.guard.role, self.guard.instance)
                self.guard.detach(0.0)  # this is the thread that says so: it can't be waited for

    def _before(self, facts: StepFacts) -> None:
        for no in facts.over:
            sequence = self._sequences.pop(no, None)
            if sequence is not None and sequence.row >= 0:
                self.guard.table.release(sequence.row)
        for no in facts.cut:
            sequence = self._sequences.get(no)
            if sequence is not None:
                sequence.blocks, sequence.length, sequence.listed = [], 0, 0
                if sequence.row >= 0:
                    self.guard.table.truncate(sequence.row, 0, keep_ids=sequence.known)
        self._facts = facts
        if facts.size:
            self._enter(facts.size)

    def _after(self, failed: bool) -> None:
        facts, step = self._facts, self._step
        self._facts = self._step = None
        if facts is None:
            return
        usual = self._learn(facts)
        if step is None:
            return
        if not failed:
            self._commit(step, facts, usual)
            self._say_written(step, facts)
        try:
            step.__exit__(RuntimeError if failed else None, None, None)
        except KvguardError:  # fenced while the step ran: what it staged is gone
            self.counts["steps fenced"] += 1
            self._look_again()
        if failed:
            self._look_again()

    def _enter(self, size: int) -> None:
        try:
            self._step = self.guard.step(size)
        except KvguardError:
            self.counts["steps fenced"] += 1
            if self._restored():
                self._enter_again(size)

    def _enter_again(self, size: int) -> None:
        try:
            self._step = self.guard.step(size)
        except KvguardError:  # another epoch already: with the next step
            self.counts["steps fenced"] += 1

    def _restored(self) -> bool:
        """Take part in a new epoch where its plan has come; without waiting for it."""
        try:
            restored = self.guard.restore(0.0)
        except TimedOut:
            return False
        except KvguardError as error:
            self.counts["restores refused"] += 1
            _log.warning("kvguard: %s", error)
            return False
        restored.done()
        self._look_again()
        return True

    # ---- what is known ------------------------------------------------------------------------------------------------------------

    def _learn(self, facts: StepFacts) -> bool:
        """Take the step's deltas over. Returns whether it is a usual one: only decoding sequences whose rows are up to date."""
        usual = not facts.begun and not facts.grown
        for begun in facts.begun:
            self._sequences[begun.no] = _Sequence(begun.name, begun.request, begun.ids, begun.blocks, begun.length)
        for grown in facts.grown:
            self._extend(grown.no, grown.ids, grown.blocks, grown.length)
        for index, (no, length, new) in enumerate(zip(facts.nos, facts.lengths, facts.ids, strict=True)):
            sequence = self._sequences.get(no)
            if sequence is None or sequence.row < 0 or sequence.known != len(sequence.ids) or sequence.listed != len(sequence.blocks):
                usual = False
            self._extend(no, [new], facts.blocks.get(index, ()), length)
        return usual

    def _extend(self, no: int, ids: list[int], blocks, length: int) -> None:
        sequence = self._sequences.get(no)
        if sequence is None:
            self.counts["deltas of unknown sequences"] += 1
            return
        sequence.ids.extend(ids)
        sequence.blocks.extend(blocks)
        sequence.length = length

    def _look_again(self) -> None:
        """After a plan or a roll-back: believe only what the table holds."""
        table = self.guard.table
        live = table.sequences()
        for sequence in self._sequences.values():
            row = live.get(sequence.name, -1)
            sequence.row, sequence.known, sequence.listed = row, 0, 0
            if row < 0:
                continue
            held, ids = table.blocks(row), table.ids(row)
            if held != sequence.blocks[: len(held)] or ids.tolist() != sequence.ids[: len(ids)] or table.accepted(row) > sequence.length:
                table.release(row)
                sequence.row = -1
            else:
                sequence.known, sequence.listed = len(ids), len(held)

    # ---- commits ------------------------------------------------------------------------------------------------------------------

    def _commit(self, step: Step, facts: StepFacts, usual: bool) -> None:
        if usual and self._commit_usual(step, facts):
            return
        for no in [begun.no for begun in facts.begun] + [grown.no for grown in facts.grown] + facts.nos:
            sequence = self._sequences.get(no)
            if sequence is not None:
                self._commit_one(step, sequence)

    def _commit_usual(self, step: Step, facts: StepFacts) -> bool:
        if not facts.nos:
            return True
        sequences = [self._sequences[no] for no in facts.nos]
        rows = np.fromiter((sequence.row for sequence in sequences), np.intp, len(sequences))
        try:
            step.commit_batch(rows, np.array(facts.lengths, np.int64), np.array(facts.ids, np.int64), facts.blocks or None)
        except (ValueError, KeyError):  # one by one says which it is; nothing was staged
            return False
        for sequence in sequences:
            sequence.known, sequence.listed = len(sequence.ids), len(sequence.blocks)
        return True

    def _commit_one(self, step: Step, sequence: _Sequence) -> None:
        """What the table lacks of one sequence. One that can't be committed is left without a row, so that nothing stale of it is replicated on."""
        ids, blocks = sequence.ids[sequence.known :], sequence.blocks[sequence.listed :]
        opening = sequence.row < 0
        try:
            row = step.commit(sequence.name, sequence.length, blocks, ids, request=sequence.request if opening else None)
        except (ValueError, KeyError) as error:
            self.counts["commits refused"] += 1
            if self.counts["commits refused"] == 1:
                _log.warning("kvguard: a sequence is served UNPROTECTED (%s); others like it are only counted", error)
            if not opening:
                self.guard.table.release(sequence.row)
                sequence.row, sequence.known, sequence.listed = -1, 0, 0
            return
        sequence.row, sequence.known, sequence.listed = row, len(sequence.ids), len(sequence.blocks)

    def _say_written(self, step: Step, facts: StepFacts) -> None:
        """To a pool that packs its own steps: all slots that this one may have written."""
        if not hasattr(self.guard.pool, "wrote"):
            return
        tokens = self.guard.layout.block_tokens
        blocks, starts, counts = [], [], []
        for no, first, end in facts.spans:
            listed = self._sequences[no].blocks if no in self._sequences else ()
            for index, block in enumerate(listed[first // tokens : -(-end // tokens)], first // tokens):
                start = max(first, index * tokens)
                blocks.append(block)
                starts.append(start - index * tokens)
                counts.append(min(end, (index + 1) * tokens) - start)
        try:
            step.wrote(blocks, starts, counts)
        except KvguardError:  # the step is a gap: its daemon reads the pool
            self.counts["steps not packed"] += 1

    # ---- words for people -----------------------------------------------------------------------------------------------------------

    def _say_protection(self) -> None:
        """Once when nobody is there at the first step, and whenever that changes."""
        guard = self.guard
        if guard.connected:
            if self._said_unprotected or not self._was_connected:
                _log.info("kvguard: %s of %r is attached to the daemon", guard.role, guard.instance)
            self._was_connected, self._said_unprotected = True, False
        elif not self._said_unprotected:
            self._said_unprotected = True
            why = guard.refused or f"no daemon at {guard.session.path if guard.session else 'its socket'}"
            said = "kvguard: UNPROTECTED: %s of %r serves without replication: %s. Try: kvguard node, or its socket in extra_config"
            _log.warning(said, guard.role, guard.instance, why)
