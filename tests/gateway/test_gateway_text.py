"""Text from ids: whole characters only, stop strings across any seam."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.errors import BadConfig
from kvguard.gateway import text
from tests.gateway import toy_model

TOKENIZER = toy_model.tokenizer()


def pieces(string: str, stops=(), include=False, min_tokens=0) -> tuple[list[str], str]:
    """Byte by byte: what is given out after each, and what stopped it."""
    decode = text.decoder(TOKENIZER, [32], True)
    found = text.StopStrings(stops, include, min_tokens)
    out = []
    for count, token in enumerate(string.encode(), 1):
        out.append(found.feed(decode(token), count))
        if found.found:
            return out, found.found
    return [*out, found.flush()], ""


def test_half_characters_wait():
    assert pieces("a😀é") == (["a", "", "", "", "😀", "", "é", ""], "")


def test_a_prompts_end_is_no_text():
    decode = text.decoder(TOKENIZER, list("prömpt ".encode()), True)
    assert [decode(one) for one in b"go"] == ["g", "o"]


@pytest.mark.parametrize("prompt", ["hello 漢".encode()[:-2], b"\xbc\xa2hello 12345678 12345678 12345678 12345678 12345678 12345678 123".ljust(70) + b"\xe6"])
def test_a_prompt_that_ends_within_a_character_is_no_text_either(prompt):
    """Ids may end there; what completes the character is the answer's, nothing that stands before it is."""
    decode = text.decoder(TOKENIZER, list(prompt), True)
    assert [decode(one) for one in [*"漢".encode()[1:], 97]] == ["", "漢", "a"]


def test_special_tokens():
    assert text.decoder(TOKENIZER, [32], True)(toy_model.EOS) == ""
    assert text.decoder(TOKENIZER, [32], False)(toy_model.EOS) == "<eos>"


@pytest.mark.parametrize(
    ("string", "stops", "include", "wanted", "found"),
    [
        ("hello END world", ("END",), False, "hello ", "END"),
        ("hello END world", ("END",), True, "hello END", "END"),
        ("hello ENOUGH", ("END",), False, "hello ENOUGH", ""),
        ("aab", ("ab",), False, "a", "ab"),
        ("x漢字y", ("漢字",), False, "x", "漢字"),
        ("abc", ("bc", "b"), False, "a", "b"),  # b is whole first
        ("abc", ("c", "bc"), False, "ab", "c"),  # both with the same id: the order in which they were given
        ("EN", ("END",), False, "EN", ""),  # the rest comes with the end
    ],
)
def test_stop_strings(string, stops, include, wanted, found):
    out, stopped = pieces(string, stops, include)
    assert ("".join(out), stopped) == (wanted, found)


def test_no_beginning_of_a_stop_string_is_given_out():
    assert pieces("a\n\nHuman", ("\n\nHuman:",))[0] == ["a", "", "", "", "", "", "", "", "\n\nHuman"]


def test_stop_strings_count_from_min_tokens():
    assert "".join(pieces("ENDxEND", ("END",), min_tokens=3)[0]) == "ENDx"
    assert "".join(pieces("aEND", ("END",), min_tokens=3)[0]) == "a"  # whole with the fourth id
    assert pieces("aEND", ("END",), min_tokens=4) == (["a", "", "", "END", ""], "")


@settings(deadline=None)
@given(st.text(alphabet="abé😀", max_size=30), st.lists(st.text(alphabet="abé😀", min_size=1, max_size=4), max_size=3))
def test_what_is_given_out_is_the_text_up_to_the_stop(string, stops):
    out, found = pieces(string, tuple(stops))
    given_out = "".join(out)
    assert string.startswith(given_out)
    if found:
        assert string.startswith(given_out + found)
        whole = given_out + found
        assert not any(stop in whole[:-1] for stop in stops)  # none was whole before
    else:
        assert given_out == string and not any(stop in string for stop in stops)


def test_not_a_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BadConfig, match="is not a tokenizer.*Try: "):
            text.load(str(path))
