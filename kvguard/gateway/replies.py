"""The answers of an OpenAI server: chunks, whole answers, errors.

Knows: their shape. Must not know: where the pieces came from: one id, one creation time, one usage for one request, however many instances served it.
Invariant: every function returns a JSON-safe dict; nothing of the gateway's inside (instances, attempts) is said to a client.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from kvguard.gateway.continuation import Continuation, Piece

DONE = b"data: [DONE]\n\n"


def event(document: dict) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error(message: str, kind: str, status: int, code: str | None = None, param: str | None = None) -> dict:
    """`code`: a word for programs; without one the status stands there, as vLLM does."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code or status}}


@dataclass(frozen=True)
class Reply:
    """What is the same in everything that one request is answered with. `created`: Unix time, seconds."""

    id: str
    created: int
    model: str
    chat: bool

    def head(self) -> dict | None:
        """What a chat's stream begins with."""
        return self._chunk([{"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}]) if self.chat else None

    def chunk(self, piece: Piece, prompt: tuple[int, ...] | None, with_ids: bool, usage: dict | None) -> dict | None:
        """One piece as a chunk; None where there is nothing to say. `prompt`: its ids, with the first chunk, where ids were asked for."""
        if not piece.text and not piece.finish_reason and not (with_ids and piece.ids) and prompt is None:
            return None
        choice: dict = {"index": 0, "logprobs": None, "finish_reason": piece.finish_reason or None}
        if self.chat:
            choice["delta"] = {"content": piece.text}
        else:
            choice["text"] = piece.text
        if piece.finish_reason:
            choice["stop_reason"] = piece.stop_reason
        if with_ids:
            choice["token_ids"] = list(piece.ids)
        if with_ids and prompt is not None and not self.chat:
            choice["prompt_token_ids"] = list(prompt)
        chunk = self._chunk([choice])
        if with_ids and prompt is not None and self.chat:
            chunk["prompt_token_ids"] = list(prompt)
        if usage is not None:
            chunk["usage"] = usage
        return chunk

    def tail(self, usage: dict) -> dict:
        """The last chunk, where usage was asked for."""
        return {**self._chunk([]), "usage": usage}

    def whole(self, text: str, answer: Continuation, with_ids: bool) -> dict:
        """The answer to a request that doesn't stream."""
        choice: dict = {"index": 0, "logprobs": None, "finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        document = {"id": self.id, "object": "chat.completion" if self.chat else "text_completion", "created": self.created, "model": self.model}
        if with_ids:
            choice["token_ids"] = answer.ids
            (document if self.chat else choice)["prompt_token_ids"] = list(answer.prompt)
        return {**document, "choices": [choice], "usage": answer.usage()}

    def _chunk(self, choices: list[dict]) -> dict:
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}
