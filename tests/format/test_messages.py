"""What unpack refuses beyond wrong types: columns of unequal length, epochs that nobody issued."""

from __future__ import annotations

import msgspec
import pytest

from kvguard.errors import BadFrame
from kvguard.format import ledger, messages
from kvguard.format.ledger import RecoveryRecord
from kvguard.format.lineage import birth_of, is_other
from kvguard.limits import EPOCH_MAX
from kvguard.types import Clash, Epoch, Fork, Life, Rank, StreamId

EPOCH = Epoch(1, "c")


@pytest.mark.parametrize("counter", [EPOCH_MAX + 1, 2**64 - 1, -1])
def test_an_epoch_that_nobody_issued_is_garbage(counter):
    """One such promise, believed once, would leave no higher epoch to fence an instance with."""
    for message in (messages.Fence("i", Epoch(counter, "x"), (), ""), messages.NodeHello("n", 1, "tcp://a:1", (("i", Epoch(max(counter, 1), "x")),), "1")):
        if counter < 0 and type(message) is messages.NodeHello:
            continue
        with pytest.raises(BadFrame):
            messages.unpack(messages.pack(message))


def test_the_highest_epoch_passes():
    message = messages.Fence("i", Epoch(EPOCH_MAX, "x"), (), "")
    assert messages.unpack(messages.pack(message)) == message


def test_columns_of_unequal_length_are_refused():
    frame = messages.KvFrame(1, Epoch(1, "c"), 1, 0, (1, 2), (0,), (1,), (0,), (1,), (0,), b"")
    with pytest.raises(BadFrame):
        messages.unpack(messages.pack(frame))


def test_columns_of_a_report_or_a_plan_are_of_one_length():
    stream = StreamId("i", Rank(0, 0, 0), 7)
    good = messages.Holding(stream, "pool", True, ("a",), (1,), ((Fork(0, 0),),), (3,), (4,), 0, (5,))
    assert messages.unpack(messages.pack(messages.Report("i", EPOCH, "n", (good,)))).holdings == (good,)
    for more in ({"births": (5, 6)}, {"positions": ()}, {"lineages": ()}):
        report = messages.Report("i", EPOCH, "n", (msgspec.structs.replace(good, **more),))
        with pytest.raises(BadFrame):
            messages.unpack(messages.pack(report))
    with pytest.raises(BadFrame):
        messages.unpack(messages.pack(messages.PlanOrder("i", EPOCH, (), (), (), (), (), (), (), (), (), (), births=(1,))))


def test_clashes_are_of_the_rank_that_failed_and_at_positions():
    """A plan would go on at a position below 0, or cut copies of ranks that nobody compared."""
    stream = StreamId("i", Rank(0, 1, 0), 7)
    done = messages.Done("i", EPOCH, "n", "rank 0.1.0", "two lives", clashes=(Clash(stream, "s", 0),))
    assert messages.unpack(messages.pack(done)) == done
    for clash in (Clash(stream, "s", -1), Clash(stream._replace(rank=Rank(0, 2, 0)), "s", 4), Clash(stream._replace(instance="j"), "s", 4)):
        with pytest.raises(BadFrame, match="a clash of"):
            messages.unpack(messages.pack(msgspec.structs.replace(done, clashes=(*done.clashes, clash))))


def test_a_birth_is_told_from_the_request_and_unknown_without_one():
    assert birth_of(b"") == 0 and birth_of(b"a") == birth_of(b"a") != birth_of(b"b")
    assert is_other(birth_of(b"a"), birth_of(b"b")) and not is_other(0, birth_of(b"a")) and not is_other(birth_of(b"a"), 0) and not is_other(3, 3)


def test_a_name_without_a_birth_is_any_of_its_lives():
    """As every peer said it that was one version older, and as it hears it."""
    older = messages.unpack(msgspec.msgpack.encode(["Delivered", "i", ["s", "t"]]))
    assert older.lives() == (Life("s"), Life("t")) and messages.Delivered.of("i", older.lives()) == older
    newer = messages.Delivered.of("i", (Life("s", 7), Life("t")))
    assert messages.unpack(messages.pack(newer)).lives() == (Life("s", 7), Life("t"))
    assert msgspec.msgpack.decode(messages.pack(newer))[:3] == ["Delivered", "i", ["s", "t"]]
    with pytest.raises(BadFrame):
        messages.unpack(messages.pack(messages.Delivered("i", ("s",), (1, 2))))


def test_a_record_without_births_names_what_moved_by_name():
    record = RecoveryRecord("i", EPOCH, "fencing", "", (), {}, (), (), away=("s",))
    assert ledger.unpack("recovery/i", ledger.pack(record)).away_lives() == (Life("s"),)
    assert msgspec.structs.replace(record, away_births=(7,)).away_lives() == (Life("s", 7),)
