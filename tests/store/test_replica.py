"""The store, one behaviour at a time: what it shows is complete, verified, of one generation; what it can't keep it refuses whole."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from msgspec.structs import replace
from streams import EPOCH, LINEAGE, SHAPE, STREAM, WHOLE, Sent, token

from kvguard.errors import BadFrame, Fenced, Refused, Stale
from kvguard.format import pages
from kvguard.format.lineage import birth_of, life_of
from kvguard.format.messages import PIECE_REFERENCE, CutOp, OpenOp, PlanOrder, StreamShape
from kvguard.store.adoption import ARENA, INDEX
from kvguard.store.shelf import Files
from kvguard.store.store import ReplicaStore
from kvguard.types import Epoch, Fork, Life, Span

PAGE = pages.page_bytes(SHAPE)
PLENTY = 100 * PAGE
SUFFIXES = (ARENA, INDEX)


class Clock:
    now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture(params=["memfd", "directory"])
def make(request, tmp_path):
    made = []

    def build(budget=PLENTY, **more):
        made.append(ReplicaStore(None if request.param == "memfd" else Files(tmp_path, SUFFIXES), budget, 1000, **more))
        return made[-1]

    yield build
    for store in made:
        store.check()
        for stream in store.streams():
            store.drop(stream)
        store.close()
        assert (store.budget.used, store.budget.promised, store.budget.retained) == (0, 0, 0)
        assert list(tmp_path.iterdir()) == []


def positions(store) -> dict[str, int]:
    held = store.holding(STREAM)
    return dict(zip(held.sequences, held.positions, strict=True))


def expected(key: str, end: int) -> bytes:
    return b"".join(token(key, position) for position in range(end))


def test_what_was_sent_is_read_back_and_verified(make):
    store = make()
    sent = Sent(store)
    assert sent.open(1, "a", 10) == ((), "")
    assert sent.fill(1, "a", [5, 3, 9], 10) == ((), "")
    assert store.read(STREAM, "a", Span(0, 10)) == expected("a", 10)
    assert store.read(STREAM, "a", Span(3, 9)) == expected("a", 9)[3 * 24 :]
    assert store.verify(STREAM) == {"a": 10}
    assert [(kept.positions, kept.ids) for kept in store.list()] == [(10, 10)]
    with pytest.raises(Refused):
        store.read(STREAM, "a", Span(0, 11))


def test_a_duplicate_changes_nothing_and_a_gap_is_told(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 12)
    sent.fill(1, "a", [5, 3], 7)
    assert sent.kv(sent.piece(1, "other", 1, 3, 5)) == ((), "")
    assert sent.kv(sent.piece(1, "a", 4, 4, 3)) == ((), "")  # overlaps what is held, brings one more
    assert store.read(STREAM, "a", Span(0, 8)) == expected("a", 8)
    assert "held are 8" in sent.kv(sent.piece(1, "a", 9, 1, 6))[1]
    assert "not open" in sent.kv(sent.piece(2, "a", 0, 1, 6))[1]
    assert positions(store) == {"a": 8}


def test_a_damaged_payload_is_never_seen(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    refused, gap = sent.kv(sent.piece(1, "a", 0, 4, 5), sent.piece(1, "a", 4, 2, 6), damage=4 * 24 + 30)
    assert (refused, gap.startswith("checksum")) == ((), True)
    assert positions(store) == {"a": 4} and store.counters["checksum_failures"] == 1
    assert sent.kv(sent.piece(1, "a", 4, 2, 6)) == ((), "")
    assert store.read(STREAM, "a", Span(0, 6)) == expected("a", 6)


def test_frames_that_do_not_add_up_are_gaps(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    columns, data, sums = sent.piece(1, "a", 0, 4, 5)
    for broken in [(columns, data[:-1], sums), (columns, data, sums[:-8]), ((1, 0, 5, 5, 1, 0), data, sums), ((1, 2, 4, 5, 1, 0), data, sums),
                   ((1, 0, 4, 64, 1, 0), data, sums), ((1, 0, 4, -1, 1, 0), data, sums), ((1, 0, 4, 5, 1, 2), data, sums),
                   ((1, 0, -4, 5, 1, 0), b"", b"")]:  # fmt: skip
        refused, gap = sent.kv(broken)
        assert not refused and gap
    assert positions(store) == {"a": 0}
    assert "ids start at 9" in sent.ids(extend=((1, 9, [1]),))[1]


def test_a_shared_block_is_held_once(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    sent.open(2, "b", 8)
    sent.fill(1, "a", [5, 6], 8)
    assert sent.kv(sent.piece(2, "", 0, 4, 5, flag=PIECE_REFERENCE), sent.piece(2, "b", 4, 2, 7)) == ((), "")
    assert store.beat()[0][2] == 3 * PAGE
    sent.release(1)
    assert store.beat()[0][2] == 2 * PAGE
    assert store.read(STREAM, "b", Span(0, 6)) == expected("a", 4) + expected("b", 6)[4 * 24 :]
    assert "held are 2" in sent.kv(sent.piece(2, "", 6, 1, 7, flag=PIECE_REFERENCE))[1]
    assert positions(store) == {"b": 6}


def test_a_reference_to_what_is_not_held_is_a_gap(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    sent.open(2, "b", 8)
    sent.fill(1, "a", [5], 2)
    for piece in [(2, "", 0, 4, 5), (2, "", 0, 2, 6), (2, "", 0, 2, 5, 2)]:
        assert "isn't held" in sent.kv(sent.piece(*piece, flag=PIECE_REFERENCE))[1]
    assert positions(store) == {"a": 2, "b": 0}


def test_a_full_arena_refuses_a_whole_sequence_and_leaves_the_others(make):
    store = make(budget=3 * PAGE + 200)
    sent = Sent(store)
    assert sent.open(1, "a", 8) == ((), "")
    refused, gap = sent.open(2, "b", 8)  # two pages promised to "a", one left
    assert gap == "" and [no for no, _ in refused] == [2] and "Try:" in refused[0][1]
    assert sent.kv(sent.piece(2, "b", 0, 4, 9), sent.piece(1, "a", 0, 4, 5)) == ((), "")
    assert sent.open(3, "c", 4) == ((), "")
    assert sent.fill(3, "c", [6], 4) == ((), "")
    refused, gap = sent.ids(extend=((1, 8, range(8, 14)),))  # "a" grows beyond what is left: it goes as a whole
    assert gap == "" and [no for no, _ in refused] == [1]
    assert positions(store) == {"c": 4}
    assert sent.open(4, "b", 8) == ((), "") and sent.fill(4, "b", [5, 7], 8) == ((), "")
    store.check()


def test_a_reused_block_never_passes_for_the_old_one(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    sent.open(2, "b", 8)
    sent.fill(1, "a", [5, 6], 8)
    assert sent.kv(sent.piece(2, "b", 0, 4, 6, 2)) == ((), "")  # the engine gave block 6 to "b": what "a" had there is gone
    assert positions(store) == {"a": 4, "b": 4}
    assert "generation" in sent.kv(sent.piece(1, "a", 4, 4, 6, 1))[1]  # and late bytes of the old one stay out
    assert store.read(STREAM, "b", Span(0, 4)) == expected("b", 4)


def test_bytes_sent_before_a_cut_do_not_pass_for_those_after(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 12)
    sent.fill(1, "a", [5], 4)
    late = sent.ids_number
    sent.cut(1, 6, 2)
    sent.cut(1, 5, 3)
    assert sent.kv(sent.piece(1, "old", 4, 3, 6), requires=late) == ((), "")  # overtaken on its way: only position 4 still counts
    assert positions(store) == {"a": 5}
    sent.ids(extend=((1, 4, range(4, 12)),))
    assert sent.kv(sent.piece(1, "new", 5, 3, 6)) == ((), "")
    assert store.read(STREAM, "a", Span(4, 8)) == token("old", 4) + expected("new", 8)[5 * 24 :]
    sent.release(1)
    assert sent.kv(sent.piece(1, "old", 8, 1, 7), requires=late) == ((), "")  # released meanwhile: passed over


def test_a_cut_tail_is_written_anew_in_the_same_block_or_another(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    sent.fill(1, "a", [5, 6], 8)
    sent.cut(1, 6, 2)
    sent.ids(extend=((1, 6, [1, 2]),))
    assert sent.kv(sent.piece(1, "x", 6, 2, 6)) == ((), "")
    assert store.read(STREAM, "a", Span(0, 8)) == expected("a", 6) + expected("x", 8)[6 * 24 :]
    sent.cut(1, 6, 3)
    sent.ids(extend=((1, 6, [1, 2]),))
    assert sent.kv(sent.piece(1, "y", 4, 4, 9)) == ((), "")  # copied before written
    assert store.read(STREAM, "a", Span(4, 8)) == expected("y", 8)[4 * 24 :]
    assert store.verify(STREAM, "a") == {"a": 8}


def test_what_was_cut_is_given_back_and_can_not_be_referred_to(make):
    store = make(budget=3 * PAGE + 200)
    sent = Sent(store)
    sent.open(1, "a", 12)
    sent.fill(1, "a", [5], 4)
    assert sent.cut(1, 2, 2) == ((), "")
    assert (store.budget.used, store.budget.promised) == (PAGE + 2 * 4 + 1, 0)
    assert sent.open(2, "b", 8) == ((), "")  # what "a" gave back
    assert "isn't held" in sent.kv(sent.piece(2, "", 0, 4, 5, flag=PIECE_REFERENCE))[1]
    assert sent.kv(sent.piece(2, "", 0, 2, 5, flag=PIECE_REFERENCE)) == ((), "")


def test_held_positions_keep_their_bytes_whatever_overlaps_them(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 4)
    sent.fill(1, "a", [5], 2)
    assert sent.kv(sent.piece(1, "other", 0, 4, 5)) == ((), "")
    assert store.read(STREAM, "a", Span(0, 4)) == expected("a", 2) + expected("other", 4)[2 * 24 :]


def test_a_shared_tail_that_would_change_is_refused_not_overwritten(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 4)
    sent.open(2, "b", 4)
    sent.fill(1, "a", [5], 4)
    sent.kv(sent.piece(2, "", 0, 2, 5, flag=PIECE_REFERENCE))
    refused, gap = sent.kv(sent.piece(2, "b", 2, 1, 5))
    assert (gap, [no for no, _ in refused]) == ("", [2])
    assert store.read(STREAM, "a", Span(0, 4)) == expected("a", 4)
    assert positions(store) == {"a": 4}


def test_a_new_session_goes_on_below_the_fork_and_drops_other_generations(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    sent.open(2, "b", 8)
    sent.fill(1, "a", [5, 6], 8)
    sent.fill(2, "b", [7, 8], 8)
    again = Sent(store, session=2, epoch=Epoch(2, "c"))
    assert again.held.holding.positions == (8, 8)
    assert again.open(1, "a", 6, lineage=(*LINEAGE, Fork(2, 6))) == ((), "")
    assert again.open(2, "b", 8, generation=5) == ((), "")
    assert positions(store) == {"a": 6, "b": 0}
    assert "session is over" in sent.kv(sent.piece(1, "a", 8, 1, 9))[1]


def test_older_epochs_change_nothing(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 8)
    store.promise("i", Epoch(2, "c"))
    assert "fenced" in sent.fill(1, "a", [5], 4)[1] and "fenced" in sent.open(2, "b", 1)[1]
    assert Sent(store, session=3, epoch=Epoch(2, "another")).held.reason.startswith("fenced")
    with pytest.raises(Fenced):
        store.drop(STREAM, EPOCH)
    assert positions(store) == {"a": 0} and store.counters["stale_epoch"] == 4
    assert Sent(store, session=4, epoch=Epoch(2, "c")).held.reason == ""


def plan(epoch: int, **sequences) -> PlanOrder:
    """name=(position, ids)."""
    names = tuple(sequences)
    lineages = tuple((Fork(1, 0), Fork(epoch, p)) for p, _ in sequences.values())
    return PlanOrder(
        "i", Epoch(epoch, "c"), names, tuple(p for p, _ in sequences.values()), ("replica",) * len(names), lineages,
        tuple(n for _, n in sequences.values()), ("n",) * len(names), (STREAM,) * len(names), (), (), ("",) * len(names),
    )  # fmt: skip


def test_a_plan_cuts_once_and_answers_again(make):
    store = make()
    sent = Sent(store)
    for no, name in enumerate("ab", 1):
        sent.open(no, name, 8)
        sent.fill(no, name, [no * 2, no * 2 + 1], 8)
    store.promise("i", Epoch(2, "c"))
    order = plan(2, a=(5, 7))
    (known,) = store.carry_plan(order, "n")
    assert (known.sequence, len(known.ids), known.request) == ("a", 28, b"r")
    assert positions(store) == {"a": 5}
    again = Sent(store, session=2, epoch=Epoch(2, "c"))
    assert again.ids(*again_ops("a", order)) == ((), "")
    assert again.kv(again.piece(1, "new", 5, 2, 3)) == ((), "")
    assert store.carry_plan(order, "n") == (known,) and store.carry_plan(order, "other") == ()
    assert positions(store) == {"a": 7}
    store.promise("i", Epoch(3, "c"))
    with pytest.raises(Fenced):
        store.carry_plan(order, "n")


def test_a_plan_drops_what_bears_a_name_and_is_another_sequence(make):
    store = make()
    sent = Sent(store)
    for no, name in enumerate("abc", 1):
        sent.ids(OpenOp(no, name, 1, LINEAGE, b"" if name == "c" else b"request %d" % no), extend=((no, 0, range(8)),))
        sent.fill(no, name, [no * 2, no * 2 + 1], 8)
    assert store.holding(STREAM).births == (birth_of(b"request 1"), birth_of(b"request 2"), 0)
    store.promise("i", Epoch(2, "c"))
    order = replace(plan(2, a=(5, 7), b=(5, 7), c=(5, 7)), births=(birth_of(b"request 1"), birth_of(b"request 9"), birth_of(b"request 3")))
    assert [known.sequence for known in store.carry_plan(order, "n")] == ["a", "c"]
    assert positions(store) == {"a": 5, "c": 5} and store.counters["other_lives_dropped"] == 1


def again_ops(name, order):
    return OpenOp(1, name, 1, order.lineages[0], b""), CutOp(1, 7, 2, order.lineages[0])


def test_released_ids_stay_until_after_delivery(make):
    clock = Clock()
    store = make(clock=clock)
    sent = Sent(store)
    sent.open(1, "a", 8)
    sent.fill(1, "a", [5, 6], 8)
    sent.release(1)
    assert [(kept.released, kept.positions, kept.ids) for kept in store.list()] == [(True, 0, 8)]
    assert store.expire() == 0 and store.holding(STREAM).sequences == ()
    store.delivered("i", (Life("a"),))
    clock.now = 999
    assert store.expire() == 0
    clock.now = 1000
    assert store.expire() == 1 and store.list() == ()
    assert sent.open(2, "a", 4, generation=2) == ((), "")


def test_a_delivered_life_is_not_the_one_that_bears_its_name_now(make):
    """Emitters say what was delivered again with every session: the name may be another sequence's by then."""
    clock = Clock()
    store = make(clock=clock)
    sent = Sent(store)
    sent.open(1, "s", 4)
    sent.release(1)
    sent.ids(OpenOp(2, "s", 2, LINEAGE, b"another"), extend=((2, 0, range(6)),))
    store.delivered("i", (life_of("s", b"r"),))
    clock.now = 5000
    sent.release(2)
    assert store.expire() == 0 and [kept.ids for kept in store.list()] == [6], "undelivered, it stays"
    store.delivered("i", (life_of("s", b"another"),))
    clock.now = 5999
    assert store.expire() == 0
    clock.now = 6000
    assert store.expire() == 1 and store.list() == ()


def test_whole_blocks_where_tokens_are_not_addressable(make):
    store = make()
    sent = Sent(store, shape=WHOLE)
    sent.open(1, "a", 8)
    assert sent.kv(sent.piece(1, "a", 0, 3, 5)) == ((), "")
    assert sent.kv(sent.piece(1, "a", 3, 1, 5), sent.piece(1, "a", 4, 1, 6)) == ((), "")
    assert store.read(STREAM, "a", Span(0, 5)) == token("a@4", 0, 96) + token("a@5", 1, 96)
    assert sent.kv(sent.piece(1, "a", 5, 1, 6), damage=3)[1].startswith("checksum")
    assert store.verify(STREAM) == {"a": 5}
    sent.cut(1, 4, 2)
    assert positions(store) == {"a": 4}


def test_the_puller_sees_the_same_bytes_and_refuses_others(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 10)
    sent.fill(1, "a", [5, 3, 9], 10)
    descriptor, described = store.pages(STREAM)
    try:
        with pages.PageReader(descriptor, described.shape) as reader:
            assert described.positions[0] == 10
            found = [bytes(reader.page(*page)) for page in zip(described.blocks[0], described.generations[0], (4, 4, 2), strict=True)]
            assert b"".join(found) == expected("a", 10)
            with pytest.raises(Stale):
                reader.page(5, 2, 4)
            store.damage(STREAM, "a", 5)
            assert bytes(reader.page(3, 1, 4)) != expected("a", 8)[96:]  # the sum was changed too: only the pool can tell
            store._replicas[STREAM].arena._memory[9 * PAGE] ^= 1
            with pytest.raises(BadFrame, match="page 9: token 0"):
                reader.page(9, 1, 2)
            assert store.verify(STREAM) == {"a": 8}
    finally:
        os.close(descriptor)


def test_freed_memory_goes_back_when_the_budget_needs_it(make):
    big = StreamShape(1, 4, 16384, 65536, 64, True)  # large pages get their memory token by token
    size = pages.page_bytes(big)
    store = make(budget=8 * size + 1000)
    sent = Sent(store, shape=big)
    arena = store._replicas[STREAM].arena
    rounds = itertools.count(1)
    for base in (0, 8, 16, 24):
        no = next(rounds)
        assert sent.open(no, f"s{no}", 32) == ((), "")
        for n in range(8):
            data = token(f"s{no}", n, 65536)
            sums = pages.pack_sums(pages.sums_of(memoryview(data), 16384))
            assert sent.kv(((no, n * 4, 4, base + n, 1, 0), data, sums)) == ((), "")
        assert store.read(STREAM, f"s{no}", Span(0, 32)) == b"".join(token(f"s{no}", n, 65536) for n in range(8))
        assert store.verify(STREAM) == {f"s{no}": 32}
        on_disk = os.fstat(arena._descriptor).st_blocks * 512
        assert on_disk <= 10 * (size + 8192), on_disk
        sent.release(no)


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite"])
def test_a_full_tmpfs_refuses_the_sequence_whole(make, monkeypatch, call):
    big = StreamShape(1, 4, 16384, 65536, 64, True)
    store = make(budget=1 << 30)
    sent = Sent(store, shape=big)
    data = token("a", 0, 65536)
    sums = pages.pack_sums(pages.sums_of(memoryview(data), 16384))
    sent.open(1, "a", 8)
    sent.open(2, "b", 4)
    assert sent.kv(((1, 0, 4, 5, 1, 0), data, sums)) == ((), "")

    def full(*_):
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(f"kvguard.store.arena.os.{call}", full)
        refused, gap = sent.kv(((1, 4, 4, 6, 1, 0), data, sums))
    assert gap == "" and [no for no, _ in refused] == [1] and "Try: a larger tmpfs" in refused[0][1]
    assert sent.kv(((2, 0, 4, 6, 1, 0), data, sums)) == ((), "")
    assert positions(store) == {"b": 4} and store.beat()[0][2] == pages.page_bytes(big)


def test_shapes_out_of_bounds_are_refused(make):
    store = make()
    for sizes in [(0, 24, 96, 64), (4, 24, 97, 64), (4, 24, 96, 1 << 40), (1, 1 << 40, 1 << 40, 4)]:
        assert Sent(store, shape=StreamShape(1, *sizes)).held.reason
    assert store.streams() == ()
    Sent(store)
    assert "another shape" in Sent(store, shape=WHOLE, session=2).held.reason


@pytest.mark.parametrize("position, kept", [(0, 0), (5, 5), (9, 9)])
def test_what_the_sums_do_not_vouch_for_goes_and_can_be_sent_again(make, position, kept):
    """A byte that changed in memory is found by a pull; before anybody plans with this replica again, it says only what is whole."""
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 10)
    sent.fill(1, "a", [5, 6, 7], 10)
    assert sum(store.scrub(STREAM)) > 0 and not store.counters["positions_damaged"]
    store.damage(STREAM, "a", position, bytes_only=True)
    assert store.verify(STREAM) == {"a": position}
    assert sum(store.scrub(STREAM)) > 0 and store.counters["positions_damaged"] == 10 - kept
    assert store.holding(STREAM).positions == (kept,) and store.holding(STREAM).ids == (10,)
    again = Sent(store, session=2)
    again.open(1, "a", 10)
    again.fill(1, "a", [5, 6, 7], 10)
    assert store.verify(STREAM) == {"a": 10}


def test_a_doubted_replica_states_nothing_until_it_is_verified_and_then_what_holds(make):
    store = make()
    sent = Sent(store)
    sent.open(1, "a", 10)
    sent.fill(1, "a", [5, 6, 7], 10)
    store.damage(STREAM, "a", 6, bytes_only=True)
    assert store.recheck("nobody", None) == () and store.recheck(STREAM.instance, STREAM.rank._replace(tp=9)) == ()
    assert store.recheck(STREAM.instance, STREAM.rank) == (STREAM,) == store.recheck(STREAM.instance, None)
    assert store.holding(STREAM).positions == (0,) and store.unchecked(STREAM) == 1
    assert "Hello again" in sent.fill(1, "a", [5, 6, 7], 10)[1], "its session is over"
    while store.unchecked(STREAM):
        store.check_some(1)
    assert store.holding(STREAM).positions == (6,) and store.replica(STREAM).unsound == 4
    again = Sent(store, session=2)
    again.open(1, "a", 10)
    again.fill(1, "a", [5, 6, 7], 10)
    assert store.verify(STREAM) == {"a": 10}
    store.recheck(STREAM.instance, None)
    store.check_some(1 << 20)
    assert store.replica(STREAM).unsound == 0 and store.holding(STREAM).positions == (10,)
