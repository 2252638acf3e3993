"""The commit table's bytes: whatever stores have landed, in whatever order, a row reads as a version that was published, or as not yet."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvguard.errors import BadFrame
from kvguard.format import rows as fmt
from kvguard.format import tape as form
from kvguard.format.rows import Geometry
from tests.format.pure_table import GEOMETRY, PureTable, apply, content, new_memory
from tests.format.scripts import next_operation

SLOW = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@SLOW
@given(st.data())
def test_any_landed_subset_of_stores_reads_as_a_published_version_or_not_yet(data) -> None:
    """Each word holds any of the values that were stored to it since the last quiet moment: every cut of every order that memory allows."""
    table, memory = PureTable(), new_memory()
    for step in range(1, data.draw(st.integers(0, 8)) + 1):
        operation = next_operation(data.draw, table, step)
        apply(memory, getattr(table, operation[0])(*operation[1:]))
    published = [{content(row)} for row in table.rows]
    stores = []
    for step in range(9, 9 + data.draw(st.integers(1, 3))):
        operation = next_operation(data.draw, table, step)
        stores += getattr(table, operation[0])(*operation[1:])
        for seen, row in zip(published, table.rows, strict=True):
            seen.add(content(row))
    by_place: dict[int, list] = {}
    for store in stores:
        by_place.setdefault(store.offset, []).append(store)
    landed = [data.draw(st.integers(0, len(values))) for values in by_place.values()]
    for values, count in zip(by_place.values(), landed, strict=True):
        apply(memory, values[:count])
    for row, seen in enumerate(published):
        found = form.read_row(memory, GEOMETRY, row)
        assert found is None or content(found) in seen
    for values, count in zip(by_place.values(), landed, strict=True):
        apply(memory, values[count:])
    assert [content(form.read_row(memory, GEOMETRY, row)) for row in range(GEOMETRY.rows)] == list(map(content, table.rows))


@SLOW
@given(st.data())
def test_a_cut_in_program_order_always_reads(data) -> None:
    """A killed writer leaves a prefix of its stores: then there is always a whole version, the last or the one before."""
    table, memory = PureTable(), new_memory()
    for step in range(1, data.draw(st.integers(1, 10)) + 1):
        operation = next_operation(data.draw, table, step)
        before = list(table.rows)
        stores = getattr(table, operation[0])(*operation[1:])
        cut = data.draw(st.integers(0, len(stores)))
        apply(memory, stores[:cut])
        for row in range(GEOMETRY.rows):
            assert content(form.read_row(memory, GEOMETRY, row)) in (content(before[row]), content(table.rows[row]))
        apply(memory, stores[cut:])


@SLOW
@given(st.data())
def test_generations_only_rise_and_are_never_reused(data) -> None:
    table = PureTable()
    given_out: list[int] = []
    for step in range(1, 15):
        operation = next_operation(data.draw, table, step)
        before = table.counter
        stores = getattr(table, operation[0])(*operation[1:])
        given_out += range(before + 1, table.counter + 1)
        at = fmt.areas(GEOMETRY)
        counter = before
        for store in stores:
            if store.offset == fmt.COUNTER_AT:
                counter = store.value
            elif at.row_generations <= store.offset < at.heads:
                assert store.value <= counter  # raised before it is used
    assert len(set(given_out)) == len(given_out)
    live = [row.head.generation for row in table.rows if row.head.version]
    assert len(set(live)) == len(live)


def test_committed_counts_only_steps_that_were_seen_complete() -> None:
    head = fmt.CLOSED.head._replace(accepted=9, step=7, prior=6, prior_step=6, base=4)
    assert [fmt.committed(head, written) for written in (5, 6, 7, 8)] == [4, 6, 9, 9]
    shifted = fmt.shifted(head, 8, 6)
    assert (shifted.step, shifted.prior, shifted.prior_step, shifted.base) == (8, 9, 7, 6)
    assert fmt.shifted(shifted, 8, 7) is shifted


@pytest.mark.parametrize("field", range(6))
def test_geometry_out_of_bounds_is_refused(field: int) -> None:
    wrong = list(GEOMETRY)
    for value in (0, 1 << 30):
        wrong[field] = value
        with pytest.raises(BadFrame):
            fmt.areas(Geometry(*wrong))


@given(st.binary(min_size=64, max_size=64))
def test_garbage_is_no_header(data: bytes) -> None:
    with pytest.raises(BadFrame):
        fmt.decode_header(data.ljust(fmt.PAGE_BYTES, b"\0"))


@given(st.lists(st.integers(0, 2**64 - 1), min_size=fmt.HEAD_WORDS, max_size=fmt.HEAD_WORDS), st.booleans())
def test_garbage_heads_and_metas_never_raise(words: list[int], mended: bool) -> None:
    if mended:
        words[fmt.H_SUM] = fmt.head_sum(words)
    head = fmt.decode_head(words, words[0], GEOMETRY)
    assert head is None or (head.ids <= GEOMETRY.ids_per_row and head.blocks <= GEOMETRY.blocks_per_row)
    fmt.decode_meta((words * 24)[: fmt.META_WORDS])
