"""Which requests can go on elsewhere, field by field."""

from __future__ import annotations

import pytest

from kvguard.engine import vllm_policy
from kvguard.gateway.policy import LABELS, NEUTRAL, PASSED, UNDERSTOOD, BadRequest, Followed, Relayed, decide

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    "fields",
    [
        {}, {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}, {"repetition_penalty": 1.2}, {"logit_bias": {"5": 1}}, {"stop": "x"},
        {"stop": ["x", "y"], "include_stop_str_in_output": True}, {"seed": 3, "temperature": 0}, {"n": 1, "presence_penalty": 0.0}, {"user": "u"},
        {"stream": True, "stream_options": {"include_usage": True}}, {"response_format": {"type": "text"}}, {"tools": [], "tool_choice": "none"},
        {"max_tokens": 5, "min_tokens": 2, "ignore_eos": True}, {"logprobs": None, "best_of": None, "anything": None}, {"stream_options": {}},
    ],
)  # fmt: skip
def test_followed(fields):
    for body, chat in ((CHAT, True), (TEXT, False)):
        found = decide({**body, **fields}, chat)
        assert isinstance(found, Followed)
        assert found.ask.passed == {name: value for name, value in fields.items() if name in found.ask.passed}


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"presence_penalty": 0.1}, "presence_penalty"), ({"frequency_penalty": -1}, "frequency_penalty"), ({"bad_words": ["x"]}, "bad_words"),
        ({"n": 2}, "n"), ({"best_of": 3}, "best_of"), ({"use_beam_search": True}, "use_beam_search"), ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"logprobs": 1}, "logprobs"), ({"logprobs": 0}, "logprobs"), ({"n": True}, "n"), ({"response_format": {"type": "json_object"}}, "response_format"), ({"structured_outputs": {}}, "structured_outputs"),
        ({"guided_json": {}}, "guided_json"), ({"tools": [{}]}, "tools"), ({"seed": 3}, "seed"), ({"seed": 3, "temperature": 1}, "seed"),
        ({"repetition_detection": {}}, "repetition_detection"), ({"vllm_xargs": {"a": 1}}, "vllm_xargs"), ({"something_new": 1}, "something_new"),
        ({"max_tokens": "5"}, "max_tokens"), ({"max_tokens": 0}, "max_tokens"), ({"stop": [1]}, "stop"), ({"stop": ""}, "stop"), ({"stop": ["x", ""]}, "stop"), ({"stop": ["x"] * 65}, "stop"), ({"stop": "x" * 4097}, "stop"),
        ({"min_tokens": -1}, "min_tokens"), ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"), ({"stream_options": 3}, "stream_options"),
        ({"model": 7}, "model"), ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ],
)  # fmt: skip
def test_relayed(fields, reason):
    for body, chat in ((CHAT, True), (TEXT, False)):
        assert decide({**body, **fields}, chat) == Relayed(reason)


@pytest.mark.parametrize("said", ["yes", "true", 1, 0, [], {}])
def test_stream_is_true_or_false(said):
    """vLLM takes some of them for true, and streams: relayed as a whole, that was nonsense, and its instance left alone."""
    for body, chat in ((CHAT, True), (TEXT, False)):
        for more in ({}, {"n": 2}):
            with pytest.raises(BadRequest, match="stream .*Try: ") as refused:
                decide({**body, **more, "stream": said}, chat)
            assert refused.value.param == "stream"


@pytest.mark.parametrize("fields", [{"echo": True}, {"suffix": "x"}, {"prompt": ["a", "b"]}, {"prompt": []}, {"prompt": None}, {"prompt": [[1], [2]]}])
def test_completions_alone(fields):
    assert decide({**TEXT, **fields}, False) == Relayed(next(iter(fields)))


def test_prompts():
    assert decide({"prompt": [1, 2]}, False).prompt == (1, 2)
    assert decide({"prompt": [[1, 2]]}, False).prompt == (1, 2)
    assert decide({"prompt": ["x"], "add_special_tokens": False}, False)[1:] == ("x", None, False)
    assert decide({"prompt": [1, -2]}, False) == Relayed("prompt")
    assert decide({"prompt": [1, 1 << 40]}, False) == Relayed("prompt"), "no id: the decoder would raise, and the client saw a 500"


def test_lengths():
    assert decide(TEXT, False).ask.max_tokens == 16
    assert decide({**TEXT, "max_tokens": None}, False).ask.max_tokens is None
    assert decide(CHAT, True).ask.max_tokens is None
    assert decide({**CHAT, "max_tokens": 3, "max_completion_tokens": 4}, True).ask.max_tokens == 4


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, {"role": "tool", "content": "x"},
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "x", "tool_calls": []}, "hi", {"role": "user"},
    ],
)  # fmt: skip
def test_messages_that_are_more_than_text(message):
    assert decide({"messages": [message]}, True) == Relayed("messages")


def test_text_parts_and_templates():
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "chat_template_kwargs": {"x": 1}, "add_generation_prompt": False}
    assert decide(body, True).template == body


@pytest.mark.parametrize("name", ["kv_transfer_params", "ec_transfer_params", "cache_salt"])
def test_what_clients_must_not_say(name):
    for body, chat in ((CHAT, True), (TEXT, False)):
        for smuggled in ({name: {"kvguard": {}}}, {"vllm_xargs": {name: "x"}}, {name: "x", "n": 3}):
            with pytest.raises(BadRequest, match=f"{name} is not for clients.*Try: "):
                decide({**body, **smuggled}, chat)
        assert isinstance(decide({**body, name: None}, chat), Followed)


def test_seeds_by_position():
    assert decide({**TEXT, "seed": 3}, False, seeded_by_position=True).ask.passed == {"seed": 3}


def test_what_the_connector_refuses_is_not_followed():
    """One policy in two places: whatever the engine's side wouldn't resume, the gateway doesn't either."""
    for name in vllm_policy.REFUSED:
        value = next(value for value in (1.5, [{"type": "x"}], {"type": "json_object"}) if vllm_policy.refusal_of_parameters({name: value}))
        assert isinstance(decide({**TEXT, name: value}, False), Relayed), name
        assert isinstance(decide({**CHAT, name: value}, True), Relayed), name


VALUES = (None, 0, 1, 1.5, 3, True, False, "x", ["x"], [], [{"type": "x"}], {"type": "json_object"}, {"type": "text"}, {"1": 2.0}, {})
FIELDS = sorted({*PASSED, *UNDERSTOOD, *NEUTRAL, *LABELS, *vllm_policy.REFUSED, *vllm_policy.UNCHANGED} - {"model", "prompt", "messages", "stream"})


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize("others", [{}, {"temperature": 0}, {"seed": 3}, {"seed": 3, "temperature": 0}], ids=str)
def test_what_is_followed_the_connector_would_resume(others, by_position):
    """The other direction, with every field at many values: what the gateway calls meaningless (best_of 1, once) must not be a reason to the connector."""
    followed = 0
    for field in FIELDS:
        for value in VALUES:
            for body, chat in ((TEXT, False), (CHAT, True)):
                asked = {**body, **others, field: value}
                if isinstance(decide(asked, chat, by_position), Followed):
                    followed += 1
                    assert vllm_policy.refusal_of_parameters(asked, by_position) == "", (field, value)
    assert followed > 50 or (others.get("seed") and not by_position and "temperature" not in others)


def test_what_is_passed_on_is_known_to_the_connector():
    """Of an engine's own request a parameter that it doesn't know is refused; these three never become one."""
    assert set(PASSED) - vllm_policy.UNCHANGED == {"user", "priority", "session_id"}
