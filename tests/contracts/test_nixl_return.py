"""From TCP back to NIXL: when it is tried again, and that a link changes over without losing anything, or its life.

Knows: trials, waits, what a link says of its way. Must not know: what frames mean.
"""

from __future__ import annotations

import re
import time

import pytest
from test_nixl import CMA, FRAME_BYTES, carries, pattern, use
from test_transport import DEADLINE_S, Pair, Sockets, kv, number_of

from kvguard.errors import BadFrame
from kvguard.transport import accepting, changing, greeting, returning
from kvguard.transport.base import Broken, Carries, Down, Frame, Up
from kvguard.transport.bulk import BulkChannel
from kvguard.transport.nixl_agent import NixlSettings

def test_the_wait_doubles_and_begins_anew_only_after_a_steady_time():
    way, now, waits = returning.Returning(), 10**12, []
    for _ in range(10):
        way.failed(now, "broken")
        waits.append((way.due_ns - now) // 10**9)
        assert not way.is_due(way.due_ns - 1) and way.is_due(way.due_ns)
        now = way.due_ns
    assert waits == [3, 6, 12, 24, 48, 96, 192, 384, 600, 600]
    way.carries(now)
    assert not way.why and not way.is_due(now + 10**12)
    way.failed(now + 599 * 10**9, "again")  # it carried for less than it was waited for
    assert way.due_ns == now + 1199 * 10**9
    way.carries(now)
    way.failed(now + 600 * 10**9, "again")
    assert way.due_ns == now + 603 * 10**9


@pytest.fixture
def fallen(monkeypatch):
    """A pair whose payloads take TCP because b can't open UCX; tried again every 0.1 s."""
    for name in ("WAIT_MIN_NS", "WAIT_MAX_NS"):
        monkeypatch.setattr(returning, name, 100_000_000)
    made = Sockets(keyed=True, bulk=True, nixl=CMA)
    pair = Pair(made)
    use(pair.b, NixlSettings("lo", "rc"))
    yield pair.up()
    made.close()


def test_nixl_is_tried_again_beside_tcp_and_the_status_says_when(fallen):
    before = fallen.b.carriers()["peer:a"]
    assert re.fullmatch(r"tcp \(not nixl: UCX opens no 'rc' .*; tried again at \d\d:\d\d:\d\d UTC\)", before), before
    fallen.until(lambda: fallen.b.counters.get("nixl_trials", 0) >= 3 and len(fallen.of(fallen.b, Carries)) >= 2, "several trials")
    carries(fallen)
    assert not fallen.of(fallen.b, Down) and not fallen.of(fallen.a, Down)
    assert fallen.b.counters["without_nixl"] >= 3 and all(event.carrier.startswith("tcp (not nixl: ") for event in fallen.of(fallen.b, Carries))


def test_payloads_change_back_to_nixl_in_full_flow(fallen):
    """Frames go both ways all the time; none is lost, none overtakes another, the link stays the one that it was."""
    links, sent, sizes = {fallen.a: fallen.accepted, fallen.b: "peer:a"}, {fallen.a: 0, fallen.b: 0}, (1000, FRAME_BYTES, 70_000, 0)
    numbers: dict[object, list[int]] = {fallen.a: [], fallen.b: []}

    def push(until: int) -> None:
        for transport, link in links.items():
            number = sent[transport] + 1
            size = sizes[number % len(sizes)]
            payload = memoryview(pattern(number)[:size]) if size else None
            if number <= until and transport.send(link, kv(number, size), payload):
                sent[transport] = number
        fallen.turn()
        for transport in links:
            for frame in fallen.of(transport, Frame):  # looked at now, and dropped: nobody keeps hundreds of them
                numbers[transport].append(number := number_of(frame))
                assert frame.payload is None or bytes(frame.payload) == pattern(number)[: sizes[number % len(sizes)]], "torn"
            fallen.events[transport] = [event for event in fallen.events[transport] if not isinstance(event, Frame)]

    deadline = time.monotonic() + DEADLINE_S
    while min(sent.values()) < 50:
        push(10**9)
    use(fallen.b, CMA)
    while not all(carrier.startswith("nixl") for transport in links for carrier in transport.carriers().values()):
        assert time.monotonic() < deadline, fallen.tail()
        push(10**9)
    last = max(sent.values()) + 50
    while min(map(len, numbers.values())) < last:
        assert time.monotonic() < deadline, fallen.tail()
        push(last)
    assert numbers[fallen.a] == numbers[fallen.b] == list(range(1, last + 1))
    for transport, link in links.items():
        assert len(fallen.of(transport, Up)) == 1 and not fallen.of(transport, Down)
        assert fallen.of(transport, Carries)[-1] == Carries(link, "nixl cma/memory") and transport.queued_bytes(link) == 0
    fallen.until(lambda: all(transport._find(link).trial is None for transport, link in links.items()), "the bulk channel rests")


def test_a_side_that_cannot_answer_a_trial_costs_nothing_but_the_trial(monkeypatch):
    monkeypatch.setattr(returning, "WAIT_MIN_NS", 100_000_000)
    monkeypatch.setattr(changing, "TRIAL_NS", 300_000_000)
    monkeypatch.setattr(accepting, "TRIALS_NS", 0)
    world = Sockets(keyed=False, bulk=True, nixl=CMA)
    try:
        pair = Pair(world)
        use(pair.a, NixlSettings("lo", "rc"))
        pair.up()
        link = pair.b._find("peer:a")
        pair.until(lambda: any("didn't answer" in event.carrier for event in pair.of(pair.b, Carries)), "a trial that is over")
        assert any("opens no 'rc'" in event.reason for event in pair.of(pair.a, Broken))
        carries(pair)
        pair.until(lambda: link.trial is None, "none is under way")
        monkeypatch.setattr(changing, "TRIAL_NS", 30_000_000_000)
        use(pair.a, CMA)
        pair.until(lambda: pair.b.carriers() == {"peer:a": "nixl cma/memory"}, "NIXL")
        carries(pair)
        assert len(pair.of(pair.b, Up)) == 1 and not pair.of(pair.b, Down)
    finally:
        world.close()


@pytest.mark.parametrize("lie", ["without a trial", "fewer than came", "twice"])
def test_a_change_that_makes_no_sense_ends_the_link(fallen, lie):
    if lie == "without a trial":
        assert not fallen.a._find(fallen.accepted).trial
        fallen.a._find(fallen.accepted).say(greeting.Changed(0))
    else:
        carries(fallen)
        link = fallen.b._find("peer:a")
        bulk = BulkChannel.__new__(BulkChannel)
        bulk.sent, bulk.got, bulk.queued_bytes = 1, 1, 0
        trial = changing.Trial(bulk, None, link.say, 0)
        with pytest.raises(BadFrame, match="a change after"):
            for frames in (0,) if lie == "fewer than came" else (5, 5):
                trial.told(greeting.Changed(frames))
        return
    fallen.until(lambda: fallen.of(fallen.b, Down) and fallen.of(fallen.a, Down), "both down")


def test_zones_come_no_faster_than_trials_may(fallen):
    """Each costs the accepting side an agent and memory; whoever says one after another gets one."""
    link, rubbish = fallen.b._find("peer:a"), greeting.Zone("x", b"x", 1 << 20, 8000, bytes(16))
    for _ in range(20):
        link.say(rubbish)
    fallen.until(lambda: fallen.a.counters.get("nixl_trials_refused", 0) == 19, "nineteen are refused")
    assert fallen.a.counters["nixl_trials"] == 1
    carries(fallen)
    assert not fallen.of(fallen.a, Down)
