"""Servers that die and come back between two looks, hang, talk nonsense in mid-answer, die together; a coordinator that is away meanwhile; clients that
leave. Every answer ends: whole, or with an error in OpenAI's form.
"""

from __future__ import annotations

import signal
import threading

import httpx
import openai
import pytest

from kvguard.gateway import answering, fleet, watching
from tests.gateway import toy_model
from tests.gateway.conftest import until
from tests.gateway.test_rungs import begun, complete, lose, resumed
from tests.gateway.test_streams import PROMPT, Clients, expected

pytestmark = pytest.mark.e2e
NEVER_MS = 600_000


def let_be_unreached(world, name: str) -> None:
    """`name` is killed, and found so by the next request, not by a look."""
    world.backends[name].kill()
    assert world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3}).status_code == 200
    assert world.get("/ready").json()["active_instances"] == len(world.backends) - 1


def test_a_server_that_came_back_between_two_looks_is_another_one(world):
    """The epoch says so: nobody has seen it down. It is the only one, and a place of its own former life."""
    world.start("a", "b", probe_ms=NEVER_MS)
    clients = begun(world)
    let_be_unreached(world, "b")
    (request,) = [one for one in world.in_flight("a") if one["body"]["max_tokens"] == 120]
    world.backends["a"].kill()
    world.emitters["a"].fence()
    world.start_again("a")
    world.emitters["a"].recover([world.token("a", request, ("a",), rung="pool", ids=toy_model.answer(request["body"]["prompt"], 10, False))])
    complete(clients)
    assert resumed(world) == {"pool": 1} and len(world.in_flight("a")) == 1


def test_it_is_asked_again_although_no_coordinator_says_so(world):
    """No epoch, no word from anybody: the server can be reached, so the ids go on there."""
    world.start("a", "b", probe_ms=NEVER_MS, fence_ms=NEVER_MS)
    clients = begun(world)
    let_be_unreached(world, "b")
    world.backends["a"].kill()
    world.start_again("a")
    complete(clients)
    assert resumed(world) == {"tokens": 1} and "kv_transfer_params" not in world.in_flight("a")[0]["body"]


def test_a_server_that_hangs_is_left_at_the_fence(world):
    """It accepts, and answers nothing: neither the look that is under way nor the answer's own patience is waited for."""
    world.start("a", "b", idle_ms=NEVER_MS)
    clients = begun(world)
    (request,) = world.in_flight("a")
    world.backends["a"].popen.send_signal(signal.SIGSTOP)
    world.emitters["a"].fence()
    world.emitters["a"].recover([world.token("a", request, ("b",), ids=toy_model.answer(request["body"]["prompt"], 10, False))])
    complete(clients)
    assert resumed(world) == {"replica": 1}
    world.backends["a"].kill()


def test_a_server_that_hangs_and_is_not_fenced(world):
    """The coordinator is away: the answer's patience (idle_ms) ends it, then the ids go on elsewhere."""
    world.start("a", "b", idle_ms=500, fence_ms=100)
    clients = begun(world)
    world.backends["a"].popen.send_signal(signal.SIGSTOP)
    complete(clients)
    assert resumed(world) == {"tokens": 1} and world.metric("kvguard_gateway_lost_total", kind="idle") == 1
    world.backends["a"].kill()


def test_a_prompt_is_not_tokenized_by_a_server_that_hangs(world):
    """Nothing has begun: as soon as a look finds it hanging another one is asked, not after idle_ms."""
    world.start("a", "b", idle_ms=NEVER_MS)
    world.backends["a"].popen.send_signal(signal.SIGSTOP)
    answer = world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True})
    assert answer.json()["choices"][0]["text"] == expected(PROMPT, 20, False)
    assert not world.in_flight("b")[0]["body"].get("kv_transfer_params")
    world.backends["a"].kill()


@pytest.mark.parametrize("garbage", ["json", "bytes", "bad_ids", "error", "endless", "too_many"])
def test_nonsense_in_mid_answer(world, garbage):
    """What had come before it stands; who says such things is not asked again for this answer."""
    world.start("a", "b", fence_ms=50)
    world.backends["a"].set(delay_ms=10)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    world.backends["a"].set(garbage=garbage)
    complete(clients)
    assert resumed(world) == {"tokens": 1} and len(world.in_flight("a")) == 1


@pytest.mark.parametrize("refusal", [400, 404])
def test_a_continuation_that_is_refused_is_not_the_clients_fault(world, refusal):
    """One instance took the request, so it is a good one: who refuses its rest (a smaller context, another model) is lost for it, and the next is asked."""
    world.start("a", "b", "c", fence_ms=50)
    clients = begun(world)
    world.backends["b"].set(refuses=refusal)
    world.backends["a"].kill()
    complete(clients)
    assert resumed(world) == {"tokens": 2} and len(world.in_flight("b")) == 1


def test_a_whole_answer_whose_continuation_is_refused_is_lost(world):
    """It does not stream: no status has been said when its instance dies, and what the other one says of the rest is none for its client."""
    world.start("a", "b", fence_ms=50, resume_ms=300, attempts=2)
    world.backends["a"].set(stall=25)
    world.backends["b"].set(refuses=400)
    done = []
    body = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}
    thread = threading.Thread(target=lambda: done.append(world.post("/v1/completions", body)))
    thread.start()
    until("a to stall", lambda: world.emitters["a"].__dict__.get("progressed", 0) >= 25)
    world.backends["a"].kill()
    thread.join(20)
    assert (done[0].status_code, done[0].json()["error"]["code"]) == (502, "answer_lost")


def test_who_failed_once_is_better_than_nobody(world, monkeypatch):
    """The other server is down, and stays so for as long as one is waited for."""
    monkeypatch.setattr(fleet, "DOUBT_S", 0.1)
    world.start("a", "b", fence_ms=50, resume_ms=1000)
    world.backends["b"].kill()
    world.until_active(1)
    world.backends["a"].set(delay_ms=10)
    clients = Clients(world, 1)
    until("some text", lambda: len(clients.chunks[0]) > 5)
    world.backends["a"].set(garbage="json")
    until("the loss", lambda: world.metric("kvguard_gateway_lost_total", kind="garbage"))
    world.backends["a"].set(garbage="")
    complete(clients)
    assert set(resumed(world)) == {"tokens"} and len(world.in_flight("a")) >= 2


def test_two_servers_die_together(world):
    """One recovery brings its token, the other never ends: all go on in the third."""
    world.start("a", "b", "c", fence_ms=200, resume_ms=500)
    for name in "ab":
        world.backends[name].set(stall=25)
    world.backends["c"].set(delay_ms=50)  # so that it is as busy as the others until all have begun
    clients = Clients(world, 6)
    until("all to have begun", lambda: all(len(chunks) > 5 for chunks in clients.chunks))
    until("a and b to stall", lambda: all(world.emitters[name].__dict__.get("progressed", 0) >= 50 for name in "ab"))
    requests = {name: world.in_flight(name) for name in "ab"}
    world.backends["c"].set(delay_ms=1)
    for name in "ab":
        world.backends[name].kill()
    for name in "ab":
        world.emitters[name].fence()
    tokens = [world.token("a", one, ("c",), ids=toy_model.answer(one["body"]["prompt"], 10, False)) for one in requests["a"]]
    world.emitters["a"].recover(tokens)
    clients.join()
    assert clients.errors == [None] * 6
    assert all(clients.text(number) == expected(clients.prompt(number), 120, False) for number in range(6))
    assert resumed(world) == {"replica": 2, "tokens": 2}


def test_all_die_together_while_the_coordinator_is_away(world):
    """Fenced or not, nobody comes back: an error in OpenAI's form, and nothing that was given out is taken back."""
    world.start("a", "b", fence_ms=50, resume_ms=300)
    for backend in world.backends.values():
        backend.set(stall=25)
    clients = Clients(world, 2)
    until("both to have begun", lambda: all(len(chunks) > 5 for chunks in clients.chunks))
    world.emitters["a"].fence()  # the coordinator's last word
    for backend in world.backends.values():
        backend.kill()
    clients.join()
    for number in range(2):
        assert isinstance(clients.errors[number], openai.APIError) and "No instance can take the request" in str(clients.errors[number])
        assert expected(clients.prompt(number), 120, False).startswith(clients.text(number))
    assert world.metric("kvguard_gateway_in_flight") == 0


def test_the_coordinator_goes_away_within_a_recovery(world):
    """The fence came, its end never does: after resume_ms the ids go on alone."""
    world.start("a", "b", resume_ms=300)
    clients = begun(world)
    world.emitters["a"].fence()
    complete(clients)
    assert resumed(world) == {"tokens": 1}
    assert world.get("/ready").json()["active_instances"] == 1, "who is fenced stays so"


def test_a_client_leaves_within_a_recovery(world):
    """Nothing is submitted for it, and what the recovery has kept for it may go, also when the token comes after it left."""
    world.start("a", "b", resume_ms=NEVER_MS)
    world.backends["a"].set(stall=25)
    body = {"prompt": PROMPT, "max_tokens": 120, "ignore_eos": True, "stream": True}
    with httpx.Client(trust_env=False) as client, client.stream("POST", world.url + "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        assert next(lines)
        (request,) = world.in_flight("a")
        world.backends["a"].kill()
        world.emitters["a"].fence()
        until("the loss", lambda: world.metric("kvguard_gateway_lost_total", kind="connection") + world.metric("kvguard_gateway_lost_total", kind="fenced") == 1)
    until("the client to be gone", lambda: world.metric("kvguard_gateway_requests_total", outcome="gone", route="followed") == 1)
    key = request["headers"]["x-request-id"]
    assert world.emitters["a"].deliveries == [key]
    token = world.token("a", request, ("b",), ids=toy_model.answer(request["body"]["prompt"], 10, False))
    world.emitters["a"].recover([token])
    until("its token to be let go", lambda: world.emitters["a"].deliveries == [key, token.sequence])
    assert not world.in_flight("b") and world.metric("kvguard_gateway_in_flight") == 0


# ---- what a stall is made of ----


def patient(monkeypatch, world, *names: str):
    """Every period that anything could be waited for by is an hour: what still happens, happens because it was told."""
    monkeypatch.setattr(watching, "LOOK_S", 3600)
    monkeypatch.setattr(watching, "RESUME_WAIT_S", 3600)
    world.start(*names, probe_ms=NEVER_MS, fence_ms=NEVER_MS, resume_ms=NEVER_MS, idle_ms=NEVER_MS)


def test_a_recovery_waits_for_no_timer_and_asks_once(world, monkeypatch):
    """Round trips of the gateway between a loss and the first id after it: one submission. No look, no other request."""
    patient(monkeypatch, world, "a", "b")
    clients = begun(world)
    before = world.backends["b"].seen
    lose(world, "a", "b")
    complete(clients)
    after = world.backends["b"].seen
    assert len(after["requests"]) == len(before["requests"]) + 1 and after["looks"] == before["looks"]
    assert resumed(world) == {"replica": 1}
    parts = [world.metric("kvguard_gateway_stall_part_seconds_sum", part=part) for part in ("fence", "recovery", "placing", "first_token")]
    assert sum(parts) == pytest.approx(world.metric("kvguard_gateway_stall_seconds_sum")) and parts[2] == 0.0


def test_who_waits_for_an_instance_hears_of_it_at_once(world, monkeypatch):
    """The only other instance is in a recovery of its own: its end is the news, not the next look."""
    patient(monkeypatch, world, "a", "b")
    clients = begun(world)
    world.emitters["b"].fence()
    until("b to be fenced", lambda: world.get("/ready").json()["active_instances"] == 1)
    lose(world, "a", "b")
    until("a's recovery", lambda: not world.emitters["a"].fenced)
    world.emitters["b"].recover()
    complete(clients)
    assert resumed(world) == {"replica": 1} and world.metric("kvguard_gateway_stall_part_seconds_count", part="placing") == 1


def test_who_was_never_reached_has_no_recovery_to_wait_for(world, monkeypatch):
    """The first place of the token is dead as well, and nobody has seen it yet: the other one is asked with the same token, at once."""
    patient(monkeypatch, world, "a", "b", "c")
    clients = begun(world)
    world.backends["b"].kill()
    (request,) = world.in_flight("a")
    world.backends["a"].kill()
    world.emitters["a"].fence()
    world.emitters["a"].recover([world.token("a", request, ("b", "c"), ids=toy_model.answer(request["body"]["prompt"], 10, False))])
    complete(clients)
    assert resumed(world) == {"replica": 1} and world.metric("kvguard_gateway_lost_total", kind="unreached") == 1
    assert world.in_flight("c")[-1]["body"]["kv_transfer_params"]["kvguard"]["instance"] == "a"


def test_a_stall_is_not_silence(world, monkeypatch):
    """Comments between events, so that nobody between client and gateway takes the connection for dead."""
    monkeypatch.setattr(answering, "KEEP_ALIVE_S", 0.05)
    world.start("a", "b")
    world.backends["a"].set(stall=25)
    clients = Clients(world, 1)  # an OpenAI client skips them
    body = {"prompt": clients.prompt(0), "max_tokens": 120, "ignore_eos": True, "stream": True}
    until("some text", lambda: len(clients.chunks[0]) > 5)
    with httpx.stream("POST", world.url + "/v1/completions", json=body, timeout=20, trust_env=False) as response:
        assert response.status_code == 200
        assert next(response.iter_lines()).startswith("data: "), "no comment before the status is certain"
    world.backends["b"].set(stall=25)
    with httpx.stream("POST", world.url + "/v1/completions", json=body, timeout=20, trust_env=False) as response:
        assert next(line for line in response.iter_lines() if line.startswith(":")) == answering.STILL_HERE.decode().strip()
    world.backends["b"].set(stall=-1)
    lose(world, "a", "c")
    complete(clients)
