"""What every store keeps to: random lives of sequences against a model of a few dicts. Whatever comes in whatever order, what is shown is whole, verified and of one
generation; admission never exceeds the budget; nothing that is protected is lost but what was cut, released or refused.
"""

from __future__ import annotations

import gc
import hashlib
import sys
import tracemalloc
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).parents[1] / "store"))
from streams import LINEAGE, SHAPE, STREAM, WHOLE, Kept, Sent  # noqa: E402

from kvguard import types  # noqa: E402
from kvguard.format import pages  # noqa: E402
from kvguard.format.messages import PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, CutOp, OpenOp, ReleaseOp, StreamShape  # noqa: E402
from kvguard.store.store import ReplicaStore  # noqa: E402
from kvguard.types import Fork, Span  # noqa: E402

TOKENS = SHAPE.block_tokens


class Life:
    """One sequence in the engine: its positions' contents are marks, its blocks (id, generation) pairs."""

    def __init__(self, name: str, no: int, generation: int) -> None:
        self.name, self.no, self.generation = name, no, generation
        self.marks: list[int] = []
        self.blocks: list[tuple[int, int]] = []
        self.sent = 0
        self.ids = 0


class StoreMachine(RuleBasedStateMachine):
    """An engine with few blocks (so they are reused) and a sender towards one store."""

    shape = SHAPE
    budget_pages = 14

    def __init__(self) -> None:
        super().__init__()
        self.shelf = self.new_shelf()
        self.store = self._store()
        self.sent = Sent(self.store, shape=self.shape)
        self.lives: dict[str, Life] = {}
        self.free = list(range(12))
        self.generations = [0] * 12
        self.users: dict[tuple[int, int], int] = {}
        self.counter = 0

    def new_shelf(self):
        return None

    def _store(self) -> ReplicaStore:
        return ReplicaStore(self.shelf, self.budget_pages * pages.page_bytes(self.shape), 0)

    # ---- the engine

    def _tick(self) -> int:
        self.counter += 1
        return self.counter

    def _drop_blocks(self, life: Life, keep: int) -> None:
        while len(life.blocks) > keep:
            block = life.blocks.pop()
            self.users[block] -= 1
            if not self.users[block]:
                del self.users[block]
                self.free.append(block[0])

    def _life(self, data) -> Life:
        return self.lives[data.draw(st.sampled_from(sorted(self.lives)))]

    def _bytes(self, life: Life, start: int, count: int) -> bytes:
        if self.shape.addressable:
            return b"".join(content(mark, self.shape.token_bytes) for mark in life.marks[start : start + count])
        first = start - start % TOKENS
        return content(hash(tuple(life.marks[first : start + count])), self.shape.block_bytes)

    def _forget_refused(self, refused) -> None:
        for no, reason in refused:
            assert "Try:" in reason or "block" in reason
            for life in [life for life in self.lives.values() if life.no == no]:
                self._drop_blocks(life, 0)
                del self.lives[life.name]

    @rule(name=st.sampled_from("abcdef"), count=st.integers(1, 9))
    def open(self, name: str, count: int) -> None:
        if name in self.lives:
            return
        life = self.lives[name] = Life(name, self._tick(), self._tick())
        life.ids = count
        refused, gap = self.sent.ids(OpenOp(life.no, name, life.generation, LINEAGE, b""), extend=((life.no, 0, range(count)),))
        assert gap == ""
        self._forget_refused(refused)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), count=st.integers(1, 6))
    def grow(self, data, count: int) -> None:
        life = self._life(data)
        refused, gap = self.sent.ids(extend=((life.no, life.ids, range(count)),))
        assert gap == ""
        life.ids += count
        self._forget_refused(refused)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), count=st.integers(1, 9), damage=st.booleans())
    def write(self, data, count: int, damage: bool) -> None:
        """The engine writes positions, the sender sends what is new, in pieces; a damaged frame first, perhaps."""
        life = self._life(data)
        while count and len(life.marks) < life.ids:
            if len(life.marks) % TOKENS == 0 and len(life.blocks) * TOKENS == len(life.marks):
                if not self.free:
                    break
                block = self.free.pop(0)
                self.generations[block] += 1
                life.blocks.append((block, self.generations[block]))
                self.users[life.blocks[-1]] = 1
            life.marks.append(self._tick())
            count -= 1
        pieces = self._pieces(life, life.sent)
        if not pieces:
            return
        if damage:
            refused, gap = self.sent.kv(*pieces, damage=len(pieces[0][1]) - 1)
            assert gap.startswith("checksum") and not refused
        refused, gap = self.sent.kv(*pieces)
        assert gap == ""
        life.sent = len(life.marks)
        self._forget_refused(refused)

    def _pieces(self, life: Life, start: int):
        pieces = []
        while start < len(life.marks):
            count = min(TOKENS - start % TOKENS, len(life.marks) - start)
            data = self._bytes(life, start, count)
            width = self.shape.token_bytes if self.shape.addressable else self.shape.block_bytes
            flag = PIECE_TOKENS if self.shape.addressable else PIECE_BLOCK
            block, generation = life.blocks[start // TOKENS]
            pieces.append(((life.no, start, count, block, generation, flag), data, pages.pack_sums(pages.sums_of(memoryview(data), width))))
            start += count
        return pieces

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), back=st.integers(0, 8))
    def repeat(self, data, back: int) -> None:
        """A duplicate, from any position on, changes nothing."""
        life = self._life(data)
        pieces = self._pieces(life, max(0, life.sent - back) if self.shape.addressable else life.sent - life.sent % TOKENS)
        if pieces and life.sent == len(life.marks):
            assert self.sent.kv(*pieces) == ((), "")

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def skip(self, data) -> None:
        """Positions beyond what is held are never taken."""
        life = self._life(data)
        piece = (life.no, life.sent + 1, 1, 0, 1, PIECE_REFERENCE)
        refused, gap = self.sent.kv((piece, b"", b""))
        assert gap and not refused

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), name=st.sampled_from("uvwxyz"))
    def share(self, data, name: str) -> None:
        """Another sequence starts with the whole blocks of one that is held."""
        parent = self._life(data)
        whole = parent.sent // TOKENS
        if name in self.lives or not whole:
            return
        life = self.lives[name] = Life(name, self._tick(), self._tick())
        life.blocks, life.marks, life.ids = parent.blocks[:whole], parent.marks[: whole * TOKENS], whole * TOKENS
        for block in life.blocks:
            self.users[block] += 1
        refused, gap = self.sent.ids(OpenOp(life.no, name, life.generation, LINEAGE, b""), extend=((life.no, 0, range(life.ids)),))
        self._forget_refused(refused)
        if name in self.lives:
            columns = [(life.no, n * TOKENS, TOKENS, block, generation, PIECE_REFERENCE) for n, (block, generation) in enumerate(life.blocks)]
            assert self.sent.kv(*((column, b"", b"") for column in columns)) == ((), "")
            life.sent = len(life.marks)

    @precondition(lambda self: self.lives)
    @rule(data=st.data(), keep=st.integers(0, 12))
    def cut(self, data, keep: int) -> None:
        life = self._life(data)
        keep = min(keep, len(life.marks))
        if len(life.marks) > keep and keep % TOKENS and self.users[life.blocks[keep // TOKENS]] > 1:
            keep -= keep % TOKENS  # a shared tail is copied before it is written
        del life.marks[keep:]
        self._drop_blocks(life, -(-keep // TOKENS))
        life.generation, life.ids, life.sent = self._tick(), min(life.ids, keep), min(life.sent, keep)
        if life.sent < keep:
            keep = life.ids = life.sent
            del life.marks[keep:]
        assert self.sent.ids(CutOp(life.no, keep, life.generation, LINEAGE)) == ((), "")

    @precondition(lambda self: self.lives)
    @rule(data=st.data())
    def release(self, data) -> None:
        life = self._life(data)
        self._drop_blocks(life, 0)
        del self.lives[life.name]
        assert self.sent.ids(ReleaseOp(life.no)) == ((), "")
        self.store.delivered("i", (types.Life(life.name),))
        self.store.expire()

    @rule()
    def reconnect(self) -> None:
        """A new session: everything is opened again under new numbers and goes on where it was."""
        self.sent = Sent(self.store, shape=self.shape, session=self._tick() + 1000)
        assert not self.sent.held.reason
        for life in self.lives.values():
            life.no = self._tick()
            assert self.sent.ids(OpenOp(life.no, life.name, life.generation, LINEAGE, b"")) == ((), "")

    # ---- what must be true

    @invariant()
    def shown_is_what_was_written(self) -> None:
        held = self.store.holding(STREAM)
        assert dict(zip(held.sequences, zip(held.generations, held.positions, held.ids, strict=True), strict=True)) == {
            life.name: (life.generation, life.sent, life.ids) for life in self.lives.values()
        }
        for life in self.lives.values():
            found = self.store.read(STREAM, life.name, Span(0, life.sent))
            if self.shape.addressable:
                assert found == self._bytes(life, 0, life.sent)
            assert self.store.verify(STREAM, life.name) == {life.name: life.sent}

    @invariant()
    def the_books_balance(self) -> None:
        self.store.check()
        assert self.store.budget.used + self.store.budget.retained <= self.store.budget.bytes_max

    def teardown(self) -> None:
        self.store.close()


def content(mark: int, size: int) -> bytes:
    return hashlib.shake_128(str(mark).encode()).digest(size)


class WholeBlocks(StoreMachine):
    """Tokens that aren't addressable: dirty blocks travel whole."""

    shape = WHOLE


class Restarted(StoreMachine):
    """The daemon dies between two frames and another one reads back what was kept: nothing that was held is lost."""

    def new_shelf(self) -> Kept:
        return Kept()

    @rule(slices=st.integers(1, 5))
    def restart(self, slices: int) -> None:
        self.store.close()
        self.store = self._store()
        assert self.store.read_back() == ()
        stated = sum(self.store.holding(STREAM).positions)
        assert stated == 0 or not any(life.sent for life in self.lives.values())
        while self.store.unchecked():
            self.store.check_some(slices * 20_000)
            held = self.store.holding(STREAM)
            assert all(held.positions[n] <= self.lives[name].sent for n, name in enumerate(held.sequences))
        assert not self.store.counters["positions_unsound"]
        self.reconnect()

    def teardown(self) -> None:
        super().teardown()
        self.shelf.close()


class RestartedWholeBlocks(Restarted):
    shape = WHOLE


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestWholeBlocks = WholeBlocks.TestCase
TestWholeBlocks.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


TestRestarted = Restarted.TestCase
TestRestarted.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestRestartedWholeBlocks = RestartedWholeBlocks.TestCase
TestRestartedWholeBlocks.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)


def test_metadata_stays_within_its_budget():
    """<= 512 bytes per sequence and 12 per page, beyond the ids (4 bytes each) and requests."""
    shape = StreamShape(1, 4, 8, 32, 20000, True)
    store = ReplicaStore(None, 1 << 30, 0)
    sent = Sent(store, shape=shape)
    sequences, blocks = 1000, 16
    key = b"\0" * 8 * 4
    sums = pages.pack_sums(pages.sums_of(memoryview(key), 8))
    sent.open(1_000_000, "warm", 4)
    tracemalloc.start()
    gc.collect()
    before = tracemalloc.get_traced_memory()[0]
    for n in range(sequences):
        opened = OpenOp(2_000_000 + n, f"sequence-{n:06d}", n + 1000, (Fork(*LINEAGE[0]),), b"")
        assert sent.ids(opened, extend=((opened.no, 0, range(4 * blocks)),)) == ((), "")
        del opened
        pieces = [((2_000_000 + n, b * 4, 4, n * blocks + b, 1, PIECE_TOKENS), key, sums) for b in range(blocks)]
        assert sent.kv(*pieces) == ((), "")
    gc.collect()  # the interpreter's own free lists are no metadata
    taken = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    ids = sequences * 4 * blocks * 4
    pages_held = sequences * blocks * 12

    assert taken - ids - pages_held <= 512 * sequences, (taken - ids - pages_held) / sequences
    assert (store.replica(STREAM).arena.refs.itemsize + store.replica(STREAM).arena.fill.itemsize) + 4 <= 12
    store.close()
