"""The writer's side of the commit table: what an engine's process says is true of its sequences.

Knows: rows, block references, generations, the order of stores. Must not know: steps' meaning, sockets, epochs beyond a word, KV bytes.

Invariants
- What a reader can see is always a version that was published whole. Ids and blocks are appended beyond what the visible head counts; `publish` makes them visible.
- A staged commit that is not published leaves no trace (`roll_back`); truncate and release are visible, and their generations raised, when they return.
- A wrong call raises ValueError or KeyError before anything has changed.
- The heads in private memory (`_heads`) are the next version of every row: nothing is ever read back from shared memory except at adoption and roll_back.
"""

from __future__ import annotations

import os
from collections import deque

import numpy as np

from kvguard.engine import memory
from kvguard.engine.memory import U64
from kvguard.format import rows as fmt
from kvguard.format.rows import Geometry
from kvguard.types import Lineage

_NO_BLOCKS: tuple[int, ...] = ()


class TableWriter:
    """One writer at a time (the engine's step loop; calls are not thread-safe). `fd`: the table's descriptor, owned here. `step`: the one being staged."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.views = views = memory.Views(fd, writable=True)
        self.geometry = views.geometry
        rows = self.geometry.rows
        self._heads = np.zeros((rows, fmt.HEAD_WORDS), U64)
        self._versions = np.zeros(rows, U64)
        self._staged = np.zeros(rows, bool)
        self._mark = np.zeros(rows, np.intp)
        self._references = np.zeros(self.geometry.blocks, np.int32)
        self._names: dict[str, int] = {}
        self._metas: dict[int, fmt.Meta] = {}
        self._free = deque(range(rows))
        self._written = views.word(fmt.WRITTEN_AT)
        self._counter = int(views.words[fmt.COUNTER_AT // 8])
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
        rebuild(writer)
        return writer

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last view of it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # ---- what is there ----------------------------------------------------------------------------------------------------------

    def row(self, sequence: str) -> int:
        """The row of a live sequence: its handle for commit_batch. Raises KeyError."""
        try:
            return self._names[sequence]
        except KeyError:
            raise KeyError(f"sequence {sequence!r} is not known here. Try: commit it with its blocks first, or spell it as then") from None

    def sequences(self) -> dict[str, int]:
        """Names of the live sequences and their rows."""
        return dict(self._names)

    def meta(self, row: int) -> fmt.Meta:
        return self._metas[row]

    def accepted(self, row: int) -> int:
        return int(self._heads[row, fmt.H_ACCEPTED])

    def blocks(self, row: int) -> list[int]:
        """The row's block list, staged appends included."""
        return self.views.row_blocks[row, : int(self._heads[row, fmt.H_BLOCKS])].tolist()

    def ids(self, row: int) -> np.ndarray:
        """The row's ids, u32, staged appends included; a copy."""
        return self.views.ids[row, : int(self._heads[row, fmt.H_IDS])].copy()

    # ---- staging ----------------------------------------------------------------------------------------------------------------

    def open(self, sequence: str, lineage: Lineage, request: bytes = b"") -> int:
        """Take a row for a new sequence; visible at publish. Raises ValueError: a live name, no row free, bounds."""
        if sequence in self._names:
            raise ValueError(f"sequence {sequence!r} is live: an id names one sequence at a time. Try: release it first")
        if not self._free:
            raise ValueError(f"all {self.geometry.rows} rows of the commit table are taken. Try: attach with rows= for more sequences at once")
        meta = fmt.Meta(sequence, lineage, request)
        words = np.array(fmt.meta_words(meta), U64)  # raises ValueError before anything changes
        row = self._free.popleft()
        slot = int(self._heads[row, fmt.H_FLAGS]) & fmt.META_SLOT ^ fmt.META_SLOT  # the other one: a reader may still be in the last
        head = self._heads[row]
        head[:] = 0
        head[fmt.H_FLAGS] = fmt.OPEN | slot
        head[fmt.H_BIRTH] = head[fmt.H_GENERATION] = self._raise_row(row)
        head[fmt.H_META_HASH] = self._write_meta(row, slot, words)
        self._names[sequence] = row
        self._metas[row] = meta
        self._staged[row] = True
        return row

    def commit(self, row: int, length: int, ids=(), blocks=_NO_BLOCKS, sampler: bytes | None = None) -> None:
        """Stage: `ids` and `blocks` are appended, and `length` positions are accepted once the present step is complete. Raises ValueError."""
        head = self._heads[row].tolist()
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released?")
        ids = as_ids(ids)
        known, listed = head[fmt.H_IDS], head[fmt.H_BLOCKS]
        self._check(row, head, length, known + len(ids), listed + len(blocks))
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
            written = self._written[0]
            old = fmt.H_ACCEPTED if written >= head[fmt.H_STEP] else fmt.H_PRIOR if written >= head[fmt.H_PRIOR_STEP] else fmt.H_BASE
            head[fmt.H_BASE], head[fmt.H_PRIOR], head[fmt.H_PRIOR_STEP] = head[old], head[fmt.H_ACCEPTED], head[fmt.H_STEP]
            head[fmt.H_STEP] = self.step
        head[fmt.H_ACCEPTED] = length
        self._heads[row] = head
        self._staged[row] = True

    def commit_batch(self, rows: np.ndarray, lengths: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Stage many decoding rows at once: int [n] distinct rows, int [n] lengths, and one new id per row (int [n]) or none. Raises ValueError."""
        rows = np.asarray(rows, np.intp)
        lengths = np.asarray(lengths).astype(U64)
        count = np.arange(len(rows))
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self._mark)):
            raise ValueError(f"rows must be within 0..{len(self._mark) - 1}. Try: the handles that commit returned")
        self._mark[rows] = count
        heads = self._heads[rows]
        known = heads[:, fmt.H_IDS]
        total = known if ids is None else known + U64(1)
        if (self._mark[rows] != count).any() or len(lengths) != len(rows) or (ids is not None and len(ids) != len(rows)):
            raise ValueError(f"a batch needs distinct rows and columns of equal length: {len(rows)} rows, {len(lengths)} lengths")
        bound = np.minimum(total, heads[:, fmt.H_BLOCKS] * U64(self.geometry.block_tokens))
        bad = (lengths < heads[:, fmt.H_ACCEPTED]) | (lengths > bound) | ((heads[:, fmt.H_FLAGS] & U64(fmt.OPEN)) == 0) | (total > self.geometry.ids_per_row)
        if bad.any():
            n = int(bad.argmax())
            head = heads[n].tolist()
            if not head[fmt.H_FLAGS] & fmt.OPEN:
                raise ValueError(f"row {rows[n]} holds no sequence: released?")
            self._check(int(rows[n]), head, int(lengths[n]), int(total[n]), head[fmt.H_BLOCKS])
        if ids is not None:
            ids = as_ids(ids)
            self.views.ids[rows, known] = ids
            heads[:, fmt.H_IDS_HASH] += (ids + U64(1)) * self.views.id_multipliers[known]
            heads[:, fmt.H_IDS] = total
        self._shift(heads)
        heads[:, fmt.H_ACCEPTED] = lengths
        self._heads[rows] = heads
        self._staged[rows] = True

    def _shift(self, heads: np.ndarray) -> None:
        """What was accepted before this step becomes `prior` (format.rows.shifted)."""
        written = U64(self._written[0])
        steps = heads[:, fmt.H_STEP]
        accepted, prior = heads[:, fmt.H_ACCEPTED], heads[:, fmt.H_PRIOR]
        base = np.where(written >= steps, accepted, np.where(written >= heads[:, fmt.H_PRIOR_STEP], prior, heads[:, fmt.H_BASE]))
        again = steps == self.step  # a second commit of one step shifts nothing
        if again.any():
            heads[:, fmt.H_BASE] = np.where(again, heads[:, fmt.H_BASE], base)
            heads[:, fmt.H_PRIOR_STEP] = np.where(again, heads[:, fmt.H_PRIOR_STEP], steps)
            heads[:, fmt.H_PRIOR] = np.where(again, prior, accepted)
        else:
            heads[:, fmt.H_BASE] = base
            heads[:, fmt.H_PRIOR] = accepted
            heads[:, fmt.H_PRIOR_STEP] = steps
        heads[:, fmt.H_STEP] = self.step

    def _check(self, row: int, head: list[int], length: int, ids: int, blocks: int) -> None:
        """Raises ValueError where a commit says what can't be."""
        name, slots = self._metas[row].name, blocks * self.geometry.block_tokens
        if ids > self.geometry.ids_per_row or blocks > self.geometry.blocks_per_row:
            raise ValueError(
                f"sequence {name!r}: {ids} ids in {blocks} blocks are over the table's {self.geometry.ids_per_row} and {self.geometry.blocks_per_row}. "
                "Try: attach with positions_max= as long as the longest sequence"
            )
        if length > slots:
            raise ValueError(f"sequence {name!r}: {length} positions are beyond the block list's {slots}. Try: pass the new blocks with this commit")
        if length > ids:
            raise ValueError(f"sequence {name!r}: {length} positions, but only {ids} token ids are known. Try: tokens= with every commit")
        if length < head[fmt.H_ACCEPTED]:
            raise ValueError(f"sequence {name!r}: commit of {length} is behind {head[fmt.H_ACCEPTED]}. Try: truncate")

    def _append_blocks(self, row: int, listed: int, blocks) -> int:
        """Append to the row's list; returns the terms to add to its hash. Raises ValueError for a block that the pool doesn't have."""
        blocks = np.asarray(blocks, np.int64)
        if blocks.min() < 0 or blocks.max() >= self.geometry.blocks:
            raise ValueError(f"block {int(blocks.max())} or {int(blocks.min())} is not one of the pool's {self.geometry.blocks}")
        if len(blocks) > 1 and len(np.unique(blocks)) != len(blocks):
            raise ValueError(f"sequence {self._metas[row].name!r}: a block stands twice in its new blocks {blocks.tolist()}")
        generations = self.views.block_generations[blocks]
        self.views.row_blocks[row, listed : listed + len(blocks)] = blocks
        self.views.row_block_generations[row, listed : listed + len(blocks)] = generations
        self._references[blocks] += 1
        return memory.blocks_sum(blocks, generations, listed)

    # ---- publishing -------------------------------------------------------------------------------------------------------------

    def publish(self) -> int:
        """Make all staged rows visible; returns how many."""
        rows = np.flatnonzero(self._staged)
        if len(rows):
            self._publish(rows)
            self._staged[rows] = False
        return len(rows)

    def _publish(self, rows: np.ndarray) -> None:
        versions = self._versions[rows] + U64(1)
        heads = self._heads[rows]
        heads[:, fmt.H_VERSION] = versions
        heads[:, fmt.H_SUM] = memory.head_sums(heads)
        self.views.heads[rows, (versions & U64(1)).astype(np.intp)] = heads
        memory.order()  # what a selector chooses is there before it; readers check all the same
        self.views.selectors[rows] = versions
        self._versions[rows] = versions

    def roll_back(self) -> None:
        """Forget all staged commits: the step failed, or its epoch is over. Blocks that only they referenced get new generations."""
        for row in np.flatnonzero(self._staged).tolist():
            self.unstage(row)

    def unstage(self, row: int) -> None:
        """Forget the staged commits of one row; a sequence opened in this step is not known any more."""
        staged = self._heads[row].copy()
        seen = self.views.heads[row, int(self._versions[row]) & 1].copy()
        same = bool(seen[fmt.H_FLAGS] & U64(fmt.OPEN)) and seen[fmt.H_BIRTH] == staged[fmt.H_BIRTH]
        kept = int(seen[fmt.H_BLOCKS]) if same else 0
        dropped = self.views.row_blocks[row, kept : int(staged[fmt.H_BLOCKS])].copy()
        if same:
            self._heads[row] = seen
        else:
            self._heads[row] = 0
            self._heads[row, fmt.H_FLAGS] = staged[fmt.H_FLAGS] & U64(fmt.META_SLOT)
            self._forget(row)
        self._staged[row] = False
        self._drop_blocks(dropped)

    # ---- at once ----------------------------------------------------------------------------------------------------------------

    def truncate(self, row: int, position: int, lineage: Lineage | None = None, keep_blocks: int = 0) -> None:
        """KV and ids beyond `position` are void, at once. Keeps the blocks that hold the positions left, or `keep_blocks` if that is more. Raises ValueError.

        `lineage`: the sequence's after a plan; unchanged without.
        """
        head = self._heads[row].tolist()
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released?")
        meta = self._metas[row]
        if self._staged[row]:
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
        head[fmt.H_PREVIOUS], head[fmt.H_GENERATION] = head[fmt.H_GENERATION], self._raise_row(row)
        self._drop_blocks(dropped)
        head[fmt.H_KEPT], head[fmt.H_KEPT_BLOCKS], head[fmt.H_BLOCKS] = position, kept, kept
        for word in (fmt.H_ACCEPTED, fmt.H_PRIOR, fmt.H_BASE, fmt.H_IDS):
            head[word] = min(head[word], position)
        known = head[fmt.H_IDS]
        head[fmt.H_IDS_HASH] = memory.ids_sum(self.views.ids[row, :known], self.views.id_multipliers[:known])
        head[fmt.H_BLOCKS_HASH] = memory.blocks_sum(self.views.row_blocks[row, :kept], self.views.row_block_generations[row, :kept])
        self._heads[row] = head
        self._publish(np.array([row]))
        memory.order()

    def release(self, row: int) -> None:
        """The sequence is over, at once; blocks that no row references any more get new generations. Raises ValueError for a row that holds none."""
        head = self._heads[row].tolist()
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released twice?")
        dropped = self.views.row_blocks[row, : head[fmt.H_BLOCKS]].copy()
        closed = [0] * fmt.HEAD_WORDS
        closed[fmt.H_FLAGS] = head[fmt.H_FLAGS] & fmt.META_SLOT
        closed[fmt.H_BIRTH], closed[fmt.H_PREVIOUS], closed[fmt.H_GENERATION] = head[fmt.H_BIRTH], head[fmt.H_GENERATION], self._raise_row(row)
        self._drop_blocks(dropped)
        self._heads[row] = closed
        self._publish(np.array([row]))
        self._staged[row] = False
        self._forget(row)
        memory.order()

    # ---- generations ------------------------------------------------------------------------------------------------------------

    def _raise_counter(self, count: int) -> int:
        """The first of `count` new generations; the counter is stored before any of them is used."""
        first = self._counter + 1
        self._counter += count
        self.views.words[fmt.COUNTER_AT // 8] = self._counter
        memory.order()
        return first

    def _raise_row(self, row: int) -> int:
        generation = self._raise_counter(1)
        self.views.row_generations[row] = generation
        return generation

    def _drop_blocks(self, blocks: np.ndarray) -> None:
        """Take a row's references away; unreferenced blocks may be overwritten from now on, so their generations rise now."""
        if not len(blocks):
            return
        np.subtract.at(self._references, blocks, 1)
        over = np.unique(blocks[self._references[blocks] == 0])
        if len(over):
            first = self._raise_counter(len(over))
            self.views.block_generations[over] = np.arange(first, first + len(over), dtype=U64)

    def _write_meta(self, row: int, slot: int, words: np.ndarray) -> int:
        self.views.meta[row, 1 if slot else 0, : len(words)] = words
        return memory.meta_sum(words)

    def _forget(self, row: int) -> None:
        meta = self._metas.pop(row)
        del self._names[meta.name]
        self._free.append(row)


def as_ids(ids) -> np.ndarray:
    """Token ids as u64. Raises ValueError outside 0 .. 2**32 - 1."""
    array = np.asarray(ids)
    if not array.size:
        return np.zeros(0, U64)
    if array.dtype.kind not in "iu" or (array.dtype != np.uint32 and (array >> 32).any()):
        raise ValueError(f"token ids must be integers within 0..{2**32 - 1}, got {array.dtype}. Try: plain ids without padding marks")
    return array.astype(U64)
