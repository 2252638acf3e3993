"""vLLM over two workers, tensor- or pipeline-parallel: one of them is killed in the middle of an answer, and another server of two workers goes on with it;
last, with tensors in two, behind the gateway, whose client notices nothing.

The model is a small Llama of random weights, because SmolLM2's nine heads can't be shared by two; its KV is compared byte by byte, rank by rank.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import httpx
import openai
import pytest
import torch
from front import Gateway
from glass import TOKENS, Glass, smollm2_layout, workers_of
from test_servers import EXTERNAL, Streams, metric, prompt_of
from transformers import LlamaConfig, LlamaForCausalLM
from world import MODEL, Server, World, model_directory

from kvguard import emitter
from kvguard.emitter import Emitter, moves
from kvguard.types import ResumeToken

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
LAYERS, KV_HEADS, TOKENS_ASKED = 4, 2, 400
# vLLM 0.32 makes the buffers between stages in its warm-up alone, which its CPU runner leaves out where nothing is compiled: so something is, by Dynamo alone.
TRACED = ("--no-enforce-eager", "--compilation-config", json.dumps({"mode": 2, "backend": "eager"}))
SPLITS = {
    "tensor": (("--tensor-parallel-size", "2"), ("0.0.0", "0.0.1"), LAYERS, KV_HEADS // 2),
    "pipeline": (("--pipeline-parallel-size", "2", *TRACED), ("0.0.0", "0.1.0"), LAYERS // 2, KV_HEADS),
}
# Without prefix caching: what an undisturbed answer left behind would change the shapes in which the next one's prompt is computed, and so its last bits.
SMALL = ("--num-gpu-blocks-override", "48", "--max-num-batched-tokens", "256", "--max-model-len", "1024", "--no-enable-prefix-caching")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> str:
    """A directory with a Llama of four heads whose weights are large enough for its answers not to repeat themselves."""
    place = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=512, num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=KV_HEADS, head_dim=64,
        max_position_embeddings=2048, tie_word_embeddings=True, initializer_range=0.1, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(3)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(place)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model_directory()) / name, place / name)
    return str(place)


class Pair:
    """Two servers of two workers each."""

    def __init__(self, world: World, split: str, model: str) -> None:
        self.world, self.model = world, model
        self._arguments, self.ranks, layers, heads = SPLITS[split]
        self._layout = functools.partial(smollm2_layout, layers=layers, heads=heads)
        self.outlets: dict[str, Emitter] = {}

    def connect(self) -> None:
        """As a gateway does, before any request: an emitter that comes later begins with a recovery."""
        for name in ("a", "b"):
            self.outlets[name] = emitter.connect(f"smol-{name}", self.world.coordinator, moves=True)
            self.outlets[name].welcome(20.0)

    def leave(self) -> None:
        while self.outlets:
            self.outlets.popitem()[1].close()

    def start(self, name: str) -> Server:
        cores = sorted(os.sched_getaffinity(0))
        bound = {"VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}"}
        return self.world.start_server(name, *SMALL, *self._arguments, wait=False, env=bound, model=self.model)

    def glasses(self, name: str) -> list[Glass]:
        """By rank, of the engine's own side alone: in its replicas' arenas blocks of two ranks have the same numbers and generations."""
        group = self.world.servers[f"smol-{name}"].popen.pid
        workers = workers_of(group)
        assert len(workers) == 2
        return [Glass(group, os.getpid(), dict, worker, self._layout) for worker in workers]

    def ranks_of(self, name: str) -> tuple[str, ...]:
        """That the coordinator knows."""
        return tuple(sorted(one["rank"] for one in self.world.status()["ranks"] if one["instance"] == f"smol-{name}" and one["state"] != "standby"))


@pytest.fixture(scope="module", params=SPLITS)
def pair(request, tmp_path_factory, tiny):
    world = World(tmp_path_factory.mktemp(request.param))
    made = Pair(world, request.param, tiny)
    try:
        world.start_daemons()
        for server in [made.start(name) for name in ("a", "b")]:
            world.wait_ready(server)
        world.until("both ranks of both", lambda: made.ranks_of("a") == made.ranks_of("b") == made.ranks, 60)
        made.connect()
        yield made
    finally:
        made.leave()
        world.stop()


class Cut(NamedTuple):
    """An answer that ended with one worker of its server. `known`: prompt and ids so far; `died`: by rank, its view and the sequence's blocks."""

    known: list[int]
    restored: int
    died: list[tuple[Glass, list[int]]]


def cut(pair: Pair, name: str, sequence: str, prompt: list[int], victim: int) -> tuple[Cut, ResumeToken]:
    """Kill a worker when half of the tokens have come, and take what the recovery says."""
    server, outlet, streams, glasses = pair.world.servers[f"smol-{name}"], pair.outlets[name], Streams(), pair.glasses(name)
    outlet.scheduled(1)
    streams.start(server, sequence, prompt, TOKENS_ASKED)
    pair.world.until("half of it", lambda: len(streams.ids[sequence]) >= TOKENS_ASKED // 2, 120)
    server.kill_worker(glasses[victim].worker)
    resumption = outlet.resume(30.0)
    streams.join()
    emitted = prompt + streams.ids[sequence]
    assert len(streams.ids[sequence]) < TOKENS_ASKED, "it was killed in the middle"
    [token] = [token for token in resumption if token.sequence == sequence]
    outlet.adopt(resumption)
    died = [glass.look()[sequence] for glass in glasses]
    known = max(emitted, [*token.prefix, *token.tokens], key=len)
    assert resumption.moved and tuple(sorted({str(rank) for rank, _ in token.places})) == pair.ranks and known[: len(emitted)] == emitted
    restored = min(token.position, len(known) - 1)
    assert len(emitted) - 8 <= restored, "what was streamed is what was protected, but for a few tokens"
    assert token.position <= min(committed for _, committed in died), "never more than every rank had"
    return Cut(known, restored, [(glass, blocks) for glass, (blocks, _) in zip(glasses, died, strict=True)]), token


def running(copy: Glass, sequence: str, beyond: int) -> list[int] | None:
    """Its blocks, once it has more positions than that."""
    blocks, committed = copy.look().get(sequence, ([], 0))
    return blocks if committed > beyond else None


def go_on(pair: Pair, name: str, sequence: str, prompt: list[int], found: Cut, token: ResumeToken) -> list[int]:
    """All ids of the answer, with the rest from this server; its KV of every rank is compared with what the dead one had."""
    server, streams, copies = pair.world.servers[f"smol-{name}"], Streams(), pair.glasses(name)
    before = metric(server, EXTERNAL)
    streams.start(server, sequence, found.known, len(prompt) + TOKENS_ASKED - len(found.known), kv_transfer_params={"kvguard": moves.encode(token)})
    looks = [pair.world.until("it runs again", functools.partial(running, copy, sequence, found.restored), 60) for copy in copies]
    for (glass, blocks), copy, here in zip(found.died, copies, looks, strict=True):
        for index in range(-(-found.restored // TOKENS)):
            count = min(TOKENS, found.restored - TOKENS * index)
            assert copy.block(here[index], count) == glass.block(blocks[index], count), f"block {index} is not what the dead rank had"
    assert len({copy.block(here[0], TOKENS) for copy, here in zip(copies, looks, strict=True)}) == 2, "each rank has KV of its own"
    streams.join()
    assert metric(server, EXTERNAL) - before == found.restored
    return found.known[len(prompt) :] + streams.ids[sequence]


def test_a_killed_workers_requests_go_on_in_another_server(pair):
    world, prompt = pair.world, prompt_of(20, 150)
    wanted = world.servers["smol-a"].complete(prompt, TOKENS_ASKED, "undisturbed")["choices"][0]["token_ids"]
    assert len(wanted) == TOKENS_ASKED and len(set(wanted)) > 20, "an answer that says something"
    found, token = cut(pair, "a", "moving", prompt, 1)
    assert token.rung == "replica"
    assert go_on(pair, "b", "moved", prompt, found, token) == wanted
    pair.outlets["a"].delivered(["moving"])


def test_a_server_whose_worker_was_killed_goes_on_with_its_own_pools(pair):
    """After the one before: a is gone, so nobody but b itself can go on, once it is started again."""
    world, prompt = pair.world, prompt_of(21, 170)
    world.servers["smol-a"].kill()
    wanted = world.servers["smol-b"].complete(prompt, TOKENS_ASKED, "undisturbed")["choices"][0]["token_ids"]
    found, token = cut(pair, "b", "staying", prompt, 0)
    assert token.rung == "pool"
    world.servers["smol-b"].kill()
    world.wait_ready(pair.start("b"))
    assert go_on(pair, "b", "stayed", prompt, found, token) == wanted
    pair.outlets["b"].delivered(["staying"])


@pytest.mark.parametrize("pair", ["tensor"], indirect=True)
def test_a_gateways_client_does_not_notice_a_killed_worker(pair):
    """After the ones before: a comes back, and the gateway's emitters take this test's place."""
    world = pair.world
    a, b = world.servers["smol-a"], world.servers["smol-b"]
    if a.popen.poll() is not None:
        a = pair.start("a")
        world.wait_ready(a)
    world.until("both ranks of both", lambda: pair.ranks_of("a") == pair.ranks_of("b") == pair.ranks, 60)
    pair.leave()
    gateway, ids, ends = Gateway(world, tokenizer=pair.model), [], []
    asked = {"model": MODEL, "prompt": prompt_of(22, 130), "max_tokens": TOKENS_ASKED, "temperature": 0}
    more = {"ignore_eos": True, "return_token_ids": True}
    try:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0, timeout=300, http_client=httpx.Client(trust_env=False)) as client:
            wanted = client.completions.create(**asked, extra_body=more).choices[0]
            before, victim = metric(b, EXTERNAL), workers_of(a.popen.pid)[1]
            for chunk in client.completions.create(**asked, stream=True, extra_body=more):
                ids += chunk.choices[0].token_ids or []
                ends += [chunk.choices[0].finish_reason] if chunk.choices[0].finish_reason else []
                if victim and len(ids) >= TOKENS_ASKED // 2:
                    a.kill_worker(victim)  # of two that are idle, the first serves
                    victim = 0
        assert len(wanted.token_ids) == TOKENS_ASKED and len(set(wanted.token_ids)) > 20, "an answer that says something"
        assert ids == wanted.token_ids and ends == ["length"]
        assert gateway.rungs() == {"replica": 1}
        assert metric(b, EXTERNAL) - before >= len(asked["prompt"]) + TOKENS_ASKED // 2 - 8, "the KV came, and was not computed"
    finally:
        assert gateway.stop() == 0
