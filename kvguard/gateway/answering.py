"""One client's request from its body to the last byte of its answer.

Knows: ASGI, the order in which things can go wrong for a client. Must not know: how an answer goes on elsewhere (journey.py).
Invariants: a status is sent once it is certain, errors before it as JSON with a status, after it as an event; whoever leaves, or doesn't read for client_ms,
is not served any further, and the instance's connection is closed; delivered() is said after the last byte was given to the connection, whatever happened;
a stream that has begun is never silent for longer than about KEEP_ALIVE_S, however long its instance is looked for.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from kvguard.errors import KvguardError
from kvguard.gateway import policy, replies
from kvguard.gateway.admission import Admission, NotAdmitted
from kvguard.gateway.events import Declined, Lost
from kvguard.gateway.fleet import NoInstance
from kvguard.gateway.journey import Journey, Surroundings, Unbounded
from kvguard.gateway.policy import BadRequest, Followed
from kvguard.gateway.relay import Relay
from kvguard.gateway.replies import Reply
from kvguard.limits import KIB

RETRY_AFTER_S = 1
PIECE_BYTES = 64 * KIB
NOT_ADMITTED = {  # by reason: status, type, code
    "ending": (503, "server_error", "ending"), "in_flight": (429, "rate_limit_error", "overloaded"), "no_instance": (503, "server_error", "no_instance"),
    "slow": (408, "invalid_request_error", None), "too_large": (413, "invalid_request_error", None),
}  # fmt: skip
KEEP_ALIVE_S = 10.0  # less than the minute after which proxies close a connection that says nothing
STILL_HERE = b": kvguard still has this answer\n\n"  # a comment: clients of server-sent events skip it
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class Failure(KvguardError):
    """What the client is told instead of an answer, or of its rest. `outcome`: the label it is counted under."""

    def __init__(self, status: int, kind: str, message: str, code: str | None = None, param: str | None = None, outcome: str = "error") -> None:
        super().__init__(message)
        self.status, self.outcome = status, outcome
        self.document = replies.error(message, kind, status, code, param)


def failure_of(error: KvguardError) -> Failure:
    """What the client is told of an operating error. Nothing of the inside of the cluster is in it."""
    if isinstance(error, Failure):
        return error
    if isinstance(error, BadRequest):
        return Failure(error.status, "invalid_request_error", str(error), None, error.param, "refused")
    if isinstance(error, NotAdmitted):
        status, kind, code = NOT_ADMITTED[error.reason]
        return Failure(status, kind, str(error), code, outcome="refused" if error.reason == "too_large" else error.reason)
    if isinstance(error, NoInstance):
        return Failure(503, "server_error", "No instance can take the request now. Try: again in a moment", "no_instance", outcome="no_instance")
    return Failure(502, "server_error", "The answer was lost, and no other instance could go on with it. Try: again", "answer_lost", outcome="lost")


class Answering(Response):
    """The answer to one request, as an ASGI application."""

    def __init__(self, request: Request, around: Surroundings, chat: bool, admission: Admission) -> None:
        super().__init__()
        self._request, self._around, self._chat, self._admission = request, around, chat, admission
        self._id = f"kvg-{secrets.token_hex(12)}"
        self._route = "refused"
        self._begun = False
        self._said_at = 0.0
        self._client_s = around.settings.client_ms / 1000

    async def __call__(self, scope, receive, send) -> None:
        counters, outcome = self._around.counters, "bug"
        try:
            outcome = await self._served(receive, send)
        except ClientDisconnect:
            outcome = "gone"
        except asyncio.CancelledError:  # the process ends, and doesn't wait any longer
            outcome = "gone"
            raise
        except TimeoutError:  # of the client
            outcome = "slow"
        finally:
            counters.requests.labels(self._route, outcome).inc()

    async def _served(self, receive, send) -> str:
        try:
            body = _object(await self._admission.arrivals.whole(self._request))
            with self._admission.place():
                return await self._in_place(body, receive, send)
        except KvguardError as error:
            return await self._fail(send, failure_of(error))

    async def _in_place(self, body: dict, receive, send) -> str:
        try:
            return await self._while_there(receive, self._answer(body, send))
        except Declined as error:
            await self._json(send, error.status, error.body)
            return "declined"
        except KvguardError as error:
            return await self._fail(send, failure_of(error))

    # ---- the client's side ----

    async def _while_there(self, receive, work) -> str:
        """The outcome of `work`; it is cancelled when the client leaves."""
        working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            both = [working, leaving]
            for one in both:
                if not one.done():
                    one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
        return "gone" if working.cancelled() else working.result()

    async def _send(self, send, message: dict) -> None:
        async with asyncio.timeout(self._client_s):
            await send(message)
        self._said_at = asyncio.get_running_loop().time()

    async def _json(self, send, status: int, content: bytes) -> None:
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode()), (b"x-request-id", self._id.encode())]
        if status in (429, 503):
            headers.append((b"retry-after", str(RETRY_AFTER_S).encode()))
        if status == 408:  # the rest of the body is not waited for
            headers.append((b"connection", b"close"))
        await self._send(send, {"type": "http.response.start", "status": status, "headers": headers})
        for at in range(0, max(1, len(content)), PIECE_BYTES):  # one by one: what a client doesn't read waits here, within its bounds, not in its connection
            end = at + PIECE_BYTES
            await self._send(send, {"type": "http.response.body", "body": content[at:end], "more_body": end < len(content)})

    async def _events(self, send, source: AsyncIterator[bytes]) -> None:
        """The status with the first event: until then an error still has one of its own."""
        comforting: asyncio.Future | None = None
        try:
            async for some in source:
                if not self._begun:
                    self._begun = True
                    headers = [*STREAM_HEADERS, (b"x-request-id", self._id.encode())]
                    await self._send(send, {"type": "http.response.start", "status": 200, "headers": headers})
                    comforting = asyncio.ensure_future(self._comfort(send))
                await self._send(send, {"type": "http.response.body", "body": some, "more_body": True})
        finally:
            if comforting is not None:
                comforting.cancel()
                await asyncio.gather(comforting, return_exceptions=True)  # a client that doesn't read is seen with the next event, too
        await self._send(send, {"type": "http.response.body", "body": b""})

    async def _comfort(self, send) -> None:
        """Says now and then that a silent answer is not forgotten. Whole events alone are sent, so a comment may stand between any two."""
        while True:
            silent_s = asyncio.get_running_loop().time() - self._said_at
            if silent_s >= KEEP_ALIVE_S:
                await self._send(send, {"type": "http.response.body", "body": STILL_HERE, "more_body": True})
            else:
                await asyncio.sleep(KEEP_ALIVE_S - silent_s)

    async def _fail(self, send, failure: Failure) -> str:
        if not self._begun:
            await self._json(send, failure.status, msgspec.json.encode(failure.document))
        else:
            self._around.counters.unresumed.labels(failure.outcome).inc()
            await self._send(send, {"type": "http.response.body", "body": replies.event(failure.document) + replies.DONE})
        return failure.outcome

    # ---- the answer ----

    async def _answer(self, body: dict, send) -> str:
        settings = self._around.settings
        found = policy.decide(body, self._chat, settings.seeded == "position")
        if isinstance(found, Followed) and not (self._chat and settings.chat == "relayed"):
            try:
                return await self._follow(found, send)
            except Unbounded:
                return await self._relay(body, "max_tokens", send)
        return await self._relay(body, "chat" if isinstance(found, Followed) else found.reason, send)

    async def _follow(self, followed: Followed, send) -> str:
        self._route = "followed"
        journey = Journey(self._around, followed, self._id, self._request.headers)
        try:
            await journey.start()
            if followed.ask.stream:
                async with aclosing(self._chunks(journey)) as events:
                    await self._events(send, events)
            else:
                async with aclosing(journey.pieces()) as pieces:
                    text = "".join([piece.text async for piece in pieces])
                document = self._reply_of(followed.ask.model).whole(text, journey.answer, followed.ask.return_token_ids)
                await self._json(send, 200, msgspec.json.encode(document))
        finally:
            journey.end()
        return "complete"

    async def _chunks(self, journey: Journey) -> AsyncGenerator[bytes]:
        ask, answer, reply = journey.answer.ask, journey.answer, None
        async with aclosing(journey.pieces()) as pieces:
            async for piece in pieces:
                first, reply = reply is None, reply or self._reply_of(ask.model)
                if first and (head := reply.head()) is not None:
                    yield replies.event(head)
                prompt = answer.prompt if first and ask.return_token_ids else None
                chunk = reply.chunk(piece, prompt, ask.return_token_ids, answer.usage() if ask.continuous_usage else None)
                if chunk is not None:
                    yield replies.event(chunk)
        yield (replies.event(reply.tail(answer.usage())) if ask.include_usage else b"") + replies.DONE

    def _reply_of(self, model: str | None) -> Reply:
        return Reply(f"{'chatcmpl' if self._chat else 'cmpl'}-{self._id}", int(time.time()), model or self._around.fleet.model, self._chat)

    async def _relay(self, body: dict, reason: str, send) -> str:
        self._route = "relayed"
        # The path is ours: the request's own URL has the client's Host in it, and older starlettes take a path out of that.
        path = "/v1/chat/completions" if self._chat else "/v1/completions"
        relay = Relay(self._around, path, body, self._id, self._request.headers)
        try:
            if body.get("stream") is True:
                async with aclosing(relay.stream()) as parts:
                    await self._events(send, parts)
            else:
                await self._json(send, 200, await relay.whole())
        except Lost as lost:
            message = f"The instance was lost, and a request with {reason!r} can't be resumed. Try: again"
            raise Failure(502, "server_error", message, "not_resumable", reason, _label(reason)) from lost
        finally:
            relay.end()
        return "complete"


def _object(content: bytearray) -> dict:
    """A body's JSON object. Raises BadRequest."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise BadRequest("The body isn't JSON. Try: a JSON object") from error
    if not isinstance(body, dict):
        raise BadRequest("The body isn't a JSON object. Try: one")
    return body


def _label(field: str) -> str:
    """A request's field as a metric's label: what no list knows is "other", as clients may call fields anything."""
    return field if field in policy.LABELS else "other"


async def _left(receive) -> None:
    """Ends when the client has closed its side."""
    while (await receive())["type"] != "http.disconnect":
        pass
