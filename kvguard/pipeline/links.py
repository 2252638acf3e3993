"""Messages between driver and stages over ZeroMQ: PULL where one listens, PUSH to whoever comes next.

Knows: sockets, frames of two parts (message, tensor). Must not know: what messages mean.
Invariants: sending never waits (what can't be queued is dropped and counted: a recovery replays it); what was queued for an endpoint that is no longer on the
route dies with its socket; garbage is counted, never raised.
"""

from __future__ import annotations

import logging

import zmq

from kvguard.errors import BadConfig, BadFrame
from kvguard.pipeline.steps import Message, pack, unpack

QUEUED_MAX = 64  # messages to one endpoint: one step is in flight, the rest are questions
MESSAGE_BYTES_MAX = 256 * 1024 * 1024  # logits of a whole step fit; a claim of more is refused before memory is reserved
log = logging.getLogger("kvguard.pipeline")


class Links:
    """One process's sockets. Not thread-safe."""

    def __init__(self, listen: str):
        """Raises BadConfig when `listen` can't be bound."""
        self._context = zmq.Context()
        self._out: dict[str, zmq.Socket] = {}
        self.dropped = 0
        self.garbage = 0
        self.inbox = self._context.socket(zmq.PULL)
        self.inbox.set(zmq.LINGER, 0)
        self.inbox.set(zmq.MAXMSGSIZE, MESSAGE_BYTES_MAX)
        try:
            self.inbox.bind(listen)
        except zmq.ZMQError as error:
            self.close()
            raise BadConfig(f"can't listen on {listen!r}: {error}. Try: tcp://127.0.0.1:PORT with a port that is free") from error

    def send(self, endpoint: str, message: Message, tensor=b"") -> bool:
        """Queues one message; `tensor`: bytes or a contiguous buffer. False, counted and logged, where it was dropped."""
        try:
            self._socket(endpoint).send_multipart([pack(message), tensor], flags=zmq.NOBLOCK)
        except zmq.ZMQError as error:
            self.dropped += 1
            log.warning("dropped %s %d of epoch %d to %s: %s", message.kind, message.number, message.epoch, endpoint, error)
            return False
        return True

    def receive(self) -> tuple[Message, memoryview] | None:
        """The next message and its tensor's bytes; None when nothing has come."""
        while True:
            try:
                parts = self.inbox.recv_multipart(flags=zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            try:
                if len(parts) != 2:
                    raise BadFrame(f"a message of {len(parts)} parts, expected 2")
                return unpack(parts[0].buffer), parts[1].buffer
            except BadFrame as error:
                self.garbage += 1
                log.warning("garbage on the stage port dropped (%d so far): %s", self.garbage, error)

    def keep(self, endpoints: tuple[str, ...]) -> None:
        """Closes sockets to everybody else."""
        for endpoint in [endpoint for endpoint in self._out if endpoint not in endpoints]:
            self._out.pop(endpoint).close(linger=0)

    def close(self, linger_ms: int = 0) -> None:
        for socket in self._out.values():
            socket.close(linger=linger_ms)
        self._out.clear()
        self.inbox.close(linger=0)
        self._context.term()

    def _socket(self, endpoint: str) -> zmq.Socket:
        socket = self._out.get(endpoint)
        if socket is None:
            socket = self._context.socket(zmq.PUSH)
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.SNDHWM, QUEUED_MAX)
            socket.set(zmq.RECONNECT_IVL, 20)
            socket.set(zmq.RECONNECT_IVL_MAX, 200)
            try:
                socket.connect(endpoint)
            except zmq.ZMQError:
                socket.close()
                raise
            self._out[endpoint] = socket
        return socket
