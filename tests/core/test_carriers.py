"""What a node says of its payloads' ways: it follows what the transport says of a link that is up, and nothing else comes of it."""

from __future__ import annotations

from kvguard.core import events as ev
from kvguard.core.effects import Note, Send
from kvguard.core.node import Node, NodeSettings
from kvguard.format import messages as ms

MS = 1_000_000


def said(node: Node, now_ns: int) -> tuple:
    return next(effect.message.carriers for effect in node.step(now_ns, ev.Tick()) if type(effect) is Send and type(effect.message) is ms.Beat)


def test_a_changed_carrier_is_in_the_next_beat_and_disturbs_nothing():
    node = Node(NodeSettings("a", 9, "tcp://a", "1.0", heartbeat_ns=200 * MS, hang_min_ns=500 * MS), {})
    node.step(0, ev.LinkUp("coordinator"))
    node.step(0, ev.LinkUp("peer:b", "b", "tcp (not nixl: silent; tried again at 12:00:00 UTC)"))
    assert said(node, 200 * MS) == (("b", "tcp (not nixl: silent; tried again at 12:00:00 UTC)"),)
    assert node.step(300 * MS, ev.CarrierChanged("peer:b", "nixl cma/memory")) == (Note("carrier", "peer:b", "nixl cma/memory"),)
    assert said(node, 400 * MS) == (("b", "nixl cma/memory"),)
    node.step(500 * MS, ev.LinkDown("peer:b", "lost"))
    node.step(500 * MS, ev.CarrierChanged("peer:b", "tcp"))  # late
    assert said(node, 600 * MS) == ()
    node.check()
