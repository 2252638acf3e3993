"""The cable of drills: what passes it, and that a cut and a slow one leave evidence and lose nothing."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from kvguard.pipeline.proxy import PIECE_BYTES, Proxy
from kvguard.pipeline.ports import free_ports


@pytest.fixture
def cable():
    """(proxy, gate, a function that connects through it and gives both ends)."""
    (port,) = free_ports(1)
    behind = socket.create_server(("127.0.0.1", port))
    proxy = Proxy()
    gate = proxy.gate("127.0.1.9", "127.0.0.1", {port: port})
    opened = [behind]

    def connect() -> tuple[socket.socket, socket.socket]:
        ours = socket.create_connection(("127.0.1.9", port), timeout=10)
        theirs, _ = behind.accept()
        theirs.settimeout(10)
        opened.extend((ours, theirs))
        return ours, theirs

    behind.settimeout(10)
    yield proxy, gate, connect
    proxy.close()
    for one in opened:
        one.close()


def received(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := connection.recv(size - len(data))):
        data += piece
    return data


def test_bytes_pass_both_ways_in_order_and_an_end_is_passed_on(cable) -> None:
    _, gate, connect = cable
    ours, theirs = connect()
    sent = bytes(range(256)) * (5 * PIECE_BYTES // 256)
    writer = threading.Thread(target=lambda: (ours.sendall(sent), ours.shutdown(socket.SHUT_WR)))
    writer.start()
    assert received(theirs, len(sent)) == sent and theirs.recv(1) == b""
    writer.join()
    theirs.sendall(b"answer")
    theirs.close()
    assert received(ours, 6) == b"answer" and ours.recv(1) == b""
    assert gate.counters["bytes"] == len(sent) + 6 and gate.counters["connections"] == 1


def test_a_cut_breaks_what_is_open_and_refuses_what_comes_until_it_is_mended(cable) -> None:
    proxy, gate, connect = cable
    ours, theirs = connect()
    proxy.cut(gate)
    assert theirs.recv(1) == b"" and ours.recv(1) == b"" and gate.counters["connections_cut"] == 1
    again = socket.create_connection(("127.0.1.9", next(iter(gate.ports))), timeout=10)
    assert again.recv(1) == b"" and gate.counters["connections_refused"] == 1
    again.close()
    proxy.heal(gate)
    ours, theirs = connect()
    ours.sendall(b"again")
    assert received(theirs, 5) == b"again"


def test_a_slow_cable_keeps_its_rate_and_loses_nothing(cable) -> None:
    proxy, gate, connect = cable
    ours, theirs = connect()
    proxy.slow(gate, 20_000)
    began = time.monotonic()
    ours.sendall(b"x" * 4000)
    assert received(theirs, 4000) == b"x" * 4000
    assert time.monotonic() - began >= 0.9 * 4000 / 20_000  # never faster than its rate, however slow this machine is
    assert gate.counters["bytes_delayed"] == 4000
    proxy.heal(gate)
    ours.sendall(b"y" * 4000)
    assert received(theirs, 4000) == b"y" * 4000 and gate.counters["bytes_delayed"] == 4000


def test_who_is_not_there_is_a_closed_door(cable) -> None:
    proxy, _, _ = cable
    nobody, here = free_ports(2)
    gate = proxy.gate("127.0.1.9", "127.0.0.1", {here: nobody})
    connection = socket.create_connection(("127.0.1.9", here), timeout=10)
    assert connection.recv(1) == b"" and gate.counters["connections_lost"] == 1
    connection.close()
