"""Frames that go over NIXL together: one write, one note; and free pages that are told of together.

Knows: the channel's writes and notes. Must not know: what frames mean.
"""

from __future__ import annotations

import dataclasses
import errno

import numpy as np
import pytest
from msgspec import structs
from test_nixl import CMA, FRAME_BYTES, TCP, channel_of, pattern
from test_nixl_zone import late_write
from test_transport import Pair, Sockets, kv, number_of

from kvguard.errors import BadFrame
from kvguard.limits import KIB, MIB
from kvguard.transport import greeting, nixl, nixl_notes
from kvguard.transport.base import Broken, Down, Frame, Up
from kvguard.transport.nixl import TOGETHER_BYTES, WRITES_MAX, NixlChannel
from kvguard.transport.nixl_agent import Registered
from kvguard.transport.nixl_notes import FRAMES_MAX, LIFE_BYTES, RECORD_BYTES, Landed
from kvguard.transport.nixl_zone import PAGE_BYTES, Zone, quarantined

LIFE = bytes(range(LIFE_BYTES))


def test_a_note_says_what_was_packed_and_nothing_else_is_one():
    frames = [Landed(number, 3 * number, 2, 5000, 100, (1 << 64) - number) for number in range(1, FRAMES_MAX + 1)]
    assert nixl_notes.unpack(LIFE, nixl_notes.pack(LIFE, frames)) == frames
    whole = nixl_notes.pack(LIFE, frames[:2])
    for note in (b"", whole[:-1], whole + b"x", nixl_notes.pack(LIFE, [*frames, frames[0]])):
        with pytest.raises(BadFrame, match="a note of"):
            nixl_notes.unpack(LIFE, note)
    with pytest.raises(BadFrame, match="another life"):
        nixl_notes.unpack(LIFE, whole[:RECORD_BYTES] + nixl_notes.pack(bytes(LIFE_BYTES), frames[1:2]))


@pytest.fixture(params={"tcp": TCP, "cma": CMA}.items(), ids=lambda way: way[0])
def world(request):
    made = Sockets(keyed=False, bulk=True, nixl=request.param[1])
    yield made
    made.close()


@pytest.fixture
def pair(world):
    return Pair(world).up()


class Written:
    """What a channel writes, as its notes say: lists of Landed. `cut`: what is left of a write's parts and note, where it isn't all."""

    def __init__(self, channel: NixlChannel):
        self.notes: list[list[Landed]] = []
        self.cut = None
        self._life, self._write = channel._peer.life, channel._agent.write
        channel._agent.write = self.write

    def write(self, parts, note, device=None):
        if note:
            self.notes.append(nixl_notes.unpack(self._life, note))
        return self._write(*(self.cut(parts, note) if self.cut is not None else (parts, note)), device)

    def numbers(self) -> list[list[int]]:
        return [[frame.number for frame in note] for note in self.notes]


def send(pair: Pair, numbers, size: int = FRAME_BYTES) -> None:
    for number in numbers:
        assert pair.b.send("peer:a", kv(number, size), memoryview(pattern(number)[:size]))


def seen(pair: Pair) -> list[int]:
    """Numbers of all frames that have come, whose bytes are theirs; each is looked at once, and dropped."""
    numbers = pair.__dict__.setdefault("numbers", [])
    for frame in pair.of(pair.a, Frame):
        numbers.append(number_of(frame))
        assert frame.payload == pattern(numbers[-1])[: len(frame.payload)], "torn"
    pair.events[pair.a] = [event for event in pair.events[pair.a] if not isinstance(event, Frame)]
    return numbers


def gathered(pair: Pair, written: Written, count: int, size: int = 100 * KIB) -> None:
    """Send `count` frames of which the last ones go together: places are taken by writes whose end this side doesn't ask for meanwhile."""
    channel = channel_of(pair)
    settle, channel._settle = channel._settle, lambda: False
    send(pair, range(1, count + 1), size)
    assert len(channel._queue) == count - WRITES_MAX and written.numbers() == [[number] for number in range(1, WRITES_MAX + 1)], "at once, and alone"
    channel._settle = settle


@pytest.mark.parametrize("size", [1000, 100 * KIB, FRAME_BYTES])
def test_frames_go_at_once_while_little_is_under_way_and_together_after_that(pair, size):
    written, count = Written(channel_of(pair)), min(3 * FRAMES_MAX, 4 * MIB // size + WRITES_MAX - 1)
    gathered(pair, written, count, size)
    pair.until(lambda: len(seen(pair)) == count, "all of them: nobody sends again, nobody pushes")
    assert seen(pair) == list(range(1, count + 1)) and sum(written.numbers(), []) == seen(pair)
    assert max(map(len, written.notes)) == min(FRAMES_MAX, count - WRITES_MAX)
    for note in written.notes:
        assert len(note) == 1 or sum(frame.payload_bytes + frame.head_bytes for frame in note) <= TOGETHER_BYTES
    assert not pair.of(pair.a, Broken) and channel_of(pair).queued_bytes == 0


def test_a_write_has_bounded_bytes(pair, monkeypatch):
    monkeypatch.setattr(nixl, "TOGETHER_BYTES", 350 * KIB)
    written = Written(channel_of(pair))
    gathered(pair, written, 11)
    pair.until(lambda: len(seen(pair)) == 11, "all of them")
    assert seen(pair) == list(range(1, 12)) and max(map(len, written.notes)) == 3


@pytest.mark.parametrize("said", [1, 0, -7, 3, 1 << 40])
def test_no_note_names_more_than_the_peer_reads(world, monkeypatch, said):
    """1 is what a peer says, by not saying it, of a version that reads one frame from a note."""
    zone = NixlChannel.zone
    monkeypatch.setattr(NixlChannel, "zone", lambda channel: structs.replace(zone(channel), frames=said))
    pair = Pair(world).up()
    written = Written(channel_of(pair))
    gathered(pair, written, 12)
    pair.until(lambda: len(seen(pair)) == 12, "all of them")
    assert seen(pair) == list(range(1, 13)) and max(map(len, written.notes)) == {3: 3, 1 << 40: 10}.get(said, 1)


def test_a_zone_of_a_version_without_the_field_is_read():
    zone = greeting.Zone("agent", b"metadata", 1 << 20, 8192, LIFE, 32)
    packed = greeting._encoder.encode(["Zone", *structs.astuple(zone)[:-1]])
    assert greeting.unpack(greeting.MAGIC + packed) == structs.replace(zone, frames=1)


def test_registered_memory_goes_alone_and_in_its_turn(pair):
    memory = Zone(FRAME_BYTES)
    memory.bytes[:FRAME_BYTES] = np.frombuffer(pattern(4), np.uint8)
    pair.b.register(memory.address, FRAME_BYTES)
    channel = channel_of(pair)
    settle, channel._settle = channel._settle, lambda: False
    send(pair, (1, 2, 3), 100 * KIB)
    assert pair.b.send("peer:a", kv(4, FRAME_BYTES), Registered(memory.address, FRAME_BYTES, None))
    send(pair, (5, 6), 100 * KIB)
    channel._settle = settle
    pair.until(lambda: len(seen(pair)) == 6, "all of them")
    assert seen(pair) == [1, 2, 3, 4, 5, 6] and not pair.of(pair.a, Broken)


# ---- what goes wrong ---------------------------------------------------------------------------------------------------------------


def test_of_frames_whose_note_is_lost_none_is_seen_and_none_behind_them(pair):
    written = Written(channel_of(pair))
    gathered(pair, written, 8)
    written.cut = lambda parts, note: (parts, b"" if len(note) > RECORD_BYTES else note)
    pair.until(lambda: any(len(note) > 1 for note in written.notes), "several that go together")
    written.cut = None
    last = written.notes[-1][-1].number
    send(pair, [last + 1], 100 * KIB)
    reader = channel_of(pair, pair.accepted)
    pair.until(lambda: list(reader._early) == [last + 1], "the one behind them waits for them")
    assert seen(pair) == [1, 2]
    zone, reader._settings = reader._landing.zone.address, dataclasses.replace(reader._settings, stuck_ms=300)
    pair.until(lambda: len(pair.of(pair.b, Up)) == 2 and len(pair.of(pair.a, Up)) == 2, "up again")
    assert "the note of frame 3 has been missing for 300 ms" in pair.of(pair.a, Down)[0].reason
    assert seen(pair) == [1, 2] and zone in [address for address, _ in quarantined()]
    send(pair, [9], 100 * KIB)
    pair.until(lambda: seen(pair) == [1, 2, 9], "the next life begins with what is sent in it")


def test_of_frames_whose_writer_ends_halfway_none_is_seen_and_all_their_pages_are_quarantined(pair):
    written, reader = Written(channel_of(pair)), channel_of(pair, pair.accepted)
    gathered(pair, written, 8)
    written.cut = lambda parts, note: (parts[: len(parts) // 2], b"") if len(note) > RECORD_BYTES else (parts, note)
    pair.until(lambda: any(len(note) > 1 for note in written.notes) and not channel_of(pair)._writes, "half of them is written")
    pair.until(lambda: seen(pair) == [1, 2], "those before them")
    torn = written.notes[-1]
    half = torn[0]  # its bytes have landed, and say nothing
    assert bytes(reader._landing.zone.bytes[half.first * PAGE_BYTES :][: half.payload_bytes]) == pattern(half.number)[: half.payload_bytes]
    zone, size = reader._landing.zone.address, reader._landing.zone.size
    pair.world.stop(pair.b)
    del pair.events[pair.b]
    pair.until(lambda: pair.of(pair.a, Down), "the loss")
    assert seen(pair) == [1, 2]
    assert (zone, size) in quarantined()
    assert [late_write(zone + frame.first * PAGE_BYTES) for frame in torn] == [errno.EFAULT] * len(torn)


@pytest.mark.parametrize("lie", ["torn", "pages of another", "twice"])
def test_one_frame_that_lies_ends_the_link_and_none_that_came_with_it_is_seen(pair, lie):
    channel = channel_of(pair)
    life = channel._peer.life
    written = Written(channel)
    gathered(pair, written, 4)

    def lying(parts, note):
        frames = nixl_notes.unpack(life, note)
        if len(frames) > 1:
            frames[-1] = {
                "torn": frames[-1]._replace(head_sum=1), "pages of another": frames[-1]._replace(first=frames[0].first), "twice": frames[0],
            }[lie]  # fmt: skip
        return parts, nixl_notes.pack(life, frames)

    written.cut = lying
    pair.until(lambda: pair.of(pair.a, Broken) and pair.of(pair.a, Down) and pair.of(pair.b, Down), "both down")
    assert max(map(len, written.notes)) > 1 and set(seen(pair)) <= {1, 2}
    pair.until(lambda: len(pair.of(pair.b, Up)) == len(pair.of(pair.a, Up)) == 2, "up again")


# ---- pages that come back ----------------------------------------------------------------------------------------------------------


def returned(pair: Pair) -> list[tuple[int, ...]]:
    """The messages that name free pages, from now on."""
    said, link = [], pair.a._find(pair.accepted)
    say = link.nixl._say
    link.nixl._say = lambda message: (said.append(message.numbers) if isinstance(message, greeting.Returned) else None, say(message))
    return said


def push(pair: Pair, count: int) -> None:
    """Frames of 1 MiB, each dropped when it has come: all pages become free."""
    for number in range(1, count + 1):
        while not pair.b.send("peer:a", kv(number, FRAME_BYTES), memoryview(pattern(number))):
            pair.turn()
        pair.until(lambda number=number: seen(pair)[-1:] == [number], "the frame")


def test_free_pages_are_told_of_a_quarter_of_the_zone_at_a_time(pair, monkeypatch):
    monkeypatch.setattr(nixl, "RETURN_NS", 10**15)
    said, landing, writer = returned(pair), channel_of(pair, pair.accepted)._landing, channel_of(pair)
    push(pair, 40)
    pages = 257  # of each
    assert said and all(4 * pages * len(numbers) >= landing.pages for numbers in said)
    assert sum(said, ()) == tuple(range(1, len(sum(said, ())) + 1))
    assert 4 * pages * writer._extents.taken() <= landing.pages + 8 * pages, "what is not told of is less than that, and the last ones"


def test_the_last_free_pages_are_told_of_soon(pair):
    said, writer = returned(pair), channel_of(pair)
    push(pair, 3)
    pair.until(lambda: not writer._extents.taken(), "all pages are free again, with nothing sent")
    assert sorted(sum(said, ())) == [1, 2, 3]
