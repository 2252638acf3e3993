"""What leaves a pool: bytes with their sums, token ids, facts. Each read between two looks at the generations, so that nothing reused is ever sent.

Knows: the protocols of pools and tables (here: Table). Must not know: links, sessions, files, processes.
Invariants: a piece whose row or block generation differs before or after the copy contributes no byte, no sum and no id; sums are taken from the very copy
that is sent; of a dead engine's pool only the rows that were salvaged whole are read: elsewhere it holds zeros under generations that still count.
A capture has two halves: `begun` in the loop's thread, `copied` in any (daemon/copies.py says which); `capture` is both at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from kvguard.core import effects, events
from kvguard.format import pages
from kvguard.format.lineage import birth_of
from kvguard.format.messages import PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, Holding, IdsFrame, KnownIds, StreamShape
from kvguard.types import Lineage, StreamId

if TYPE_CHECKING:  # numpy comes with the first engine: a daemon that starts has no time for it
    import numpy as np


class Table(Protocol):
    """What is asked of engine.look.TableReader, and of whatever stands in for it (a replica that is pushed on, a simulation)."""

    def generations(self, rows, blocks) -> tuple[np.ndarray, np.ndarray]: ...

    def row_generation(self, row: int) -> int: ...

    def read_ids(self, row: int, start: int, end: int) -> bytes: ...

    def sampler(self, row: int) -> bytes: ...


class Bytes(Protocol):
    """What is asked of device.base.Pool to capture."""

    def capture(self, blocks, starts, counts, out: memoryview) -> int: ...

    def capture_blocks(self, blocks, out: memoryview) -> int: ...


@dataclass
class Stream:
    """A pool with its table, mapped here: a local rank's, living or dead, or a replica that is pushed on."""

    id: StreamId
    shape: StreamShape
    pool: Bytes
    table: Table
    incarnation: int = 0
    endpoint: str = ""
    alive: bool = True
    lost: str = ""  # why the memory behind `pool` can't be believed any more
    leaving: bool = False  # its process has ended, and its memory is being salvaged
    kept: frozenset[int] | None = None  # rows whose KV was salvaged; None: all that there are


# ---- bytes ----------------------------------------------------------------------------------------------------------------------


def fresh(size: int) -> memoryview:
    return memoryview(bytearray(size))


def _fresh(stream: Stream, wanted: tuple[np.ndarray, np.ndarray], rows: np.ndarray, blocks: np.ndarray) -> np.ndarray:
    """Which pieces' generations are the wanted ones now, bool [n]."""
    of_rows, of_blocks = stream.table.generations(rows, blocks)
    return (of_rows == wanted[0]) & (of_blocks == wanted[1])


class Begun(NamedTuple):
    """One capture of `pool`: which pieces are wanted (columns of int arrays, bool [n] `copied`: those with bytes), and memory for them."""

    stream: Stream
    pool: Bytes
    incarnation: int
    effect: effects.Capture
    rows: np.ndarray
    blocks: np.ndarray
    slots: np.ndarray
    counts: np.ndarray
    wanted: tuple[np.ndarray, np.ndarray]
    before: np.ndarray
    copied: np.ndarray
    sizes: np.ndarray
    out: memoryview


Taken = tuple[memoryview, tuple[int, ...], bytes]


def begun(stream: Stream, effect: effects.Capture, lend: Callable[[int], memoryview] = fresh) -> Begun:
    """What is to be copied, after the first look at the generations. `lend`: writable memory for so many bytes."""
    import numpy as np

    shape = stream.shape
    rows, blocks = np.array(effect.rows, np.intp), np.array(effect.blocks, np.int64)
    wanted = np.array(effect.row_generations, np.uint64), np.array(effect.generations, np.uint64)
    counts, flags = np.array(effect.counts, np.int64), np.array(effect.flags, np.int64)
    slots = np.array(effect.starts, np.int64) % shape.block_tokens
    sizes = np.where(flags == PIECE_TOKENS, counts * shape.token_bytes, np.where(flags == PIECE_BLOCK, shape.block_bytes, 0))
    before = _fresh(stream, wanted, rows, blocks)
    if stream.kept is not None:
        before &= np.isin(rows, list(stream.kept))
    copied = before & (flags != PIECE_REFERENCE)
    out = lend(int(sizes[copied].sum()))
    return Begun(stream, stream.pool, stream.incarnation, effect, rows, blocks, slots, counts, wanted, before, copied, sizes, out)


def copied(order: Begun) -> Taken:
    """(bytes of the good pieces in order, indices of the stale ones, packed sums of the good ones). Raises what the pool raises."""
    import numpy as np

    shape, some, out = order.stream.shape, order.copied, order.out
    if some.any():
        if shape.addressable:
            order.pool.capture(order.blocks[some], order.slots[some], order.counts[some], out)
        else:
            order.pool.capture_blocks(order.blocks[some], out)
    good = order.before & _fresh(order.stream, order.wanted, order.rows, order.blocks)
    if not good[some].all():
        out = _compacted(out, order.sizes[some], good[some])
    sums = pages.sums_of(out, shape.token_bytes if shape.addressable else shape.block_bytes)
    return out, tuple(np.flatnonzero(~good).tolist()), pages.pack_sums(sums)


def capture(stream: Stream, effect: effects.Capture, lend: Callable[[int], memoryview] = fresh) -> Taken:
    """Both halves. Raises what the pool raises."""
    return copied(begun(stream, effect, lend))


def _compacted(data: memoryview, sizes: np.ndarray, good: np.ndarray) -> memoryview:
    """Only the good pieces' bytes."""
    ends = sizes.cumsum()
    return memoryview(bytearray().join(data[end - size : end] for end, size, kept in zip(ends.tolist(), sizes.tolist(), good.tolist(), strict=True) if kept))


# ---- ids ------------------------------------------------------------------------------------------------------------------------


def filled(stream: Stream, effect: effects.SendIds) -> IdsFrame:
    """The frame with ids and samplers; rows whose generation moved on are left out."""
    nos, starts, counts, parts, sampler_bytes, samplers = [], [], [], [], [], []
    message = effect.message
    for no, start, count, row, generation in zip(message.nos, message.starts, message.counts, effect.rows, effect.row_generations, strict=True):
        if stream.table.row_generation(row) != generation:
            continue
        ids, sampler = stream.table.read_ids(row, start, start + count), stream.table.sampler(row)
        if stream.table.row_generation(row) != generation or len(ids) != 4 * count:
            continue
        nos.append(no)
        starts.append(start)
        counts.append(count)
        parts.append(ids)
        sampler_bytes.append(len(sampler))
        samplers.append(sampler)
    return IdsFrame(
        message.session, message.epoch, message.number, message.ops, tuple(nos), tuple(starts), tuple(counts), b"".join(parts), tuple(sampler_bytes),
        b"".join(samplers), message.after_kv,
    )  # fmt: skip


# ---- facts ----------------------------------------------------------------------------------------------------------------------


class Facts:
    """All that the looks at one table have said so far, by sequence: what a report states of a pool."""

    def __init__(self) -> None:
        self._rows: dict[int, list] = {}  # row -> [sequence, generation, lineage, committed, ids, request]

    def take(self, looked: events.Looked) -> None:
        for row in looked.released:
            self._rows.pop(row, None)
        for cut in looked.cut:
            entry = self._rows[cut.row]
            entry[1], entry[2], entry[3], entry[4] = cut.generation, cut.lineage, min(entry[3], cut.kept), min(entry[4], cut.kept)
        for opened in looked.opened:
            self._rows[opened.row] = [opened.sequence, opened.generation, opened.lineage, 0, 0, opened.request]
        for row, committed, ids in zip(looked.rows, looked.committed, looked.ids, strict=True):
            self._rows[row][3:5] = committed, ids

    def committed(self) -> list[tuple[int, int]]:
        """(row, committed positions) of every sequence."""
        return [(row, entry[3]) for row, entry in sorted(self._rows.items())]

    def keep(self, rows) -> None:
        """Only these rows' KV is still there: of the others nothing may be planned with but their ids."""
        for row, entry in self._rows.items():
            entry[3] = entry[3] if row in rows else 0

    def holding(self, stream: Stream) -> Holding:
        rows = [self._rows[row] for row in sorted(self._rows)]
        names, generations, lineages, positions, ids, requests = zip(*rows, strict=True) if rows else ((),) * 6
        births = tuple(map(birth_of, requests))
        return Holding(stream.id, "pool", stream.alive, names, generations, lineages, positions, ids, stream.shape.fingerprint, births)

    def find(self, sequence: str) -> tuple[int, Lineage, int, int] | None:
        """(row, lineage, committed positions, birth) of a sequence that lives in the table."""
        return next(((row, entry[2], entry[3], birth_of(entry[5])) for row, entry in self._rows.items() if entry[0] == sequence), None)

    def known(self, stream: Stream, sequences: tuple[str, ...], counts: tuple[int, ...]) -> list[KnownIds]:
        """Ids (as many as were planned), sampler and request of sequences that live in the table. One that isn't there any more is left out."""
        found = {entry[0]: (row, entry) for row, entry in self._rows.items()}
        answer = []
        for sequence, count in zip(sequences, counts, strict=True):
            if sequence in found:
                row, entry = found[sequence]
                answer.append(KnownIds(sequence, stream.table.read_ids(row, 0, min(count, entry[4])), stream.table.sampler(row), entry[5]))
        return answer


def as_event(stream: StreamId, look) -> events.Looked:
    """engine.look.Look in the core's own types: two rooms that don't import each other say the same."""
    return events.Looked(
        stream, look.released, tuple(events.Cut(*cut) for cut in look.cut), tuple(events.Opened(*opened) for opened in look.opened),
        tuple(events.Grown(*grown) for grown in look.grown), look.rows, look.committed, look.ids,
    )  # fmt: skip
