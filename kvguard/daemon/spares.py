"""The standbys of this node: processes with their weights loaded that hold no rank yet.

Knows: pidfds, what a standby says that it can take, which replicas it was told to pull. Must not know: pools, tables, plans.
Invariants: what a standby claims is checked before anything is kept of it; a pidfd is watched as long as its record lives, and closed with it; of a dead
process's memory one standby at a time is the heir.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from kvguard.core import events
from kvguard.daemon.descriptors import readable
from kvguard.daemon.lifelines import Watches
from kvguard.daemon.seats import Spare
from kvguard.errors import BadConfig, Refused
from kvguard.format import local
from kvguard.types import Rank, StreamId

SPARES_MAX = 64
LAYOUTS_MAX = 1024  # of ranks that one standby can take
END_MS = 100  # so long the daemon waits for a process that it has killed


class Spares:
    """By incarnation."""

    def __init__(self, watches: Watches) -> None:
        self._watches = watches
        self.known: dict[int, Spare] = {}

    def attach(self, connection: int, message: local.Attach, pidfd: int, taken: list[int]) -> events.StandbyAttached:
        """`pidfd` is kept, and said so in `taken`, for one that wasn't known. Raises Refused, and OSError where it can't be watched."""
        fingerprints = _fingerprints(message)
        former = self.known.get(message.incarnation)
        if former is None and len(self.known) >= SPARES_MAX:
            raise Refused(f"{SPARES_MAX} standbys are attached already")
        if former is not None:
            former.connection = connection
        else:
            spare = Spare(message.instance, message.incarnation, pidfd, connection)
            self._watches.watch(spare.pidfd, lambda: (self._died(spare, "its process ended"),))
            taken.append(spare.pidfd)
            self.known[spare.incarnation] = spare
        return events.StandbyAttached(message.instance, message.incarnation, message.endpoint, fingerprints)

    def of(self, connection: int) -> list[Spare]:
        return [spare for spare in self.known.values() if spare.connection == connection]

    def took_rank(self, connection: int) -> None:
        """A standby that took a rank goes on over its connection as that rank."""
        for spare in self.of(connection):
            self._drop(spare)

    def hand(self, spare: Spare, stream: StreamId, kill: Callable[[int], None]) -> None:
        """`spare` is to go on in this dead process's table and pool. Who was handed them before, and was only slow, or stopped, would write there beside it: it
        is ended first. Raises Refused where it doesn't die at once."""
        for other in [one for one in self.known.values() if one.adopts == stream and one is not spare]:
            kill(other.incarnation)
            if not readable(other.pidfd, END_MS):
                raise Refused(f"standby {other.incarnation}, which was handed what is left of {stream} before, is still dying. Try: again in a moment")
        spare.adopts = stream

    def detach(self, connection: int) -> list[events.Event]:
        return [self._died(spare, "detached") for spare in self.of(connection)]

    def failed(self, connection: int) -> tuple[StreamId, ...]:
        """It says that it can't take what it was given: which replicas it was to pull. It is nobody's heir any more."""
        for spare in self.of(connection):
            spare.adopts = None
        return tuple(stream for spare in self.of(connection) for stream in spare.sources)

    def close(self) -> None:
        for spare in list(self.known.values()):
            self._drop(spare)

    def _died(self, spare: Spare, reason: str) -> events.ProcessDied:
        self._drop(spare)
        return events.ProcessDied(spare.incarnation, None, spare.killed or reason, False)

    def _drop(self, spare: Spare) -> None:
        self._watches.forget(spare.pidfd)
        os.close(spare.pidfd)
        del self.known[spare.incarnation]


def _fingerprints(message: local.Attach) -> dict[str, int]:
    """Of the ranks that a standby can take. Raises Refused: an unchecked layout may claim sizes that nobody could count through."""
    if len(message.layouts) > LAYOUTS_MAX:
        raise Refused(f"a standby for {len(message.layouts)} ranks, at most {LAYOUTS_MAX}")
    try:
        for rank, layout in message.layouts.items():
            Rank.parse(rank)
            layout.check(layout.pool_bytes)
        return {rank: layout.fingerprint for rank, layout in message.layouts.items()}
    except (BadConfig, ValueError, OverflowError) as error:
        raise Refused(f"a standby whose ranks or layouts make no sense: {error}") from error
