"""Where the KV of a resumed answer came from: what is counted is what the engine says it restored, whatever it was asked for; and a server that is started
again is a place of what its former life left.
"""

from __future__ import annotations

import json

import pytest

from kvguard.gateway.events import chunk
from tests.gateway import toy_model
from tests.gateway.conftest import until
from tests.gateway.test_streams import Clients, expected

pytestmark = pytest.mark.e2e


def resumed(world) -> dict[str, float]:
    """By rung, without those that are zero."""
    name = "kvguard_gateway_resumed_total{"
    lines = [line for line in world.get("/metrics").text.splitlines() if line.startswith(name)]
    return {line.split('"')[1]: float(line.split()[-1]) for line in lines if float(line.split()[-1])}


def lose(world, dead: str, place: str, rung: str = "replica") -> None:
    """`dead` is killed in the middle of its one answer; the recovery says where the KV is."""
    (request,) = world.in_flight(dead)
    ids = toy_model.answer(request["body"]["prompt"], 10, False)
    world.backends[dead].kill()
    world.emitters[dead].fence()
    world.emitters[dead].recover([world.token(dead, request, (place,), rung=rung, ids=ids)])


def begun(world) -> Clients:
    """One client in the middle of its answer, which comes from a."""
    world.backends["a"].set(stall=25)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    return clients


def complete(clients: Clients) -> None:
    clients.join()
    assert clients.errors == [None] and clients.text(0) == expected(clients.prompt(0), 120, False)


@pytest.mark.parametrize(
    ("engine", "rung"), [({}, "replica"), ({"restores": False}, "tokens"), ({"tells": False}, "untold"), ({"tells": False, "restores": False}, "untold")]
)
def test_what_the_engine_restored_is_counted(world, engine, rung):
    world.start("a", "b")
    world.backends["b"].set(**engine)
    clients = begun(world)
    lose(world, "a", "b")
    complete(clients)
    assert "kv_transfer_params" in world.in_flight("b")[-1]["body"], "it was asked for in any case"
    assert resumed(world) == {rung: 1}


def test_an_instance_that_is_lost_before_it_says_so(world):
    """Asked for in b, which dies as well; what it restored nobody knows. The next one is not b, and c is no place: its ids are computed."""
    world.start("a", "b", "c", fence_ms=50)
    world.backends["b"].set(stall=30)
    clients = begun(world)
    lose(world, "a", "b")
    until("b to go on", lambda: world.emitters["b"].__dict__.get("progressed", 0) >= 30)
    world.backends["b"].kill()
    world.emitters["b"].fence()
    world.emitters["b"].recover()
    complete(clients)
    assert resumed(world) == {"untold": 1, "tokens": 1}


def test_the_better_of_two_tokens(world):
    """Who was asked to go on is lost before it has restored anything: what its recovery has is less than what the first one's still offers."""
    world.start("a", "b", "c")
    clients = begun(world)
    world.backends["b"].set(stall=0)
    (request,) = world.in_flight("a")
    world.backends["a"].kill()
    world.emitters["a"].fence()
    world.emitters["a"].recover([world.token("a", request, ("b", "c"), ids=toy_model.answer(request["body"]["prompt"], 10, False))])
    (again,) = until("b to be asked", lambda: world.in_flight("b"))
    assert again["body"]["kv_transfer_params"]["kvguard"]["instance"] == "a"
    world.backends["b"].kill()
    world.emitters["b"].fence()
    world.emitters["b"].recover([world.token("b", again, (), rung="tokens")._replace(position=0, prefix=(), tokens=tuple(again["body"]["prompt"]))])
    complete(clients)
    assert world.in_flight("c")[-1]["body"]["kv_transfer_params"]["kvguard"]["instance"] == "a"
    assert resumed(world) == {"replica": 1, "untold": 1}


def test_a_stop_string_of_the_gateways_ends_the_answer_before_the_engine_says_so(world):
    world.start("a", "b")
    world.backends["a"].set(stall=25)
    text = expected(Clients.prompt(None, 0), 120, False)
    stop = next(text[at : at + 4] for at in range(60, 110) if text.find(text[at : at + 4]) == at and text[at : at + 4].isascii())
    clients = Clients(world, 1, stop=stop)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    lose(world, "a", "b")
    clients.join()
    assert clients.text(0) == text[: text.find(stop)]
    assert resumed(world) == {"untold": 1}


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_a_server_started_again_goes_on_with_what_its_former_life_left(world, names):
    """Nobody else is active: the same address comes back, and is asked for the KV by its token."""
    world.start(*names, resume_ms=20_000, fence_ms=50)
    clients = begun(world)
    for name in names[1:]:
        world.backends[name].set(healthy=False)
    until("one to be active", lambda: world.get("/ready").json()["active_instances"] == 1)
    lose(world, "a", "a", rung="pool")
    until("none to be active", lambda: world.get("/ready").json()["active_instances"] == 0)
    world.start_again("a")
    complete(clients)
    (again,) = world.in_flight("a")
    assert again["body"]["kv_transfer_params"]["kvguard"]["instance"] == "a"
    assert resumed(world) == {"pool": 1}
    assert world.metric("kvguard_gateway_unplaced_total", reason="no_active_place") == 0


@pytest.mark.parametrize(
    ("usage", "cached"),
    [
        ({"prompt_tokens_details": {"cached_tokens": 7}}, 7), ({"prompt_tokens_details": {"cached_tokens": 0}}, 0), ({"prompt_tokens_details": None}, None),
        ({"prompt_tokens_details": {"cached_tokens": None}}, None), ({"prompt_tokens_details": {"cached_tokens": True}}, None), (None, None), ([1], None),
        ({"prompt_tokens_details": [7]}, None), ({"prompt_tokens_details": {"cached_tokens": "7"}}, None), ({}, None),
    ],
)  # fmt: skip
def test_what_usage_says(usage, cached):
    told = chunk(json.dumps({"choices": [], "usage": usage}).encode())
    assert (told and told.cached_tokens) == cached
