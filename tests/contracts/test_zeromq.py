"""What only real sockets show: strangers at every port, keys, peers that are killed or stopped, many connections, the bulk channel's tickets.

Knows: ports, processes, signals. Must not know: what frames mean.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import stat
import time

import numpy as np
import pytest
import zmq
from test_transport import DEADLINE_S, Other, Pair, Sockets, ids, keys_of, kv

from kvguard import errors
from kvguard.format import wire
from kvguard.limits import HEADER_BYTES_MAX, MIB, PAYLOAD_BYTES_MAX
from kvguard.transport import bulk, keys
from kvguard.transport.base import Broken, Down, Frame, Up
from kvguard.transport.memory import KEPT_BYTES_MAX, PayloadMemory
from kvguard.transport.zeromq import ZeromqTransport, is_local


@pytest.fixture(params=[False, True], ids=["plain", "keys"])
def world(request):
    made = Sockets(keyed=request.param, bulk=True)
    yield made
    made.close()


@pytest.fixture
def pair(world):
    return Pair(world).up()


def port_of(address: str) -> int:
    return int(address.rpartition(":")[2])


def bulk_port(transport: ZeromqTransport) -> int:
    return transport._acceptor._port.port


def still_carries(pair: Pair, number: int = 77) -> None:
    assert pair.b.send("peer:a", kv(number, 100_000), memoryview(bytearray(100_000)))
    pair.until(lambda: any(frame.payload is not None and len(frame.payload) == 100_000 for frame in pair.of(pair.a, Frame)), "a frame on the old link")
    assert not pair.of(pair.a, Down) and not pair.of(pair.b, Down)


@pytest.mark.parametrize("rubbish", [b"GET / HTTP/1.0\r\n\r\n", bytes(200), b"\xff" * 100_000, b"KVGB" + bytes(40), b"KV", os.urandom(64)], ids=range(6))
def test_garbage_on_both_ports_harms_nobody(pair, rubbish):
    for port in (port_of(pair.address), bulk_port(pair.a)):
        seen = len(pair.of(pair.a, Broken))
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            with contextlib.suppress(OSError):  # it may hang up on us before we have finished
                stranger.sendall(rubbish)
                stranger.shutdown(socket.SHUT_WR)
            pair.until(lambda seen=seen: len(pair.of(pair.a, Broken)) > seen, "a report of it")
    assert sum(pair.a.refusals.values()) >= 2 and set(pair.a.refusals) <= {"127.0.0.1", "?"}  # "?": gone before it could be asked
    still_carries(pair)


def test_two_hundred_silent_strangers(pair):
    strangers = [socket.create_connection(("127.0.0.1", port)) for port in (port_of(pair.address), bulk_port(pair.a)) for _ in range(100)]
    still_carries(pair)
    pair.until(lambda: sum(pair.a.refusals.values()) >= 200, "all were shown the door")
    for stranger in strangers:
        stranger.close()
    still_carries(pair)


def test_two_hundred_connects_leave_nothing(pair):
    gc.collect()  # what earlier tests dropped in cycles must not go between two counts
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        transport = pair.world.make("c")
        pair.events[transport] = []
        transport.dial("peer:a", pair.address)
        pair.until(lambda transport=transport: pair.of(transport, Up), "up")
        assert not transport.counters, "the first attempt counts: a swallowed edge of a descriptor showed as a stalled greeting, once in a hundred"
        pair.world.stop(transport)
        del pair.events[transport]
    pair.until(lambda: len(pair.of(pair.a, Down)) == 200, "all downs")
    assert len(os.listdir("/proc/self/fd")) == before and len(pair.of(pair.a, Up)) == 201
    assert not pair.of(pair.b, Down)


def test_claims_over_the_bounds_reserve_nothing(pair):
    """On the bulk channel: the link goes down before a byte of the claim is reserved."""
    channel = pair.b._dialled["peer:a"].link.channel
    for header_bytes, payload_bytes in ((HEADER_BYTES_MAX + 1, 0), (1, PAYLOAD_BYTES_MAX + 1)):
        assert channel is not None
        channel._socket.sendall(wire.PREFIX.pack(b"KVG1", 1, 0, header_bytes, payload_bytes, 0) + bytes(100))
        pair.until(lambda: pair.of(pair.a, Down) and pair.of(pair.b, Down), "both down")
        assert "over the bounds" in pair.of(pair.a, Broken)[-1].reason
        pair.until(lambda: len(pair.of(pair.a, Up)) == len(pair.of(pair.a, Down)) + 1 == len(pair.of(pair.b, Up)), "up again")
        channel = pair.b._dialled["peer:a"].link.channel


@pytest.mark.parametrize("junk", [os.urandom(500), b"KVG1" + bytes(40), None], ids=["random", "empty prefix", "bad checksum"])
def test_garbage_on_an_open_bulk_channel_downs_the_link(pair, junk):
    good = kv(1, 8)
    pair.b._dialled["peer:a"].link.channel._socket.sendall(junk or good[:-1] + bytes([good[-1] ^ 1]) + bytes(8))
    pair.until(lambda: pair.of(pair.a, Down) and pair.of(pair.b, Down), "both down")
    assert pair.of(pair.a, Broken) and not pair.of(pair.a, Frame)
    pair.until(lambda: len(pair.of(pair.b, Up)) == 2, "up again")


def test_a_ticket_opens_once_and_expires(world):
    claimed, refused = [], []
    transport = world.make("a")
    wakeup = transport._shared.wakeup
    port = bulk.BulkPort("127.0.0.1", 0, wakeup, lambda owner, connection: claimed.append((owner, connection)), lambda address, reason: refused.append(reason))
    strangers = []

    def knock(ticket: bytes, condition) -> None:
        strangers.append(socket.create_connection(("127.0.0.1", port.port)))
        strangers[-1].sendall(bulk.MAGIC + ticket)
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline and wakeup.wait(DEADLINE_S)
            for call, events in wakeup.ready():
                call(events)

    try:
        ticket = port.offer("me", 10**12)
        wrong = ticket[:-1] + bytes([ticket[-1] ^ 1])
        knock(wrong, lambda: len(refused) == 1)
        knock(ticket, lambda: len(refused) == 2)  # a wrong guess used it up
        ticket = port.offer("me", 10**12)
        knock(ticket, lambda: len(claimed) == 1)
        knock(ticket, lambda: len(refused) == 3)
        knock(port.offer("me", 0), lambda: len(refused) == 4)
        ticket = port.offer("gone", 10**12)
        port.withdraw("gone")
        knock(ticket, lambda: len(refused) == 5)
        assert claimed[0][0] == "me"
    finally:
        for opened in strangers + [connection for _, connection in claimed]:
            opened.close()
        port.close()


def test_without_a_bulk_port_payloads_take_the_control_connection(world):
    def made(node: str) -> ZeromqTransport:
        world.bulk = node == "b"
        return world.make(node)

    pair = Pair(world, made).up()
    assert not pair.b.has_bulk("peer:a")
    still_carries(pair)


def test_payload_memory_is_reused_only_when_nobody_looks():
    memory = PayloadMemory()
    first, second = memory.take(MIB), memory.take(MIB)
    place = np.frombuffer(first, np.uint8).ctypes.data
    kept = first[5:9]
    del first
    kept[:] = b"mine"
    third = memory.take(MIB)
    third[:] = second[:] = bytes(MIB)
    assert bytes(kept) == b"mine"
    del kept
    again = memory.take(MIB - 5)
    assert len(again) == MIB - 5 and np.frombuffer(again, np.uint8).ctypes.data == place
    held = [memory.take(MIB) for _ in range(100)]
    assert memory.kept_bytes <= KEPT_BYTES_MAX and len(held) == 100
    del held, second, third, again
    assert len(memory.take(8 * MIB)) == 8 * MIB and memory.kept_bytes <= KEPT_BYTES_MAX
    assert len(memory.take(0)) == 0


# ---- keys ------------------------------------------------------------------------------------------------------------------------


def refused(dialling: ZeromqTransport, listening: ZeromqTransport, condition) -> None:
    """`dialling` tries, in vain, until `condition` of the listening side's events."""
    address, events, theirs = listening.listen("tcp://127.0.0.1:0"), [], []
    dialling.dial("peer:a", address)
    deadline = time.monotonic() + DEADLINE_S
    while not condition(events):
        assert time.monotonic() < deadline, events
        listening.wait(0.05)
        events += listening.receive()
        theirs += dialling.receive()
    assert not [event for event in events + theirs if isinstance(event, (Up, Frame))]
    listening.close()
    dialling.close()


def test_an_unlisted_key_is_refused_and_counted():
    known, stranger = keys_of("a", "b"), keys.generate()
    a = ZeromqTransport("a", known["a"])
    b = ZeromqTransport("b", keys.Keys(stranger.secret, stranger.public, known["b"].allowed))
    refused(b, a, lambda events: a.counters.get("key_refused"))
    assert a.refusals["127.0.0.1"] >= 1


def test_a_wrong_server_key_is_refused():
    known, other = keys_of("a", "b"), keys.generate()
    b = ZeromqTransport("b", keys.Keys(known["b"].secret, known["b"].public, {"a": other.public}))
    refused(b, ZeromqTransport("a", known["a"]), lambda events: any(isinstance(event, Broken) for event in events))


def test_plaintext_to_a_keyed_port_and_the_reverse():
    known = keys_of("a", "b")
    refused(ZeromqTransport("b"), ZeromqTransport("a", known["a"]), lambda events: any(isinstance(event, Broken) for event in events))
    refused(ZeromqTransport("b", known["b"]), ZeromqTransport("a"), lambda events: any(isinstance(event, Broken) for event in events))


def test_a_listed_key_under_another_listed_name_is_refused():
    known = keys_of("a", "b")
    refused(ZeromqTransport("a", known["b"]), ZeromqTransport("a", known["a"]), lambda events: any("claims to be" in str(event) for event in events))


def test_a_foreign_dealer_gets_nowhere(pair):
    """ZeroMQ without our greeting: wrong part counts, giant parts, frames before a greeting."""
    if pair.world.keys:
        pytest.skip("it wouldn't get through the handshake")
    context = zmq.Context()
    try:
        with context.socket(zmq.DEALER) as foreign:
            foreign.linger = 1000
            foreign.connect(pair.address)
            for parts in ([b""], [b"x"] * 50, [ids(1)], [b"KVGT"], [b"KVGT" + bytes(2000)], [kv(1, 8), bytes(8)]):
                foreign.send_multipart(parts)
            foreign.send(bytes(PAYLOAD_BYTES_MAX + HEADER_BYTES_MAX))
            pair.until(lambda: pair.a.counters.get("broken") == 2 and pair.a.counters.get("stray", 0) >= 3, "all of it")
    finally:
        context.destroy(linger=0)
    assert not pair.of(pair.a, Frame)
    still_carries(pair)


def test_off_loopback_needs_keys_or_the_word():
    assert is_local("tcp://127.0.0.1:1") and is_local("tcp://[::1]:1") and is_local("ipc:///x")
    assert not is_local("tcp://*:1") and not is_local("tcp://0.0.0.0:1") and not is_local("tcp://127.evil.example:1")
    transport = ZeromqTransport("a")
    for call in (transport.listen, lambda address: transport.dial("peer:b", address)):
        with pytest.raises(errors.BadConfig, match="Try: "):
            call("tcp://192.0.2.1:5")
    transport.close()
    insecure = ZeromqTransport("a", insecure=True)
    assert insecure.listen("tcp://0.0.0.0:0").startswith("tcp://0.0.0.0:")
    with pytest.raises(errors.BadConfig, match="Try: "):
        insecure.listen("tcp://127.0.0.1:notaport")
    insecure.close()


def test_key_files(tmp_path):
    made = keys_of("a", "b")["a"]
    path = tmp_path / "key"
    keys.save(made, path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert keys.load(path) == made and made.own_name() == "a" and made.secret.decode() not in repr(made)
    with pytest.raises(errors.BadConfig, match="exists"):
        keys.save(made, path)
    path.chmod(0o644)
    with pytest.raises(errors.BadConfig, match="chmod 600"):
        keys.load(path)
    path.chmod(0o600)
    path.write_text(f"public {made.public.decode()}\nsecret short\nallow b\nfoo\n")
    with pytest.raises(errors.BadConfig, match="line 2.*line 3.*line 4.*no line `secret"):
        keys.load(path)
    path.write_text(f"public {keys.generate().public.decode()}\nsecret {made.secret.decode()}\n")
    with pytest.raises(errors.BadConfig, match="doesn't belong"):
        keys.load(path)


# ---- processes -------------------------------------------------------------------------------------------------------------------


def serve(pipe, count) -> None:
    """The other process: echoes IDS frames until the pipe closes."""
    transport = ZeromqTransport("a")
    pipe.send(transport.listen("tcp://127.0.0.1:0"))
    while not pipe.poll():
        transport.wait(0.05)
        for event in transport.receive():
            if isinstance(event, Frame):
                assert transport.send(event.link, event.head)
    transport.close()


@pytest.mark.parametrize("bulk_wanted", [False, True])
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_killed_or_stopped_goes_down(blow, bulk_wanted):
    other = Other(serve)
    transport, events = ZeromqTransport("b", bulk=bulk_wanted), []

    def until(condition):
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, events
            transport.wait(1.0)
            events.extend(transport.receive())

    try:
        transport.dial("peer:a", other.pipe.recv())
        until(lambda: any(isinstance(event, Up) for event in events))
        assert transport.send("peer:a", ids(1))
        until(lambda: any(isinstance(event, Frame) for event in events))
        other.strike(blow)
        until(lambda: any(isinstance(event, Down) for event in events))
        assert not transport.send("peer:a", ids(2))
        if blow == signal.SIGSTOP:
            other.strike(signal.SIGCONT)
            until(lambda: sum(isinstance(event, Up) for event in events) == 2)
            assert transport.send("peer:a", ids(3))
            until(lambda: sum(isinstance(event, Frame) for event in events) == 2)
    finally:
        transport.close()
        other.end()
