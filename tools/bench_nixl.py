"""What a channel over NIXL carries on this machine, against a raw TCP socket and the bulk channel of the same run, and what it costs while nothing is sent.

    python tools/bench_nixl.py [--pairs 8] [--megabytes 96] [--tls cma,tcp --tls tcp] [--devices lo] [--idle 20] [-o table|json]

Two processes on this host, alternating runs, every frame checked for its length. `ratio`: the median over pairs of (way / raw TCP of the same pair). Idle: the
processor time of both ends of a link that is up and carries nothing, in percent of one core, with a loop that waits for the transport's descriptor alone.
`sender`, `receiver`: processor time of each end for a gigabyte, medians. Two busy processes: with fewer than two idle cores the speeds are the scheduler's, and
the slower end's processor time says what could have been carried.

Knows: transports, sockets. Must not know: streams, cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import select
import socket
import statistics
import sys
import time
from typing import NamedTuple

import numpy as np

from kvguard.capacity.link import head_of
from kvguard.capacity.receiver import LENGTH
from kvguard.limits import KIB, MIB
from kvguard.transport.base import Down, Frame, Up
from kvguard.transport.memory import PayloadMemory
from kvguard.transport.nixl_agent import NixlSettings
from kvguard.transport.zeromq import ZeromqTransport

SIZES = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
FRAMES_MIN = 8
WAIT_S = 30.0


def fill(connection: socket.socket, view: memoryview) -> None:
    while len(view):
        got = connection.recv_into(view)
        assert got, "the sender went away"
        view = view[got:]


def receive_raw(listening: socket.socket, pipe) -> None:
    """By the rule of every receiver of frames: memory of that size, reused once nobody has it in hand."""
    connection, _ = listening.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    memory, in_hand = PayloadMemory(), None
    with connection, listening:
        while (count := pipe.recv()) is not None:
            for _ in range(count):
                length = bytearray(LENGTH.size)
                fill(connection, memoryview(length))
                payload = memory.take(LENGTH.unpack(length)[0])
                fill(connection, payload)
                in_hand = payload
            assert in_hand is not None
            pipe.send(time.process_time())


def receive_frames(nixl: NixlSettings | None, pipe) -> None:
    transport = ZeromqTransport("receiver", nixl=nixl)
    pipe.send(transport.listen("tcp://127.0.0.1:0"))
    left = None
    try:
        while True:
            ready = select.select([transport.fileno(), pipe.fileno()], [], [])[0]
            if pipe.fileno() in ready and left is None:
                left = pipe.recv()
                if left is None:
                    return
            frames = sum(isinstance(event, Frame) for event in transport.receive())
            if left is not None:
                left -= frames
                if left <= 0:
                    pipe.send(time.process_time())
                    left = None
    finally:
        transport.close()


class Cost(NamedTuple):
    """Of one run: wall clock, and processor time of both ends."""

    seconds: float
    sender_s: float
    receiver_s: float


class Spent:
    """Processor time since the last run began."""

    def __init__(self) -> None:
        self._ours = self._theirs = 0.0

    def begin(self) -> float:
        self._ours = time.process_time()
        return time.monotonic()

    def over(self, started: float, theirs: float) -> Cost:
        cost = Cost(time.monotonic() - started, time.process_time() - self._ours, theirs - self._theirs)
        self._theirs = theirs
        return cost


class Raw:
    name = "raw TCP"

    def __init__(self) -> None:
        self.spent = Spent()
        listening = socket.create_server(("127.0.0.1", 0))
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=receive_raw, args=(listening, theirs), daemon=True)
        self._process.start()
        self._socket = socket.create_connection(listening.getsockname())
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listening.close()

    def carry(self, count: int, payload: memoryview) -> Cost:
        length = LENGTH.pack(len(payload))
        self._pipe.send(count)
        started = self.spent.begin()
        for _ in range(count):
            sent = self._socket.sendmsg([length, payload])
            if sent < len(length) + len(payload):
                self._socket.sendall(payload[max(0, sent - len(length)) :])
        theirs = self._pipe.recv()
        return self.spent.over(started, theirs)

    def close(self) -> None:
        self._pipe.send(None)
        self._socket.close()
        self._process.join()


class Framed:
    """Frames over a ZeromqTransport, sent as fast as it takes them."""

    def __init__(self, name: str, nixl: NixlSettings | None) -> None:
        self.spent = Spent()
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=receive_frames, args=(nixl, theirs), daemon=True)
        self._process.start()
        self._transport = ZeromqTransport("sender", nixl=nixl)
        self._transport.dial("peer:receiver", self._pipe.recv())
        deadline = time.monotonic() + WAIT_S
        while not any(isinstance(event, Up) for event in self._events()):
            assert time.monotonic() < deadline, f"{name}: the link doesn't come up"
            self._transport.wait(1.0)
        carrier = self._transport.carriers()["peer:receiver"]
        self.name = f"{name} ({carrier})"
        assert (nixl is not None) == carrier.startswith("nixl"), carrier

    def carry(self, count: int, payload: memoryview) -> Cost:
        head, made = head_of(len(payload)), self._transport.lend(len(payload))  # as a capture does
        made[:] = payload
        payload = made
        self._pipe.send(count)
        started = self.spent.begin()
        for _ in range(count):
            while not self._transport.send("peer:receiver", head, payload):
                self._transport.wait(1.0)
                self._events()
        return self.spent.over(started, self._answer())

    def idle(self, seconds: float) -> float:
        """Percent of one core that both ends take together; each is asked for its time by a frame."""
        before = self._times()
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self._transport.wait(left)
            self._events()
        return 100 * (self._times() - before) / seconds

    def _times(self) -> float:
        self._pipe.send(1)
        assert self._transport.send("peer:receiver", head_of(KIB), memoryview(bytearray(KIB)))
        return self._answer() + time.process_time()

    def _answer(self) -> float:
        while self._pipe.fileno() not in select.select([self._transport.fileno(), self._pipe.fileno()], [], [])[0]:
            self._events()
        return self._pipe.recv()

    def _events(self) -> list:
        events = self._transport.receive()
        assert not any(isinstance(event, Down) for event in events), events
        return events

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        self._transport.close()


def measure(carriers: list, sizes: tuple[int, ...], pairs: int, total_bytes: int) -> list[dict]:
    """One row per frame size and way."""
    rows = []
    for size in sizes:
        payload, count = memoryview(np.ones(size, np.uint8)), max(FRAMES_MIN, total_bytes // size)
        costs: dict[str, list[Cost]] = {carrier.name: [] for carrier in carriers}
        for pair in range(-1, pairs):  # the first only warms up
            for carrier in carriers if pair % 2 else tuple(reversed(carriers)):
                cost = carrier.carry(count, payload)
                if pair >= 0:
                    costs[carrier.name].append(cost)
        raw, gigabytes = costs[carriers[0].name], count * size / 1e9
        for name, found in costs.items():
            ratios = sorted(base.seconds / one.seconds for one, base in zip(found, raw, strict=True))
            rows.append({
                "frame_bytes": size, "way": name, "gb_s": gigabytes / statistics.median(one.seconds for one in found), "ratio": statistics.median(ratios),
                "ratio_low": ratios[0], "ratio_high": ratios[-1], "sender_s_per_gb": statistics.median(one.sender_s for one in found) / gigabytes,
                "receiver_s_per_gb": statistics.median(one.receiver_s for one in found) / gigabytes,
            })  # fmt: skip
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--megabytes", type=int, default=96, help="payload a run")
    parser.add_argument("--tls", action="append", help="UCX_TLS, once for each to be measured")
    parser.add_argument("--devices", default="lo", help="UCX_NET_DEVICES")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of nothing")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    carriers: list = [Raw(), Framed("bulk", None)]
    try:
        carriers += [Framed(f"nixl {tls}", NixlSettings(options.devices, tls)) for tls in options.tls or ("cma,tcp", "tcp")]
        rows = measure(carriers, SIZES, options.pairs, options.megabytes * 1_000_000)
        idle = {carrier.name: carrier.idle(options.idle) for carrier in carriers[1:]} if options.idle else {}
    finally:
        for carrier in carriers:
            carrier.close()
    if options.output == "json":
        print(json.dumps({"schema": "kvguard.bench_nixl/1", "rows": rows, "idle_percent": idle}))
        return 0
    print(f"{'frame':>9} {'way':<32} {'speed':>10} {'sender':>10} {'receiver':>9}   against raw TCP (median of {options.pairs} pairs, lowest, highest)")
    for row in rows:
        cores = " ".join(f"{row[f'{end}_s_per_gb']:.3f} s/GB" for end in ("sender", "receiver"))
        ratios = "  ".join(f"{row[key]:.2f}" for key in ("ratio", "ratio_low", "ratio_high"))
        print(f"{row['frame_bytes'] // KIB:>5} KiB {row['way']:<32} {row['gb_s']:>5.2f} GB/s {cores}   {ratios}")
    for name, percent in idle.items():
        print(f"idle, both ends: {name:<32} {percent:.2f} % of a core")
    return 0


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # no inherited contexts
    sys.exit(main())
