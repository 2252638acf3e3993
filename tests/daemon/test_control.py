"""The daemon's end of the Unix socket: garbage, strangers, crowds and clients that don't read."""

from __future__ import annotations

import array
import gc
import os
import socket
import stat

import pytest

from kvguard.daemon import control
from kvguard.daemon.control import ControlServer, LocalIncoming, Lost
from kvguard.engine import packets
from kvguard.errors import BadConfig
from kvguard.format import local
from kvguard.types import NO_EPOCH, Rank

DETACH = local.Detach()


def descriptors() -> int:
    gc.collect()  # what earlier tests dropped in cycles still holds descriptors; it must not go between two counts
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def server(tmp_path):
    before = descriptors()
    server = ControlServer(tmp_path / "node.sock")
    yield server
    server.close()
    server.close()
    assert not server.path.exists() and descriptors() == before


@pytest.fixture
def dial(server):
    lines: list[socket.socket] = []

    def connect() -> socket.socket:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        line.connect(str(server.path))
        lines.append(line)
        server.receive()
        return line

    yield connect
    for line in lines:
        line.close()


def restored(characters: int) -> local.Restored:
    return local.Restored("llama", Rank(0, 0, 0), NO_EPOCH, "e" * characters)


def test_messages_and_descriptors_arrive_with_who_sent_them(server, dial) -> None:
    line = dial()
    reader, writer = os.pipe()
    packets.send_packet(line, DETACH, [writer])
    os.close(writer)
    (incoming,) = server.receive()
    assert incoming.message == DETACH and (incoming.pid, incoming.uid) == (os.getpid(), os.getuid())
    os.write(incoming.descriptors[0], b"x")
    assert os.read(reader, 1) == b"x" and not os.get_inheritable(incoming.descriptors[0])
    os.close(incoming.descriptors[0])
    os.close(reader)
    assert server.send(incoming.connection, DETACH) and packets.receive_packet(line) == (DETACH, [])
    assert stat.S_IMODE(server.path.stat().st_mode) == 0o600


def test_last_words_are_heard_of_a_client_that_left_ours_unread(server, dial) -> None:
    """The kernel reports such an end as a reset, ahead of what was said before it: a clean detach was lost, and its process's end taken for a death."""
    line = dial()
    packets.send_packet(line, DETACH)
    (incoming,) = server.receive()
    assert server.send(incoming.connection, DETACH)
    packets.send_packet(line, DETACH)
    line.close()
    assert not server.send(incoming.connection, DETACH), "nobody is there"
    assert [getattr(one, "message", None) for one in server.receive()] == [DETACH, None]



def test_large_messages_travel_in_a_sealed_body_both_ways(server, dial) -> None:
    line = dial()
    large = restored(1_000_000)
    packets.send_packet(line, large, [0])
    (incoming,) = server.receive()
    assert incoming.message == large and len(incoming.descriptors) == 1
    assert server.send(incoming.connection, large, incoming.descriptors)
    message, received = packets.receive_packet(line)
    assert message == large and len(received) == 1
    packets.close_all([*received, *incoming.descriptors])


@pytest.mark.parametrize("kind", ["bytes", "empty_map", "body_without", "body_unsealed", "body_lies", "body_in_body", "too_long"])
def test_garbage_ends_its_own_connection_only_and_leaks_nothing(server, dial, kind: str) -> None:
    good, bad = dial(), dial()
    body = os.memfd_create("body", os.MFD_ALLOW_SEALING)
    data = local.pack(local.Body(10)) if kind == "body_in_body" else b"0123456789"
    os.write(body, data)
    if kind in ("body_lies", "body_in_body"):
        import fcntl

        fcntl.fcntl(body, fcntl.F_ADD_SEALS, packets.SEALS)
    said = {
        "bytes": b"\xff\x00garbage", "empty_map": b"\x80", "too_long": b"\x00" * 140_000, "body_lies": local.pack(local.Body(1 << 40)),
        "body_in_body": local.pack(local.Body(len(data))),
    }.get(kind, local.pack(local.Body(10)))  # fmt: skip
    before = descriptors()
    rights = [] if kind == "body_without" else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [body, body]))]
    bad.sendmsg([said], rights)
    packets.send_packet(good, DETACH)
    found = server.receive()
    assert sorted(type(item).__name__ for item in found) == ["LocalIncoming", "Lost"]
    assert server.counters["socket_garbage"] == 1 and len(server.connections()) == 1
    assert descriptors() == before - 1  # the dropped connection
    os.close(body)


def test_a_closed_line_is_lost_and_is_not_sent_to(server, dial) -> None:
    line = dial()
    (connection,) = server.connections()
    packets.send_packet(line, DETACH)
    line.close()
    found = server.receive()
    assert isinstance(found[0], LocalIncoming) and isinstance(found[1], Lost) and found[1].connection == connection
    assert not server.send(connection, DETACH) and server.receive() == []


def test_a_client_that_does_not_read_is_dropped_never_waited_for(server, dial) -> None:
    dial()
    (connection,) = server.connections()
    sent = 0
    while server.send(connection, restored(50_000)):
        sent += 1
        assert sent < 10_000
    assert server.counters["socket_unread"] == 1
    assert server.receive() == [Lost(connection, "the client doesn't read")]


def test_strangers_are_refused_before_a_byte_is_decoded(server, dial) -> None:
    server._uids = frozenset({os.getuid() + 1})
    line = dial()
    assert server.counters["socket_stranger"] == 1 and not server.connections()
    with pytest.raises(packets.Ended):
        packets.receive_packet(line)


def test_connections_are_bounded(server, dial, monkeypatch) -> None:
    monkeypatch.setattr(control, "CONNECTIONS_MAX", 3)
    for _ in range(5):
        dial()
    assert len(server.connections()) == 3 and server.counters["socket_crowded"] == 2


def test_one_call_takes_a_bounded_number_of_packets_and_loses_none(server, dial) -> None:
    line = dial()
    line.setblocking(False)
    sent = 0
    try:
        while sent < 2 * control.PACKETS_PER_CALL_MAX:
            packets.send_packet(line, DETACH)
            sent += 1
    except BlockingIOError:
        pass  # the socket's own bound
    received = 0
    while found := server.receive():
        assert len(found) <= control.PACKETS_PER_CALL_MAX
        received += len(found)
    assert received == sent > 0


def test_a_live_daemons_socket_is_not_taken_and_a_dead_ones_is_replaced(server, tmp_path) -> None:
    with pytest.raises(BadConfig, match="another daemon"):
        ControlServer(server.path)
    dead = tmp_path / "dead.sock"
    left = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    left.bind(str(dead))
    left.close()
    ControlServer(dead).close()
    with pytest.raises(BadConfig, match="107"):
        ControlServer(tmp_path / ("x" * 120))
