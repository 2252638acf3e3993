"""What a channel over NIXL carries on this machine, against a raw TCP socket and the bulk channel of the same run, and what it costs while nothing is sent.

    python tools/bench_nixl.py [--seconds 60] [--pairs 8] [--megabytes 96] [--tls cma,tcp --tls tcp] [--devices lo] [--idle 6] [-o table|json]

Two processes on this host, alternating runs, every frame checked for its length. `ratio`: the median over pairs of (way / raw TCP of the same pair). Idle: the
processor time of both ends of a link that is up and carries nothing, in percent of one core, with a loop that waits for the transport's descriptor alone.
`itself`: the same bytes over NIXL with the least that can be done from Python: one write and one note a frame, no header, no sum, no queue, no link. What it
lacks against raw TCP is the library's; what a link lacks against it is kvguard's.
`sender`, `receiver`: processor time of each end for a gigabyte, medians. Two busy processes: with fewer than two idle cores the speeds are the scheduler's, and
the slower end's processor time says what could have been carried.

It ends within `--seconds`: every frame size has its share of them and as many pairs as fit (`pairs` of its row; --pairs at most, 1 at least), sizes for which
nothing is left are left out and named. Rows are printed as they are measured; what is being done stands on stderr.

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
from kvguard.transport.nixl_agent import Agent, NixlSettings, life_name
from kvguard.transport.nixl_zone import Zone
from kvguard.transport.zeromq import ZeromqTransport

LARGE_FIRST = (MIB, 4 * MIB, 256 * KIB, 64 * KIB)  # the sizes that have a target come first
FRAMES_MIN = 8
WAIT_S = 30.0
CLOSING_S = 2.0
BARE_BYTES = 32 * MIB  # of which half is used, as a link does
BARE_WRITES = 2  # under way, as a link has
BARE_LOOK_S = 0.001
PATIENT = {"greeting_ms": 15_000, "silence_ms": 5000}  # a busy machine is measured, not judged


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
    transport = ZeromqTransport("receiver", nixl=nixl, **PATIENT)
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


class BareEnd:
    """One end of NIXL itself: an agent, memory that the other end writes to, the other end's address of its own."""

    def __init__(self, settings: NixlSettings, pipe) -> None:
        self.agent, self.zone = Agent(life_name(), settings), Zone(BARE_BYTES)
        self.agent.register(self.zone.address, self.zone.size)
        pipe.send((self.agent.name, self.agent.metadata(self.zone.address, self.zone.size), self.zone.address))
        name, metadata, self.target = pipe.recv()
        self.agent.meet(name, metadata)

    def told(self) -> int:
        """Frames that the other end's new notes name."""
        return sum(int.from_bytes(note, "little") for notes in self.agent.told().values() for note in notes)

    def tell(self, frames: int) -> None:
        self.agent.tell(frames.to_bytes(4, "little"))

    def wait(self, *descriptors) -> list:
        return select.select([*self.agent.bells, *descriptors], [], [], BARE_LOOK_S)[0]


def receive_bare(settings: NixlSettings, pipe) -> None:
    end, left = BareEnd(settings, pipe), 0
    while True:
        frames = end.told()
        if frames:
            end.tell(frames)
            left -= frames
            if not left:
                pipe.send(time.process_time())
        elif pipe in end.wait(pipe):
            more = pipe.recv()
            if more is None:
                end.agent.close()
                return
            left += more


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


class Bare:
    """NIXL itself, one frame a write."""

    def __init__(self, name: str, settings: NixlSettings) -> None:
        self.spent, self.name = Spent(), f"itself ({name})"
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=receive_bare, args=(settings, theirs), daemon=True)
        self._process.start()
        self._end = BareEnd(settings, self._pipe)

    def carry(self, count: int, payload: memoryview) -> Cost:
        end, size, writes, sent, back = self._end, len(payload), [], 0, 0
        end.zone.bytes[:size] = payload
        places, note = BARE_BYTES // 2 // size, (1).to_bytes(4, "little")
        self._pipe.send(count)
        started = self.spent.begin()
        while back < count:
            while sent < min(count, back + places) and len(writes) < BARE_WRITES:
                writes.append(end.agent.write([(end.zone.address, end.target + sent % places * size, size)], note))
                sent += 1
            done = [write for write in writes if end.agent.is_done(write)]
            for write in done:
                writes.remove(write)
                end.agent.release(write)
            back += (told := end.told())
            if not done and not told:
                end.wait()
        return self.spent.over(started, self._pipe.recv())

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join()
        self._end.agent.close()


class Framed:
    """Frames over a ZeromqTransport, sent as fast as it takes them."""

    def __init__(self, name: str, nixl: NixlSettings | None) -> None:
        self.spent = Spent()
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = multiprocessing.Process(target=receive_frames, args=(nixl, theirs), daemon=True)
        self._process.start()
        self._transport = ZeromqTransport("sender", nixl=nixl, **PATIENT)
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


class Budget:
    """Seconds that a measurement may take, from now on."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self) -> float:
        return self._until - time.monotonic()


def progress(what: str, budget: Budget) -> None:
    print(f"bench_nixl: {what} ({budget.left():.0f} s left)", file=sys.stderr, flush=True)


def measure(carriers: list, size: int, pairs: int, total_bytes: int, budget: Budget) -> list[dict]:
    """Frames of one size, a row for each way: as many pairs as fit, at least one. The first round only warms up, and says how long one takes."""
    payload, count = memoryview(np.ones(size, np.uint8)), max(FRAMES_MIN, total_bytes // size)
    costs: dict[str, list[Cost]] = {carrier.name: [] for carrier in carriers}
    longest = 0.0
    for pair in range(-1, pairs):
        if pair > 0 and budget.left() < longest:
            break
        began = time.monotonic()
        for carrier in carriers if pair % 2 else tuple(reversed(carriers)):
            cost = carrier.carry(count, payload)
            if pair >= 0:
                costs[carrier.name].append(cost)
        longest = max(longest, time.monotonic() - began)
    raw, gigabytes, rows = costs[carriers[0].name], count * size / 1e9, []
    for name, found in costs.items():
        ratios = sorted(base.seconds / one.seconds for one, base in zip(found, raw, strict=True))
        rows.append({
            "frame_bytes": size, "way": name, "pairs": len(ratios), "gb_s": gigabytes / statistics.median(one.seconds for one in found),
            "ratio": statistics.median(ratios), "ratio_low": ratios[0], "ratio_high": ratios[-1],
            "sender_s_per_gb": statistics.median(one.sender_s for one in found) / gigabytes,
            "receiver_s_per_gb": statistics.median(one.receiver_s for one in found) / gigabytes,
        })  # fmt: skip
    return rows


def told(rows: list[dict]) -> None:
    for row in rows:
        cores = " ".join(f"{row[f'{end}_s_per_gb']:.3f} s/GB" for end in ("sender", "receiver"))
        ratios = "  ".join(f"{row[key]:.2f}" for key in ("ratio", "ratio_low", "ratio_high"))
        print(f"{row['frame_bytes'] // KIB:>5} KiB {row['way']:<32} {row['gb_s']:>5.2f} GB/s {cores}   {ratios}  ({row['pairs']})", flush=True)


def speeds(ways: dict[str, NixlSettings], options: argparse.Namespace, budget: Budget, say) -> tuple[list[dict], list[int]]:
    """Rows, and the sizes that there was no time for; `say` is told each size's rows when they are there."""
    rows, missed, carriers = [], [], []
    try:
        progress("links", budget)
        carriers += [Raw(), Framed("bulk", None)]
        carriers += [made(name, settings) for name, settings in ways.items() for made in (Framed, Bare)]
        for index, size in enumerate(LARGE_FIRST):
            if rows and budget.left() <= 0:
                missed.append(size)
                continue
            progress(f"frames of {size // KIB} KiB", budget)
            found = measure(carriers, size, options.pairs, options.megabytes * 1_000_000, Budget(budget.left() / (len(LARGE_FIRST) - index)))
            rows += found
            say(found)
    finally:
        for carrier in carriers:
            carrier.close()
    return rows, missed


def idles(ways: dict[str, NixlSettings], seconds: float, budget: Budget) -> dict[str, float]:
    """Percent of a core by way: each alone, because a process's time can't be told apart by link."""
    found = {}
    for name, settings in ways.items() if seconds else ():
        progress(f"{name}, idle", budget)
        carrier = Framed(name, settings)
        try:
            found[carrier.name] = carrier.idle(seconds)
        finally:
            carrier.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="how long it may take, the idle part in it")
    parser.add_argument("--pairs", type=int, default=8, help="at most")
    parser.add_argument("--megabytes", type=int, default=96, help="payload a run")
    parser.add_argument("--tls", action="append", help="UCX_TLS, once for each to be measured")
    parser.add_argument("--devices", default="lo", help="UCX_NET_DEVICES")
    parser.add_argument("--idle", type=float, default=6.0, help="seconds of nothing, for each way")
    parser.add_argument("-o", "--output", choices=("table", "json"), default="table")
    options = parser.parse_args()
    ways = {f"nixl {tls}": NixlSettings(options.devices, tls, stuck_ms=30_000) for tls in options.tls or ("cma,tcp", "tcp")}
    as_table = options.output == "table"
    whole = Budget(options.seconds)
    idle = idles(ways, options.idle, whole)
    if as_table:
        for name, percent in idle.items():
            print(f"idle, both ends: {name:<32} {percent:.2f} % of a core")
        print(f"{'frame':>9} {'way':<32} {'speed':>10} {'sender':>10} {'receiver':>9}   against raw TCP (median, lowest, highest of so many pairs)", flush=True)
    rows, missed = speeds(ways, options, Budget(whole.left() - CLOSING_S), told if as_table else lambda found: None)
    if as_table:
        for size in missed:
            print(f"{size // KIB:>5} KiB not measured: no time was left")
    else:
        print(json.dumps({"schema": "kvguard.bench_nixl/2", "rows": rows, "missed_frame_bytes": missed, "idle_percent": idle}))
    return 0


if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")  # no inherited contexts
    sys.exit(main())
