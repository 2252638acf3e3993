"""The receiving half of a link's measurement: a process on this host or on another one, which takes frames and says when it has them all.

    python -m kvguard.capacity.receiver          on a free port of loopback; says where on its stdout; ends with its one conversation

Knows: transports, sockets, the conversation below. Must not know: streams, cores, live daemons; nothing of a daemon is touched.
Invariants: what a sender asks for is bounded before memory is taken; a sender that goes away ends its conversation, not this process; nothing that arrives is
looked at beyond its length.

Conversation, lines of JSON over TCP. Here: {"name", "raw", "bulk", "control"} (ports). There: {"way": raw | bulk | control | echo, "frames", "bytes"}, then so
many frames the way that was named; here: {"got": frames}. `echo` is answered at once: it is the round trip. With a port P given, P + 1 takes raw TCP, P + 2 and
P + 3 the bulk way (frames, payloads), P + 4 frames over ZeroMQ alone.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import sys
import time
from collections.abc import Callable

from zmq import ZMQError

from kvguard.errors import BadConfig, BadFrame
from kvguard.limits import PAYLOAD_BYTES_MAX
from kvguard.transport.base import Frame
from kvguard.transport.keys import Keys
from kvguard.transport.memory import PayloadMemory
from kvguard.transport.zeromq import ZeromqTransport

LENGTH = struct.Struct("<Q")
FRAMES_MAX = 1 << 20
LINE_BYTES_MAX = 4096
STEP_S = 1.0  # between two looks whether the sender is still there
CONNECT_S = 30.0
IDLE_S = 60.0  # without a word, or a frame
NAME = "capacity"


class Gone(Exception):
    """The sender went away: no error of ours."""


class Receiver:
    """Listens when made. `address`: tcp://HOST:PORT, port 0 for any. Raises BadConfig where a port can't be had, or keys are needed and missing."""

    def __init__(self, address: str, keys: Keys | None = None, insecure: bool = False) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        host, port = host.strip("[]"), int(port)
        self.name = (keys.own_name() if keys is not None else "") or NAME
        self._transports: dict[str, ZeromqTransport] = {}
        self._listening: list[socket.socket] = []
        try:
            around = f"[{host}]" if ":" in host else host
            ports = {}
            for way, bulk, offset in (("bulk", True, 2), ("control", False, 4)):
                transport = ZeromqTransport(self.name, keys, insecure, bulk, bulk_port=port + 3 if port and bulk else 0)
                self._transports[way] = transport
                ports[way] = _port_of(transport, f"tcp://{around}:{port + offset if port else 0}")
            self._listening = [_listening(host, port), _listening(host, port + 1 if port else 0)]
        except BaseException:
            self.close()
            raise
        ports["raw"] = self._listening[1].getsockname()[1]
        self._greeting = {"name": self.name, **ports}
        self.address = f"tcp://{around}:{self._listening[0].getsockname()[1]}"

    def serve_one(self, timeout_s: float | None = None) -> bool:
        """One conversation, to its end. False where nobody came within `timeout_s`."""
        self._listening[0].settimeout(timeout_s)
        try:
            connection, _ = self._listening[0].accept()
        except TimeoutError:
            return False
        connection.settimeout(IDLE_S)  # whoever says nothing keeps others out no longer
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection, connection.makefile("rwb") as lines:
            raw = None
            try:
                _say(lines, self._greeting)
                while True:
                    way, frames, frame_bytes = _job(lines)
                    if way == "raw" and raw is None:
                        raw = self._raw()
                    if way == "raw":
                        _take_raw(raw, frames, frame_bytes)
                    elif way != "echo":
                        _take_frames(self._transports[way], frames, frame_bytes, lambda: _over(connection))
                    _say(lines, {"got": frames})
            except (Gone, BadFrame, OSError):
                return True
            finally:
                if raw is not None:
                    raw.close()

    def _raw(self) -> socket.socket:
        self._listening[1].settimeout(CONNECT_S)
        connection, _ = self._listening[1].accept()
        connection.settimeout(CONNECT_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection

    def close(self) -> None:
        for transport in self._transports.values():
            transport.close()
        for one in self._listening:
            one.close()


def _listening(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise _no_port(f"{host}:{port}", error) from error


def _port_of(transport: ZeromqTransport, address: str) -> int:
    try:
        return int(transport.listen(address).rpartition(":")[2])
    except BadConfig as error:
        if isinstance(error.__cause__, (OSError, ZMQError)):  # the transport's advice is for its own settings, which nobody has here
            raise _no_port(address, error.__cause__) from error
        raise


def _no_port(address: str, why: OSError | ZMQError) -> BadConfig:
    return BadConfig(f"can't listen at {address}, or beside it: {why.strerror}. Try: an address of this host, and five free ports in a row")


def _say(lines, told: dict) -> None:
    lines.write(json.dumps(told).encode() + b"\n")
    lines.flush()


def _job(lines) -> tuple[str, int, int]:
    """Raises Gone at the end of the conversation, or where it makes no sense."""
    line = lines.readline(LINE_BYTES_MAX)
    if not line:
        raise Gone
    try:
        asked = json.loads(line)
        way, frames, frame_bytes = asked["way"], asked["frames"], asked["bytes"]
        if type(frames) is not int or type(frame_bytes) is not int:
            raise TypeError(asked)
        if way not in ("raw", "bulk", "control", "echo") or not 0 < frames <= FRAMES_MAX or not 0 < frame_bytes <= PAYLOAD_BYTES_MAX:
            raise ValueError(asked)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Gone from error
    return way, frames, frame_bytes


def _over(connection: socket.socket) -> bool:
    """Whether the sender has hung up: nothing else is ever said in mid-job."""
    return bool(select.select([connection], [], [], 0)[0]) and connection.recv(1, socket.MSG_PEEK) == b""


def _take_raw(connection: socket.socket, frames: int, frame_bytes: int) -> None:
    """The least that a receiver of frames can do: 8 bytes of length, then recv_into memory of that size, reused once nobody has it in hand."""
    memory, in_hand = PayloadMemory(), None
    for _ in range(frames):
        length = bytearray(LENGTH.size)
        _fill(connection, memoryview(length))
        if LENGTH.unpack(length)[0] != frame_bytes:
            raise Gone
        payload = memory.take(frame_bytes)
        _fill(connection, payload)
        in_hand = payload  # whoever gets a frame has it while the next one comes in
    del in_hand


def _fill(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        got = connection.recv_into(view)
        if not got:
            raise Gone
        view = view[got:]


def _take_frames(transport: ZeromqTransport, frames: int, frame_bytes: int, over: Callable[[], bool]) -> None:
    due = time.monotonic() + IDLE_S
    while frames:
        if not transport.wait(STEP_S) and over() or time.monotonic() >= due:
            raise Gone
        for event in transport.receive():
            if isinstance(event, Frame):
                if event.payload is None or len(event.payload) != frame_bytes:
                    raise BadFrame(f"a frame of other than {frame_bytes} bytes")
                frames, due = frames - 1, time.monotonic() + IDLE_S


def main() -> None:
    receiver = Receiver("tcp://127.0.0.1:0")
    try:
        print(receiver.address, flush=True)
        receiver.serve_one(CONNECT_S)
    finally:
        receiver.close()


if __name__ == "__main__":
    sys.exit(main())
