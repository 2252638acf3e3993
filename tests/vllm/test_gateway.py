"""A real openai client, the gateway, two real vLLM servers: the active one is killed, and every answer goes on to its end in the other.

Greedy answers are equal to the undisturbed ones where the batch's shape is the same (one stream); with several, vLLM's own arithmetic depends on the batch, and
what is asserted is that no id is lost, doubled or changed once it was given out: the whole stays a greedy answer of one length, its beginning what it was.
"""

from __future__ import annotations

import threading
import urllib.request

import httpx
import openai
import pytest
from front import Gateway
from world import MODEL, World

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
QUESTION = [{"role": "user", "content": "Explain in a few sentences how a lighthouse works."}]


def client_of(gateway: Gateway) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=300, http_client=httpx.Client(trust_env=False))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("gateway"))
    gateway = None
    try:
        world.start_daemons()
        for name in ("a", "b"):
            world.start_server(name, wait=False)
        for server in world.servers.values():
            world.wait_ready(server)
        gateway = Gateway(world)
        yield world, gateway
    finally:
        code = 0 if gateway is None else gateway.stop()
        world.stop()
        assert code == 0


def restored(server) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:  # noqa: S310 (loopback)
        lines = answer.read().decode().splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:external_prefix_cache_hits_total"))


def counts(usage) -> tuple[int, int, int]:
    return usage.prompt_tokens, usage.completion_tokens, usage.total_tokens


def test_the_gateway_says_what_vllm_says(pair):
    """Undisturbed, text, usage and end are those of the server itself, in completions and in chats."""
    world, gateway = pair
    direct = world.servers["smol-b"]
    with client_of(gateway) as client, openai.OpenAI(base_url=f"{direct.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False)) as own:
        for stop in (None, ["light"]):
            asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 60, "temperature": 0, "stop": stop}
            through, straight = client.chat.completions.create(**asked), own.chat.completions.create(**asked)
            assert through.choices[0].message.content == straight.choices[0].message.content
            assert through.choices[0].finish_reason == straight.choices[0].finish_reason
            assert counts(through.usage) == counts(straight.usage)
            asked = {"model": MODEL, "prompt": "The sea is", "max_tokens": 20, "temperature": 0, "stop": stop}
            assert client.completions.create(**asked).choices[0].text == own.completions.create(**asked).choices[0].text
    assert gateway.metric("kvguard_gateway_lost_total") == 0


def test_a_killed_server_is_not_noticed(pair):
    world, gateway = pair
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 120, "temperature": 0, "extra_body": {"ignore_eos": True}}
    with client_of(gateway) as client:
        wanted = client.chat.completions.create(**asked)
        before, chunks = restored(world.servers["smol-b"]), []
        for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            chunks.append(chunk)
            if len(chunks) == 50:
                world.servers["smol-a"].kill()  # of two that were idle, the first serves
    text = "".join(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert text == wanted.choices[0].message.content
    assert chunks[-1].usage == wanted.usage and len({chunk.id for chunk in chunks}) == 1
    assert gateway.rungs() == {"replica": 1}
    assert restored(world.servers["smol-b"]) - before > 50, "the KV came, and was not computed"


def test_sixteen_streams_and_a_server_that_comes_back(pair):
    """After the one before a is dead. It comes back, is used again, and now b dies."""
    world, gateway = pair
    if world.servers["smol-a"].popen.poll() is not None:
        world.start_server("a")
    world.until("a to be active again", lambda: gateway.active() == 2, 60)
    world.until("both protected", lambda: all((world.rank(name) or {}).get("state") == "protected" for name in world.servers), 60)
    answers: list[list] = [[] for _ in range(16)]
    errors: list[Exception] = []

    def talk(number: int) -> None:
        with client_of(gateway) as client:
            try:
                body = {"ignore_eos": True, "return_token_ids": True}
                for chunk in client.completions.create(
                    model=MODEL, prompt=f"Story number {number}: ", max_tokens=48, temperature=0, stream=True, extra_body=body
                ):
                    answers[number].append(chunk)
            except openai.APIError as error:
                errors.append(error)

    threads = [threading.Thread(target=talk, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    world.until("all to have begun", lambda: sum(len(chunks) > 10 for chunks in answers) >= 12 or errors, 300)
    before = [list(chunks) for chunks in answers]
    world.servers["smol-b"].kill()
    for thread in threads:
        thread.join(600)
        assert not thread.is_alive()
    assert not errors
    for earlier, chunks in zip(before, answers, strict=True):
        assert chunks[: len(earlier)] == earlier
        ids = [token for chunk in chunks for token in chunk.choices[0].token_ids or []]
        assert len(ids) == 48 and chunks[-1].choices[0].finish_reason == "length"
    assert gateway.metric("kvguard_gateway_resumed_total") >= 1 and gateway.metric("kvguard_gateway_unresumed_total") == 0


def test_a_server_that_is_started_again_goes_on_with_its_own_pool(pair):
    """Nobody else is active: a dies, is started again, and goes on with what its dead process left in its node's daemon, byte by byte the same."""
    world, gateway = pair
    if world.servers["smol-b"].popen.poll() is None:
        world.servers["smol-b"].kill()
    world.until("a alone", lambda: gateway.active() == 1, 60)
    asked = {"model": MODEL, "messages": QUESTION, "max_tokens": 100, "temperature": 0, "extra_body": {"ignore_eos": True}}
    before, pieces = gateway.rungs(), []
    with client_of(gateway) as client:
        wanted = client.chat.completions.create(**asked)
        for chunk in client.chat.completions.create(**asked, stream=True):
            pieces.append(chunk.choices[0].delta.content)
            if len(pieces) == 40:
                world.servers["smol-a"].kill()
                world.start_server("a", wait=False)
    assert "".join(pieces) == wanted.choices[0].message.content
    assert restored(world.servers["smol-a"]) > 50
    assert gateway.rungs() == {**before, "pool": before.get("pool", 0) + 1}
