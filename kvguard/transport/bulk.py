"""The bulk channel: a plain TCP connection beside a link's control connection, for frames with payloads.

Knows: TCP sockets, framing (format/wire.py), tickets. Must not know: ZeroMQ, what a frame means.
Invariants: a ticket opens one channel, once, within a bound of time, and is compared in constant time; bounds and header checksum hold before payload memory is
reserved; nothing blocks; what is queued is bounded in bytes; strangers hold at most STRANGERS_MAX descriptors, each for STRANGER_WAIT_NS, and the one that has
been silent longest makes room for the next: whoever has a ticket shows it at once, so a crowd in front of him keeps nobody out.

The channel authenticates, it doesn't encrypt: the ticket travels over the control connection (encrypted where keys are configured), the payloads themselves
are readable by whoever can read the network between two nodes.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from kvguard.errors import BadFrame
from kvguard.format import wire
from kvguard.transport.memory import PayloadMemory
from kvguard.transport.wakeup import IN, OUT, Wakeup

MAGIC = b"KVGB"
NUMBER_BYTES, SECRET_BYTES = 8, 32
TICKET_BYTES = NUMBER_BYTES + SECRET_BYTES
KNOCK_BYTES = len(MAGIC) + TICKET_BYTES
STRANGERS_MAX = 64
STRANGER_WAIT_NS = 2_000_000_000
ACCEPTS_PER_TURN = 32  # fewer than places: who was accepted last turn still has his when he is heard
ACCEPT_AGAIN_NS = 100_000_000  # after descriptors ran out
SCRATCH_BYTES = 64 * 1024  # one read brings in many small frames, or a large frame's header
AHEAD_BYTES = 12 * 1024  # behind a payload: the next header, and little of its payload, which would be copied once more
READ_BYTES_MAX = 2 * 1024 * 1024  # per turn: other links wait meanwhile, and more would leave the processor's cache before it is looked at
PARTS_MAX = 16
KERNEL_BYTES = 2 * 1024 * 1024  # more under way than the processor's cache holds is slower (measured), and bounds what a slow peer holds back
WAKE_BYTES = 512 * 1024  # of a large payload that has to be there before this side is woken: a wake-up costs as much as copying 100 KiB
EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
STUCK_MS = 10_000  # unacknowledged by the peer's kernel for so long: the connection is broken


def prepare(connection: socket.socket) -> None:
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_MS)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, KERNEL_BYTES)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)


class BulkChannel:
    """Frames both ways over a connected socket that it owns. Errors of the connection are raised as OSError, of the peer as BadFrame; then close it."""

    def __init__(self, connection: socket.socket, wakeup: Wakeup, call: Callable[[int], None], queue_bytes_max: int):
        self._socket, self._wakeup, self._queue_bytes_max = connection, wakeup, queue_bytes_max
        self._queue: deque[memoryview] = deque()
        self.queued_bytes = 0
        self.sent = self.got = 0  # frames that were taken from the caller, and given to it
        self._reading = False
        self._wanted = 0  # what the descriptor is watched for
        self._wakes_at = 1  # bytes
        self._memory = PayloadMemory()
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._start = self._end = 0  # of what is unread in the scratch
        self._head = b""
        self._payload: memoryview | None = None  # being filled
        self._filled = 0
        wakeup.watch(connection.fileno(), call, 0)
        self._watched = True

    def start(self) -> None:
        """Read from now on: what came earlier waits in the kernel."""
        self._reading = True
        self._interest()

    def rest(self) -> None:
        """Nothing is to be sent or read any more: whatever the connection does is of no interest until close()."""
        if self._watched:
            self._watched = False
            self._wakeup.forget(self._socket.fileno())

    def close(self) -> None:
        self.rest()
        self._socket.close()
        self._queue.clear()
        self.queued_bytes = 0

    def send(self, head: bytes, payload: memoryview | None) -> bool:
        """Queue one frame and send what the kernel takes. False when it is full."""
        size = len(head) + (len(payload) if payload is not None else 0)
        if self._queue and self.queued_bytes + size > self._queue_bytes_max:
            return False
        was_empty = not self._queue
        self._queue.append(memoryview(head))
        if payload is not None and len(payload):
            self._queue.append(payload)
        self.queued_bytes += size
        self.sent += 1
        if was_empty:
            self.flush()
        return True

    def flush(self) -> None:
        """Send what the kernel takes now."""
        full = False
        while self._queue and not full:
            parts = list(islice(self._queue, PARTS_MAX))
            try:
                sent = self._socket.sendmsg(parts)
            except BlockingIOError:
                break
            self.queued_bytes -= sent
            full = sent < sum(map(len, parts))
            while sent and sent >= len(self._queue[0]):
                sent -= len(self._queue.popleft())
            if sent:
                self._queue[0] = self._queue[0][sent:]
        self._interest()

    def _interest(self) -> None:
        wanted = (IN if self._reading else 0) | (OUT if self._queue else 0)
        if wanted != self._wanted:
            self._wanted = wanted
            self._wakeup.change(self._socket.fileno(), wanted)

    def read(self) -> list[tuple[bytes, memoryview | None]]:
        """The frames that are complete, bounded per call. Raises BadFrame, or OSError when the peer closed."""
        frames: list[tuple[bytes, memoryview | None]] = []
        left, full = READ_BYTES_MAX, True
        while left > 0 and full:  # less than there is room for: the kernel has no more, and need not be asked
            try:
                got, room = self._fill()
            except BlockingIOError:
                break
            if got == 0:
                raise ConnectionResetError("the peer closed the bulk channel")
            left, full = left - got, got == room
            self._parse(frames)
        self._wake_at(1 if self._payload is None else min(WAKE_BYTES, len(self._payload) - self._filled))
        self.got += len(frames)
        return frames

    def _wake_at(self, size: int) -> None:
        """Be woken when `size` bytes can be read: never more than the peer certainly sends."""
        if size != self._wakes_at:
            self._wakes_at = size
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)

    def _fill(self) -> tuple[int, int]:
        """Bytes that came, and that could have come."""
        if self._payload is not None:  # then the scratch is empty, and takes the beginning of the next frame
            rest = self._payload[self._filled :]
            got = self._socket.recvmsg_into([rest, self._scratch[:AHEAD_BYTES]])[0]
            into = min(got, len(rest))
            self._filled += into
            self._start, self._end = 0, got - into
            return got, len(rest) + AHEAD_BYTES
        if self._start:
            unread = self._end - self._start
            self._scratch[:unread] = bytes(self._scratch[self._start : self._end])
            self._start, self._end = 0, unread
        room = len(self._scratch) - self._end
        got = self._socket.recv_into(self._scratch[self._end :])
        self._end += got
        return got, room

    def _parse(self, frames: list) -> None:
        """Take whole frames out of the scratch."""
        while True:
            if self._payload is not None:
                into = min(len(self._payload) - self._filled, self._end - self._start)
                self._payload[self._filled : self._filled + into] = self._scratch[self._start : self._start + into]
                self._filled += into
                self._start += into
                if self._filled < len(self._payload):
                    return
                frames.append((self._head, self._payload))
                self._payload = None
            unread = self._scratch[self._start : self._end]
            if len(unread) < wire.PREFIX.size:
                return
            sizes = wire.read_prefix(unread)
            head_bytes = wire.PREFIX.size + sizes.header_bytes
            if len(unread) < head_bytes:
                self._reserve(head_bytes)
                return
            head = bytes(unread[:head_bytes])
            wire.check(head)
            self._start += head_bytes
            if sizes.payload_bytes:
                self._head, self._filled = head, 0
                self._payload = self._memory.take(sizes.payload_bytes)
            else:
                frames.append((head, None))

    def _reserve(self, head_bytes: int) -> None:
        """Scratch for a header that is larger than usual, bounded by read_prefix."""
        if head_bytes > len(self._scratch):
            unread = bytes(self._scratch[self._start : self._end])
            self._scratch = memoryview(bytearray(head_bytes))
            self._scratch[: len(unread)] = unread
            self._start, self._end = 0, len(unread)


class _Stranger:
    """A connection that has not shown its ticket yet."""

    def __init__(self, connection: socket.socket, address: str, deadline_ns: int):
        self.socket, self.address, self.deadline_ns = connection, address, deadline_ns
        self.knock = bytearray()


class BulkPort:
    """The accepting side: hands out tickets, and connections to those whose ticket was shown."""

    def __init__(self, host: str, port: int, wakeup: Wakeup, claimed: Callable[[object, socket.socket], None], refused: Callable[[str, str], None]):
        self._wakeup, self._claimed, self._refused = wakeup, claimed, refused
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, KERNEL_BYTES)  # inherited; the window's scale is settled while connecting
            self._socket.bind((host, port))
            self._socket.listen(1024)  # the kernel's queue, in front of the places for strangers
        except OSError:
            self._socket.close()
            raise
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        self._tickets: dict[bytes, tuple[bytes, object, int]] = {}  # number -> secret, owner, deadline
        self._strangers: dict[int, _Stranger] = {}  # the oldest first
        self._accept_from_ns = 0
        wakeup.watch(self._socket.fileno(), self._accept)

    def offer(self, owner: object, wait_ns: int) -> bytes:
        """A ticket that opens one channel for `owner`."""
        number, secret = os.urandom(NUMBER_BYTES), os.urandom(SECRET_BYTES)
        self._tickets[number] = (secret, owner, time.monotonic_ns() + wait_ns)
        return number + secret

    def withdraw(self, owner: object) -> None:
        self._tickets = {number: ticket for number, ticket in self._tickets.items() if ticket[1] is not owner}

    def deadline_ns(self) -> int:
        """When tick() is due next, 0 for never."""
        times = [stranger.deadline_ns for stranger in self._strangers.values()] + [ticket[2] for ticket in self._tickets.values()]
        return min(times + [self._accept_from_ns] if self._accept_from_ns else times, default=0)

    def tick(self, now_ns: int) -> None:
        self._tickets = {number: ticket for number, ticket in self._tickets.items() if ticket[2] > now_ns}
        for stranger in [stranger for stranger in self._strangers.values() if stranger.deadline_ns <= now_ns]:
            self._drop(stranger, "showed no ticket in time")
        if 0 < self._accept_from_ns <= now_ns:
            self._accept_from_ns = 0
            self._wakeup.change(self._socket.fileno(), IN)

    def close(self) -> None:
        for stranger in list(self._strangers.values()):
            self._wakeup.forget(stranger.socket.fileno())
            stranger.socket.close()
        self._strangers.clear()
        self._wakeup.forget(self._socket.fileno())
        self._socket.close()

    def _accept(self, events: int) -> None:
        for _ in range(ACCEPTS_PER_TURN):
            try:
                connection, address = self._socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # the caller is gone again, or descriptors are exhausted: then it stays in the kernel's queue, and asking again is a loop
                self._refused("?", f"can't accept: {error.strerror}")
                if error.errno in EXHAUSTED:
                    self._accept_from_ns = time.monotonic_ns() + ACCEPT_AGAIN_NS
                    self._wakeup.change(self._socket.fileno(), 0)
                return
            if len(self._strangers) >= STRANGERS_MAX:
                self._drop(next(iter(self._strangers.values())), "showed no ticket while others waited")
            prepare(connection)
            stranger = _Stranger(connection, f"{address[0]}:{address[1]}", time.monotonic_ns() + STRANGER_WAIT_NS)
            self._strangers[connection.fileno()] = stranger
            self._wakeup.watch(connection.fileno(), lambda events, stranger=stranger: self._hear(stranger))

    def _hear(self, stranger: _Stranger) -> None:
        try:
            got = stranger.socket.recv(KNOCK_BYTES - len(stranger.knock))
        except BlockingIOError:
            return
        except OSError as error:
            self._drop(stranger, f"went away: {error.strerror}")
            return
        stranger.knock += got
        if not got:
            self._drop(stranger, "went away without a ticket")
        elif not stranger.knock.startswith(MAGIC[: len(stranger.knock)]):
            self._drop(stranger, "doesn't speak this protocol")
        elif len(stranger.knock) == KNOCK_BYTES:
            number, secret = bytes(stranger.knock[4 : 4 + NUMBER_BYTES]), bytes(stranger.knock[4 + NUMBER_BYTES :])
            expected, owner, deadline_ns = self._tickets.pop(number, (bytes(SECRET_BYTES), None, 0))
            import hmac  # here: OpenSSL comes with it, and a process that only asks has no strangers

            if hmac.compare_digest(secret, expected) and owner is not None and deadline_ns > time.monotonic_ns():
                self._forget(stranger)
                self._claimed(owner, stranger.socket)
            else:
                self._drop(stranger, "showed a ticket that isn't valid")

    def _drop(self, stranger: _Stranger, why: str) -> None:
        self._forget(stranger)
        stranger.socket.close()
        self._refused(stranger.address, f"bulk port: {stranger.address} {why}")

    def _forget(self, stranger: _Stranger) -> None:
        del self._strangers[stranger.socket.fileno()]
        self._wakeup.forget(stranger.socket.fileno())


def raise_if_misused(frames: list[tuple[bytes, memoryview | None]]) -> None:
    """Raises BadFrame for a frame that belongs on the control connection."""
    for head, _ in frames:
        if not wire.may_carry_payload(head):
            raise BadFrame("a frame without payload came over the bulk channel")
