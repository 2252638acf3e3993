"""Many descriptors carried as one: they wait in a socket whose reading end is handed on, so that a pool of thousands of chunks needs no message of its own.

Knows: SCM_RIGHTS. Must not know: what the descriptors are.
Invariants: nothing here waits; a pouch is emptied once; whatever is still in it goes when its descriptor is closed; descriptors that were taken out are closed
before an error is raised.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterable, Iterator

from kvguard.errors import Refused

PACKET_FDS = 250  # SCM_MAX_FD is 253
DESCRIPTORS_MAX = 1 << 14


def filled(descriptors: Iterable[int]) -> int:
    """A pouch with all of `descriptors`, which are closed as they are put in; the pouch's descriptor is the caller's. Raises Refused for too many."""
    front, back = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    held: list[int] = []
    try:
        for descriptor in descriptors:
            held.append(descriptor)
            if len(held) == PACKET_FDS:
                _put(back, held)
        if held:
            _put(back, held)
        return front.detach()
    except OSError as error:
        raise Refused(f"so many descriptors can't be carried: {error}. Try: a higher LimitNOFILE (ulimit -n), or memory in larger pieces") from error
    finally:
        back.close()
        front.close()
        _close_all(held)


def _put(back: socket.socket, held: list[int]) -> None:
    back.sendmsg([b"d"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", held))])
    _close_all(held)


@contextlib.contextmanager
def emptied(pouch: int) -> Iterator[Iterator[list[int]]]:
    """What is in a pouch, some at a time, in order; each lot is the caller's to close, the pouch is closed here. Raises Refused for no (whole) pouch."""
    try:
        front = socket.socket(fileno=pouch)
    except OSError as error:
        os.close(pouch)
        raise Refused(f"the descriptor is no pouch of others: {error}. Try: Pool.export() of this version") from error
    with front:
        yield _lots(front)


def _lots(front: socket.socket) -> Iterator[list[int]]:
    taken = 0
    while lot := _taken_out(front):
        taken += len(lot)
        if taken > DESCRIPTORS_MAX:
            _close_all(lot)
            raise Refused(f"over {DESCRIPTORS_MAX} descriptors for one pool. Try: memory in larger pieces")
        yield lot


def _taken_out(front: socket.socket) -> list[int]:
    lot: list[int] = []
    try:
        packet, ancillary, flags, _ = front.recvmsg(1, socket.CMSG_SPACE(4 * PACKET_FDS), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC)
    except OSError as error:  # nothing in it though somebody could still put something in: not one of ours
        raise Refused(f"a pouch of descriptors can't be emptied: {error}. Try: Pool.export() of this version") from error
    for level, kind, rights in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            lot += struct.unpack(f"{len(rights) // 4}i", rights[: len(rights) & -4])
    if flags & socket.MSG_CTRUNC or bool(packet) != bool(lot):
        _close_all(lot)
        raise Refused("descriptors of a pool were lost on the way. Try: a higher LimitNOFILE")
    return lot


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
