"""A server that behaves like vLLM's, as far as the gateway can see, around the toy model. `python fake_backend.py PORT_FD [INSTANCE SOCKET]`: serves on that
descriptor, and keeps its KV beside the kvguard node at SOCKET.

POST /control changes it: delay_ms a token, garbage (how its answers are wrong), stall (after so many ids nothing comes), garbage_after ([DONE] instead),
chunk (ids at once), healthy, restores (whether KV comes where it is asked for), tells (usage says how much of the prompt wasn't computed, as vLLM with
--enable-prompt-tokens-details), chat_bytes (of an answer that isn't streamed), html (instead of a chat's stream), form
(how a chat's stream is written: "crlf", or "comments", and events without anything), refuses (with which status every completion is refused in good form),
fails_at (the word in whose place a chat's stream says an error of `code`, and ends in order); reset.
GET /control: the bodies and headers that came, how many streams were broken off, how often somebody looked at its health.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.gateway import toy_model
from tests.gateway.toy_model import CONTEXT_TOKENS, EOS

MODEL = "toy"
DEFAULTS = {"delay_ms": 1, "garbage": "", "stall": -1, "garbage_after": -1, "chunk": 1, "healthy": True, "status": 200, "restores": True, "tells": True,
            "chat_bytes": 0, "html": False, "form": "", "refuses": 0, "fails_at": "", "code": 500}
settings = dict(DEFAULTS)
kept = None  # tests/gateway/kept.py's, where there is a node
seen: dict = {"requests": [], "broken_off": 0, "open": 0, "looks": 0}


def refused(message: str, status: int = 400) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "BadRequestError", "param": None, "code": status}}, status)


def usage_of(body: dict) -> dict:
    """Behind an answer's end. Without a node beside it the fake only says that it restored."""
    moved = (body.get("kv_transfer_params") or {}).get("kvguard")
    cached = 0 if moved is None or not settings["restores"] else moved["position"] if kept is None else kept.restored(moved["sequence"])
    details = {"prompt_tokens_details": {"cached_tokens": cached}} if settings["tells"] else {}
    return {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"], "total_tokens": len(body["prompt"]) + body["max_tokens"], **details}


def event(document: dict) -> str:
    return f"data: {json.dumps(document)}\n\n"


GARBAGE = {
    "json": "data: {not json\n\n",
    "bytes": b"data: \xff\xfe\n\n",
    "list": "data: [1, 2]\n\n",
    "no_ids": event({"choices": [{"index": 0, "text": "hello", "finish_reason": None}]}),
    "bad_ids": event({"choices": [{"index": 0, "text": "x", "token_ids": ["1", None], "finish_reason": None}]}),
    "negative": event({"choices": [{"index": 0, "text": "x", "token_ids": [-5], "finish_reason": None}]}),
    "huge": event({"choices": [{"index": 0, "text": "x", "token_ids": [1 << 40], "finish_reason": None}]}),
    "choices": event({"choices": [{"index": 1, "text": "x", "token_ids": [1]}]}),
    "error": event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}}),
    "endless": "data: " + "x" * (17 << 20),
    "done": "data: [DONE]\n\n",
    "abort": event({"choices": [{"index": 0, "text": "", "token_ids": [97], "finish_reason": "abort"}]}),
    "too_many": event({"choices": [{"index": 0, "text": "", "token_ids": [97] * 5000, "finish_reason": None}]}),
}


async def tokens(body: dict, name: str):
    """(new ids, finish reason, stop reason), a chunk at a time."""
    moved = (body.get("kv_transfer_params") or {}).get("kvguard")
    if kept is not None and moved is not None:
        await asyncio.to_thread(kept.fetch, name, body["prompt"], moved)
        seen["outcomes"] = kept.outcomes
    ids, emitted, wanted = list(body["prompt"]), [], body["max_tokens"]
    stops = body.get("stop_token_ids") or []
    pending: list[int] = []
    while True:
        if 0 <= settings["garbage_after"] <= len(emitted):
            return  # [DONE] before the end
        if settings["stall"] >= 0 and len(emitted) >= settings["stall"]:
            await asyncio.sleep(3600)
        await asyncio.sleep(settings["delay_ms"] / 1000)
        may_end = not body.get("ignore_eos") and len(emitted) >= body.get("min_tokens", 0)
        new = toy_model.next_id(ids, may_end)
        ids.append(new)
        emitted.append(new)
        if kept is not None:
            kept.commit(name, ids)
        pending.append(new)
        end = "stop" if new == EOS or (new in stops and len(emitted) > body.get("min_tokens", 0)) else "length" if len(emitted) >= wanted else ""
        if end or len(pending) >= settings["chunk"]:
            yield pending, end, new if new in stops else None
            pending = []
        if end:
            return


async def completions(request: Request) -> Response:
    body = await request.json()
    seen["requests"].append({"path": request.url.path, "body": body, "headers": dict(request.headers)})
    if settings["status"] != 200:
        return Response("<html>broken</html>", settings["status"])
    if settings["refuses"]:
        return refused("not here", settings["refuses"])
    prompt = body.get("prompt")
    if body.get("model") not in (None, MODEL):
        return refused(f"The model `{body['model']}` does not exist.", 404)
    if not isinstance(prompt, list) or not prompt or "max_tokens" not in body or not all(type(one) is int for one in prompt):
        return refused("the fake knows ids alone")
    if len(prompt) + body["max_tokens"] > CONTEXT_TOKENS:
        return refused("this model's maximum context length is exceeded")
    if not body.get("stream"):
        return refused("the fake streams")

    async def stream():
        seen["open"] += 1
        whole, name = False, request.headers["x-request-id"]
        try:
            first = True
            async for new, end, reason in tokens(body, name):
                if settings["garbage"]:
                    yield GARBAGE[settings["garbage"]]
                    whole = True
                    return
                choice = {"index": 0, "text": "?", "logprobs": None, "finish_reason": end or None, "stop_reason": reason}
                if body.get("return_token_ids"):
                    choice |= {"token_ids": new, "prompt_token_ids": prompt if first else None}
                yield event({"id": "cmpl-x", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]})
                first = False
            if (body.get("stream_options") or {}).get("include_usage"):
                yield event({"id": "cmpl-x", "object": "text_completion", "created": 1, "model": MODEL, "choices": [], "usage": usage_of(body)})
            yield "data: [DONE]\n\n"
            whole = True
        finally:
            if kept is not None:
                kept.release(name)
            seen["open"] -= 1
            seen["broken_off"] += not whole

    return StreamingResponse(stream(), media_type="text/event-stream")


async def chat(request: Request) -> Response:
    """Relayed requests end here; the fake says the same three words to all."""
    body = await request.json()
    seen["requests"].append({"path": request.url.path, "body": body, "headers": dict(request.headers)})
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "one two three" + "." * settings["chat_bytes"]}, "finish_reason": "stop"}
        return JSONResponse({"id": "chatcmpl-x", "object": "chat.completion", "created": 1, "model": MODEL, "choices": [choice]})

    async def stream():
        if settings["html"]:
            yield "<html>\n\n<body>502</body>\n\ndata: [DONE]\n\n"
            return
        for word in ("one ", "two ", "three"):
            await asyncio.sleep(settings["delay_ms"] / 1000)
            if settings["fails_at"] == word.strip():
                yield event({"error": {"message": "EngineCore died", "type": "InternalServerError", "param": None, "code": settings["code"]}})
                break
            if word != "one " and settings["stall"] >= 0:
                await asyncio.sleep(3600)
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            yield event({"id": "chatcmpl-x", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]})
        yield "data: [DONE]\n\n"

    async def formed():
        """As the specification of server-sent events also allows it to be written."""
        form = settings["form"]
        if form == "comments":
            yield "\ufeff: a comment\n\n\n\nretry: 9\n\n"
        async for one in stream():
            yield one.replace("\n", "\r\n") if form == "crlf" else f": here\nevent: chunk\nid\nother: x\n{one}\n: still here\n\n" if form == "comments" else one

    return StreamingResponse(formed(), media_type="text/event-stream")


async def tokenize(request: Request) -> Response:
    body = await request.json()
    text = body["prompt"] if "prompt" in body else "".join(f"<{one['role']}>{one['content']}\n" for one in body["messages"]) + "<assistant>"
    ids = list(text.encode())
    return JSONResponse({"count": len(ids), "max_model_len": CONTEXT_TOKENS, "tokens": ids, "token_strs": None})


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "max_model_len": CONTEXT_TOKENS}]})


async def health(request: Request) -> Response:
    seen["looks"] += 1
    return Response(status_code=200 if settings["healthy"] else 503)


async def control(request: Request) -> Response:
    if request.method == "POST":
        wanted = await request.json()
        if wanted.pop("reset", False):
            settings.update(DEFAULTS)
            seen.update(requests=[], broken_off=0)
        settings.update(wanted)
    return JSONResponse(seen)


app = Starlette(
    routes=[
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/tokenize", tokenize, methods=["POST"]),
        Route("/v1/models", models),
        Route("/health", health),
        Route("/control", control, methods=["GET", "POST"]),
    ]
)

if __name__ == "__main__":
    if len(sys.argv) > 2:
        from tests.gateway.kept import Kept

        kept = Kept(*sys.argv[2:])
    with socket.socket(fileno=int(sys.argv[1])) as bound:
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[bound])
