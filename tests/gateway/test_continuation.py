"""One stream across instances, without any: wherever it is cut, the pieces are those of the whole."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.errors import BadFrame
from kvguard.gateway.continuation import Ask, Chunk, Continuation
from kvguard.gateway.text import decoder
from kvguard.types import Epoch, ResumeToken
from tests.gateway import toy_model

TOKENIZER = toy_model.tokenizer()
PROMPT = list(b"Once upon a time")


def new(**ask) -> Continuation:
    return Continuation(Ask("toy", **{"max_tokens": 50, **ask}), PROMPT, decoder(TOKENIZER, PROMPT, True))


def serve(answer: Continuation, ids: int, size: int = 1) -> list:
    """An instance that dies after so many ids."""
    body, out = answer.body(), []
    may_end = not body.get("ignore_eos")
    whole = toy_model.answer(body["prompt"], body["max_tokens"], may_end)
    sent = 0
    while sent < min(ids, len(whole)) and not answer.finish_reason:
        some = whole[sent : min(sent + size, ids)]
        sent += len(some)
        end = ("stop" if whole[-1] == toy_model.EOS else "length") if sent == len(whole) else ""
        out.append(answer.take(Chunk(tuple(some), end)))
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.integers(0, 30), max_size=4), st.integers(1, 5),
    st.lists(st.sampled_from(["ab", "é ", "😀", "h,", "cc", "字."]), max_size=2), st.booleans(), st.integers(0, 40),
)  # fmt: skip
def test_cuts_change_nothing(seed, cuts, size, stops, include, min_tokens):
    prompt = list(f"prompt {seed}".encode())

    def made() -> Continuation:
        ask = Ask("toy", {"ignore_eos": False}, 60, 0 if not stops else min_tokens, tuple(stops), include)
        return Continuation(ask, prompt, decoder(TOKENIZER, prompt, True))

    whole, cut = made(), made()
    wanted = serve(whole, 1000)
    got = []
    for length in cuts:
        if not cut.finish_reason:
            got += serve(cut, length, size)
    if not cut.finish_reason:
        got += serve(cut, 1000, size)
    assert cut.ids == whole.ids
    assert "".join(piece.text for piece in got) == "".join(piece.text for piece in wanted)
    assert [token for piece in got for token in piece.ids] == whole.ids
    assert (cut.finish_reason, cut.stop_reason, cut.usage()) == (whole.finish_reason, whole.stop_reason, whole.usage())


def test_the_bodies_describe_one_request():
    answer = new(passed={"temperature": 0.5, "stop_token_ids": [7]}, max_tokens=10, min_tokens=5)
    first = answer.body()
    assert (first["prompt"], first["max_tokens"], first["min_tokens"]) == (PROMPT, 10, 5)
    assert "cache_salt" not in first and "kv_transfer_params" not in first and "stop" not in first
    answer.take(Chunk(tuple(b"abcd")))
    second = answer.body({"sequence": "s"}, "salt")
    assert (second["prompt"], second["max_tokens"], second["min_tokens"]) == (PROMPT + list(b"abcd"), 6, 1)
    assert second["kv_transfer_params"] == {"kvguard": {"sequence": "s"}} and second["cache_salt"] == "salt"
    assert (second["temperature"], second["stop_token_ids"], second["stream"], second["return_token_ids"]) == (0.5, [7], True, True)
    answer.take(Chunk(tuple(b"efg")))
    assert "min_tokens" not in answer.body()


def test_lost_between_the_last_id_and_its_end():
    answer = new(max_tokens=3)
    piece = answer.take(Chunk(tuple(b"abc")))
    assert (piece.text, piece.finish_reason) == ("abc", "length")


def test_the_stopping_id_has_no_text():
    answer = new()
    assert answer.take(Chunk(tuple(b"ab"), "stop", 98)).text == "a"
    assert answer.usage()["completion_tokens"] == 2
    included = new(include_stop=True)
    assert included.take(Chunk(tuple(b"ab"), "stop", 98)).text == "ab"


def test_ids_beyond_the_stop_string_never_were():
    answer = new(stops=("b",))
    piece = answer.take(Chunk(tuple(b"abcd")))
    assert (piece.text, piece.ids, piece.finish_reason, piece.stop_reason, answer.ids) == ("a", (97, 98), "stop", "b", [97, 98])


@pytest.mark.parametrize(
    ("chunk", "what"),
    [
        (Chunk((1, -1)), "isn't a token id"),
        (Chunk((1 << 31,)), "isn't a token id"),
        (Chunk((True,)), "isn't a token id"),
        (Chunk(tuple(range(51))), "more ids"),
        (Chunk((1,), prompt_tokens=3), "a prompt of 3"),
        (Chunk((1,), "abort"), "the end 'abort'"),
        (Chunk((), "stop"), "without an id"),
    ],
)
def test_garbage_changes_nothing(chunk, what):
    answer = new()
    with pytest.raises(BadFrame, match=what):
        answer.take(chunk)
    assert answer.ids == [] and not answer.finish_reason


def test_tokens_of_other_sequences_are_seen():
    answer = new()
    answer.take(Chunk(tuple(b"abc")))

    def token(ids: bytes, position: int) -> ResumeToken:
        return ResumeToken("a", "s", Epoch(1, "c"), position, tuple(ids[position:]), tuple(ids[:position]), b"", b"", "replica")

    known = bytes(PROMPT) + b"abc"
    assert answer.known(token(known, 5)) and answer.known(token(known + b"more", len(known) + 2)) and answer.known(token(known[:-1], 3))
    assert not answer.known(token(known[:-1] + b"x", 3))


def test_a_bound_for_everything():
    assert Ask("m", max_tokens=7).bounded(10, 100).max_tokens == 7
    assert Ask("m").bounded(10, 100).max_tokens == 90
    assert Ask("m").bounded(10, 100, 20).max_tokens == 20
    assert Ask("m").bounded(95, 100, 20).max_tokens == 5
