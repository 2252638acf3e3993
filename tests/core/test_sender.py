"""Sender: event in, effects out."""

from __future__ import annotations

from itertools import count

import pytest

from kvguard.core.effects import Capture, FreeBuffer, Note, Send, SendIds, SendKv
from kvguard.core.events import Arrived, Captured, Cut, Grown, LinkDown, LinkUp, Looked, Opened, Tick
from kvguard.core.ledger import Ledger
from kvguard.core.sender import Sender, SenderSettings
from kvguard.format.messages import Ack, CutOp, Held, Hello, Holding, IdsFrame, KvFrame, OpenOp, ReleaseOp, StreamShape
from kvguard.types import NO_EPOCH, Epoch, Fork, Rank, StreamId

STREAM = StreamId("i", Rank(0, 0, 0), 7)
LINK = "peer:h"
OLD = (Fork(0, 0),)
S1, S2, S3 = (9 << 32 | number for number in (1, 2, 3))
MS = 1_000_000


class Pair:
    """A sender with its ledger; `step` checks invariants after each event."""

    def __init__(self, addressable: bool = True, window_bytes: int = 1 << 20) -> None:
        self.shape = StreamShape(1, 4, 10, 40, 64, addressable)
        self.ledger = Ledger(self.shape)
        self.sender = Sender(STREAM, self.ledger, "h", LINK, NO_EPOCH, count(1), count(1), SenderSettings("a", 9, window_bytes, 5000 * MS, 2000 * MS))
        self.now = 0

    def step(self, event) -> tuple:
        if type(event) is Looked:
            self.ledger.look(event)
        out = self.sender.step(self.now, event)
        self.sender.check()
        return out

    def say(self, message) -> tuple:
        return self.step(Arrived(LINK, message))

    def stream(self, *held, session: int = S1) -> tuple:
        """Link up and the holder's answer: (sequence, generation, lineage, position, ids) each."""
        self.step(LinkUp(LINK))
        return self.say(answer(session, *held))

    def captured(self, capture: Capture, *stale: int, buffer: int = 1) -> tuple:
        size = sum(c * 10 for index, (c, flag) in enumerate(zip(capture.counts, capture.flags, strict=True)) if flag != 1 and index not in stale)
        return self.step(Captured(capture.id, STREAM, capture.epoch, buffer, size, stale, b""))


def answer(session: int, *held, reason: str = "", epoch: Epoch = NO_EPOCH) -> Held:
    columns = tuple(zip(*held, strict=True)) or ((),) * 5
    return Held(session, epoch, Holding(STREAM, "replica", False, columns[0], columns[1], columns[2], columns[3], columns[4]), reason)


def look(row: int = 0, name: str = "s", generation: int = 5, blocks=(10, 11), committed: int = 6, ids: int = 7) -> Looked:
    generations = tuple(100 + block for block in blocks)
    return Looked(STREAM, (), (), (Opened(row, name, generation, OLD, b"r"),), (Grown(row, 0, tuple(blocks), generations),), (row,), (committed,), (ids,))


def more(committed: int, ids: int, row: int = 0) -> Looked:
    return Looked(STREAM, rows=(row,), committed=(committed,), ids=(ids,))


def test_probe_then_stream_ids_before_kv() -> None:
    pair = Pair()
    assert pair.step(look()) == ()
    assert pair.step(LinkUp(LINK)) == (Send(LINK, Hello(STREAM, S1, NO_EPOCH, "a", pair.shape)),)
    ids, capture = pair.say(answer(S1))
    assert ids == SendIds(LINK, IdsFrame(S1, NO_EPOCH, 1, (OpenOp(1, "s", 5, OLD, b"r"),), (1,), (0,), (7,)), STREAM, (0,), (5,))
    assert capture == Capture(1, STREAM, NO_EPOCH, (0, 0), (5, 5), (0, 4), (4, 2), (10, 11), (110, 111), (0, 0))
    assert pair.captured(capture) == (SendKv(LINK, KvFrame(S1, NO_EPOCH, 1, 1, (1, 1), (0, 4), (4, 2), (10, 11), (110, 111), (0, 0), b""), 1),)
    assert pair.say(Ack(S1, NO_EPOCH, 1, 1)) == ()
    assert pair.sender.caught_up() and list(pair.sender.flow.protected_ns) == [0]
    ids, capture = pair.step(more(7, 8))
    assert (ids.message.number, ids.message.starts, ids.message.counts, ids.message.after_kv) == (2, (7,), (1,), 0)
    assert (capture.starts, capture.counts, capture.blocks) == ((6,), (1,), (11,))
    assert pair.sender.flow.lag_tokens == 0
    pair.step(more(8, 9))
    assert pair.sender.flow.lag_tokens == 1, "position 7 was not acknowledged when the next was committed"


def test_held_with_the_same_generation_goes_on_where_it_stands() -> None:
    pair = Pair()
    pair.step(look())
    ids, capture = pair.stream(("s", 5, OLD, 5, 6), ("gone", 3, OLD, 4, 4))
    assert ids.message.ops == (OpenOp(1, "s", 5, OLD, b"r"), OpenOp(2, "gone", 3, OLD, b""), ReleaseOp(2))
    assert (ids.message.starts, ids.message.counts) == ((6,), (1,))
    assert (capture.starts, capture.counts) == ((5,), (1,))
    assert pair.sender.flow.copies[0].acked == 5


def test_held_beyond_what_is_committed_is_cut_by_name() -> None:
    pair = Pair()
    pair.step(look())
    (ids,) = pair.stream(("s", 5, OLD, 8, 9))
    assert ids.message.ops == (OpenOp(1, "s", 5, OLD, b"r"), CutOp(1, 6, 5, OLD))
    assert pair.sender.flow.copies[0].acked == 6


def test_held_of_another_generation_starts_over() -> None:
    pair = Pair()
    pair.step(look())
    ids, capture = pair.stream(("s", 4, OLD, 5, 6))
    assert ids.message.ops == (OpenOp(1, "s", 5, OLD, b"r"), CutOp(1, 0, 5, OLD))
    assert capture.starts == (0, 4) and pair.sender.flow.copies[0].acked == 0


def test_a_holder_that_returns_with_more_than_the_plan_kept_is_cut_at_the_fork() -> None:
    """Fault 28: it holds 8 positions of epoch 0; epoch 1 went on from 5."""
    new = (Fork(0, 0), Fork(1, 5))
    pair = Pair()
    pair.step(look(committed=8, ids=8))
    pair.step(Looked(STREAM, (), (Cut(0, 5, 6, new, 2),), (), (), (0,), (7,), (8,)))
    ids, capture = pair.stream(("s", 5, OLD, 8, 8))
    assert ids.message.ops == (OpenOp(1, "s", 5, OLD, b"r"), CutOp(1, 5, 6, new))
    assert ids.message.starts == (5,) and capture.starts == (5,)
    assert pair.sender.flow.copies[0].acked == 5


def test_lineage_decides_even_where_generations_agree() -> None:
    pair = Pair()
    pair.step(look())
    ids, capture = pair.stream(("s", 5, (Fork(0, 0), Fork(1, 3)), 6, 7))
    assert ids.message.ops == (OpenOp(1, "s", 5, (Fork(0, 0), Fork(1, 3)), b"r"), CutOp(1, 3, 5, OLD))
    assert capture.starts == (3, 4)


def test_refused_stream_says_why_and_tries_again_later() -> None:
    pair = Pair()
    pair.step(LinkUp(LINK))
    (note,) = pair.say(answer(S1, reason="shape differs"))
    assert (note.what, pair.sender.reason) == ("refused", "shape differs")
    assert pair.sender.next_deadline() == 5000 * MS
    pair.now = 5000 * MS
    assert pair.step(Tick()) == (Send(LINK, Hello(STREAM, S2, NO_EPOCH, "a", pair.shape)),)
    assert pair.sender.reason == "shape differs"


def test_no_answer_is_asked_again_in_a_fresh_session() -> None:
    pair = Pair()
    pair.step(LinkUp(LINK))
    pair.now = pair.sender.next_deadline()
    (send,) = pair.step(Tick())
    assert send.message.session == S2 and "no answer" in pair.sender.reason
    (note,) = pair.say(answer(S1))
    assert note.what == "stale_answer" and pair.sender.state == "probe"


def test_shared_blocks_travel_once() -> None:
    pair = Pair()
    pair.step(look(committed=8, ids=8))
    _, capture = pair.stream()
    ids, second = pair.step(look(1, "t", 9, (10, 12), 6, 6))
    assert capture.flags == (0, 0)
    assert (second.blocks, second.flags, second.counts) == ((10, 12), (1, 0), (4, 2))
    pair.captured(capture), pair.captured(second, buffer=2)
    pair.say(Ack(S1, NO_EPOCH, ids.message.number, 2))
    pair.step(Looked(STREAM, released=(0,)))
    pair.step(Looked(STREAM, released=(1,)))
    _, again = pair.step(look(2, "u", 12, (10,), 4, 4))
    assert again.flags == (0,), "nobody holds the block any more"


def test_tokens_that_have_no_address_travel_as_their_block() -> None:
    pair = Pair(addressable=False)
    pair.step(look())
    _, capture = pair.stream()
    assert capture.flags == (2, 2)
    pair.captured(capture)
    _, capture = pair.step(more(7, 8))
    assert (capture.starts, capture.counts, capture.flags) == ((6,), (1,), (2,))


def test_window_and_captures_are_bounded_and_small_backlogs_go_first() -> None:
    pair = Pair(window_bytes=80)
    pair.step(look(0, "long", 5, tuple(range(10)), 40, 40))
    pair.step(look(1, "short", 6, (20,), 2, 2))
    _, first = pair.stream()
    assert first.rows[0] == 1, "what decodes goes before what is prefilled"
    assert sum(first.counts) * 10 <= 80
    assert len(pair.sender.flow.captures) <= 2
    pair.captured(first)
    (kv,) = [frame[0] for frame in pair.sender.flow.kv_flight]
    assert pair.sender.flow.flight_bytes <= 80
    out = pair.say(Ack(S1, NO_EPOCH, 1, kv))
    assert any(type(effect) is Capture for effect in out)


def test_stale_piece_is_not_sent_and_waits_for_the_next_look() -> None:
    """Fault 14."""
    pair = Pair()
    pair.step(look())
    _, capture = pair.stream()
    (frame,) = pair.captured(capture, 1)
    assert frame.message.starts == (0,) and pair.sender.flow.copies[0].sent == 4
    assert pair.step(Tick()) == ()
    ids, capture = pair.step(Looked(STREAM, (), (Cut(0, 4, 8, OLD, 1),), (), (Grown(0, 1, (30,), (130,)),), (0,), (6,), (7,)))
    assert ids.message.ops == (CutOp(1, 4, 8, OLD),) and ids.message.after_kv == 1
    assert (capture.starts, capture.blocks, capture.row_generations) == ((4,), (30,), (8,))



def test_a_hole_is_never_sent() -> None:
    pair = Pair()
    pair.step(look())
    _, capture = pair.stream()
    assert pair.captured(capture, 0)[0] == FreeBuffer(1), "a good piece behind a stale one of its sequence"
    assert pair.sender.flow.copies[0].sent == 0


def test_capture_of_what_was_cut_meanwhile_is_thrown_away() -> None:
    pair = Pair()
    pair.step(look())
    _, capture = pair.stream()
    ids, second = pair.step(Looked(STREAM, (), (Cut(0, 2, 8, OLD, 1),), (), (), (0,), (3,), (4,)))
    assert ids.message.ops == (CutOp(1, 2, 8, OLD),)
    out = pair.captured(capture)
    assert out[0] == FreeBuffer(1) and not any(type(effect) is SendKv for effect in out)


def test_refused_sequence_is_shed_and_offered_again() -> None:
    """Fault 12: whole sequences, with the reason; no more bytes until retry_ns."""
    pair = Pair()
    pair.step(look())
    _, capture = pair.stream()
    pair.captured(capture)
    assert pair.say(Ack(S1, NO_EPOCH, 1, 1, ((1, "store full"),), refusals=1)) == (Note("unprotected", f"{STREAM} s", "store full"),)
    assert pair.step(more(7, 8)) == () and pair.sender.flow.copies[0].acked == 0
    pair.now = pair.sender.next_deadline()
    ids, capture = pair.step(Tick())
    assert ids.message.ops == (OpenOp(2, "s", 5, OLD, b"r"),) and capture.starts == (0, 4)


def test_a_refusal_that_was_lost_on_the_way_is_noticed_by_the_next_acknowledgement() -> None:
    """Simulation seed 2445949862: what the holder had dropped was called acknowledged for ever."""
    pair = Pair()
    pair.step(look())
    _, capture = pair.stream()
    pair.captured(capture)
    [note] = pair.say(Ack(S1, NO_EPOCH, 1, 1, (), refusals=1))
    assert note.what == "resync" and "lost" in note.reason and pair.sender.flow.copies[0].acked == 0
    pair.now = pair.sender.next_deadline()
    [hello] = pair.step(Tick())
    assert type(hello.message) is Hello


def test_a_refusal_that_is_told_twice_counts_once() -> None:
    pair = Pair()
    pair.step(look())
    _, capture = pair.stream()
    pair.captured(capture)
    told = Ack(S1, NO_EPOCH, 1, 1, ((1, "store full"),), refusals=1)
    assert len(pair.say(told)) == 1 and pair.say(told) == () and pair.sender.state == "stream"


@pytest.mark.parametrize(
    "ack", [Ack(S1, NO_EPOCH, 2, 0), Ack(S1, NO_EPOCH, 0, 2), Ack(3, NO_EPOCH, 1, 0), Ack(S1, Epoch(1, "c"), 1, 0)], ids=["ids", "kv", "session", "epoch"]
)
def test_acknowledging_what_was_not_sent_is_an_error_never_progress(ack: Ack) -> None:
    """Fault 23."""
    pair = Pair()
    pair.step(look())
    pair.stream()
    notes = [effect for effect in pair.say(ack) if type(effect) is Note]
    assert [note.what for note in notes] == ["protocol_error", "resync"]
    assert pair.sender.state != "stream" and pair.sender.flow.copies[0].acked_ids == 0


def test_gap_link_loss_and_silence_lead_back_to_probe() -> None:
    pair = Pair()
    pair.step(look())
    _, capture = pair.stream()
    pair.captured(capture)
    pair.say(Ack(S1, NO_EPOCH, 1, 0))
    note, hello = pair.say(Ack(S1, NO_EPOCH, 1, 0, (), "gap"))
    assert (note.what, note.reason, hello.message.session) == ("resync", "gap", S2)
    _, capture = pair.say(answer(S2, ("s", 5, OLD, 0, 7)))
    pair.step(LinkDown(LINK, "reset"))
    assert pair.sender.state == "down" and pair.sender.reason == "holder unreachable"
    assert pair.captured(capture) == (FreeBuffer(1),)
    assert not pair.sender.caught_up()
    (hello,) = pair.step(LinkUp(LINK))
    assert hello.message.session == S3
    pair.say(answer(S3))
    pair.now = pair.sender.next_deadline()
    assert pair.step(Tick())[0] == Note("resync", f"{STREAM} -> h", "no acknowledgement in time")


def test_fenced_until_the_rank_adopts() -> None:
    pair = Pair()
    pair.step(look())
    pair.stream()
    pair.sender.fence()
    assert pair.step(more(7, 8)) == ()
    assert pair.step(LinkDown(LINK, "x")) == () and pair.step(LinkUp(LINK)) == ()
    (hello,) = pair.sender.adopt(0, Epoch(1, "c"))
    assert hello.message == Hello(STREAM, S2, Epoch(1, "c"), "a", pair.shape)
