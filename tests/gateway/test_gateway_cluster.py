"""The gateway with a real coordinator and real nodes: engines that are killed leave KV behind, and it is that KV that the others go on with."""

from __future__ import annotations

import pytest

from kvguard.config import GatewayConfig
from kvguard.gateway import process
from tests.e2e.conftest import Cluster
from tests.gateway.conftest import until
from tests.gateway.test_streams import Clients, expected

pytestmark = pytest.mark.e2e


@pytest.fixture
def cluster(tmp_path):
    made = Cluster(tmp_path)
    # The gateway shares this process with the clients: on a busy machine its emitters may be silent for longer than a second.
    made.configure_coordinator(emitter_ms=20_000)
    try:
        made.start()
        yield made
    finally:
        made.stop()


def dial_of(cluster) -> process.Dial:
    return process.dialler(GatewayConfig(instances=(), tokenizer="", coordinator=cluster.coordinator_address))


def begin(world, cluster, **settings) -> None:
    """A backend beside each node, the gateway in front, every rank with a holder."""
    sockets = {f"toy-{name}": str(cluster.directory / name / "kvguard.sock") for name in cluster.addresses}
    cluster.until("nodes", lambda: len([one for one in cluster.ask("coordinator", "status")["nodes"] if one["state"] == "alive"]) == len(sockets))
    world.start(*sockets, sockets=sockets, dial=dial_of(cluster), coordinator=cluster.coordinator_address, **settings)

    def protected() -> bool:
        return [one["state"] for one in cluster.ask("coordinator", "status")["ranks"]] == ["protected"] * len(sockets)

    cluster.until("holders", protected, 60)


def test_streams_go_on_with_the_dead_engines_kv(world, cluster):
    begin(world, cluster)
    world.backends["toy-a"].set(stall=40)
    world.backends["toy-b"].set(delay_ms=5)
    clients = Clients(world, 8)
    until("all to have begun", lambda: all(len(chunks) > 5 for chunks in clients.chunks))
    began = len(world.in_flight("toy-b"))
    assert began == 4
    until("a to stall", lambda: world.backends["toy-a"].seen["open"] == 4)
    world.backends["toy-a"].kill()
    clients.join()
    assert clients.errors == [None] * 8
    for number in range(8):
        assert clients.text(number) == expected(clients.prompt(number), 120, False)
    outcomes = world.backends["toy-b"].seen["outcomes"]
    assert len(outcomes) == 4 and all(same is True and position > 20 for position, same in outcomes), outcomes
    assert world.metric("kvguard_gateway_resumed_total", rung="replica") == 4
    assert world.metric("kvguard_gateway_stall_seconds_count") == 4
    # What was delivered is kept for nobody.
    cluster.until("replicas to go", lambda: not _replicas(cluster, "toy-a"), 30)


def _replicas(cluster, instance: str) -> list:
    found = [one for name in cluster.addresses for one in cluster.ask(name, "replicas")["replicas"] if one["instance"] == instance]
    return [one for one in found if one["bytes"]]


def test_without_a_coordinator_the_ids_go_on(world, cluster):
    """No recovery comes: after fence_ms the answer is computed elsewhere."""
    begin(world, cluster)
    world.backends["toy-a"].set(stall=30)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    cluster.kill("coordinator")
    world.backends["toy-a"].kill()
    clients.join()
    assert clients.errors == [None] and clients.text(0) == expected(clients.prompt(0), 120, False)
    assert world.metric("kvguard_gateway_resumed_total", rung="tokens") == 1


def test_an_engine_started_again_goes_on_with_its_own_pool(world, cluster):
    """Only a is active: what its dead process left is still mapped by its node's daemon, and the engine that is started beside it fetches it there."""
    begin(world, cluster, resume_ms=30_000)
    world.backends["toy-b"].kill()  # first, so that nobody can host what a leaves
    cluster.until("b to be given up", lambda: _rank_state(cluster, "toy-b") != "protected")
    until("one to be active", lambda: world.get("/ready").json()["active_instances"] == 1)
    world.backends["toy-a"].set(stall=40)
    clients = Clients(world, 4)
    until("all to have begun", lambda: all(len(chunks) > 5 for chunks in clients.chunks))
    world.backends["toy-a"].kill()
    world.start_again("toy-a")
    clients.join()
    assert clients.errors == [None] * 4
    for number in range(4):
        assert clients.text(number) == expected(clients.prompt(number), 120, False)
    outcomes = world.backends["toy-a"].seen["outcomes"]
    assert len(outcomes) == 4 and all(same is True and position > 20 for position, same in outcomes), outcomes
    assert world.metric("kvguard_gateway_resumed_total", rung="pool") == 4


def _rank_state(cluster, instance: str) -> str:
    return next((one["state"] for one in cluster.ask("coordinator", "status")["ranks"] if one["instance"] == instance), "gone")


def test_a_gateway_that_is_started_again_takes_idle_engines_over(world, cluster):
    """A new emitter is a new epoch, which engines without a request must join, too: those that don't are ended after a minute."""
    begin(world, cluster)
    text = expected("x", 30, False)
    asked = {"prompt": "x", "max_tokens": 30, "ignore_eos": True}
    assert world.post("/v1/completions", asked).json()["choices"][0]["text"] == text
    world.start_gateway_again(dial_of(cluster))
    until("the new epoch", lambda: all(one["epoch"] for one in cluster.ask("coordinator", "status")["instances"]))
    until("both instances", lambda: world.get("/ready").json()["active_instances"] == 2, 40)
    assert world.post("/v1/completions", asked).json()["choices"][0]["text"] == text
    assert all(backend.popen.poll() is None for backend in world.backends.values())
