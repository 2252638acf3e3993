"""Which requests can go on in another instance, and which can't: then why not.

Knows: the fields of OpenAI's requests with vLLM's additions, and what each means for a prompt that already contains a part of the answer.
Must not know: I/O, instances, what becomes of a request.
Invariants: a field that isn't listed here is not resumed (a new one could mean anything); what is not resumed is named, and relayed unchanged, so that
without a failure the answer is the backend's own; what a client must not say is refused before anything else.

Followed: the gateway works on ids and counts everything on. A field passes where its meaning doesn't depend on how much of the text is prompt:
temperature, top_p, top_k, min_p; repetition_penalty (vLLM counts prompt and answer alike); logit_bias, allowed_token_ids, stop_token_ids, ignore_eos.
max_tokens, min_tokens and stop strings are counted on by the gateway.
Relayed: presence and frequency penalties and bad_words see only what follows the prompt; grammars, tools and reasoning would begin anew; n > 1, beams,
prompt_logprobs, echo, suffix and logprobs describe the whole request; a seed draws again from its beginning, unless the runner draws by position.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.errors import KvguardError
from kvguard.gateway.continuation import IDS_END, Ask

STOPS_MAX, STOP_CHARS_MAX = 64, 4096  # OpenAI allows 4 strings
COMPLETION_TOKENS = 16  # OpenAI's default for completions, and vLLM's
PASSED = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "logit_bias", "allowed_token_ids", "stop_token_ids", "ignore_eos",
    "include_stop_str_in_output", "user", "priority", "session_id",
)  # fmt: skip
UNDERSTOOD = ("model", "stream", "stream_options", "max_tokens", "min_tokens", "stop", "skip_special_tokens", "return_token_ids", "seed", "request_id")
COUNTS = ("include_usage", "continuous_usage_stats")  # of stream_options
PROMPT = ("prompt", "add_special_tokens")
TEMPLATE = (
    "messages", "max_completion_tokens", "add_generation_prompt", "continue_final_message", "add_special_tokens", "chat_template", "chat_template_kwargs",
)  # fmt: skip
# Fields that say nothing with these values. null says nothing anywhere.
NEUTRAL: dict[str, tuple] = {
    "n": (1,), "best_of": (1,), "presence_penalty": (0,), "frequency_penalty": (0,), "echo": (False,), "logprobs": (False,), "top_logprobs": (0,),
    "use_beam_search": (False,), "length_penalty": (1,), "bad_words": ([],), "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"),
    "function_call": ("none",), "parallel_tool_calls": (True, False), "response_format": ({"type": "text"},), "suffix": ("",),
    "spaces_between_special_tokens": (True,), "include_reasoning": (True,), "metadata": ({},), "modalities": (["text"],), "store": (False,),
    "service_tier": ("auto", "default"), "return_tokens_as_token_ids": (False,), "stream_interval": (1,),
}  # fmt: skip
# How KV is moved, and which cache is shared with whom, is between gateway and engines.
FORBIDDEN = ("kv_transfer_params", "ec_transfer_params", "cache_salt", "extra_args", "routed_experts_prompt_start")
XARGS = "vllm_xargs"
# What "not resumed because of" may say in metrics.
LABELS = frozenset((
    *PASSED, *UNDERSTOOD, *PROMPT, *TEMPLATE, *NEUTRAL, "chat", "structured_outputs", "prompt_logprobs", "repetition_detection", "thinking_token_budget",
    "truncate_prompt_tokens", "reasoning_effort", "documents", "prompt_embeds", XARGS,
))  # fmt: skip


class BadRequest(KvguardError):
    """What the client sent can't be served, whoever serves it. `param`: the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param, self.status = param, status


class Followed(NamedTuple):
    """Can be resumed. `prompt`: text or ids (completions). `template`: what the backend needs to render the messages (chat)."""

    ask: Ask
    prompt: str | tuple[int, ...] = ""
    template: dict | None = None
    add_special_tokens: bool = True


class Relayed(NamedTuple):
    """Can't be resumed, because of the field `reason`."""

    reason: str


def refuse_forbidden(body: dict) -> None:
    """Raises BadRequest for fields that are between the gateway and its engines."""
    said = [name for name in FORBIDDEN if body.get(name) is not None]
    xargs = body.get(XARGS)
    said += [f"{XARGS}.{name}" for name in FORBIDDEN if isinstance(xargs, dict) and name in xargs]
    if said:
        raise BadRequest(f"{said[0]} is not for clients of this gateway. Try: without it", said[0])


def decide(body: dict, chat: bool, seeded_by_position: bool = False) -> Followed | Relayed:
    """What can be done with a client's request. Raises BadRequest.

    `seeded_by_position`: the backends draw a seeded sample by (seed, position), so that a continuation draws what the whole would have drawn.
    A value of another type than expected makes it Relayed: the backend says what is wrong with it.
    """
    refuse_forbidden(body)
    if type(body.get("stream")) not in (bool, type(None)):  # vLLM takes "yes" for true: an answer in another form than is waited for
        raise BadRequest("stream is neither true nor false. Try: one of them", "stream")
    listed = {*PASSED, *UNDERSTOOD, *(TEMPLATE if chat else PROMPT)}
    for name, value in body.items():
        if name not in listed and value is not None and not _is_neutral(name, value):
            return Relayed(name)
    if body.get("seed") is not None and body.get("temperature") != 0 and not seeded_by_position:
        return Relayed("seed")
    odd = _of_another_type(body)
    if odd:
        return Relayed(odd)
    tokens = body.get("max_completion_tokens") if chat and body.get("max_completion_tokens") is not None else body.get("max_tokens")
    if tokens is None and not chat and "max_tokens" not in body:
        tokens = COMPLETION_TOKENS
    stop, options = body.get("stop") or (), body.get("stream_options") or {}
    passed = {name: body[name] for name in (*PASSED, "seed") if body.get(name) is not None}
    include_stop = bool(passed.get("include_stop_str_in_output"))
    ask = Ask(
        body.get("model"), passed, tokens, body.get("min_tokens") or 0, (stop,) if isinstance(stop, str) else tuple(stop), include_stop,
        body.get("skip_special_tokens") is not False, chat, bool(body.get("stream")), bool(options.get("include_usage")),
        bool(options.get("continuous_usage_stats")), bool(body.get("return_token_ids")),
    )  # fmt: skip
    return _rendered(ask, body) if chat else _prompted(ask, body)


def _is_neutral(name: str, value) -> bool:
    """Exactly: `logprobs` 0 asks for something, False doesn't."""
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in NEUTRAL.get(name, ()))


def _of_another_type(body: dict) -> str:
    """The first field whose value isn't of the type that counting on needs."""
    strings = body.get("stop")
    wrong = {
        "model": not isinstance(body.get("model"), str | None),
        "stop": not (strings is None or isinstance(strings, str) or (isinstance(strings, list) and all(isinstance(one, str) for one in strings)))
        or not _are_stops([strings] if isinstance(strings, str) else strings or []),
        "stream_options": not _are_options(body.get("stream_options"), body.get("stream")),
        **{name: not _is_count(body.get(name), 1) for name in ("max_tokens", "max_completion_tokens")},
        "min_tokens": not _is_count(body.get("min_tokens"), 0),
        **{name: type(body.get(name)) not in (bool, type(None)) for name in ("skip_special_tokens", "return_token_ids", "add_special_tokens")},
        "include_stop_str_in_output": type(body.get("include_stop_str_in_output")) not in (bool, type(None)),
    }
    return next((name for name, is_wrong in wrong.items() if is_wrong), "")


def _are_stops(strings: list) -> bool:
    """Not empty, and no more than can be looked for with every id: 100 000 of them held up everybody's answers for 0.2 s an id."""
    return len(strings) <= STOPS_MAX and all(isinstance(one, str) and 0 < len(one) <= STOP_CHARS_MAX for one in strings)


def _are_options(options, stream: bool | None) -> bool:
    """Of streams alone, as the backend has it; counts are asked for, or not."""
    if options is None or options == {}:
        return True
    return bool(stream) and isinstance(options, dict) and all(type(options.get(name)) in (bool, type(None)) for name in COUNTS)


def _is_count(value, low: int) -> bool:
    return value is None or (type(value) is int and value >= low)


def _prompted(ask: Ask, body: dict) -> Followed | Relayed:
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and not isinstance(prompt[0], int):
        prompt = prompt[0]  # a batch of one
    if isinstance(prompt, str):
        return Followed(ask, prompt, add_special_tokens=body.get("add_special_tokens") is not False)
    if isinstance(prompt, list) and prompt and all(type(one) is int and 0 <= one < IDS_END for one in prompt):
        return Followed(ask, tuple(prompt))
    return Relayed("prompt")


def _rendered(ask: Ask, body: dict) -> Followed | Relayed:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        return Relayed("messages")
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            return Relayed("messages")
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if not isinstance(content, str | list) or any(not isinstance(part, dict) or part.get("type") != "text" for part in parts):
            return Relayed("messages")  # pictures, sounds, calls of tools: their ids alone are not the prompt
        if any(value is not None for name, value in message.items() if name not in ("role", "content", "name")):
            return Relayed("messages")
    template = {name: body[name] for name in TEMPLATE if name != "max_completion_tokens" and body.get(name) is not None}
    return Followed(ask, template=template)
