"""The tokenizer: text comes out whole, whatever the ids are cut into; templates render; faults are named."""

from __future__ import annotations

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvguard.errors import BadConfig
from kvguard.pipeline.tokenizer import Text

TEMPLATE = ("{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
            "<|{{ message['role'] }}|>{{ message['content'] }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tokenizer whose ids are single bytes, so that every character beyond ASCII is cut."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    made = tmp_path_factory.mktemp("text")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}, "chat_template": TEMPLATE}))
    return made


@pytest.fixture(scope="module")
def text(directory):
    return Text(directory)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"), max_size=30))
def test_pieces_join_to_the_text_and_never_split_a_character(text, wanted):
    stream = text.stream()
    pieces = [stream.push(token) for token in text.encode(wanted)]
    assert "".join(pieces) == wanted and stream.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_unfinished_character_comes_out_at_the_end(text):
    stream = text.stream()
    shown = "".join(stream.push(token) for token in text.encode("a€")[:-1])
    assert shown == "a" and stream.flush() == "\ufffd"


def test_special_tokens_are_not_shown(text):
    assert text.eos == 256
    stream = text.stream()
    assert [stream.push(token) for token in [*text.encode("ab"), text.eos]] == ["a", "b", ""]


def test_chat_renders_the_template(text):
    messages = [{"role": "user", "content": "hello"}]
    assert text.render(messages) == "<|user|>hello<end>\n<|assistant|>"
    assert text.decode(text.chat(messages)) == "<|user|>hello\n<|assistant|>"
    with pytest.raises(BadConfig, match="no tools.*Try:"):
        text.chat([{"role": "tool", "content": "x"}])


def test_a_template_can_not_reach_out(tmp_path, directory):
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(BadConfig, match="Try:"):
        Text(tmp_path).render([{"role": "user", "content": "x"}])


def test_without_a_template_contents_are_lines(tmp_path, directory):
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    text = Text(tmp_path)
    assert text.eos is None
    assert text.decode(text.chat([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}])) == "a\nb"
    with pytest.raises(BadConfig, match="no chat template.*Try:"):
        text.render([])


@pytest.mark.parametrize(("name", "content", "says"), [
    ("tokenizer.json", None, "no tokenizer.json"), ("tokenizer.json", "{}", "not a tokenizer"),
    ("tokenizer_config.json", "{", "not JSON"), ("chat_template.jinja", "{% for %}", "can't be parsed")])
def test_faults_are_named(tmp_path, directory, name, content, says):
    (tmp_path / "tokenizer.json").write_text((directory / "tokenizer.json").read_text())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(BadConfig, match=f"{says}.*Try:"):
        Text(tmp_path)
