"""A real openai client, the gateway, two real vLLM servers: the active one is killed, and every answer goes on to its end in the other.

Greedy answers are equal to the undisturbed ones where the batch's shape is the same (one stream); with several, vLLM's own arithmetic depends on the batch, and
what is asserted is that no id is lost, doubled or changed once it was given out: the whole stays a greedy answer of one length, its beginning what it was.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import urllib.request

import httpx
import openai
import pytest
from world import MODEL, ROOT, World, model_directory

from kvguard import config
from kvguard.pipeline.ports import free_ports

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
QUESTION = [{"role": "user", "content": "Explain in a few sentences how a lighthouse works."}]


class Gateway:
    """`kvguard gateway` in front of a world's servers."""

    def __init__(self, world: World) -> None:
        self.world, self.url = world, f"http://127.0.0.1:{free_ports(1)[0]}"
        lines = tuple(f"{name} {server.url} {name.removeprefix('smol-')}" for name, server in world.servers.items())
        values = {"listen": self.url, "instances": lines, "tokenizer": model_directory(), "coordinator": world.coordinator, "resume_ms": 60_000}
        file = world.directory / "gateway.toml"
        file.write_text(config.template(config.GatewayConfig, values))
        with open(world.directory / "gateway.log", "ab") as log:
            self.popen = subprocess.Popen([sys.executable, "-m", "kvguard.cli", "gateway", "--config", str(file)], stdout=log, stderr=log, cwd=ROOT)
        world.until("the gateway with its instances", lambda: self.active() == len(lines), 120)

    def active(self) -> int:
        try:
            return httpx.get(f"{self.url}/ready", timeout=5, trust_env=False).json()["active_instances"]
        except httpx.HTTPError:
            return 0

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300, http_client=httpx.Client(trust_env=False))

    def metric(self, name: str) -> float:
        text = httpx.get(f"{self.url}/metrics", timeout=10, trust_env=False).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(name))

    def stop(self) -> None:
        self.popen.terminate()
        assert self.popen.wait(30) == 0


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
        if gateway is not None:
            gateway.popen.terminate()
            gateway.popen.wait(30)
        world.stop()


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
    with gateway.client() as client, openai.OpenAI(base_url=f"{direct.url}/v1", api_key="none", http_client=httpx.Client(trust_env=False)) as own:
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
    with gateway.client() as client:
        wanted = client.chat.completions.create(**asked)
        before, chunks = restored(world.servers["smol-b"]), []
        for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
            chunks.append(chunk)
            if len(chunks) == 50:
                world.servers["smol-a"].kill()  # of two that were idle, the first serves
    text = "".join(choice.delta.content for chunk in chunks for choice in chunk.choices)
    assert text == wanted.choices[0].message.content
    assert chunks[-1].usage == wanted.usage and len({chunk.id for chunk in chunks}) == 1
    assert gateway.metric('kvguard_gateway_resumed_total{rung="replica"}') + gateway.metric('kvguard_gateway_resumed_total{rung="pool"}') == 1
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
        with gateway.client() as client:
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
