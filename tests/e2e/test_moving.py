"""Sequences of a killed instance go on in another one: an emitter that moves, two engines on two nodes (or on one), tokens that are refused."""

from __future__ import annotations

import json
import random

import pytest

from kvguard import emitter
from kvguard.emitter import moves
from kvguard.types import Rank

pytestmark = pytest.mark.e2e
RANK = "0.0.0"


@pytest.fixture
def gateway(cluster):
    """connect(): the emitter of an instance, ended with the test."""
    made = []

    def connect(instance: str, moves: bool = True) -> emitter.Emitter:
        made.append(emitter.connect(instance, cluster.coordinator_address, moves=moves))
        made[-1].scheduled(1)
        made[-1].welcome(20.0)  # one that comes when there are sequences already is a new emitter, which has to resume
        return made[-1]

    yield connect
    for one in made:
        one.close()


def held(cluster, instance: str, positions: int, holder: str) -> None:
    """So many positions of an instance's rank are protected, by that node."""

    def whole() -> bool:
        ranks = [one for one in cluster.ask("coordinator", "status")["ranks"] if one["instance"] == instance]
        found.append([{key: one[key] for key in ("state", "reason", "committed", "acked", "holders")} for one in ranks])
        return any(one["state"] == "protected" and one["committed"] == one["acked"] == positions and one["holders"] == [holder] for one in ranks)

    found: list = []
    try:
        cluster.until(f"{instance} protected at {positions} by {holder}", whole, 60.0)
    except AssertionError as error:
        raise AssertionError(f"{found[-1:]}\n{error}") from error


def begin(cluster) -> None:
    """Patient with nodes that are slow to answer: what is tried here is where sequences go on, not how soon."""
    cluster.configure_coordinator(suspect_ms=3000, dead_ms=10_000, exclude_ms=10_000, seal_ms=30_000, emitter_ms=10_000)
    cluster.start()


def two_instances(cluster, nodes=("a", "b")):
    """Both known to the coordinator: nothing can move to an instance that it hasn't heard of."""
    begin(cluster)
    engines = [cluster.engine("rank", node, RANK, instance) for node, instance in zip(nodes, ("llama-a", "llama-b"), strict=True)]
    cluster.until("both instances known", lambda: {one["instance"] for one in cluster.ask("coordinator", "status")["ranks"]} == {"llama-a", "llama-b"}, 60.0)
    return engines


def resumed(one: emitter.Emitter):
    resumption = one.resume(20.0)
    one.adopt(resumption)
    return resumption, {token.sequence: token for token in resumption}


def as_json(token) -> dict:
    return json.loads(json.dumps(moves.encode(token)))


@pytest.mark.parametrize("seed", range(3))
def test_a_killed_instance_goes_on_in_the_other(cluster, gateway, seed):
    """Killed while it commits: what the tokens name is what the other engine gets, byte for byte, while it serves its own sequences."""
    rng = random.Random(seed)
    a, b = two_instances(cluster)
    front = gateway("llama-a")
    a.tell("step", commits=[["one", 70], ["two", 5]])
    b.tell("step", commits=[["own", 33]])
    held(cluster, "llama-a", 75, "b")
    for _ in range(rng.randrange(1, 12)):
        a.tell("step", commits=[["one", rng.randrange(1, 4)], ["two", 1]])
    a.kill()
    resumption, tokens = resumed(front)
    assert resumption.moved and not resumption.members and set(tokens) == {"one", "two"}
    assert {(token.places, token.rung) for token in tokens.values()} == {(((Rank(0, 0, 0), "b"),), "replica")}
    assert tokens["one"].position >= 70 and tokens["two"].position >= 5
    for name, token in tokens.items():
        b.tell("step", commits=[["own", 1]])
        assert b.tell("fetch", token=as_json(token), timeout_s=10.0)["position"] == token.position == len(token.prefix)
        b.tell("step", commits=[[name, 3], ["own", 1]])
    assert b.tell("intact") == {"wrong": [], "lengths": {"own": 37, "one": tokens["one"].position + 3, "two": tokens["two"].position + 3}}
    [entry] = cluster.ask("coordinator", "history")["history"]
    assert entry["error"] == "" and entry["rungs"] == {"one": "replica", "two": "replica"}
    assert any(one["instance"] == "llama-a" for one in cluster.ask("b", "replicas")["replicas"]), "until it is delivered"
    front.delivered(["one", "two"])
    cluster.until("the replica let go", lambda: not any(one["instance"] == "llama-a" for one in cluster.ask("b", "replicas")["replicas"]))
    assert "refused" in b.tell("fetch", token=as_json(tokens["one"]), timeout_s=5.0)


def test_on_one_node_the_dead_pool_is_read(cluster, gateway):
    """Everything that was committed, replicated or not; the node's memory is the dead process's own."""
    a, b = two_instances(cluster, nodes=("a", "a"))
    front = gateway("llama-a")
    a.tell("step", commits=[["one", 70]])
    held(cluster, "llama-a", 70, "b")
    a.tell("step", commits=[["one", 9]])
    a.kill()
    _, tokens = resumed(front)
    assert (tokens["one"].position, tokens["one"].rung, tokens["one"].places) == (79, "pool", ((Rank(0, 0, 0), "a"),))
    assert b.tell("fetch", token=as_json(tokens["one"]), timeout_s=10.0)["position"] == 79
    b.tell("step", commits=[["one", 2]])
    assert b.tell("intact") == {"wrong": [], "lengths": {"one": 81}}


@pytest.mark.parametrize("device", ["rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_one_node_memory_that_was_kept_on_a_gpu_is_brought_to_the_host(cluster, gateway, monkeypatch, device):
    """It was kept for a successor; who comes is another instance, which can't open it."""
    monkeypatch.setenv("ENGINE_DEVICE", device)
    monkeypatch.setenv("ENGINE_BORROWS", "1")
    (cluster.directory / "conf.d").mkdir()
    (cluster.directory / "conf.d" / "gpu.toml").write_text(f'[node]\ndevice = "{device}"\nring_bytes = {1 << 20}\n')
    a, b = two_instances(cluster, nodes=("a", "a"))
    front = gateway("llama-a")
    a.tell("step", commits=[["one", 70]])
    held(cluster, "llama-a", 70, "b")
    a.kill()
    _, tokens = resumed(front)
    assert (tokens["one"].position, tokens["one"].rung) == (70, "pool")
    assert b.tell("fetch", token=as_json(tokens["one"]), timeout_s=10.0)["position"] == 70
    b.tell("step", commits=[["one", 2]])
    assert b.tell("intact") == {"wrong": [], "lengths": {"one": 72}}


def test_what_is_refused_and_why(cluster, gateway):
    """Forged, changed, of another model, over: the engine computes it from its ids, and nothing is given away."""
    a, b = two_instances(cluster)
    other = cluster.engine("rank", "b", RANK, "qwen", "another model")
    front = gateway("llama-a")
    a.tell("step", commits=[["one", 70]])
    held(cluster, "llama-a", 70, "b")
    a.kill()
    _, tokens = resumed(front)
    token = as_json(tokens["one"])
    for wrong in ({"proof": "00" * 32}, {"position": 69}, {"sequence": "two"}):
        assert "proof" in b.tell("fetch", token={**token, **wrong}, timeout_s=5.0)["refused"]
    for wrong in ({"epoch": [7, "coordinator"]}, {"epoch": [1, "somebody"]}, {"instance": "llama-b"}):
        assert "stale" in b.tell("fetch", token={**token, **wrong}, timeout_s=5.0)["refused"]
    assert "another model" in other.tell("fetch", token=token, timeout_s=5.0)["refused"]
    assert "ids of 'one' are others" in b.tell("fetch", token=token, timeout_s=5.0, first=3)["refused"]
    assert b.tell("fetch", token=token, timeout_s=5.0)["position"] == 70
    again = cluster.engine("rank", "a", RANK, "llama-a")  # the instance is started again: empty, in the new epoch
    cluster.until("it to be welcomed", lambda: again.tell("status")["epoch"] == 1)  # its daemon's word for the epoch stands in the table before
    assert again.tell("step", commits=[["fresh", 20]]) == {"lengths": {"fresh": 20}}
    held(cluster, "llama-a", 20, "b")
    assert again.tell("status")["epoch"] == 1
    again.kill()  # and dies again: an epoch later, what moved before is stale
    _, tokens = resumed(front)
    assert set(tokens) == {"fresh"} and tokens["fresh"].epoch.counter == 2, "what is elsewhere by now isn't brought back"
    assert "stale" in b.tell("fetch", token=token, timeout_s=5.0)["refused"]
    assert b.tell("fetch", token=as_json(tokens["fresh"]), timeout_s=5.0)["position"] == 20
    assert b.tell("intact")["wrong"] == []


def test_a_coordinator_that_dies_meanwhile_moves_the_same(cluster, gateway):
    a, b = two_instances(cluster)
    front = gateway("llama-a")
    a.tell("step", commits=[["one", 70]])
    held(cluster, "llama-a", 70, "b")
    cluster.kill("coordinator")
    a.kill()
    cluster.start("coordinator")
    _, tokens = resumed(front)
    assert tokens["one"].position == 70
    cluster.kill("coordinator")
    cluster.start("coordinator")
    cluster.until("the emitter linked again", lambda: "linked" in [one["emitter"] for one in cluster.ask("coordinator", "status")["instances"][:1]])
    assert b.tell("fetch", token=as_json(tokens["one"]), timeout_s=5.0)["position"] == 70
    assert b.tell("intact")["wrong"] == []
    front.delivered("one")
    cluster.until("the replica let go", lambda: not any(one["instance"] == "llama-a" for one in cluster.ask("b", "replicas")["replicas"]))
