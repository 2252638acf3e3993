"""What a ZeroMQ socket's monitor tells: connections made, shaken hands, lost.

Knows: monitor events. Must not know: links, frames.
Invariant: events are given in the order in which they happened; close() before the watched socket is closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket as sockets
import struct
import termios
from collections.abc import Iterator
from itertools import count

import zmq

EVENTS = (
    zmq.EVENT_ACCEPTED | zmq.EVENT_CONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)  # fmt: skip
HANDSHAKE_FAILED = {
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "handshake failed",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "handshake failed: not our protocol, or our key where theirs is needed",
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "handshake failed: key not listed",
}
TOLD = struct.Struct("=Hi")  # zmq_socket_monitor(3): event and value; an address follows in a part of its own. zmq.utils.monitor would import asyncio
BYTES_RECEIVED, BYTES_RECEIVED_AT = struct.Struct("=Q"), 128  # of struct tcp_info (linux/tcp.h), since Linux 4.1
UNREAD = struct.Struct("=i")
_numbers = count()


class Watch:
    """The monitor of one socket."""

    def __init__(self, context: zmq.Context, watched: zmq.Socket):
        address = f"inproc://watch-{next(_numbers)}"
        self._watched = watched
        watched.monitor(address, EVENTS)
        self.socket = context.socket(zmq.PAIR)
        self.socket.linger = 0
        self.socket.connect(address)

    def events(self) -> list[tuple[int, int]]:
        """(event, value) since the last call; the value is a descriptor for ACCEPTED, CONNECTED and DISCONNECTED."""
        told = []
        while True:
            try:
                head = self.socket.recv_multipart(zmq.NOBLOCK)[0]
            except zmq.Again:
                return told
            told.append(TOLD.unpack(head))

    def close(self) -> None:
        self._watched.disable_monitor()
        self.socket.close()


def peer_address(fd: int) -> tuple[str, int]:
    """Who is at the other end of one of ZeroMQ's own connections; ("", 0) when it is gone already."""
    with _borrowed(fd) as connection:
        return _name_of(connection)


def cut(fd: int, address: tuple[str, int]) -> bool:
    """End one of ZeroMQ's own connections, which a ROUTER can't: it sees its peer hang up. False where `address` isn't at the other end (any more)."""
    with _borrowed(fd) as connection:
        if connection is None or _name_of(connection) != address:
            return False
        with contextlib.suppress(OSError):  # it has hung up this moment
            connection.shutdown(sockets.SHUT_RDWR)
        return True


def taken_bytes(fd: int, address: tuple[str, int]) -> int | None:
    """What ZeroMQ has ever read from one of its own connections, or a little less; None where it isn't TCP, or `address` isn't at the other end (any more)."""
    with _borrowed(fd) as connection:
        if connection is None or _name_of(connection) != address:
            return None
        try:
            told = connection.getsockopt(sockets.IPPROTO_TCP, sockets.TCP_INFO, BYTES_RECEIVED_AT + BYTES_RECEIVED.size)
            unread = fcntl.ioctl(connection, termios.FIONREAD, UNREAD.pack(0))  # asked second: what comes in between makes less of it, never more
            return BYTES_RECEIVED.unpack_from(told, BYTES_RECEIVED_AT)[0] - UNREAD.unpack(unread)[0]
        except (OSError, struct.error):
            return None


@contextlib.contextmanager
def _borrowed(fd: int) -> Iterator[sockets.socket | None]:
    """The same connection by another descriptor: ZeroMQ's own one may be closed by its thread, and given to somebody else, at any time."""
    try:
        connection = sockets.socket(fileno=os.dup(fd))
    except OSError:
        yield None
        return
    with connection:
        yield connection


def _name_of(connection: sockets.socket | None) -> tuple[str, int]:
    try:
        name = connection.getpeername() if connection is not None else ("", 0)
    except OSError:
        return "", 0
    return (name[0], name[1]) if isinstance(name, tuple) else ("local", 0)
