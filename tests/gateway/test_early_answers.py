"""Answers that come before the request's body was read: clients that send all of it first see them, too, and not a connection that broke."""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import urllib.error
import urllib.request
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from kvguard.gateway import unread
from kvguard.gateway.admission import Admission
from tests.gateway.conftest import until
from tests.gateway.test_ill_clients import HEAD, answers, dialled, ended
from tests.gateway.test_streams import PROMPT, Clients

pytestmark = pytest.mark.e2e
BODY = {"model": "toy", "prompt": "x" * 6_000_000, "max_tokens": 5}


@contextmanager
def full(world):
    """A gateway that takes nothing more."""
    world.start("a", in_flight_max=1, fence_ms=100, resume_ms=200)
    world.backends["a"].set(stall=3)
    clients = Clients(world, 1)
    until("the place to be taken", lambda: world.metric("kvguard_gateway_in_flight") == 1)
    yield
    world.backends["a"].kill()
    clients.join()


def with_http_client(url: str) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(BODY), {"content-type": "application/json"})
        response = connection.getresponse()
        return response.status, response.read()


def with_urllib(url: str) -> tuple[int, bytes]:
    """It says itself that the connection is to end."""
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(BODY).encode(), {"content-type": "application/json"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with pytest.raises(urllib.error.HTTPError) as caught:
        opener.open(request, timeout=20)
    with caught.value as error:
        return error.code, error.read()


def with_curl(url: str) -> tuple[int, bytes]:
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "20", "-H", "Expect:", "-H", "content-type: application/json"]
    command += ["--data-binary", "@-", "--write-out", "%{stderr}%{http_code}", f"{url}/v1/completions"]
    done = subprocess.run(command, input=json.dumps(BODY).encode(), capture_output=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return int(done.stderr), done.stdout


def with_httpx(url: str) -> tuple[int, bytes]:
    answer = httpx.post(f"{url}/v1/completions", json=BODY, timeout=20, trust_env=False)
    return answer.status_code, answer.content


CLIENTS = {"http.client": with_http_client, "urllib": with_urllib, "curl": with_curl, "httpx": with_httpx}


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_that_sends_all_before_it_reads_sees_why_it_is_not_served(world, name):
    if name == "curl" and shutil.which("curl") is None:
        pytest.skip("there is no curl here")
    with full(world):
        for number in (1, 2):
            status, said = CLIENTS[name](world.url)
            assert status == 429 and json.loads(said)["error"]["code"] == "overloaded"
            assert world.metric("kvguard_gateway_refused_total", reason="in_flight") == number


def test_openais_client_sees_that_too_much_is_under_way(world):
    with full(world), openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0, timeout=20) as client:
        with pytest.raises(openai.RateLimitError):
            client.completions.create(**BODY)


def test_a_body_that_is_too_large_is_named_so(world):
    world.start("a", body_bytes_max=65536)
    for ask in (with_http_client, with_urllib):
        status, said = ask(world.url)
        assert status == 413 and "more than 65536 bytes" in json.loads(said)["error"]["message"]
    assert world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5}).status_code == 200


def test_a_bug_before_a_body_was_read_is_told_of_whoever_sends_it_first(world, monkeypatch):
    """starlette answers and raises: the connection was closed with the body unread, and its client saw it reset."""

    def bug(_admission):
        raise ZeroDivisionError

    world.start("a")
    monkeypatch.setattr(Admission, "check", bug)
    for ask in (with_http_client, with_urllib):
        status, said = ask(world.url)
        assert status == 500 and "failed at this request" in json.loads(said)["error"]["message"]


@pytest.mark.parametrize("bound", ["QUIET_S", "WHOLE_S", "BYTES_MAX", "AT_ONCE_MAX"])
def test_the_rest_of_a_body_is_not_waited_for_without_bounds(world, monkeypatch, bound):
    monkeypatch.setattr(unread, bound, 0.2 if bound.endswith("_S") else 0)
    with full(world), dialled(world) as raw:
        raw.sendall(HEAD + b"content-length: 9000000\r\n\r\n{")
        assert answers(raw, 1)[0][0] == 429, "at once"
        if bound == "WHOLE_S":
            until("it to be left", lambda: not sent(raw))
        else:
            assert ended(raw) == b""


def sent(raw) -> bool:
    try:
        raw.sendall(b" ")
    except ConnectionError:
        return False
    return True
