"""Whoever can reach a port, and has no key, reads, changes and exhausts nothing: floods of connections, half-open ones, callers who never say who they are.

Knows: ports, sockets, descriptors. Must not know: what frames mean.
Every attack is shown to have reached its target, and peers that are up go on, and new ones come up, under it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time

import pytest
import zmq
from test_transport import DEADLINE_S, Pair, Sockets, ids, kv
from test_zeromq import bulk_port, port_of, still_carries

from kvguard.transport import accepting, bulk, shared
from kvguard.transport.base import Broken, Down, Up
from kvguard.transport.wakeup import Wakeup


@pytest.fixture(params=[False, True], ids=["plain", "keys"])
def pair(request):
    world = Sockets(keyed=request.param, bulk=True)
    yield Pair(world).up()
    world.close()


@contextlib.contextmanager
def strangers(port: int, count: int, says: bytes = b""):
    opened = []
    try:
        for _ in range(count):
            opened.append(socket.create_connection(("127.0.0.1", port), DEADLINE_S))
            if says:
                opened[-1].sendall(says)
        yield opened
    finally:
        for one in opened:
            one.close()


def another(pair: Pair):
    """A third node that dials a."""
    made = pair.world.make("c")
    pair.events[made] = []
    made.dial("peer:a", pair.address)
    return made


def test_a_queue_of_silent_strangers_at_the_bulk_port_keeps_no_peer_out(pair):
    """They hold every place for strangers and the kernel's queue behind them: whoever comes with a ticket is heard all the same, at once."""
    with strangers(bulk_port(pair.a), bulk.STRANGERS_MAX + 200):
        made = another(pair)
        pair.until(lambda: pair.of(made, Up), "up")
        assert made.has_bulk("peer:a") and not made.counters.get("without_bulk") and not made.counters.get("dial_failed")
        assert pair.a.refusals["127.0.0.1"] >= 200
        still_carries(pair)


def test_at_the_limit_of_descriptors_nobody_spins_and_peers_go_on(pair, monkeypatch):
    """accept() that fails leaves the caller in the kernel's queue, and the descriptor readable: asking again at once would be a loop for ever."""
    port, tried = pair.a._acceptor._port, []
    real = port._socket

    class Exhausted:
        def accept(self):
            tried.append(time.monotonic_ns())
            raise OSError(errno.EMFILE, "Too many open files")

        def __getattr__(self, name):
            return getattr(real, name)

    port._socket = Exhausted()
    with strangers(bulk_port(pair.a), 3):
        pair.until(lambda: tried, "an accept that fails")
        turns, until = 0, time.monotonic() + 1.0
        while time.monotonic() < until:
            if pair.a.wait(until - time.monotonic()):
                turns += 1
                pair.turn(pair.a)
        assert len(tried) <= 15 and turns < 200
        still_carries(pair)
        port._socket = real
        before = sum(pair.a.refusals.values())
        pair.until(lambda: sum(pair.a.refusals.values()) >= before + 3, "they were let in, and shown the door")
    made = another(pair)
    pair.until(lambda: pair.of(made, Up), "up")
    assert made.has_bulk("peer:a")


def test_a_flood_of_connects_are_counted_and_hardly_spoken_of(pair):
    """A line of the log for each would fill the disk: some are told, the others are in the counters, and the next that is told says how many."""
    before, count = len(pair.of(pair.a, Broken)), 300
    for port in (bulk_port(pair.a), port_of(pair.address)):
        for _ in range(count // 25):
            with strangers(port, 25, b"GET / HTTP/1.0\r\n\r\n"):
                pair.turn()
    pair.until(lambda: sum(pair.a.refusals.values()) >= 2 * count, "all of them are counted")
    told = len(pair.of(pair.a, Broken)) - before
    assert told <= shared.TOLD_AT_ONCE + shared.TOLD_PER_S * DEADLINE_S < count
    assert pair.a.counters["refusals_untold"] >= 2 * count - told
    assert not pair.of(pair.a, Down)
    still_carries(pair)
    assert set(pair.a.refusals) <= {"127.0.0.1", "?"}


@pytest.mark.parametrize("greets", [False, True])
def test_who_shakes_hands_and_stays_is_cut_off(monkeypatch, greets):
    """ZeroMQ lets whoever finished its handshake stay for ever: callers who never greet, and those whose link is over and who don't go."""
    monkeypatch.setattr(accepting, "NOBODY_NS", 200_000_000)
    world = Sockets(keyed=False, bulk=False)
    context = zmq.Context()
    callers = [context.socket(zmq.DEALER) for _ in range(20)]
    try:
        pair = Pair(world).up()
        for number, caller in enumerate(callers):
            caller.linger, caller.reconnect_ivl = 0, -1
            caller.routing_id = f"evil#{1:016x}.{number}".encode()
            caller.connect(pair.address)
            if greets:  # each replaces the one before it, which stays
                caller.send(greet("evil"))
        acceptor = pair.a._acceptor
        pair.until(lambda: len(acceptor._callers) == 21 or pair.a.counters.get("cut", 0), "all have shaken hands")
        pair.until(lambda: pair.a.counters.get("cut", 0) == 20, "all are cut")
        pair.until(lambda: len(acceptor._callers) == 1, "and gone")
        assert not pair.of(pair.b, Down) and pair.b.send("peer:a", ids(1))
    finally:
        for caller in callers:
            caller.close()
        context.destroy(linger=0)
        world.close()


@contextlib.contextmanager
def greeting_callers(address: str, called: list[tuple[str, str]]):
    """Callers by (what the routing id begins with, what the greeting says)."""
    context = zmq.Context()
    callers = [context.socket(zmq.DEALER) for _ in called]  # one that nobody holds closes itself
    try:
        for number, (caller, (shown, said)) in enumerate(zip(callers, called, strict=True)):
            caller.linger, caller.reconnect_ivl = 0, -1
            caller.routing_id = f"{shown}#{1:016x}.{number}".encode()
            caller.connect(address)
            caller.send(greet(said))
        yield
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("pair", [False], indirect=True, ids=["plain"])
def test_links_are_bounded_and_those_that_are_there_go_on(pair, monkeypatch):
    monkeypatch.setattr(accepting, "LINKS_MAX", 4)
    with greeting_callers(pair.address, [(f"evil{number}", f"evil{number}") for number in range(8)]):
        pair.until(lambda: sum("more than 4 links" in event.reason for event in pair.of(pair.a, Broken)) == 5, "five are one too many")
        assert len(pair.a._acceptor.links) == 4
        still_carries(pair)


@pytest.mark.parametrize("pair", [False], indirect=True, ids=["plain"])
def test_who_greets_by_another_name_than_its_routing_id_shows_gets_no_link(pair):
    with greeting_callers(pair.address, [("other", "evil")]):
        pair.until(lambda: any("routing id and greeting differ" in event.reason for event in pair.of(pair.a, Broken)), "it is refused")
        assert len(pair.a._acceptor.links) == 1
        still_carries(pair)


def greet(node: str) -> bytes:
    from kvguard.transport import greeting

    return greeting.pack(greeting.Greet(greeting.VERSION, node, 1, "peer:a", False))


def test_a_knock_that_comes_in_pieces_is_heard_and_half_a_one_is_not():
    """Slow is not wrong; who never finishes has his place for a bounded time, or until others need it."""
    wakeup, claimed, refused = Wakeup(), [], []
    port = bulk.BulkPort("127.0.0.1", 0, wakeup, lambda owner, connection: claimed.append(connection), lambda address, reason: refused.append(reason))

    def until(condition) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline and wakeup.wait(DEADLINE_S)
            for call, events in wakeup.ready():
                call(events)

    try:
        knock = bulk.MAGIC + port.offer("me", 10**12)
        with strangers(port.port, 1) as (slow,), strangers(port.port, 1, knock[:20]) as (half,):
            for index in range(len(knock)):
                slow.sendall(knock[index : index + 1])
                until(lambda index=index: claimed or any(len(one.knock) == index + 1 for one in port._strangers.values()))
            until(lambda: claimed)
            port.tick(time.monotonic_ns() + bulk.STRANGER_WAIT_NS + 1)
            assert len(refused) == 1 and "no ticket in time" in refused[0]
            assert half.recv(1) == b""
    finally:
        for connection in claimed:
            connection.close()
        port.close()
        wakeup.close()


def test_a_peer_that_floods_leaves_room_for_the_others(pair):
    """One that is up and sends as fast as it can, garbage and frames; another one's frames come through, in turns."""
    made = another(pair)
    pair.until(lambda: pair.of(made, Up), "up")
    other = pair.of(pair.a, Up)[-1].link
    for number in range(400):
        made.send("peer:a", os.urandom(200))
        made.send("peer:a", kv(number, 300_000), memoryview(bytearray(300_000)))
    assert pair.b.send("peer:a", ids(5))
    pair.until(lambda: any(getattr(event, "head", b"") == ids(5) for event in pair.events[pair.a]), "the other's frame")
    assert not [down for down in pair.of(pair.a, Down) if down.link != other]
