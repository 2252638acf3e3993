"""Spans and plans: shapes depend on position alone, bounds hold, nobody starves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvguard.format.lineage import birth_of
from kvguard.pipeline.batch import Need, next_span, plan_step, resume_position
from kvguard.pipeline.commands import Run
from kvguard.pipeline.runs import pack_request
from kvguard.types import Span

chunks = st.integers(1, 70)
prompt_lengths = st.integers(1, 300)


def walk(prompt, known, chunk, position=0, replay=1):
    spans = []
    while span := next_span(Need("a", position, known, prompt), chunk, replay):
        spans.append(span)
        position = span.end
    return spans


@given(prompt_lengths, st.integers(0, 30), chunks)
def test_spans_cover_everything_once(prompt, emitted, chunk):
    spans = walk(prompt, prompt + emitted, chunk)
    assert [p for span in spans for p in range(*span)] == list(range(prompt + emitted))
    assert [span.end for span in spans if span.start < prompt] == [*range(chunk, prompt, chunk), prompt]
    assert all(span.end - span.start == 1 for span in spans if span.start >= prompt)


@given(prompt_lengths, st.integers(0, 30), chunks, st.data())
def test_a_resume_replays_the_original_spans(prompt, emitted, chunk, data):
    original = walk(prompt, prompt + emitted, chunk)
    cut = data.draw(st.integers(0, prompt + emitted))
    start = resume_position(cut, prompt, chunk)
    assert cut - chunk < start <= cut
    again = walk(prompt, prompt + emitted, chunk, start)
    assert again == [span for span in original if span.start >= start]


def test_a_chunk_ends_at_the_prompt_or_an_absolute_multiple():
    assert walk(130, 132, 64) == [Span(0, 64), Span(64, 128), Span(128, 130), Span(130, 131), Span(131, 132)]
    assert next_span(Need("a", 132, 132, 130)) is None
    assert next_span(Need("a", 130, 141, 130)) == Span(130, 138)


@st.composite
def worlds(draw):
    chunk = draw(chunks)
    needs = []
    for i in range(draw(st.integers(0, 24))):
        prompt = draw(prompt_lengths)
        known = prompt + draw(st.integers(0, 12))
        needs.append(Need(str(i), resume_position(draw(st.integers(0, known)), prompt, chunk), known, prompt))
    return needs, chunk, chunk + draw(st.integers(0, 100)), draw(st.integers(1, 9))


@given(worlds())
def test_plans_keep_their_bound_and_order(world):
    needs, chunk, positions_max, replay = world
    plan = plan_step(needs, positions_max=positions_max, chunk=chunk, replay=replay)
    by_name = {need.sequence: need for need in needs}
    decoding = [need.sequence for need in needs if need.prompt <= need.position < need.known]
    assert [p.sequence for p in plan if not p.prefill] == decoding
    assert [p.prefill for p in plan] == sorted(p.prefill for p in plan)
    beyond = sum(p.span.end - p.span.start - (not p.prefill) for p in plan)
    assert beyond <= positions_max
    for planned in plan:
        need = by_name[planned.sequence]
        whole = next_span(need, chunk, replay)
        assert planned.span == whole if planned.prefill else planned.span.start == whole.start and planned.span.end <= whole.end
        assert planned.logits == (planned.span.end == need.known)
    waiting = [need.sequence for need in needs if need.position < need.prompt]
    assert [p.sequence for p in plan if p.prefill] == waiting[:sum(p.prefill for p in plan)]  # the oldest, none overtaken


@given(worlds())
def test_every_plan_makes_progress_until_all_is_computed(world):
    needs, chunk, positions_max, replay = world
    state = {need.sequence: need for need in needs}
    bound = sum(need.known for need in needs) + 1
    for _ in range(bound):
        plan = plan_step(state.values(), positions_max=positions_max, chunk=chunk, replay=replay)
        if not plan:
            break
        for planned in plan:
            state[planned.sequence] = state[planned.sequence]._replace(position=planned.span.end)
    assert all(need.position == need.known for need in state.values())


def test_sixteen_sequences_decode_in_one_step():
    plan = plan_step([Need(str(i), 10 + i, 11 + i, 5) for i in range(16)] + [Need("new", 0, 1000, 1000)])
    assert len(plan) == 17 and plan[-1].span == Span(0, 64) and plan[-1].logits == 0


def test_a_run_whose_name_comes_again_is_another_sequence() -> None:
    lives = [Run("r", [[1, 2, 3]], 4).prepare(None)[0][0] for _ in range(2)]
    assert lives[0].name == lives[1].name and birth_of(pack_request(lives[0])) != birth_of(pack_request(lives[1]))
