"""The adapter for continuous batching without daemons: transformers' own answers, bit by bit, and where a batch that was struck is taken up again."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
if not transformers.__version__.startswith("5.23."):
    pytest.skip("its private objects are those of another release", allow_module_level=True)
sys.path.insert(0, str(Path(__file__).parent))

from continuous_script import Watched, answers, plain, prompts  # noqa: E402
from transformers import GenerationConfig  # noqa: E402
from transformers_script import tiny  # noqa: E402

from kvguard.engine import continuous, continuous_seams, generate_call, joining  # noqa: E402
from kvguard.engine import transformers as generate_adapter  # noqa: E402
from kvguard.engine.continuous_steps import At, Left, go_back  # noqa: E402
from kvguard.errors import Refused  # noqa: E402
from kvguard.types import Epoch, ResumeToken  # noqa: E402

CALL = {"family": "llama", "prompts": [9, 21, 5, 30], "new": 24, "batch": 80}
WAITING = {**CALL, "batch": 40}  # the last prompt is computed in two parts, beside the others' decoding


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def models():
    return {family: tiny(family) for family in ("llama", "gpt2")}


@pytest.fixture
def guarded(models, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_S", 0.0)
    with continuous.protect(models["llama"], "digests", socket=tmp_path / "none.sock", requests=4, positions=100) as made:
        yield made


@pytest.fixture
def watch():
    """A model's forward passes, until the test is over."""
    made = []

    def start(model) -> Watched:
        made.append(Watched(model))
        return made[-1]

    yield start
    for watched in made:
        watched.remove()


def asked(call: dict) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=call["new"], eos_token_id=call.get("ends", 2))


class Struck(Exception):
    """Where the script is struck."""


def struck(guarded, call: dict, at: int) -> list[dict]:
    """What the table said when `at` batches were committed, where the call was then ended."""
    seen, commit = [], guarded._commit

    def look() -> None:
        commit()
        if guarded._step == at:
            seen.extend(rows_of(guarded))
            raise Struck

    guarded._commit, guarded._attempt = look, lambda what, *arguments: what(*arguments)
    try:
        with pytest.raises(Struck):
            guarded.generate_batch(prompts(call["prompts"]), asked(call), max_batch_tokens=call["batch"])
    finally:
        del guarded._commit, guarded._attempt
    return seen


def rows_of(guarded) -> list[dict]:
    table, samplers = guarded.guard.table, {row.name: row.sampler for row in guarded._telling.rows}
    return [
        {"sequence": name, "position": table.accepted(row), "ids": table.ids(row).tolist(), "request": table.meta(row).request, "sampler": samplers[name],
         "blocks": table.blocks(row)}
        for name, row in table.sequences().items()
    ]  # fmt: skip


def left_behind(guarded, rows: list[dict], lags: list[int]) -> None:
    """As if a former life had committed this, and `lags` positions of them hadn't arrived; the pool still has the KV, and no other."""
    tokens = []
    for row, lag in zip(rows, lags, strict=True):
        position = max(0, row["position"] - lag)
        prefix, more = tuple(row["ids"][:position]), tuple(row["ids"][position:])
        tokens.append(ResumeToken("digests", row["sequence"], Epoch(1, "c"), position, more, prefix, row["sampler"], row["request"], "pool"))
        spoil(guarded, generate_call.unpack(row["request"]).row, position)
    guarded.earlier = tuple(tokens)


def spoil(guarded, row: int, first: int, end: int | None = None) -> None:
    """What isn't said to be there is nothing that may be read. Unless `end` says so, to the end of the request's blocks."""
    shape = guarded.shape
    pool = guarded._memory.view(shape.dtype).view(guarded.layout.blocks, shape.layers, 2, 16, shape.heads, shape.dim)
    for position in range(first, shape.positions if end is None else end):
        pool[continuous._blocks(shape, row)[position // 16], :, :, position % 16] = float("nan")


# ---- answers --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("call", [CALL, WAITING])
def test_the_answers_of_transformers_itself(models, family, call, tmp_path, monkeypatch, watch):
    monkeypatch.setattr(joining, "CONNECT_S", 0.0)
    call = {**call, "family": family}
    wanted = plain(call)
    with continuous.protect(models[family], "digests", socket=tmp_path / "none.sock", requests=4, positions=100) as guarded:
        watched = watch(models[family])
        for _ in range(2):
            found = guarded.generate_batch(prompts(call["prompts"]), asked(call), max_batch_tokens=call["batch"])
            assert answers(found) == wanted["answers"] and list(found) == list(wanted["answers"])
        assert watched.logits == 2 * wanted["logits"] and watched.kv == 2 * wanted["kv"]
        assert guarded.guard.table.sequences() == {}
    assert models[family].config._attn_implementation == "sdpa"


def test_what_is_committed_after_a_batch(guarded):
    rows = struck(guarded, WAITING, 2)  # the last prompt: 5 of its 30 ids in the first batch, the others beside it in the second
    given = prompts(WAITING["prompts"])
    assert [(row["position"], len(row["ids"])) for row in rows] == [(10, 11), (22, 23), (6, 7), (30, 31)]
    assert [row["ids"][: len(ids)] for row, ids in zip(rows, given, strict=True)] == given
    assert [row["blocks"] for row in rows] == [[2], [9, 10], [16], [23, 24]]
    assert [At.unpack(row["sampler"]) for row in rows] == [(2, 11, 10), (2, 23, 22), (2, 7, 6), (2, 31, 30)]
    assert guarded.guard.table.sequences() == {}  # a call that raises is over


# ---- going on -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "at", "lags", "step"),
    [
        (CALL, 10, [0, 0, 0, 0], 10),
        (CALL, 10, [0, 3, 1, 0], 7),  # a replica's requests lag apart: all go on from the step that all have
        (CALL, 1, [0, 0, 0, 0], 1),
        (WAITING, 1, [0, 0, 0, 0], 1),  # inside the last prompt
        (WAITING, 12, [2, 0, 0, 5], 7),
        ({**CALL, "ends": [2, 175]}, 14, [0, 0, 0, 0], 14),
    ],
)
def test_going_on_is_what_would_have_been(models, guarded, watch, call, at, lags, step):
    wanted = plain(call)
    left_behind(guarded, struck(guarded, call, at), lags)
    watched = watch(models["llama"])
    found = guarded.resume()
    assert answers(found) == wanted["answers"]
    assert watched.logits == wanted["logits"][step:] and watched.kv == wanted["kv"][step:]
    assert guarded.recomputed == (at - step) * (len(call["prompts"]) if step < at else 0)
    assert guarded.resume() is None and guarded.guard.table.sequences() == {}


def test_answers_that_were_whole_stay_so_or_are_completed_again(models, guarded, watch):
    """The first request ends after 6 ids: it is done when the others are struck, or by the step to which they must go back it wasn't yet."""
    free = plain(CALL)["answers"]["req_0"][1]
    others = [output[1] for name, output in plain(CALL)["answers"].items() if name != "req_0"]
    at = next(n for n in range(4, 12) if free[n] not in free[:n] and all(free[n] not in other[:16] for other in others))
    call = {**CALL, "ends": [free[at]]}
    wanted = plain(call)
    assert len(wanted["answers"]["req_0"][1]) == at + 1
    for lags, step in (([0, 0, 0, 0], at + 3), ([0, 5, 0, 0], at - 2)):
        left_behind(guarded, struck(guarded, call, at + 3), lags)
        watched = watch(models["llama"])
        assert answers(guarded.resume()) == wanted["answers"]
        assert watched.logits == wanted["logits"][step:] and watched.kv == wanted["kv"][step:]
        watched.remove()


def test_positions_that_are_not_the_former_life_s_are_seen(models, guarded, watch):
    """The proof that the comparison looks at restored bytes, and that they are used: one position of one request, spoiled."""
    wanted = plain(CALL)
    left_behind(guarded, struck(guarded, CALL, 10), [0, 0, 0, 0])
    spoil(guarded, 1, 3, 4)
    watched = watch(models["llama"])
    found = guarded.resume()
    assert watched.kv[0] != wanted["kv"][10] and watched.logits[0] != wanted["logits"][10]
    assert answers(found)["req_1"] != wanted["answers"]["req_1"]


def test_an_answer_that_was_whole_is_only_handed_out(guarded, models, watch):
    wanted = plain(CALL)
    left_behind(guarded, struck(guarded, CALL, 24), [0, 0, 0, 0])
    watched = watch(models["llama"])
    assert answers(guarded.resume()) == wanted["answers"] and not watched.logits
    assert guarded.guard.table.sequences() == {}


def test_steps_that_are_gone_back_to():
    decoding = Left(9, 20, 19, False, At(11, 20, 19))
    assert go_back([decoding, decoding._replace(position=15)]) == (7, [(16, 15), (16, 15)])
    whole = Left(4, 10, 9, True, At(8, 10, 9))
    assert go_back([decoding, whole]) == (11, [(20, 19), (10, 9)])
    assert go_back([decoding._replace(position=15), whole]) == (7, [(16, 15), (9, 8)])
    waits = Left(30, 30, 0, False, At(0, 30, 0))
    assert go_back([decoding, waits]) == (11, [(20, 19), (30, 0)])
    assert go_back([decoding, Left(30, 30, 12, False, At(11, 30, 12))]) == (11, [(20, 19), (30, 12)])
    assert go_back([decoding, Left(30, 30, 8, False, At(11, 30, 12))]) == (11, [(20, 19), (30, 0)])  # part of the prompt is lost: from its beginning
    late = Left(30, 32, 31, False, At(11, 32, 31))
    assert go_back([decoding._replace(position=15), late]) == (7, [(16, 15), (30, 0)])  # it had not begun by then
    assert go_back([]) == (0, [])


# ---- what is refused ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_sample": True}, "greedy decoding alone"),
        ({"do_sample": True, "num_return_sequences": 2}, "num_return_sequences=2"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"max_new_tokens": 500}, "the pool has 4 of 112"),
        ({"max_new_tokens": None}, "isn't said"),
    ],
)
def test_calls_that_could_not_be_resumed_are_refused(guarded, options, reason):
    with pytest.raises(Refused, match=reason):
        guarded.generate_batch([[5, 6, 7]], GenerationConfig(**{"max_new_tokens": 4, **options}))
    assert len(guarded.generate_batch([[5, 6, 7]], max_new_tokens=4)["req_0"].generated_tokens) == 4


def test_what_are_no_prompts_and_too_many_are_refused(guarded):
    for inputs, reason in (([[]], "without ids"), ([5, 6], "list of lists"), ([[5]] * 5, "5 requests")):
        with pytest.raises(Refused, match=reason):
            guarded.generate_batch(inputs, max_new_tokens=4)
    with pytest.raises(Refused, match="each takes one"):
        guarded.generate_batch([[5]] * 3, max_new_tokens=4, max_batch_tokens=2)
    assert guarded.generate_batch([], max_new_tokens=4) == {}


def test_another_transformers_is_refused(models, monkeypatch):
    monkeypatch.setattr(continuous_seams.transformers, "__version__", "5.24.0")
    monkeypatch.setitem(continuous_seams.SEAMS, continuous_seams.FIFOScheduler.add_waiting_request, "self state priority")
    with pytest.raises(Refused, match=r"it is 5\.24\.0, .*add_waiting_request"):
        continuous.protect(models["llama"], "digests")


def test_requests_that_are_missing_and_those_of_generate_are_given_up(models, guarded, tmp_path):
    rows = struck(guarded, CALL, 6)
    left_behind(guarded, rows[:3], [0, 0, 0])
    with pytest.raises(Refused, match="3 of 4 rows"):
        guarded.resume()
    assert guarded.earlier == ()
    left_behind(guarded, rows, [0, 0, 0, 0])
    with generate_adapter.protect(models["llama"], "digests", socket=tmp_path / "none.sock", sequences=4, positions=100) as other:
        other.earlier = guarded.earlier
        with pytest.raises(Refused, match="generate_batch again"):
            other.resume()


def test_a_fault_of_ours_ends_the_protection_and_not_the_call(guarded, monkeypatch):
    wanted = plain(CALL)["answers"]

    def fails(*_):
        raise RuntimeError("the table is gone")

    monkeypatch.setattr(guarded, "_commit", fails)
    found = guarded.generate_batch(prompts(CALL["prompts"]), asked(CALL), max_batch_tokens=CALL["batch"])
    assert answers(found) == wanted and guarded.unprotected == "RuntimeError: the table is gone"


def test_a_fault_of_the_model_s_is_raised_and_leaves_nothing(models, guarded):
    def fails(*_):
        raise RuntimeError("the model is gone")

    hook = models["llama"].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="the model is gone"):
        guarded.generate_batch([[5, 6]], max_new_tokens=4)
    hook.remove()
    assert guarded.guard.table.sequences() == {}
    assert len(guarded.generate_batch([[5, 6]], max_new_tokens=4)["req_0"].generated_tokens) == 4
