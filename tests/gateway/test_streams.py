"""Clients of a gateway whose backends live, die, fall silent or talk nonsense."""

from __future__ import annotations

import json
import socket
import threading
import time

import httpx
import openai
import pytest

from kvguard.gateway import fleet
from tests.gateway import toy_model
from tests.gateway.conftest import events_of, until

pytestmark = pytest.mark.e2e
PROMPT = "Once upon a time "


def expected(prompt: str, max_tokens: int, may_end: bool = True) -> str:
    return toy_model.text_of(toy_model.answer(list(prompt.encode()), max_tokens, may_end))


def client_of(world) -> openai.OpenAI:
    return openai.OpenAI(base_url=world.url + "/v1", api_key="none", max_retries=0, timeout=60, http_client=httpx.Client(trust_env=False))


class Clients:
    """Streams in threads; each keeps its chunks as they come."""

    def __init__(self, world, count: int, **arguments) -> None:
        self.world, self.chunks, self.errors = world, [[] for _ in range(count)], [None] * count
        self.arguments = {"model": "toy", "max_tokens": 120, "stream": True, "extra_body": {"ignore_eos": True}, **arguments}
        self.threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]
        for thread in self.threads:
            thread.start()

    def prompt(self, number: int) -> str:
        return f"{PROMPT}{number} "

    def _run(self, number: int) -> None:
        with client_of(self.world) as client:
            try:
                for chunk in client.completions.create(prompt=self.prompt(number), **self.arguments):
                    self.chunks[number].append(chunk)
            except openai.APIError as error:
                self.errors[number] = error

    def text(self, number: int) -> str:
        return "".join(choice.text for chunk in self.chunks[number] for choice in chunk.choices)

    def join(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def recover(world, dead: str, clients: Clients, place: str) -> None:
    """The fence of a dead instance, and a recovery that knows all but the newest ids of every sequence."""
    world.emitters[dead].fence()
    tokens = []
    for request in RECORDED[dead]:
        given = toy_model.answer(request["body"]["prompt"], 20, False)
        tokens.append(world.token(dead, request, (place,), ids=given))
    world.emitters[dead].recover(tokens)


RECORDED: dict[str, list[dict]] = {}


def test_sixteen_streams_outlive_their_instance(world):
    world.start("a", "b")
    world.backends["a"].set(stall=25)  # so that it is in mid-answer when it dies, however busy the machine
    world.backends["b"].set(delay_ms=5)
    clients = Clients(world, 16, stream_options={"include_usage": True})
    until("all to have begun", lambda: all(len(chunks) > 5 for chunks in clients.chunks))
    RECORDED["a"] = world.in_flight("a")
    before = len(world.in_flight("b"))
    assert len(RECORDED["a"]) == before == 8  # the least loaded took the next
    world.backends["a"].kill()
    recover(world, "a", clients, "b")
    clients.join()
    assert clients.errors == [None] * 16
    for number in range(16):
        chunks = clients.chunks[number]
        assert clients.text(number) == expected(clients.prompt(number), 120, False)
        assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
        assert [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason] == ["length"]
        assert chunks[-1].usage.completion_tokens == 120 and chunks[-1].usage.prompt_tokens == len(clients.prompt(number))
        assert all(chunk.usage is None for chunk in chunks[:-1])
    resumed = world.in_flight("b")[before:]
    assert len(resumed) == 8
    for request in resumed:
        moved = request["body"]["kv_transfer_params"]["kvguard"]
        assert moved["instance"] == "a" and moved["sequence"].startswith("kvg-")
        assert len(request["body"]["cache_salt"]) > 30
    assert len({request["body"]["cache_salt"] for request in resumed}) == 8
    assert world.metric("kvguard_gateway_resumed_total", rung="replica") == 8
    assert world.metric("kvguard_gateway_stall_seconds_count") == 8
    assert world.metric("kvguard_gateway_requests_total", outcome="complete", route="followed") == 16
    delivered = until("delivered", lambda: len(world.emitters["a"].deliveries) == 8 and world.emitters["a"].deliveries)
    assert all(one.endswith("-0-1234abcd") for one in delivered)
    assert len(world.emitters["b"].deliveries) == 16 and world.emitters["b"].in_flight == world.emitters["a"].in_flight == 0


@pytest.mark.parametrize("how", ["no_token", "failed", "elsewhere", "mismatch", "alive"])
def test_without_a_usable_token_the_ids_go_on_alone(world, how):
    world.start("a", "b", fence_ms=300)
    dead, other = "a", "b"  # of two that are idle, the first
    world.backends[dead].set(stall=25, garbage_after=25 if how == "alive" else -1)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    (request,) = world.in_flight(dead)
    ids = toy_model.answer(request["body"]["prompt"], 10, False)
    if how != "alive":
        world.backends[dead].kill()
    if how not in ("no_token", "alive"):
        world.emitters[dead].fence()
    if how == "failed":
        world.emitters[dead].fail("no ids anywhere")
    elif how == "elsewhere":
        world.emitters[dead].recover([world.token(dead, request, ("c",), ids=ids)])
    elif how == "mismatch":
        world.emitters[dead].recover([world.token(dead, request, (other,), ids=ids[::-1])])
    clients.join()
    assert clients.errors == [None] and clients.text(0) == expected(clients.prompt(0), 120, False)
    continued = world.in_flight(other)[-1]["body"]
    assert "kv_transfer_params" not in continued and continued["cache_salt"]
    assert world.metric("kvguard_gateway_resumed_total", rung="tokens") == 1
    if how in ("elsewhere", "mismatch"):
        assert world.metric("kvguard_gateway_unplaced_total", reason={"elsewhere": "no_active_place"}.get(how, how)) == 1


def test_a_fence_ends_what_its_instance_says(world):
    """The engine lives and goes on (a false suspicion): nothing of it may reach a client any more."""
    world.start("a", "b")
    fenced = "a"
    world.backends[fenced].set(delay_ms=50)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    world.emitters[fenced].fence()
    until("the engine's stream to be broken off", lambda: world.backends[fenced].seen["broken_off"] == 1)
    assert world.get("/ready").json()["active_instances"] == 1
    world.emitters[fenced].recover()
    clients.join()
    assert clients.text(0) == expected(clients.prompt(0), 120, False)
    world.until_active(2)
    assert world.metric("kvguard_gateway_lost_total", kind="fenced") == 1


def test_twice_in_one_answer(world):
    world.start("a", "b", "c", fence_ms=100)
    for backend in world.backends.values():
        backend.set(delay_ms=5)
    clients = Clients(world, 3)
    seen = 0
    for _ in range(2):
        seen += 15
        until("some more text", lambda: all(len(chunks) > seen for chunks in clients.chunks))
        busy = max((name for name in world.backends if world.backends[name].popen.poll() is None), key=lambda name: world.backends[name].seen["open"])
        world.backends[busy].kill()
        world.emitters[busy].fence()
        world.emitters[busy].recover()
    clients.join()
    assert clients.errors == [None] * 3
    for number in range(3):
        assert clients.text(number) == expected(clients.prompt(number), 120, False)


def test_nobody_can_take_over(world):
    world.start("a", resume_ms=300, fence_ms=50)
    world.backends["a"].set(stall=25)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    world.backends["a"].kill()
    clients.join()
    assert isinstance(clients.errors[0], openai.APIError) and "No instance" in str(clients.errors[0])
    assert expected(clients.prompt(0), 120, False).startswith(clients.text(0))
    assert world.metric("kvguard_gateway_unresumed_total", reason="no_instance") == 1
    answer = world.post("/v1/completions", {"model": "toy", "prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"], answer.headers["retry-after"]) == (503, "no_instance", "1")
    assert world.get("/ready").status_code == 503 and world.get("/health").status_code == 200


def test_before_the_first_token_nothing_is_lost(world):
    world.start("a", "b")
    world.backends["a"].set(stall=0)
    done = []
    thread = threading.Thread(target=lambda: done.append(world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 30, "ignore_eos": True})))
    thread.start()
    until("the request at a", lambda: world.in_flight("a"))
    world.backends["a"].kill()
    thread.join(20)
    document = done[0].json()
    assert document["choices"][0]["text"] == expected(PROMPT, 30, False)
    assert document["usage"] == {"prompt_tokens": len(PROMPT), "completion_tokens": 30, "total_tokens": len(PROMPT) + 30}
    assert world.metric("kvguard_gateway_resumed_total", rung="none") == 1
    assert "cache_salt" not in world.in_flight("b")[0]["body"]


@pytest.mark.parametrize("stream", [True, False])
def test_chat_with_stop_strings_across_the_seam(world, stream):
    """The stop string's first half comes of one instance, the second of the other."""
    messages = [{"role": "user", "content": "tell me"}]
    prompt = "<user>tell me\n<assistant>"
    whole = expected(prompt, 200, False)
    at = next(at for at in range(40, 100) if whole.index(whole[at : at + 4]) == at)
    stop, cut = whole[at : at + 4], len(whole[: at + 2].encode())
    world.start("a", "b", fence_ms=50)
    world.backends["a"].set(stall=cut)
    with client_of(world) as client:
        arguments = {"model": "toy", "messages": messages, "max_tokens": 200, "stop": [stop], "extra_body": {"ignore_eos": True}}
        result, got = [], []

        def talk() -> None:
            if stream:
                for chunk in client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}):
                    got.append(chunk)
            else:
                result.append(client.chat.completions.create(**arguments))

        thread = threading.Thread(target=talk)
        thread.start()
        until("a to stall", lambda: world.in_flight("a") and world.emitters["a"].__dict__.get("progressed", 0) >= cut)
        world.backends["a"].kill()
        world.emitters["a"].fence()
        world.emitters["a"].recover()
        thread.join(30)
    if stream:
        text = "".join(choice.delta.content for chunk in got for choice in chunk.choices)
        assert got[0].choices[0].delta.role == "assistant" and got[-2].choices[0].finish_reason == "stop"
        usage = got[-1].usage
    else:
        text, usage = result[0].choices[0].message.content, result[0].usage
        assert result[0].choices[0].finish_reason == "stop" and result[0].choices[0].stop_reason == stop
    assert text == whole[:at]
    assert usage.completion_tokens == len(whole[: at + 4].encode()) and usage.prompt_tokens == len(prompt.encode())
    until("the engine to be told", lambda: world.backends["b"].seen["open"] == 0)


def test_half_characters_at_the_seam(world):
    whole = toy_model.answer(list(PROMPT.encode()), 100, False)
    cut = next(at for at in range(20, 90) if whole[at - 1] >= 0xF0)  # one byte of four
    world.start("a", "b", fence_ms=50)
    world.backends["a"].set(stall=cut)
    done = []
    body = {"prompt": PROMPT, "max_tokens": 100, "ignore_eos": True, "return_token_ids": True}
    thread = threading.Thread(target=lambda: done.append(world.post("/v1/completions", body)))
    thread.start()
    until("a to stall", lambda: world.emitters["a"].__dict__.get("progressed", 0) >= cut)
    world.backends["a"].kill()
    thread.join(20)
    choice = done[0].json()["choices"][0]
    assert choice["text"] == expected(PROMPT, 100, False) and "�" not in choice["text"]
    assert choice["token_ids"] == whole and choice["prompt_token_ids"] == list(PROMPT.encode())


GARBAGE = ["json", "bytes", "list", "no_ids", "bad_ids", "negative", "huge", "choices", "error", "endless", "done", "abort", "too_many"]


def test_a_backend_that_talks_nonsense(world, monkeypatch):
    monkeypatch.setattr(fleet, "DOUBT_S", 0.0)
    world.start("a", "b")
    for number, garbage in enumerate(GARBAGE, 1):
        world.backends["a"].set(garbage=garbage)
        answer = world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True})
        assert answer.json()["choices"][0]["text"] == expected(PROMPT, 20, False), garbage
        assert world.metric("kvguard_gateway_resumed_total", rung="none") == number
    world.backends["b"].set(garbage="json")
    answer = world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 20})
    assert answer.status_code == 502 and answer.json()["error"]["type"] == "server_error"


def test_who_talks_nonsense_is_left_alone(world):
    world.start("a", "b")
    world.backends["a"].set(garbage="json")
    for _ in range(3):
        assert world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).status_code == 200
    assert world.metric("kvguard_gateway_lost_total", kind="garbage") == 1


def test_a_backend_with_a_broken_status(world):
    world.start("a", "b")
    world.backends["a"].set(status=500)
    assert world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5}).status_code == 200
    assert world.metric("kvguard_gateway_lost_total", kind="status") == 1


def test_what_a_backend_refuses_is_passed_on(world):
    world.start("a")
    answer = world.post("/v1/completions", {"prompt": PROMPT, "model": "another"})
    assert (answer.status_code, answer.json()["error"]["message"]) == (404, "The model `another` does not exist.")
    assert world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5000}).status_code == 400
    assert world.metric("kvguard_gateway_requests_total", outcome="declined", route="followed") == 2


def test_a_vanished_client_stops_the_engine(world):
    world.start("a")
    world.backends["a"].set(delay_ms=10)
    body = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True}
    with httpx.Client(trust_env=False) as client:
        with client.stream("POST", world.url + "/v1/completions", json={**body, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            assert world.backends["a"].seen["open"] == 1
    until("the stream to be broken off", lambda: world.backends["a"].seen["broken_off"] == 1)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(world.url + "/v1/completions", json=body, timeout=0.5, trust_env=False)
    until("the other one too", lambda: world.backends["a"].seen["broken_off"] == 2)
    until("both counted", lambda: world.metric("kvguard_gateway_requests_total", outcome="gone", route="followed") == 2)
    assert len(world.emitters["a"].deliveries) == 2 and world.metric("kvguard_gateway_in_flight") == 0


def test_a_client_that_does_not_read(world):
    world.start("a", client_ms=300, send_buffer=4096)
    world.backends["a"].set(delay_ms=0, chunk=1)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True, "stream": True, "return_token_ids": True}).encode()
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        host, port = world.url.removeprefix("http://").split(":")
        raw.connect((host, int(port)))
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        until("the slow client to be left", lambda: world.metric("kvguard_gateway_requests_total", outcome="slow", route="followed") == 1)
    assert world.metric("kvguard_gateway_in_flight") == 0


@pytest.mark.parametrize(
    ("content", "status"),
    [(b"{", 400), (b"[]", 400), (b"\xff", 400), (b"[" * 50_000, 400), (b'{"prompt": "' + b"x" * 70_000 + b'"}', 413), (b"", 400)],
)
def test_bodies(world, content, status):
    world.start("a", body_bytes_max=65536)
    answer = world.post("/v1/completions", content=content)
    assert answer.status_code == status and answer.json()["error"]["type"] == "invalid_request_error"

    def endless():
        for _ in range(40):
            yield b"x" * 4096

    if status == 413:
        assert world.post("/v1/completions", content=endless()).status_code == 413


def test_back_pressure(world):
    world.start("a", in_flight_max=2)
    world.backends["a"].set(stall=3)
    clients = Clients(world, 2)
    until("both to be under way", lambda: world.metric("kvguard_gateway_in_flight") == 2)
    answer = world.post("/v1/completions", {"prompt": "x"})
    assert (answer.status_code, answer.headers["retry-after"], answer.json()["error"]["type"]) == (429, "1", "rate_limit_error")
    assert world.metric("kvguard_gateway_refused_total", reason="in_flight") == 1
    world.backends["a"].kill()
    clients.join()


def test_nothing_is_smuggled(world):
    world.start("a")
    headers = {"x-request-id": "mine", "x-data-parallel-rank": "3", "authorization": "Bearer key", "cookie": "c=1", "te": "trailers", "x-forwarded-for": "1.2.3.4"}
    answer = world.post("/v1/completions", {"prompt": "x", "request_id": "mine", "max_tokens": 3}, headers=headers)
    assert answer.status_code == 200
    passed = world.in_flight("a")[0]
    assert passed["headers"]["x-request-id"].startswith("kvg-") and passed["headers"]["authorization"] == "Bearer key"
    assert not {"x-data-parallel-rank", "cookie", "te", "x-forwarded-for"} & set(passed["headers"])
    assert "request_id" not in passed["body"]
    assert answer.headers["x-request-id"].startswith("kvg-")
    for name, value in (("kv_transfer_params", {"kvguard": {}}), ("cache_salt", "x"), ("vllm_xargs", {"kv_transfer_params": "x"})):
        for path in ("/v1/completions", "/v1/chat/completions"):
            answer = world.post(path, {"prompt": "x", "n": 2, name: value})
            assert answer.status_code == 400 and name in answer.json()["error"]["param"]
    assert len(world.backends["a"].seen["requests"]) == 1


def test_relayed_requests(world):
    world.start("a", "b", fence_ms=50)
    body = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}], "request_id": "mine"}
    answer = world.post("/v1/chat/completions", body)
    assert answer.json()["choices"][0]["message"]["content"] == "one two three"
    seen = [one for backend in world.backends.values() for one in backend.seen["requests"]]
    assert len(seen) == 1 and "request_id" not in seen[0]["body"] and seen[0]["body"]["tools"]
    with httpx.stream("POST", world.url + "/v1/chat/completions", json={**body, "stream": True}, timeout=20, trust_env=False) as response:
        assert [one if one == "[DONE]" else one["choices"][0]["delta"]["content"] for one in events_of(response)] == ["one ", "two ", "three", "[DONE]"]
    assert world.metric("kvguard_gateway_requests_total", outcome="complete", route="relayed") == 2


def test_a_relayed_answer_that_is_lost_says_so(world):
    world.start("a", "b")
    for backend in world.backends.values():
        backend.set(stall=1)
    body = {"model": "toy", "messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}, "stream": True}
    with httpx.stream("POST", world.url + "/v1/chat/completions", json=body, timeout=20, trust_env=False) as response:
        lines = response.iter_lines()
        assert json.loads(next(lines)[6:])["choices"][0]["delta"]["content"] == "one "
        next(backend for backend in world.backends.values() if any(one["path"] == "/v1/chat/completions" for one in backend.seen["requests"])).kill()
        rest = [line for line in lines if line]
    assert json.loads(rest[0][6:])["error"]["code"] == "not_resumable" and rest[1:] == ["data: [DONE]"]
    assert world.metric("kvguard_gateway_unresumed_total", reason="response_format") == 1


def test_streams_of_chunks_of_many_ids_and_of_chats(world):
    world.start("a")
    world.backends["a"].set(chunk=7)
    with client_of(world) as client:
        chunks = list(client.chat.completions.create(model="toy", messages=[{"role": "user", "content": "hey"}], stream=True, max_tokens=64))
        models = client.models.list().data
    prompt = "<user>hey\n<assistant>"
    assert "".join(chunk.choices[0].delta.content for chunk in chunks) == expected(prompt, 64)
    assert chunks[0].id.startswith("chatcmpl-kvg-") and len({chunk.id for chunk in chunks}) == 1
    assert [one.id for one in models] == ["toy"]
    whole = world.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hey"}], "max_tokens": 64}).json()
    assert whole["choices"][0]["message"]["content"] == expected(prompt, 64) and whole["model"] == "toy"


def test_paths_that_are_not_there(world):
    world.start("a")
    refused = world.post("/v1/embeddings", {}).json()["error"]
    assert refused["code"] == 404 and refused["message"].startswith("Not Found: POST /v1/embeddings. Try: ")
    assert world.get("/v1/completions").status_code == 405
    assert "kvguard_gateway_requests" in world.get("/metrics").text


def test_ending_lets_answers_end(world):
    world.start("a")
    world.backends["a"].set(delay_ms=10)
    clients = Clients(world, 2)
    until("both to have begun", lambda: all(clients.chunks))
    world._serving.should_exit = True  # what uvicorn's handler of SIGTERM does
    clients.join()
    assert clients.errors == [None] * 2
    for number in range(2):
        assert clients.text(number) == expected(clients.prompt(number), 120, False)
    world._thread.join(10)
    assert not world._thread.is_alive() and world.emitters["a"].closed


def test_an_instance_that_comes_later(world):
    world.start("a", "b", resume_ms=15_000, fence_ms=50)
    world.backends["a"].set(stall=25)
    world.backends["b"].set(healthy=False)
    until("b down", lambda: world.get("/ready").json()["active_instances"] == 1)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    world.backends["a"].kill()
    until("a down", lambda: world.get("/ready").json()["active_instances"] == 0)
    began = time.monotonic()
    world.backends["b"].set(healthy=True)
    clients.join()
    assert time.monotonic() >= began and clients.errors == [None]
    assert clients.text(0) == expected(clients.prompt(0), 120, False)
