"""A process that commits as fast as it can into the table of descriptor FD, until it is killed: `python -m tests.engine.fast_writer FD`.

It adopts what its predecessor left, checks that against `token_at`, and goes on.
"""

from __future__ import annotations

import sys

import numpy as np

from kvguard.engine.table import TableWriter
from kvguard.format import rows as fmt
from kvguard.format.rows import Geometry

ROWS = 32
GEOMETRY = Geometry(rows=ROWS, blocks=ROWS * 1024, blocks_per_row=1024, ids_per_row=16384, block_tokens=16)


def token_at(row: int, position):
    """Never 0, so that what was appended but not published shows in the memory."""
    return 1 + (row * 7919 + position) % 50000


def check(table: TableWriter) -> None:
    for name, row in table.sequences().items():
        ids = table.ids(row)
        assert (ids == token_at(int(name), np.arange(len(ids)))).all(), f"row {row} has ids that were never committed"
        assert table.accepted(row) <= len(ids)


def main(fd: int) -> None:
    table = TableWriter.adopt(fd)
    check(table)
    for number in range(ROWS):
        if str(number) not in table.sequences():
            table.commit(table.open(str(number), (), b""), 0, (), range(number * 1024, number * 1024 + 1024))
    table.publish()
    numbers = np.arange(ROWS)
    rows = np.array([table.row(str(number)) for number in range(ROWS)])
    for row, number in zip(rows, numbers, strict=True):  # ids that were appended for a step that never became a fact are written again
        table.truncate(int(row), table.accepted(int(row)), keep_blocks=1024)
    print("ready", flush=True)
    while True:
        known = np.array([table.accepted(int(row)) for row in rows])
        if known.max() > 16000:
            for row in rows.tolist():
                table.truncate(row, 0, keep_blocks=1024)
            table.views.ids[rows] = 0  # this test tells unpublished ids by their not being 0
            continue
        table.step += 1
        told = table.step >> 6 & 1 and table.step & 1  # every other while in turns, which no tape takes
        order = slice(None, None, -1) if told else slice(None)
        table.commit_batch(rows[order], known[order] + 1, token_at(numbers, known)[order])
        table.publish()
        table.header[fmt.WRITTEN_AT // 8] = table.step


if __name__ == "__main__":
    main(int(sys.argv[1]))
