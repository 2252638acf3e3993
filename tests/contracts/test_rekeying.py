"""Keys that change while links are up: both of a rotated node are good for a while, then one; whoever's key is gone is out, also where it was in already."""

from __future__ import annotations

import dataclasses
import time

import pytest
from test_transport import DEADLINE_S, ids, keys_of, number_of

from kvguard.errors import BadConfig
from kvguard.transport.base import Broken, Down, Frame, Up
from kvguard.transport.keys import Keys, generate
from kvguard.transport.zeromq import ZeromqTransport


class Trio:
    """a and b dial each other, c dials a; all listen with keys."""

    def __init__(self) -> None:
        self.keys = keys_of("a", "b", "c")
        self.made = {name: ZeromqTransport(name, keys) for name, keys in self.keys.items()}
        self.events: dict[str, list] = {name: [] for name in self.made}
        self.addresses = {name: made.listen("tcp://127.0.0.1:0") for name, made in self.made.items()}
        for caller, called in (("a", "b"), ("b", "a"), ("c", "a")):
            self.made[caller].dial(f"peer:{called}", self.addresses[called])
        self.until(lambda: sum(self.ups(name) for name in "abc") == 6, "all links up")

    def ups(self, name: str) -> int:
        """Links that are up at this transport now."""
        kinds = [type(event) for event in self.events[name]]
        return kinds.count(Up) - kinds.count(Down)

    def turn(self) -> None:
        for name, made in self.made.items():
            made.wait(0.005)
            self.events[name] += made.receive()

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < deadline, (what, self.events)
            self.turn()

    def rekey(self, name: str, **changed) -> bool:
        self.keys[name] = dataclasses.replace(self.keys[name], **changed)
        return self.made[name].rekey(self.keys[name])

    def carries(self, caller: str, called: str, number: int) -> None:
        def there() -> bool:
            return any(isinstance(event, Frame) and number_of(event) == number for event in self.events[called])

        def sent() -> bool:
            return there() or self.made[caller].send(f"peer:{called}", ids(number))

        self.until(sent, f"{caller} can send to {called}")
        self.until(there, f"{number} from {caller} at {called}")

    def close(self) -> None:
        for made in self.made.values():
            made.close()


@pytest.fixture
def trio():
    made = Trio()
    yield made
    made.close()


def both_know(trio: Trio, new: Keys) -> None:
    """Everybody lists a's new key beside its old one; nothing is touched by that."""
    before = {name: len(events) for name, events in trio.events.items()}
    for name in "abc":
        assert trio.rekey(name, beside={"a": (new.public,)}) and not trio.made[name].rekey(trio.keys[name])
    for number in range(1, 6):
        trio.carries("a", "b", number)
        trio.carries("b", "a", number)
    assert not [event for name in "abc" for event in trio.events[name][before[name] :] if not isinstance(event, Frame)]


def test_a_pair_is_switched_under_links_that_come_back_and_the_old_one_is_worth_nothing_then(trio) -> None:
    new, old = generate(), trio.keys["a"]
    both_know(trio, new)
    trio.rekey("a", secret=new.secret, public=new.public)
    trio.until(lambda: all(any(isinstance(event, Down) for event in trio.events[name]) for name in "abc"), "the links of the old pair end")
    trio.until(lambda: sum(trio.ups(name) for name in "abc") == 6, "all links up again")
    for caller, called, number in (("a", "b", 11), ("b", "a", 12), ("c", "a", 13)):
        trio.carries(caller, called, number)
    quiet = {name: len(events) for name, events in trio.events.items()}
    for name in "abc":
        trio.rekey(name, allowed={**trio.keys[name].allowed, "a": new.public}, beside={})
    trio.carries("a", "b", 21)
    trio.carries("b", "a", 22)
    assert not [event for name in "abc" for event in trio.events[name][quiet[name] :] if isinstance(event, Up | Down)], "nothing used the old key any more"

    stranger = trio.made["stranger"] = ZeromqTransport("a", old)
    trio.events["stranger"] = []
    refused = trio.made["b"].counters.get("key_refused", 0)
    stranger.dial("peer:b", trio.addresses["b"])
    trio.until(lambda: trio.made["b"].counters.get("key_refused", 0) > refused, "the removed key refused")
    assert not any(isinstance(event, Up) for event in trio.events["stranger"])


def test_who_is_not_listed_any_more_is_out_at_once_and_in_again_when_listed(trio) -> None:
    everybody = trio.keys["a"].allowed
    trio.rekey("a", allowed={name: key for name, key in everybody.items() if name != "c"})
    trio.until(lambda: trio.ups("c") == 0 and trio.made["a"].counters.get("key_refused"), "c is out, and refused when it comes again")
    trio.carries("b", "a", 31)
    trio.rekey("a", allowed=everybody)
    trio.carries("c", "a", 32)


def test_a_dialled_peer_without_a_key_is_named_and_dialled_again_when_it_has_one(trio) -> None:
    everybody = trio.keys["b"].allowed
    trio.rekey("b", allowed={name: key for name, key in everybody.items() if name != "a"})
    trio.until(lambda: any(isinstance(event, Broken) and "no key is listed for 'peer:a'" in event.reason for event in trio.events["b"]), "it is said")
    assert not trio.made["b"].send("peer:a", ids(1))
    trio.rekey("b", allowed=everybody)
    trio.carries("b", "a", 41)
    trio.carries("a", "b", 42)


def test_a_transport_without_keys_gets_none() -> None:
    plain = ZeromqTransport("a")
    with pytest.raises(BadConfig, match="Try: restart"):
        plain.rekey(generate())
    plain.close()
