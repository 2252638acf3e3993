"""Captures from a real pool and a real commit table: right bytes, right sums, and nothing of what was reused meanwhile."""

from __future__ import annotations

import struct

import pytest
import xxhash

from kvguard.core import effects, events
from kvguard.daemon import capture as capturing
from kvguard.format.layout import Layout
from kvguard.format.messages import PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, IdsFrame
from kvguard.types import Epoch, Rank, StreamId

ID = StreamId("llama", Rank(0, 1, 0), 7)
BLOCKS, TOKENS = 8, 4


@pytest.fixture
def life(make_life):
    return make_life(Layout.paged("m", "float32", 2, BLOCKS, TOKENS, 2, 4))


def canonical(life, block, slot):
    memory = bytes(life.pool.memory)
    return b"".join(memory[start : start + size] for start, size in life.pool.layout.ranges(block, slot))


def test_tokens_and_sums(life):
    row = life.commit("a", 6, range(6), [5, 2])
    data, stale, sums = capturing.capture(life.stream, life.order([(row, 1, 3, 5, PIECE_TOKENS), (row, 4, 2, 2, PIECE_TOKENS), (row, 0, 1, 5, PIECE_REFERENCE)]))
    wanted = [canonical(life, 5, 1), canonical(life, 5, 2), canonical(life, 5, 3), canonical(life, 2, 0), canonical(life, 2, 1)]
    assert bytes(data) == b"".join(wanted)
    assert stale == ()
    assert struct.unpack("<5Q", sums) == tuple(xxhash.xxh3_64_intdigest(one) for one in wanted)


def test_stale_before(life):
    row = life.commit("a", 6, range(6), [5, 2])
    other = life.commit("b", 2, range(2), [3])
    order = life.order([(row, 0, 4, 5, PIECE_TOKENS), (other, 0, 2, 3, PIECE_TOKENS), (row, 0, 4, 5, PIECE_REFERENCE)])
    life.writer.release(row)
    data, stale, sums = capturing.capture(life.stream, order)
    assert stale == (0, 2)
    assert bytes(data) == canonical(life, 3, 0) + canonical(life, 3, 1)
    assert len(sums) == 16


def test_reused_while_it_is_copied(life):
    """The checksum would hold over the wrong content: only the generation read after the copy tells."""
    rows = [life.commit(name, 2, range(2), [block]) for name, block in (("a", 1), ("b", 3), ("c", 6))]
    order = life.order([(row, 0, 2, block, PIECE_TOKENS) for row, block in zip(rows, (1, 3, 6), strict=True)])

    class Reusing:
        def capture(self, blocks, starts, counts, out):
            life.writer.release(rows[1])
            return life.pool.capture(blocks, starts, counts, out)

    life.stream.pool = Reusing()
    data, stale, sums = capturing.capture(life.stream, order)
    assert stale == (1,)
    assert bytes(data) == b"".join(canonical(life, block, slot) for block in (1, 6) for slot in (0, 1))
    assert len(sums) == 4 * 8


def test_whole_blocks_where_tokens_are_not_addressable(make_life):
    life = make_life(Layout.opaque("m", "packed", 2, BLOCKS, TOKENS, 96))
    row = life.commit("a", 6, range(6), [5, 2])
    data, stale, sums = capturing.capture(life.stream, life.order([(row, 4, 2, 2, PIECE_BLOCK)]))
    assert bytes(data) == canonical(life, 2, 0)
    assert (stale, struct.unpack("<Q", sums)) == ((), (xxhash.xxh3_64_intdigest(data),))


def test_ids_of_rows_that_moved_on_are_left_out(life):
    a, b = life.commit("a", 3, [7, 8, 9], [1], b"sampler"), life.commit("b", 2, [4, 5], [2])
    life.look()
    generations = tuple(int(life.stream.table.row_generation(row)) for row in (a, b))
    frame = IdsFrame(1, Epoch(1, "c"), 5, (), (10, 11), (1, 0), (2, 2), after_kv=3)
    life.writer.truncate(b, 1)
    found = capturing.filled(life.stream, effects.SendIds("peer:x", frame, ID, (a, b), generations))
    assert (found.nos, found.starts, found.counts) == ((10,), (1,), (2,))
    assert (found.ids, found.samplers, found.sampler_bytes) == (struct.pack("<2I", 8, 9), b"sampler", (7,))
    assert (found.number, found.after_kv) == (5, 3)


def test_facts_follow_the_looks(life):
    a = life.commit("a", 3, [7, 8, 9], [1], b"s")
    b = life.commit("b", 2, [4, 5], [2])
    assert isinstance(life.look().opened[0], events.Opened)
    life.commit("a", 4, [10], [])
    life.writer.truncate(b, 1)
    life.look()
    held = life.facts.holding(life.stream)
    assert (held.kind, held.alive, held.sequences, held.positions, held.ids) == ("pool", True, ("a", "b"), (4, 1), (4, 1))
    assert held.fingerprint == life.pool.layout.fingerprint
    [known] = life.facts.known(life.stream, ("a", "gone"), (2, 1))
    assert (known.sequence, known.ids, known.sampler, known.request) == ("a", struct.pack("<2I", 7, 8), b"s", b"request")
    life.writer.release(a)
    life.look()
    assert life.facts.holding(life.stream).sequences == ("b",)


def test_of_a_dead_engine_s_pool_only_what_was_salvaged_is_read(life):
    """Elsewhere it holds zeros, under generations that still count: they were sent with sums that held."""
    kept, other = life.commit("a", 2, range(2), [1]), life.commit("b", 2, range(2), [3])
    life.stream.kept = frozenset({kept})
    data, stale, _ = capturing.capture(life.stream, life.order([(kept, 0, 2, 1, PIECE_TOKENS), (other, 0, 2, 3, PIECE_TOKENS)]))
    assert (bytes(data), stale) == (canonical(life, 1, 0) + canonical(life, 1, 1), (1,))
