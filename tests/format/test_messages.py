"""What unpack refuses beyond wrong types: columns of unequal length, epochs that nobody issued."""

from __future__ import annotations

import pytest

from kvguard.errors import BadFrame
from kvguard.format import messages
from kvguard.limits import EPOCH_MAX
from kvguard.types import Epoch


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
