"""A fetch ends by its deadline, whatever becomes of the daemon: silent, gone, back again, or answering when nobody waits any more."""

from __future__ import annotations

import os
import threading

import pytest

from kvguard import engine
from kvguard.engine import fetch
from kvguard.engine.vllm_facts import Load
from kvguard.engine.vllm_loads import Loads
from kvguard.errors import Refused, TimedOut
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.format.moves import encode
from kvguard.types import Epoch, MovedToken, Rank

LAYOUT = Layout.paged("model", "float32", 2, 8, 4, 1, 4)
MOVED = MovedToken("dead", "s", Epoch(3, "c"), 6, b"\1" * 32)


@pytest.fixture
def guard(path, monkeypatch):
    monkeypatch.setattr(fetch, "REPEAT_S", 0.02)
    pool = engine.allocate(LAYOUT)
    made = engine.attach("llama", Rank(0, 0, 0), pool, LAYOUT, socket=path, rows=2)
    yield made
    made.detach()
    pool.close()


class Asking:
    """One fetch on a thread of its own. `error`: what it raised."""

    def __init__(self, guard, timeout_s: float) -> None:
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(guard, timeout_s))
        self._thread.start()

    def _run(self, guard, timeout_s: float) -> None:
        try:
            guard.fetch(MOVED, [0, 1], timeout_s)
        except (Refused, TimedOut) as error:
            self.error = error

    def end(self) -> Exception | None:
        self._thread.join(20)
        assert not self._thread.is_alive(), "it hangs"
        return self.error


def questions(daemon) -> list[local.Fetch]:
    return [message for message in daemon.messages if isinstance(message, local.Fetch)]


def test_a_daemon_that_never_answers_is_asked_again_and_costs_the_deadline(guard, daemon):
    daemon.until(lambda: daemon.attaches)
    asking = Asking(guard, 0.5)
    daemon.until(lambda: len(questions(daemon)) > 2)
    assert isinstance(asking.end(), TimedOut) and "didn't say where 's'" in str(asking.error)
    assert {question.number for question in questions(daemon)} == {1}


def test_no_daemon_costs_the_deadline(guard):
    with pytest.raises(TimedOut, match="didn't say where"):
        guard.fetch(MOVED, [0, 1], 0.1)


def test_a_daemon_that_comes_back_is_asked_what_the_dead_one_was(guard, daemon):
    [first] = daemon.until(lambda: list(daemon.attaches))
    asking = Asking(guard, 20.0)
    daemon.until(lambda: questions(daemon))
    daemon.server.drop(first)
    daemon.messages.clear()
    [again] = daemon.until(lambda: questions(daemon) and [one for one in daemon.attaches if one != first])
    daemon.server.send(again, local.FetchRefused(questions(daemon)[0].number, "not here", False))
    assert isinstance(asking.end(), Refused) and "not here" in str(asking.error)


def test_more_fetches_than_the_line_bears_wait_their_turn_and_no_longer(guard, daemon):
    daemon.until(lambda: daemon.attaches)
    first = [Asking(guard, 20.0) for _ in range(fetch.ASKS_MAX)]
    daemon.until(lambda: len({question.number for question in questions(daemon)}) == fetch.ASKS_MAX)
    late = Asking(guard, 0.1)
    assert isinstance(late.end(), TimedOut) and "were out all the time" in str(late.error)
    guard.detach()  # whoever waits is told at once
    assert all(isinstance(asking.end(), Refused) for asking in first)


def test_a_descriptor_that_comes_too_late_is_closed(guard):
    with pytest.raises(TimedOut):
        guard.fetch(MOVED, [0, 1], 0.05)
    read, write = os.pipe()
    guard.received(local.FetchRefused(1, "late", False), [read])
    with pytest.raises(OSError):
        os.fstat(read)
    os.close(write)


def test_a_load_of_vllms_ends_by_its_deadline_with_a_silent_daemon(guard, daemon):
    daemon.until(lambda: daemon.attaches)
    loads, ends = Loads(guard.fetch, 0.3), []
    loads.begin(Load("request", encode(MOVED), [0, 1], 6))
    daemon.until(lambda: ends.extend(loads.ended()) or ends)
    assert (ends[0].request_id, ends[0].position) == ("request", 0) and "didn't say where" in ends[0].error
    loads.close()
