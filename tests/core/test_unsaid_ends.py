"""A clean end whose holder was away is said when it is back: what it has would be kept for ever otherwise."""

from __future__ import annotations

from test_node import LOCAL, SHAPE, World, assign

from kvguard.core import events as ev
from kvguard.core.effects import HangUp, Note, Send
from kvguard.core.outbound import UNSAID_MAX
from kvguard.format import messages as ms
from kvguard.types import NO_EPOCH, StreamId


def away() -> World:
    """Holder b has all of LOCAL, and its link is down."""
    world = World()
    world.coordinator()
    world.attach()
    world.say(assign("b"))
    world.look(4)
    world.ack(world.holder())
    world.step(ev.LinkDown("peer:b", "connection lost"))
    return world


def ends(out: tuple) -> list[tuple[str, StreamId]]:
    return [(effect.link, effect.message.stream) for effect in out if type(effect) is Send and type(effect.message) is ms.StreamEnd]


def test_it_is_said_when_the_holder_is_back_and_the_link_is_hung_up_then() -> None:
    world = away()
    out = world.step(ev.StreamDetached(LOCAL, 3))
    assert ends(out) == [] and not any(type(effect) is HangUp for effect in out), "the link is still needed"
    out = world.step(ev.LinkUp("peer:b"))
    assert ends(out) == [("peer:b", LOCAL)] and type(out[-1]) is HangUp
    assert ends(world.step(ev.LinkUp("peer:b"))) == []


def test_a_stream_that_goes_on_takes_its_end_back() -> None:
    world = away()
    world.step(ev.StreamDetached(LOCAL, 3))
    world.attach(incarnation=4)
    out = world.step(ev.LinkUp("peer:b"))
    assert ends(out) == [] and any(type(effect) is Send and type(effect.message) is ms.Hello for effect in out)


def test_what_waits_for_one_holder_is_bounded_and_what_is_given_up_is_told() -> None:
    world = away()
    for number in range(UNSAID_MAX + 1):
        stream = LOCAL._replace(pool=1000 + number)
        world.step(ev.StreamDetached(LOCAL if not number else LOCAL._replace(pool=999 + number), 3))
        world.step(ev.StreamAttached(stream, SHAPE, 3, NO_EPOCH, "tcp://engine"))
    told = world.step(ev.StreamDetached(LOCAL._replace(pool=1000 + UNSAID_MAX), 3))
    assert any(type(effect) is Note and effect.what == "end_unsaid" for effect in told)
    assert len(ends(world.step(ev.LinkUp("peer:b")))) == UNSAID_MAX
