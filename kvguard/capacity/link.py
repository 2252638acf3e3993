"""What a link carries, against a raw TCP socket of the same run: frames between two processes, in alternating pairs.

Knows: the sending halves of the three ways, their receiver (receiver.py). Must not know: streams, cores.
Invariants: every way is measured with the same frames between the same two processes, warmed up first; a ratio is taken within a pair, never across; the clock
is this process's alone, from before the first frame to the receiver's word that it has them all.

raw: sendmsg of [length, payload] on a blocking socket. bulk: kvguard's frames over the bulk channel. control: the same frames over ZeroMQ alone. Two busy
processes on one machine: with fewer than two idle cores the figures are the scheduler's.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

from kvguard.capacity.receiver import CONNECT_S, LENGTH
from kvguard.errors import TimedOut, Unreachable
from kvguard.format import messages, wire
from kvguard.limits import KIB, MIB
from kvguard.transport.base import Down, Up
from kvguard.transport.keys import Keys
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import NO_EPOCH

SIZES = (64 * KIB, 256 * KIB, 1 * MIB, 4 * MIB)
WAYS = ("raw", "bulk", "control")
FRAMES_MIN = 8
ECHOES = 200


def head_of(payload_bytes: int) -> bytes:
    """A realistic header: 64 pieces with a sum for each of 16 tokens."""
    column = tuple(range(1000, 1064))
    return wire.encode(messages.KvFrame(1, NO_EPOCH, 1, 0, column, column, (16,) * 64, column, column, (0,) * 64, bytes(8 * 16 * 64)), payload_bytes)


class Conversation:
    """With a receiver at tcp://HOST:PORT. Raises Unreachable."""

    def __init__(self, address: str) -> None:
        host, _, port = address.removeprefix("tcp://").rpartition(":")
        self.host, self.address = host.strip("[]"), address
        try:
            self._socket = socket.create_connection((self.host, int(port)), CONNECT_S)
        except OSError as error:
            raise Unreachable(f"nobody answers at {address}: {error}. Try: kvguard bench --listen {address} on that host") from error
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._lines = self._socket.makefile("rwb")
        self.greeting = self._hear()

    def ask(self, way: str, frames: int, frame_bytes: int) -> None:
        self._lines.write(json.dumps({"way": way, "frames": frames, "bytes": frame_bytes}).encode() + b"\n")
        self._lines.flush()

    def answered(self) -> None:
        """Waits for the receiver's word that it has everything."""
        self._hear()

    def _hear(self) -> dict:
        try:
            line = self._lines.readline()
            return json.loads(line)
        except TimeoutError as error:
            raise TimedOut(f"{self.address} gave no answer within {CONNECT_S:g} s. Try: fewer bytes, or look at the network") from error
        except (OSError, ValueError) as error:
            raise Unreachable(f"{self.address} is no receiver, or went away. Try: kvguard bench --listen {self.address} on that host") from error

    def fileno(self) -> int:
        return self._socket.fileno()

    def round_trip_us(self) -> float:
        """Median of ECHOES."""
        took = []
        for _ in range(ECHOES):
            started = time.perf_counter()
            self.ask("echo", 1, 1)
            self.answered()
            took.append(time.perf_counter() - started)
        return statistics.median(took) * 1e6

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Raw:
    """The comparison."""

    def __init__(self, conversation: Conversation) -> None:
        self._conversation = conversation
        conversation.ask("raw", 1, 1)
        self._socket = socket.create_connection((conversation.host, conversation.greeting["raw"]), CONNECT_S)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.sendall(LENGTH.pack(1) + b"\0")
        conversation.answered()

    def carry(self, count: int, payload: memoryview) -> float:
        """Seconds for `count` frames."""
        length = LENGTH.pack(len(payload))
        self._conversation.ask("raw", count, len(payload))
        started = time.monotonic()
        for _ in range(count):
            sent = self._socket.sendmsg([length, payload])
            if sent < len(length):
                self._socket.sendall(length[sent:])
                sent = len(length)
            if sent < len(length) + len(payload):
                self._socket.sendall(payload[sent - len(length) :])
        self._conversation.answered()
        return time.monotonic() - started

    def close(self) -> None:
        self._socket.close()


class Framed:
    """Frames over a ZeromqTransport, sent as fast as it takes them. Raises Unreachable where the link doesn't come up, BadConfig for keys that can't fit."""

    def __init__(self, conversation: Conversation, way: str, keys: Keys | None, insecure: bool) -> None:
        self._conversation, self._way = conversation, way
        greeting, host = conversation.greeting, conversation.host
        self._link = f"peer:{greeting['name']}"
        self._transport = ZeromqTransport((keys.own_name() if keys is not None else "") or "sender", keys, insecure, bulk=way == "bulk")
        try:
            self._transport.expect(self._link)
            self._transport.dial(self._link, f"tcp://{f'[{host}]' if ':' in host else host}:{greeting[way]}")
            conversation.ask(way, 1, MIB)  # the receiver turns while the link comes up
            self._come_up()
            assert self._transport.send(self._link, head_of(MIB), memoryview(bytearray(MIB)))
            self._until_answered()
        except BaseException:
            self._transport.close()
            raise

    def _come_up(self) -> None:
        deadline = time.monotonic() + CONNECT_S
        while not any(isinstance(event, Up) for event in self._events()):
            if time.monotonic() > deadline:
                raise Unreachable(f"no {self._way} link to {self._conversation.address} within {CONNECT_S:g} s. Try: let the five ports from there on in")
            self._transport.wait(1.0)
        if self._way == "bulk" and not self._transport.has_bulk(self._link):
            raise Unreachable(f"the bulk port of {self._conversation.address} can't be reached. Try: let the five ports from there on in")

    def carry(self, count: int, payload: memoryview) -> float:
        head = head_of(len(payload))
        self._conversation.ask(self._way, count, len(payload))
        started = time.monotonic()
        for _ in range(count):
            while not self._transport.send(self._link, head, payload):
                self._transport.wait(1.0)
                self._events()
        self._until_answered()
        return time.monotonic() - started

    def _until_answered(self) -> None:
        while self._conversation.fileno() not in select.select([self._transport.fileno(), self._conversation.fileno()], [], [])[0]:
            self._events()
        self._conversation.answered()

    def _events(self) -> list:
        events = self._transport.receive()
        down = next((event for event in events if isinstance(event, Down)), None)
        if down is not None:
            raise Unreachable(f"the {self._way} link to {self._conversation.address} was lost: {down.reason}. Try: again")
        return events

    def close(self) -> None:
        self._transport.close()


@contextlib.contextmanager
def loopback() -> Iterator[str]:
    """A receiver in a process of its own on this machine; its address."""
    with subprocess.Popen([sys.executable, "-m", "kvguard.capacity.receiver"], stdout=subprocess.PIPE, text=True) as process:
        try:
            address = process.stdout.readline().strip()
            if not address:
                raise Unreachable(f"the receiving process ended with {process.wait()} (see above). Try: again")
            yield address
            process.wait(CONNECT_S)  # it ends with its conversation
        finally:
            if process.poll() is None:
                process.terminate()


def measure(
    address: str, sizes: tuple[int, ...] = SIZES, pairs: int = 12, total_bytes: int = 192_000_000, keys: Keys | None = None, insecure: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict:  # fmt: skip
    """{"to", "round_trip_us", "rows": one per frame size}. A row's `ratio`: the median over pairs of bulk / raw TCP of the same pair.

    Raises Unreachable, TimedOut.
    `total_bytes`: payload of each way in each pair; `say`: told before each step.
    """
    import numpy as np

    conversation = Conversation(address)
    carriers: dict[str, Raw | Framed] = {}
    rows = []
    try:
        say("round trip")
        round_trip_us = conversation.round_trip_us()
        carriers["raw"] = Raw(conversation)
        for way in WAYS[1:]:
            carriers[way] = Framed(conversation, way, keys, insecure)
        for size in sizes:
            payload, count = memoryview(np.ones(size, np.uint8)), max(FRAMES_MIN, total_bytes // size)
            speeds: dict[str, list[float]] = {way: [] for way in WAYS}
            for pair in range(-1, pairs):  # the first only warms up
                for way in WAYS if pair % 2 else tuple(reversed(WAYS)):
                    say(f"frames of {size // KIB} KiB, {way}")
                    speed = count * size / carriers[way].carry(count, payload) / 1e9
                    if pair >= 0:
                        speeds[way].append(speed)
            ratios = sorted(bulk / raw for bulk, raw in zip(speeds["bulk"], speeds["raw"], strict=True))
            row = {"frame_bytes": size, "frames": count, "pairs": pairs, "ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1]}
            rows.append(row | {f"{way}_gb_s": statistics.median(speeds[way]) for way in WAYS})
    finally:
        for carrier in carriers.values():
            carrier.close()
        conversation.close()
    return {"to": address, "round_trip_us": round_trip_us, "rows": rows}
