"""What neither side should do on its connection, and does: heads that aren't ASCII, bodies as deep as they may be, clients that vanish behind a second request
or never read, servers whose answers don't end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
import threading

import httpx
import openai
import pytest

from kvguard.gateway import connections, upstream
from kvguard.gateway.upstream import Upstream
from tests.gateway.conftest import events_of, until
from tests.gateway.test_ill_clients import HEAD, answers, dialled, ended, posted
from tests.gateway.test_streams import PROMPT, expected

pytestmark = pytest.mark.e2e
LONG = json.dumps({"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}).encode()


def test_a_key_that_is_not_ascii(world):
    """A header is bytes; the engine judges keys."""
    world.start("a")
    content = json.dumps({"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}).encode()
    with dialled(world) as raw:
        raw.sendall(HEAD + b"authorization: Bearer \xe9\xff\r\ntraceparent: \x80\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
        ((status, said),) = answers(raw, 1)
    assert (status, said["choices"][0]["text"]) == (200, expected(PROMPT, 5, False))
    assert world.in_flight("a")[0]["headers"]["authorization"].encode("latin-1") == b"Bearer \xe9\xff"


def test_a_client_that_vanishes_behind_a_second_request(world):
    """Nothing is read while a request waits behind another one: its client's end was not seen before the answer's."""
    world.start("a")
    world.backends["a"].set(delay_ms=20)
    with dialled(world) as raw:
        raw.sendall(posted(LONG))
        until("the first to run", lambda: world.backends["a"].seen["open"] == 1)
        raw.sendall(posted(LONG))
        until("the second to wait", lambda: any(one.conn.trailing_data[0] for one in list(world._serving.server_state.connections)))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # its end is a reset
    until("it to be broken off", lambda: world.backends["a"].seen["broken_off"] == 1)
    until("its place to be free", lambda: world.metric("kvguard_gateway_in_flight") == 0)


def test_who_waits_behind_another_is_not_read_for_ever(world):
    """A second request in the row, of a body without end: what waits is bounded, and its client with it."""
    world.start("a")
    world.backends["a"].set(stall=3)
    with dialled(world) as raw:
        raw.sendall(posted(LONG) + HEAD + b"content-length: 8000000\r\n\r\n")
        until("the first to run", lambda: world.backends["a"].seen["open"] == 1)
        raw.settimeout(0.5)
        with pytest.raises(TimeoutError):
            raw.sendall(b"x" * 64_000_000)
        waiting = [len(one.conn.trailing_data[0]) for one in list(world._serving.server_state.connections)]
    assert max(waiting) < 1 << 20


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_never_reads_keeps_no_connection(world, monkeypatch, stream):
    """Its answer is given up, and so is what of it nobody fetches: a connection that is only closed waits for that for ever."""
    monkeypatch.setattr(connections, "IDLE_CLIENT_S", 0.3)
    world.start("a", client_ms=300, send_buffer=4096)
    world.backends["a"].set(delay_ms=0, chunk=1)
    body = {"prompt": PROMPT * 60, "max_tokens": 3000, "ignore_eos": True, "stream": stream, "return_token_ids": True}
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = world.url.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        ours = raw.getsockname()
        raw.sendall(posted(json.dumps(body).encode()))
        until("the answer", lambda: world.metric("kvguard_gateway_requests_total", outcome="slow" if stream else "complete", route="followed") == 1)
        until("the connection to be dropped", lambda: not any(one.client == ours for one in list(world._serving.server_state.connections)))
    assert world.metric("kvguard_gateway_in_flight") == 0


def test_a_whole_answer_is_not_given_to_a_connection_that_is_full(world):
    """Relayed, some MB: its place is held until the client has most of it."""
    world.start("a", client_ms=300, send_buffer=4096)
    world.backends["a"].set(chat_bytes=3_000_000)
    body = {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}], "model": "toy"}
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        host, port = world.url.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        content = json.dumps(body).encode()
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
        until("the slow client to be left", lambda: world.metric("kvguard_gateway_requests_total", outcome="slow", route="relayed") == 1)


def test_many_idle_connections_keep_nobody_out(world, monkeypatch):
    """The idle one that was there first makes room."""
    monkeypatch.setattr(connections, "CONNECTIONS_IDLE_MAX", 8)
    world.start("a")
    with contextlib.ExitStack() as stack:
        idle = [stack.enter_context(dialled(world)) for _ in range(12)]
        answer = world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True})
        assert answer.status_code == 200
        assert [ended(raw) for raw in idle[:4]] == [b""] * 4
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert idle[-1].recv(100).startswith(b"HTTP/1.1 200 ")


def test_many_who_ask_as_they_connect_are_all_answered(world, monkeypatch):
    """More than may be idle, and the gateway gets round to all of them at once: what they ask is there already."""
    monkeypatch.setattr(connections, "CONNECTIONS_IDLE_MAX", 8)
    world.start("a")
    going = threading.Event()
    with contextlib.ExitStack() as stack:
        world._serving.servers[0].get_loop().call_soon_threadsafe(going.wait, 20)
        try:
            asking = [stack.enter_context(dialled(world)) for _ in range(24)]
            for raw in asking:
                raw.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        finally:
            going.set()
        assert [raw.recv(15) for raw in asking] == [b"HTTP/1.1 200 OK"] * 24


def test_what_is_no_http_is_refused_in_openais_form(world):
    world.start("a")
    for sent in (b"rubbish\r\n\r\n", HEAD + b"authorization: " + b"x" * 100_000 + b"\r\n\r\n"):
        with dialled(world) as raw:
            raw.sendall(sent)
            ((status, said),) = answers(raw, 1)
        assert status == 400 and said["error"]["type"] == "invalid_request_error" and "Try: " in said["error"]["message"]


# ---- servers ----------------------------------------------------------------------------------------------------------------------


def asked(says, ask):
    """What `ask(upstream)` comes to beside a server that answers each connection with `says(writer)`."""

    async def play():
        over = asyncio.Event()

        async def serve(reader, writer) -> None:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                await says(writer, over)
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        try:
            async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client, asyncio.timeout(20):
                return await ask(Upstream(client, f"http://{host}:{port}", 5.0))
        finally:
            over.set()
            server.close()

    return asyncio.run(play())


async def endless(writer, over) -> None:
    """200, and a body that goes on and on."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
    while not over.is_set():
        writer.write(b" ")
        await writer.drain()
        await asyncio.sleep(0.01)


async def flood(writer, over) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while not over.is_set():
        writer.write(b"x" * 65536)
        await writer.drain()


def test_what_says_that_a_server_lives_has_an_end():
    """It was read for as long as it came, and kept: an endless one was all of the memory."""
    assert not asked(endless, lambda up: up.healthy(0.5))
    assert asked(flood, lambda up: up.healthy(10.0))


def test_models_that_never_end_are_a_lost_answer():
    with pytest.raises(upstream.Lost, match="no whole answer"):
        asked(endless, lambda up: up.models({}, 0.5))


SAID = b'data: {"choices": [{"index": 0, "text": "ab", "token_ids": [97, 98]}]}\n\n'
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"


def chunked(content: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(content), content)


@pytest.mark.parametrize(
    ("sent", "count", "kind"),
    [
        (OK + b"transfer-encoding: chunked\r\n\r\n" + chunked(SAID) + b"400\r\ndata: {", 1, "connection"),  # ends in the middle of a chunk
        (OK + b"transfer-encoding: chunked\r\n\r\n" + chunked(SAID) + b"zz\r\nrubbish", 1, "connection"),
        (OK + b"transfer-encoding: chunked\r\n\r\n" + chunked(SAID + SAID[:20]) + b"0\r\n\r\n", 1, "ended"),  # of an event
        (OK + b"content-length: %d\r\n\r\n" % (2 * len(SAID)) + SAID, 1, "connection"),
        (OK + b"content-encoding: gzip\r\ncontent-length: 5\r\n\r\nhello", 0, "connection"),
        (OK + b"content-length: 2\r\n\r\n{}", 0, "ended"),
        (OK + b"x: " + b"x" * 300_000 + b"\r\n\r\n", 0, "connection"),
        (b"\x00\x01rubbish\r\n\r\n", 0, "connection"),
        (b"", 0, "connection"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 0, "status"),
        (b"HTTP/1.1 307 Elsewhere\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n", 0, "status"),
    ],
)
def test_what_was_whole_before_the_wire_broke_counts_and_the_rest_is_lost(sent, count, kind):
    async def say(writer, over) -> None:
        writer.write(sent)
        await writer.drain()

    taken = []

    async def ask(up) -> None:
        async for chunk in up.completion({"prompt": [1]}, "kvg-x-0", {}):
            taken.append(chunk.ids)

    with pytest.raises(upstream.Lost) as lost:
        asked(say, ask)
    assert (taken, lost.value.kind) == ([(97, 98)] * count, kind)


async def pings(writer, over) -> None:
    """A server, or a proxy, that lives before an engine that doesn't."""
    writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
    while not over.is_set():
        writer.write(b": ping\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("way", ["followed", "relayed"])
def test_comments_alone_are_no_sign_of_life(way):
    """They kept an answer waiting for ever, and told the coordinator of progress."""

    async def ask(up):
        hasty = Upstream(up._client, up._url, 0.3)
        source = hasty.completion({}, "r", {}) if way == "followed" else hasty.streamed("/v1/chat/completions", {}, "r", {})
        async with contextlib.aclosing(source) as items:
            return [item async for item in items]

    with pytest.raises(upstream.Lost, match="no event with data") as lost:
        asked(pings, ask)
    assert lost.value.kind == "idle"


@pytest.mark.parametrize("form", ["crlf", "comments"])
def test_a_relayed_stream_in_another_of_its_legal_forms(world, form):
    """It was lost, as garbage or for want of an end that it had."""
    world.start("a")
    world.backends["a"].set(form=form)
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "x"}], stream=True, n=2))
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == "one two three"
    assert not world.metric("kvguard_gateway_lost_total", kind="garbage") and not world.metric("kvguard_gateway_lost_total", kind="ended")


def test_comments_are_nothing_of_an_answer(world):
    """Who has said no more than these can be replaced: another instance begins."""
    world.start("a", "b")
    world.backends["a"].set(form="comments", html=True)
    body = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}], "stream": True}
    answer = world.post("/v1/chat/completions", body)
    assert answer.text.startswith("data: ") and "three" in answer.text and answer.text.endswith("data: [DONE]\n\n")
    assert world.metric("kvguard_gateway_lost_total", kind="garbage") == 1


@pytest.mark.parametrize("word", ["one", "two"])
def test_a_relayed_stream_of_a_server_whose_engine_died(world, word):
    """The server lives, and ends its stream in order: with an error. It is a loss like any other: another one is asked as long as nothing was given out."""
    world.start("a", "b")
    world.backends["a"].set(fails_at=word)
    body = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "n": 2, "stream": True}
    with httpx.stream("POST", world.url + "/v1/chat/completions", json=body, timeout=20, trust_env=False) as response:
        said = events_of(response)
    words = [one["choices"][0]["delta"]["content"] for one in said if one != "[DONE]" and "choices" in one]
    assert said[-1] == "[DONE]" and words == (["one ", "two ", "three"] if word == "one" else ["one "])
    assert [one["error"]["code"] for one in said[:-1] if "error" in one] == ([] if word == "one" else ["not_resumable"])
    assert world.metric("kvguard_gateway_lost_total", kind="status") == 1


def test_an_error_that_is_the_clients_is_passed_on(world):
    world.start("a", "b")
    world.backends["a"].set(fails_at="one", code=400)
    body = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "n": 2, "stream": True}
    with httpx.stream("POST", world.url + "/v1/chat/completions", json=body, timeout=20, trust_env=False) as response:
        assert [one if one == "[DONE]" else one["error"]["code"] for one in events_of(response)] == [400, "[DONE]"]


def test_a_relayed_stream_that_is_no_stream(world):
    """Nothing of a page in place of events reaches the client: another server is asked."""
    world.start("a", "b")
    world.backends["a"].set(html=True)
    body = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}], "stream": True}
    answer = world.post("/v1/chat/completions", body)
    assert "html" not in answer.text and answer.text.endswith("data: [DONE]\n\n") and "three" in answer.text
    assert world.metric("kvguard_gateway_lost_total", kind="garbage") == 1
