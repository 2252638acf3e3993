"""Which bytes go next: pieces of blocks for one kv frame, each block's bytes once per session.

Knows: one holder's copies of a ledger's rows, and how far it has been sent each block. Must not know: sessions, links, numbers.
Invariants: a piece never crosses a block; a block that several rows share travels once per (block, generation), later rows refer to it; a block is forgotten
when the last copy that reaches into it goes, because the holder forgets it then too.
"""

from __future__ import annotations

from kvguard.core.ledger import Row
from kvguard.format.messages import PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, StreamShape
from kvguard.limits import PIECES_PER_FRAME_MAX

GENERATION, FILLED, USES = 0, 1, 2


class Copy:
    """What one holder has of one row. `acked <= sent <= row.committed`; `counted`: the blocks of [0, sent)."""

    __slots__ = ("acked", "acked_ids", "caught", "counted", "no", "number", "opened_ns", "retry_ns", "row", "sent", "sent_ids", "shed", "stuck")

    def __init__(self, number: int, row: Row, no: int, now_ns: int) -> None:
        self.number = number
        self.row = row
        self.no = no
        self.sent = 0
        self.sent_ids = 0
        self.acked = 0
        self.acked_ids = 0
        self.counted: list[int] = []
        self.caught = False  # has been wholly acknowledged once: from then on its distance is lag
        self.opened_ns = now_ns
        self.shed = ""  # why the holder won't keep it
        self.retry_ns = 0
        self.stuck = False  # its last capture was stale: only another look can help


class Pieces:
    """Columns of one capture, and by copy where it began and ends. `spoiled`: what it holds must not be sent any more."""

    __slots__ = (
        "blocks", "bytes", "copies", "counts", "done", "ends", "flags", "generations", "id", "nos", "row_generations", "rows", "session", "spoiled", "starts",
        "begins", "at_ns",
    )  # fmt: skip

    def __init__(self, session: int, at_ns: int) -> None:
        self.id = 0
        self.session = session
        self.at_ns = at_ns
        self.rows: list[int] = []
        self.row_generations: list[int] = []
        self.nos: list[int] = []
        self.starts: list[int] = []
        self.counts: list[int] = []
        self.blocks: list[int] = []
        self.generations: list[int] = []
        self.flags: list[int] = []
        self.copies: list[Copy] = []
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.bytes = 0
        self.spoiled = False
        self.done = None


class Fills:
    """Per block: [generation, slots sent, copies that reach into it]."""

    def __init__(self, shape: StreamShape) -> None:
        self.shape = shape
        self.table: dict[int, list[int]] = {}

    def cover(self, copy: Copy, position: int) -> None:
        """The holder already has `copy` up to `position` (a resync)."""
        row, tokens = copy.row, self.shape.block_tokens
        for index in range(-(-position // tokens)):
            entry = self._enter(copy, index, row.blocks[index], row.generations[index])
            entry[FILLED] = max(entry[FILLED], min(tokens, position - index * tokens))

    def _enter(self, copy: Copy, index: int, block: int, generation: int) -> list[int]:
        entry = self.table.get(block)
        if entry is None or entry[GENERATION] != generation:
            entry = self.table[block] = [generation, 0, 0 if index >= len(copy.counted) else 1]
        if index >= len(copy.counted):
            entry[USES] += 1
            copy.counted.append(block)
        return entry

    def fall(self, copy: Copy, position: int) -> bool:
        """Only [0, position) of `copy` counts as sent any more. True where another copy refers to what falls."""
        tokens, table, shared = self.shape.block_tokens, self.table, False
        while len(copy.counted) > -(-position // tokens):
            block = copy.counted.pop()
            entry = table.get(block)
            if entry is None:
                continue
            entry[USES] -= 1
            if entry[USES] <= 0:
                del table[block]
            else:
                shared = True
        slot = position % tokens
        if slot and copy.counted:
            entry = table.get(copy.counted[-1])
            if entry is not None and entry[FILLED] > slot:
                entry[FILLED] = slot
                shared = shared or entry[USES] > 1
        return shared

    def gather(self, copies: list[Copy], pieces: Pieces, budget: int, lone: bool = False) -> list[Copy]:
        """Pieces for as many of `copies`, in order, as `budget` bytes allow; `sent` moves. Returns the copies that have more to send.

        `lone`: nothing is in flight, so one piece goes however wide it is."""
        shape, table = self.shape, self.table
        tokens, width, plain = shape.block_tokens, shape.token_bytes, shape.addressable
        left: list[Copy] = []
        total, room = pieces.bytes, PIECES_PER_FRAME_MAX - len(pieces.nos)
        rows, row_generations, nos, starts = pieces.rows.append, pieces.row_generations.append, pieces.nos.append, pieces.starts.append
        counts, blocks, generations, flags = pieces.counts.append, pieces.blocks.append, pieces.generations.append, pieces.flags.append
        out, begins, ends = pieces.copies.append, pieces.begins.append, pieces.ends.append
        for copy in copies:
            row, start = copy.row, copy.sent
            end = row.committed
            if end > copy.sent_ids:
                end = copy.sent_ids
            count = end - start
            if count <= 0:
                continue
            slot = start % tokens
            size = count * width
            if slot and plain and slot + count <= tokens and total + size <= budget and room > 0:
                block, generation = row.blocks[start // tokens], row.generations[start // tokens]
                entry = table.get(block)
                if entry is not None and entry[FILLED] == slot and entry[GENERATION] == generation:
                    rows(copy.number), row_generations(row.generation), nos(copy.no), starts(start)
                    counts(count), blocks(block), generations(generation), flags(PIECE_TOKENS)
                    out(copy), begins(start), ends(end)
                    entry[FILLED] = slot + count
                    copy.sent = end
                    total += size
                    room -= 1
                    continue
            pieces.bytes = total
            self._walk(copy, end, pieces, budget, lone)
            total, room = pieces.bytes, PIECES_PER_FRAME_MAX - len(pieces.nos)
            if copy.sent < end:
                left.append(copy)
        pieces.bytes = total
        return left

    def _walk(self, copy: Copy, end: int, pieces: Pieces, budget: int, lone: bool) -> None:
        """The general case: block by block, referring to what the holder already has."""
        shape, row, start = self.shape, copy.row, copy.sent
        tokens, begin = shape.block_tokens, start
        while start < end and len(pieces.nos) < PIECES_PER_FRAME_MAX:
            index, slot = divmod(start, tokens)
            block, generation = row.blocks[index], row.generations[index]
            count = min(tokens - slot, end - start)
            entry = self.table.get(block)
            filled = entry[FILLED] if entry is not None and entry[GENERATION] == generation else 0
            if filled > slot:
                count, flag, size = min(count, filled - slot), PIECE_REFERENCE, 0
            elif shape.addressable:
                room = (budget - pieces.bytes) // shape.token_bytes
                count, flag = min(count, max(room, 1) if lone and not pieces.bytes else room), PIECE_TOKENS
                size = count * shape.token_bytes
                if count <= 0:
                    break
            else:
                flag, size = PIECE_BLOCK, shape.block_bytes
                if pieces.bytes + size > budget and (pieces.bytes or not lone):
                    break
            entry = self._enter(copy, index, block, generation)
            entry[FILLED] = max(entry[FILLED], slot + count)
            pieces.rows.append(copy.number)
            pieces.row_generations.append(row.generation)
            pieces.nos.append(copy.no)
            pieces.starts.append(start)
            pieces.counts.append(count)
            pieces.blocks.append(block)
            pieces.generations.append(generation)
            pieces.flags.append(flag)
            pieces.bytes += size
            start += count
        if start > begin:
            copy.sent = start
            pieces.copies.append(copy)
            pieces.begins.append(begin)
            pieces.ends.append(start)
