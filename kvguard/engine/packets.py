"""Packets of the local socket: one message each (format/local.py), descriptors beside it, large messages in a sealed memfd.

Knows: SOCK_SEQPACKET, SCM_RIGHTS. Must not know: who talks, what is meant. Used by both ends of the socket.
Invariants: nothing here blocks; descriptors of a refused packet are closed before the refusal is raised; received descriptors are close-on-exec.
"""

from __future__ import annotations

import array
import fcntl
import os
import socket

from kvguard.errors import BadFrame
from kvguard.format import local
from kvguard.limits import MIB, SOCKET_BYTES_MAX, SOCKET_FDS_MAX

BODY_BYTES_MAX = 64 * MIB
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_FLAGS = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC


class Ended(Exception):
    """The other end closed the connection, or died."""


def send_packet(line: socket.socket, message: local.Local, descriptors=()) -> None:
    """Send at once or not at all: raises BlockingIOError where the other end doesn't read, OSError where it is gone. Descriptors stay the caller's."""
    data = local.pack(message)
    if len(data) <= SOCKET_BYTES_MAX:
        _send(line, data, descriptors)
        return
    body = _sealed(data)
    try:
        _send(line, local.pack(local.Body(len(data))), (body, *descriptors))
    finally:
        os.close(body)


def _send(line: socket.socket, data: bytes, descriptors) -> None:
    assert len(descriptors) <= SOCKET_FDS_MAX, f"{len(descriptors)} descriptors in one packet"
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
    line.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _sealed(data: bytes) -> int:
    body = os.memfd_create("kvguard-body", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(body), "wb") as file:
            file.write(data)
        fcntl.fcntl(body, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(body)
        raise
    return body


def receive_packet(line: socket.socket) -> tuple[local.Local, list[int]]:
    """One message and its descriptors, the caller's to close. Raises BlockingIOError (nothing there), Ended, BadFrame."""
    try:
        try:
            data, ancillary, flags, _ = _next(line)
        except ConnectionResetError:  # the peer closed with words of ours unread: said once, and before its own last words, which are still there
            data, ancillary, flags, _ = _next(line)
    except ConnectionError as error:
        raise Ended(str(error)) from error
    descriptors: list[int] = []
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received = array.array("i")
            received.frombytes(rights[: len(rights) - len(rights) % received.itemsize])
            descriptors += received
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise BadFrame("a packet over the bounds of the local socket")
        if not data:
            raise Ended("closed")
        message = local.unpack(data)
        if isinstance(message, local.Body):
            message = local.unpack(_read_body(message, descriptors))
            if isinstance(message, local.Body):
                raise BadFrame("a body within a body")
    except BaseException:
        close_all(descriptors)
        raise
    return message, descriptors


def _next(line: socket.socket) -> tuple:
    return line.recvmsg(SOCKET_BYTES_MAX, socket.CMSG_SPACE(4 * SOCKET_FDS_MAX), _FLAGS)


def _read_body(message: local.Body, descriptors: list[int]) -> bytes:
    """The message in the first descriptor, which is taken off the list and closed."""
    if not descriptors:
        raise BadFrame("a body without its descriptor")
    body = descriptors.pop(0)
    try:
        seals = fcntl.fcntl(body, fcntl.F_GET_SEALS)
        if seals & SEALS != SEALS or not 0 < message.bytes <= BODY_BYTES_MAX or os.fstat(body).st_size != message.bytes:
            raise BadFrame(f"a body of {message.bytes} bytes that is not sealed at that size, or over {BODY_BYTES_MAX}")
        return os.pread(body, message.bytes, 0)
    except OSError as error:
        raise BadFrame(f"a body that can't be read: {error}") from error
    finally:
        os.close(body)


def close_all(descriptors) -> None:
    """Close descriptors that nobody took."""
    for descriptor in descriptors:
        os.close(descriptor)
