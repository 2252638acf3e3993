"""Deeds that both cores share, and frames as events: nothing is lost silently, nothing that fails goes unanswered."""

from __future__ import annotations

import pytest

from kvguard.core import effects, events
from kvguard.daemon.journal import NotDurable
from kvguard.daemon.perform import SHARED, Shell, arrived, performer
from kvguard.format import wire
from kvguard.format.messages import Ack, KvFrame, Query
from kvguard.transport import base
from kvguard.types import Epoch

ACK = Ack(1, Epoch(1, "c"), 1, 1)
KV = KvFrame(1, Epoch(1, "c"), 1, 0, (1,), (0,), (1,), (4,), (1,), (0,), bytes(8))


class Recorder:
    """A transport and a journal that remember; `takes` false: the link is full or down."""

    def __init__(self):
        self.done = []
        self.takes = True

    def send(self, link, head, payload=None):
        self.done.append((link, wire.decode(head)[0], payload))
        return self.takes

    def dial(self, link, address):
        self.done.append(("dial", link, address))

    def hang_up(self, link):
        self.done.append(("hang_up", link))

    def persist(self, key, value):
        if key == "full":
            raise NotDurable("no room")
        self.done.append((key, value))


@pytest.fixture
def shell():
    recorder = Recorder()
    made = Shell(recorder, recorder, lambda: 0)
    made.recorder = recorder
    return made


def test_frames_become_events(shell):
    payload = memoryview(bytearray(b"abcd"))
    event = arrived(shell, base.Frame("in:1", wire.encode(KV, 4), payload))
    assert (event.link, event.message) == ("in:1", KV)
    assert shell.buffers.take(event.buffer) is payload
    assert arrived(shell, base.Frame("in:1", wire.encode(ACK), None)) == events.Arrived("in:1", ACK, 0)
    assert arrived(shell, base.Up("peer:b", "b")) == events.LinkUp("peer:b", "b")
    assert shell.up == {"peer:b": "b"}
    assert arrived(shell, base.Down("peer:b", "gone")) == events.LinkDown("peer:b", "gone")
    assert shell.up == {}


@pytest.mark.parametrize(
    ("head", "payload"),
    [
        (b"garbage", None),
        (wire.encode(ACK)[:-1] + b"\xff", None),
        (wire.encode(KV, 4), None),
        (wire.encode(KV, 4), memoryview(bytearray(5))),
        (wire.encode(Query(1, "status"), 4), memoryview(bytearray(4))),
    ],
)
def test_garbage_is_broken_and_keeps_nothing(shell, head, payload):
    event = arrived(shell, base.Frame("in:1", head, payload))
    assert type(event) is events.Broken and event.link == "in:1"
    assert len(shell.buffers) == 0 and shell.counters["frames_broken"] == 1


def test_deeds(shell):
    noted = []
    shell.noted = noted.append
    perform = performer(shell, SHARED, {})
    buffer = shell.buffers.keep(memoryview(b"x"))
    note = effects.Note("resync", "s", "gap")
    for effect in (
        effects.Persist("epoch/a", b"1"), effects.Dial("peer:b", "tcp://b:1"), effects.Send("peer:b", ACK), effects.HangUp("peer:b"), effects.FreeBuffer(buffer), note,
    ):  # fmt: skip
        assert tuple(perform(effect)) == ()
    assert shell.recorder.done == [("epoch/a", b"1"), ("dial", "peer:b", "tcp://b:1"), ("peer:b", ACK, None), ("hang_up", "peer:b")]
    assert noted == [note] and shell.counters["note_resync"] == 1 and len(shell.buffers) == 0
    shell.recorder.takes = False
    perform(effects.Send("peer:b", ACK))
    assert shell.counters["sends_dropped"] == 1


def test_what_goes_through_and_what_is_answered(shell):
    def refuse(shell, effect):
        raise OSError("no")

    perform = performer(shell, {**SHARED, effects.HangUp: refuse}, {effects.HangUp: lambda effect, why: (events.LinkDown(effect.link, why),)})
    assert tuple(perform(effects.HangUp("x"))) == (events.LinkDown("x", "OSError: no"),)
    assert shell.counters["deeds_failed_HangUp"] == 1
    with pytest.raises(NotDurable):
        perform(effects.Persist("full", b""))
    with pytest.raises(AssertionError, match="freed before"):
        perform(effects.FreeBuffer(99))
