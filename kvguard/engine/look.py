"""The reader's side of the commit table: what changed since the last look, in the columns of core.events.Looked.

Knows: the table's versions, what it has already reported. Must not know: streams, epochs beyond the word, who holds what.

Invariants
- Only complete versions are reported; a row that is torn or reordered stays as it was and is looked at again.
- Positions are reported once their step's completion word has been seen: committed never exceeds the facts.
- What the engine writes is checked against the table's bounds before it is used; nothing that an engine can write makes a look raise.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import numpy as np

from kvguard.engine import memory
from kvguard.engine.memory import U64
from kvguard.engine.tape_look import TapeReader
from kvguard.format import rows as fmt
from kvguard.format.tape import read_row
from kvguard.types import Lineage

Ints = tuple[int, ...]


class Opened(NamedTuple):
    """As core.events.Opened."""

    row: int
    sequence: str
    generation: int
    lineage: Lineage
    request: bytes


class Cut(NamedTuple):
    """As core.events.Cut."""

    row: int
    kept: int
    generation: int
    lineage: Lineage
    blocks: int


class Grown(NamedTuple):
    """As core.events.Grown."""

    row: int
    first: int
    blocks: Ints
    generations: Ints


class Look(NamedTuple):
    """As core.events.Looked without the stream. Applied in the order released, cut, opened, grown, then the columns by row."""

    released: Ints = ()
    cut: tuple[Cut, ...] = ()
    opened: tuple[Opened, ...] = ()
    grown: tuple[Grown, ...] = ()
    rows: Ints = ()
    committed: Ints = ()
    ids: Ints = ()

    @property
    def is_empty(self) -> bool:
        return not (self.released or self.cut or self.opened or self.grown or self.rows)


class Steps(NamedTuple):
    """The engine's step words, as core.events.StepsSeen."""

    entered: int
    left: int
    size: int
    pulse: int
    suspended: bool


class TableReader:
    """A table mapped for reading; owned by one thread. `torn`: rows that were not complete at a look, counted."""

    def __init__(self, fd: int) -> None:
        """Maps the table and closes `fd`, also on refusal. Raises Refused for a descriptor that is no sealed table."""
        try:
            self.views = memory.Views(fd, writable=False)
        finally:
            os.close(fd)
        self.geometry = self.views.geometry
        rows = self.geometry.rows
        self._versions = np.zeros(rows, U64)  # last selector taken in
        self._heads = np.zeros((rows, fmt.HEAD_WORDS), U64)  # last complete heads; zero where no sequence is known
        self._committed = np.zeros(rows, U64)
        self._metas: dict[int, fmt.Meta] = {}
        self._bytes = self.views.body
        self.torn = 0
        self._tape = TapeReader(self.views, self._heads)

    # ---- looking ----------------------------------------------------------------------------------------------------------------

    def look(self) -> Look:
        """What changed since the last look."""
        views = self.views
        written = int(views.words[fmt.WRITTEN_AT // 8])
        tape = self._tape.word()
        memory.order()
        selectors = views.selectors.copy()
        memory.order()  # heads are read after the selectors that name them
        changed = np.flatnonzero(selectors != self._versions)
        if not len(changed):
            return self._look(written, tape, changed, [], [], [], [])
        versions = selectors[changed]
        heads = views.heads[changed, (versions & U64(1)).astype(np.intp)]
        whole = self._whole(heads, versions)
        known = self._heads[changed]
        same = whole & (heads[:, fmt.H_GENERATION] == known[:, fmt.H_GENERATION]) & ((heads[:, fmt.H_FLAGS] & known[:, fmt.H_FLAGS] & U64(fmt.OPEN)) != 0)
        same &= (heads[:, fmt.H_IDS] >= known[:, fmt.H_IDS]) & (heads[:, fmt.H_BLOCKS] >= known[:, fmt.H_BLOCKS])
        grown: list[Grown] = []
        taken = self._take_grown(changed, heads, known, same, grown)
        self.torn += int((~whole).sum() + (same & ~taken).sum())
        accepted = changed[taken]
        self._heads[accepted] = heads[taken]
        self._versions[accepted] = versions[taken]
        released: list[int] = []
        cut: list[Cut] = []
        opened: list[Opened] = []
        touched = [accepted]
        for n in np.flatnonzero(whole & ~same).tolist():
            if self._take_other(int(changed[n]), int(versions[n]), released, cut, opened, grown):
                touched.append(changed[n : n + 1])
        return self._look(written, tape, np.concatenate(touched), released, cut, opened, grown)

    def _look(self, written: int, tape: tuple[int, int], touched: np.ndarray, released: list, cut: list, opened: list, grown: list) -> Look:
        """The report, after the tape has added to it."""
        added: list[tuple[int, int, int, int]] = []
        moved = np.concatenate((touched, np.array(released, np.int64))) if released else touched
        got_on, torn = self._tape.follow(*tape, moved, added)
        self.torn += torn
        grown += [Grown(row, first, (block,), (generation,)) for row, first, block, generation in added]
        columns = self._columns(written, np.concatenate((touched, got_on)) if len(got_on) else touched)
        return Look(tuple(released), tuple(cut), tuple(opened), tuple(grown), **columns)

    def _whole(self, heads: np.ndarray, versions: np.ndarray) -> np.ndarray:
        """Which heads are complete, current and within bounds, bool [n]."""
        geometry = self.geometry
        whole = (heads[:, fmt.H_VERSION] == versions) & (heads[:, fmt.H_SUM] == memory.head_sums(heads))
        whole &= (heads[:, fmt.H_IDS] <= geometry.ids_per_row) & (heads[:, fmt.H_BLOCKS] <= geometry.blocks_per_row)
        slots = np.minimum(heads[:, fmt.H_BLOCKS], U64(geometry.blocks_per_row)) * U64(geometry.block_tokens)
        whole &= heads[:, fmt.H_ACCEPTED] <= np.minimum(heads[:, fmt.H_IDS], slots)
        return whole & (heads[:, fmt.H_PRIOR] <= heads[:, fmt.H_ACCEPTED]) & (heads[:, fmt.H_BASE] <= heads[:, fmt.H_PRIOR])

    def _take_grown(self, rows, heads, known, same, grown: list[Grown]) -> np.ndarray:
        """Of the rows that only grew: which have their new ids and blocks whole, bool [n]; Grown is filled for those."""
        picked = np.flatnonzero(same)
        taken = np.zeros(len(rows), bool)
        if not len(picked):
            return taken
        first, end = known[picked, fmt.H_IDS].astype(np.int64), heads[picked, fmt.H_IDS].astype(np.int64)
        counts = end - first
        offsets = np.concatenate(([0], np.cumsum(counts)))
        places = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - first, counts)
        ids = self.views.ids[np.repeat(rows[picked], counts), places].astype(U64)
        sums = np.concatenate((np.zeros(1, U64), np.cumsum((ids + U64(1)) * self.views.id_multipliers[places], dtype=U64)))
        added = sums[offsets[1:]] - sums[offsets[:-1]]
        good = known[picked, fmt.H_IDS_HASH] + added == heads[picked, fmt.H_IDS_HASH]
        good &= known[picked, fmt.H_META_HASH] == heads[picked, fmt.H_META_HASH]
        taken[picked[good]] = True
        more = taken & (heads[:, fmt.H_BLOCKS] > known[:, fmt.H_BLOCKS])
        taken &= more | (heads[:, fmt.H_BLOCKS_HASH] == known[:, fmt.H_BLOCKS_HASH])
        for n in np.flatnonzero(more).tolist():
            found = self._blocks_from(int(rows[n]), int(known[n, fmt.H_BLOCKS]), int(heads[n, fmt.H_BLOCKS]))
            blocks, generations, added_blocks = found
            if (int(known[n, fmt.H_BLOCKS_HASH]) + added_blocks) & fmt.MASK != int(heads[n, fmt.H_BLOCKS_HASH]) or not self._are_blocks(blocks):
                taken[n] = False
            else:
                grown.append(Grown(int(rows[n]), int(known[n, fmt.H_BLOCKS]), tuple(blocks.tolist()), tuple(generations.tolist())))
        return taken

    def _blocks_from(self, row: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray, int]:
        blocks = self.views.row_blocks[row, first:end].copy()
        generations = self.views.row_block_generations[row, first:end].copy()
        return blocks, generations, memory.blocks_sum(blocks, generations, first)

    def _are_blocks(self, blocks: np.ndarray) -> bool:
        return not len(blocks) or int(blocks.max()) < self.geometry.blocks

    def _take_other(self, row: int, version: int, released: list, cut: list, opened: list, grown: list) -> bool:
        """A row that was opened, cut or closed; False where it is not yet whole."""
        found = fmt.read_version(self._bytes, self.geometry, row, version)
        if found is None:
            self.torn += 1
            return False
        head, known = found.head, self._heads[row].tolist()
        was_open = bool(known[fmt.H_FLAGS] & fmt.OPEN)
        first = 0
        if not head.is_open:
            if was_open:
                released.append(row)
            self._metas.pop(row, None)
        elif was_open and head.birth == known[fmt.H_BIRTH] and head.previous == known[fmt.H_GENERATION]:
            first = min(known[fmt.H_BLOCKS], head.kept_blocks)
            cut.append(Cut(row, head.kept, head.generation, found.meta.lineage, first))
        else:
            if was_open:
                released.append(row)
            opened.append(Opened(row, found.meta.name, head.generation, found.meta.lineage, found.meta.request))
        if head.is_open:
            self._metas[row] = found.meta
            if len(found.blocks) > first:
                grown.append(Grown(row, first, found.blocks[first:], found.block_generations[first:]))
        self._heads[row] = fmt.head_words(head) if head.is_open else 0
        self._committed[row] = 0
        self._versions[row] = version
        return head.is_open

    def _columns(self, written: int, touched: np.ndarray) -> dict[str, Ints]:
        """Positions and ids of the rows that changed or whose step is now complete."""
        heads = self._heads
        step = U64(written)
        earlier = np.where(step >= heads[:, fmt.H_PRIOR_STEP], heads[:, fmt.H_PRIOR], heads[:, fmt.H_BASE])
        committed = np.where(step >= heads[:, fmt.H_STEP], heads[:, fmt.H_ACCEPTED], earlier)
        committed = np.maximum(committed, self._committed)  # a fact stays one: the writer may have seen an earlier completion word than an earlier look
        report = committed != self._committed
        report[touched] = True
        rows = np.flatnonzero(report & ((heads[:, fmt.H_FLAGS] & U64(fmt.OPEN)) != 0))
        self._committed = committed
        return {"rows": tuple(rows.tolist()), "committed": tuple(committed[rows].tolist()), "ids": tuple(heads[rows, fmt.H_IDS].tolist())}

    # ---- reading ----------------------------------------------------------------------------------------------------------------

    def read_ids(self, row: int, start: int, end: int) -> bytes:
        """Ids [start, end) as u32 LE, as they are now: read the row's generation before and after."""
        first, taped = self._tape.ids(row, start, end)
        return self.views.ids[row, start:first].astype("<u4").tobytes() + taped.astype("<u4").tobytes()

    def read_row(self, row: int) -> fmt.Row | None:
        """The row's present content, whole, or None: not yet."""
        return read_row(self._bytes, self.geometry, row)

    def sampler(self, row: int) -> bytes:
        """The sampler state of the version last looked at."""
        head = self._heads[row]
        return head[fmt.H_SAMPLER : fmt.H_SAMPLER + 4].tobytes()[: min(int(head[fmt.H_FLAGS]) >> 8, 32)]

    def request(self, row: int) -> bytes:
        """The request parameters of the sequence last seen in this row; empty where none is known."""
        meta = self._metas.get(row)
        return meta.request if meta else b""

    def sequence(self, row: int) -> fmt.Meta | None:
        """Name, lineage and request of the sequence last seen in this row."""
        return self._metas.get(row)

    def row_generation(self, row: int) -> int:
        """The row's generation now: read before and after whatever is read of the row."""
        return int(self.views.row_generations[row])

    def generations(self, rows, blocks) -> tuple[np.ndarray, np.ndarray]:
        """The generations of rows and of blocks as they are now, u64 arrays; call before and after a capture. Indices out of bounds are the caller's bug."""
        memory.order()  # nothing that was captured before this call is read after it
        return self.views.row_generations[np.asarray(rows, np.intp)], self.views.block_generations[np.asarray(blocks, np.intp)]

    def steps(self) -> Steps:
        """The step words as they are now. `left` is read first, so that a step never reads as left before it was entered."""
        words = self.views.words
        left = int(words[fmt.LEFT_AT // 8])
        entered, size, pulse = (int(words[offset // 8]) for offset in (fmt.ENTERED_AT, fmt.SIZE_AT, fmt.PULSE_AT))
        return Steps(entered, left, size, pulse, bool(words[fmt.SUSPENDED_AT // 8]))

    @property
    def is_untouched(self) -> bool:
        """Whether no sequence was ever here: the word that the writer's own answer is of (table.TableWriter.is_untouched)."""
        return not self.views.words[fmt.COUNTER_AT // 8]

    def written_step(self) -> int:
        return int(self.views.words[fmt.WRITTEN_AT // 8])

    def epoch(self) -> int:
        return int(self.views.words[fmt.EPOCH_AT // 8])

    def set_epoch(self, counter: int) -> None:
        """The engine's next step entry or exit sees it. Epochs only rise; a lower one changes nothing."""
        if counter > self.epoch():
            self.views.words[fmt.EPOCH_AT // 8] = counter
