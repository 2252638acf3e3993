"""The port that Prometheus reads, and those who only hold it open."""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request

import pytest
from prometheus_client.core import GaugeMetricFamily

from kvguard.daemon import scrape
from kvguard.daemon.loop import Loop


class Idle:
    """A core to which nothing happens."""

    def step(self, now_ns, event):
        return ()

    def next_deadline(self):
        return None

    def check(self) -> None:
        return None


@pytest.fixture
def served(monkeypatch):
    """The port of a loop that runs in a thread of its own."""
    monkeypatch.setattr(scrape, "SILENT_S", 0.5)
    loop = Loop(Idle(), lambda effect: ())
    scrapes = scrape.Scrapes("tcp://127.0.0.1:0", loop, lambda: [GaugeMetricFamily("kvguard_here", "One", value=1)])
    turning = threading.Thread(target=loop.run)
    turning.start()
    yield scrapes.port
    loop.stop()
    turning.join(60)
    scrapes.close()
    loop.close()


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
        return answer.read().decode()


def test_who_connects_and_says_nothing_is_hung_up_on(served):
    """Each held a thread and a descriptor of the daemon for as long as it liked."""
    with contextlib.ExitStack() as held:
        silent = [held.enter_context(socket.create_connection(("127.0.0.1", served), timeout=60)) for _ in range(3)]
        assert "kvguard_here 1.0" in scraped(served)
        assert [one.recv(1) for one in silent] == [b""] * 3


def test_there_is_a_bound_for_those_who_come_at_once(served):
    with contextlib.ExitStack() as held:
        many = [held.enter_context(socket.create_connection(("127.0.0.1", served), timeout=60)) for _ in range(3 * scrape.CONNECTIONS_MAX)]
        for one in many:
            assert threading.active_count() < 2 * scrape.CONNECTIONS_MAX
            with contextlib.suppress(ConnectionError):  # hung up on before it was read from
                assert one.recv(1) == b""
    assert "kvguard_here 1.0" in scraped(served), "and afterwards it answers as ever"
