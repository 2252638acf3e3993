"""Faults of local ranks, from the first sign until the coordinator has fenced.

Knows: what was said of which life, when it struck, in which epoch. Must not know: how a fault was found, what follows from it.
Invariants: a fault is said again until its epoch is over; one that is only suspected until it is a death, because the round that it began may need the pool,
and waits for it as long as it hears of it; a clean end is said once.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.core.effects import Effect, Note, Send
from kvguard.core.local import LocalStream
from kvguard.core.promises import Promises
from kvguard.format.messages import Fault
from kvguard.types import Epoch, NodeId, StreamId

Effects = tuple[Effect, ...]


class Seen(NamedTuple):
    """What was said, when it struck, and in which epoch."""

    fault: Fault
    since_ns: int
    epoch: Epoch


class Faults:
    """`link`: the coordinator's."""

    def __init__(self, node: NodeId, link: str, promises: Promises) -> None:
        self._node, self._link, self._promises = node, link, promises
        self._seen: dict[tuple[StreamId, int], Seen] = {}

    def struck(self, now: int, local: LocalStream, kind: str, reason: str, salvageable: bool, since_ns: int, linked: bool) -> Effects:
        """A rank has ended, or is about to: said at once where the coordinator is `linked`. The last word about a life counts."""
        key = local.stream, local.incarnation
        seen = Seen(Fault(self._node, local.stream, local.incarnation, kind, reason, salvageable, 0.0), since_ns, local.epoch)
        if kind != "detached" or not linked:
            self._seen[key] = seen
        else:
            self._seen.pop(key, None)
        told = (self._say(seen, now),) if linked else ()
        return (*told, Note(kind, str(local.stream), reason))

    def again(self, now: int) -> Effects:
        """With every heartbeat, and on a new link."""
        out: list[Effect] = []
        for key, seen in list(self._seen.items()):
            if seen.fault.kind != "suspected" and self._promises.of(key[0].instance).counter > seen.epoch.counter:
                del self._seen[key]
                continue
            out.append(self._say(seen, now))
            if seen.fault.kind == "detached":
                del self._seen[key]
        return tuple(out)

    def _say(self, seen: Seen, now: int) -> Send:
        fault = seen.fault
        since_ms = (now - seen.since_ns) / 1e6
        return Send(self._link, Fault(fault.node, fault.stream, fault.incarnation, fault.kind, fault.reason, fault.salvageable, since_ms))
