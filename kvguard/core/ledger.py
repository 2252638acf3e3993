"""What is true of one stream's table, as last seen: the rows that all senders of the stream compare their own `sent` with.

Knows: sequences by row, their blocks, generations, lineage, committed positions and ids. Must not know: holders, sessions, bytes.
Invariants: committed <= ids and committed <= positions of the block list, whatever the table claims; `previous` is `committed` before the last look that
touched the row; `former` says up to where an older generation of the row is still true (what a cut kept), so that a holder of it can go on.
"""

from __future__ import annotations

from kvguard.core.events import Cut, Looked, Opened
from kvguard.format.messages import StreamShape
from kvguard.types import Lineage, SequenceId

FORMER_MAX = 8  # cuts that a holder may have missed and still go on from; beyond it starts over


class Row:
    """One sequence, alive in the engine."""

    __slots__ = ("blocks", "committed", "former", "generation", "generations", "ids", "lineage", "previous", "request", "sequence")

    def __init__(self, sequence: SequenceId, generation: int, lineage: Lineage, request: bytes) -> None:
        self.sequence = sequence
        self.generation = generation
        self.lineage = lineage
        self.request = request
        self.blocks: list[int] = []
        self.generations: list[int] = []
        self.committed = 0
        self.previous = 0
        self.ids = 0
        self.former: dict[int, int] = {}


class Ledger:
    """`look` applies one event. What it says of a row that nothing opened is not followed: a table may lie."""

    def __init__(self, shape: StreamShape) -> None:
        self.numbers: dict[SequenceId, int] = {}  # rows by name
        self.shape = shape
        self.rows: dict[int, Row] = {}

    def look(self, event: Looked) -> None:
        rows = self.rows
        for number in event.released:
            self._close(number)
        for cut in event.cut:
            self._cut(cut)
        for opened in event.opened:
            self._open(opened)
        for grown in event.grown:
            row = rows.get(grown.row)
            if row is None or grown.first > len(row.blocks):
                continue
            row.blocks[grown.first :] = grown.blocks
            row.generations[grown.first :] = grown.generations
        tokens = self.shape.block_tokens
        for number, committed, ids in zip(event.rows, event.committed, event.ids, strict=True):
            row = rows.get(number)
            if row is None:
                continue
            row.previous = row.committed
            row.ids = ids
            if committed > ids:
                committed = ids
            if committed > len(row.blocks) * tokens:
                committed = len(row.blocks) * tokens
            row.committed = committed

    def _open(self, opened: Opened) -> None:
        row = self.rows.get(opened.row)
        if row is not None and row.sequence == opened.sequence and row.generation == opened.generation:
            return  # a fresh reader of a known table says everything again
        self._close(opened.row)
        self.rows[opened.row] = Row(opened.sequence, opened.generation, opened.lineage, opened.request)
        self.numbers[opened.sequence] = opened.row

    def _close(self, number: int) -> None:
        row = self.rows.pop(number, None)
        if row is not None and self.numbers.get(row.sequence) == number:  # else it was opened elsewhere before this one was seen to end
            del self.numbers[row.sequence]

    def _cut(self, cut: Cut) -> None:
        row = self.rows.get(cut.row)
        if row is None:
            return
        kept = self.kept(cut)
        former = {generation: min(limit, kept) for generation, limit in row.former.items()}
        former[row.generation] = kept
        while len(former) > FORMER_MAX:
            del former[next(iter(former))]
        former.pop(cut.generation, None)
        row.former = former
        row.generation = cut.generation
        row.lineage = cut.lineage
        del row.blocks[cut.blocks :]
        del row.generations[cut.blocks :]
        row.committed = min(row.committed, kept)
        row.previous = min(row.previous, kept)
        row.ids = min(row.ids, cut.kept)

    def kept(self, cut: Cut) -> int:
        """Positions that a cut leaves, of those whose blocks it leaves: a tail block that is copied before it is written must travel again."""
        return min(cut.kept, cut.blocks * self.shape.block_tokens)

    def check(self) -> None:
        assert all(self.rows[number].sequence == sequence for sequence, number in self.numbers.items())
        for row in self.rows.values():
            assert len(row.blocks) == len(row.generations), row.sequence
            assert row.committed <= row.ids, row.sequence
            assert row.committed <= len(row.blocks) * self.shape.block_tokens, row.sequence
            assert row.previous <= row.committed or row.generation not in row.former, row.sequence
