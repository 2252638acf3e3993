"""Two real vLLM servers with SmolLM2 and their daemons: what is committed in A is in B's node, and requests of a killed A go on in B at the next token.

The caches are small (48 blocks of 32 tokens), so that prompts come in chunks and sequences are preempted.
"""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.request

import pytest
from glass import Glass
from world import World

from kvguard import emitter
from kvguard.emitter import moves
from kvguard.transport.ask import ask

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
SMALL = ("--num-gpu-blocks-override", "48", "--max-num-batched-tokens", "256", "--max-model-len", "1024")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    try:
        world.start_daemons()
        for name in ("a", "b"):
            world.start_server(name, *SMALL, wait=False)
        for server in world.servers.values():
            world.wait_ready(server)
        yield world
    finally:
        world.stop()


@pytest.fixture
def glass(small):
    """Of A, its replica on node b."""
    return glass_of(small, "a", "b")


def prompt_of(number: int, tokens: int) -> list[int]:
    """Ids that differ from number to number from the start on."""
    return [(7 * position + 131 * number + position * position // 5) % 20000 + 100 for position in range(tokens)]


def metric(server, name: str) -> float:
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=10) as answer:  # noqa: S310 (loopback)
        return sum(float(line.split()[-1]) for line in answer.read().decode().splitlines() if line.startswith((f"{name} ", f"{name}{{")))


def replicas(world, node: str, instance: str) -> list[dict]:
    """What a node holds for an instance."""
    return [one for one in ask(world.addresses[node], "replicas", {}, timeout=5.0)["replicas"] if one["instance"] == instance]


def glass_of(world, name: str, holder: str) -> Glass:
    """Of the server smol-`name`, and its replica on node `holder`."""

    def positions() -> dict[str, int]:
        return {one["sequence"]: one["positions"] for one in replicas(world, holder, f"smol-{name}") if one["rank"] == "0.0.0" and not one["released"]}

    return Glass(world.servers[f"smol-{name}"].popen.pid, world.running[holder].pid, positions)


class Streams:
    """Requests that run beside the test. `ids`: of each, as far as they came."""

    def __init__(self) -> None:
        self.ids: dict[str, list[int]] = {}
        self.leave = threading.Event()  # every client closes its connection
        self._threads: list[threading.Thread] = []

    def start(self, server, name: str, prompt: list[int], tokens: int, leaves_at: int = 10**6, **more) -> None:
        """`leaves_at`: the client closes its connection after so many tokens, which vLLM takes for an abort."""
        self.ids[name] = []

        def run() -> None:
            with contextlib.closing(server.stream(prompt, tokens, name, **more)) as stream:
                for ids, _ in stream:
                    self.ids[name] += ids
                    if len(self.ids[name]) >= leaves_at or self.leave.is_set():
                        return

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self, timeout_s: float = 300.0) -> None:
        for thread in self._threads:
            thread.join(timeout_s)
            assert not thread.is_alive()

    @property
    def running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads)


def test_every_committed_byte_is_in_the_replica(small, glass):
    """Eight sequences, prompts in chunks, a prefix that four of them share, one that goes away, and more of them than the cache can hold."""
    server, streams = small.servers["smol-a"], Streams()
    shared = prompt_of(0, 200)
    for number in range(8):
        own = prompt_of(number + 1, 20 + 40 * number)
        prompt = shared + own if number < 4 else own
        streams.start(server, f"copy-{number}", prompt, 40, **({} if number != 5 else {"max_tokens": 1000 - len(own), "leaves_at": 60}))
    positions, compared, first_blocks = {}, 0, set()
    while streams.running:
        time.sleep(0.1)  # between two looks: the looking must not take the servers' processor
        look = glass.look()
        equal, _, _ = glass.compared(look)
        compared = max(compared, equal)
        for name, (blocks, committed) in look.items():
            positions[name] = max(positions.get(name, 0), committed)
            if name.startswith("copy-") and int(name[5:]) < 4 and blocks:
                first_blocks.add(blocks[0])
    streams.join()
    assert compared > 800 and len(positions) == 8
    assert all(committed >= 240 for name, committed in positions.items() if int(name[5:]) < 4), positions
    assert len(first_blocks) < 4, "the common prefix was shared"
    assert metric(server, "vllm:num_preemptions_total") > 0
    small.until("rows released, that of the client that left as well", lambda: not glass.look())
    small.until("replicas dropped", lambda: small.rank("smol-a")["sequences"] == 0)


def test_a_damaged_copy_is_noticed(small, glass):
    """The comparison's negative control."""
    streams = Streams()
    streams.start(small.servers["smol-a"], "control", prompt_of(9, 40), 300)  # longer than a daemon that is starved of its processor takes to catch up
    small.until("something to compare", lambda: glass.compared(glass.look())[0] > 40)
    with pytest.raises(AssertionError, match="differs between pool and replica"):
        glass.compared(glass.look(), damage=True)
    streams.join()


EXTERNAL = "vllm:external_prefix_cache_hits_total"


def test_killed_requests_go_on_in_another_server(small, glass):
    """One stream at a time, so that the batch's shape is the same before and after: the greedy answer is identical, and so are the KV bytes that were moved."""
    a, b = small.servers["smol-a"], small.servers["smol-b"]
    prompt, tokens = prompt_of(20, 150), 50
    wanted = a.complete(prompt, tokens, "undisturbed")["choices"][0]["token_ids"]
    assert len(wanted) == tokens
    outlet = emitter.connect("smol-a", small.coordinator, moves=True)
    try:
        outlet.welcome(20.0)
        outlet.scheduled(1)
        streams = Streams()
        streams.start(a, "moving", prompt, tokens)
        small.until("half of it", lambda: len(streams.ids["moving"]) >= tokens // 2, 120)
        a.kill()
        streams.join()
        resumption = outlet.resume(30.0)
        [token] = [token for token in resumption if token.sequence == "moving"]
        outlet.adopt(resumption)
        died = glass.look()["moving"]
        emitted = prompt + streams.ids["moving"]
        known = max(emitted, [*token.prefix, *token.tokens], key=len)
        assert resumption.moved and token.places and known[: len(emitted)] == emitted
        restored = min(token.position, len(known) - 1)
        assert restored >= len(emitted) - 8, "what was streamed is what was protected, but for a few tokens"

        forged = {**moves.encode(token), "proof": "00" * 32}
        answer = b.complete(known, 3, "forged", kv_transfer_params={"kvguard": forged})
        outcome = answer["kv_transfer_params"]["kvguard"]
        assert outcome["restored"] == 0 and outcome["why"], outcome
        assert answer["choices"][0]["token_ids"] == wanted[len(known) - len(prompt) :][:3]

        before, copy = metric(b, EXTERNAL), glass_of(small, "b", "a")
        streams.start(b, "moved", known, len(prompt) + tokens - len(known), kv_transfer_params={"kvguard": moves.encode(token)})
        blocks = small.until("it runs in b", lambda: (found := copy.look().get("moved")) and found[1] > restored and found[0], 60)
        for index in range(-(-restored // 32)):
            count = min(32, restored - 32 * index)
            assert copy.block(blocks[index], count) == glass.block(died[0][index], count), f"block {index} is not what the dead engine had"
        streams.join()
        assert metric(b, EXTERNAL) - before == restored
        assert known[len(prompt) :] + streams.ids["moved"] == wanted
        outlet.delivered(["moving"])
        small.until("nothing to be kept of it", lambda: not any(one["sequence"] == "moving" for one in replicas(small, "b", "smol-a")))
    finally:
        outlet.close()


def test_an_engine_restarted_in_place_begins_empty_and_is_protected(small):
    """After the one before: a is dead, its sequences have moved."""
    # A look must not take a page of its former life for one of the new.
    small.until("nothing of its former life to be held", lambda: not replicas(small, "b", "smol-a"))
    a = small.start_server("a", *SMALL)
    streams = Streams()
    streams.start(a, "again", prompt_of(30, 40), 60)
    glass = glass_of(small, "a", "b")
    small.until("replicated", lambda: glass.compared(glass.look())[0] > 40, 60)
    streams.join()
    rank = small.until("alive in the status", lambda: small.rank("smol-a"))
    assert rank["state"] == "protected"


def test_a_daemon_that_restarts_is_joined_again(small):
    """Daemon gone is not node gone: the emitter sees progress, the engine serves on, and is protected again when a daemon is back."""
    server, streams, over = small.servers["smol-b"], Streams(), threading.Event()
    outlet = emitter.connect("smol-b", small.coordinator, moves=True)

    def tell() -> None:  # as a gateway does, whatever its test waits for
        while not over.wait(0.05):
            outlet.progress(len(streams.ids.get("through", ())))

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    try:
        outlet.welcome(20.0)
        outlet.scheduled(1)
        streams.start(server, "through", prompt_of(40, 30), 900)
        small.until("it runs", lambda: len(streams.ids["through"]) > 3, 60)
        daemon = small.running.pop("b")
        daemon.kill()
        daemon.wait()
        gone = len(streams.ids["through"])
        small.until("progress without a daemon", lambda: len(streams.ids["through"]) > gone + 5, 60)
        small.start_daemons("b")
        copy = glass_of(small, "b", "a")
        small.until("replicated again", lambda: copy.compared(copy.look())[0] > 40, 60)
        assert streams.running, "not one answer was lost"
    finally:
        streams.leave.set()
        streams.join()
        over.set()
        telling.join()
        outlet.close()
