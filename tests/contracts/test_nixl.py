"""What only the channel over NIXL shows: whose memory a peer reaches, notes that lie, ways that don't carry, peers that are killed or stopped while they write
or are written to.

Knows: processes, signals, the channel's notes. Must not know: what frames mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import signal
import time

import numpy as np
import pytest
from msgspec import structs
from test_nixl_zone import late_write
from test_transport import DEADLINE_S, Other, Pair, Sockets, ids, kv, needs_nixl, number_of

from kvguard import config
from kvguard.config.daemons import NIXL_ZONE_BYTES_MIN
from kvguard.daemon.node import nixl_of
from kvguard.errors import BadConfig, BadFrame
from kvguard.limits import MIB
from kvguard.transport import greeting, nixl_notes
from kvguard.transport.accepting import Acceptor
from kvguard.transport.base import Broken, Down, Frame, Up
from kvguard.transport.nixl import ZONE_BYTES_MIN, NixlChannel
from kvguard.transport.nixl_agent import Agent, ChannelLost, NixlSettings, Registered, chosen, life_name, load
from kvguard.transport.nixl_notes import Landed
from kvguard.transport.nixl_zone import PAGE_BYTES, Lending, Zone, quarantined
from kvguard.transport.wakeup import Wakeup
from kvguard.transport.zeromq import ZeromqTransport

TCP, CMA = NixlSettings("lo", "tcp"), NixlSettings("lo", "cma,tcp")
WAYS = {"tcp": TCP, "cma": CMA}
FRAME_BYTES = MIB


# ---- settings --------------------------------------------------------------------------------------------------------------------


def test_devices_are_written_out_and_tcp_stays_at_home():
    NixlSettings("mlx5_0:1").check(insecure=False)
    TCP.check(insecure=False)
    NixlSettings("eth0", "tcp").check(insecure=True)
    for settings in (NixlSettings(""), NixlSettings("eth0", "rc,tcp"), NixlSettings("lo,eth0", "tcp")):
        with pytest.raises(BadConfig, match="Try: "):
            settings.check(insecure=False)


def test_settings_of_a_node_reach_its_transport(tmp_path):
    file = tmp_path / "node.toml"
    text = '[node]\nname = "a"\ntransport = "nixl"\nnixl_devices = "lo"\nnixl_tls = "cma,tcp"\n'
    file.write_text(text + 'nixl_zone_bytes = "64MiB"\nnixl_lent_bytes = "2MiB"\nnixl_stuck_ms = 2500\nnixl_quarantine_s = 60\n')
    assert nixl_of(config.load(config.NodeConfig, file, {}, {})) == NixlSettings("lo", "cma,tcp", 64 * MIB, 2 * MIB, 2500, quarantine_s=60)
    file.write_text(text)
    assert nixl_of(config.load(config.NodeConfig, file, {}, {})) == NixlSettings("lo", "cma,tcp"), "one default, said twice"
    assert NIXL_ZONE_BYTES_MIN >= ZONE_BYTES_MIN, "what the configuration lets through is what is used"
    for line, key in (("nixl_quarantine_s = 9", "nixl_quarantine_s"), ('nixl_zone_bytes = "24MiB"', "nixl_zone_bytes"), ("nixl_lent_bytes = 0", "nixl_lent_bytes")):
        file.write_text(text + line + "\n")
        with pytest.raises(BadConfig, match=rf"node.toml:6: {key}: .*Try: ."):
            config.load(config.NodeConfig, file, {}, {})


def test_what_ucx_chose_is_read_from_its_log():
    frame, logged, write = "[1.0] [vm:1:0]   ", [], "remote memory write by ucp_put*(multi) from host memory to host"
    for agent, where, name, rows in (
        ("kvg-1", "self cfg#0", write, ["0..inf | zero-copy | tcp/lo"]),
        ("kvg-1", "inter-node cfg#1", write, ["0..9 | short | ud/m:1", "10..inf | zero-copy | rc_mlx5/m:1"]),
        ("kvg-2", "intra-node cfg#1", "active message by ucp_am_send* from host memory", ["0..inf | short | tcp/lo"]),
    ):
        logged += ["+---+", f"| {agent} {where} |", f"| {name} |", "+---+", "| Range | Description | Config |", "+---+"]
        logged += [*(f"| {row} |" for row in rows), "+---+"]
    assert chosen("\n".join(frame + line for line in logged)) == {"kvg-1": "rc_mlx5/m:1"}


# ---- one process -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=WAYS, ids=str)
def world(request):
    made = Sockets(keyed=False, bulk=True, nixl=WAYS[request.param])
    yield made
    made.close()


@pytest.fixture
def pair(world):
    return Pair(world).up()


def channel_of(pair: Pair, link: str = "peer:a"):
    return (pair.b if link == "peer:a" else pair.a)._find(link).channel


def test_the_transport_that_ucx_chose_is_said(pair):
    expected = "nixl cma/memory" if pair.world.nixl is CMA else "nixl tcp/lo"
    assert pair.b.carriers() == {"peer:a": expected} and pair.a.carriers() == {pair.accepted: expected}
    assert load().version


def test_what_a_peer_is_told_reaches_its_zone_and_nothing_else(pair):
    """The zone is one of several pieces of memory that the agent has registered; the others (lent, own, a GPU's) are nobody's to write to."""
    writer, reader = channel_of(pair), channel_of(pair, pair.accepted)
    later = Zone(MIB)
    pair.a.register(later.address, later.size)
    told, source = writer._peer, writer._source.address
    others = (reader._lending.zone, reader._source, later)
    stranger = Agent(life_name(), pair.world.nixl)  # another one with the same metadata: nothing that was learnt by use
    stranger.register(source, writer._source.size)
    stranger.meet(told.agent, told.metadata)
    for agent in (writer._agent, stranger):
        for zone in others:
            for target in (zone.address, zone.address + zone.size - PAGE_BYTES):
                with pytest.raises(ChannelLost, match="NOT_FOUND"):
                    agent.write([(source, target, PAGE_BYTES)], b"")
        with pytest.raises(ChannelLost, match="NOT_FOUND"):
            agent.write([(source, told.address + told.pages * PAGE_BYTES - 8, PAGE_BYTES)], b"")
    stranger.close()
    assert not any(zone.bytes[:PAGE_BYTES].any() for zone in (others[0], later))
    carries(pair)  # with its zone it goes on


def test_each_life_of_a_link_has_an_agent_of_its_own(pair):
    names = {channel_of(pair)._agent.name, channel_of(pair, pair.accepted)._agent.name}
    for life in range(2):
        zones = {channel_of(pair, link)._landing.zone.address for link in ("peer:a", pair.accepted)}
        pair.a.hang_up(pair.accepted)
        pair.until(lambda life=life: len(pair.of(pair.b, Up)) == len(pair.of(pair.a, Up)) == life + 2, "up again")
        pair.accepted = pair.of(pair.a, Up)[-1].link
        names |= {channel_of(pair)._agent.name, channel_of(pair, pair.accepted)._agent.name}
        assert zones <= {address for address, _ in quarantined()}
    assert len(names) == 6 and not pair.b.counters.get("without_nixl")


def test_a_late_look_at_a_payload_outlives_its_link(pair):
    assert pair.b.send("peer:a", kv(1, FRAME_BYTES), memoryview(bytes([9]) * FRAME_BYTES))
    pair.until(lambda: pair.of(pair.a, Frame), "the frame")
    payload = pair.of(pair.a, Frame)[0].payload
    pair.world.stop(pair.b)
    del pair.events[pair.b]
    pair.until(lambda: pair.of(pair.a, Down), "the loss")
    assert bytes(payload) == bytes([9]) * FRAME_BYTES


@pytest.mark.parametrize("lie", ["sum", "life", "length", "number", "pages", "header"])
def test_a_note_that_lies_ends_the_link(pair, lie):
    channel = channel_of(pair)
    life, head = channel._peer.life, kv(1)
    if lie == "length":
        channel._agent.tell(b"x")
    elif lie == "header":
        channel.send(b"\0" * 64, None)
    else:
        number, first = (2 if lie == "number" else 1), (1 << 20 if lie == "pages" else 0)
        note = nixl_notes.pack(bytes(16) if lie == "life" else life, [Landed(number, first, 1, 0, len(head), 1)])
        for _ in range(2):  # the second one of number 2 is a repetition
            channel._agent.tell(note)
    pair.until(lambda: pair.of(pair.a, Broken) and pair.of(pair.a, Down) and pair.of(pair.b, Down), "both down")
    assert not pair.of(pair.a, Frame)
    pair.until(lambda: len(pair.of(pair.b, Up)) == len(pair.of(pair.a, Up)) == 2, "up again")


def test_pages_that_are_given_back_twice_end_the_link(pair):
    pair.a._find(pair.accepted).say(greeting.Returned((77,)))
    pair.until(lambda: pair.of(pair.b, Broken) and pair.of(pair.b, Down), "down")


def test_an_end_that_cannot_be_made_leaves_nothing(monkeypatch):
    """Memory that can't be registered (LimitMEMLOCK): it is tried again for as long as the daemon lives."""
    needs_nixl()
    lending, wakeup, made, closed = Lending(MIB), Wakeup(), [], []
    close = Zone.close

    def refused(agent: Agent, address: int, size: int) -> None:
        made.append((agent, address))
        raise ChannelLost("memory can't be registered")

    monkeypatch.setattr(Agent, "register", refused)
    monkeypatch.setattr(Zone, "close", lambda zone: (closed.append(zone.address), close(zone)))
    try:
        with pytest.raises(ChannelLost, match="registered"):
            NixlChannel(CMA, wakeup, lambda events: None, lambda message: None, MIB, lending)
        ((agent, address),) = made
        with pytest.raises(ChannelLost, match="closed"):
            agent.told()
        assert closed == [address]
    finally:
        for one in (lending, wakeup):
            one.close()


def test_what_the_peer_says_out_of_turn_or_of_no_address_is_its_fault():
    """A channel's BadFrame and OSError end its link; anything else would end the daemon."""
    needs_nixl()
    lending, wakeup = Lending(MIB), Wakeup()
    here, there = (NixlChannel(CMA, wakeup, lambda events: None, lambda message: None, MIB, lending) for _ in range(2))
    try:
        for said in (lambda: here.returned(greeting.Returned((1,))), here.start):
            with pytest.raises(BadFrame, match="has no pages"):
                said()
        for address in (-PAGE_BYTES, 0, 1 << 63, (1 << 64) - PAGE_BYTES):
            with pytest.raises(BadFrame, match="a zone at"):
                here.meet(structs.replace(there.zone(), address=address))
        here.meet(there.zone())
        assert here._place(1, 1) == 1, "the probe's page is nobody's until the peer has said that it is met: a frame there would be taken for a torn probe"
        with pytest.raises(BadFrame, match="has no pages"):
            here.returned(greeting.Returned((0,)))
    finally:
        for one in (here, there, lending, wakeup):
            one.close()


def test_what_a_peer_says_of_its_zone_takes_no_more_memory_here_than_was_configured():
    """A frame is copied to the same place of a zone of the writer's own: it was as large as the peer's, 64 GiB if that is what it said, and registered."""
    needs_nixl()
    lending, wakeup = Lending(MIB), Wakeup()
    here, there = (NixlChannel(CMA, wakeup, lambda events: None, lambda message: None, MIB, lending) for _ in range(2))
    try:
        with contextlib.suppress(ChannelLost):  # there isn't that much to write to
            here.meet(structs.replace(there.zone(), pages=1 << 24))
        assert here._source.size == CMA.zone_bytes
    finally:
        for one in (here, there, lending, wakeup):
            one.close()


def test_zones_of_different_sizes(world):
    """The writer uses the middle of the larger one, so that what it puts behind the middle comes back whatever the reader's user holds on to."""
    large, small = dataclasses.replace(world.nixl, zone_bytes=2 * world.nixl.zone_bytes), world.nixl

    def make(node: str) -> ZeromqTransport:
        world.nixl = {"a": large, "b": small}[node]
        return world.make(node)

    pair = Pair(world, make).up()
    writer, reader = channel_of(pair), channel_of(pair, pair.accepted)
    assert (writer._landing.zone.size, reader._landing.zone.size) == (small.zone_bytes, large.zone_bytes)
    assert reader._source.size == writer._source.size == small.zone_bytes
    size, count = 3 * MIB, 40  # all are kept: more than the half that may be handed over
    held = []
    for number in range(1, count + 1):
        assert pair.b.send("peer:a", kv(number, size), memoryview(bytes([number]) * size))
        pair.until(lambda number=number: len(pair.of(pair.a, Frame)) == number, "the frame to come")
        held.append(pair.of(pair.a, Frame)[-1].payload)
    assert [bytes(payload) for payload in held] == [bytes([number]) * size for number in range(1, count + 1)]
    assert pair.a.send(pair.accepted, kv(1, size), memoryview(bytes(size)))
    pair.until(lambda: pair.of(pair.b, Frame), "a frame the other way")


def test_who_says_that_he_is_ready_and_gave_no_zone_has_no_link(monkeypatch):
    monkeypatch.setattr(Acceptor, "_on_nixl", lambda self, link, message: link.say(greeting.Ready(True)))
    world = Sockets(keyed=False, bulk=True, nixl=CMA)
    try:
        pair = Pair(world)
        pair.until(lambda: any("Ready out of turn" in event.reason for event in pair.of(pair.b, Broken)), "it is refused")
        assert not pair.of(pair.b, Up)
    finally:
        world.close()


def test_what_the_peer_never_takes_ends_the_link_and_the_next_one_does_without(world):
    """Its process lives and answers on the control connection, but nobody turns it: the writer's own deadline."""
    pair, sent = Pair(world).up(), 0
    channel_of(pair)._settings = NixlSettings("lo", "tcp", stuck_ms=300, beat_ms=100)
    while not pair.of(pair.b, Down):
        sent += pair.b.send("peer:a", kv(sent + 1, FRAME_BYTES), memoryview(bytearray(FRAME_BYTES))) if sent < 64 else 0
        pair.b.wait(0.05)
        pair.turn(pair.b)
    assert sent and "nixl" in pair.of(pair.b, Down)[0].reason
    pair.until(lambda: len(pair.of(pair.b, Up)) == 2 and len(pair.of(pair.a, Up)) == 2, "up again")
    assert "tcp (not nixl: the peer took nothing for 300 ms; tried again at " in pair.of(pair.b, Up)[-1].carrier
    assert any("don't take nixl" in event.reason for event in pair.of(pair.b, Broken))
    carries(pair)


def test_a_write_that_is_never_done_ends_the_link_although_the_peer_is_heard(pair):
    """A way that carries what is small, and nothing of a payload."""
    writer, reader = channel_of(pair), channel_of(pair, pair.accepted)
    writer._settings, reader._settings = dataclasses.replace(writer._settings, stuck_ms=1000), dataclasses.replace(reader._settings, beat_ms=50)
    writer._agent.is_done = lambda write: False
    assert pair.b.send("peer:a", kv(1, FRAME_BYTES), memoryview(bytearray(FRAME_BYTES)))
    pair.until(lambda: pair.of(pair.b, Down), "the end")
    assert "the peer took nothing for 1000 ms" in pair.of(pair.b, Down)[0].reason


def test_a_payload_in_lent_memory_is_sent_from_there(pair):
    for number in range(1, 60):  # more than there is: what is not lent is copied
        payload = pair.b.lend(FRAME_BYTES)
        payload[:] = pattern(number)
        while not pair.b.send("peer:a", kv(number, FRAME_BYTES), payload):
            pair.turn()
        del payload
        pair.turn()
    pair.until(lambda: len(pair.of(pair.a, Frame)) == 59, "all of them")
    assert all(bytes(frame.payload) == pattern(number_of(frame)) for frame in pair.of(pair.a, Frame))
    assert not pair.of(pair.a, Broken)


def carries(pair: Pair) -> None:
    before = len(pair.of(pair.a, Frame))
    assert pair.b.send("peer:a", kv(1, FRAME_BYTES), memoryview(bytes([3]) * FRAME_BYTES))
    pair.until(lambda: len(pair.of(pair.a, Frame)) > before, "a frame")
    assert bytes(pair.of(pair.a, Frame)[-1].payload) == bytes([3]) * FRAME_BYTES


@pytest.mark.parametrize("without", ["dialling", "accepting"])
def test_a_peer_without_nixl_is_served_by_the_bulk_channel_loudly(without):
    world = Sockets(keyed=False, bulk=True, nixl=TCP)

    def made(node: str) -> ZeromqTransport:
        world.nixl = None if node == {"accepting": "a", "dialling": "b"}[without] else TCP
        return world.make(node)

    try:
        pair = Pair(world, made).up()
        a, b = pair.a, pair.b
        assert b.carriers() == {"peer:a": "tcp (not nixl: the peer has none)" if without == "accepting" else "tcp"} and b.has_bulk("peer:a")
        loud = a if without == "dialling" else b
        assert loud.counters == {"without_nixl": 1} and len(pair.of(loud, Broken)) == 1
        carries(pair)
    finally:
        world.close()


def test_settings_that_open_nothing_are_said_at_once():
    needs_nixl()
    transport = ZeromqTransport("a", nixl=NixlSettings("lo", "rc"))
    try:
        assert transport.counters == {"nixl_unfit": 1} and "opens no 'rc' on 'lo'" in transport.receive()[0].reason
    finally:
        transport.close()


@pytest.mark.parametrize("unfit", ["dialling", "accepting"])
def test_where_ucx_cannot_be_opened_the_bulk_channel_serves(unfit):
    """The settings were right when the transport was made; since then an adapter has gone."""
    world = Sockets(keyed=False, bulk=True, nixl=TCP)
    try:
        pair = Pair(world)
        broken = pair.b if unfit == "dialling" else pair.a
        use(broken, NixlSettings("lo", "rc"))
        pair.until(lambda: pair.of(pair.a, Up) and pair.of(pair.b, Up), "up")
        assert pair.b.carriers()["peer:a"].startswith("tcp (not nixl: ") and pair.b.counters["without_nixl"] == 1
        carries(pair)
    finally:
        world.close()


def use(transport: ZeromqTransport, nixl: NixlSettings) -> None:
    """As if what UCX can open had changed since the transport was made."""
    transport._shared.settings = dataclasses.replace(transport._shared.settings, nixl=nixl)


def test_nobody_is_woken_for_nothing(pair):
    """An idle link: what wakes its ends in two seconds can be counted on a few hands."""
    carries(pair)
    pair.events[pair.a].clear()
    gc.collect()
    turns, until = 0, time.monotonic() + 2.0
    while time.monotonic() < until:
        for transport in (pair.a, pair.b):
            if transport.wait(0.02):
                turns += 1
                pair.turn(transport)
    assert turns < 120
    carries(pair)


# ---- processes -------------------------------------------------------------------------------------------------------------------


def pattern(number: int) -> bytes:
    return (number.to_bytes(8, "little") * (FRAME_BYTES // 8))[:FRAME_BYTES]


def write_for_ever(pipe, sent, settings: NixlSettings) -> None:
    """The other process: dials, and sends frames whose bytes say their number, as fast as they are taken, in every life of the link."""
    transport = ZeromqTransport("b", nixl=settings)
    transport.dial("peer:a", pipe.recv())
    up, number = False, 0
    while not pipe.poll():
        transport.wait(0.001 if up else 0.05)
        for event in transport.receive():
            up = isinstance(event, Up) or up and not isinstance(event, Down)
        while up and transport.send("peer:a", kv(number + 1, FRAME_BYTES), memoryview(pattern(number + 1))):
            number += 1
            sent.value = number
            if not number % 8:
                break
    transport.close()


def read_for_ever(pipe, taken, settings: NixlSettings) -> None:
    """The other process: listens, and takes."""
    transport = ZeromqTransport("a", nixl=settings)
    pipe.send(transport.listen("tcp://127.0.0.1:0"))
    while not pipe.poll():
        transport.wait(0.05)
        taken.value += sum(isinstance(event, Frame) for event in transport.receive())
    transport.close()


def until(transport: ZeromqTransport, events: list, condition) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, [str(event)[:100] for event in events[-3:]]
        transport.wait(1.0)
        for event in transport.receive():
            if isinstance(event, Frame):  # what a frame says is looked at now: nobody keeps a hundred of them
                assert event.payload is None or bytes(event.payload) == pattern(number_of(event)), "torn"
                event = number_of(event)
            events.append(event)


def frames(events: list) -> list[int]:
    return [event for event in events if isinstance(event, int)]


def ups(events: list) -> int:
    return sum(isinstance(event, Up) for event in events)


def ahead(writer: Other, taken: int) -> None:
    """This side takes nothing meanwhile: until the writer has several frames under way, and goes on."""
    deadline = time.monotonic() + DEADLINE_S
    while writer.count.value < taken + 5:
        assert time.monotonic() < deadline, "the writer doesn't write"
        time.sleep(0.001)  # between two looks at a condition with a deadline


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_writer_killed_or_stopped_in_mid_write(way, blow):
    """What it had not finished is never seen, what it writes later lands nowhere."""
    needs_nixl()
    writer = Other(write_for_ever, WAYS[way])
    transport, events = ZeromqTransport("a", nixl=WAYS[way]), []
    try:
        writer.pipe.send(transport.listen("tcp://127.0.0.1:0"))
        until(transport, events, lambda: len(frames(events)) >= 20)
        zone = transport._acceptor.links[events[0].link].channel._landing.zone.address
        ahead(writer, len(frames(events)))
        writer.strike(blow)
        until(transport, events, lambda: any(isinstance(event, Down) for event in events))
        received = frames(events)
        assert received == list(range(1, len(received) + 1)), "in order, without a gap"
        assert zone in [address for address, _ in quarantined()] and late_write(zone) == errno.EFAULT
        if blow == signal.SIGSTOP:
            writer.strike(signal.SIGCONT)
            until(transport, events, lambda: ups(events) >= 2 and not isinstance(events[-1], Up))
            until(transport, events, lambda: len(frames(events)) >= len(received) + 20)
            again = frames(events)[len(received) :]
            assert again[0] > received[-1] and again == list(range(again[0], again[0] + len(again)))
            assert late_write(zone) == errno.EFAULT
    finally:
        writer.end()
        transport.close()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_reader_killed_or_stopped_in_mid_write(way, blow):
    """The writer knows in bounded time, keeps nothing, and goes on with a reader that comes back."""
    needs_nixl()
    reader = Other(read_for_ever, WAYS[way])
    transport, events = ZeromqTransport("b", nixl=WAYS[way]), []
    try:
        transport.dial("peer:a", reader.pipe.recv())
        until(transport, events, lambda: ups(events))
        sent = 0

        def push(condition) -> None:
            nonlocal sent
            deadline = time.monotonic() + DEADLINE_S
            while not condition():
                assert time.monotonic() < deadline
                if transport.send("peer:a", kv(sent + 1, FRAME_BYTES), memoryview(pattern(sent + 1))):
                    sent += 1
                else:
                    transport.wait(0.05)
                events.extend(transport.receive())

        push(lambda: reader.count.value >= 20)
        push(lambda: sent >= reader.count.value + 3)  # several are under way
        reader.strike(blow)
        push(lambda: any(isinstance(event, Down) for event in events))
        assert reader.count.value <= sent
        assert not transport.send("peer:a", kv(1, 8), memoryview(bytes(8))) and transport.queued_bytes("peer:a") == 0
        if blow == signal.SIGSTOP:
            reader.strike(signal.SIGCONT)
            until(transport, events, lambda: ups(events) == 2)
            before = reader.count.value
            push(lambda: reader.count.value >= before + 20)
            assert transport.send("peer:a", ids(1))
    finally:
        reader.end()
        transport.close()


def registered_payloads(world: Sockets, address: int, device: int | None) -> list[bytes]:
    """Three frames whose payloads lie at `address`, in registered memory, as they arrive."""
    pair = Pair(world)
    pair.b.register(address, 3 * FRAME_BYTES, device)
    pair.up()
    for number in range(3):
        assert pair.b.send("peer:a", kv(number + 1, FRAME_BYTES), Registered(address + number * FRAME_BYTES, FRAME_BYTES, device))
    pair.until(lambda: len(pair.of(pair.a, Frame)) == 3, "all three")
    assert [number_of(frame) for frame in pair.of(pair.a, Frame)] == [1, 2, 3] and not pair.of(pair.a, Broken)
    return [bytes(frame.payload) for frame in pair.of(pair.a, Frame)]


def test_payloads_in_registered_memory(world):
    memory = Zone(3 * FRAME_BYTES)
    memory.bytes[: 3 * FRAME_BYTES] = np.frombuffer(b"".join(map(pattern, range(3))), np.uint8)
    assert registered_payloads(world, memory.address, None) == [pattern(number) for number in range(3)]


def test_registered_payloads_take_no_other_way():
    world = Sockets(keyed=False, bulk=True)
    try:
        pair = Pair(world).up()
        assert not pair.b.send("peer:a", kv(1, FRAME_BYTES), Registered(4096, FRAME_BYTES, 0))
    finally:
        world.close()


@pytest.mark.gpu
def test_video_memory_goes_to_the_other_side_directly():
    cupy = pytest.importorskip("cupy", reason="GPUDirect needs a GPU and cupy")
    if not cupy.cuda.is_available():
        pytest.skip("GPUDirect needs a GPU: none is here")
    world = Sockets(keyed=False, bulk=True, nixl=NixlSettings("lo", "tcp,cuda_copy"))
    try:
        memory = cupy.asarray(np.frombuffer(b"".join(map(pattern, range(3))), np.uint8))
        assert registered_payloads(world, memory.data.ptr, 0) == [pattern(number) for number in range(3)]
    finally:
        world.close()
