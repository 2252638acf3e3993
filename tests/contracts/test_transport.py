"""One suite for every transport: what base.py promises, over inproc, over ZeroMQ with and without keys, with and without the bulk channel, and with NIXL in
the bulk channel's place, over TCP and CMA.

Knows: base.Transport. Must not know: how an implementation keeps its promises (test_zeromq.py looks at sockets, keys and processes).
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import random
import select
import signal
import threading
import time
from collections.abc import Callable

import pytest

from kvguard.errors import BadFrame
from kvguard.format import messages, wire
from kvguard.limits import MIB
from kvguard.transport.base import Broken, Down, Frame, Up
from kvguard.transport.inproc import Network
from kvguard.transport.keys import Keys, generate
from kvguard.transport.nixl_agent import PACKAGES, NixlSettings
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import NO_EPOCH, Rank, StreamId

DEADLINE_S = 30
QUEUE_BYTES = 4 * MIB


def kv(number: int, payload_bytes: int = 0) -> bytes:
    return wire.encode(messages.KvFrame(1, NO_EPOCH, number, 0, (), (), (), (), (), (), b""), payload_bytes)


def ids(number: int) -> bytes:
    return wire.encode(messages.IdsFrame(1, NO_EPOCH, number, ()))


def number_of(frame: Frame) -> int:
    return wire.decode(frame.head)[0].number


def keys_of(*nodes: str) -> dict[str, Keys]:
    pairs = {node: generate() for node in nodes}
    public = {node: pair.public for node, pair in pairs.items()}
    return {node: Keys(pair.secret, pair.public, public) for node, pair in pairs.items()}


def needs_nixl() -> None:
    if not any(importlib.util.find_spec(package) for package in PACKAGES):
        assert not os.environ.get("KVGUARD_REQUIRE_ALL"), "nixl-cu12 isn't installed: tools/setup.sh test"
        pytest.skip("nixl-cu12 isn't installed. Try: tools/setup.sh test")


class Sockets:
    """Real transports; time is real."""

    def __init__(self, keyed: bool, bulk: bool, nixl: NixlSettings | None = None):
        if nixl is not None:
            needs_nixl()
        self.bulk, self.nixl = bulk, nixl
        self.keys = keys_of("a", "b", "c") if keyed else {}
        self.opened: list[ZeromqTransport] = []

    def make(self, node: str) -> ZeromqTransport:
        patience = {"greeting_ms": 15_000, "silence_ms": 5000} if self.nixl is not None else {}  # what a busy machine makes late is not NIXL's fault
        self.opened.append(ZeromqTransport(node, self.keys.get(node), bulk=self.bulk, queue_bytes_max=QUEUE_BYTES, nixl=self.nixl, **patience))
        return self.opened[-1]

    def address(self, node: str) -> str:
        return "tcp://127.0.0.1:0"

    def turn(self) -> None:
        """Wait for one of the descriptors alone: a transport that forgets to ring fails here."""
        assert select.select([transport.fileno() for transport in self.opened], [], [], DEADLINE_S)[0], "nobody was woken"

    def stop(self, transport: ZeromqTransport) -> None:
        self.opened.remove(transport)
        transport.close()

    def close(self) -> None:
        for transport in self.opened:
            transport.close()


class Simulated:
    """Transports of a Network; time is virtual."""

    bulk = True

    def __init__(self):
        self.network = Network(random.Random(1), queue_bytes_max=QUEUE_BYTES)

    def make(self, node: str):
        return self.network.join(node)

    def address(self, node: str) -> str:
        return f"inproc://{node}"

    def turn(self) -> None:
        due = self.network.next_ns()
        self.network.advance(max(self.network.now_ns + 1000, due if due is not None else 0))

    def stop(self, transport) -> None:
        transport.close()

    def close(self) -> None:
        """Nothing is open."""


WORLDS = {
    "inproc": Simulated,
    "zeromq": lambda: Sockets(keyed=False, bulk=False),
    "zeromq-bulk": lambda: Sockets(keyed=False, bulk=True),
    "zeromq-keys": lambda: Sockets(keyed=True, bulk=False),
    "zeromq-keys-bulk": lambda: Sockets(keyed=True, bulk=True),
    "nixl-tcp": lambda: Sockets(keyed=False, bulk=True, nixl=NixlSettings("lo", "tcp")),
    "nixl-cma-keys": lambda: Sockets(keyed=True, bulk=True, nixl=NixlSettings("lo", "cma,tcp")),
}


class Pair:
    """Node b dials node a; events are kept by node. `make`: how the world makes each of them, where they differ."""

    def __init__(self, world, make: Callable[[str], object] | None = None):
        self.world, make = world, make or world.make
        self.a, self.b = make("a"), make("b")
        self.events: dict[object, list] = {self.a: [], self.b: []}
        self.address = self.a.listen(world.address("a"))
        self.b.dial("peer:a", self.address)
        self.accepted = ""

    def turn(self, *transports) -> None:
        for transport in transports or list(self.events):
            self.events[transport] += transport.receive()

    def until(self, condition, what: str, *transports) -> None:
        """Turns of `transports` (all by default) until `condition`."""
        deadline = time.monotonic() + DEADLINE_S
        self.turn(*transports)
        while not condition():
            assert time.monotonic() < deadline, f"never: {what}; {self.tail()}"
            self.world.turn()
            self.turn(*transports)

    def up(self) -> Pair:
        self.until(lambda: self.of(self.a, Up) and self.of(self.b, Up), "both up")
        self.accepted = self.of(self.a, Up)[-1].link
        return self

    def of(self, transport, kind) -> list:
        return [event for event in self.events[transport] if isinstance(event, kind)]

    def tail(self) -> str:
        return str([[type(event).__name__ + ":" + str(event)[:80] for event in events[-3:]] for events in self.events.values()])


class Other:
    """A process that is stopped, killed, and ended. `target(pipe, count, *arguments)` runs in it; `count` is shared memory."""

    def __init__(self, target, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.count = context.Value("q", 0)
        self.process = context.Process(target=target, args=(theirs, self.count, *arguments))
        self.process.start()
        theirs.close()

    def strike(self, blow: int) -> None:
        os.kill(self.process.pid, blow)

    def end(self) -> None:
        self.pipe.close()
        if self.process.is_alive():
            self.strike(signal.SIGCONT)
        self.process.kill()
        self.process.join()


@pytest.fixture(params=WORLDS, ids=str)
def world(request):
    made = WORLDS[request.param]()
    yield made
    made.close()


@pytest.fixture
def pair(world):
    return Pair(world).up()


def test_up_names_the_peer_where_keys_prove_it(pair):
    named = isinstance(pair.world, Simulated) or bool(pair.world.keys)
    assert [up[:2] for up in pair.of(pair.b, Up)] == [("peer:a", "a" if named else "")]
    assert pair.of(pair.a, Up)[0].node == ("b" if named else "")
    assert pair.accepted.startswith("in:")


def test_small_and_large_frames_both_ways_in_order(pair):
    """Per message type: KV frames without payload stay in line with those that have one."""
    sizes = [0, 1, 100, 70_000, MIB, 3]
    sent = {pair.a: 0, pair.b: 0}
    links = {pair.a: pair.accepted, pair.b: "peer:a"}
    total = 240
    while min(sent.values()) < total:
        for transport, link in links.items():
            number = sent[transport] + 1
            if number > total:
                continue
            size = sizes[number % len(sizes)]
            payload = memoryview(bytearray([number % 251]) * size) if size else None
            if transport.send(link, kv(number, size), payload):
                assert not number % 2 or transport.send(link, ids(number)) or pair.world  # may be refused at the bound; order is what counts
                sent[transport] = number
            else:
                pair.world.turn()
        pair.turn()
    for transport in links:
        pair.until(lambda transport=transport: sum(wire.may_carry_payload(frame.head) for frame in pair.of(transport, Frame)) == total, "all KV frames")
        frames = pair.of(transport, Frame)
        numbers = [number_of(frame) for frame in frames if wire.may_carry_payload(frame.head)]
        assert numbers == list(range(1, total + 1))
        others = [number_of(frame) for frame in frames if not wire.may_carry_payload(frame.head)]
        assert others == sorted(others) and others
        for frame in frames:
            if frame.payload is not None:
                assert bytes(frame.payload) == bytes([number_of(frame) % 251]) * sizes[number_of(frame) % len(sizes)]
                frame.payload[0] = 7  # writable, and the receiver's own
        assert not pair.of(transport, Down) and not pair.of(transport, Broken)


def test_send_without_a_link_keeps_nothing(pair):
    assert not pair.b.send("peer:nobody", ids(1))
    assert not pair.a.send("in:nobody", kv(1, 3), memoryview(bytearray(3)))


def test_nothing_is_sent_before_up(world):
    transport = world.make("b")
    transport.dial("peer:a", "tcp://127.0.0.1:1" if isinstance(world, Sockets) else "inproc://a")
    assert not transport.send("peer:a", ids(1))
    transport.receive()
    assert not transport.send("peer:a", ids(1))


@pytest.mark.parametrize("size", [None, 256 * 1024])
def test_a_peer_that_reads_nothing_fills_a_bound(pair, size):
    """`a` isn't read from: what `b` may queue is bounded in bytes, and everything that was taken arrives once it is."""
    taken = 0
    payload = memoryview(bytearray(size)) if size else None
    body = kv if size else lambda number, _: wire.encode(messages.StreamEnd(StreamId("i", Rank(0, 0, 0), number), NO_EPOCH, "x" * 60_000))
    refusals = 0
    while refusals < 50:
        if pair.b.send("peer:a", body(taken + 1, size or 0), payload):
            taken, refusals = taken + 1, 0
        else:
            refusals += 1
        pair.turn(pair.b)
        assert taken * (size or 60_000) < QUEUE_BYTES + 64 * MIB, "no bound"
    assert taken * (size or 60_000) > QUEUE_BYTES / 2
    pair.until(lambda: len(pair.of(pair.a, Frame)) == taken, f"all {taken} frames")
    assert not pair.of(pair.b, Down)
    pair.until(lambda: pair.b.send("peer:a", ids(1)), "room again")


def test_broken_frames_are_reported_and_the_link_goes_on(pair):
    good, junk = ids(1), [b"", b"x", b"KVG1" + bytes(20), ids(1)[:-1], ids(1) + b"x", os.urandom(4000), wire.PREFIX.pack(b"KVG1", 1, 0, 1 << 31, 1 << 31, 0)]
    for part in junk:
        assert pair.b.send("peer:a", part)
    assert pair.b.send("peer:a", wire.encode(messages.NodeWelcome("c"), 5), memoryview(bytearray(9)))  # says 5, carries 9
    assert pair.b.send("peer:a", good)
    pair.until(lambda: pair.of(pair.a, Frame), "the good frame")
    assert len(pair.of(pair.a, Broken)) == len(junk) + 1
    assert [frame.head for frame in pair.of(pair.a, Frame)] == [good]
    assert not pair.of(pair.a, Down)


def test_hang_up_is_seen_by_the_peer_alone(pair):
    pair.b.hang_up("peer:a")
    pair.until(lambda: pair.of(pair.a, Down), "a sees it")
    assert not pair.of(pair.b, Down)
    assert not pair.b.send("peer:a", ids(1)) and not pair.a.send(pair.accepted, ids(1))


def test_the_accepting_side_hangs_up(pair):
    """The dialling side sees Down, and dials again: that is its job."""
    pair.a.hang_up(pair.accepted)
    assert not pair.a.send(pair.accepted, ids(1))
    pair.until(lambda: pair.of(pair.b, Down) and len(pair.of(pair.b, Up)) == 2 and len(pair.of(pair.a, Up)) == 2, "down and up again")
    assert not pair.of(pair.a, Down)


def test_a_restarted_peer_is_found_again(pair):
    for life in range(3):
        pair.world.stop(pair.a)
        del pair.events[pair.a]
        pair.until(lambda life=life: len(pair.of(pair.b, Down)) == life + 1, "the loss")
        assert not pair.b.send("peer:a", ids(1))
        pair.a = pair.world.make("a")
        pair.events[pair.a] = []
        assert pair.a.listen(pair.address) == pair.address
        pair.until(lambda life=life: len(pair.of(pair.b, Up)) == life + 2 and pair.of(pair.a, Up), "up again")
        assert pair.b.send("peer:a", ids(life + 1))
        pair.until(lambda: pair.of(pair.a, Frame), "a frame in the new life")
    kinds = [type(event) for event in pair.events[pair.b]]
    assert kinds == [Up, Down] * 3 + [Up]


def test_dial_is_idempotent_and_another_address_replaces(pair):
    pair.b.dial("peer:a", pair.address)
    c = pair.world.make("a" if isinstance(pair.world, Sockets) else "c")  # with keys, who answers to "peer:a" must be a
    pair.events[c] = []
    there = c.listen(pair.world.address("c"))
    pair.b.dial("peer:a", there)
    pair.until(lambda: pair.of(c, Up) and pair.of(pair.a, Down) and len(pair.of(pair.b, Up)) == 2, "moved")
    assert pair.b.send("peer:a", ids(9))
    pair.until(lambda: pair.of(c, Frame), "the frame at the new address")
    assert len(pair.of(pair.b, Down)) == 1


def test_close_leaves_nothing_behind(world):
    if isinstance(world, Simulated):
        pytest.skip("a simulated transport has no descriptors")
    fds, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(5):
        pair = Pair(world).up()
        assert pair.b.send("peer:a", kv(1, 1000), memoryview(bytearray(1000)))
        world.stop(pair.b)
        world.stop(pair.a)
    assert len(os.listdir("/proc/self/fd")) == fds and threading.active_count() == threads


def test_damage_is_found_by_the_header_checksum():
    head = bytearray(ids(1))
    head[-1] ^= 1
    with pytest.raises(BadFrame):
        wire.check(bytes(head))


# ---- the simulation's faults -----------------------------------------------------------------------------------------------------


def simulated_pair(**faults) -> Pair:
    world = Simulated()
    pair = Pair(world).up()
    for name, value in faults.items():
        setattr(world.network.between("b", "a"), name, value)
    return pair


def test_inproc_reset_loses_the_frame_with_its_link():
    pair = simulated_pair(reset=1.0)
    assert not pair.b.send("peer:a", ids(1))
    pair.until(lambda: pair.of(pair.a, Down) and pair.of(pair.b, Down), "both down")
    assert not pair.of(pair.a, Frame) and pair.world.network.between("b", "a").fired["reset"] == 1
    pair.world.network.between("b", "a").reset = 0.0
    pair.until(lambda: len(pair.of(pair.a, Up)) == 2, "dialled again")


def test_inproc_duplicates_and_corruption_fire():
    pair = simulated_pair(duplicate=1.0, corrupt_payload=1.0)
    assert pair.b.send("peer:a", kv(1, 100), memoryview(bytes(100)))
    pair.until(lambda: len(pair.of(pair.a, Frame)) == 2, "the frame and its duplicate")
    assert all(sum(bin(byte).count("1") for byte in frame.payload) == 1 for frame in pair.of(pair.a, Frame))
    pair = simulated_pair(corrupt_head=1.0)
    for number in range(1, 50):
        assert pair.b.send("peer:a", ids(number))
    pair.until(lambda: len(pair.of(pair.a, Frame)) + len(pair.of(pair.a, Broken)) == 49, "all of them, damaged")
    for frame in pair.of(pair.a, Frame):
        with pytest.raises(BadFrame):
            wire.decode(frame.head)


def test_inproc_one_way_cut_falls_silent_on_both_sides_or_heals_in_time():
    pair = simulated_pair(cut=True)
    network = pair.world.network
    assert pair.b.send("peer:a", ids(1)) and pair.a.send(pair.accepted, ids(2))
    network.advance(network.now_ns + 1)
    network.advance(network.now_ns + network.silence_ns // 2)
    pair.turn()
    assert not pair.of(pair.a, Frame) and pair.of(pair.b, Frame)
    network.partition("b", "a", cut=False)
    pair.until(lambda: pair.of(pair.a, Frame), "late, not lost")
    network.partition("b", "a", both=False)
    assert pair.b.send("peer:a", ids(3))
    pair.until(lambda: pair.of(pair.a, Down) and pair.of(pair.b, Down), "silence")
    assert [number_of(frame) for frame in pair.of(pair.a, Frame)] == [1]


def test_inproc_same_seed_same_deliveries():
    def story(seed: int) -> list:
        world = Simulated()
        world.network.random = random.Random(seed)
        pair = Pair(world).up()
        fault = world.network.between("b", "a")
        fault.jitter_ns, fault.duplicate, fault.corrupt_head, fault.reset = 5_000_000, 0.1, 0.1, 0.02
        for number in range(1, 300):
            pair.b.send("peer:a", kv(number, 4) if number % 3 else ids(number), memoryview(bytes(4)) if number % 3 else None)
            world.network.advance(world.network.now_ns + 1_000_000)
            pair.turn()
        return [(type(event).__name__, str(event[:2]), bytes(event.payload or b"") if isinstance(event, Frame) else b"") for event in pair.events[pair.a]]

    assert story(5) == story(5) != story(6)
