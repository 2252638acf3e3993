"""The early signs of engines' deaths: which rank's lifeline is watched, and what the core hears when one is marked.

Knows: engine/lifeline.py's watches, by stream. Must not know: descriptors of an Attach beyond the lifeline's, decisions.
Invariants: a suspicion is told at most once per lifeline, of a process that is not known to be dead; a rank without one is seen through its pidfd alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from kvguard.core import events
from kvguard.daemon.capture import Stream
from kvguard.types import StreamId

if TYPE_CHECKING:
    from kvguard.engine.lifeline import Watch

log = logging.getLogger(__name__)

CLOSE_S = 1.0  # for all of them: a thread that is woken and doesn't come is waited for so long by itself
REASON = "a thread of its process that lives as long as the process has ended"


class Watches(Protocol):
    """What is asked of loop.Loop."""

    def watch(self, descriptor: int, ready: Callable[[], Iterable[events.Event]]) -> None: ...

    def forget(self, descriptor: int) -> None: ...


class Lifelines:
    """By stream, the one that the present life of its rank brought."""

    def __init__(self, watches: Watches, clock: Callable[[], float] = time.monotonic) -> None:
        self._watches, self._clock = watches, clock
        self._held: dict[StreamId, Watch] = {}

    def hold(self, stream: Stream, descriptor: int | None) -> None:
        """Watch this lifeline, which lifeline.refuse_other let through, instead of any before it. `descriptor` stays the caller's; None: there is none."""
        self.let_go(stream.id)
        if descriptor is None:
            return
        from kvguard.engine.lifeline import Watch

        watch = None
        try:
            watch = Watch(descriptor)
            self._watches.watch(watch.bell, lambda: self._marked(stream, watch))
            self._held[stream.id] = watch
        except (OSError, RuntimeError) as error:  # no descriptor, no memory or no thread left: a rank without an early sign is served all the same
            log.warning("%s: its lifeline can't be watched (%s): its death is seen through its pidfd alone", stream.id, str(error))
            if watch is not None:
                watch.close()

    def let_go(self, stream: StreamId) -> None:
        """Its process has ended, or is about to in order. Idempotent."""
        watch = self._held.pop(stream, None)
        if watch is not None:
            self._watches.forget(watch.bell)
            watch.close()

    def close(self) -> None:
        """Nobody is watched any more. Those whose turn doesn't come within CLOSE_S go with this process, which is to end."""
        deadline = self._clock() + CLOSE_S
        while self._held and self._clock() < deadline:
            self.let_go(next(iter(self._held)))
        while self._held:
            self._watches.forget(self._held.popitem()[1].bell)

    def _marked(self, stream: Stream, watch: Watch) -> Iterable[events.Event]:
        if self._held.get(stream.id) is not watch:
            return ()  # its pidfd fired in the same turn
        self.let_go(stream.id)
        return (events.DeathSuspected(stream.incarnation, stream.id, REASON),)
