"""Three hosts for real: namespaces with addresses of their own, installed as docs/operations.md says, keys on, broken and mended.

Knows: the demo's document, the command line's exit codes. Must not know: how the hosts are made (hosts.py), how recovery works.
"""

from __future__ import annotations

import json
import os
import subprocess

import hosts
import pytest

from kvguard.errors import TimedOut
from kvguard.pipeline import demo
from kvguard.pipeline.client import Client
from kvguard.pipeline.weights import make_random
from kvguard.pipeline.world import World, WorldSettings

WHY_NOT = hosts.why_not()
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
on_hosts = pytest.mark.skipif(bool(WHY_NOT) and not (os.environ.get("KVGUARD_REQUIRE_ALL") and "isn't installed" in WHY_NOT), reason=WHY_NOT)
STAGES, TOKENS, SEED = 3, 60, 5
KILLS = {"node:kill-daemon", "desk:kill-coordinator", "node:kill-stage"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_random(tmp_path_factory.mktemp("model"), "llama", seed=1, layers=6, context=2048)


@pytest.fixture(scope="module")
def options(model) -> demo.Options:
    return demo.Options(stages=STAGES, kill="node", at_token=10, max_tokens=TOKENS, sequences=3, seed=SEED, model=str(model))


@pytest.fixture(scope="module")
def on_loopback(model, options, tmp_path_factory):
    """(tokens, logits by index, KV sums) of the same prompts on loopback, by the same engine without kvguard."""
    world = World(WorldSettings(root=tmp_path_factory.mktemp("loopback"), model=model, stages=STAGES, guarded=False))
    try:
        world.start()
        client = Client(world)
        client.connect("ready")
        client.begin("before", demo.prompts_of(options, model), TOKENS, SEED)
        client.finished("before", 200.0)
        return client.transcripts["before"].tokens(), client.transcripts["before"].logits, client.digest("before")
    finally:
        world.stop()


@pytest.fixture
def world(model, tmp_path):
    if WHY_NOT:
        pytest.fail(WHY_NOT)  # required, and merely not installed
    named = networks()
    made = hosts.HostsWorld(WorldSettings(root=tmp_path, model=model, stages=STAGES))
    try:
        yield made
    finally:
        made.stop()
        assert networks() == named


def networks() -> str:
    """What `ip netns list` says, and the links of this machine's own network."""
    return "".join(subprocess.run(["ip", *what], capture_output=True, text=True, check=True).stdout for what in (("netns", "list"), ("-br", "link")))


@on_hosts
@pytest.mark.parametrize("cable", [False, True], ids=["a host loses its power", "a cable is cut and plugged in again"])
def test_what_broke_comes_back_as_on_loopback(world, model, options, on_loopback, cable, record_property) -> None:
    run = hosts.HostsDemo(options, world, print, cable)
    document = run.run(demo.prompts_of(options, model), {"name": "tiny"})
    told = json.dumps(document, indent=1)[:4000]
    assert document["fault"]["fired"] and run.fault.node.name == "host-2", told
    assert document["identical"] and document["logits_identical"] and document["kv_identical"], told
    recovery = document["recovery"]
    assert recovery["rung"] == "replica" and recovery["epoch"] == 1 and recovery["lost_sequences"] == 0, told
    assert all(one["rung"] == "replica" and one["resume_position"] > 0 for one in recovery["sequences"]), told
    if cable:  # who slept through it is ended by its own daemon, and serves nobody
        assert run.fault.evidence == {"carrier": ["UP", "DOWN"], "slept_through": True, "waitpid": -9}

    tokens, logits, digests = on_loopback
    transcripts = run.client.transcripts
    assert document["tokens_after"] == tokens and transcripts["after"].logits == logits == transcripts["before"].logits
    run.client.begin("again", demo.prompts_of(options, model), TOKENS, SEED)  # on the ranks as they are now
    run.client.finished("again", 200.0)
    assert run.client.digest("again") == digests and run.client.transcripts["again"].tokens() == tokens

    for name, host in {**world.hosts, "desk": world.desk}.items():
        said = host.tried("anywhere:check")
        assert host.follow("anywhere:status").count("alive") == 3
        assert said.returncode == 0 and said.stdout.startswith("KVGUARD OK - 3 ranks protected"), f"{name}: {said}"
    assert "again-2" in world.desk.follow("anywhere:replicas")
    history = world.hosts["host-1"].follow("anywhere:history")
    assert "host-2" in history and "replica" in history, history
    unfollowed = KILLS | (set() if cable else {"node:cut", "node:plug"})
    assert set(world.handbook) - world.handbook.followed == unfollowed, "blocks of the handbook that nobody follows"
    print(f"{document['fault']['kind']}: detect_ms {recovery['ms']['detect']:.0f}, {recovery['ms']}")
    record_property("detect_ms", recovery["ms"]["detect"])


class Reader:
    """Somebody at the desk who follows the handbook and reads what the screen says, while the driver writes tokens."""

    def __init__(self, world, options, model):
        self.world, self.client = world, Client(world)
        self._prompts, self._waves = demo.prompts_of(options, model), 0
        self.client.connect("ready")
        self.wave()

    def wave(self) -> None:
        self._waves += 1
        self.client.begin(f"wave-{self._waves}", self._prompts, TOKENS, SEED)

    def reads(self, what: str, code: int, *words: str) -> str:
        """`kvguard check`, again and again, until it ends with this code and says these words. Tokens come meanwhile."""
        said, seen = None, len(self.client.arrivals)

        def so() -> bool:
            nonlocal said
            if self.client.last("finished", f"wave-{self._waves}"):
                self.wave()
            said = self.world.desk.tried("anywhere:check")
            return said.returncode == code and all(word in said.stdout for word in words) and len(self.client.arrivals) > seen

        try:
            self.client.wait(what, so, 120.0)
        except TimedOut as error:
            raise AssertionError(f"{error}: {said}") from error
        print(f"{what}: {said.stdout}", end="")
        return said.stdout

    def transcripts(self) -> list[list[list[int]]]:
        """Tokens of every wave, all of them finished."""
        self.client.finished(f"wave-{self._waves}", 200.0)
        return [self.client.transcripts[f"wave-{number}"].tokens() for number in range(1, self._waves + 1)]


@on_hosts
def test_one_command_per_fault_and_what_the_screen_says(world, model, options, on_loopback) -> None:
    """The handbook's kills, as they stand there."""
    world.start()
    world.wait_ready(300.0)
    reader, (first, _, last) = Reader(world, options, model), world.nodes
    ended = lambda process: reader.client.wait("its end", lambda: not process.alive(), 30.0)  # noqa: E731
    reader.reads("all well", 0, "KVGUARD OK - 3 ranks protected")

    world.hosts[first.name].follow("node:kill-daemon")
    ended(first.daemon)
    reader.reads("a daemon killed", 1, "KVGUARD WARNING", "host-1", "unprotected")
    world.start_daemon(first)
    reader.reads("a daemon back", 0, "KVGUARD OK")
    assert "nothing has happened" in world.desk.follow("anywhere:history")

    world.desk.follow("desk:kill-coordinator")
    ended(world.coordinator)
    reader.reads("the coordinator killed", 3, "KVGUARD UNKNOWN", "nobody answers")
    world.start_coordinator()
    reader.reads("the coordinator back", 0, "KVGUARD OK")
    assert "nothing has happened" in world.desk.follow("anywhere:history")

    stage = last.engines[0]
    world.hosts[last.name].follow("node:kill-stage")
    ended(stage)
    reader.client.wait("a recovery", lambda: "0.2.0" in world.desk.follow("anywhere:history"), 120.0)
    history = world.desk.follow("anywhere:history")
    print(history)
    assert "pool" in history or "replica" in history
    world.replenish(reader.client.endpoints)
    reader.reads("a stage killed", 0, "KVGUARD OK - 3 ranks protected")
    assert all(tokens == on_loopback[0] for tokens in reader.transcripts())


@on_hosts
def test_who_has_no_key_is_not_let_in(world) -> None:
    """Nothing of the cluster's own is on a network in clear: who isn't listed can't even ask, and without keys nothing starts."""
    world.install()
    world.start_coordinator()
    world.start_daemon(world.nodes[0])
    world.wait_until("host-1 alive", lambda: [one for one in (world.status_or_none() or {"nodes": []})["nodes"] if one["state"] == "alive"], 60.0)
    stranger = world.hosts["host-3"]
    asking = f"kvguard status --coordinator {world.coordinator_address} --timeout 2"
    listed = stranger.namespace.run(f"{asking} --keys /etc/kvguard/node.key", **stranger.environment)
    assert listed.returncode == 0 and "host-1" in listed.stdout, listed
    unlisted = "kvguard keys generate /run/stranger.key; cat /etc/kvguard/peers >> /run/stranger.key; "
    for script in (f"{unlisted}{asking} --keys /run/stranger.key", f"{asking} --keys '' --insecure"):
        refused = stranger.namespace.run(script, **stranger.environment)
        assert refused.returncode not in (0, 2, 127) and "host-1" not in refused.stdout, refused
    without = "sed 's/^keys = .*//' /etc/kvguard/node.toml > /run/bare.toml; kvguard node --config /run/bare.toml"
    bare = stranger.namespace.run(without, **stranger.environment)
    assert bare.returncode == 78 and "leaves this machine without keys" in bare.stderr, bare
