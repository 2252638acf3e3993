"""Writer, reader and adoption over numpy against the table's pure encoding: the same bytes, the same sense."""

from __future__ import annotations

import gc
import os
from collections import deque
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvguard.engine import batch as table_batch
from kvguard.engine import memory as table_memory
from kvguard.engine.look import Look, TableReader
from kvguard.engine.table import TableWriter
from kvguard.errors import Refused
from kvguard.format import rows as fmt
from kvguard.format import tape as form
from kvguard.format.lineage import forked
from tests.format.pure_table import GEOMETRY, PureTable, apply, content, new_memory
from tests.format.scripts import next_operation

SLOW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def perform(writer: TableWriter, operation: tuple) -> None:
    """What PureTable did, by the numpy writer; a tape's record is begun as the pure table begins it."""
    name, *arguments = operation
    if name == "complete":
        writer.header[fmt.WRITTEN_AT // 8] = arguments[0]
    elif name == "release":
        writer.release(*arguments)
    elif name == "truncate":
        row, position, epoch = arguments
        writer.truncate(row, position, None if epoch is None else forked(writer.meta(row).lineage, epoch, position))
    elif name == "open":
        row, sequence, epoch, request, writer.step, length, ids, blocks, sampler = arguments
        writer._free = deque([row])  # the pure table chose it
        assert writer.open(sequence, forked((), epoch, 0), request) == row
        writer.commit(row, length, ids, blocks, sampler)
    elif name == "tape":
        rows, writer.step, ids, blocks = arguments
        if writer.tape is not None and (tuple(writer.tape.rows.tolist()) != rows or writer.tape.count >= GEOMETRY.tape_steps):
            writer._settle()
        rows = np.array(rows)
        writer._checked, writer._plain = rows.tobytes(), True  # as after such a step that went the general way
        lengths = np.array([writer.accepted(row) + 1 for row in rows.tolist()])
        writer.commit_batch(rows, lengths, np.array(ids), {index: [block] for index, block in blocks})
        assert writer.tape is not None and writer.tape.staged is not None
    else:
        row, writer.step, length, ids, blocks, sampler = arguments
        writer.commit(row, length, ids, blocks, sampler)
    writer.publish()


def contents(memory) -> list:
    return [content(form.read_row(memory, GEOMETRY, row)) for row in range(GEOMETRY.rows)]


@SLOW
@given(st.data())
def test_rows_that_decode_together_read_the_same(data) -> None:
    """The same batch again and again, with blocks, lagging completion, rolled back steps and other operations in between."""
    table, writer = PureTable(), TableWriter.create(GEOMETRY)
    reader, mirror = TableReader(os.dup(writer.fd)), Mirror()
    for row in range(3):
        operation = ("open", row, f"s{row}", 0, b"request", 1, 2, (1, 2, 3), (4 * row,), b"")
        getattr(table, operation[0])(*operation[1:])
        perform(writer, operation)
    rows = np.array(data.draw(st.sampled_from([(0, 1, 2), (2, 0)])))
    for step in range(2, data.draw(st.integers(4, 16))):
        writer.step = step
        room = all(len(table.rows[row].ids) < GEOMETRY.ids_per_row for row in rows)
        blocks = {}
        for index, row in enumerate(rows.tolist()):
            listed = len(table.rows[row].blocks)
            if listed < 4 and data.draw(st.integers(0, 3)) == 0:
                blocks[index] = [4 * row + listed]
        slots = [4 * (len(table.rows[row].blocks) + (index in blocks)) for index, row in enumerate(rows.tolist())]
        lengths = [min(slot, len(table.rows[row].ids) + 1) for slot, row in zip(slots, rows.tolist(), strict=True)]
        ids = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(rows), max_size=len(rows)))
        if not room:
            with pytest.raises(ValueError, match="over the table's"):
                writer.commit_batch(rows, lengths, ids)
            break
        lengths, ids = np.array(lengths), np.array(ids)
        if data.draw(st.integers(0, 5)) == 0:
            writer.commit_batch(rows, lengths, ids, blocks)
            writer.roll_back()
            for block in sorted(block for listed in blocks.values() for block in listed):  # the pure table never staged them
                table.counter += 1
                table.block_generations[block] = table.counter
            assert contents(writer.views.body) == list(map(content, table.rows))
            continue
        writer.commit_batch(rows, lengths, ids, blocks)
        writer.publish()
        for index, row in enumerate(rows.tolist()):
            table.commit(row, step, int(lengths[index]), (int(ids[index]),), blocks.get(index, ()), None)
        done = data.draw(st.sampled_from([step, step, step - 1, None]))
        if done is not None and done > table.written:
            table.complete(done)
            perform(writer, ("complete", done))
        if data.draw(st.integers(0, 5)) == 0:
            operation = ("truncate", data.draw(st.integers(0, 2)), 2, None)
            table.truncate(*operation[1:])
            perform(writer, operation)
        assert contents(writer.views.body) == list(map(content, table.rows))
        if data.draw(st.booleans()):
            mirror.take(reader.look())
            mirror.check(table)
    mirror.take(reader.look())
    mirror.check(table)
    for n, row in enumerate(table.rows):
        start = data.draw(st.integers(0, len(row.ids)))
        assert reader.read_ids(n, start, len(row.ids)) == np.array(row.ids[start:], "<u4").tobytes()
    assert reader.torn == 0
    writer.close()


def test_usual_steps_are_records_on_a_tape(monkeypatch) -> None:
    """Step after step of one position and one id a row, with new blocks where a block ends; one of them rolled back while it is staged. Only the first goes the
    general way, and a tape that is full is followed by another."""
    writer = TableWriter.create(GEOMETRY)
    for row in range(3):
        perform(writer, ("open", row, f"s{row}", 0, b"request", 1, 2, (1, 2, 3), (4 * row,), b""))
    general = []
    stage = table_batch.stage
    monkeypatch.setattr(table_batch, "stage", lambda *given: general.append(given[0].step) or stage(*given))
    rows, reader, tapes = np.arange(3), TableReader(os.dup(writer.fd)), set()
    for step in range(2, 20):
        writer.step, length = step, step + 1
        blocks = {row: [4 * row + (length - 1) // 4] for row in range(3)} if (length - 1) % 4 == 0 and length < 17 else {}
        if length == 17:
            with pytest.raises(ValueError, match="beyond the block list"):
                writer.commit_batch(rows, np.full(3, length), np.arange(3) + step)
            assert contents(writer.views.body)[2].head.accepted == 16
            break
        if step == 7:
            writer.commit_batch(rows, np.full(3, length), np.arange(3) + step, blocks)
            writer.roll_back()
        writer.commit_batch(rows, np.full(3, length), np.arange(3) + step, blocks)
        assert contents(writer.views.body)[0].head.accepted == length - 1
        writer.publish()
        writer.header[fmt.WRITTEN_AT // 8] = step
        look = reader.look()
        assert look.rows == (0, 1, 2) and look.committed == (length,) * 3 and look.ids == (length + 1,) * 3 and reader.torn == 0
        assert [grown.blocks for grown in look.grown if grown.first] == [tuple(listed) for listed in blocks.values()]
        tapes.add(form.split_word(writer.header[fmt.TAPE_AT // 8])[0])
    assert general == [2, 17 - 1] and len(tapes) >= 3, (general, tapes)
    writer.close()


@pytest.mark.parametrize("what", ["ids", "lengths", "rows", "block", "twice"])
def test_a_wrong_step_ends_the_tape_and_changes_nothing(what: str) -> None:
    writer = TableWriter.create(GEOMETRY)
    for row in range(2):
        perform(writer, ("open", row, f"s{row}", 0, b"", 1, 2, (1, 2, 3), (row,), b""))
    rows, ids = np.arange(2), np.array([7, 8])
    for step, length in ((2, 3), (3, 4)):
        writer.step = step
        writer.commit_batch(rows, np.full(2, length), ids, {0: [4], 1: [5]} if step == 3 else None)
        writer.publish()
    assert writer.tape is not None and writer.tape.count == 1
    before, writer.step = contents(writer.views.body), 4
    wrong = {
        "ids": (rows, np.full(2, 5), np.array([1, -1]), None), "lengths": (rows, np.array([5, 3]), ids, None),
        "rows": (np.array([0, 2]), np.full(2, 5), ids, None), "block": (rows, np.full(2, 5), ids, {1: [99]}), "twice": (np.array([1, 1]), np.full(2, 5), ids, None),
    }[what]  # fmt: skip
    with pytest.raises(ValueError):
        writer.commit_batch(*wrong)
    writer.publish()
    assert contents(writer.views.body) == before
    writer.commit_batch(rows, np.full(2, 5), ids, None)
    writer.publish()
    assert [row.head.accepted for row in contents(writer.views.body)[:2]] == [5, 5]
    writer.close()


class Mirror:
    """What a core would know from looks alone."""

    def __init__(self) -> None:
        self.rows: dict[int, dict] = {}

    def take(self, look: Look) -> None:
        for row in look.released:
            del self.rows[row]
        for cut in look.cut:
            row = self.rows[cut.row]
            row.update(generation=cut.generation, lineage=cut.lineage, committed=min(row["committed"], cut.kept), ids=min(row["ids"], cut.kept))
            assert cut.blocks <= len(row["blocks"])
            del row["blocks"][cut.blocks :]
        for new in look.opened:
            assert new.row not in self.rows
            self.rows[new.row] = {
                "name": new.sequence, "generation": new.generation, "lineage": new.lineage, "request": new.request, "blocks": [], "committed": 0, "ids": 0,
            }  # fmt: skip
        for grown in look.grown:
            row = self.rows[grown.row]
            assert grown.first == len(row["blocks"])
            row["blocks"] += zip(grown.blocks, grown.generations, strict=True)
        for row, committed, ids in zip(look.rows, look.committed, look.ids, strict=True):
            assert committed >= self.rows[row]["committed"] and ids >= self.rows[row]["ids"]
            self.rows[row].update(committed=committed, ids=ids)

    def check(self, table: PureTable) -> None:
        """All that was published is known, and as committed what the heads say at least, the facts at most."""
        sure = expected(table)
        for n, row in self.rows.items():
            assert sure[n]["committed"] <= row["committed"] <= table.committed(n)
            sure[n]["committed"] = row["committed"]
        assert self.rows == sure


def expected(table: PureTable) -> dict[int, dict]:
    return {
        n: {
            "name": row.meta.name, "generation": row.head.generation, "lineage": row.meta.lineage, "request": row.meta.request,
            "blocks": list(zip(row.blocks, row.block_generations, strict=True)), "committed": fmt.committed(row.head, table.written), "ids": row.head.ids,
        }
        for n, row in enumerate(table.rows) if row.head.is_open
    }  # fmt: skip


@SLOW
@given(st.data())
def test_the_numpy_writer_makes_the_same_bytes_and_the_reader_sees_the_same_life(data) -> None:
    table, memory = PureTable(), new_memory()
    writer = TableWriter.create(GEOMETRY)
    reader = TableReader(os.dup(writer.fd))
    mirror = Mirror()
    for step in range(1, data.draw(st.integers(1, 14)) + 1):
        operation = next_operation(data.draw, table, step)
        apply(memory, getattr(table, operation[0])(*operation[1:]))
        perform(writer, operation)
        assert bytes(writer.views.body[fmt.PAGE_BYTES :]) == memory[fmt.PAGE_BYTES :]
        for word in (fmt.COUNTER_AT, fmt.TAPE_AT):
            assert bytes(writer.views.body[word : word + 8]) == memory[word : word + 8]
        if data.draw(st.booleans()):  # else the look is missed
            mirror.take(reader.look())
            mirror.check(table)
    mirror.take(reader.look())
    mirror.check(table)
    assert reader.torn == 0 and reader.look().is_empty
    for n, row in enumerate(table.rows):
        assert content(reader.read_row(n)) == content(row)
        if row.head.is_open:
            assert reader.read_ids(n, 0, len(row.ids)) == np.array(row.ids, "<u4").tobytes()
            assert (reader.sampler(n), reader.request(n)) == (row.head.sampler, row.meta.request)
            assert reader.row_generation(n) == row.head.generation
    writer.close()


@SLOW
@given(st.data())
def test_what_a_dead_writer_left_is_adopted_as_facts(data) -> None:
    """Any cut in program order: every row goes on from its last version, cut to what was committed, or is released; nothing raised goes back."""
    table, memory = PureTable(), new_memory()
    for step in range(1, data.draw(st.integers(1, 10)) + 1):
        before = list(table.rows)
        operation = next_operation(data.draw, table, step)
        stores = getattr(table, operation[0])(*operation[1:])
        cut = data.draw(st.integers(0, len(stores))) if step > 1 and data.draw(st.integers(0, 3)) == 0 else len(stores)
        apply(memory, stores[:cut])
        if cut < len(stores):
            break
    fd = table_memory.create(GEOMETRY)
    os.pwrite(fd, bytes(memory), 0)
    seen = [form.read_row(memory, GEOMETRY, row) for row in range(GEOMETRY.rows)]
    written = int.from_bytes(memory[fmt.WRITTEN_AT : fmt.WRITTEN_AT + 8], "little")
    reader = TableReader(os.dup(fd))
    mirror = Mirror()
    mirror.take(reader.look())
    raised = [reader.views.row_generations.copy(), reader.views.block_generations.copy()]
    writer = TableWriter.adopt(fd)
    assert writer.step >= written
    for n, row in enumerate(seen):
        assert content(row) in (content(before[n]), content(table.rows[n]))
        if row.head.is_open:
            moved = [place for place, block in enumerate(row.blocks) if int(raised[1][block]) != row.block_generations[place]]  # it died letting go of them
            fact = min([fmt.committed(row.head, written), *(place * GEOMETRY.block_tokens for place in moved)])
            assert writer.accepted(n) == fact and writer.meta(n) == row.meta
        else:
            assert n not in writer.sequences().values()
    assert (reader.views.row_generations >= raised[0]).all() and (reader.views.block_generations >= raised[1]).all()
    mirror.take(reader.look())
    assert {n: row["committed"] for n, row in mirror.rows.items()} == {n: writer.accepted(n) for n in writer.sequences().values()}
    for n in writer.sequences().values():  # and the adopted table is alive and sound
        row = reader.read_row(n)
        assert reader.read_ids(n, 0, len(row.ids)) == np.array(row.ids, "<u4").tobytes()
        assert row.head.generation == reader.row_generation(n)
        generations = reader.generations([n], row.blocks)[1]
        assert tuple(generations.tolist()) == row.block_generations
        writer.step += 1
        writer.release(n)
    mirror.take(reader.look())
    assert mirror.rows == {}
    writer.close()


def test_steps_in_flight_are_not_facts_for_the_adopter_either() -> None:
    writer = TableWriter.create(GEOMETRY)
    writer.step = 1
    row = writer.open("a", (), b"")
    writer.commit(row, 3, range(8), [0, 1])
    writer.publish()
    writer.header[fmt.WRITTEN_AT // 8] = 1
    for step in (2, 3):
        writer.step = step
        writer.commit(row, 3 + step)
        writer.publish()
    adopted = TableWriter.adopt(os.dup(writer.fd))
    assert adopted.accepted(row) == 3 and adopted.step == 3
    reader = TableReader(os.dup(adopted.fd))
    adopted.step = 4
    adopted.publish()
    adopted.header[fmt.WRITTEN_AT // 8] = 4
    assert reader.look().committed == (3,)


@pytest.mark.parametrize("where", ["tape", "entered", "counter", "step", "generation"])
def test_a_table_whose_numbers_are_used_up_is_refused_whole(where) -> None:
    """The dead process wrote over its own table: its standby ended in an OverflowError that nobody expected, and nobody was told."""
    writer = TableWriter.create(GEOMETRY)
    writer.step = 1
    writer.commit(writer.open("a", (), b""), 3, range(8), [0, 1])
    writer.publish()
    views = writer.views
    if where in ("step", "generation"):
        views.heads[0, 1, fmt.H_STEP if where == "step" else fmt.H_GENERATION] = (1 << 64) - 1
    else:
        views.words[{"tape": fmt.TAPE_AT, "entered": fmt.ENTERED_AT, "counter": fmt.COUNTER_AT}[where] // 8] = (1 << 64) - 1
    gc.collect()  # what earlier tests left counts for nobody
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Refused, match="used up"):
        TableWriter.adopt(os.dup(writer.fd))
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before
    writer.close()


def test_shared_blocks_rise_only_when_the_last_reference_goes() -> None:
    writer = TableWriter.create(GEOMETRY)
    writer.step = 1
    for name in ("a", "b"):
        writer.commit(writer.open(name, (), b""), 6, range(6), [4, 5 if name == "a" else 6])
    writer.publish()
    generations = writer.views.block_generations
    writer.release(writer.row("a"))
    assert generations[4] == 0 and generations[5] > 0
    writer.truncate(writer.row("b"), 4)
    assert generations[4] == 0 and generations[6] > generations[5]
    writer.truncate(writer.row("b"), 0)
    assert generations[4] > generations[6]
    writer.close()


def test_a_release_and_reuse_between_two_looks_is_not_growth() -> None:
    writer = TableWriter.create(GEOMETRY)
    reader = TableReader(os.dup(writer.fd))
    writer.step = 1
    row = writer.open("a", (), b"")
    writer.commit(row, 4, range(4), [0])
    writer.publish()
    reader.look()
    writer.release(row)
    writer._free = deque([row])
    assert writer.open("a", (), b"") == row
    writer.commit(row, 8, range(8), [0, 1])
    writer.publish()
    look = reader.look()
    assert look.released == (row,) and look.opened[0].row == row and look.grown[0].first == 0 and look.grown[0].generations[0] > 0


def test_what_an_engine_can_write_never_makes_a_look_raise() -> None:
    writer = TableWriter.create(GEOMETRY)
    reader = TableReader(os.dup(writer.fd))
    random = np.random.default_rng(3)
    for mended in (False, True):
        for _ in range(200):
            heads = random.integers(0, 2**64, writer.views.heads.shape, np.uint64)
            heads[:, :, : fmt.H_FLAGS + 1] >>= random.integers(0, 64, np.uint64(1), np.uint64)
            version = writer.views.selectors + np.uint64(1)
            heads[:, :, fmt.H_VERSION] = version[:, None]
            if mended:
                for half in range(2):
                    heads[:, half, fmt.H_SUM] = table_memory.head_sums(heads[:, half])
            writer.views.heads[:] = heads
            writer.views.meta[:] = random.integers(0, 2**64, writer.views.meta.shape, np.uint64)
            writer.views.selectors[:] = version
            reader.look()
    assert reader.torn > 0


def test_what_an_engine_can_write_on_a_tape_never_makes_a_look_raise() -> None:
    """Tapes with sound sums and any numbers in them, numbers that come back, records that change after they were read, columns of nobody."""
    writer, draw = TableWriter.create(GEOMETRY), Random(4)
    for row in range(3):
        perform(writer, ("open", row, f"s{row}", 0, b"", 1, 2, (1, 2, 3), (row,), b""))
    reader = TableReader(os.dup(writer.fd))
    reader.look()
    grown = got_on = 0
    for turn in range(600):
        number, count = draw.randrange(1, 4), draw.choice([0, 1, 3, 5, 6, 60000])
        if turn % 5 == 0:
            for row in range(3):
                head = writer.versions.heads[row : row + 1].copy()
                head[0, fmt.H_TAPE], head[0, fmt.H_COLUMN] = draw.randrange(4), draw.choice([0, 1, 2] * 9 + [3, 2**63, 2**64 - 1])
                writer.versions.publish(np.array([row]), head)
        for place in range(GEOMETRY.tape_steps):
            blocks = tuple(form.NewBlock(*map(draw.choice, ((0, 1, 2, 9), (0, 5, 11, 12), (0, 2**64 - 1)))) for _ in range(draw.randrange(2)))
            record = form.Record(draw.choice([turn, 2**64 - 1]), tuple(draw.choice([7, 8, 9, 2**32 - 1, 2**32]) for _ in range(draw.randrange(4))), blocks)
            for store in form.record_stores(GEOMETRY, number, place, record):
                writer.views.body[store.offset : store.offset + store.width] = store.value.to_bytes(store.width, "little")
        writer.header[fmt.TAPE_AT // 8] = form.tape_word(number, count)
        look = reader.look()
        grown, got_on = grown + len(look.grown), got_on + len(look.rows)
        for row in range(3):
            assert len(reader.read_ids(row, 0, 24)) <= 4 * 24
            assert (found := reader.read_row(row)) is None or found.head.accepted <= len(found.ids) <= 24
    assert reader.torn > 0 and grown > 0 and got_on > 0


@pytest.mark.parametrize("kind", ["unsealed", "short", "garbage", "pipe"])
def test_a_descriptor_that_is_no_table_is_refused_and_closed(kind: str) -> None:
    if kind == "pipe":
        fd, other = os.pipe()
        os.close(other)
    else:
        fd = os.memfd_create("x", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, fmt.areas(GEOMETRY).table_bytes if kind != "short" else 100)
        os.pwrite(fd, b"garbage" * 9 if kind == "garbage" else fmt.encode_header(GEOMETRY), 0)
    with pytest.raises(Refused):
        TableReader(fd)
    with pytest.raises(OSError):
        os.fstat(fd)
