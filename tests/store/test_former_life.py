"""What a daemon that dies leaves of its replicas, and what the next one makes of it: everything that was acknowledged, or nothing that can't be proved (I1, I11)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
from streams import EPOCH, LINEAGE, SHAPE, STREAM, WHOLE, Kept, Sent, token

from kvguard.format import pages
from kvguard.format.lineage import birth_of
from kvguard.format.messages import PIECE_REFERENCE, CutOp, Hello, OpenOp, PlanOrder
from kvguard.store.adoption import ARENA, INDEX
from kvguard.store.index import REGION_BYTES, Head, Index, Loaded, Record, Unreadable
from kvguard.store.shelf import Files, on_tmpfs
from kvguard.store.store import ReplicaStore, name_of
from kvguard.types import Epoch, Fork, Life, Span

PAGE = pages.page_bytes(SHAPE)
PLENTY = 100 * PAGE
MARK = b"this boot"


@pytest.fixture
def shelf():
    made = Kept()
    yield made
    made.close()


@pytest.fixture
def life(shelf):
    """Lives of one daemon, one after the other."""
    lives = []

    def next_life(checked: bool = True, budget: int = PLENTY, owner: bytes = MARK, **more) -> ReplicaStore:
        if lives:
            lives[-1].close()
        lives.append(ReplicaStore(shelf, budget, 1000, owner=owner, **more))
        lives[-1].dropped = lives[-1].read_back()
        while checked and lives[-1].unchecked():
            lives[-1].check_some(1 << 20)
        lives[-1].check()
        return lives[-1]

    yield next_life
    if lives:
        lives[-1].close()


def state(store) -> dict:
    held = store.holding(STREAM)
    return {name: columns for name, *columns in zip(held.sequences, held.generations, held.lineages, held.positions, held.ids, strict=True)}


def filled(store, shape=SHAPE) -> Sent:
    sent = Sent(store, shape=shape)
    for no, name in enumerate("abc", 1):
        sent.open(no, name, 10)
        assert sent.fill(no, name, [no * 3, no * 3 + 1, no * 3 + 2], 10) == ((), "")
    return sent


def test_everything_that_was_held_is_held_again(life):
    former = life()
    sent = filled(former)
    sent.open(4, "d", 8)
    sent.kv(sent.piece(4, "", 0, 4, 3, flag=PIECE_REFERENCE), sent.piece(4, "d", 4, 2, 20))
    sent.cut(2, 6, 2, (Fork(1, 0), Fork(3, 6)))
    sent.release(3)
    descriptor, described = former.pages(STREAM)
    os.close(descriptor)
    before = state(former), former.list(), described, former.budget.used, former.budget.promised
    store = life()
    assert store.dropped == () and store.counters["replicas_read_back"] == 1 and store.counters["positions_read_back"] == 22
    descriptor, described = store.pages(STREAM)
    os.close(descriptor)
    assert (state(store), store.list(), described, store.budget.used, store.budget.promised) == before
    assert store.verify(STREAM) == {"a": 10, "b": 6, "d": 6}
    assert store.read(STREAM, "d", Span(0, 6)) == b"".join(token("a" if n < 4 else "d", n) for n in range(6))
    again = Sent(store, session=9)
    assert again.ids(OpenOp(1, "a", 1, LINEAGE, b""), extend=((1, 10, [7, 8]),)) == ((), "")
    assert again.kv(again.piece(1, "a", 10, 2, 5)) == ((), "")
    assert store.read(STREAM, "a", Span(0, 12)) == b"".join(token("a", n) for n in range(12))


def test_nothing_is_stated_before_it_was_verified(life):
    filled(life())
    store = life(checked=False)
    assert store.unchecked(STREAM) == store.unchecked(instance="i") == 3 and store.unchecked(instance="other") == 0
    assert [one[2] for one in state(store).values()] == [0, 0, 0] and [one[3] for one in state(store).values()] == [10, 10, 10]
    assert store.beat()[0][1] == 0
    with pytest.raises(AssertionError):
        Sent(store, session=4)
    while store.unchecked():
        stated = [one[2] for one in state(store).values()]
        through = store.check_some(1)
        assert sum(one[2] for one in state(store).values()) >= sum(stated)
        assert through == (() if store.unchecked() else (STREAM,))
    assert [one[2] for one in state(store).values()] == [10, 10, 10] and store.beat()[0][1] == 3


def test_a_plan_counts_once_whatever_life_carries_it_out(life):
    filled(life())
    store = life()
    store.promise("i", Epoch(2, "c"))
    order = PlanOrder(
        "i", Epoch(2, "c"), ("a",), (5,), ("replica",), ((Fork(1, 0), Fork(2, 5)),), (7,), ("n",), (STREAM,), (), (), ("",)
    )  # fmt: skip
    assert [known.sequence for known in store.carry_plan(order, "n")] == ["a"]
    again = Sent(store, session=9, epoch=Epoch(2, "c"))
    again.ids(OpenOp(1, "a", 1, order.lineages[0], b""), CutOp(1, 7, 2, order.lineages[0]))
    assert again.kv(again.piece(1, "new", 5, 2, 4)) == ((), "")
    store = life()
    store.promise("i", Epoch(2, "c"))
    store.carry_plan(order, "n")
    assert {name: one[2] for name, one in state(store).items()} == {"a": 7}


def test_a_life_of_the_daemon_knows_which_sequences_bear_the_names(life):
    former = life()
    sent = filled(former)
    sent.ids(OpenOp(4, "d", 1, LINEAGE, b"another request"))
    births = former.holding(STREAM).births
    assert births == (*(birth_of(b"r"),) * 3, birth_of(b"another request"))
    former.close()
    assert life().holding(STREAM).births == births


def test_released_ids_go_after_delivery_also_in_another_life(life):
    class Clock:
        now = 5000

        def __call__(self) -> int:
            return self.now

    clock = Clock()
    store = life(clock=clock)
    sent = filled(store)
    sent.release(1)
    sent.release(2)
    store.delivered("i", (Life("a"),))
    clock.now = 9000
    store = life(clock=clock)
    assert {(kept.sequence, kept.released) for kept in store.list()} == {("a", True), ("b", True), ("c", False)}
    assert store.expire() == 0
    clock.now = 10_000
    assert store.expire() == 1
    store = life(clock=clock)
    assert {kept.sequence for kept in store.list()} == {"b", "c"}


def test_another_owners_replicas_are_dropped(life, shelf):
    filled(life())
    store = life(owner=b"another boot")
    assert [reason for _, reason in store.dropped] == ["version 1 of another owner"]
    assert store.streams() == () and shelf.held == {} and store.counters["replicas_unreadable"] == 1


@pytest.mark.parametrize("suffix", [ARENA, INDEX])
def test_half_a_replica_is_dropped(life, shelf, suffix):
    filled(life())
    shelf.remove(name_of(STREAM) + suffix)
    store = life()
    assert [reason for _, reason in store.dropped] == ["its other half is missing"] and shelf.held == {}


def test_the_arena_of_another_life_of_the_stream_is_not_taken(life, shelf):
    filled(life())
    other = ReplicaStore(Kept(), PLENTY, 0)
    filled(other)
    arena = name_of(STREAM) + ARENA
    os.dup2(other._shelf.held[arena], shelf.held[arena])
    assert [reason for _, reason in life().dropped] == ["its arena is another one"]
    other.close()
    other._shelf.close()


def test_a_smaller_budget_keeps_whole_sequences(life):
    filled(life())
    store = life(budget=7 * PAGE)
    assert {name: one[2] for name, one in state(store).items()} == {"a": 10, "b": 10}
    assert store.verify(STREAM) == {"a": 10, "b": 10}


@pytest.mark.parametrize("shape", [SHAPE, WHOLE])
def test_damaged_pages_are_cut_and_sent_again(life, shape):
    former = life()
    filled(former, shape)
    former._replicas[STREAM].arena._memory[7 * pages.page_bytes(shape) + 24] ^= 1  # second slot of b's second block
    store = life()
    cut = 5 if shape.addressable else 4
    assert {name: one[2] for name, one in state(store).items()} == {"a": 10, "b": cut, "c": 10}
    assert store.counters["positions_unsound"] == 10 - cut
    again = Sent(store, session=9, shape=shape)
    again.ids(OpenOp(1, "b", 1, LINEAGE, b""))
    assert again.kv(again.piece(1, "b", cut, 8 - cut, 7), again.piece(1, "b", 8, 2, 8)) == ((), "")
    assert store.verify(STREAM) == {"a": 10, "b": 10, "c": 10}


def test_a_page_that_was_taken_over_is_no_longer_the_former_ones(life):
    """Death between the overwriting and its record: the bytes and their sums hold, but they are another sequence's."""
    former = life()
    sent = filled(former)
    former._record = lambda replica: None  # the process dies before it writes anything down
    sent.open(4, "d", 4)
    assert sent.kv(sent.piece(4, "d", 0, 4, 4, 2)) == ((), "")  # the engine reused a's second block
    store = life()
    assert {name: one[2] for name, one in state(store).items()} == {"a": 4, "b": 10, "c": 10}
    assert store.read(STREAM, "a", Span(0, 4)) == b"".join(token("a", n) for n in range(4))


def test_a_log_that_ends_anywhere_reads_as_it_was_after_a_record(life, shelf):
    """Cut at every byte of its last records, and with garbage instead: what is read is one of the states that were recorded, never a mixture."""
    store = life()
    sent = Sent(store)
    log, states, ends = shelf.held[name_of(STREAM) + INDEX], [], []

    def seen() -> None:
        states.append(state(store))
        ends.append(store._replicas[STREAM].index._at)

    seen()
    sent.open(1, "a", 10)
    seen()
    sent.fill(1, "a", [5, 6, 7], 10)
    seen()
    sent.cut(1, 5, 2)
    seen()
    sent.kv(sent.piece(1, "x", 5, 0 + 1, 6))
    sent.ids(extend=((1, 5, [1, 2, 3]),))
    seen()
    store.close()
    whole = os.pread(log, ends[-1], 0)
    random = Random(7)
    for end in range(ends[0], ends[-1]):
        os.pwrite(log, whole[:end] + random.randbytes(len(whole) - end), 0)
        found = Loaded(log, MARK)
        now = {one.life.name: [one.life.generation, one.life.lineage, one.position, len(one.ids) // 4] for one in found.sequences.values()}
        if now not in states:
            assert end > ends[3] and now["a"][2:] == [6, 5]  # the frame in between: its ids come with the next record
    os.pwrite(log, whole, 0)
    for bit in random.sample(range(8 * len(whole)), 400):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        os.pwrite(log, damaged, 0)
        try:
            found = Loaded(log, MARK)
        except Unreadable:
            assert bit // 8 < ends[0]
            continue
        assert len(found.sequences) <= 1
    os.pwrite(log, whole, 0)


def test_of_two_regions_the_newer_whole_one_counts(shelf):
    shelf.create("x.index")
    log = shelf.held["x.index"]
    index = Index(os.dup(log), Head(1, MARK, STREAM, SHAPE, 1))
    index.rewrite(Record(carried=Epoch(1, "c")))
    index.append(Record(carried=Epoch(2, "c")))
    former = os.pread(log, index._at, 0)
    index.rewrite(Record(carried=Epoch(3, "c")))
    newer = os.pread(log, index._at - REGION_BYTES, REGION_BYTES)
    index.close()
    assert Loaded(log, MARK).carried == Epoch(3, "c")
    os.pwrite(log, former, 0)  # death before the old region went
    assert Loaded(log, MARK).carried == Epoch(3, "c")
    os.pwrite(log, newer[:-1] + b"\0", REGION_BYTES)  # death while the new one was written
    assert Loaded(log, MARK).carried == Epoch(2, "c")
    os.pwrite(log, b"\0" * len(former), 0)
    with pytest.raises(Unreadable, match="no readable log"):
        Loaded(log, MARK)


def test_the_log_is_written_anew_when_it_has_doubled(life, shelf, monkeypatch):
    monkeypatch.setattr("kvguard.store.index.REWRITE_BYTES_MIN", 500)
    store = life()
    sent = Sent(store)
    sent.open(1, "a", 4)
    regions = set()
    for n in range(200):
        sent.ids(extend=((1, 4 + n, [n]),))
        regions.add(store._replicas[STREAM].index._region)
    assert regions == {0, 1}
    log = shelf.held[name_of(STREAM) + INDEX]
    assert os.fstat(log).st_blocks * 512 <= 2 * 4096
    assert life().list()[0].ids == 204


def test_an_index_without_memory_is_given_up_not_trusted(life, monkeypatch):
    store = life()
    sent = filled(store)
    with monkeypatch.context() as patched:
        patched.setattr("kvguard.store.index.os.pwrite", lambda *_: 0)
        assert sent.ids(extend=((1, 10, [1]),)) == ((), "")
    assert store.counters["indexes_broken"] == 1
    assert sent.ids(extend=((1, 11, [1]),)) == ((), "") and state(store)["a"][3] == 12
    assert [reason for _, reason in life().dropped] == ["there is no readable log in it"]


def test_files_are_this_users_alone_and_only_memory(tmp_path):
    assert on_tmpfs("/dev/shm") and not on_tmpfs("/proc")
    store = ReplicaStore(Files(tmp_path, (ARENA, INDEX)), PLENTY, 0)
    filled(store)
    (tmp_path / "kvguard.sock").touch()
    (tmp_path / f"{'0' * 16}{ARENA}").symlink_to("/dev/null")
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name.startswith(name_of(STREAM))) == [ARENA, INDEX]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in tmp_path.glob(f"{name_of(STREAM)}*"))
    store.close()
    again = ReplicaStore(Files(tmp_path, (ARENA, INDEX)), PLENTY, 0)
    assert again.read_back() == () and again.unchecked() == 3
    again.drop(STREAM)
    again.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{'0' * 16}{ARENA}", "kvguard.sock"]


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from streams import SHAPE, STREAM, Sent, token
from kvguard.format.messages import CutOp
from kvguard.store.adoption import ARENA, INDEX
from kvguard.store import index
from kvguard.store.shelf import Files
from kvguard.store.store import ReplicaStore
index.REWRITE_BYTES_MIN = 4000
sent = Sent(ReplicaStore(Files(sys.argv[1], (ARENA, INDEX)), 1 << 20, 0))
generation = 0
print("ready", flush=True)
while True:
    generation += 1
    for no, name in ((2 * generation, "a"), (2 * generation + 1, "b")):
        key = f"{name}{generation}"
        assert sent.open(no, name, 12, generation) == ((), "")
        for at in range(12):
            assert sent.kv(sent.piece(no, key, at, 1, (at // 4) * 2 + no % 2, generation)) == ((), "")
            if at == 8:
                print(f"{key} 9", flush=True)
"""


def test_killed_in_the_middle_of_writing(tmp_path):
    """SIGKILL at any moment: what was said to be held is held; every byte is its generation's."""
    random = Random(3)
    for run in range(6):
        directory = tmp_path / str(run)
        directory.mkdir()
        command = [sys.executable, "-c", WRITER, str(directory), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            said = [process.stdout.readline() for _ in range(random.randrange(1, 60))][-1].split()[0]
            process.send_signal(signal.SIGKILL)
            process.communicate()
        store = ReplicaStore(Files(directory, (ARENA, INDEX)), 1 << 20, 0)
        assert store.read_back() == () and store.unchecked() >= 1
        while store.unchecked():
            store.check_some(1000)
        store.check()
        held = store.holding(STREAM)
        assert store.counters["positions_unsound"] == 0
        for name, generation, position in zip(held.sequences, held.generations, held.positions, strict=True):
            assert generation >= int(said[1:]) - (name != said[0]) and position <= 12
            assert store.read(STREAM, name, Span(0, position)) == b"".join(token(f"{name}{generation}", n) for n in range(position))
        assert store.probe(Hello(STREAM, 99, EPOCH, "n", SHAPE)).reason == ""
        store.drop(STREAM)
        store.close()
        assert list(directory.iterdir()) == []


def test_what_is_kept_under_another_name_is_dropped(tmp_path):
    """Files that somebody renamed were an assertion at every start of the daemon."""
    former = ReplicaStore(Files(tmp_path, (ARENA, INDEX)), PLENTY, 1000, owner=MARK)
    filled(former)
    former.close()
    for suffix in (ARENA, INDEX):
        (tmp_path / (name_of(STREAM) + suffix)).rename(tmp_path / ("moved" + suffix))
    latter = ReplicaStore(Files(tmp_path, (ARENA, INDEX)), PLENTY, 1000, owner=MARK)
    [dropped] = latter.read_back()
    assert dropped.name == "moved" and "another's name" in dropped.reason and not latter.streams() and not list(tmp_path.iterdir())
    latter.close()
