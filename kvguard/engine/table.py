"""The writer's side of the commit table: what an engine's process says is true of its sequences.

Knows: which sequence has which row, what may be said of it, whether a tape can take it. Must not know: steps' meaning, sockets, epochs beyond a word, KV bytes.

Invariants
- A staged commit that is not published leaves no trace (`roll_back`); truncate and release are visible, and their generations raised, when they return.
- A wrong call raises ValueError or KeyError before anything has changed.
- What one step has staged is on the tape or in `versions`, never in both.
"""

from __future__ import annotations

import os
from collections import deque

import numpy as np

from kvguard.engine import batch, memory
from kvguard.engine.batch import as_ids
from kvguard.engine.memory import U64
from kvguard.engine.tape import Tape
from kvguard.engine.versions import Versions
from kvguard.format import rows as fmt
from kvguard.format.rows import Geometry
from kvguard.types import Lineage

_NO_BLOCKS: tuple[int, ...] = ()


class TableWriter:
    """One writer at a time (the engine's step loop; calls are not thread-safe). `fd`: the table's descriptor, owned here. `step`: the one being staged."""

    __slots__ = (
        "tape", "step", "header", "fd", "views", "geometry", "versions", "generations", "_checked", "_plain", "_names", "_metas", "_free", "_any_staged",
    )  # fmt: skip

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.views = views = memory.Views(fd, writable=True)
        self.geometry = views.geometry
        self.versions = Versions(views)
        self.generations = self.versions.generations
        self._checked = b""  # the last batch's rows, known to be distinct rows of this table
        self._plain = False  # it went on by one position and one id a row
        self.tape: Tape | None = None  # the rows of the last batch, while nothing else touches them
        self._names: dict[str, int] = {}
        self._metas: dict[int, fmt.Meta] = {}
        self._free = deque(range(self.geometry.rows))
        self._any_staged = False
        self.header = views.header
        self.step = 0

    @classmethod
    def create(cls, geometry: Geometry) -> TableWriter:
        """A new, empty table. Raises BadFrame for a geometry out of bounds."""
        return cls(memory.create(geometry))

    @classmethod
    def adopt(cls, fd: int) -> TableWriter:
        """Go on with a dead writer's table; takes ownership of `fd`. Every row is cut to its committed facts. Raises Refused for what is no table."""
        from kvguard.engine.adoption import rebuild

        writer = cls(fd)
        try:
            rebuild(writer)
        except BaseException:
            writer.close()
            raise
        return writer

    def close(self) -> None:
        """Unmap and close: the table can't be used any more. Idempotent."""
        if self.fd >= 0:
            self.tape = None
            del self.views, self.header, self.versions, self.generations
            os.close(self.fd)
            self.fd = -1

    # ---- what is there ----------------------------------------------------------------------------------------------------------

    def row(self, sequence: str) -> int:
        """The row of a live sequence: its handle for commit_batch. Raises KeyError."""
        try:
            return self._names[sequence]
        except KeyError:
            raise KeyError(f"sequence {sequence!r} is not known here. Try: request=b'...' with its first commit, or spell it as then") from None

    def sequences(self) -> dict[str, int]:
        """Names of the live sequences and their rows."""
        return dict(self._names)

    @property
    def is_untouched(self) -> bool:
        """Whether no sequence was ever here."""
        return self.generations.counter == 0

    def meta(self, row: int) -> fmt.Meta:
        return self._metas[row]

    def accepted(self, row: int) -> int:
        """The row's positions, a staged commit's included."""
        return int(self.versions.heads[row, fmt.H_ACCEPTED]) + self._taped(row)

    def known(self, row: int) -> int:
        """How many ids the row has, staged appends included."""
        return int(self.versions.heads[row, fmt.H_IDS]) + self._taped(row)

    def _taped(self, row: int) -> int:
        tape = self.tape
        return tape.count + (tape.staged is not None) if tape is not None and row in tape.columns else 0

    def blocks(self, row: int) -> list[int]:
        """The row's block list, staged appends included."""
        self._settle()
        return self.views.row_blocks[row, : int(self.versions.heads[row, fmt.H_BLOCKS])].tolist()

    def ids(self, row: int) -> np.ndarray:
        """The row's ids, u32, staged appends included; a copy."""
        self._settle()
        return self.views.ids[row, : int(self.versions.heads[row, fmt.H_IDS])].copy()

    # ---- staging ----------------------------------------------------------------------------------------------------------------

    def open(self, sequence: str, lineage: Lineage, request: bytes = b"") -> int:
        """Take a row for a new sequence; visible at publish. Raises ValueError: a live name, no row free, bounds."""
        if sequence in self._names:
            raise ValueError(f"sequence {sequence!r} is live: an id names one sequence at a time. Try: release it first")
        if not self._free:
            raise ValueError(f"all {self.geometry.rows} rows of the commit table are taken. Try: attach with rows= for more sequences at once")
        meta = fmt.Meta(sequence, lineage, request)
        words = np.array(fmt.meta_words(meta), U64)  # raises ValueError before anything changes
        self._settle()
        row = self._free.popleft()
        slot = int(self.versions.heads[row, fmt.H_FLAGS]) & fmt.META_SLOT ^ fmt.META_SLOT  # the other one: a reader may still be in the last
        head = [0] * fmt.HEAD_WORDS
        head[fmt.H_FLAGS] = fmt.OPEN | slot
        head[fmt.H_BIRTH] = head[fmt.H_GENERATION] = self.generations.raise_row(row)
        head[fmt.H_META_HASH] = self._write_meta(row, slot, words)
        self._names[sequence] = row
        self._metas[row] = meta
        self._stage(row, head)
        return row

    def _stage(self, row: int, head) -> None:
        self.versions.set(row, head)
        self.versions.staged[row] = self._any_staged = True

    def commit(self, row: int, length: int, ids=(), blocks=_NO_BLOCKS, sampler: bytes | None = None) -> None:
        """Stage: `ids` and `blocks` are appended, and `length` positions are accepted once the present step is complete. Raises ValueError."""
        self._settle()
        head = self.versions.heads[row].tolist()
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released?")
        ids = as_ids(ids)
        known, listed = head[fmt.H_IDS], head[fmt.H_BLOCKS]
        batch.check(self, row, head, length, known + len(ids), listed + len(blocks))
        if sampler is not None:
            if len(sampler) > 32:
                raise ValueError(f"sampler state of {len(sampler)} bytes, at most 32. Try: a counter-based generator")
            head[fmt.H_FLAGS] = head[fmt.H_FLAGS] & 0xFF | len(sampler) << 8
            head[fmt.H_SAMPLER : fmt.H_SAMPLER + 4] = np.frombuffer(sampler.ljust(32, b"\0"), U64).tolist()
        if len(blocks):
            head[fmt.H_BLOCKS_HASH] = (head[fmt.H_BLOCKS_HASH] + self._append_blocks(row, listed, blocks)) & fmt.MASK
            head[fmt.H_BLOCKS] = listed + len(blocks)
        if len(ids):
            self.views.ids[row, known : known + len(ids)] = ids
            added = memory.ids_sum(ids, self.views.id_multipliers[known : known + len(ids)])
            head[fmt.H_IDS_HASH] = (head[fmt.H_IDS_HASH] + added) & fmt.MASK
            head[fmt.H_IDS] = known + len(ids)
        if head[fmt.H_STEP] != self.step:
            written = self.header[fmt.WRITTEN_AT // 8]
            old = fmt.H_ACCEPTED if written >= head[fmt.H_STEP] else fmt.H_PRIOR if written >= head[fmt.H_PRIOR_STEP] else fmt.H_BASE
            head[fmt.H_BASE], head[fmt.H_PRIOR], head[fmt.H_PRIOR_STEP] = head[old], head[fmt.H_ACCEPTED], head[fmt.H_STEP]
            head[fmt.H_STEP] = self.step
        head[fmt.H_ACCEPTED] = length
        self._stage(row, head)

    def commit_batch(self, rows: np.ndarray, lengths: np.ndarray, ids: np.ndarray | None = None, blocks: dict | None = None) -> None:
        """Stage many decoding rows at once: int [n] distinct rows, int [n] lengths, and one new id per row (int [n]) or none.

        `blocks`: {index in the batch: appended block ids}. Raises ValueError, and stages nothing then. Cheapest where all are int64 arrays, the rows are
        those of the step before, and each goes on by one position and one id.
        """
        tape = self.tape
        if tape is not None and tape.stage(self.step, rows, lengths, ids, blocks):
            return
        rows = np.asarray(rows, np.int64)
        lengths = np.asarray(lengths, np.int64)
        if len(lengths) != len(rows) or (ids is not None and len(ids) != len(rows)):
            raise ValueError(f"a batch needs columns of equal length: {len(rows)} rows, {len(lengths)} lengths")
        if not len(rows):
            return
        new = None if ids is None else as_ids(ids)
        if tape is not None and new is not None and tape.stage(self.step, rows, lengths, new.view(np.int64), blocks):
            return
        self._settle()
        key = rows.tobytes()
        if key != self._checked:
            self._check_rows(rows)
            self._checked, self._plain = key, False
        if self._plain and new is not None and not self._any_staged:  # as in the step before
            self.tape = Tape(self.versions, rows)
            if self.tape.stage(self.step, rows, lengths, new.view(np.int64), blocks):
                return
            self._settle()
        self._plain = batch.stage(self, rows, lengths, new, blocks)
        self._any_staged = True
        self.versions.staged[rows] = True

    def _settle(self) -> None:
        """End the tape: from here on the heads alone are what next versions are made from."""
        tape, self.tape = self.tape, None
        if tape is not None:
            self._any_staged |= tape.settle()

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.min() < 0 or rows.max() >= len(self.versions.slots) or len(np.unique(rows)) != len(rows):
            raise ValueError(f"a batch needs distinct rows within 0..{len(self.versions.slots) - 1}. Try: the handles that commit returned")

    def _append_blocks(self, row: int, listed: int, blocks) -> int:
        """Append to the row's list; returns the terms to add to its hash. Raises ValueError for a block that the pool doesn't have."""
        blocks = np.asarray(blocks, np.int64)
        if blocks.min() < 0 or blocks.max() >= self.geometry.blocks:
            raise ValueError(f"block {int(blocks.max())} or {int(blocks.min())} is not one of the pool's {self.geometry.blocks}")
        if len(blocks) > 1 and len(np.unique(blocks)) != len(blocks):
            raise ValueError(f"sequence {self._metas[row].name!r}: a block stands twice in its new blocks {blocks.tolist()}")
        return self.versions.append_blocks(row, listed, blocks)

    # ---- publishing -------------------------------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Make all that is staged visible."""
        tape = self.tape
        if tape is not None and tape.staged is not None:  # then nothing else is
            tape.publish()
        elif self._any_staged:
            self._any_staged = False
            self.versions.publish_staged()

    def roll_back(self) -> None:
        """Forget all staged commits: the step failed, or its epoch is over. Blocks that only they referenced get new generations."""
        if self.tape is not None and self.tape.staged is not None:
            blocks = self.tape.drop()
            if len(blocks):  # their generations are over, and so is what the tape has said of them
                self._settle()
                np.add.at(self.generations.references, blocks, 1)
                self.generations.drop(blocks)
        for row in np.flatnonzero(self.versions.staged).tolist():
            self.unstage(row)
        self._any_staged = False

    def unstage(self, row: int) -> None:
        """Forget the staged commits of one row; a sequence opened in this step is not known any more."""
        self._settle()
        staged = self.versions.heads[row].copy()
        seen = self.versions.visible(row)
        same = bool(seen[fmt.H_FLAGS] & U64(fmt.OPEN)) and seen[fmt.H_BIRTH] == staged[fmt.H_BIRTH]
        kept = int(seen[fmt.H_BLOCKS]) if same else 0
        dropped = self.views.row_blocks[row, kept : int(staged[fmt.H_BLOCKS])].copy()
        if same:
            self.versions.set(row, seen)
        else:
            closed = np.zeros(fmt.HEAD_WORDS, U64)
            closed[fmt.H_FLAGS] = staged[fmt.H_FLAGS] & U64(fmt.META_SLOT)
            self.versions.set(row, closed)
            self._forget(row)
        self.versions.staged[row] = False
        self.generations.drop(dropped)

    # ---- at once ----------------------------------------------------------------------------------------------------------------

    def truncate(self, row: int, position: int, lineage: Lineage | None = None, keep_blocks: int = 0, keep_ids: int = 0) -> None:
        """KV and ids beyond `position` are void, at once. Keeps the blocks that hold the positions left, or `keep_blocks` if that is more. Raises ValueError.

        `lineage`: the sequence's after a plan; unchanged without. `keep_ids`: so many ids stay although they are beyond: a plan takes KV back, never the ids
        that it knows: they have been handed out, and until their emitter says them again this row may be the only one that knows them.
        """
        self._settle()
        head = self.versions.heads[row].tolist()
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released?")
        meta = self._metas[row]
        if self.versions.staged[row]:
            raise ValueError(f"sequence {meta.name!r} has a commit in this step. Try: truncate first, then commit")
        if not 0 <= position <= head[fmt.H_ACCEPTED]:
            raise ValueError(f"sequence {meta.name!r}: can't truncate to {position}, {head[fmt.H_ACCEPTED]} positions are accepted")
        kept = min(max(-(-position // self.geometry.block_tokens), keep_blocks), head[fmt.H_BLOCKS])
        if lineage is not None:
            meta = meta._replace(lineage=lineage)
            words = np.array(fmt.meta_words(meta), U64)
            head[fmt.H_FLAGS] ^= fmt.META_SLOT
            head[fmt.H_META_HASH] = self._write_meta(row, head[fmt.H_FLAGS] & fmt.META_SLOT, words)
            self._metas[row] = meta
        dropped = self.views.row_blocks[row, kept : head[fmt.H_BLOCKS]].copy()
        head[fmt.H_PREVIOUS], head[fmt.H_GENERATION] = head[fmt.H_GENERATION], self.generations.raise_row(row)
        self.generations.drop(dropped)
        head[fmt.H_KEPT], head[fmt.H_KEPT_BLOCKS], head[fmt.H_BLOCKS] = position, kept, kept
        for word in (fmt.H_ACCEPTED, fmt.H_PRIOR, fmt.H_BASE):
            head[word] = min(head[word], position)
        head[fmt.H_IDS] = min(head[fmt.H_IDS], max(position, keep_ids))
        known = head[fmt.H_IDS]
        head[fmt.H_IDS_HASH] = memory.ids_sum(self.views.ids[row, :known], self.views.id_multipliers[:known])
        head[fmt.H_BLOCKS_HASH] = memory.blocks_sum(self.views.row_blocks[row, :kept], self.views.row_block_generations[row, :kept])
        self.versions.set(row, head)
        self.versions.publish_one(row)

    def release(self, row: int) -> None:
        """The sequence is over, at once; blocks that no row references any more get new generations. Raises ValueError for a row that holds none."""
        self._settle()
        head = self.versions.heads[row].tolist()
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released twice?")
        dropped = self.views.row_blocks[row, : head[fmt.H_BLOCKS]].copy()
        closed = [0] * fmt.HEAD_WORDS
        closed[fmt.H_FLAGS] = head[fmt.H_FLAGS] & fmt.META_SLOT
        closed[fmt.H_BIRTH], closed[fmt.H_PREVIOUS], closed[fmt.H_GENERATION] = head[fmt.H_BIRTH], head[fmt.H_GENERATION], self.generations.raise_row(row)
        self.generations.drop(dropped)
        self.versions.set(row, closed)
        self.versions.publish_one(row)
        self.versions.staged[row] = False
        self._forget(row)

    def _write_meta(self, row: int, slot: int, words: np.ndarray) -> int:
        self.views.meta[row, 1 if slot else 0, : len(words)] = words
        return memory.meta_sum(words)

    def _forget(self, row: int) -> None:
        meta = self._metas.pop(row)
        self._plain = False  # its row may be in the last batch
        del self._names[meta.name]
        self._free.append(row)
