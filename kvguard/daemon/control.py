"""The daemon's end of the Unix socket: connections of engine processes, polled by the daemon's loop.

Knows: connections, credentials, packets. Must not know: what a message means, streams, epochs.

Invariants
- No call blocks; a client that doesn't read is dropped, never waited for. Connections, and packets taken per call, are bounded.
- A peer of another user (SO_PEERCRED, against this user, root and a configured list) is refused before a byte of it is decoded.
- Descriptors of anything refused are closed; garbage is counted and ends that connection only.
- A lost connection is not a death: `Lost` says that the line is gone, a pidfd that the process is.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from kvguard.errors import BadConfig, BadFrame
from kvguard.format.local import Local

CONNECTIONS_MAX = 256
PACKETS_PER_CALL_MAX = 256
BACKLOG = 64
_credentials = struct.Struct("3i")


class LocalIncoming(NamedTuple):
    """A message of connection `connection`; the receiver owns `descriptors`. `pid`, `uid`: as the kernel knows the peer."""

    connection: int
    message: Local
    descriptors: list[int]
    pid: int
    uid: int


class Lost(NamedTuple):
    """The connection is gone: closed by the peer, or dropped here for `reason`."""

    connection: int
    reason: str


# Why a connection was refused or dropped, as counted: a packet that is not of this protocol, a user who is not allowed, one connection too many, a client that
# doesn't read.
GARBAGE, STRANGER, CROWDED, UNREAD = "socket_garbage", "socket_stranger", "socket_crowded", "socket_unread"


class ControlServer:
    """Listens at `path` (made with mode 0600; a dead daemon's socket is replaced). Raises BadConfig where it can't, or where another daemon answers there."""

    def __init__(self, path: str | Path, allowed_uids: Iterable[int] = ()) -> None:
        self.path = Path(path)
        self.counters = Counter[str]()
        self._uids = frozenset((os.getuid(), 0, *allowed_uids))
        self._lines: dict[int, tuple[socket.socket, int, int]] = {}  # connection -> socket, pid, uid
        self._dropped: list[Lost] = []
        self._next = 1
        self._listener = self._listen()
        self._poll = select.epoll()
        self._poll.register(self._listener.fileno(), select.EPOLLIN)

    def _listen(self) -> socket.socket:
        if len(os.fsencode(self.path)) > 107:
            raise BadConfig(f"socket path {self.path} is over 107 bytes. Try: a shorter runtime_dir")
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists():
                self._refuse_live()
                self.path.unlink()
            before = os.umask(0o177)  # the socket is 0600 from its first moment
            try:
                listener.bind(os.fspath(self.path))
            finally:
                os.umask(before)
            if self._uids - {os.getuid(), 0}:
                os.chmod(self.path, 0o666)  # other configured users: the credentials are what is checked
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise BadConfig(f"can't listen at {self.path}: {error}. Try: a runtime_dir that this user may write to") from error
        except BaseException:
            listener.close()
            raise
        return listener

    def _refuse_live(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as probe:
            try:
                probe.connect(os.fspath(self.path))
            except (ConnectionRefusedError, FileNotFoundError):
                return
            except BlockingIOError:
                pass  # its backlog is full: it lives
        raise BadConfig(f"another daemon answers at {self.path}. Try: another runtime_dir, or end it first")

    # ---- the loop's calls -------------------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Readable when receive() may return something."""
        return self._poll.fileno()

    def connections(self) -> tuple[int, ...]:
        return tuple(self._lines)

    def receive(self) -> list[LocalIncoming | Lost]:
        """All that has come in since the last call, in order by connection, at most PACKETS_PER_CALL_MAX; [] when nothing has."""
        found: list[LocalIncoming | Lost] = self._dropped
        self._dropped = []
        by_fileno = {line.fileno(): connection for connection, (line, _, _) in self._lines.items()}
        for fileno, _ in self._poll.poll(0):
            if fileno == self._listener.fileno():
                self._accept()
            elif fileno in by_fileno:
                self._drain(by_fileno[fileno], found)
        return found

    def send(self, connection: int, message: Local, descriptors=()) -> bool:
        """Send at once; False where the connection is gone, or was dropped because the client doesn't read. Descriptors stay the caller's."""
        held = self._lines.get(connection)
        if held is None:
            return False
        from kvguard.engine.packets import send_packet

        try:
            send_packet(held[0], message, descriptors)
        except BlockingIOError:
            self.counters[UNREAD] += 1
            self._lose(connection, "the client doesn't read")
            return False
        except ConnectionError:
            return False  # what it said last is still there, and comes by `receive`, as its end does
        except OSError as error:
            self._lose(connection, f"{error}")
            return False
        return True

    def drop(self, connection: int) -> None:
        """Close a connection from this side; no Lost follows."""
        held = self._lines.pop(connection, None)
        if held is not None:
            self._forget(held[0])

    def close(self) -> None:
        """Stop listening, close all connections, remove the socket. Idempotent."""
        for connection in tuple(self._lines):
            self.drop(connection)
        if self._listener.fileno() >= 0:
            self._listener.close()
            self._poll.close()
            with contextlib.suppress(FileNotFoundError):  # the directory may have gone first
                self.path.unlink()

    # ---- connections ------------------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                line, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:  # out of descriptors, or the peer has gone: what is there goes on, the next turn tries again
                self.counters[CROWDED] += 1
                return
            line.setblocking(False)
            pid, uid, _ = _credentials.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _credentials.size))
            if uid not in self._uids:
                self.counters[STRANGER] += 1
                line.close()
            elif len(self._lines) >= CONNECTIONS_MAX:
                self.counters[CROWDED] += 1
                line.close()
            else:
                self._lines[self._next] = (line, pid, uid)
                self._next += 1
                self._poll.register(line.fileno(), select.EPOLLIN)

    def _drain(self, connection: int, found: list) -> None:
        from kvguard.engine.packets import Ended, receive_packet

        line, pid, uid = self._lines[connection]
        while len(found) < PACKETS_PER_CALL_MAX:
            try:
                message, descriptors = receive_packet(line)
            except BlockingIOError:
                return
            except Ended as ended:
                self._lose(connection, str(ended), found)
                return
            except BadFrame as error:
                self.counters[GARBAGE] += 1
                self._lose(connection, str(error), found)
                return
            except OSError as error:  # no descriptors left for those that came along: this client must say it again
                self._lose(connection, str(error), found)
                return
            found.append(LocalIncoming(connection, message, descriptors, pid, uid))

    def _lose(self, connection: int, reason: str, found: list | None = None) -> None:
        line, _, _ = self._lines.pop(connection)
        self._forget(line)
        (self._dropped if found is None else found).append(Lost(connection, reason))

    def _forget(self, line: socket.socket) -> None:
        self._poll.unregister(line.fileno())
        line.close()
