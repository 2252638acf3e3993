"""The rows of one batch, each of whose blocks lie one behind the other, and what the commit table has been told of them.

Knows: the guard's steps, epochs that end in the middle. Must not know: tensors, models, why an id was chosen.
Invariants: a row's counters move only when a step was left well, or from the table itself after a restore; an epoch that ends costs one more attempt,
not a fact.
"""

from __future__ import annotations

from collections.abc import Iterable

from kvguard.engine import joining
from kvguard.engine.guard import Guard, Step
from kvguard.engine.pull import pieces_of
from kvguard.errors import Fenced

FENCED_S = 10.0  # how long a step waits for a plan when its epoch is over


class Row:
    """`ids`: all that are known; `length`: positions whose KV is complete, with `sampler`; both are facts once said. Of ids, blocks and positions the table has
    `told`, `listed`, `accepted`. `request`: said when it is opened."""

    __slots__ = ("accepted", "first_block", "ids", "length", "listed", "name", "request", "sampler", "told")

    def __init__(self, name: str, first_block: int, request: bytes, ids: Iterable[int] = ()) -> None:
        self.name, self.first_block, self.request = name, first_block, request
        self.ids, self.length, self.sampler = list(ids), 0, None
        self.told = self.listed = self.accepted = 0


class Telling:
    """One call's rows. `emitter` None: nobody plans, so no epoch ends but by a plan that others asked for."""

    def __init__(self, guard: Guard, emitter, rows: Iterable[Row]) -> None:
        self.guard, self.emitter, self.rows = guard, emitter, list(rows)
        self._tokens = guard.layout.block_tokens
        self._packs = hasattr(guard.pool, "wrote")  # a host pool's daemon reads the rows: nothing is said for it
        self._step: Step | None = None

    def learn(self, ids: list[list[int]], start: int) -> None:
        """`ids`: by row, of columns [start, start + n); those that are known already are left as they are."""
        for row, more in zip(self.rows, ids, strict=True):
            row.ids.extend(more[max(0, len(row.ids) - start) :])

    def enter(self, size: int) -> None:
        """Before a forward pass over `size` positions."""
        self.leave_failed()
        self._step = self._entered(size)

    def publish(self, length: int, sampler: bytes | None = None) -> None:
        """KV of [0, length) is complete in every row, all ids that are known are told; `sampler`: of the first row."""
        self._all_at(length, sampler)
        self.say()

    def say(self) -> None:
        """Every row's ids, length and sampler. Leaves the step that was entered, or takes one of its own."""
        try:
            self._commit()
        except Fenced:
            self._restore()
            self._commit()
        for row in self.rows:
            row.told, row.listed, row.accepted = len(row.ids), max(row.listed, self._blocks(row.length)), row.length

    def rewind(self, length: int, sampler: bytes | None) -> None:
        """Go on at `length` in every row, with the ids known here: what the table has beyond is void."""
        self._all_at(length, sampler)
        self.go_back()

    def go_back(self) -> None:
        """Go on with every row's ids and length: what the table has beyond is void."""
        step = self._entered(0)
        with step:
            for row in self.rows:
                if row.accepted > row.length or row.told > len(row.ids):
                    step.truncate(row.name, row.length)
                    row.accepted, row.told, row.listed = row.length, min(row.told, row.length), self._blocks(row.length)
        self.say()

    def _all_at(self, length: int, sampler: bytes | None) -> None:
        for row in self.rows:
            row.length = length
        self.rows[0].sampler = sampler

    def read(self) -> None:
        """The counters, as the table has them."""
        table = self.guard.table
        live = table.sequences()
        for row in self.rows:
            at = live.get(row.name)
            row.accepted, row.told, row.listed = (0, 0, 0) if at is None else (table.accepted(at), len(table.ids(at)), len(table.blocks(at)))

    def release(self) -> None:
        """The rows are over: call before their blocks are written again."""
        self.leave_failed()
        if any(row.name in self.guard.table.sequences() for row in self.rows):
            with self._entered(0) as step:
                for row in self.rows:
                    if row.name in self.guard.table.sequences():  # a plan may have released it meanwhile
                        step.release(row.name)

    def leave_failed(self) -> None:
        """A step whose forward pass didn't end: it is as if it had never been."""
        step, self._step = self._step, None
        if step is not None:
            step.__exit__(RuntimeError, None, None)

    # ---- steps ------------------------------------------------------------------------------------------------------------------

    def _entered(self, size: int) -> Step:
        try:
            return self.guard.step(size)
        except Fenced:
            self._restore()
            return self.guard.step(size)

    def _commit(self) -> None:
        step, self._step = self._step or self.guard.step(0), None
        live = self.guard.table.sequences()
        with step:
            for row in self.rows:
                blocks = range(row.first_block + row.listed, row.first_block + self._blocks(row.length))
                request = None if row.name in live else row.request
                step.commit(row.name, row.length, blocks=list(blocks), tokens=row.ids[row.told :], sampler=row.sampler, request=request)
            if self._packs:
                self._say_written(step)

    def _say_written(self, step: Step) -> None:
        """What the table hasn't accepted yet was written since: by this step, or by one whose commit waited for the id that was chosen from it."""
        pieces = []
        for row in self.rows:
            blocks = range(row.first_block, row.first_block + self._blocks(row.length))
            pieces.extend(pieces_of(blocks, row.accepted, row.length, self._tokens))
        if pieces:
            step.wrote(*zip(*pieces, strict=True))

    def _blocks(self, length: int) -> int:
        return -(-length // self._tokens)

    def _restore(self) -> None:
        """The epoch is over: do what the plan says. Raises TimedOut where there is none in time."""
        self._step = None
        if self.emitter is None:
            restored = self.guard.restore(FENCED_S)
            restored.done()
        else:
            joining.follow(self.guard, self.emitter, FENCED_S)
        self.read()
