"""Random but sound lives of a commit table: operations that an engine could make, one after another."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.format.pure_table import PureTable


def next_operation(draw, table: PureTable, step: int) -> tuple:
    """One operation, as (name, arguments...) of PureTable, that fits the table as it is."""
    row = draw(st.integers(0, table.geometry.rows - 1))
    now = table.rows[row]
    names = {r.meta.name for r in table.rows if r.meta is not None}
    free = [block for block in range(table.geometry.blocks) if all(block not in r.blocks for r in table.rows)]
    if draw(st.integers(0, 9)) == 0 and table.written < step:
        return ("complete", draw(st.integers(table.written + 1, step)))
    if draw(st.booleans()) and (taped := _taped(draw, table, step, free)):
        return taped
    sampler = draw(st.none() | st.binary(max_size=32)) if now.head.is_open else draw(st.binary(max_size=32))
    room = table.geometry.blocks_per_row - len(now.blocks)
    blocks = tuple(free[: draw(st.integers(0, min(len(free), room, 3)))])
    if now.head.is_open and draw(st.booleans()) and draw(st.booleans()):
        if draw(st.booleans()):
            return ("release", row)
        return ("truncate", row, draw(st.integers(0, now.head.accepted)), draw(st.none() | st.just(now.meta.lineage[-1].epoch + 1)))
    ids = tuple(draw(st.lists(st.integers(0, 2**32 - 1), max_size=table.geometry.ids_per_row - len(now.ids))))
    bound = min(len(now.ids) + len(ids), (len(now.blocks) + len(blocks)) * table.geometry.block_tokens)
    length = draw(st.integers(now.head.accepted, bound))
    if now.head.is_open:
        return ("commit", row, step, length, ids, blocks, sampler)
    name = next(name for name in ("a", "b", "c", "d", "é" * 32) if name not in names)
    return ("open", row, name, draw(st.integers(0, 3)), draw(st.binary(max_size=40)), step, length, ids, blocks, sampler)


def _taped(draw, table: PureTable, step: int, free: list[int]) -> tuple | None:
    """A record of the rows that have room, those of the tape that is there where they all have it; None where no row has."""
    geometry = table.geometry
    able = [n for n, row in enumerate(table.rows) if row.head.is_open and row.head.accepted < len(row.ids) + 1 <= geometry.ids_per_row]
    rows = table.taped if table.taped and set(table.taped) <= set(able) else tuple(draw(st.permutations(able))) if able else ()
    blocks = []
    for index, row in enumerate(rows):
        now = table.rows[row]
        needed = now.head.accepted + 1 > len(now.blocks) * geometry.block_tokens
        if needed or draw(st.integers(0, 4)) == 0:
            if len(now.blocks) < geometry.blocks_per_row and free:
                blocks.append((index, free.pop()))
            elif needed:
                return None
    if not rows:
        return None
    ids = draw(st.lists(st.integers(0, 2**32 - 1), min_size=len(rows), max_size=len(rows)))
    return ("tape", rows, step, tuple(ids), tuple(blocks))
