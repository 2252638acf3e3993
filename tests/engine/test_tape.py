"""The writer's tape by itself: what its first record finds ready, what a step may list in what form, what it refuses."""

from __future__ import annotations

import os

import numpy as np
import pytest

from kvguard.engine.table import TableWriter
from kvguard.format import tape as form
from kvguard.format.rows import Geometry

GEOMETRY = Geometry(rows=64, blocks=64, blocks_per_row=8, ids_per_row=64, block_tokens=8)
ROWS = 8


@pytest.fixture
def writer():
    """Eight rows whose last two steps were of one position and one id each: a tape has one record."""
    writer = TableWriter.create(GEOMETRY)
    for row in range(ROWS):
        writer.step = 1
        writer.commit(writer.open(f"s{row}", (), b""), 2, (1, 2, 3), (row,))
    writer.publish()
    for step in (2, 3):
        commit(writer, step)
    assert writer.tape is not None and writer.tape.count == 1
    yield writer
    writer.close()


def commit(writer: TableWriter, step: int, blocks=None, ids=None) -> None:
    writer.step = step
    writer.commit_batch(np.arange(ROWS), np.full(ROWS, step + 1), np.arange(ROWS) + step if ids is None else ids, blocks)
    writer.publish()


def rows(writer: TableWriter) -> list:
    return [form.read_row(writer.views.body, GEOMETRY, row) for row in range(ROWS)]


def test_a_step_on_a_tape_finds_its_pages_there(writer) -> None:
    before = os.fstat(writer.fd).st_blocks
    for step in range(4, 8):
        commit(writer, step, {1: [20]} if step == 5 else None)
    commit(writer, 8, {row: [30 + row] for row in range(ROWS) if row != 1})
    assert writer.tape is not None and writer.tape.count == 6
    assert os.fstat(writer.fd).st_blocks == before


@pytest.mark.parametrize("kind", [int, np.int32, np.uint8, np.int64])
def test_columns_and_blocks_of_any_integer_type_say_the_same(writer, kind) -> None:
    commit(writer, 4, {kind(3): [kind(40), kind(41)], kind(6): np.array([42], kind)})
    assert writer.tape is not None and writer.tape.count == 2
    taped = rows(writer)
    assert [row.blocks for row in taped] == [(0,), (1,), (2,), (3, 40, 41), (4,), (5,), (6, 42), (7,)]
    assert writer.blocks(3) == [3, 40, 41]  # the tape ends here
    assert [row[1:] for row in rows(writer)] == [row[1:] for row in taped]
    assert [int(count) for count in writer.generations.references[[40, 41, 42, 43]]] == [1, 1, 1, 0]


@pytest.mark.parametrize("blocks", [{8: [40]}, {-9: [40]}, {2: [64]}, {2: [-1]}, {2: list(range(40, 48))}, {0: [40], 2: [1 << 40]}])
def test_blocks_that_cannot_be_are_refused_and_nothing_is_said(writer, blocks) -> None:
    before = rows(writer)
    with pytest.raises((ValueError, IndexError)):
        commit(writer, 4, blocks)
    writer.publish()
    assert rows(writer)[0].head.accepted == 4 and [row.blocks for row in rows(writer)] == [row.blocks for row in before]
    commit(writer, 4, {0: [50]})
    assert rows(writer)[0].blocks == (0, 50) and rows(writer)[7].head.accepted == 5


@pytest.mark.parametrize("wrong", [1 << 32, -1, 1 << 62])
def test_an_id_that_is_none_is_refused_and_the_tape_goes_on(writer, wrong) -> None:
    before = rows(writer)
    with pytest.raises(ValueError, match="token ids"):
        commit(writer, 4, {0: [50]}, np.array([7] * (ROWS - 1) + [wrong]))
    assert rows(writer) == before
    commit(writer, 4, {0: [50]}, np.full(ROWS, (1 << 32) - 1))
    assert writer.tape is not None and rows(writer)[7].ids[-1] == (1 << 32) - 1 and writer.tape.count == 2
