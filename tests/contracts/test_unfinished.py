"""A message that never ends is kept by ZeroMQ alone, which has no bound for it: who sends one is cut off, on either side; nobody else is."""

from __future__ import annotations

import contextlib
import socket
import struct

import pytest
from test_transport import Pair, Sockets, ids
from test_zeromq import port_of

from kvguard.limits import MIB
from kvguard.transport import greeting, unfinished, watching
from kvguard.transport.base import Broken, Down, Up

MORE, LONG = 1, 2
NEVER_LAST = bytes([MORE | LONG]) + struct.pack(">Q", 64 * 1024) + bytes(64 * 1024)


@pytest.fixture
def pair(monkeypatch):
    monkeypatch.setattr(unfinished, "LOOK_NS", 20_000_000)
    monkeypatch.setattr(unfinished, "BYTES_MAX", 2 * MIB)
    world = Sockets(keyed=False, bulk=False)
    yield Pair(world).up()
    world.close()


def shaken(connection: socket.socket, kind: bytes, identity: bytes = b"") -> None:
    """ZMTP 3.0's handshake by hand: ZeroMQ itself sends a message when it is whole."""
    connection.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32))
    connection.recv(64, socket.MSG_WAITALL)
    ready = b"\x05READY"
    for name, value in ((b"Socket-Type", kind), (b"Identity", identity)):
        ready += bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
    connection.sendall(bytes([4, len(ready)]) + ready)


def said(connection: socket.socket, *messages: greeting.Control) -> None:
    for message in messages:
        packed = greeting.pack(message)
        connection.sendall(bytes([0, len(packed)]) + packed)


class Endless:
    """Part after part, as much as the connection takes at a time, until somebody hangs up."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self._connection, self._rest = connection, memoryview(b"")

    def push(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                self._rest = self._rest or memoryview(NEVER_LAST)
                self._rest = self._rest[self._connection.send(self._rest) :]


def test_a_caller_whose_message_has_no_end_is_cut_off_and_others_are_not(pair):
    with socket.create_connection(("127.0.0.1", port_of(pair.address))) as evil:
        shaken(evil, b"DEALER", b"evil#%016x.1" % 1)
        said(evil, greeting.Greet(greeting.VERSION, "evil", 1, "peer:a", False), greeting.Ready(False))
        pair.until(lambda: len(pair.of(pair.a, Up)) == 2, "the evil one is up")
        endless = Endless(evil)
        with contextlib.suppress(ConnectionError):
            pair.until(lambda: endless.push() or pair.a.counters.get("endless"), "it is found")
        pair.until(lambda: pair.of(pair.a, Down), "it is down")
    [down] = pair.of(pair.a, Down)
    assert down.link == pair.of(pair.a, Up)[1].link and pair.a.counters["endless"] == 1
    assert any("a message that has no end" in event.reason for event in pair.of(pair.a, Broken))
    assert pair.b.send("peer:a", ids(1)) and not pair.of(pair.b, Down)


def test_who_was_dialled_and_sends_a_message_without_an_end_is_hung_up_on(pair):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        pair.a.dial("peer:evil", "tcp://127.0.0.1:%d" % listening.getsockname()[1])
        pair.turn()
        evil, _ = listening.accept()
        with evil:
            shaken(evil, b"ROUTER")
            endless = Endless(evil)
            with contextlib.suppress(ConnectionError):
                pair.until(lambda: endless.push() or pair.a.counters.get("endless"), "it is found")
            assert pair.a.counters["endless"] == 1 and pair.a.counters["dial_failed"] >= 1
        pair.a.hang_up("peer:evil")
    assert not pair.of(pair.a, Down) and pair.b.send("peer:a", ids(1))


@pytest.mark.parametrize(
    ("looks", "endless"),
    [
        ([(2.0, 0), (4.1, 0)], True), ([(1.9, 0), (3.0, 1), (4.0, 1), (4.9, 1)], False), ([(3.0, 1), (5.2, 1)], True),
        ([(60.0, 60), (61.9, 60)], False),
    ],
    ids=["nothing whole ever came", "each is smaller than the bound", "after a whole one", "many whole ones at once"],
)  # fmt: skip
def test_what_counts_is_what_came_since_the_last_whole_message(monkeypatch, looks, endless):
    """Looks: MiB that ZeroMQ has read, messages that were whole."""
    monkeypatch.setattr(unfinished, "BYTES_MAX", 2 * MIB)
    received = []
    monkeypatch.setattr(watching, "taken_bytes", lambda fd, address: received[-1])
    seen = unfinished.Unfinished(3, ("a", 1), 0)
    for number, (size, messages) in enumerate(looks):
        received.append(int(size * MIB))
        found = seen.is_endless(number, messages)
    assert found == endless


def test_what_the_kernel_keeps_for_later_is_no_part_of_a_message():
    """A whole queue may wait there while this process is stopped: as much as the host lets a connection keep."""
    with socket.create_server(("127.0.0.1", 0)) as listening, socket.create_connection(listening.getsockname()) as peer:
        ours, address = listening.accept()
        with ours:
            peer.sendall(bytes(60_000))
            assert len(ours.recv(60_000, socket.MSG_PEEK | socket.MSG_WAITALL)) == 60_000
            assert watching.taken_bytes(ours.fileno(), address) == 0
            assert len(ours.recv(50_000, socket.MSG_WAITALL)) == 50_000 == watching.taken_bytes(ours.fileno(), address)


def test_heartbeats_of_a_year_are_no_message(monkeypatch):
    second, received = 1_000_000_000, []
    monkeypatch.setattr(watching, "taken_bytes", lambda fd, address: received[-1])
    seen = unfinished.Unfinished(3, ("a", 1), 0)
    for number in range(1, 100_000):
        received.append(number * 600)
        assert not seen.is_endless(number * second, 0)
    received.append(received[-1] + unfinished.BYTES_MAX + 8192)
    assert seen.is_endless(100_000 * second, 0), "an idle year is no credit"
