"""Wakeup: what is due, what isn't any more, and a descriptor that falls silent when nothing is."""

from __future__ import annotations

import os

import pytest

from kvguard.transport.wakeup import IN, Wakeup


@pytest.fixture
def wakeup():
    made = Wakeup()
    yield made
    made.close()


@pytest.fixture
def bells():
    made = [os.eventfd(1, os.EFD_NONBLOCK) for _ in range(2)]
    yield made
    for bell in made:
        os.close(bell)


def turn(wakeup: Wakeup) -> None:
    for call, events in wakeup.ready():
        call(events)


def test_whoever_is_forgotten_in_a_turn_is_not_called_in_it_any_more(wakeup, bells):
    """Another descriptor takes its number at once: that one is not ready."""
    heard = []

    def forgets(mine: int):
        theirs = bells[1 - bells.index(mine)]
        heard.append(mine)
        wakeup.forget(theirs)
        os.close(theirs)
        assert os.eventfd(0, os.EFD_NONBLOCK) == theirs
        wakeup.watch(theirs, heard.append)
        wakeup.forget(mine)

    for bell in bells:
        wakeup.watch(bell, lambda events, bell=bell: forgets(bell))
    turn(wakeup)
    turn(wakeup)
    assert len(heard) == 1 and not wakeup.wait(0.0)


def test_what_was_asked_for_again_goes_with_its_descriptor(wakeup, bells):
    heard, (first, second) = [], bells

    def goes(events: int) -> None:
        heard.append(events)
        wakeup.forget(second)

    def stale(events: int) -> None:
        raise AssertionError("it was forgotten before its turn")

    os.eventfd_read(second)
    wakeup.watch(first, goes)
    wakeup.again(goes)
    wakeup.watch_edge(second, stale)
    turn(wakeup)
    assert heard == [IN]


def test_the_bell_is_silent_once_whoever_asked_is_forgotten(wakeup, bells):
    """Else fileno() would be readable, and its loop turn, until somebody else asks."""
    os.eventfd_read(bells[0])
    wakeup.watch_edge(bells[0], lambda events: None)
    wakeup.forget(bells[0])
    assert wakeup.wait(0.0) and not list(wakeup.ready()) and not wakeup.wait(0.0)
    calls = []
    wakeup.again(calls.append)
    assert wakeup.wait(0.0)
    turn(wakeup)
    assert calls == [IN] and not wakeup.wait(0.0)
