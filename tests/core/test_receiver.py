"""Receiver and the sessions of a node: event in, effects out."""

from __future__ import annotations

import pytest

from kvguard.core.effects import Apply, DropReplica, FreeBuffer, Note, Probe, Send
from kvguard.core.events import Applied, Arrived, Probed, TurnEnded
from kvguard.core.inbound import Inbound
from kvguard.core.promises import Promises
from kvguard.core.receiver import Receiver
from kvguard.format.messages import Ack, Held, Hello, Holding, IdsFrame, KvFrame, StreamEnd, StreamShape
from kvguard.limits import HELD_FRAMES_MAX
from kvguard.types import NO_EPOCH, Epoch, Rank, StreamId

STREAM = StreamId("i", Rank(0, 0, 0), 7)
LINK = "in:a"
SHAPE = StreamShape(1, 4, 10, 40, 64)
E1 = Epoch(1, "c")


def hello(session: int = 5, epoch: Epoch = NO_EPOCH) -> Hello:
    return Hello(STREAM, session, epoch, "a", SHAPE)


def held(session: int = 5) -> Held:
    return Held(session, NO_EPOCH, Holding(STREAM, "replica", False, (), (), (), (), ()))


def ids(number: int, after_kv: int = 0, session: int = 5, epoch: Epoch = NO_EPOCH) -> IdsFrame:
    return IdsFrame(session, epoch, number, (), after_kv=after_kv)


def kv(number: int, requires: int = 0, session: int = 5, epoch: Epoch = NO_EPOCH) -> KvFrame:
    return KvFrame(session, epoch, number, requires, (), (), (), (), (), (), b"")


def opened() -> Receiver:
    receiver = Receiver(LINK, hello())
    assert receiver.start() == (Probe(LINK, hello()),)
    assert receiver.step(0, Probed(LINK, 5, held())) == (Send(LINK, held()),)
    return receiver


def arrive(receiver: Receiver, message, buffer: int = 0) -> tuple:
    out = receiver.step(0, Arrived(LINK, message, buffer))
    receiver.check()
    return out


def applied(receiver: Receiver, lane: str, number: int, **more) -> None:
    receiver.step(0, Applied(LINK, 5, lane, number, **more))


def test_one_cumulative_ack_per_turn() -> None:
    receiver = opened()
    assert arrive(receiver, ids(1)) == (Apply(LINK, 5, ids(1), 0),)
    assert arrive(receiver, kv(1, 1), 8) == (Apply(LINK, 5, kv(1, 1), 8),)
    assert arrive(receiver, ids(2)) == (Apply(LINK, 5, ids(2), 0),)
    applied(receiver, "ids", 1), applied(receiver, "kv", 1, refused=((3, "store full"),)), applied(receiver, "ids", 2)
    assert receiver.step(0, TurnEnded()) == (Send(LINK, Ack(5, NO_EPOCH, 2, 1, ((3, "store full"),), "", 1)),)
    assert receiver.step(0, TurnEnded()) == ()


def test_lanes_wait_for_each_other_and_keep_their_order() -> None:
    receiver = opened()
    assert arrive(receiver, kv(1, 1), 8) == ()
    assert arrive(receiver, kv(2, 1), 9) == ()
    assert arrive(receiver, ids(1)) == (Apply(LINK, 5, ids(1), 0), Apply(LINK, 5, kv(1, 1), 8), Apply(LINK, 5, kv(2, 1), 9))
    assert arrive(receiver, ids(2, after_kv=3)) == (), "a cut must not overtake the pieces that were sent before it"
    assert arrive(receiver, ids(3)) == ()
    assert arrive(receiver, kv(3, 1), 10) == (Apply(LINK, 5, kv(3, 1), 10), Apply(LINK, 5, ids(2, after_kv=3), 0), Apply(LINK, 5, ids(3), 0))


def test_waiting_frames_are_bounded() -> None:
    receiver = opened()
    for number in range(1, HELD_FRAMES_MAX + 1):
        assert arrive(receiver, kv(number, 1), number) == ()
    out = arrive(receiver, kv(HELD_FRAMES_MAX + 1, 1), 9999)
    assert [effect.buffer for effect in out if type(effect) is FreeBuffer] == [*range(1, HELD_FRAMES_MAX + 1), 9999]
    assert "wait for an earlier one" in receiver.step(0, TurnEnded())[0].message.resync


def test_duplicates_are_ignored_and_a_gap_asks_once() -> None:
    """Fault 11."""
    receiver = opened()
    arrive(receiver, ids(1))
    assert arrive(receiver, ids(1)) == (Note("duplicate", str(STREAM), "ids frame 1"),)
    free, note = arrive(receiver, kv(2, 1), 8)
    assert free == FreeBuffer(8) and note.what == "resync"
    assert arrive(receiver, kv(3, 1), 9) == (FreeBuffer(9),)
    (send,) = receiver.step(0, TurnEnded())
    assert send.message == Ack(5, NO_EPOCH, 0, 0, (), "gap: kv frame 2 came where 1 was due")
    assert receiver.step(0, TurnEnded()) == ()
    applied(receiver, "ids", 1)
    assert receiver.step(0, TurnEnded()) == (), "a session that is broken acknowledges nothing more"


def test_what_the_store_cannot_apply_is_not_acknowledged() -> None:
    receiver = opened()
    arrive(receiver, ids(1)), arrive(receiver, kv(1, 1), 8)
    applied(receiver, "ids", 1), applied(receiver, "kv", 1, gap="checksum of block 3")
    assert receiver.step(0, TurnEnded()) == (Send(LINK, Ack(5, NO_EPOCH, 1, 0, (), "checksum of block 3")),)


def test_a_session_that_was_fenced_applies_nothing_and_frees_everything() -> None:
    receiver = opened()
    arrive(receiver, kv(1, 1), 8)
    assert receiver.end("stale_epoch", "the epoch is over") == (FreeBuffer(8),)
    note, free = arrive(receiver, kv(2, 1), 9)
    assert (note.what, free) == ("stale_epoch", FreeBuffer(9))
    assert receiver.step(0, TurnEnded()) == ()


def test_refused_probe_answers_with_the_reason() -> None:
    receiver = Receiver(LINK, hello())
    (send,) = receiver.step(0, Probed(LINK, 5, held(), "another shape"))
    assert (send.message.session, send.message.reason) == (5, "another shape")


# ---- the sessions of a node ----


def inbound(**promises: Epoch) -> Inbound:
    return Inbound(Promises(promises))


def grant(node: Inbound, message: Hello, link: str = LINK) -> None:
    assert node.hello(link, message)[-1] == Probe(link, message)
    node.completed(0, Probed(link, message.session, held(message.session)))
    node.check()


@pytest.mark.parametrize("epoch", [NO_EPOCH, Epoch(1, "another")], ids=["older", "another issuer"])
def test_hello_of_an_epoch_that_is_over_is_refused(epoch: Epoch) -> None:
    node = inbound(i=E1)
    note, send = node.hello(LINK, hello(5, epoch))
    assert note.what == "stale_epoch" and send.message.epoch == E1 and send.message.reason.startswith("stale epoch")
    assert node.frame(0, Arrived(LINK, kv(1, 0, 5, epoch), 8))[-1] == FreeBuffer(8)


def test_a_newer_session_ends_the_older_one() -> None:
    node = inbound()
    grant(node, hello(5))
    assert node.frame(0, Arrived(LINK, kv(1, 1), 8)) == ()
    assert node.hello("in:b", hello(6)) == (FreeBuffer(8), Probe("in:b", hello(6)))
    note, free = node.frame(0, Arrived(LINK, kv(2, 1), 9))
    assert (note.what, free) == ("superseded", FreeBuffer(9))
    assert node.turn_ended(0, TurnEnded()) == ()


def test_who_still_writes_what_is_unpinned_hears_of_it() -> None:
    """An idle sender has nothing more to send that could be refused, and would go on to call its rank protected by what is gone."""
    node = inbound()
    grant(node, hello(5))
    assert node.unpin(STREAM, "unpinned") == (DropReplica(STREAM, "unpinned"), Send(LINK, Ack(5, NO_EPOCH, 0, 0, (), "unpinned")))
    node.check()
    assert node.unpin(STREAM, "unpinned") == (DropReplica(STREAM, "unpinned"),), "nobody writes it any more"


def test_unknown_session_is_told_once_a_turn() -> None:
    node = inbound()
    for number in (1, 2):
        note, free = node.frame(0, Arrived(LINK, kv(number), number))
        assert note.what == "unknown_session" and free == FreeBuffer(number)
    assert node.turn_ended(0, TurnEnded()) == (Send(LINK, Ack(5, NO_EPOCH, 0, 0, (), "unknown session")),)
    assert node.turn_ended(0, TurnEnded()) == ()


def test_link_down_and_fence_free_what_waits() -> None:
    node = inbound()
    grant(node, hello(5))
    node.frame(0, Arrived(LINK, kv(1, 1), 8))
    assert node.link_down(LINK) == (FreeBuffer(8),)
    grant(node, hello(6))
    node.frame(0, Arrived(LINK, kv(1, 1, 6), 9))
    node._promises.rise("i", E1)
    assert node.fence("i") == (FreeBuffer(9),)
    note, free = node.frame(0, Arrived(LINK, kv(2, 1, 6), 10))
    assert (note.what, free) == ("stale_epoch", FreeBuffer(10))
    node.check()


def test_stream_end_drops_the_replica_unless_its_epoch_is_over() -> None:
    node = inbound(i=E1)
    assert node.stream_end(StreamEnd(STREAM, NO_EPOCH, "bye"))[0].what == "stale_epoch"
    assert node.stream_end(StreamEnd(STREAM, E1, "bye")) == (DropReplica(STREAM, "bye"),)


def test_a_broken_frame_asks_every_session_of_its_link() -> None:
    node = inbound()
    grant(node, hello(5))
    assert node.broken(LINK, "bad magic")[0].what == "resync"
    assert node.turn_ended(0, TurnEnded())[0].message.resync == "broken frame: bad magic"
