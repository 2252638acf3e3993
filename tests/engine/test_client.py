"""The client thread when its own side fails: what can't be said, what can't be opened."""

from __future__ import annotations

import socket
import threading

from kvguard import engine
from kvguard.engine import client
from kvguard.engine.client import Session
from kvguard.errors import Refused
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.types import Epoch, MovedToken, Rank

LAYOUT = Layout.paged("model", "float32", 2, 32, 4, 1, 4)
RANK = Rank(0, 0, 0)


def test_what_no_packet_can_carry_is_dropped_and_the_attachment_stays(daemon, path):
    """It stood first in the line's list for ever: every new connection attached, failed on it and hung up."""
    pool = engine.allocate(LAYOUT)
    guard = engine.attach("llama", RANK, pool, LAYOUT, socket=path)
    first = next(iter(daemon.until(lambda: daemon.attaches)))
    guard.session.say(local.Fetch(1, MovedToken("i", "\ud800", Epoch(1, "c"), 5, b"x" * 32)))
    daemon.until(lambda: daemon.attaches and first not in daemon.attaches)
    with guard.step(3) as step:
        step.commit("a", 3, blocks=[1], tokens=range(4), request=b"")
    guard.detach()
    daemon.until(lambda: len(daemon.lost) == 2)
    assert any(isinstance(message, local.Detach) for message in daemon.messages), "what was said behind it arrives"
    pool.close()


def test_a_process_without_descriptors_waits_between_its_attempts(path, monkeypatch):
    """Sockets that can't be made were tried for 75 000 times a second."""
    attempts = threading.Semaphore(0)

    class Exhausted(socket.socket):
        def __init__(self, *args, **kwargs):
            if threading.current_thread().name == "kvguard-client":
                attempts.release()
                raise OSError(24, "Too many open files")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(client.socket, "socket", Exhausted)
    session = Session(path, lambda: None, lambda *_: None)
    client.client().add(session)
    for _ in range(3):
        assert attempts.acquire(timeout=60)
    assert session.due > 0 and session.retry_s > client.RETRY_S_MIN, "each attempt puts the next one off"
    session.end()
    assert session.ended.wait(60)


def test_who_is_refused_for_now_asks_again(daemon, path):
    pool = engine.allocate(LAYOUT)
    guard = engine.attach("llama", RANK, pool, LAYOUT, socket=path)
    first = next(iter(daemon.until(lambda: daemon.attaches)))
    daemon.server.send(first, local.AttachRefused("no descriptors left", False))
    daemon.until(lambda: daemon.lost == [first] and daemon.attaches)
    assert guard.refused == ""
    guard.detach()
    pool.close()


class Unshareable:
    """A pool whose memory no other process could open."""

    layout = LAYOUT
    asked = 0

    def export(self):
        self.asked += 1
        raise Refused("expandable segments. Try: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False")

    def publish(self, word, value) -> None:
        word[0] = value


def test_a_pool_that_can_t_be_shared_is_said_once_and_the_engine_serves_on(daemon, path, caplog):
    """It connected, failed and came again for ever, and nobody was told but a log that grew."""
    pool = Unshareable()
    guard = engine.attach("llama", RANK, pool, LAYOUT, socket=path)
    daemon.until(lambda: daemon.lost and guard.refused)
    assert "expandable_segments:False" in guard.refused and "can't be protected" in caplog.text and not guard.connected
    with guard.step(3) as step:
        step.commit("a", 3, blocks=[1], tokens=range(4), request=b"")
    whole = engine.allocate(LAYOUT)
    other = engine.attach("llama", Rank(0, 0, 1), whole, socket=path)
    daemon.until(lambda: daemon.attaches)  # the thread lives, and others attach
    assert pool.asked == 1
    other.detach()
    guard.detach()
    whole.close()
