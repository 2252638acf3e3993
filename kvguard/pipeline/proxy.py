"""A cable between daemons that can be cut and slowed: TCP forwarded on loopback, one gate in front of each node's listening ports.

Knows: sockets, bytes, how many of them passed, waited and were lost. Must not know: frames, nodes' meaning, who is right.
Invariants: what is kept of a connection is bounded; a gate that is cut closes what was open and accepts nothing; a slow gate passes no more than its rate on
each connection and loses nothing; one thread serves all gates and ends with close().
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field

PIECE_BYTES = 64 * 1024  # read at once, and all that is kept of one direction of a connection
SLICE_S = 0.02  # how finely a slow gate spreads its rate
BACKLOG = 64


@dataclass
class Gate:
    """In front of one node: `ports` lead to the same ports of `target_host`. `rate`: bytes a second for each direction of a connection; 0: as they come."""

    host: str
    target_host: str
    ports: dict[int, int]  # here -> there
    cut: bool = False
    rate: int = 0
    counters: Counter = field(default_factory=Counter)  # connections, connections_cut, connections_refused, bytes, bytes_delayed


class _Direction:
    """Bytes from one socket to another."""

    __slots__ = ("due_s", "ended", "held", "source", "target")

    def __init__(self, source: socket.socket, target: socket.socket):
        self.source, self.target = source, target
        self.held = b""
        self.due_s = 0.0  # when a slow gate may pass the next piece
        self.ended = False


class _Connection:
    """Both directions of one connection through a gate."""

    def __init__(self, gate: Gate, outer: socket.socket, inner: socket.socket):
        self.gate, self.outer, self.inner = gate, outer, inner
        self.directions = (_Direction(outer, inner), _Direction(inner, outer))
        self.connecting = True


class Proxy:
    """All gates of one world, and the thread that serves them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gates: list[Gate] = []
        self._listeners: dict[socket.socket, tuple[Gate, int]] = {}
        self._connections: list[_Connection] = []
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kvguard-proxy", daemon=True)
        self._thread.start()

    def gate(self, host: str, target_host: str, ports: dict[int, int]) -> Gate:
        """Listens at `host` on each port. Raises OSError where one is taken."""
        gate = Gate(host, target_host, ports)
        made = {}
        try:
            for port in ports:
                made[socket.create_server((host, port), backlog=BACKLOG)] = (gate, port)
        except OSError:
            for listener in made:
                listener.close()
            raise
        for listener in made:
            listener.setblocking(False)
        with self._lock:
            self._gates.append(gate)
            self._listeners |= made
        self._ring()
        return gate

    def cut(self, gate: Gate) -> None:
        """The cable is out: what is open breaks, nothing gets through until heal()."""
        with self._lock:
            gate.cut = True
            for connection in [one for one in self._connections if one.gate is gate]:
                self._drop(connection)
                gate.counters["connections_cut"] += 1
        self._ring()

    def slow(self, gate: Gate, bytes_per_s: int) -> None:
        with self._lock:
            gate.rate = bytes_per_s
        self._ring()

    def heal(self, gate: Gate) -> None:
        with self._lock:
            gate.cut, gate.rate = False, 0
        self._ring()

    def close(self) -> None:
        self._closing = True
        self._ring()
        self._thread.join()
        for connection in list(self._connections):
            self._drop(connection)
        for listener in self._listeners:
            listener.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    # ---- the thread -----------------------------------------------------------------------------------------------------------------

    def _ring(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            return  # it is full of rings already

    def _run(self) -> None:
        while not self._closing:
            with selectors.PollSelector() as selector:
                with self._lock:
                    timeout = self._register(selector)
                ready = selector.select(timeout)
                with self._lock:
                    for key, mask in ready:
                        self._serve(key, mask)

    def _register(self, selector: selectors.BaseSelector) -> float | None:
        """What is waited for now; returns for how long at most."""
        selector.register(self._wake_read, selectors.EVENT_READ, None)
        for listener in self._listeners:
            selector.register(listener, selectors.EVENT_READ, listener)
        now, timeout = time.monotonic(), None
        for connection in self._connections:
            wanted: dict[socket.socket, int] = {}
            if connection.connecting:
                wanted[connection.inner] = selectors.EVENT_WRITE
            for direction in () if connection.connecting else connection.directions:
                if direction.held and direction.due_s > now:
                    timeout = min(direction.due_s - now, timeout if timeout is not None else SLICE_S)
                elif direction.held:
                    wanted[direction.target] = wanted.get(direction.target, 0) | selectors.EVENT_WRITE
                elif not direction.ended:
                    wanted[direction.source] = wanted.get(direction.source, 0) | selectors.EVENT_READ
            for one, mask in wanted.items():
                selector.register(one, mask, connection)
        return timeout

    def _serve(self, key: selectors.SelectorKey, mask: int) -> None:
        if key.data is None:
            while len(self._read_rings()) == PIECE_BYTES:
                continue
        elif isinstance(key.data, socket.socket):
            self._accept(key.data)
        elif key.data in self._connections:
            try:
                self._move(key.data, key.fileobj, mask)
            except OSError:
                key.data.gate.counters["connections_lost"] += 1
                self._drop(key.data)

    def _read_rings(self) -> bytes:
        try:
            return os.read(self._wake_read, PIECE_BYTES)
        except BlockingIOError:
            return b""

    def _accept(self, listener: socket.socket) -> None:
        gate, port = self._listeners[listener]
        try:
            outer, _ = listener.accept()
        except OSError:
            gate.counters["connections_lost"] += 1
            return
        if gate.cut:
            gate.counters["connections_refused"] += 1
            outer.close()
            return
        gate.counters["connections"] += 1
        inner = socket.socket()
        for one in (outer, inner):
            one.setblocking(False)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        inner.connect_ex((gate.target_host, gate.ports[port]))
        self._connections.append(_Connection(gate, outer, inner))

    def _move(self, connection: _Connection, ready: socket.socket, mask: int) -> None:
        """Bytes on their way. Raises OSError where a side is gone."""
        if connection.connecting:
            error = connection.inner.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            connection.connecting = False
            return
        for direction in connection.directions:
            if mask & selectors.EVENT_READ and ready is direction.source and not direction.held and not direction.ended:
                self._read(connection.gate, direction)
            if mask & selectors.EVENT_WRITE and ready is direction.target and direction.held:
                self._write(connection.gate, direction)
        if all(direction.ended and not direction.held for direction in connection.directions):
            self._drop(connection)

    def _read(self, gate: Gate, direction: _Direction) -> None:
        size = PIECE_BYTES if not gate.rate else max(1, min(PIECE_BYTES, int(gate.rate * SLICE_S)))
        data = direction.source.recv(size)
        if not data:
            direction.ended = True
            direction.target.shutdown(socket.SHUT_WR)
            return
        direction.held = data
        if gate.rate:
            direction.due_s = time.monotonic() + len(data) / gate.rate
            gate.counters["bytes_delayed"] += len(data)
        else:
            self._write(gate, direction)

    def _write(self, gate: Gate, direction: _Direction) -> None:
        try:
            sent = direction.target.send(direction.held)
        except BlockingIOError:
            return
        gate.counters["bytes"] += sent
        direction.held = direction.held[sent:]

    def _drop(self, connection: _Connection) -> None:
        if connection in self._connections:
            self._connections.remove(connection)
        connection.outer.close()
        connection.inner.close()
