"""Bodies that come slowly: they hold no place, no more memory than their bound, and keep nobody out who is quick."""

from __future__ import annotations

import contextlib
import json
import socket

import pytest

from kvguard.gateway import admission
from tests.gateway.conftest import until
from tests.gateway.test_ill_clients import HEAD, answers, dialled, ended, posted
from tests.gateway.test_streams import PROMPT, Clients, expected

pytestmark = pytest.mark.e2e


@contextlib.contextmanager
def slow_ones(world, count: int, length: int = 1000, sent: bytes = b"{"):
    """Connections that have said a head and the beginning of a body."""
    with contextlib.ExitStack() as stack:
        made = [stack.enter_context(dialled(world)) for _ in range(count)]
        for raw in made:
            raw.sendall(HEAD + b"content-length: %d\r\n\r\n" % length + sent)
        yield made


def arriving(world) -> tuple[int, int]:
    """Bodies that are arriving, and the bytes that are counted for them."""
    return int(world.metric("kvguard_gateway_bodies")), int(world.metric("kvguard_gateway_bodies_bytes"))


def test_slow_bodies_hold_no_place(world):
    world.start("a", in_flight_max=2)
    with slow_ones(world, 8):
        until("all heads", lambda: arriving(world)[0] == 8)
        answer = world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 9, "ignore_eos": True})
        assert (answer.status_code, answer.json()["choices"][0]["text"]) == (200, expected(PROMPT, 9, False))
        assert world.metric("kvguard_gateway_in_flight") == 0
    until("all to be gone", lambda: arriving(world) == (0, 0))
    assert world.metric("kvguard_gateway_requests_total", outcome="gone", route="refused") == 8


def test_the_oldest_of_too_many_makes_room(world):
    """Heads alone fill the bound: a quick client comes in all the same, as often as it likes; who was slowest is told to come again."""
    world.start("a", bodies_bytes_max=5 * admission.COST - 1, body_bytes_max=2048)
    with slow_ones(world, 4) as held:
        until("all heads", lambda: arriving(world)[0] == 4)
        for number in range(3):
            answer = world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True})
            assert answer.status_code == 200, number
        told = ended(held[0])
        assert told.startswith(b"HTTP/1.1 408 ") and b"connection: close" in told.lower() and b"Try: " in told
        assert arriving(world) == (3, 3 * admission.COST + 3)
        held[1].sendall(b" " * 999)  # whole, at last, and no JSON
        assert answers(held[1], 1)[0][0] == 400
        until("it to be over", lambda: arriving(world)[0] == 2)
    assert world.metric("kvguard_gateway_requests_total", outcome="slow", route="refused") == 1


def test_bytes_are_bounded_together(world):
    """Three nearly whole bodies where the bound is two: the oldest ends."""
    world.start("a", body_bytes_max=1 << 20, bodies_bytes_max=2 * (admission.COST + (1 << 20)))
    with slow_ones(world, 3, 1 << 20, b" " * ((1 << 20) - 1)) as held:
        until("one to be given up", lambda: world.metric("kvguard_gateway_requests_total", outcome="slow", route="refused") == 1)
        until("the others' bytes", lambda: arriving(world) == (2, 2 * (admission.COST + (1 << 20) - 1)))
        assert world.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 5, "ignore_eos": True}).status_code == 200
        assert sum(not still_open(raw) for raw in held) <= 2


def still_open(raw: socket.socket) -> bool:
    raw.setblocking(False)
    try:
        return raw.recv(1) == b"x"
    except BlockingIOError:
        return True
    except ConnectionError:
        return False


def test_places_are_counted_when_bodies_are_whole(world):
    """Two come in while there is one place: the second hears so when its body has come, and its connection goes on."""
    world.start("a", in_flight_max=1, fence_ms=100, resume_ms=200)
    world.backends["a"].set(stall=3)
    body = json.dumps({"prompt": PROMPT, "max_tokens": 5}).encode()
    with slow_ones(world, 1, len(body), body[:-1]) as (raw,):
        until("its head", lambda: arriving(world)[0] == 1)
        clients = Clients(world, 1)
        until("the place to be taken", lambda: world.metric("kvguard_gateway_in_flight") == 1)
        raw.sendall(body[-1:])
        ((status, said),) = answers(raw, 1)
        assert (status, said["error"]["type"]) == (429, "rate_limit_error")
        raw.sendall(posted(b"{"))
        assert answers(raw, 1)[0][0] == 429, "before its body is read"
        assert ended(raw) == b""
    assert world.metric("kvguard_gateway_refused_total", reason="in_flight") == 2
    world.backends["a"].kill()
    clients.join()
