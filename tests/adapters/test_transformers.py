"""The transformers adapter without daemons: the stock cache's answers, bit by bit; what can't be protected is refused; no fault reaches generate()."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent))

from transformers import DynamicCache, GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, StoppingCriteria  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402
from transformers_script import VOCABULARY, inputs, sums_of, tiny  # noqa: E402

from kvguard.engine import generate_call, joining, telling  # noqa: E402
from kvguard.engine.generate_call import Drawn  # noqa: E402
from kvguard.engine.look import TableReader  # noqa: E402
from kvguard.engine.transformers import protect  # noqa: E402
from kvguard.errors import Refused  # noqa: E402
from kvguard.format import local  # noqa: E402
from kvguard.format.messages import PlanOrder  # noqa: E402
from kvguard.types import Epoch, Fork, ResumeToken  # noqa: E402

SAMPLED = {"do_sample": True, "top_k": 40, "temperature": 0.8}
WATCHED = {"output_logits": True, "return_dict_in_generate": True, "pad_token_id": 0}


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
    """Of the Llama, without a daemon."""
    monkeypatch.setattr(joining, "CONNECT_S", 0.0)
    with protect(models["llama"], "essay", socket=tmp_path / "none.sock", sequences=4, positions=160) as made:
        yield made


def answers(generate, given, seed=5, **options):
    torch.manual_seed(seed)
    return generate(**given, **WATCHED, **options)


def assert_same(found, wanted, last: int | None = None):
    assert torch.equal(found.sequences, wanted.sequences)
    logits = wanted.logits[-last:] if last else wanted.logits
    assert len(found.logits) == len(logits)
    assert all(torch.equal(one, other) for one, other in zip(found.logits, logits, strict=True))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_answers_of_the_stock_cache(models, family, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_S", 0.0)
    model = models[family]
    with protect(model, "essay", socket=tmp_path / "none.sock", sequences=4, positions=100) as guarded:
        calls = [(1, False, {}), (3, True, {}), (1, False, SAMPLED), (4, True, SAMPLED), (2, True, {"prefill_chunk_size": 4})]
        for rows, padded, options in calls:
            given, stock = inputs(rows, 11, padded), DynamicCache()
            wanted = answers(model.generate, given, past_key_values=stock, max_new_tokens=24, **options)
            after = torch.get_rng_state()
            found = answers(guarded.generate, given, max_new_tokens=24, **options)
            assert_same(found, wanted)
            assert sums_of(guarded.cache) == sums_of(stock) and guarded.cache.placed
            assert torch.equal(torch.get_rng_state(), after)
            assert guarded.guard.table.sequences() == {}
        copies = {"num_return_sequences": 2, "max_new_tokens": 6, **SAMPLED}
        assert_same(answers(guarded.generate, inputs(2, 5, True), **copies), answers(model.generate, inputs(2, 5, True), **copies))


def test_a_length_that_nobody_says(models, guarded):
    given = inputs(1, 9, False)
    assert torch.equal(guarded.generate(**given, pad_token_id=0), models["llama"].generate(**given, pad_token_id=0))
    assert torch.equal(guarded.generate(given["input_ids"], GenerationConfig(max_length=15, pad_token_id=0)),
                       models["llama"].generate(given["input_ids"], GenerationConfig(max_length=15, pad_token_id=0)))  # fmt: skip


# ---- what is committed ----------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Where the script is struck."""


class Struck(BaseStreamer):
    """Looks at the table when so many tokens have been shown, and ends the call."""

    def __init__(self, guarded, at: int) -> None:
        self.guarded, self.left, self.seen = guarded, at + 1, []

    def put(self, value) -> None:
        self.left -= 1
        if self.left == 0:
            self.seen = self.look()
            raise Stop

    def end(self) -> None:
        """Never: the call ends before."""

    def look(self) -> list[dict]:
        table, sampler = self.guarded.guard.table, self.guarded._sampler() or b""
        rows = sorted(table.sequences().items())
        return [
            {"sequence": name, "position": table.accepted(row), "ids": table.ids(row).tolist(), "request": table.meta(row).request,
             "sampler": sampler if n == 0 else b"", "blocks": table.blocks(row)}
            for n, (name, row) in enumerate(rows)
        ]  # fmt: skip


def struck(guarded, at: int, given: dict, **options) -> list[dict]:
    """What the table said when the call had shown `at` tokens, where it was then ended."""
    streamer = Struck(guarded, at)
    with pytest.raises(Stop):
        answers(guarded.generate, given, streamer=streamer, **options)
    assert len(streamer.seen) == given["input_ids"].shape[0]
    return streamer.seen


def left_behind(guarded, rows: list[dict], lag: int = 0, ids: int | None = None) -> None:
    """As if a former life had committed this, and `lag` positions of it hadn't arrived; the pool still has the KV."""
    tokens = []
    for row in rows:
        position, known = max(0, row["position"] - lag), row["ids"][:ids]
        prefix, more = tuple(known[:position]), tuple(known[position:])
        tokens.append(ResumeToken("essay", row["sequence"], Epoch(1, "c"), position, more, prefix, row["sampler"], row["request"], "pool"))
    guarded.earlier = tuple(tokens)


def test_what_is_shown_is_committed_before(guarded):
    given = inputs(3, 11, True)
    rows = struck(guarded, 10, given, max_new_tokens=24, **SAMPLED)
    for n, row in enumerate(rows):
        assert (row["position"], len(row["ids"])) == (11 + 9, 11 + 10)  # the token that is about to be shown is known, its KV isn't there yet
        assert row["ids"][:11] == given["input_ids"][n].tolist()
        assert row["blocks"] == [n * guarded.shape.per_sequence, n * guarded.shape.per_sequence + 1]
        request = generate_call.unpack(row["request"])
        assert (request.row, request.rows, request.pads, request.limit) == (n, 3, 2 * n, 35)
    assert Drawn.unpack(rows[0]["sampler"]) == (21, 10 * 2 * 3 * VOCABULARY, 2 * 3 * VOCABULARY, True)
    assert guarded.guard.table.sequences() == {}  # a call that raises is over


# ---- going on -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lag", [0, 1, 5])
@pytest.mark.parametrize(("rows", "options"), [(1, {}), (3, SAMPLED)])
def test_going_on_is_what_would_have_been(models, guarded, rows, options, lag):
    given, stock = inputs(rows, 11, True), DynamicCache()
    wanted = answers(models["llama"].generate, given, past_key_values=stock, max_new_tokens=24, **options)
    left = struck(guarded, 10, given, max_new_tokens=24, **options)
    _spoil(guarded, 20 - lag)
    left_behind(guarded, left, lag)
    torch.manual_seed(999)  # another process has another random state
    found = guarded.resume()
    assert (guarded.resumed_at, guarded.recomputed) == (20 - lag, lag)
    assert_same(found, wanted, 14)
    assert sums_of(guarded.cache) == sums_of(stock)
    assert guarded.resume() is None and guarded.guard.table.sequences() == {}


@pytest.mark.parametrize("options", [{}, SAMPLED, {"prefill_chunk_size": 4}])
def test_struck_before_the_first_token_or_inside_the_prompt(models, guarded, options):
    given, stock = inputs(2, 11, True), DynamicCache()
    wanted = answers(models["llama"].generate, given, past_key_values=stock, max_new_tokens=12, **options)
    left = struck(guarded, 1, given, max_new_tokens=12, **options)
    for lag, ids in ((0, 11), (4, 12)):  # the prompt is there, its first token isn't; the first token is, not all of the prompt
        left_behind(guarded, left, lag, ids)
        _spoil(guarded, 8 if options.get("prefill_chunk_size") and lag == 0 else 4 if options.get("prefill_chunk_size") else 0)
        found = guarded.resume()
        assert_same(found, wanted, 12 if ids == 11 else 11)
        assert sums_of(guarded.cache) == sums_of(stock)


def test_rows_that_had_ended_stay_ended(models, guarded):
    given = inputs(3, 11, False)
    open_ = answers(models["llama"].generate, given, max_new_tokens=24, eos_token_id=None)
    end = int(open_.sequences[1, 11 + 4])  # the fifth token of the second row ends it
    options = {"max_new_tokens": 24, "eos_token_id": [end]}
    wanted = answers(models["llama"].generate, given, **options)
    ended = (wanted.sequences[:, 11:21] == end).any(1).tolist()
    assert ended[1] and not all(ended)
    left_behind(guarded, struck(guarded, 10, given, **options))
    assert torch.equal(guarded.resume().sequences, wanted.sequences)


class After(StoppingCriteria):
    """The script's own: it stops behind one id, when that is the newest."""

    def __init__(self, end: int) -> None:
        self.end = end

    def __call__(self, input_ids, scores, **_):
        return input_ids[:, -1] == self.end


@pytest.mark.parametrize("options", [{}, SAMPLED])
def test_struck_when_a_criterion_of_the_script_had_just_stopped_it(models, guarded, options):
    """Nobody knows that it had: it is asked again, about the same id."""
    given = inputs(1, 11, False)
    open_ = answers(models["llama"].generate, given, max_new_tokens=24, **options).sequences[0, 11:].tolist()
    at = next(n for n in range(4, 24) if open_[n] not in open_[:n])
    criteria = [After(open_[at])]
    wanted = answers(models["llama"].generate, given, max_new_tokens=24, stopping_criteria=criteria, **options)
    assert wanted.sequences.shape[1] == 11 + at + 1
    left_behind(guarded, struck(guarded, at + 1, given, max_new_tokens=24, stopping_criteria=criteria, **options))
    torch.manual_seed(999)
    assert torch.equal(guarded.resume(stopping_criteria=criteria).sequences, wanted.sequences)


def test_an_answer_that_was_whole_is_only_handed_out(guarded):
    given = inputs(2, 11, False)
    left = struck(guarded, 6, given, max_new_tokens=6)
    left_behind(guarded, left)
    assert guarded.resume().tolist() == [row["ids"] for row in left]
    assert guarded.guard.table.sequences() == {}


def test_what_can_not_be_the_same_answer_is_refused_and_given_up(guarded):
    given = inputs(2, 11, False)
    left = struck(guarded, 8, given, max_new_tokens=24, **SAMPLED)
    left_behind(guarded, left[:1])
    with pytest.raises(Refused, match="1 of 2 rows"):
        guarded.resume()
    uneven = Drawn.unpack(left[0]["sampler"])._replace(even=False).pack()
    left_behind(guarded, [{**left[0], "sampler": uneven}, left[1]], lag=2, ids=17)
    with pytest.raises(Refused, match="unevenly"):
        guarded.resume()
    left_behind(guarded, left)
    with pytest.raises(Refused, match="options stay"):
        guarded.resume(temperature=1.0)
    assert guarded.earlier == ()


def _spoil(guarded, start: int) -> None:
    """What lies beyond the resume position is nothing that may be read."""
    for layer in guarded.cache.layers:
        for half in layer._room:
            half[:, :, start:] = float("nan")


# ---- what is refused, what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_beams": 3}, "beam search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"cache_implementation": "static"}, "the pool is the cache"),
        ({"cache_implementation": "paged"}, "the pool is the cache"),
        ({"use_cache": False}, "nothing to protect"),
        ({"exponential_decay_length_penalty": (3, 1.1)}, "counted from the end"),
        ({"begin_suppress_tokens": [5]}, "counted from the end"),
        ({"stop_strings": ["x"]}, "more than one row"),
        ({"max_new_tokens": 1000}, "the pool has 4 of 160"),
        ({"position_ids": torch.arange(9)[None]}, "position_ids"),
        ({"assistant_model": "any"}, "assistant_model"),
        ({"bad_words_ids": [[n] for n in range(3, 300)] * 9}, "at most 4096"),
    ],
)
def test_calls_that_could_not_be_resumed_are_refused(guarded, options, reason):
    with pytest.raises(Refused, match=reason):
        guarded.generate(**inputs(2, 9, False), pad_token_id=0, **{"max_new_tokens": 4, **options})
    assert guarded.generate(**inputs(2, 9, False), pad_token_id=0, max_new_tokens=4).shape == (2, 13)


@pytest.mark.parametrize("ids", [[1, 2, 3], {"input_ids": torch.ones((1, 4)).long()}, torch.ones(4).long(), torch.ones((1, 0)).long()])
def test_what_is_no_prompt_is_refused(guarded, ids):
    with pytest.raises(Refused, match="needs input_ids of"):
        guarded.generate(ids, max_new_tokens=4)


def test_a_model_whose_type_changes_under_its_pool_is_served_and_not_protected(tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_S", 0.0)
    model, given = tiny("llama"), inputs(2, 11, True)
    with protect(model, "essay", socket=tmp_path / "none.sock", sequences=2, positions=64) as guarded:
        model.bfloat16()
        assert_same(answers(guarded.generate, given, max_new_tokens=8), answers(model.generate, given, max_new_tokens=8))
        assert "left the pool" in guarded.unprotected
        model.float()
        wanted = answers(model.generate, given, max_new_tokens=8)
        assert_same(answers(guarded.generate, given, max_new_tokens=8), wanted)
        assert guarded.cache.placed and "left the pool" not in guarded.unprotected


def test_continuous_batching_is_refused(guarded):
    with pytest.raises(Refused, match="continuous batching"):
        guarded.generate_batch([[5, 6, 7]])


def test_a_mask_with_holes_and_too_many_rows_are_refused(guarded):
    given = inputs(1, 9, False)
    given["attention_mask"][0, 4] = 0
    with pytest.raises(Refused, match="padding on the left"):
        guarded.generate(**given, max_new_tokens=4)
    with pytest.raises(Refused, match="5 rows"):
        guarded.generate(**inputs(5, 9, False), max_new_tokens=4)


def test_models_with_other_layers_are_refused_by_name(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    sliding = MistralForCausalLM(MistralConfig(sliding_window=8, **sizes)).eval()
    with pytest.raises(Refused, match="DynamicSlidingWindowLayer"):
        protect(sliding, "essay", socket=tmp_path / "none.sock")
    training = LlamaForCausalLM(LlamaConfig(**sizes)).train()
    with pytest.raises(Refused, match="training mode"):
        protect(training, "essay", socket=tmp_path / "none.sock")


def test_without_a_daemon_it_says_so_once(guarded, caplog):
    for _ in range(3):
        guarded.generate(**inputs(1, 9, False), max_new_tokens=3)
    said = [record.getMessage() for record in caplog.records if "no daemon" in record.getMessage()]
    assert len(said) == 1 and "UNPROTECTED" in said[0] and "no daemon" in guarded.unprotected


def test_a_coordinator_that_is_away_costs_its_wait_and_nothing_else(models, tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_S", 0.0)
    monkeypatch.setattr(joining, "SAID_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        address = f"tcp://127.0.0.1:{nobody.getsockname()[1]}"
    with protect(models["llama"], "essay", address, socket=tmp_path / "none.sock", sequences=2, positions=64, wait_s=0.2) as guarded:
        assert "coordinator" in guarded.unprotected and guarded.resume() is None
        given = inputs(1, 9, False)
        assert torch.equal(guarded.generate(**given, max_new_tokens=4), models["llama"].generate(**given, max_new_tokens=4))


def test_the_cache_alone_works_and_says_that_it_is_not_protected(models, guarded):
    given = inputs(1, 9, False)
    guarded.cache.begin(1)
    assert torch.equal(models["llama"].generate(**given, past_key_values=guarded.cache, max_new_tokens=5), models["llama"].generate(**given, max_new_tokens=5))
    assert "guarded.generate()" in guarded.unprotected


def test_a_fault_of_ours_ends_protection_and_not_the_call(models, guarded, monkeypatch):
    given = inputs(2, 9, False)
    wanted = answers(models["llama"].generate, given, max_new_tokens=12)
    commits = []

    def failing(*arguments, **more):
        commits.append(arguments)
        if len(commits) == 5:
            raise MemoryError("no more of it")
        return commit(*arguments, **more)

    commit = guarded.guard._step.commit
    monkeypatch.setattr(type(guarded.guard._step), "commit", lambda step, *arguments, **more: failing(*arguments, **more))
    assert_same(answers(guarded.generate, given, max_new_tokens=12), wanted)
    assert "MemoryError" in guarded.unprotected and len(commits) == 5
    assert_same(answers(guarded.generate, given, max_new_tokens=12), wanted)  # the next call is another one
    assert "MemoryError" not in guarded.unprotected and len(commits) > 10


def test_random_numbers_of_others_end_the_protection_of_a_sampled_call(models, guarded):
    class Drawing(BaseStreamer):
        def put(self, value) -> None:
            torch.randn(1)

        def end(self) -> None:
            """Nothing is held back."""

    given = inputs(1, 9, False)
    wanted = answers(models["llama"].generate, given, max_new_tokens=8, streamer=Drawing(), **SAMPLED)
    assert_same(answers(guarded.generate, given, max_new_tokens=8, streamer=Drawing(), **SAMPLED), wanted)
    assert "random state" in guarded.unprotected


def test_a_call_inside_a_call_is_refused(guarded):
    class Calling(BaseStreamer):
        def put(self, value) -> None:
            with pytest.raises(Refused, match="under way"):
                guarded.generate(**inputs(1, 4, False), max_new_tokens=1)

        def end(self) -> None:
            """Nothing is held back."""

    guarded.generate(**inputs(1, 9, False), max_new_tokens=3, streamer=Calling())


# ---- epochs ---------------------------------------------------------------------------------------------------------------------------


class Fencing(BaseStreamer):
    """Ends the epoch in the middle of the call; `position`: of the plan that follows, for all rows, or None for no plan."""

    def __init__(self, guarded, position: int | None) -> None:
        self.guard, self.position, self.left = guarded.guard, position, 6

    def put(self, value) -> None:
        self.left -= 1
        if self.left:
            return
        table, epoch = self.guard.table, Epoch(3, "coordinator")
        TableReader(os.dup(table.fd)).set_epoch(epoch.counter)
        if self.position is None:
            return
        names = tuple(sorted(table.sequences()))
        ids = tuple(len(table.ids(table.row(name))) for name in names)
        lineage = (Fork(0, 0), Fork(3, self.position))
        where = (("a",) * len(names), (self.guard.stream,) * len(names))
        plan = PlanOrder("essay", epoch, names, (self.position,) * len(names), ("pool",) * len(names), (lineage,) * len(names), ids, *where, (), (), ())
        self.guard.received(local.RestoreOrder(plan), [])

    def end(self) -> None:
        """Nothing is held back."""


@pytest.mark.parametrize("position", [15, 12])
def test_an_epoch_that_ends_in_the_middle_of_a_call_is_followed(models, guarded, position):
    given = inputs(2, 11, True)
    wanted = answers(models["llama"].generate, given, max_new_tokens=20, **SAMPLED)
    last = Struck(guarded, 19)
    fencing, seen = Fencing(guarded, position), []

    class Both(BaseStreamer):
        def put(self, value) -> None:
            fencing.put(value)
            last.left -= 1
            if last.left == 0:
                seen.extend(last.look())
                seen.append(guarded.guard.table.meta(0).lineage)

        def end(self) -> None:
            """Nothing is held back."""

    assert_same(answers(guarded.generate, given, max_new_tokens=20, streamer=Both(), **SAMPLED), wanted)
    assert guarded.guard.epoch == Epoch(3, "coordinator") and "no restore" not in guarded.unprotected
    *rows, lineage = seen
    assert [row["position"] for row in rows] == [11 + 18] * 2  # all of it is there again, in the plan's lineage
    assert [row["ids"] for row in rows] == wanted.sequences[:, :30].tolist()
    assert lineage[-1] == Fork(3, position)


def test_an_epoch_that_ends_without_a_plan_ends_protection_alone(models, guarded, monkeypatch):
    monkeypatch.setattr(telling, "FENCED_S", 0.05)
    given = inputs(2, 11, True)
    wanted = answers(models["llama"].generate, given, max_new_tokens=20)
    assert_same(answers(guarded.generate, given, max_new_tokens=20, streamer=Fencing(guarded, None)), wanted)
    assert "no restore order" in guarded.unprotected
    assert len(guarded.guard.table.sequences()) == 2  # nobody knows yet what is to become of them
    assert_same(answers(guarded.generate, given, max_new_tokens=20), wanted)
    assert guarded.guard.table.sequences() == {}  # but their blocks were written again


def test_what_was_left_and_not_wanted_is_given_up(models, guarded, caplog):
    given = inputs(2, 11, True)
    left_behind(guarded, struck(guarded, 8, given, max_new_tokens=24))
    assert torch.equal(guarded.generate(**given, max_new_tokens=5, pad_token_id=0), models["llama"].generate(**given, max_new_tokens=5, pad_token_id=0))
    assert guarded.resume() is None and "given up" in caplog.text


def test_half_precision_and_inference_mode(tmp_path, monkeypatch):
    monkeypatch.setattr(joining, "CONNECT_S", 0.0)
    model, given = tiny("llama").bfloat16(), inputs(2, 11, True)
    wanted = answers(model.generate, given, max_new_tokens=12, **SAMPLED)
    with protect(model, "essay", socket=tmp_path / "none.sock", sequences=2, positions=64) as guarded, torch.inference_mode():
        assert_same(answers(guarded.generate, given, max_new_tokens=12, **SAMPLED), wanted)
        assert guarded.cache.placed
