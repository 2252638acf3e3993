"""The writer's side of the commit table: what an engine's process says is true of its sequences.

Knows: rows, block references, generations, the order of stores. Must not know: steps' meaning, sockets, epochs beyond a word, KV bytes.

Invariants
- What a reader can see is always a version that was published whole. Ids and blocks are appended beyond what the visible head counts.
- A staged commit that is not published leaves no trace (`roll_back`); truncate and release are visible, and their generations raised, when they return.
- A wrong call raises ValueError or KeyError before anything has changed.
- The heads in private memory (`_heads`) are the next version of every row: nothing is ever read back from shared memory except at adoption and roll_back.
"""

from __future__ import annotations

import os
from collections import deque

import numpy as np

from kvguard.engine import memory
from kvguard.engine.batch import DecodeBatch
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
        self._versions = np.zeros(rows, np.int64)
        self._staged = np.zeros(rows, bool)
        self._cold_sums = np.zeros(rows, U64)  # of each row's head: the share of its checksum that a decoding commit doesn't change
        self._slots = np.full(rows, -1, np.int64)  # positions that the row's blocks can take; -1 where no sequence is
        self._checked = b""  # the last batch's rows, known to be distinct rows of this table
        self._batch: DecodeBatch | None = None  # the rows of the last batch, while nothing else touches them
        self._references = np.zeros(self.geometry.blocks, np.int32)
        blocks = (views.block_generations, views.row_blocks, views.row_block_generations, self._references)
        self._block_words = tuple(memoryview(array) for array in blocks)  # single words are cheaper to reach so
        self._names: dict[str, int] = {}
        self._metas: dict[int, fmt.Meta] = {}
        self._free = deque(range(rows))
        self._any_staged = False
        self._multipliers: dict[int, tuple[int, int]] = {}  # of block places, at most blocks_per_row
        self._written = views.word(fmt.WRITTEN_AT)
        self._counter = int(views.words[fmt.COUNTER_AT // 8])
        self.step = 0
        self._latest = 0  # no row names a later step

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
        """Unmap and close: the table can't be used any more. Idempotent."""
        if self.fd >= 0:
            self._batch = None
            del self.views, self._written, self._block_words
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

    @property
    def is_untouched(self) -> bool:
        """Whether no sequence was ever here."""
        return self._counter == 0

    def meta(self, row: int) -> fmt.Meta:
        return self._metas[row]

    def accepted(self, row: int) -> int:
        self._settle()
        return int(self._heads[row, fmt.H_ACCEPTED])

    def blocks(self, row: int) -> list[int]:
        """The row's block list, staged appends included."""
        self._settle()
        return self.views.row_blocks[row, : int(self._heads[row, fmt.H_BLOCKS])].tolist()

    def ids(self, row: int) -> np.ndarray:
        """The row's ids, u32, staged appends included; a copy."""
        self._settle()
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
        self._settle()
        row = self._free.popleft()
        slot = int(self._heads[row, fmt.H_FLAGS]) & fmt.META_SLOT ^ fmt.META_SLOT  # the other one: a reader may still be in the last
        head = [0] * fmt.HEAD_WORDS
        head[fmt.H_FLAGS] = fmt.OPEN | slot
        head[fmt.H_BIRTH] = head[fmt.H_GENERATION] = self._raise_row(row)
        head[fmt.H_META_HASH] = self._write_meta(row, slot, words)
        self._names[sequence] = row
        self._metas[row] = meta
        self._stage(row, head)
        return row

    def _stage(self, row: int, head) -> None:
        self._set(row, head)
        self._staged[row] = self._any_staged = True

    def commit(self, row: int, length: int, ids=(), blocks=_NO_BLOCKS, sampler: bytes | None = None) -> None:
        """Stage: `ids` and `blocks` are appended, and `length` positions are accepted once the present step is complete. Raises ValueError."""
        self._settle()
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
            head[fmt.H_STEP] = self._latest = self.step
        head[fmt.H_ACCEPTED] = length
        self._stage(row, head)

    def commit_batch(self, rows: np.ndarray, lengths: np.ndarray, ids: np.ndarray | None = None, blocks: dict | None = None) -> None:
        """Stage many decoding rows at once: int [n] distinct rows, int [n] lengths, and one new id per row (int [n]) or none.

        `blocks`: {index in the batch: appended block ids}. Raises ValueError, and stages nothing then.
        """
        rows = np.asarray(rows, np.intp)
        lengths = np.asarray(lengths, np.int64)
        if len(lengths) != len(rows) or (ids is not None and len(ids) != len(rows)):
            raise ValueError(f"a batch needs columns of equal length: {len(rows)} rows, {len(lengths)} lengths")
        if not len(rows):
            return
        key = rows.tobytes()
        if ids is not None and not self._any_staged and self._latest < self.step and self._written[0] >= self._latest:
            if self._batch is not None and self._batch.key != key:
                self._settle()
            if self._batch is None and key == self._checked:  # the second time: it pays
                self._batch = DecodeBatch(self, rows, key)
            if self._batch is not None and self._batch.stage(self.step, lengths, as_ids(ids), blocks):
                self._latest, self._any_staged = self.step, True
                return
        self._settle()
        if key != self._checked:
            self._check_rows(rows)
            self._checked = key
        heads = self._heads.take(rows, 0)
        signed = heads.view(np.int64)
        known = signed[:, fmt.H_IDS]
        new = None if ids is None else as_ids(ids)
        slots = self._slots.take(rows)
        if blocks:
            self._count_blocks(blocks, heads, slots)
        bound = np.minimum(known if new is None else known + 1, slots)
        bad = lengths > bound
        bad |= lengths < signed[:, fmt.H_ACCEPTED]
        if bad.any():
            self._explain(rows, heads, lengths, known + (new is not None), slots)
        if new is not None:
            try:
                self.views.ids[rows, known] = new
            except IndexError:  # nothing is stored then
                self._explain(rows, heads, lengths, known + 1, slots)
                raise
            multipliers = self.views.id_multipliers.take(known)
            new *= multipliers
            new += multipliers  # (id + 1) * multiplier
            heads[:, fmt.H_IDS_HASH] += new
            signed[:, fmt.H_IDS] += 1
        if blocks:
            self._list_blocks(rows, blocks, heads)
            self._slots[rows] = slots
        self._shift(heads)
        signed[:, fmt.H_ACCEPTED] = lengths
        self._heads[rows] = heads
        self._any_staged = True
        self._staged[rows] = True

    def _settle(self) -> None:
        """From here on the private heads alone are what next versions are made from."""
        batch, self._batch = self._batch, None
        if batch is not None:
            batch.write_back()
            if batch.staged:
                self._staged[batch.rows] = True

    def _count_blocks(self, blocks: dict, heads: np.ndarray, slots: np.ndarray) -> None:
        """Add what a batch appends to `slots` [n]. Raises ValueError."""
        for index, appended in blocks.items():
            for block in appended:
                if not 0 <= block < self.geometry.blocks:
                    raise ValueError(f"block {block} is not one of the pool's {self.geometry.blocks}")
            if int(heads[index, fmt.H_BLOCKS]) + len(appended) > self.geometry.blocks_per_row:
                raise ValueError(f"over {self.geometry.blocks_per_row} blocks in one row. Try: attach with positions_max= as long as the longest sequence")
            if slots[index] >= 0:
                slots[index] += len(appended) * self.geometry.block_tokens

    def _list_blocks(self, rows: np.ndarray, blocks: dict, heads: np.ndarray) -> None:
        """Append a batch's few blocks one by one: cheaper than arrays of four."""
        generations, row_blocks, row_block_generations, references = self._block_words
        multiplier = self._block_multipliers
        for index, appended in blocks.items():
            row, listed, total = int(rows[index]), int(heads[index, fmt.H_BLOCKS]), int(heads[index, fmt.H_BLOCKS_HASH])
            for block in map(int, appended):
                generation = generations[block]
                row_blocks[row, listed] = block
                row_block_generations[row, listed] = generation
                references[block] += 1
                by_block, by_generation = multiplier(listed)
                total += (block + 1) * by_block + (generation + 1) * by_generation
                listed += 1
            heads[index, fmt.H_BLOCKS], heads[index, fmt.H_BLOCKS_HASH] = listed, total & fmt.MASK

    def _block_multipliers(self, place: int) -> tuple[int, int]:
        found = self._multipliers.get(place)
        if found is None:
            first = fmt.BLOCKS_SALT + 2 * place
            found = self._multipliers[place] = int(fmt.multiplier(first)), int(fmt.multiplier(first + 1))
        return found

    def _check_rows(self, rows: np.ndarray) -> None:
        if rows.min() < 0 or rows.max() >= len(self._slots) or len(np.unique(rows)) != len(rows):
            raise ValueError(f"a batch needs distinct rows within 0..{len(self._slots) - 1}. Try: the handles that commit returned")

    def _explain(self, rows, heads, lengths, total, slots) -> None:
        """Raises ValueError for the first row of a batch that can't be."""
        columns = (column.tolist() for column in (rows, heads, lengths, total, slots))
        for row, head, length, ids, room in zip(*columns, strict=True):
            if not head[fmt.H_FLAGS] & fmt.OPEN:
                raise ValueError(f"row {row} holds no sequence: released?")
            self._check(row, head, length, ids, room // self.geometry.block_tokens)

    def _shift(self, heads: np.ndarray) -> None:
        """What was accepted before this step becomes `prior` (format.rows.shifted)."""
        written, steps, accepted = self._written[0], heads[:, fmt.H_STEP], heads[:, fmt.H_ACCEPTED]
        if self._latest == self.step and (again := steps == self.step).any():
            rows = np.flatnonzero(~again)  # a second commit of one step shifts nothing
            if len(rows):
                earlier = heads[rows]
                self._shift(earlier)
                heads[rows] = earlier
            return
        if written >= self._latest:
            heads[:, fmt.H_BASE] = accepted
        else:
            older = np.where(U64(written) >= heads[:, fmt.H_PRIOR_STEP], heads[:, fmt.H_PRIOR], heads[:, fmt.H_BASE])
            heads[:, fmt.H_BASE] = np.where(U64(written) >= steps, accepted, older)
        heads[:, fmt.H_PRIOR] = accepted
        heads[:, fmt.H_PRIOR_STEP] = steps
        heads[:, fmt.H_STEP] = self._latest = self.step

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
        if not self._any_staged:
            return 0
        self._any_staged = False
        if self._batch is not None and self._batch.staged:
            self._batch.publish()
            return len(self._batch.rows)
        rows = np.flatnonzero(self._staged)
        self._publish(rows, self._heads.take(rows, 0))
        self._staged[rows] = False
        return len(rows)

    def _publish(self, rows: np.ndarray, heads: np.ndarray) -> None:
        versions = self._versions.take(rows)
        versions += 1
        heads[:, fmt.H_VERSION] = versions
        sums = memory.hot_sums(heads)
        sums += self._cold_sums.take(rows)
        heads[:, fmt.H_SUM] = sums
        self.views.heads[rows, versions & 1] = heads
        memory.order()  # what a selector chooses is there before it; readers check all the same
        self.views.selectors[rows] = versions
        self._versions[rows] = versions

    def _set(self, row: int, head) -> None:
        """A row's next head, by other means than a batch: also what is derived from it."""
        self._heads[row] = head
        head = self._heads[row]
        self._cold_sums[row] = memory.cold_sums(head[None])[0]
        self._slots[row] = int(head[fmt.H_BLOCKS]) * self.geometry.block_tokens if int(head[fmt.H_FLAGS]) & fmt.OPEN else -1

    def _publish_one(self, row: int) -> None:
        rows = np.array([row])
        self._publish(rows, self._heads[rows])
        memory.order()  # the raised generation is seen before whatever the caller does next

    def roll_back(self) -> None:
        """Forget all staged commits: the step failed, or its epoch is over. Blocks that only they referenced get new generations."""
        self._settle()
        for row in np.flatnonzero(self._staged).tolist():
            self.unstage(row)
        self._any_staged = False

    def unstage(self, row: int) -> None:
        """Forget the staged commits of one row; a sequence opened in this step is not known any more."""
        self._settle()
        staged = self._heads[row].copy()
        seen = self.views.heads[row, int(self._versions[row]) & 1].copy()
        same = bool(seen[fmt.H_FLAGS] & U64(fmt.OPEN)) and seen[fmt.H_BIRTH] == staged[fmt.H_BIRTH]
        kept = int(seen[fmt.H_BLOCKS]) if same else 0
        dropped = self.views.row_blocks[row, kept : int(staged[fmt.H_BLOCKS])].copy()
        if same:
            self._set(row, seen)
        else:
            closed = np.zeros(fmt.HEAD_WORDS, U64)
            closed[fmt.H_FLAGS] = staged[fmt.H_FLAGS] & U64(fmt.META_SLOT)
            self._set(row, closed)
            self._forget(row)
        self._staged[row] = False
        self._drop_blocks(dropped)

    # ---- at once ----------------------------------------------------------------------------------------------------------------

    def truncate(self, row: int, position: int, lineage: Lineage | None = None, keep_blocks: int = 0, keep_ids: int = 0) -> None:
        """KV and ids beyond `position` are void, at once. Keeps the blocks that hold the positions left, or `keep_blocks` if that is more. Raises ValueError.

        `lineage`: the sequence's after a plan; unchanged without. `keep_ids`: so many ids stay although they are beyond: a plan takes KV back, never the ids
        that it knows: they have been handed out, and until their emitter says them again this row may be the only one that knows them.
        """
        self._settle()
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
        for word in (fmt.H_ACCEPTED, fmt.H_PRIOR, fmt.H_BASE):
            head[word] = min(head[word], position)
        head[fmt.H_IDS] = min(head[fmt.H_IDS], max(position, keep_ids))
        known = head[fmt.H_IDS]
        head[fmt.H_IDS_HASH] = memory.ids_sum(self.views.ids[row, :known], self.views.id_multipliers[:known])
        head[fmt.H_BLOCKS_HASH] = memory.blocks_sum(self.views.row_blocks[row, :kept], self.views.row_block_generations[row, :kept])
        self._set(row, head)
        self._publish_one(row)

    def release(self, row: int) -> None:
        """The sequence is over, at once; blocks that no row references any more get new generations. Raises ValueError for a row that holds none."""
        self._settle()
        head = self._heads[row].tolist()
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released twice?")
        dropped = self.views.row_blocks[row, : head[fmt.H_BLOCKS]].copy()
        closed = [0] * fmt.HEAD_WORDS
        closed[fmt.H_FLAGS] = head[fmt.H_FLAGS] & fmt.META_SLOT
        closed[fmt.H_BIRTH], closed[fmt.H_PREVIOUS], closed[fmt.H_GENERATION] = head[fmt.H_BIRTH], head[fmt.H_GENERATION], self._raise_row(row)
        self._drop_blocks(dropped)
        self._set(row, closed)
        self._publish_one(row)
        self._staged[row] = False
        self._forget(row)

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
    """Token ids as a new u64 array. Raises ValueError outside 0 .. 2**32 - 1."""
    array = np.asarray(ids)
    if not array.size:
        return np.zeros(0, U64)
    wide = array.astype(U64)  # a negative one becomes a huge one
    if array.dtype.kind not in "iu" or int(np.maximum.reduce(wide, axis=None)) >> 32:
        raise ValueError(f"token ids must be integers within 0..{2**32 - 1}, got {array.dtype}. Try: plain ids without padding marks")
    return wide
