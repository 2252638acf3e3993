"""The guarded engine in a real cluster on loopback: ranks, the driver and a whole node killed; tokens, logits and KV as in the undisturbed run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from kvguard.pipeline.weights import make_random
from kvguard.pipeline.world import Conversation, World, WorldSettings

PROMPTS = [[(5 * i + n) % 300 for i in range(length)] for n, length in enumerate((3, 300, 64, 17, 33, 1, 140, 7))]
TOKENS = 30
WAIT_S = 60.0


class Told(Conversation):
    """A driver's events, all kept; a wait ends at its deadline or with the driver."""

    def __init__(self, process):
        super().__init__(process)
        self.events: list[dict] = []
        self._ahead: list[dict] = []

    def wait_for(self, kind: str, **fields) -> dict:
        deadline = time.monotonic() + WAIT_S
        while True:
            while self._ahead:
                event = self._ahead.pop(0)
                self.events.append(event)
                assert event["event"] not in ("error", "diverged"), event
                if event["event"] == kind and all(event.get(key) == value for key, value in fields.items()):
                    return event
            assert not self.closed and time.monotonic() < deadline, f"{kind} {fields} did not come: {self.events[-2:]}\n{self.process.last_words()}"
            self._ahead = self.read()
            time.sleep(0.002)  # between two looks with a deadline

    def of(self, kind: str, **fields) -> list[dict]:
        return [event for event in self.events if event["event"] == kind and all(event.get(key) == value for key, value in fields.items())]

    def start(self, run: str) -> None:
        self.say(do="run", run=run, prompts=PROMPTS, max_tokens=TOKENS, ignore_eos=True, temperature=0.8, seed=4)

    def outcome(self, run: str) -> tuple:
        """Tokens and digests of a finished run, and the logits of those computed for this driver; releases it."""
        tokens = self.wait_for("finished", run=run)["tokens"]
        self.say(do="digest", run=run)
        digests = self.wait_for("digest", run=run)["digests"]
        self.say(do="release", run=run)
        self.wait_for("released", run=run)
        seen = [(event["sequence"], event["index"]) for event in self.of("token", run=run)]
        assert len(set(seen)) == len(seen), "an id was handed out twice"
        return tokens, digests, {(event["sequence"], event["index"]): event["logits"] for event in self.of("token", run=run) if event["logits"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    model = make_random(root / "model", "llama", 3, layers=5)
    world = World(WorldSettings(root=Path(root / "run"), model=model, stages=3, blocks=256))
    try:
        world.start()
        world.wait_ready()
        yield world
    finally:
        world.stop()


def standbys_ready(world: World, count: int) -> bool:
    status = world.status_or_none()
    return status is not None and sum(rank["state"] == "standby" for rank in status["ranks"]) >= count


@pytest.mark.e2e
def test_ranks_driver_and_node_killed_in_turn(world) -> None:
    driver = Told(world.start_driver())
    driver.wait_for("ready")
    driver.start("undisturbed")
    tokens, digests, logits = driver.outcome("undisturbed")
    assert all(len(each) == TOKENS for each in tokens) and len(logits) == TOKENS * len(PROMPTS)

    # A rank, while the longest prompt is between its chunks: its node's standby adopts the pool.
    driver.start("rank")
    driver.wait_for("prefill", run="rank", sequence=1, position=128)
    world.nodes[0].engines[0].kill()
    resumed = driver.wait_for("resumed")
    assert resumed["epoch"] == 1 and {member["rank"] for member in resumed["members"]} == {"0.0.0", "0.1.0", "0.2.0"}
    assert driver.outcome("rank") == (tokens, digests, logits)
    world.nodes[0].engines = [engine for engine in world.nodes[0].engines if engine.alive()]

    # The driver, while all decode: its successor takes everything up from what ranks and replicas know.
    driver.start("driver")
    driver.wait_for("token", run="driver", sequence=1, index=5)  # the longest prompt: the others are ahead
    world.driver.kill()
    before = {(event["sequence"], event["index"]): event["id"] for event in driver.of("token", run="driver") + [e for e in driver.read() if e["event"] == "token"]}
    driver = Told(world.start_driver())
    resumed = driver.wait_for("resumed")
    assert {each["rung"] for each in resumed["sequences"]} == {"pool"} and max(each["rolled_back"] for each in resumed["sequences"]) == 0
    found_tokens, found_digests, found_logits = driver.outcome("driver")
    assert (found_tokens, found_digests) == (tokens, digests)
    assert all(logits[key] == value for key, value in found_logits.items())
    assert all(tokens[sequence][index] == token for (sequence, index), token in before.items())

    # A node with its memory: the rank comes back from its replica elsewhere.
    world.wait_until("the standbys", lambda: standbys_ready(world, 2), WAIT_S)
    driver.start("node")
    driver.wait_for("token", run="node", sequence=1, index=10)  # the longest prompt: the others are ahead
    world.kill_node(world.nodes[1])
    resumed = driver.wait_for("resumed")
    assert {each["rung"] for each in resumed["sequences"]} == {"replica"} and resumed["bytes_by_rung"]["replica"] > 0
    assert max(each["rolled_back"] for each in resumed["sequences"]) <= 1
    assert driver.outcome("node") == (tokens, digests, logits)
    driver.say(do="quit")
    assert world.driver.popen.wait(10) == 0
