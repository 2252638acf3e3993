"""Writer, reader and adoption over numpy against the table's pure encoding: the same bytes, the same sense."""

from __future__ import annotations

import os
from collections import deque

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvguard.engine import memory as table_memory
from kvguard.engine.batch import DecodeBatch
from kvguard.engine.look import Look, TableReader
from kvguard.engine.table import TableWriter
from kvguard.errors import Refused
from kvguard.format import rows as fmt
from kvguard.format.lineage import forked
from tests.format.pure_table import GEOMETRY, PureTable, apply, new_memory
from tests.format.scripts import next_operation

SLOW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def perform(writer: TableWriter, operation: tuple) -> None:
    """What PureTable did, by the numpy writer; decoding commits go as a batch."""
    name, *arguments = operation
    if name == "complete":
        writer._written[0] = arguments[0]
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
    else:
        row, writer.step, length, ids, blocks, sampler = arguments
        if len(ids) == 1 and not blocks and sampler is None:
            writer.commit_batch(np.array([row]), np.array([length]), np.array(ids))
        else:
            writer.commit(row, length, ids, blocks, sampler)
    writer.publish()


@SLOW
@given(st.data())
def test_rows_that_decode_together_make_the_same_bytes(data) -> None:
    """The same batch again and again, with blocks, lagging completion, rolled back steps and other operations in between."""
    table, memory, writer = PureTable(), new_memory(), TableWriter.create(GEOMETRY)
    reader, mirror = TableReader(os.dup(writer.fd)), Mirror()
    for row in range(3):
        operation = ("open", row, f"s{row}", 0, b"request", 1, 2, (1, 2, 3), (4 * row,), b"")
        apply(memory, getattr(table, operation[0])(*operation[1:]))
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
        if data.draw(st.integers(0, 5)) == 0:
            writer.commit_batch(rows, lengths, ids, blocks)
            writer.roll_back()
            for block in sorted(block for listed in blocks.values() for block in listed):  # the pure table never staged them
                table.counter += 1
                table.block_generations[block] = table.counter
            return_to = bytes(writer.views.body)
            assert all(fmt.read_row(return_to, GEOMETRY, row) == table.rows[row] for row in range(3))
            memory[:] = return_to  # what was appended but never visible stays
            continue
        writer.commit_batch(rows, lengths, ids, blocks)
        writer.publish()
        for index, row in enumerate(rows.tolist()):
            apply(memory, table.commit(row, step, lengths[index], (ids[index],), blocks.get(index, ()), None))
        done = data.draw(st.sampled_from([step, step, step - 1, None]))
        if done is not None and done > table.written:
            apply(memory, table.complete(done))
            perform(writer, ("complete", done))
        if data.draw(st.integers(0, 5)) == 0:
            operation = ("truncate", data.draw(st.integers(0, 2)), 2, None)
            apply(memory, table.truncate(*operation[1:]))
            perform(writer, operation)
        assert bytes(writer.views.body[64:]) == memory[64:]
        if data.draw(st.booleans()):
            mirror.take(reader.look())
            assert mirror.rows == expected(table)
    mirror.take(reader.look())
    assert mirror.rows == expected(table)
    writer.close()


def test_usual_steps_make_the_same_bytes(monkeypatch) -> None:
    """Step after step of one position and one id a row, with new blocks where a block ends; one of them rolled back while it is staged."""
    table, memory, writer = PureTable(), new_memory(), TableWriter.create(GEOMETRY)
    for row in range(3):
        operation = ("open", row, f"s{row}", 0, b"request", 1, 2, (1, 2, 3), (4 * row,), b"")
        apply(memory, getattr(table, operation[0])(*operation[1:]))
        perform(writer, operation)
    general = []
    whole = DecodeBatch._stage
    monkeypatch.setattr(DecodeBatch, "_stage", lambda *given: general.append(given[1]) or whole(*given))
    rows = np.arange(3)
    for step in range(2, 12):
        writer.step, length = step, step + 1
        blocks = {row: [4 * row + (length - 1) // 4] for row in range(3)} if (length - 1) % 4 == 0 else {}
        if step == 7:  # no new blocks: theirs would get new generations
            writer.commit_batch(rows, np.full(3, length), np.arange(3) + step, blocks)
            writer.roll_back()
        writer.commit_batch(rows, np.full(3, length), np.arange(3) + step, blocks)
        writer.publish()
        for row in range(3):
            apply(memory, table.commit(row, step, length, (row + step,), blocks.get(row, ()), None))
        apply(memory, table.complete(step))
        perform(writer, ("complete", step))
        assert bytes(writer.views.body[64:]) == memory[64:], f"step {step}"
    assert 0 < len(general) < 6, f"the steps {general} took the general way"
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
        assert bytes(writer.views.body[64:]) == memory[64:]
        if data.draw(st.booleans()):  # else the look is missed
            mirror.take(reader.look())
            assert mirror.rows == expected(table)
    mirror.take(reader.look())
    assert mirror.rows == expected(table) and reader.torn == 0 and reader.look().is_empty
    for n, row in enumerate(table.rows):
        assert reader.read_row(n) == row
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
    seen = [fmt.read_row(memory, GEOMETRY, row) for row in range(GEOMETRY.rows)]
    written = int.from_bytes(memory[fmt.WRITTEN_AT : fmt.WRITTEN_AT + 8], "little")
    reader = TableReader(os.dup(fd))
    mirror = Mirror()
    mirror.take(reader.look())
    raised = [reader.views.row_generations.copy(), reader.views.block_generations.copy()]
    writer = TableWriter.adopt(fd)
    assert writer.step >= written
    for n, row in enumerate(seen):
        assert row in (before[n], table.rows[n])
        if row.head.is_open:
            assert writer.accepted(n) == fmt.committed(row.head, written) and writer.meta(n) == row.meta
        else:
            assert n not in writer.sequences().values()
    assert (reader.views.row_generations >= raised[0]).all() and (reader.views.block_generations >= raised[1]).all()
    mirror.take(reader.look())
    assert {n: row["committed"] for n, row in mirror.rows.items()} == {n: writer.accepted(n) for n in writer.sequences().values()}
    for n in writer.sequences().values():  # and the adopted table is alive and sound
        row = reader.read_row(n)
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
    writer._written[0] = 1
    for step in (2, 3):
        writer.step = step
        writer.commit(row, 3 + step)
        writer.publish()
    adopted = TableWriter.adopt(os.dup(writer.fd))
    assert adopted.accepted(row) == 3 and adopted.step == 3
    reader = TableReader(os.dup(adopted.fd))
    adopted.step = 4
    adopted.publish()
    adopted._written[0] = 4
    assert reader.look().committed == (3,)


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
