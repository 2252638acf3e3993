"""One client's answer across several instances: what was emitted, what is still to be asked for, when it is over.

Knows: ids, text, limits, the body of a request to vLLM's /v1/completions. Must not know: I/O, time, instances, the shape of the client's answer.
Invariants: ids are append-only and at most max_tokens; every id is counted once; nothing follows the end; the bodies of all attempts describe one request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from kvguard.errors import BadFrame
from kvguard.gateway.text import Decode, StopStrings
from kvguard.types import Position, ResumeToken

IDS_END = 1 << 31


class Chunk(NamedTuple):
    """What an instance said at once. `finish_reason`: "" while it goes on. `cached_tokens`: of the prompt, not computed: said once, behind the end."""

    ids: tuple[int, ...]
    finish_reason: str = ""
    stop_reason: int | str | None = None
    prompt_tokens: int | None = None  # how long the instance takes the prompt to be, where it says so
    cached_tokens: int | None = None


class Piece(NamedTuple):
    """What the client gets of it: whole characters, and no beginning of a stop string."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str = ""
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Ask:
    """One request that can be resumed, as the policy understood it. `passed`: fields that mean the same for a continuation, as they came."""

    model: str | None
    passed: dict = field(default_factory=dict)
    max_tokens: int | None = None  # None: as far as the model's context goes, until bounded() says how far that is
    min_tokens: int = 0
    stops: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    chat: bool = False
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    return_token_ids: bool = False

    def bounded(self, prompt_tokens: int, context_tokens: int, default_tokens: int = 0) -> Ask:
        """With a number in max_tokens: only a number can be counted on from. `default_tokens`: the backends' own for requests that say none; 0: the context."""
        if self.max_tokens is not None:
            return self
        return replace(self, max_tokens=max(1, min(default_tokens or context_tokens, context_tokens - prompt_tokens)))


class Continuation:
    """`ask`: bounded. `prompt`: ids, as the backend's own tokenizer made them. `decode`: of the ids that follow it."""

    def __init__(self, ask: Ask, prompt: Sequence[int], decode: Decode) -> None:
        assert ask.max_tokens is not None, "an answer without a bound"
        self.ask, self.prompt, self._decode = ask, tuple(prompt), decode
        self.ids: list[int] = []
        self.finish_reason = ""
        self.stop_reason: int | str | None = None
        self._stops = StopStrings(ask.stops, ask.include_stop, ask.min_tokens)

    def body(self, moved: dict | None = None, cache_salt: str = "") -> dict:
        """The request for what is missing. `moved`: an encoded resume token; `cache_salt`: the private one of a resumed request."""
        assert not self.finish_reason, "nothing is missing"
        ask, emitted = self.ask, len(self.ids)
        body = {**ask.passed, "prompt": [*self.prompt, *self.ids], "stream": True, "return_token_ids": True, "skip_special_tokens": ask.skip_special_tokens}
        if ask.model is not None:
            body["model"] = ask.model
        body["max_tokens"] = ask.max_tokens - emitted
        if ask.min_tokens > emitted:
            body["min_tokens"] = ask.min_tokens - emitted
        if moved is not None:
            body["kv_transfer_params"] = {"kvguard": moved}
            body["stream_options"] = {"include_usage": True}  # where the instance says how much it restored
        if cache_salt:
            body["cache_salt"] = cache_salt
        return body

    def take(self, chunk: Chunk) -> Piece:
        """What the client gets of a chunk. Raises BadFrame, changing nothing, for one that no correct instance sends."""
        self._check(chunk)
        text, taken = [], 0
        for number, token in enumerate(chunk.ids, 1):
            self.ids.append(token)
            taken = number
            # The id that stopped the engine (end of text, stop_token_ids) has no text, unless it was asked for.
            stopping = chunk.finish_reason == "stop" and number == len(chunk.ids) and not self.ask.include_stop
            text.append(self._stops.feed("" if stopping else self._decode(token), len(self.ids)))
            if self._stops.found:
                return self._end("stop", self._stops.found, "".join(text), chunk.ids[:taken])
        if chunk.finish_reason:
            return self._end(chunk.finish_reason, chunk.stop_reason, "".join(text) + self._stops.flush(), chunk.ids)
        if len(self.ids) == self.ask.max_tokens:  # the instance would say so next, if it still could
            return self._end("length", None, "".join(text) + self._stops.flush(), chunk.ids)
        return Piece("".join(text), chunk.ids)

    def known(self, token: ResumeToken) -> bool:
        """Whether `token` is of this very sequence: a token of other ids would bring another sequence's KV."""
        theirs = (*token.prefix, *token.tokens)
        mine = (*self.prompt, *self.ids)
        count = min(len(theirs), len(mine))
        return token.position <= len(theirs) and theirs[:count] == mine[:count]

    @property
    def length(self) -> Position:
        return len(self.prompt) + len(self.ids)

    def usage(self) -> dict:
        return {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.ids), "total_tokens": self.length}

    def _check(self, chunk: Chunk) -> None:
        if self.finish_reason:
            raise BadFrame("ids after the end")
        if any(type(token) is not int or not 0 <= token < IDS_END for token in chunk.ids):
            raise BadFrame("something that isn't a token id")
        if len(self.ids) + len(chunk.ids) > self.ask.max_tokens:
            raise BadFrame(f"more ids than the {self.ask.max_tokens} that were asked for")
        if chunk.prompt_tokens is not None and chunk.prompt_tokens != self.length:
            raise BadFrame(f"a prompt of {chunk.prompt_tokens} ids in place of {self.length}")
        if chunk.finish_reason not in ("", "stop", "length"):
            raise BadFrame(f"the end {chunk.finish_reason!r}")
        if chunk.finish_reason == "stop" and not chunk.ids and not self.ids:
            raise BadFrame("a stop without an id")

    def _end(self, reason: str, stop_reason: int | str | None, text: str, ids: tuple[int, ...]) -> Piece:
        self.finish_reason, self.stop_reason = reason, stop_reason
        return Piece(text, tuple(ids), reason, stop_reason)
