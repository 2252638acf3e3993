"""What a link carries, against a raw TCP socket of the same run: frames of 64 KiB to 4 MiB between two processes, in alternating pairs.

    python tools/bench_stream.py [--pairs 12] [--megabytes 192] [-o table|json]

Every frame is checked for its length; the receiver touches nothing else. `ratio`: the median over pairs of (bulk channel / raw TCP of the same pair). Raw TCP
is the least that a receiver of frames can do: 8 bytes of length, then recv_into memory of that size, reused by the same rule, while the frame before is still
in somebody's hands. `control`: the same frames over ZeroMQ alone. Two busy processes: with fewer than two idle cores the figures are the scheduler's.

Knows: transports, sockets. Must not know: streams, cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import select
import socket
import statistics
import struct
import sys
import time

import numpy as np

from kvguard.format import messages, wire
from kvguard.limits import KIB, MIB
from kvguard.transport.base import Down, Frame, Up
from kvguard.transport.memory import PayloadMemory
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import NO_EPOCH

SIZES = (64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB)
LENGTH = struct.Struct("<Q")
WAYS = ("raw", "bulk", "control")


def head_of(payload_bytes: int) -> bytes:
    """A realistic header: 64 pieces with a sum for each of 16 tokens."""
    column = tuple(range(1000, 1064))
    return wire.encode(messages.KvFrame(1, NO_EPOCH, 1, 0, column, column, (16,) * 64, column, column, (0,) * 64, bytes(8 * 16 * 64)), payload_bytes)


def receive_raw(listening: socket.socket, pipe) -> None:
    connection, _ = listening.accept()
    memory = PayloadMemory()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection:
        while (job := pipe.recv()) is not None:
            count, payload_bytes = job
            handed_over = None
            for _ in range(count):
                length = bytearray(LENGTH.size)
                fill(connection, memoryview(length))
                assert LENGTH.unpack(length)[0] == payload_bytes
                payload = memory.take(payload_bytes)
                fill(connection, payload)
                handed_over = payload  # whoever gets a frame has it while the next one comes in
            assert handed_over is not None
            pipe.send(time.monotonic())


def fill(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        got = connection.recv_into(view)
        assert got, "the sender went away"
        view = view[got:]


def receive_frames(bulk: bool, pipe) -> None:
    transport = ZeromqTransport("receiver", bulk=bulk)
    pipe.send(transport.listen("tcp://127.0.0.1:0"))
    job = None
    try:
        while (job := pipe.recv()) is not None:
            count, payload_bytes = job
            while count:
                transport.wait(1.0)
                for event in transport.receive():
                    assert isinstance(event, (Up, Frame)), event
                    if isinstance(event, Frame):
                        assert len(event.payload) == payload_bytes
                        count -= 1
            pipe.send(time.monotonic())
    finally:
        transport.close()


class Raw:
    """The comparison: sendmsg of [length, payload] on a blocking socket."""

    def __init__(self) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=receive_raw, args=(listening, theirs), daemon=True)
        self.process.start()
        self._socket = socket.create_connection(listening.getsockname())
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.close()

    def carry(self, count: int, payload: memoryview) -> float:
        """Seconds for `count` frames."""
        length = LENGTH.pack(len(payload))
        self.pipe.send((count, len(payload)))
        started = time.monotonic()
        for _ in range(count):
            sent = self._socket.sendmsg([length, payload])
            if sent < len(length) + len(payload):
                self._socket.sendall(payload[max(0, sent - len(length)) :])
        return self.pipe.recv() - started

    def close(self) -> None:
        self.pipe.send(None)
        self._socket.close()
        self.process.join()


class Framed:
    """Frames over a ZeromqTransport, sent as fast as it takes them."""

    def __init__(self, bulk: bool):
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=receive_frames, args=(bulk, theirs), daemon=True)
        self.process.start()
        self._transport = ZeromqTransport("sender", bulk=bulk)
        self._transport.dial("peer:receiver", self.pipe.recv())
        self.pipe.send((1, MIB))  # the receiver turns while the link comes up
        while not any(isinstance(event, Up) for event in self._events()):
            self._transport.wait(1.0)
        assert self._transport.has_bulk("peer:receiver") == bulk
        assert self._transport.send("peer:receiver", head_of(MIB), memoryview(bytearray(MIB)))
        self._until_answered()

    def carry(self, count: int, payload: memoryview) -> float:
        head = head_of(len(payload))
        self.pipe.send((count, len(payload)))
        started = time.monotonic()
        for _ in range(count):
            while not self._transport.send("peer:receiver", head, payload):
                self._transport.wait(1.0)
                self._events()
        return self._until_answered() - started

    def _until_answered(self) -> float:
        while not self.pipe.poll():
            select.select([self._transport.fileno(), self.pipe.fileno()], [], [])
            self._events()
        return self.pipe.recv()

    def _events(self) -> list:
        events = self._transport.receive()
        assert not any(isinstance(event, Down) for event in events), events
        return events

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()
        self._transport.close()


def measure(pairs: int, total_bytes: int) -> list[dict]:
    carriers = {"raw": Raw(), "bulk": Framed(True), "control": Framed(False)}
    rows = []
    try:
        for size in SIZES:
            payload, count = memoryview(np.ones(size, np.uint8)), max(8, total_bytes // size)
            speeds: dict[str, list[float]] = {way: [] for way in WAYS}
            for pair in range(-1, pairs):  # the first only warms up
                for way in WAYS if pair % 2 else tuple(reversed(WAYS)):
                    speed = count * size / carriers[way].carry(count, payload) / 1e9
                    if pair >= 0:
                        speeds[way].append(speed)
            ratios = sorted(bulk / raw for bulk, raw in zip(speeds["bulk"], speeds["raw"], strict=True))
            row = {"frame_bytes": size, "frames": count, "pairs": pairs, "ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1]}
            rows.append(row | {f"{way}_gb_s": statistics.median(speeds[way]) for way in WAYS})
    finally:
        for carrier in carriers.values():
            carrier.close()
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--megabytes", type=int, default=192, help="payload a run")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    rows = measure(options.pairs, options.megabytes * 1_000_000)
    if options.output == "json":
        print(json.dumps({"schema": "kvguard.bench_stream/1", "rows": rows}))
        return 0
    print(f"{'frame':>8} {'raw TCP':>9} {'bulk':>9} {'control':>9}   bulk / raw (median of {options.pairs} pairs, lowest, highest)")
    for row in rows:
        speeds = " ".join(f"{row[f'{way}_gb_s']:>4.2f} GB/s" for way in WAYS)
        print(f"{row['frame_bytes'] // KIB:>4} KiB {speeds}   {row['ratio']:.2f}  {row['ratio_low']:.2f}  {row['ratio_high']:.2f}")
    return 0


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # no inherited contexts
    sys.exit(main())
