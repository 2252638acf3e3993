"""The writer's tape: rows that decode together, step after step, each step as one record in one place.

Knows: the plain case, in which the same rows go on by one position and one id each. Must not know: any other case: then `stage`
says no, changes nothing, and the table ends the tape (`settle`) and takes the general way.

Between two steps of an engine the caches are cold, and every array operation is a walk through code that has to be fetched: so a usual step has none.
It is bytes: what must be equal is compared with bytes made in advance, and the record is checked and summed as one long number (format/tape.py).
Invariants: while a tape exists its rows' private heads in the table are those from before its first record; a staged record is in private memory alone.
"""

from __future__ import annotations

import numpy as np

from kvguard.engine import memory
from kvguard.engine.memory import U64
from kvguard.format import rows as fmt
from kvguard.format import tape as form

_PACK, _ENTRY, _NUMBER, _PRIME = form.BODY.pack, form.ENTRY.pack, int.from_bytes, form.PRIME


class Tape:
    """`rows`: int64 [n]. `columns`: their places by row. `staged`: the record between stage and publish. `count`: of records published."""

    def __init__(self, writer, rows: np.ndarray) -> None:
        """Begins a tape: publishes the rows, which have nothing staged, with their places on it."""
        views, geometry, count = writer.views, writer.geometry, len(rows)
        self._writer, self.rows, self.count = writer, rows.copy(), 0
        self.staged: tuple[int, bytes, int, list] | None = None
        self.columns = dict(zip(rows.tolist(), range(count), strict=True))
        self._number = form.split_word(writer._tape_word[0])[0] + 1
        heads = writer._heads.take(rows, 0)
        signed = heads.view(np.int64)
        accepted = signed[:, fmt.H_ACCEPTED].copy()
        self._room = min(geometry.tape_steps, geometry.ids_per_row - int(signed[:, fmt.H_IDS].max()))
        self._last = self._first = int(signed[:, fmt.H_STEP].max())  # records' steps are later than any before
        self._blocks = signed[:, fmt.H_BLOCKS].tolist()
        self._due = (writer._slots.take(rows) - accepted).tolist()  # at which record a row needs another block
        self._owed: list[list[int]] = [[] for _ in range(self._room)]  # by record: rows whose slots end there, or ended once
        for column, due in enumerate(self._due):
            if due < self._room:
                self._owed[due].append(column)
        self._key, self._size = self.rows.tobytes(), 8 * count
        self._lengths = [(accepted + place).tobytes() for place in range(1, self._room + 1)]  # of each record
        self._wide = form.too_wide(count)
        self._records: list[tuple[int, bytes, int, list]] = []  # published: step, body, sum, new blocks
        self._generations, self._references = writer.block_generations, writer.block_references
        self._stride = 8 * fmt.slot_words(geometry.rows)
        self._bytes, self._sums, self._word = views.tape_bytes, views.tape_words, writer._tape_word
        heads[:, fmt.H_TAPE], heads[:, fmt.H_COLUMN] = self._number, np.arange(count)
        writer._publish(rows, heads)
        memory.order()  # no reader finds this tape's number and rows that are still on the last
        self._word[0] = form.tape_word(self._number, 0)

    def stage(self, step: int, rows, lengths, ids, blocks) -> bool:
        """int64 [n] rows, lengths and ids; anything else is not plain. False: not plain, or the tape is full; nothing has changed."""
        place = self.count
        if self.staged is not None or place >= self._room or step <= self._last:
            return False
        try:
            if rows.tobytes() != self._key or lengths.tobytes() != self._lengths[place]:
                return False
            data = ids.tobytes()
        except AttributeError:  # no arrays
            return False
        size = self._size
        if len(data) != size:
            return False
        new: list = []
        if (blocks or self._owed[place]) and not self._list(blocks or {}, place, new):
            self._room = 0  # the tape is over
            return False
        body = _PACK(self._number, place, step, size >> 3, len(new), 0, 0) + data
        for column, block, generation in new:
            body += _ENTRY(block, column, generation)
        number = _NUMBER(body, "little")
        if number & self._wide:
            self._room = 0
            return False
        references = self._references
        for _, block, _ in new:
            references[block] += 1
        self.staged = step, body, number % _PRIME, new
        self._last = step
        return True

    def _list(self, blocks: dict, place: int, new: list) -> bool:
        """Fill `new` with what is appended; False where that can't be, or where a row has no slot for its position."""
        geometry, generations, due, counts, owed = self._writer.geometry, self._generations, self._due, self._blocks, self._owed
        limit, last = geometry.blocks, self._room
        for column, appended in blocks.items():
            if not 0 <= column < len(due) or counts[column] + len(appended) > geometry.blocks_per_row:
                return False
            for block in appended:
                if not 0 <= block < limit:
                    return False
                new.append((column, block, generations[block]))
            counts[column] += len(appended)
            due[column] = at = due[column] + len(appended) * geometry.block_tokens
            if at < last:
                owed[at].append(column)
        if len(new) > geometry.rows:
            return False
        for column in owed[place]:
            if due[column] <= place:
                return False
        return True

    def publish(self) -> None:
        """Make the staged record visible."""
        place, staged = self.count, self.staged
        body = staged[1]
        at = place * self._stride
        self._bytes[at + 8 : at + 8 + len(body)] = body
        self._sums[at >> 3] = staged[2]
        self.count = place + 1
        self._word[0] = self._number << 16 | place + 1  # readers check the record whatever they see first
        self._records.append(staged)
        self.staged = None

    def drop(self) -> None:
        """Forget the staged record. Where it listed blocks the tape is over."""
        new, self.staged = self.staged[3], None
        self._last = self._records[-1][0] if self._records else self._first
        if new:
            self._writer._settle()
            self._writer.generations.drop(np.array([block for _, block, _ in new], np.int64))

    def settle(self) -> None:
        """The end: the rows' own heads say what the tape said. What was staged is then staged in the private heads."""
        writer, rows = self._writer, self.rows
        heads = writer._heads.take(rows, 0)
        self._fold(heads, self._records)
        writer._keep(rows, heads)
        writer._publish(rows, heads.copy())
        memory.order()
        if self.staged is not None:
            self._fold(heads, [self.staged])
            writer._keep(rows, heads)
            writer._staged[rows] = writer._any_staged = True

    def _fold(self, heads: np.ndarray, records: list) -> None:
        """Make of heads u64 [n, HEAD_WORDS] what they are after records (format.tape.extended); their ids and blocks go to the rows' own places."""
        if not records:
            return
        views, signed, count = self._writer.views, heads.view(np.int64), len(records)
        steps = [record[0] for record in records]
        said = b"".join([record[1][form.BODY.size : form.BODY.size + self._size] for record in records])
        ids = np.frombuffer(said, U64).reshape(count, -1)
        places = signed[:, fmt.H_IDS] + np.arange(count)[:, None]
        views.ids[self.rows, places] = ids
        heads[:, fmt.H_IDS_HASH] += ((ids + U64(1)) * views.id_multipliers[places]).sum(axis=0, dtype=U64)
        signed[:, fmt.H_IDS] += count
        listed = [new for record in records for new in record[3]]
        for column, block, generation in listed:
            self._writer.list_block(int(self.rows[column]), heads[column], int(block), generation)
        written = self._writer._written[0]
        complete = sum(1 for step in steps[:-1] if step <= written)
        if complete:
            signed[:, fmt.H_BASE] = signed[:, fmt.H_ACCEPTED] + complete
        else:
            earlier = np.where(U64(written) >= heads[:, fmt.H_PRIOR_STEP], heads[:, fmt.H_PRIOR], heads[:, fmt.H_BASE])
            heads[:, fmt.H_BASE] = np.where(U64(written) >= heads[:, fmt.H_STEP], heads[:, fmt.H_ACCEPTED], earlier)
        heads[:, fmt.H_PRIOR_STEP] = steps[-2] if count > 1 else heads[:, fmt.H_STEP]
        heads[:, fmt.H_STEP] = steps[-1]
        signed[:, fmt.H_ACCEPTED] += count
        heads[:, fmt.H_PRIOR] = heads[:, fmt.H_ACCEPTED] - U64(1)
