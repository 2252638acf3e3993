"""The loop: order of events and effects, ticks, bounds, and what ends the process."""

from __future__ import annotations

import os

import pytest

from kvguard.core import effects, events
from kvguard.daemon.journal import NotDurable
from kvguard.daemon.loop import Loop


class Script:
    """A core that answers events by a table and remembers what it saw."""

    def __init__(self, answers=None, deadline=None):
        self.answers = answers or {}
        self.deadline = deadline
        self.seen = []

    def step(self, now_ns, event):
        self.seen.append(event)
        if isinstance(event, events.Tick):
            self.deadline = None
        return self.answers.get(event, ())

    def next_deadline(self):
        return self.deadline

    def check(self):
        self.seen.append("checked")


UP = events.LinkUp("peer:b")
ENDED = events.TurnEnded()


@pytest.fixture
def loops():
    made = []

    def make(core, perform=lambda effect: (), **keywords):
        made.append(Loop(core, perform, **keywords))
        return made[-1]

    yield make
    for loop in made:
        loop.close()


def test_effects_in_order_then_their_completions_then_the_turn_ends(loops):
    done = []
    completed = events.Arrived("peer:b", None)

    def perform(effect):
        done.append(effect)
        return (completed,) if effect == effects.HangUp("a") else ()

    core = Script({UP: (effects.HangUp("a"), effects.Dial("b", "x")), completed: (effects.HangUp("c"),)})
    loop = loops(core, perform)
    loop.feed(UP)
    assert loop.turn(0) == 3
    assert done == [effects.HangUp("a"), effects.Dial("b", "x"), effects.HangUp("c")]
    assert core.seen == [UP, completed, ENDED]


def test_a_readable_descriptor_is_heard_before_the_tick(loops):
    now = [1_000_000_000]
    core = Script(deadline=400_000_000)
    loop = loops(core, clock=lambda: now[0])
    read, write = os.pipe()

    def ready():
        os.read(read, 1)
        return (UP,)

    loop.watch(read, ready)
    os.write(write, b"x")
    loop.turn(0)
    assert core.seen == [UP, events.Tick(600_000_000), ENDED]
    loop.forget(read)
    os.close(read)
    os.close(write)
    assert loop.turn(0) == 0  # nothing happened: no turn to end


def test_whoever_is_forgotten_in_a_turn_is_not_heard_in_it_any_more(loops):
    """A standby said that it detaches, and its pidfd fired in the same turn: it was let go twice, and the daemon ended of it."""
    loop = loops(Script())
    bells = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
    heard, other = [], []

    def forgets(mine: int):
        """The other one goes, and another descriptor takes its number: that one is not ready."""
        theirs = bells[1 - bells.index(mine)]
        heard.append(mine)
        loop.forget(theirs)
        os.close(theirs)
        other.append(os.eventfd(0, os.EFD_NONBLOCK))
        loop.watch(other[0], lambda: heard.append(other[0]) or ())
        loop.forget(mine)
        return ()

    for bell in bells:
        loop.watch(bell, lambda bell=bell: forgets(bell))
    loop.turn(1.0)
    loop.turn(0.0)
    assert len(heard) == 1 and other[0] in bells and other[0] != heard[0], "a number that was used again"
    for descriptor in (heard[0], other[0]):
        os.close(descriptor)


def test_a_turn_is_bounded_and_the_rest_waits(loops, monkeypatch):
    monkeypatch.setattr("kvguard.daemon.loop.EVENTS_PER_TURN_MAX", 5)
    core = Script({UP: (effects.HangUp("again"),)})
    loop = loops(core, lambda effect: (UP,))
    loop.feed(UP)
    loop.turn()
    first = len(core.seen)
    assert first <= 10  # five of the turn, and as many around its end
    loop.turn()
    assert len(core.seen) > first


def test_timers_and_stop_from_elsewhere(loops):
    core = Script()
    loop = loops(core)
    loop.after(0, lambda: (loop.stop(), UP)[1:])
    loop.run()
    assert core.seen == [UP, ENDED]


def test_what_cannot_be_made_durable_goes_through(loops):
    def perform(effect):
        raise NotDurable("no room")

    core = Script({UP: (effects.Persist("epoch/a", b"1"), effects.HangUp("after"))})
    loop = loops(core, perform)
    loop.feed(UP)
    with pytest.raises(NotDurable):
        loop.turn(0)
    assert core.seen == [UP]
