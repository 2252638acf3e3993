"""A replica held here as the source of a stream towards another node: it stands in for a pool and its commit table.

Knows: store/replica.py's sequences and pages. Must not know: links, plans.
Invariants: a row is one sequence's life here; it and its pages keep their generations while the replica holds them, and read as generation 0 afterwards, so
that a capture of what was dropped or cut meanwhile is stale, as it would be in a pool.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvguard.core import events
from kvguard.daemon.capture import Stream
from kvguard.store.replica import Replica, Sequence
from kvguard.types import Epoch, NodeId

if TYPE_CHECKING:
    import numpy as np

GONE = 0


class PushedReplica:
    """capture.Table and capture.Bytes over one replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._arena = replica.arena
        self._rows: list[tuple[Sequence, int]] = [(sequence, sequence.generation) for sequence in replica.live()]

    # ---- the table ----------------------------------------------------------------------------------------------------------------

    def row_generation(self, row: int) -> int:
        sequence, generation = self._rows[row]
        held = self._replica.sequences.get(sequence.name) is sequence and not sequence.released and sequence.generation == generation
        return generation if held else GONE

    def generations(self, rows, blocks) -> tuple[np.ndarray, np.ndarray]:
        import numpy as np

        of_rows = np.array([self.row_generation(int(row)) for row in rows], np.uint64)
        of_blocks = [self._arena.generation(int(block)) if self._arena.refs[int(block)] else GONE for block in blocks]
        return of_rows, np.array(of_blocks, np.uint64)

    def read_ids(self, row: int, start: int, end: int) -> bytes:
        return bytes(self._rows[row][0].ids[4 * start : 4 * end])

    def sampler(self, row: int) -> bytes:
        return self._rows[row][0].sampler

    # ---- the pool -----------------------------------------------------------------------------------------------------------------

    def capture(self, blocks, starts, counts, out: memoryview) -> int:
        at = 0
        for block, start, count in zip(blocks, starts, counts, strict=True):
            data = self._arena.tokens(int(block), int(start), int(count))
            out[at : at + len(data)] = data
            at += len(data)
        return at

    def capture_blocks(self, blocks, out: memoryview) -> int:
        at = 0
        for block in blocks:
            data = self._arena.block(int(block))
            out[at : at + len(data)] = data
            at += len(data)
        return at

    # ---- what there is --------------------------------------------------------------------------------------------------------------

    def looked(self) -> events.Looked:
        opened, grown, committed, ids = [], [], [], []
        for row, (sequence, generation) in enumerate(self._rows):
            opened.append(events.Opened(row, sequence.name, generation, sequence.lineage, sequence.request))
            if sequence.blocks:
                grown.append(events.Grown(row, 0, tuple(sequence.blocks), tuple(map(self._arena.generation, sequence.blocks))))
            committed.append(self._replica.stated(sequence))
            ids.append(sequence.known)
        rows = tuple(range(len(self._rows)))
        return events.Looked(self._replica.stream, (), (), tuple(opened), tuple(grown), rows, tuple(committed), tuple(ids))


def source(replica: Replica, node: NodeId, epoch: Epoch) -> tuple[Stream, tuple[events.Event, ...]]:
    """The stream to capture from, and the events that tell the core of it. `epoch`: of the plan that wants it pushed, as promised here."""
    pushed = PushedReplica(replica)
    stream = Stream(replica.stream, replica.shape, pushed, pushed, alive=False)
    return stream, (events.StreamAttached(replica.stream, replica.shape, 0, epoch, pushing=node), pushed.looked())
