"""Which requests may go on in another vLLM as "prompt + what was generated", and which may not, because vLLM would then mean something else by them.

Knows: names of sampling parameters, as vLLM and its OpenAI-compatible server spell them. Must not know: vLLM, HTTP, who resubmits.
Invariants: whatever counts, matches or constrains generated tokens is refused unless the resumed request means the same; of an engine's own request a
parameter that isn't known here by name, and is set, is refused too. Pure functions.
"""

from __future__ import annotations

import re
from typing import Any

_UNSET = (None, "", [], {}, (), 0, 0.0, False)
_SAID_BY_ZERO = frozenset(("seed", "prompt_logprobs", "prompt_logprob_token_ids", "thinking_token_budget", "truncate_prompt_tokens"))  # only None unsets them
_ONE_OF_SEVERAL = re.compile(r"\d+_")  # before the id of a request with n > 1, for each of its answers; what a router or client chose has a prefix before it
_NEUTRAL: dict[str, Any] = {"response_format": {"type": "text"}, "best_of": 1}  # where another value means nothing, too

# parameter -> why a resumed request would mean something else by it. Parameters at their neutral value (here: unset or zero) mean nothing.
REFUSED = {
    "presence_penalty": "counts generated tokens only, and vLLM would count the earlier ones as prompt",
    "frequency_penalty": "counts generated tokens only, and vLLM would count the earlier ones as prompt",
    "bad_words": "is matched over generated tokens only: a match across the resume would be missed",
    "structured_outputs": "the grammar would start anew in the middle of its text",
    "guided_json": "the grammar would start anew in the middle of its text",
    "guided_regex": "the grammar would start anew in the middle of its text",
    "guided_choice": "the grammar would start anew in the middle of its text",
    "guided_grammar": "the grammar would start anew in the middle of its text",
    "response_format": "the grammar would start anew in the middle of its text",
    "tools": "the tool parser would start anew in the middle of its text",
    "repetition_detection": "looks at generated tokens only",
    "thinking_token_budget": "counts generated tokens only",
    "reasoning_effort": "the reasoning parser would start anew in the middle of its text",
    "prompt_logprobs": "would be given for generated tokens as well",
    "prompt_logprob_token_ids": "would be given for generated tokens as well",
    "echo": "would repeat generated tokens as prompt",
    "best_of": "chooses among several answers at their end",
    "use_beam_search": "chooses among several answers at their end",
    "watermarking": "its key depends on the place in the answer",
    "logits_processors": "may look at the generated tokens",
    "suffix": "the suffix belongs behind the original prompt",
    "prompt_embeds": "the prompt isn't known by ids",
    "truncate_prompt_tokens": "would cut the prompt again, now with what was generated",
}
# What means the same after a resume; `max_tokens` and `min_tokens` where whoever resubmits takes off what was generated.
UNCHANGED = frozenset(
    """repetition_penalty temperature top_p top_k min_p stop stop_token_ids ignore_eos max_tokens max_completion_tokens min_tokens logprobs top_logprobs
    logprob_token_ids logit_bias allowed_token_ids detokenize skip_special_tokens spaces_between_special_tokens include_stop_str_in_output output_kind
    stream_interval flat_logprobs skip_reading_prefix_cache output_text_buffer_length skip_clone""".split()
)
_SEVERAL = "n: several answers of one request can't be told apart once they are prompts"
_ELSEWHERE = frozenset(("n", "seed", "extra_args"))  # looked at by themselves
_OF_THE_SERVER = frozenset(("kv_transfer_params",))  # what vLLM's server itself puts into extra_args


def refusal_of_parameters(parameters: dict[str, Any], samples_by_position: bool = False) -> str:
    """Why a request with these sampling parameters can't be resumed; "" where it can. Names as in vLLM's SamplingParams or in an OpenAI-style body.

    `samples_by_position`: the engine draws by (seed, position), as vLLM's V2 runner does; V1 keeps a generator per request, whose state dies with it.
    """
    for name, reason in REFUSED.items():
        value = parameters.get(name)
        if not _is_unset(name, value) and value != _NEUTRAL.get(name):
            return f"{name}: {reason}"
    if (parameters.get("n") or 1) != 1:
        return _SEVERAL
    if parameters.get("seed") is not None and parameters.get("temperature") != 0 and not samples_by_position:
        return "seed: the generator's state is lost with the engine, another one would draw other tokens"
    return ""


def refusal_of_request(request: Any, samples_by_position: bool = False) -> str:
    """Why a vLLM scheduler's request (vllm.v1.request.Request) can't be resumed; "" where it can."""
    if request.sampling_params is None:
        return "it generates nothing (pooling)"
    if request.lora_request is not None:
        return "lora: KV depends on the adapter, which other instances need not have"
    if request.mm_features:
        return "multimodal inputs: positions depend on inputs that aren't ids"
    if request.prompt_embeds is not None:
        return "prompt_embeds: the prompt isn't known by ids"
    if request.resumable:
        return "a session of streamed inputs: its ids are rewritten between inputs"
    if _ONE_OF_SEVERAL.match(request.request_id):
        return _SEVERAL
    parameters = parameters_of(request.sampling_params)
    extra = sorted(set(parameters.get("extra_args") or ()) - _OF_THE_SERVER)
    if extra:
        return f"extra_args: {', '.join(extra)} may be read by a logits processor that looks at the generated tokens"
    unknown = sorted(set(parameters) - set(REFUSED) - UNCHANGED - _ELSEWHERE)
    if unknown:
        return f"{unknown[0]}: not known here, so nobody says that it means the same in a resumed request"
    return refusal_of_parameters(parameters, samples_by_position)


def parameters_of(sampling: Any) -> dict[str, Any]:
    """A SamplingParams' public fields that aren't unset, by name; its temperature, of which 0 says most, in any case."""
    fields = getattr(sampling, "__struct_fields__", None) or vars(sampling)
    said = {name: getattr(sampling, name) for name in fields if not name.startswith("_")}
    return {name: value for name, value in said.items() if name == "temperature" or not _is_unset(name, value)}


def _is_unset(name: str, value: Any) -> bool:
    if name in _SAID_BY_ZERO:
        return value is None
    return any(value is unset or (type(value) is type(unset) and value == unset) for unset in _UNSET)
