"""The writer's tape: rows that decode together, step after step, each step as one record in one place.

Knows: the plain case, in which the same rows go on by one position and one id each. Must not know: any other case: then `stage`
says no, changes nothing, and the table ends the tape (`settle`) and takes the general way.

Between two steps of an engine the caches are cold: every array operation, every other C function and every other object has to be fetched, at half a
microsecond each (tools/bench_commit.py). So a usual step has few of them: what must be equal is compared with bytes made in advance, words are stored one by
one into memory that is there, and what nobody needs before the rows' next versions (references, heads) is done when the tape ends.
Invariants: while a tape exists its rows' private heads in the table are those from before its first record, and its blocks aren't yet counted as referenced;
a staged record is in private memory alone.
"""

from __future__ import annotations

import numpy as np

from kvguard.engine import memory
from kvguard.engine.memory import U64
from kvguard.engine.versions import Versions
from kvguard.format import rows as fmt
from kvguard.format import tape as form

_sum, _join = form.record_sum, b"".join
_PLACE, _STEP, _NEW, _WORDS, _TAPE = form.B_PLACE, form.B_STEP, form.B_NEW, form.BODY_WORDS, fmt.TAPE_AT // 8


class Tape:
    """`rows`: int64 [n]. `columns`: their places by row. `staged`: the record between stage and publish, all but its sum. `count`: of records published."""

    __slots__ = (
        "count", "staged", "_room", "_last", "_key", "_lengths", "_size", "_zeros", "_owing", "_words", "_halves", "_said", "_at", "_bytes", "_sums", "_header",
        "_named", "_stride", "_records", "_due", "_most", "_least", "_generations", "_block_tokens", "rows", "columns", "_first", "_versions",
    )  # fmt: skip

    def __init__(self, versions: Versions, rows: np.ndarray) -> None:
        """Begins a tape: publishes the rows, which have nothing staged, with their places on it."""
        views, geometry, count = versions.views, versions.geometry, len(rows)
        self._versions, self.rows, self.count = versions, rows.copy(), 0
        self.staged: bytes | None = None
        self.columns = dict(zip(rows.tolist(), range(count), strict=True))
        number = form.split_word(versions.header[_TAPE])[0] + 1
        heads = versions.heads.take(rows, 0)
        signed = heads.view(np.int64)
        accepted = signed[:, fmt.H_ACCEPTED].copy()
        self._room = room = min(geometry.tape_steps, geometry.ids_per_row - int(signed[:, fmt.H_IDS].max()))
        self._last = self._first = int(signed[:, fmt.H_STEP].max())  # records' steps are later than any before
        self._due = (versions.slots.take(rows) - accepted).tolist()  # at which record a row needs another block
        self._most = (geometry.blocks_per_row * geometry.block_tokens - accepted).tolist()  # and at which it can't have one any more
        self._least = min(self._most)
        self._owing = [0] * (room + 1)  # by record: how many rows need a block there
        for due in self._due:
            self._owing[min(due, room)] += 1
        self._key, self._size, self._zeros = self.rows.tobytes(), 8 * count, bytes(count)
        self._lengths = [lengths.tobytes() for lengths in accepted + np.arange(1, room + 1)[:, None]]  # of each record
        self._records: list[bytes] = []  # those published, without their sums
        self._generations, self._block_tokens = versions.block_generations, geometry.block_tokens
        self._said = memoryview(bytearray(form.BODY.size + 16 * geometry.rows))  # what the next record says before its ids
        self._words, self._halves = self._said.cast("Q"), self._said.cast("I")
        self._words[form.B_NUMBER], self._words[form.B_ROWS] = number, count
        self._stride, self._at, self._named = 8 * fmt.slot_words(geometry.rows), 0, form.tape_word(number, 0)
        self._bytes, self._sums, self._header = views.tape_bytes, views.tape_words, versions.header
        memory.populate(self._bytes, self._stride, room, form.HEAD_BYTES + 8 * count)
        heads[:, fmt.H_TAPE], heads[:, fmt.H_COLUMN] = number, np.arange(count)
        versions.publish(rows, heads)
        memory.order()  # no reader finds this tape's number and rows that are still on the last
        self._header[_TAPE] = self._named

    def stage(self, step: int, rows, lengths, ids, blocks) -> bool:
        """int64 [n] rows, lengths and ids; anything else is not plain. False: not plain, or the tape is full; nothing has changed."""
        place = self.count
        if self.staged is not None or place >= self._room or step <= self._last:
            return False
        try:
            if rows.tobytes() != self._key or lengths.tobytes() != self._lengths[place]:
                return False
            said = ids.tobytes()
        except AttributeError:  # no arrays
            return False
        zeros = self._zeros
        if len(said) != self._size or said[4::8] != zeros or said[5::8] != zeros or said[6::8] != zeros or said[7::8] != zeros:
            return False
        end = self._list(blocks) if blocks else _WORDS
        if self._owing[place] or not end:  # a row has no slot for its position
            self._room = 0  # the tape is over
            return False
        words = self._words
        words[_PLACE], words[_STEP], words[_NEW] = place, step, end - _WORDS >> 1
        self.staged = _join((self._said[: end << 3], said))
        self._last = step
        return True

    def _list(self, blocks: dict) -> int:
        """Write what is appended behind the record's words; returns where it ends, 0 where it can't be."""
        words, halves, due, owing, generations, tokens = self._words, self._halves, self._due, self._owing, self._generations, self._block_tokens
        room, self._room = self._room, 0  # half done it would be over
        end = _WORDS
        try:
            for column, appended in blocks.items():
                before = at = due[column]
                for block in appended:
                    halves[end << 1] = block
                    halves[end << 1 | 1] = column
                    words[end + 1] = generations[block]
                    end += 2
                    at += tokens
                if at > self._least and at > self._most[column]:
                    return 0
                due[column] = at
                owing[before if before < room else room] -= 1
                owing[at if at < room else room] += 1
        except (IndexError, ValueError):  # a column or block that isn't there, or negative; more than a record takes
            return 0
        self._room = room
        return end

    def publish(self) -> None:
        """Make the staged record visible."""
        at, body = self._at, self.staged
        self._bytes[at + 8 : at + 8 + len(body)] = body
        self._sums[at >> 3] = _sum(body)
        self.count = count = self.count + 1
        self._header[_TAPE] = self._named + count  # readers check the record whatever they see first
        self._at = at + self._stride
        self._records.append(body)
        self.staged = None

    def drop(self) -> np.ndarray:
        """Forget the staged record; returns the blocks that it listed, int64. Where there are any the tape is over."""
        blocks, self.staged = [block for _, block, _ in form.listed_blocks(self.staged)], None
        self._last = form.step_of(self._records[-1]) if self._records else self._first
        if blocks:
            self._room = 0
        return np.array(blocks, np.int64)

    def settle(self) -> bool:
        """The end: the rows' own heads say what the tape said. What was staged is then staged in the private heads; whether there is anything."""
        versions, rows = self._versions, self.rows
        heads = versions.heads.take(rows, 0)
        self._fold(heads, self._records)
        versions.keep(rows, heads)
        versions.publish(rows, heads.copy())
        memory.order()
        if self.staged is None:
            return False
        self._fold(heads, [self.staged])
        versions.keep(rows, heads)
        versions.staged[rows] = True
        return True

    def _fold(self, heads: np.ndarray, records: list[bytes]) -> None:
        """Make of heads u64 [n, HEAD_WORDS] what they are after records (format.tape.extended); their ids and blocks go to the rows' own places."""
        if not records:
            return
        views, signed, count = self._versions.views, heads.view(np.int64), len(records)
        steps = [form.step_of(record) for record in records]
        ids = np.frombuffer(_join([record[-self._size :] for record in records]), U64).reshape(count, -1)
        places = signed[:, fmt.H_IDS] + np.arange(count)[:, None]
        views.ids[self.rows, places] = ids
        heads[:, fmt.H_IDS_HASH] += ((ids + U64(1)) * views.id_multipliers[places]).sum(axis=0, dtype=U64)
        signed[:, fmt.H_IDS] += count
        self._versions.list_blocks(self.rows, heads, _join([record[form.BODY.size : -self._size] for record in records]))
        written = self._versions.header[fmt.WRITTEN_AT // 8]
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
