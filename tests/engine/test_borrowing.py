"""A pool from the node's daemon: asked for, given, refused, or not there in time."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvguard.daemon.control import ControlServer, LocalIncoming
from kvguard.daemon.lending import Lending
from kvguard.daemon.workers import Workers
from kvguard.device import open_device
from kvguard.device.owned import OwnedPool
from kvguard.engine import borrow
from kvguard.errors import BadConfig, Refused, TimedOut
from kvguard.format import local
from kvguard.format.layout import Layout

LAYOUT = Layout.paged("m", "float16", 1, 3, 4, 1, 2)


class Lender:
    """A daemon that does nothing else, in a thread. `lost`: why its GPU can't be used; `answer`: what it says instead."""

    def __init__(self, path, kind: str, lost: str = "", answer: local.Local | None = None) -> None:
        self.server, self.device, self.answer = ControlServer(path), open_device(kind), answer
        self.lending = Lending(self.device, Workers(), self.server.send)
        if lost:
            self.device.driver().lose(lost)
        self.ending = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def serve(self) -> None:
        while not self.ending.wait(0.005):
            for one in self.server.receive():
                if not isinstance(one, LocalIncoming):
                    continue
                if self.answer is not None:
                    self.server.send(one.connection, self.answer)
                else:
                    self.lending.lend(one.connection, one.message)

    def end(self) -> None:
        self.ending.set()
        self.thread.join(10)
        self.server.close()


@pytest.fixture
def lender(tmp_path):
    made: list[Lender] = []

    def start(*arguments, **named) -> str:
        made.append(Lender(tmp_path / "kvguard.sock", *arguments, **named))
        return str(tmp_path / "kvguard.sock")

    yield start
    for one in made:
        one.end()


@pytest.mark.parametrize(("kind", "of_daemon"), [("host", "host"), ("rehearsal", "rehearsal"), ("host", "rehearsal")])
def test_a_lent_pool_is_zeroed_and_opens_elsewhere_as_the_same_memory(kind, of_daemon, lender):
    pool = borrow(LAYOUT, kind, socket=lender(of_daemon))
    data = np.random.default_rng(1).integers(0, 256, LAYOUT.pool_bytes, np.uint8).tobytes()
    out = memoryview(bytearray(LAYOUT.pool_bytes))
    pool.capture_blocks(range(3), out)
    assert not any(out)
    pool.scatter_blocks(range(3), memoryview(data))
    again = open_device(kind).open(LAYOUT, pool.export())
    pool.close()
    again.capture_blocks(range(3), out)
    assert bytes(out) == data
    again.close()


def test_what_a_daemon_refuses_is_said(lender):
    with pytest.raises(Refused, match='device = "rehearsal"'):
        borrow(LAYOUT, "rehearsal", socket=lender("host"))
    with pytest.raises(BadConfig):
        borrow(Layout.paged("m", "float16", 1, 0, 4, 1, 2), socket="/nowhere")


def test_a_gpu_that_is_lost_lends_nothing(lender):
    with pytest.raises(Refused, match="Xid 79"):
        borrow(LAYOUT, "rehearsal", socket=lender("rehearsal", lost="Xid 79"))


def test_a_daemon_that_says_something_else_is_no_lender(lender):
    with pytest.raises(Refused, match=r"Try: kvguard\.engine\.allocate"):
        borrow(LAYOUT, socket=lender("host", answer=local.Detach()))


def test_without_a_daemon_it_ends_in_time(tmp_path):
    with pytest.raises(TimedOut, match="is it running"):
        borrow(LAYOUT, socket=tmp_path / "nobody.sock", timeout_s=0.2)


def test_memory_that_cannot_be_zeroed_is_given_back(lender, monkeypatch):
    def unable(driver, address: int, size: int) -> None:
        raise Refused("it can't be zeroed. Try: nothing, this is a test")

    monkeypatch.setattr("kvguard.device.rehearsal.Rehearsal.clear", unable)
    closed = []
    close = OwnedPool.close
    monkeypatch.setattr(OwnedPool, "close", lambda pool: (closed.append(pool), close(pool)))
    with pytest.raises(Refused, match="can't be zeroed"):
        borrow(LAYOUT, "rehearsal", socket=lender("rehearsal"))
    assert len(closed) == 1 and closed[0].driver.virtual.reserved_bytes == 0
