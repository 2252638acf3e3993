"""Clients that mean ill, or are broken: what they send is answered in OpenAI's form, costs no one else anything, and keeps no connection."""

from __future__ import annotations

import json
import socket

import httpx
import pytest

from kvguard.gateway import connections, unread
from tests.gateway.conftest import until
from tests.gateway.test_streams import PROMPT, expected

pytestmark = pytest.mark.e2e
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
DEEP = '{"a":' * 900 + "1" + "}" * 900


def dialled(world) -> socket.socket:
    host, port = world.url.removeprefix("http://").split(":")
    made = socket.create_connection((host, int(port)), 20)
    made.settimeout(20)
    return made


def answers(raw: socket.socket, count: int) -> list[tuple[int, dict]]:
    """So many whole answers, each with its length in its head."""
    taken, found = b"", []
    while len(found) < count:
        head, gap, rest = taken.partition(b"\r\n\r\n")
        length = next((int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")), None) if gap else None
        if length is not None and len(rest) >= length:
            found.append((int(head.split()[1]), json.loads(rest[:length])))
            taken = rest[length:]
            continue
        some = raw.recv(65536)
        assert some, f"the connection ended after {taken!r}"
        taken += some
    return found


def posted(content: bytes) -> bytes:
    return HEAD + b"content-length: %d\r\n\r\n" % len(content) + content


def ended(raw: socket.socket) -> bytes:
    """What came until the gateway closed the connection."""
    taken = b""
    while True:
        try:
            some = raw.recv(65536)
        except ConnectionResetError:
            return taken
        if not some:
            return taken
        taken += some


BODIES = [
    b'{"prompt": "x", "max_tokens": 1e400}', b'{"prompt": "x", "max_tokens": NaN}', b'{"prompt": "\\ud800", "max_tokens": 1}', b'{"prompt": "\xff"}',
    b'\xef\xbb\xbf{"prompt": "x"}', b'{"prompt": "x"} {"prompt": "y"}', b'{"prompt": "x", "max_tokens": 340282366920938463463374607431768211456}',
    b'{"prompt": [4294967295]}', b'{"prompt": [-1]}', b'{"prompt": [1e3]}', b'{"prompt": [true]}', b'{"prompt": []}', b'{"prompt": ""}', b'{"prompt": null}', b"{}",
    b'{"prompt": {"a": 1}}', b'{"prompt": "x", "stop": [""]}', b'{"prompt": "x", "stop": 7}', b'{"prompt": "x", "stream": "yes"}',
    b'{"prompt": "x", "stream": true, "n": 0}', b'{"prompt": "x", "n": 99999}', b'{"prompt": "x", "max_tokens": 0}', b'{"prompt": "x", "max_tokens": -5}',
    b'{"prompt": "x", "model": 5}', b'{"prompt": "x", "model": "\\u0000"}', b'{"prompt": "x", "stream_options": []}', b'{"prompt": "x", "temperature": "hot"}',
    b'{"prompt": "x", "logprobs": 5}', b'{"prompt": "x", "echo": true}', b'{"messages": "x"}', b'{"messages": [{"role": "user"}]}', b'{"messages": [7]}',
    b'{"prompt": "x", "vllm_xargs": {"kv_transfer_params": {}}}', b'{"prompt": "x", "kv_transfer_params": {"kvguard": {"instance": "a"}}}',
    b'{"prompt": "x", "kv_transfer_params": {}, "kv_transfer_params": null, "max_tokens": 1}', b'{"prompt": "x", "a": ' + DEEP.encode() + b"}",
    b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", b"null", b'"x"', b"1" * 5000, b'{"prompt": "x", "top_k": ' + b"9" * 400 + b', "max_tokens": 1}',
]  # fmt: skip


def test_bodies_of_every_kind(world):
    """Whatever is sent, to both paths: an answer or an error in OpenAI's form, none of them the gateway's own failure."""
    world.start("a")
    with httpx.Client(trust_env=False, timeout=30) as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            for content in BODIES:
                answer = client.post(world.url + path, content=content)
                assert answer.status_code in (200, 400, 404, 413, 422), (path, content[:80], answer.status_code, answer.text)
                if answer.headers["content-type"].startswith("text/event-stream"):
                    assert b'"stream": true' in content and answer.text.endswith("data: [DONE]\n\n")
                    continue
                said = answer.json()
                assert said["choices"] if answer.status_code == 200 else said["error"]["message"] and said["error"]["type"] and said["error"]["code"], content[:80]
                for request in world.backends["a"].seen["requests"]:
                    assert request["body"].get("kv_transfer_params") is None
    assert world.metric("kvguard_gateway_in_flight") == 0
    assert world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}).json()["choices"][0]["text"] == expected(PROMPT, 5, False)


@pytest.mark.parametrize("host", [b"a/control?", b"a/tokenize#", b"a/v1/completions?x="])
def test_a_host_names_no_path(world, host):
    """Any path of the instances' servers could be asked for so, with a starlette before 1.0: sleep, load_lora_adapter, whatever is theirs alone."""
    world.start("a")
    content = json.dumps({"model": "toy", "messages": [{"role": "user", "content": "x"}], "n": 2}).encode()
    with dialled(world) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: " + host + b"\r\ncontent-length: %d\r\n\r\n" % len(content) + content)
        ((status, said),) = answers(raw, 1)
    assert [one["path"] for one in world.backends["a"].seen["requests"]] == ["/v1/chat/completions"], said
    assert status == 200 and said["choices"][0]["message"]["content"] == "one two three"


def test_what_nobody_foresaw_has_openais_form(world, monkeypatch):
    from kvguard.gateway import policy

    def broken(*_) -> None:
        raise ZeroDivisionError

    world.start("a")
    monkeypatch.setattr(policy, "decide", broken)
    answer = world.post("/v1/completions", {"prompt": "x"})
    assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error" and "Try: " in answer.json()["error"]["message"]
    assert world.metric("kvguard_gateway_requests_total", outcome="bug", route="refused") == 1


def test_requests_in_a_row_on_one_connection(world):
    """Pipelined: each has its own answer, in order; the broken one between them ends nothing."""
    world.start("a")
    good = [json.dumps({"prompt": f"{PROMPT}{number}", "max_tokens": 9, "ignore_eos": True}).encode() for number in range(2)]
    with dialled(world) as raw:
        raw.sendall(posted(good[0]) + posted(b"{") + posted(good[1]))
        found = answers(raw, 3)
    assert [status for status, _ in found] == [200, 400, 200]
    assert [found[at][1]["choices"][0]["text"] for at in (0, 2)] == [expected(f"{PROMPT}{number}", 9, False) for number in range(2)]


@pytest.mark.parametrize("begun", [b"", b"POST /v1/comp", HEAD, HEAD + b"x-one: " + b"y" * 2000, b"\r\n" * 5])
def test_half_a_head_keeps_no_connection(world, monkeypatch, begun):
    monkeypatch.setattr(connections, "IDLE_CLIENT_S", 0.3)
    world.start("a")
    with dialled(world) as raw:
        if begun:
            raw.sendall(begun)
        assert b" 200 " not in ended(raw)


def test_a_head_that_comes_byte_by_byte(world, monkeypatch):
    """Each byte is a sign of life, and none of a request."""
    monkeypatch.setattr(connections, "IDLE_CLIENT_S", 0.3)
    world.start("a")
    with dialled(world) as raw:
        raw.settimeout(0.02)

        def closed() -> bool:
            try:
                raw.sendall(b"P")
                return raw.recv(1) == b""
            except TimeoutError:
                return False
            except ConnectionError:
                return True

        until("the connection to be closed", closed)


def test_a_body_that_does_not_come(world):
    world.start("a", client_ms=300)
    with dialled(world) as raw:
        raw.sendall(HEAD + b"content-length: 1000\r\n\r\n{")
        ((status, said),) = answers(raw, 1)
    assert status == 408 and said["error"]["type"] == "invalid_request_error" and "Try: " in said["error"]["message"]
    assert world.metric("kvguard_gateway_requests_total", outcome="slow", route="refused") == 1
    assert world.metric("kvguard_gateway_in_flight") == 0


def test_a_body_without_end_is_not_read_for_ever(world, monkeypatch):
    """It is refused as soon as it is too long; what comes after that is dropped for a while, then the connection."""
    monkeypatch.setattr(connections, "IDLE_CLIENT_S", 0.3)
    monkeypatch.setattr(unread, "WHOLE_S", 0.3)
    world.start("a", body_bytes_max=65536)
    with dialled(world) as raw:
        raw.sendall(HEAD + b"transfer-encoding: chunked\r\n\r\n")
        chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"

        def dropped() -> bool:
            try:
                raw.sendall(chunk)
            except ConnectionError:
                return True
            return False

        until("the connection to be dropped", dropped)
    assert world.metric("kvguard_gateway_requests_total", outcome="refused", route="refused") == 1


@pytest.mark.parametrize(
    "sent",
    [
        b"rubbish\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc", HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 5\r\ncontent-length: 6\r\n\r\n{}", HEAD + b"transfer-encoding: gzip\r\n\r\n", b"POST /v1/completions HTTP/1.1\r\n" + b"a: b\r\n" * 20_000,
    ],
)  # fmt: skip
def test_what_is_no_request(world, sent):
    world.start("a")
    with dialled(world) as raw:
        raw.sendall(sent)
        raw.shutdown(socket.SHUT_WR)
        assert not ended(raw).startswith(b"HTTP/1.1 2")
    assert world.get("/health").status_code == 200 and not world.backends["a"].seen["requests"]
