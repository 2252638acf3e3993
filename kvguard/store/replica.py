"""What a holder keeps of one stream: its sequences, and which pages they reach into.

Knows: positions, ids, generations, lineage, admission. Must not know: sessions, frames, lanes, time.
Invariants (check): every sequence's blocks hold [0, position) whole, verified, without a hole; a page's references are the block lists that name it; what was
admitted fits the budget, so growth that was promised can't fail for want of it; a sequence that can't be kept is dropped whole. What was found in a former
life's arena, or is doubted, is stated only as far as it has been read and verified since (`unchecked`); until all of it is, no session writes here.

A released sequence gives its pages back at once and keeps its ids (the store decides how long).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

from kvguard.errors import BadFrame, Refused, StoreFull
from kvguard.format import lineage as lineages
from kvguard.format import pages
from kvguard.format.local import ReplicaPages
from kvguard.format.messages import PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, Holding, StreamShape
from kvguard.limits import IDS_PER_ROW_MAX, ROWS_MAX
from kvguard.store.arena import Arena, at_once
from kvguard.store.budget import Budget
from kvguard.store.changes import Changes
from kvguard.store.index import Index
from kvguard.types import Epoch, Lineage, SequenceId, Span, StreamId

ID_BYTES = 4


class Sequence:
    """One sequence of a replica. `promised`: pages reserved beyond `blocks`. `expires_ns`: 0 until delivered. `number`, `logged_*`: store/changes.py's."""

    __slots__ = (
        "birth", "blocks", "expires_ns", "generation", "ids", "lineage", "logged_blocks", "logged_ids", "name", "number", "position", "promised", "released",
        "request", "sampler",
    )  # fmt: skip

    def __init__(self, name: SequenceId, generation: int, lineage: Lineage, request: bytes) -> None:
        self.name = name
        self.generation = generation
        self.lineage = lineage
        self.request = request
        self.birth = lineages.birth_of(request)
        self.sampler = b""
        self.ids = bytearray()
        self.blocks = array("I")
        self.position = 0
        self.promised = 0
        self.released = False
        self.expires_ns = 0
        self.number = self.logged_blocks = self.logged_ids = 0

    @property
    def known(self) -> int:
        """How many token ids are known."""
        return len(self.ids) // ID_BYTES


class Replica:
    """All operations raise StoreFull where a sequence can't be kept (the caller drops it) and BadFrame where what arrives doesn't fit what is held."""

    def __init__(self, stream: StreamId, shape: StreamShape, arena: Arena, budget: Budget, index: Index | None = None) -> None:
        self.stream = stream
        self.shape = shape
        self.arena = arena
        self.index = index
        self.changes = Changes(arena.generation)
        self.sequences: dict[SequenceId, Sequence] = {}
        self.released: list[SequenceId] = []  # since the store last looked
        self.unchecked: dict[SequenceId, int] = {}  # of a former life, or doubted: how many positions were read and verified since
        self.unsound = 0  # positions that did not hold when it was last verified
        self.carried: Epoch | None = None  # the newest whose plan was carried out here
        self._budget = budget
        self._lineage: Lineage = ()  # the last one seen: sequences of one epoch share the object

    # ---- ids and life -------------------------------------------------------------------------------------------------------------------

    def open(self, name: SequenceId, generation: int, lineage: Lineage, request: bytes) -> Sequence:
        """Go on with what is held under the same generation, up to where the lineages agree; else start anew."""
        lineage = self._shared(lineage)
        held = self.sequences.get(name)
        if held is not None and held.generation == generation and not held.released:
            agreed = lineages.agreed(held.lineage, lineage)
            self.cut(held, min(agreed, held.position), min(agreed, held.known))
            self.fork(held, generation, lineage)
            return held
        if held is not None:
            self.drop(held)
        if len(self.sequences) >= 2 * ROWS_MAX:
            raise StoreFull(f"{len(self.sequences)} sequences of one stream are kept already")
        if not self._budget.promise(len(request)):
            raise self._budget.full(f"the request of {name}")
        self._budget.use(len(request))
        sequence = self.sequences[name] = Sequence(name, generation, lineage, request)
        self.changes.begun(sequence)
        return sequence

    def fork(self, sequence: Sequence, generation: int, lineage: Lineage) -> None:
        """What follows is of this generation and lineage."""
        if (generation, lineage) != (sequence.generation, sequence.lineage):
            sequence.generation, sequence.lineage = generation, lineage
            self.changes.lives[sequence] = None

    def extend_ids(self, sequence: Sequence, start: int, ids, sampler: bytes) -> None:
        """Token ids from position `start` on (u32 LE); what is known already changes nothing. Room for their KV is reserved before they are taken."""
        known, end = sequence.known, start + len(ids) // ID_BYTES
        if start > known:
            raise BadFrame(f"sequence {sequence.name}: ids start at {start}, known are {known}")
        if end > IDS_PER_ROW_MAX:
            raise StoreFull(f"{end} ids are over the bound of {IDS_PER_ROW_MAX}")
        if end > known:
            more = bytes(ids[(known - start) * ID_BYTES :])
            self._admit(sequence, end)
            if not self._budget.promise(len(more)):
                raise self._budget.full(f"{end} ids of {sequence.name}")
            self._budget.use(len(more))
            sequence.ids += more
        if sampler and end >= known:
            sequence.sampler = sampler
        self.changes.told[sequence] = None

    def cut(self, sequence: Sequence, position: int, ids: int) -> None:
        """KV beyond `position` and ids beyond `ids` are void."""
        self._cut_kv(sequence, position)
        gone = max(0, len(sequence.ids) - ids * ID_BYTES)
        if gone:
            del sequence.ids[ids * ID_BYTES :]
            self._budget.free(gone)
            sequence.logged_ids = min(sequence.logged_ids, sequence.known)
            self.changes.cut[sequence] = None
        self.readmit(sequence)

    def release(self, sequence: Sequence) -> None:
        """Pages go, ids stay."""
        self._clear(sequence)
        sequence.released = True
        self.changes.lives[sequence] = None
        self.released.append(sequence.name)

    def _clear(self, sequence: Sequence) -> None:
        self._cut_kv(sequence, 0)
        self._budget.promise(-sequence.promised * self.arena.page_bytes)
        sequence.promised = 0

    def drop(self, sequence: Sequence) -> None:
        """Everything of it goes."""
        self._clear(sequence)
        self._budget.free(len(sequence.ids) + len(sequence.request))
        del self.sequences[sequence.name]
        self.unchecked.pop(sequence.name, None)
        self.changes.dropped(sequence)

    def close(self, let_go: Callable[[Callable[[], None]], None] = at_once) -> None:
        """Forget it here; what a shelf keeps of it stays as it is. `let_go`: see Arena.close."""
        for sequence in list(self.sequences.values()):
            self.drop(sequence)
        self.arena.close(let_go)
        if self.index is not None:
            self.index.close()

    def record(self) -> None:
        """Write down what changed, before anything is acknowledged or stated."""
        if self.index is None or not self.changes.any():
            self.changes.forget()
        elif self.index.append(self.changes.record()):
            self.index.rewrite(self.changes.snapshot(self.sequences.values(), self.carried))

    def _shared(self, lineage: Lineage) -> Lineage:
        if lineage != self._lineage:
            self._lineage = lineage
        return self._lineage

    # ---- admission ----------------------------------------------------------------------------------------------------------------------

    def _admit(self, sequence: Sequence, positions: int) -> None:
        """Reserve the pages that `positions` need beyond those held, before anything is taken."""
        need = max(sequence.promised, -(-positions // self.shape.block_tokens) - len(sequence.blocks))
        if need > sequence.promised:
            if not self._budget.promise((need - sequence.promised) * self.arena.page_bytes):
                raise self._budget.full(f"{positions} positions of {sequence.name}")
            sequence.promised = need

    def readmit(self, sequence: Sequence) -> None:
        """After a cut: what its known length still needs, as far as it can be had (growth asks again)."""
        need = max(0, -(-max(sequence.known, sequence.position) // self.shape.block_tokens) - len(sequence.blocks))
        if self._budget.promise((need - sequence.promised) * self.arena.page_bytes):
            sequence.promised = need

    # ---- kv -----------------------------------------------------------------------------------------------------------------------------

    def apply(self, sequence: Sequence, start: int, count: int, block: int, generation: int, flag: int, data: memoryview, sums: tuple[int, ...]) -> None:
        """One piece: verified first, then written, then seen."""
        tokens, arena = self.shape.block_tokens, self.arena
        index, slot = divmod(start, tokens)
        end = start + count
        if count <= 0 or start < 0 or slot + count > tokens or not 0 <= block < self.shape.blocks:
            raise BadFrame(f"sequence {sequence.name}: {count} positions at {start} in block {block} are not a piece of one block")
        if start > sequence.position:
            raise BadFrame(f"sequence {sequence.name}: piece starts at {start}, held are {sequence.position}")
        if index < len(sequence.blocks):
            if sequence.blocks[index] != block or arena.generation(block) != generation:
                self._replace(sequence, index, slot, end)
            elif end <= sequence.position:
                return
        if flag != PIECE_REFERENCE:
            self._verify(block, data, sums)
        if index == len(sequence.blocks):
            self._attach(sequence, end, block, generation, flag, slot + count)
        if flag == PIECE_TOKENS:
            self._write_tokens(sequence, index, slot, count, block, data, sums)
        elif flag == PIECE_BLOCK:
            self._write_block(sequence, block, slot + count, data, sums[0])
        elif arena.fill[block] < slot + count:
            raise BadFrame(f"sequence {sequence.name}: refers to {slot + count} slots of block {block}, held are {arena.fill[block]}")
        if end > sequence.position:
            sequence.position = end
        self.changes.grown[sequence] = None

    def _verify(self, block: int, data: memoryview, sums: tuple[int, ...]) -> None:
        if pages.sums_of(data, len(data) // len(sums)) != sums:
            raise BadFrame(f"checksum: bytes of block {block} don't match the sums taken from the pool")

    def _replace(self, sequence: Sequence, index: int, slot: int, end: int) -> None:
        """The sender's block at `index` is another now: legal where the piece starts that block again and nothing beyond it would be lost."""
        if slot or sequence.position > end:
            raise BadFrame(f"sequence {sequence.name}: another block at {index * self.shape.block_tokens} without a cut, held are {sequence.position}")
        self._cut_kv(sequence, index * self.shape.block_tokens)
        self.readmit(sequence)

    def _attach(self, sequence: Sequence, end: int, block: int, generation: int, flag: int, filled: int) -> None:
        arena = self.arena
        held = arena.generation(block) if arena.refs[block] else -1
        if flag == PIECE_REFERENCE and (held != generation or arena.fill[block] < filled):
            raise BadFrame(f"sequence {sequence.name}: refers to block {block} generation {generation}, which isn't held")
        if held > generation:
            raise BadFrame(f"sequence {sequence.name}: block {block} of generation {generation}, held is {held}")
        if 0 <= held < generation:
            self._evict(block)
        shared = held == generation
        self._admit(sequence, end)
        if shared:
            arena.refer(block)
            self._budget.promise(-arena.page_bytes)
        else:
            arena.begin(block, generation)
        sequence.promised -= 1
        sequence.blocks.append(block)

    def _evict(self, block: int) -> None:
        """The engine has reused a block that sequences here still name: what they had from it on is gone in the pool too."""
        for sequence in self.sequences.values():
            if block in sequence.blocks:
                self._cut_kv(sequence, sequence.blocks.index(block) * self.shape.block_tokens)
                self.readmit(sequence)

    def _write_tokens(self, sequence: Sequence, index: int, slot: int, count: int, block: int, data: memoryview, sums: tuple[int, ...]) -> None:
        arena, width = self.arena, self.shape.token_bytes
        own = max(0, sequence.position - index * self.shape.block_tokens - slot)  # leading tokens that are held: a duplicate changes nothing
        if own:
            slot, count, data, sums = slot + own, count - own, data[own * width :], sums[own:]
        fill = arena.fill[block]
        if slot > fill:
            raise BadFrame(f"sequence {sequence.name}: slot {slot} of block {block} would leave a hole behind {fill}")
        overlap = min(fill - slot, count)
        if overlap and arena.sums(block, slot, overlap) != sums[:overlap]:
            if arena.refs[block] > 1:
                raise StoreFull(f"writes into block {block}, whose positions another sequence holds")
            fill = slot
        elif overlap == count:
            return
        arena.write_tokens(block, slot, data, sums)
        arena.fill[block] = max(fill, slot + count)

    def _write_block(self, sequence: Sequence, block: int, filled: int, data: memoryview, total: int) -> None:
        arena = self.arena
        fill = arena.fill[block]
        if fill >= filled and arena.sums(block, 0, 1) == (total,):
            return
        if fill >= filled and arena.refs[block] > 1:
            raise StoreFull(f"writes into block {block}, whose positions another sequence holds")
        arena.write_block(block, data, total)
        arena.fill[block] = filled

    def _cut_kv(self, sequence: Sequence, position: int) -> None:
        """Pages beyond `position` lose this reference; slots of the last page that only this sequence held are forgotten."""
        position = min(position, sequence.position)
        tokens, arena = self.shape.block_tokens, self.arena
        keep = -(-position // tokens)
        while len(sequence.blocks) > keep:
            arena.release(sequence.blocks.pop())
        if position < sequence.position and position % tokens and arena.refs[sequence.blocks[-1]] == 1:
            arena.fill[sequence.blocks[-1]] = position % tokens
        if position < sequence.position or len(sequence.blocks) < sequence.logged_blocks:
            sequence.logged_blocks = min(sequence.logged_blocks, len(sequence.blocks))
            self.changes.cut[sequence] = None
        sequence.position = position

    # ---- what is held ---------------------------------------------------------------------------------------------------------------------

    def live(self) -> list[Sequence]:
        return [sequence for sequence in self.sequences.values() if not sequence.released]

    def stated(self, sequence: Sequence) -> int:
        """How many positions of it are known to be whole."""
        return min(sequence.position, self.unchecked.get(sequence.name, sequence.position))

    def holding(self) -> Holding:
        live = self.live()
        return Holding(
            self.stream, "replica", False, tuple(s.name for s in live), tuple(s.generation for s in live), tuple(s.lineage for s in live),
            tuple(map(self.stated, live)), tuple(s.known for s in live), self.shape.fingerprint, tuple(s.birth for s in live),
        )  # fmt: skip

    def pages(self) -> ReplicaPages:
        live = self.live()
        return ReplicaPages(
            self.stream, self.shape, tuple(s.name for s in live), tuple(tuple(s.blocks) for s in live),
            tuple(tuple(map(self.arena.generation, s.blocks)) for s in live), tuple(map(self.stated, live)), tuple(s.lineage for s in live),
            tuple(bytes(s.ids) for s in live), tuple(s.sampler for s in live), tuple(s.request for s in live),
        )  # fmt: skip

    def read(self, name: SequenceId, span: Span) -> bytes:
        """Canonical bytes of `span`; whole blocks, from the span's first to its last, where tokens aren't addressable. Raises Refused beyond what is held."""
        sequence = self._named(name)
        if not 0 <= span.start <= span.end <= sequence.position:
            raise Refused(f"positions [{span.start}, {span.end}) of {name}: held are {sequence.position}")
        parts, tokens = [], self.shape.block_tokens
        for index in range(span.start // tokens, -(-span.end // tokens)):
            first, end = max(span.start, index * tokens), min(span.end, (index + 1) * tokens)
            block = sequence.blocks[index]
            parts.append(self.arena.tokens(block, first % tokens, end - first) if self.shape.addressable else self.arena.block(block))
        return b"".join(parts)

    def verify(self, name: SequenceId) -> int:
        """How many leading positions' bytes match their sums."""
        sequence, held = self._named(name), 0
        for block in sequence.blocks:
            count = min(self.shape.block_tokens, sequence.position - held)
            good = self.sound(block, count)
            held += good
            if good < count:
                break
        return held

    def sound(self, block: int, count: int) -> int:
        """How many of a page's first `count` positions match their sums."""
        shape, arena = self.shape, self.arena
        if not shape.addressable:
            return count if pages.sums_of(arena.block(block), shape.block_bytes) == arena.sums(block, 0, 1) else 0
        found, kept = pages.sums_of(arena.tokens(block, 0, count), shape.token_bytes), arena.sums(block, 0, count)
        return count if found == kept else next(n for n, (a, b) in enumerate(zip(found, kept, strict=True)) if a != b)

    def cut_damaged(self, sequence: Sequence, sound: int) -> int:
        """Only the first `sound` positions match their sums: what lies beyond goes. Returns how many positions went."""
        held = sequence.position
        if sound >= held:
            return 0
        index = sound // self.shape.block_tokens
        if self.arena.refs[sequence.blocks[index]] > 1:
            sound = index * self.shape.block_tokens  # a page that others name too is only written anew once nobody does
        self._cut_kv(sequence, sound)
        self.readmit(sequence)
        return held - sequence.position

    def damage(self, name: SequenceId, position: int, bytes_only: bool = False) -> None:
        """For drills: see Arena.damage."""
        sequence = self._named(name)
        if not 0 <= position < sequence.position:
            raise Refused(f"position {position} of {name}: held are {sequence.position}")
        self.arena.damage(sequence.blocks[position // self.shape.block_tokens], position % self.shape.block_tokens, bytes_only)

    def _named(self, name: SequenceId) -> Sequence:
        if name not in self.sequences:
            raise Refused(f"no sequence {name} of {self.stream} is held here")
        return self.sequences[name]

    def check(self) -> None:
        """Asserts the invariants that don't need the bytes read."""
        refs: dict[int, int] = {}
        for sequence in self.sequences.values():
            assert len(sequence.blocks) == -(-sequence.position // self.shape.block_tokens), sequence.name
            assert sequence.promised >= 0, sequence.name
            for index, block in enumerate(sequence.blocks):
                refs[block] = refs.get(block, 0) + 1
                assert self.arena.fill[block] >= min(self.shape.block_tokens, sequence.position - index * self.shape.block_tokens), sequence.name
        assert len(refs) == self.arena.pages_live() and all(self.arena.refs[block] == count for block, count in refs.items())
