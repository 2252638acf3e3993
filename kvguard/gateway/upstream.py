"""Conversations with one instance's server, as far as the gateway has them itself.

Knows: httpx, the paths of vLLM's server, timeouts. Must not know: sequences, recoveries, clients.
Invariants: whatever goes wrong is Lost with a kind, or Declined; no answer is read further than its bound; leaving a stream closes its connection, which
is how vLLM learns that nobody waits any more. Only the headers named here cross the gateway.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from dataclasses import dataclass

import httpx
import msgspec

from kvguard.gateway import events, replies
from kvguard.gateway.continuation import IDS_END, Chunk
from kvguard.gateway.events import DONE, Declined, Event, Events, Lost, json_object
from kvguard.limits import KIB, MIB

ANSWER_BYTES_MAX = 64 * MIB  # whole answers (relayed, tokenized): bounded, whatever the instance says
PASSED_HEADERS = ("authorization", "traceparent", "tracestate")
HEALTH_BYTES_MAX = 64 * KIB
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class Tokenized:
    """`context_tokens`: prompt and answer together, 0 where the instance doesn't say."""

    ids: tuple[int, ...]
    context_tokens: int


class Upstream:
    """One instance's server at `url`, through a client that the gateway owns."""

    def __init__(self, client: httpx.AsyncClient, url: str, idle_s: float) -> None:
        self._client, self._url, self._idle_s = client, url.rstrip("/"), idle_s

    async def completion(self, body: dict, request_id: str, headers: Mapping[str, str]) -> AsyncIterator[Chunk]:
        """The chunks of a streamed completion, to its [DONE]. Raises Lost, Declined."""
        async with contextlib.aclosing(self.streamed("/v1/completions", body, request_id, headers)) as parts:
            async for part in parts:
                for event in part:
                    if event.data == DONE:
                        return
                    if (news := events.chunk(event.data)) is not None:
                        yield news
        raise Lost("ended", "the stream ended without [DONE]")

    async def streamed(self, path: str, body: dict, request_id: str, headers: Mapping[str, str]) -> AsyncGenerator[list[Event]]:
        """The events of the answer to `body`, as they come, those that have data: whoever says comments alone says nothing. Raises Lost, Declined."""
        taken, now = Events(), asyncio.get_running_loop().time
        async with self.opened(path, body, request_id, headers) as response:
            due = now() + self._idle_s
            async for some in self.bytes_of(response):
                if part := [event for event in taken.feed(some) if event.data]:
                    yield part
                    due = now() + self._idle_s
                elif now() > due:
                    raise Lost("idle", f"no event with data for {self._idle_s:g} s")

    @contextlib.asynccontextmanager
    async def opened(self, path: str, body: dict, request_id: str, headers: Mapping[str, str]) -> AsyncIterator[httpx.Response]:
        """The response to a POST, its body still to be read, once the status says that there is one. Raises Lost, Declined."""
        own = {"x-request-id": request_id.encode(), "content-type": b"application/json"}
        request = self._client.build_request("POST", self._url + path, content=msgspec.json.encode(body), headers={**_passed(headers), **own})
        response = await self._sent(request)
        try:
            if response.status_code != 200:
                said = await self.whole(response)
                if 400 <= response.status_code < 500 and response.status_code not in RETRIED_STATUS and _is_object(said):
                    raise Declined(response.status_code, said)
                raise Lost("status", f"the instance answered {response.status_code}")
            yield response
        finally:
            await response.aclose()

    async def passed(self, path: str, body: dict, request_id: str, headers: Mapping[str, str]) -> AsyncGenerator[bytes]:
        """The bytes of the answer to `body`, as they come, within their bound. Raises Lost, Declined."""
        async with self.opened(path, body, request_id, headers) as response:
            async for some in self.bytes_of(response, bounded=True):
                yield some

    async def bytes_of(self, response: httpx.Response, bounded: bool = False) -> AsyncIterator[bytes]:
        """A body as it comes. Raises Lost; also for one of more than ANSWER_BYTES_MAX, where it is `bounded`."""
        taken = 0
        try:
            async for some in response.aiter_bytes():
                taken += len(some)
                if bounded and taken > ANSWER_BYTES_MAX:
                    raise Lost("garbage", f"an answer of more than {ANSWER_BYTES_MAX} bytes")
                yield some
        except httpx.ReadTimeout as error:
            raise Lost("idle", f"nothing for {self._idle_s:g} s") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise Lost("connection", f"{type(error).__name__}: {error}") from error

    async def whole(self, response: httpx.Response) -> bytes:
        """A body within its bound. Raises Lost."""
        return b"".join([some async for some in self.bytes_of(response, bounded=True)])

    async def tokenize(self, body: dict, request_id: str, headers: Mapping[str, str]) -> Tokenized:
        """Prompt ids of a text ({"prompt": ...}) or a conversation ({"messages": ...}). Raises Lost, Declined."""
        async with self.opened("/tokenize", body, request_id, headers) as response:
            said = await self.whole(response)
        document = json_object(said)
        ids, context = document.get("tokens"), document.get("max_model_len")
        if ids == []:  # an empty text, or one that the tokenizer makes nothing of: no fault of the instance's, whom this would bring into doubt
            raise Declined(400, msgspec.json.encode(replies.error("The prompt has no tokens. Try: some text", "invalid_request_error", 400, param="prompt")))
        if not isinstance(ids, list) or not ids or any(type(one) is not int or not 0 <= one < IDS_END for one in ids):
            raise Lost("garbage", "a tokenized prompt without ids")
        return Tokenized(tuple(ids), context if type(context) is int else 0)

    async def models(self, headers: Mapping[str, str], timeout_s: float) -> dict:
        """The instance's /v1/models. Raises Lost, Declined."""
        request = self._client.build_request("GET", f"{self._url}/v1/models", headers=_passed(headers), timeout=timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._sent(request)
                try:
                    said = await self.whole(response)
                finally:
                    await response.aclose()
        except TimeoutError as error:
            raise Lost("idle", f"no whole answer within {timeout_s:g} s") from error
        if response.status_code in (401, 403):
            raise Declined(response.status_code, said)
        if response.status_code != 200:
            raise Lost("status", f"the instance answered {response.status_code}")
        return json_object(said)

    async def healthy(self, timeout_s: float) -> bool:
        """Whether the engine behind the server says that it lives."""
        taken = 0
        try:
            async with asyncio.timeout(timeout_s), self._client.stream("GET", f"{self._url}/health", timeout=timeout_s) as response:
                async for some in response.aiter_raw():  # whole, so that the connection can be used again, but no more than belongs there
                    taken += len(some)
                    if taken > HEALTH_BYTES_MAX:
                        break
                return response.status_code == 200
        except (httpx.HTTPError, httpx.StreamError, TimeoutError):
            return False

    async def _sent(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except httpx.ReadTimeout as error:
            raise Lost("idle", f"no answer for {self._idle_s:g} s") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise Lost("unreached", f"{type(error).__name__}: {error}") from error
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise Lost("connection", f"{type(error).__name__}: {error}") from error


def _passed(headers: Mapping[str, str]) -> dict[str, bytes]:
    """Of a client's headers those that cross the gateway, as the bytes that came: they need not be ASCII."""
    return {name: value.encode("latin-1") for name, value in headers.items() if name.lower() in PASSED_HEADERS}


def _is_object(said: bytes) -> bool:
    try:
        return bool(json_object(said))
    except Lost:
        return False
