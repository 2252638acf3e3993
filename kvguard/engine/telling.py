"""The rows of one batch whose blocks lie one behind the other, and what the commit table has been told of them.

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
    """`ids`: all that are known. Of ids, blocks and positions the table has `told`, `listed`, `accepted`. `request`: said when it is opened."""

    __slots__ = ("accepted", "first_block", "ids", "listed", "name", "request", "told")

    def __init__(self, name: str, first_block: int, request: bytes) -> None:
        self.name, self.first_block, self.request = name, first_block, request
        self.ids: list[int] = []
        self.told = self.listed = self.accepted = 0


class Telling:
    """One call's rows, all of the same length. `emitter` None: nobody plans, so no epoch ends but by a plan that others asked for."""

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
        """KV of [0, length) is complete in every row, all ids that are known are told; `sampler`: of the first row.

        Leaves the step that was entered, or takes one of its own."""
        try:
            self._commit(length, sampler)
        except Fenced:
            self._restore()
            self._commit(length, sampler)
        for row in self.rows:
            row.told, row.listed, row.accepted = len(row.ids), max(row.listed, self._blocks(length)), length

    def rewind(self, length: int, sampler: bytes | None) -> None:
        """Go on at `length`, with the ids known here: what the table has beyond is void."""
        step = self._entered(0)
        with step:
            for row in self.rows:
                if row.accepted > length or row.told > len(row.ids):
                    step.truncate(row.name, length)
                    row.accepted, row.told, row.listed = length, min(row.told, length), self._blocks(length)
        self.publish(length, sampler)

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

    def _commit(self, length: int, sampler: bytes | None) -> None:
        step, self._step = self._step or self.guard.step(0), None
        live = self.guard.table.sequences()
        with step:
            for n, row in enumerate(self.rows):
                blocks = range(row.first_block + row.listed, row.first_block + self._blocks(length))
                request = None if row.name in live else row.request
                step.commit(row.name, length, blocks=list(blocks), tokens=row.ids[row.told :], sampler=sampler if n == 0 else None, request=request)
            if self._packs:
                self._say_written(step, length)

    def _say_written(self, step: Step, length: int) -> None:
        """What the table hasn't accepted yet was written since: by this step, or by one whose commit waited for the id that was chosen from it."""
        blocks = self._blocks(length)
        rows = [(range(row.first_block, row.first_block + blocks), row.accepted) for row in self.rows]
        pieces = [piece for listed, accepted in rows for piece in pieces_of(listed, accepted, length, self._tokens)]
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
