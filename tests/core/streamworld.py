"""An engine in a few lines, both halves of a stream, a real store, and a wire that loses, damages and overtakes: for tests of core/sender and core/receiver.

The bytes of a slot are a number that is never written twice, so any byte at the holder can be traced to the one write that made it.
"""

from __future__ import annotations

import struct
from collections import deque
from itertools import count

import msgspec

from kvguard.core.effects import Apply, Capture, FreeBuffer, Note, Probe, Send, SendIds, SendKv
from kvguard.core.events import Applied, Arrived, Captured, Cut, Grown, LinkDown, LinkUp, Looked, Opened, Probed, Tick, TurnEnded
from kvguard.core.inbound import Inbound
from kvguard.core.ledger import Ledger
from kvguard.core.promises import Promises
from kvguard.core.sender import Sender, SenderSettings
from kvguard.format.messages import PIECE_BLOCK, PIECE_REFERENCE, Ack, Held, Hello, IdsFrame, KvFrame, StreamShape
from kvguard.format.pages import pack_sums, sums_of
from kvguard.store.store import ReplicaStore
from kvguard.types import NO_EPOCH, Fork, Rank, Span, StreamId

STREAM = StreamId("i", Rank(0, 0, 0), 7)
TOKENS, TOKEN_BYTES, BLOCKS = 4, 8, 24
MS = 1_000_000


class Sequence:
    """One row of the engine: `ids` are known, of which the first `committed` have KV."""

    def __init__(self, name: str, generation: int) -> None:
        self.name, self.generation = name, generation
        self.lineage = (Fork(0, 0),)
        self.blocks: list[int] = []
        self.ids: list[int] = []
        self.committed = 0
        self.kept = self.kept_blocks = 1 << 30  # lowest cut since the last look


class Engine:
    """A paged pool with prefix sharing; freed blocks are poisoned at once and reused soon."""

    def __init__(self) -> None:
        self.numbers = count(1)
        self.pool = [[0] * TOKENS for _ in range(BLOCKS)]
        self.block_generation = [0] * BLOCKS
        self.uses = [0] * BLOCKS
        self.rows: dict[int, Sequence] = {}
        self.free = deque(range(BLOCKS))
        self.looked: dict[int, tuple] = {}

    def _allocate(self) -> int | None:
        if not self.free:
            return None
        block = self.free.popleft()
        self.block_generation[block] = next(self.numbers)
        self.uses[block] = 1
        return block

    def _drop(self, block: int) -> None:
        self.uses[block] -= 1
        if not self.uses[block]:
            self.block_generation[block] = next(self.numbers)
            self.pool[block] = [next(self.numbers) for _ in range(TOKENS)]  # poison
            self.free.append(block)

    def open(self, row: int, name: str, like: int) -> None:
        """A new sequence in `row`, sharing the whole blocks of row `like`."""
        self.release(row)
        if any(sequence.name == name for sequence in self.rows.values()):
            return
        sequence = self.rows[row] = Sequence(name, next(self.numbers))
        source = self.rows.get(like)
        if source is not None and source is not sequence:
            whole = source.committed // TOKENS
            sequence.blocks = source.blocks[:whole]
            for block in sequence.blocks:
                self.uses[block] += 1
            sequence.ids = source.ids[: whole * TOKENS]
            sequence.committed = whole * TOKENS
        sequence.ids.append(next(self.numbers))

    def grow(self, row: int, positions: int) -> None:
        sequence = self.rows.get(row)
        for _ in range(positions if sequence is not None else 0):
            index, slot = divmod(sequence.committed, TOKENS)
            if index == len(sequence.blocks):
                block = self._allocate()
                if block is None:
                    return
                sequence.blocks.append(block)
            self.pool[sequence.blocks[index]][slot] = next(self.numbers)
            sequence.committed += 1
            if sequence.committed == len(sequence.ids):
                sequence.ids.append(next(self.numbers))

    def cut(self, row: int, position: int) -> None:
        """Back to `position`; a shared tail block is copied before it would be written."""
        sequence = self.rows.get(row)
        if sequence is None or position >= sequence.committed:
            return
        sequence.generation = next(self.numbers)
        sequence.committed = position
        del sequence.ids[position:]
        sequence.ids.append(next(self.numbers))
        whole, slot = divmod(position, TOKENS)
        keep = whole + (1 if slot else 0)
        kept_blocks = keep
        if slot and self.uses[sequence.blocks[whole]] > 1:
            fresh = self._allocate()
            if fresh is None:
                sequence.committed = whole * TOKENS
            else:
                self.pool[fresh] = self.pool[sequence.blocks[whole]][:slot] + self.pool[fresh][slot:]
            self.uses[sequence.blocks[whole]] -= 1
            tail = [] if fresh is None else [fresh]
            for block in sequence.blocks[whole + 1 :]:
                self._drop(block)
            sequence.blocks[whole:] = tail
            kept_blocks = whole
        else:
            for block in sequence.blocks[keep:]:
                self._drop(block)
            del sequence.blocks[keep:]
        sequence.kept = min(sequence.kept, sequence.committed)
        sequence.kept_blocks = min(sequence.kept_blocks, kept_blocks)

    def release(self, row: int) -> None:
        sequence = self.rows.pop(row, None)
        for block in sequence.blocks if sequence is not None else ():
            self._drop(block)

    def look(self) -> Looked:
        released, cut, opened, grown, columns = [], [], [], [], []
        for row in list(self.looked):
            if row not in self.rows or self.rows[row] is not self.looked[row][0]:
                released.append(row)
                del self.looked[row]
        for row, s in self.rows.items():
            known = self.looked.get(row)
            first = 0
            if known is None:
                opened.append(Opened(row, s.name, s.generation, s.lineage, b"request"))
            else:
                first = known[2]
                if known[1] != s.generation:
                    first = min(s.kept_blocks, first)
                    cut.append(Cut(row, min(s.kept, known[3]), s.generation, s.lineage, first))
            if len(s.blocks) > first:
                grown.append(Grown(row, first, tuple(s.blocks[first:]), tuple(self.block_generation[block] for block in s.blocks[first:])))
            now = (s, s.generation, len(s.blocks), s.committed, len(s.ids))
            if known != now:
                columns.append((row, s.committed, len(s.ids)))
            self.looked[row] = now
            s.kept = s.kept_blocks = 1 << 30
        rows, committed, ids = zip(*columns, strict=True) if columns else ((), (), ())
        return Looked(STREAM, tuple(released), tuple(cut), tuple(opened), tuple(grown), rows, committed, ids)


class World:
    """`ids` and `kv` are what is on the way to the holder, `back` what comes from it; each is in order, they overtake each other."""

    def __init__(self, addressable: bool = True, budget_bytes: int = 1 << 20, window_bytes: int = 96) -> None:
        self.shape = StreamShape(1, TOKENS, TOKEN_BYTES, TOKENS * TOKEN_BYTES, BLOCKS, addressable)
        self.now = 0
        self.engine = Engine()
        self.ledger = Ledger(self.shape)
        self.sender = Sender(STREAM, self.ledger, "h", "peer:h", NO_EPOCH, count(1), count(1), SenderSettings("a", 5, window_bytes, 200 * MS, 100 * MS))
        self.inbound = Inbound(Promises({}))
        self.store = ReplicaStore(None, budget_bytes, 0, clock=lambda: self.now)
        self.buffers: dict[int, bytes] = {}
        self.buffer_ids = count(1)
        self.captures: list[Capture] = []
        self.ids: deque = deque()
        self.kv: deque = deque()
        self.back: deque = deque()
        self.notes: list[Note] = []
        self.linked = False

    def close(self) -> None:
        self.store.close()

    # ---- the sending node ----

    def tell(self, event) -> None:
        for effect in self.sender.step(self.now, event):
            self.perform(effect)
        self.check()

    def look(self) -> None:
        event = self.engine.look()
        self.ledger.look(event)
        self.tell(event)

    def perform(self, effect) -> None:
        kind = type(effect)
        if kind is Capture:
            self.captures.append(effect)
        elif kind is SendIds:
            self.send(self.ids, self.filled(effect), 0)
        elif kind is SendKv:
            self.send(self.kv, effect.message, effect.buffer)
        elif kind is Send:
            self.send(self.ids, effect.message, 0)
        elif kind is FreeBuffer:
            del self.buffers[effect.buffer]
        elif kind is Note:
            self.notes.append(effect)
        else:
            raise AssertionError(effect)

    def send(self, pipe: deque, message, buffer: int) -> None:
        payload = self.buffers.pop(buffer) if buffer else b""
        if self.linked:
            pipe.append((message, payload))

    def filled(self, effect: SendIds) -> IdsFrame:
        """As the shell does: rows whose generation moved are left out."""
        message, keep, ids = effect.message, [], []
        for index, (row, generation) in enumerate(zip(effect.rows, effect.row_generations, strict=True)):
            sequence = self.engine.rows.get(row)
            if sequence is not None and sequence.generation == generation:
                keep.append(index)
                ids += sequence.ids[message.starts[index] : message.starts[index] + message.counts[index]]
        columns = {name: tuple(getattr(message, name)[index] for index in keep) for name in ("nos", "starts", "counts")}
        return msgspec.structs.replace(message, ids=struct.pack(f"<{len(ids)}I", *ids), sampler_bytes=(0,) * len(keep), **columns)

    def capture(self, which: int = 0) -> None:
        """Complete one capture from the pool as it is now."""
        if not self.captures:
            return
        order = self.captures.pop(which % len(self.captures))
        parts, stale, sums = [], [], []
        for index in range(len(order.rows)):
            sequence = self.engine.rows.get(order.rows[index])
            block, slot = order.blocks[index], order.starts[index] % TOKENS
            if sequence is None or sequence.generation != order.row_generations[index] or self.engine.block_generation[block] != order.generations[index]:
                stale.append(index)
                continue
            slots = self.engine.pool[block]
            if order.flags[index] == PIECE_REFERENCE:
                continue
            whole = order.flags[index] == PIECE_BLOCK
            data = b"".join(number.to_bytes(TOKEN_BYTES, "little") for number in (slots if whole else slots[slot : slot + order.counts[index]]))
            parts.append(data)
            sums += sums_of(memoryview(data), len(data) if whole else TOKEN_BYTES)
        payload = b"".join(parts)
        buffer = next(self.buffer_ids) if payload else 0
        if buffer:
            self.buffers[buffer] = payload
        self.tell(Captured(order.id, STREAM, order.epoch, buffer, len(payload), tuple(stale), pack_sums(sums)))

    # ---- the wire ----

    def up(self) -> None:
        if not self.linked:
            self.linked = True
            self.tell(LinkUp("peer:h"))

    def down(self) -> None:
        if self.linked:
            self.linked = False
            for pipe in (self.ids, self.kv, self.back):
                pipe.clear()
            self.tell(LinkDown("peer:h", "cut"))
            self.receive(self.inbound.link_down("in:a"))

    def deliver(self, pipe: deque, damage: bool = False, twice: bool = False) -> None:
        if not pipe:
            return
        message, payload = pipe.popleft()
        if pipe is self.back:
            self.tell(Arrived("peer:h", message))
            return
        if damage and payload:
            payload = bytes([payload[0] ^ 1]) + payload[1:]
        for _ in range(2 if twice else 1):
            buffer = next(self.buffer_ids) if payload else 0
            if buffer:
                self.buffers[buffer] = payload
            event = Arrived("in:a", message, buffer)
            self.receive(self.inbound.hello("in:a", message) if type(message) is Hello else self.inbound.frame(self.now, event))
        self.receive(self.inbound.turn_ended(self.now, TurnEnded()))
        self.check()

    # ---- the holder ----

    def receive(self, effects) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is Probe:
                held = self.store.probe(effect.hello)
                self.receive(self.inbound.completed(self.now, Probed(effect.link, effect.hello.session, held, held.reason)))
            elif kind is Apply:
                message, payload = effect.message, memoryview(self.buffers.pop(effect.buffer) if effect.buffer else b"")
                lane = "ids" if type(message) is IdsFrame else "kv"
                refused, gap = self.store.apply_ids(effect.session, message) if lane == "ids" else self.store.apply_kv(effect.session, message, payload)
                self.receive(self.inbound.completed(self.now, Applied(effect.link, effect.session, lane, message.number, refused, gap)))
            elif kind is FreeBuffer:
                del self.buffers[effect.buffer]
            elif kind is Note:
                self.notes.append(effect)
            else:
                assert type(effect) is Send and type(effect.message) in (Ack, Held), effect
                if self.linked:
                    self.back.append((effect.message, b""))

    # ---- judgement ----

    def check(self) -> None:
        self.ledger.check()
        self.sender.check()
        self.inbound.check()
        self.store.check()
        if self.sender.state != "stream" or self.store.counters["refused"]:
            return  # a refusal that is on its way back is the one thing that an acknowledged position can be lost to
        held = self.held()
        for copy in self.sender.flow.copies.values():
            position, ids = held.get(copy.row.sequence, (0, 0))
            assert copy.acked <= position, f"{copy.row.sequence}: {copy.acked} acknowledged, {position} held"
            if copy.row is self.row_now(copy.number):
                assert self.kept(copy.row.sequence, copy.acked) == self.slots(self.engine.rows[copy.number])[: copy.acked], f"{copy.row.sequence}: bytes"
                assert copy.acked_ids <= ids, f"{copy.row.sequence}: {copy.acked_ids} ids acknowledged, {ids} held"

    def row_now(self, number: int):
        """The copy's row, where the engine hasn't moved on since the last look (ids of a row that moved are left out of frames)."""
        row, sequence = self.ledger.rows.get(number), self.engine.rows.get(number)
        return row if sequence is not None and row is not None and sequence.generation == row.generation else None

    def held(self) -> dict[str, tuple[int, int]]:
        if STREAM not in self.store.streams():
            return {}
        holding = self.store.holding(STREAM)
        return {name: (position, ids) for name, position, ids in zip(holding.sequences, holding.positions, holding.ids, strict=True)}

    def kept(self, name: str, position: int) -> list[int]:
        """What the holder would give back for [0, position)."""
        data = self.store.read(STREAM, name, Span(0, position)) if position else b""
        return [int.from_bytes(data[at : at + TOKEN_BYTES], "little") for at in range(0, len(data), TOKEN_BYTES)][:position]

    def slots(self, sequence: Sequence) -> list[int]:
        return [self.engine.pool[block][slot] for block in sequence.blocks for slot in range(TOKENS)]

    def drain(self) -> None:
        """Faults stop; everything that is committed must arrive."""
        self.up()
        self.look()
        for _ in range(400):
            turns = 0
            while self.captures or self.ids or self.kv or self.back:
                turns += 1
                assert turns < 5000, "goes round in circles"
                self.capture()
                self.deliver(self.ids)
                self.deliver(self.kv)
                self.deliver(self.back)
            if self.sender.caught_up():
                break
            self.now += 50 * MS
            self.tell(Tick())
        assert self.sender.caught_up(), (self.sender.state, self.sender.reason, self.notes[-3:])
        assert not self.buffers, "a buffer was forgotten"

    def compare(self) -> None:
        """The holder has exactly what the engine committed."""
        rows = {s.name: s for s in self.engine.rows.values()}
        held = self.held()
        assert {name: (s.committed, len(s.ids)) for name, s in rows.items()} == held
        for name, s in rows.items():
            assert self.kept(name, s.committed) == self.slots(s)[: s.committed], name
            assert self.store.verify(STREAM, name)[name] == s.committed
        _, pages = self.store.pages(STREAM)
        for name, ids in zip(pages.sequences, pages.ids, strict=True):
            assert list(struct.unpack(f"<{len(ids) // 4}I", ids)) == rows[name].ids


def frames(pipe: deque) -> list:
    return [message for message, _ in pipe if type(message) in (IdsFrame, KvFrame)]
