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
    """One capture. `items` while it is gathered: (row, row generation, no, start, count, block, generation, flag); `moves`: (copy, begin, end).

    `close` turns both into columns. `spoiled`: what it holds must not be sent any more.
    """

    def __init__(self, session: int, at_ns: int) -> None:
        self.id = 0
        self.session = session
        self.at_ns = at_ns
        self.items: list[tuple[int, ...]] = []
        self.moves: list[tuple[Copy, int, int]] = []
        self.bytes = 0
        self.spoiled = False
        self.done = None

    def close(self) -> None:
        self.rows, self.row_generations, self.nos, self.starts, self.counts, self.blocks, self.generations, self.flags = zip(*self.items, strict=True)
        copies, begins, ends = zip(*self.moves, strict=True)
        self.copies, self.begins, self.ends = copies, list(begins), list(ends)


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

    def gather(self, copies, pieces: Pieces, budget: int, lone: bool, bound: int) -> tuple[list[Copy], list[Copy]]:
        """Pieces for as many of `copies`, in order, as `budget` bytes allow; `sent` moves. Returns those left behind, and those whose backlog is over `bound`.

        `lone`: nothing is in flight, so one piece goes however wide it is."""
        shape, table = self.shape, self.table
        tokens, width, plain = shape.block_tokens, shape.token_bytes, shape.addressable
        left: list[Copy] = []
        large: list[Copy] = []
        item, move = pieces.items.append, pieces.moves.append
        room, total = PIECES_PER_FRAME_MAX - len(pieces.items), pieces.bytes
        for copy in copies:
            row, start = copy.row, copy.sent
            end = row.committed
            if end > copy.sent_ids:
                end = copy.sent_ids
            count = end - start
            if count <= 0 or copy.stuck:
                continue
            if count > bound:
                large.append(copy)
                continue
            slot = start % tokens
            if slot and plain and slot + count <= tokens and room > 0:
                size = total + count * width
                index = start // tokens
                block, generation = row.blocks[index], row.generations[index]
                entry = table.get(block)
                if size <= budget and entry is not None and entry[FILLED] == slot and entry[GENERATION] == generation:
                    item((copy.number, row.generation, copy.no, start, count, block, generation, PIECE_TOKENS))
                    move((copy, start, end))
                    entry[FILLED] = slot + count
                    copy.sent = end
                    total = size
                    room -= 1
                    continue
            pieces.bytes = total
            self._walk(copy, end, pieces, budget, lone)
            room, total = PIECES_PER_FRAME_MAX - len(pieces.items), pieces.bytes
            if copy.sent < end:
                left.append(copy)
        pieces.bytes = total
        return left, large

    def _walk(self, copy: Copy, end: int, pieces: Pieces, budget: int, lone: bool) -> None:
        """The general case: block by block, referring to what the holder already has."""
        shape, row, start = self.shape, copy.row, copy.sent
        tokens, begin = shape.block_tokens, start
        while start < end and len(pieces.items) < PIECES_PER_FRAME_MAX:
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
            pieces.items.append((copy.number, row.generation, copy.no, start, count, block, generation, flag))
            pieces.bytes += size
            start += count
        if start > begin:
            copy.sent = start
            pieces.moves.append((copy, begin, start))
