"""Engines at the door: what each says is checked, its pool opened in the thread of its GPU, and it is seated and answered.

Knows: local messages, descriptors, a device, the GPUs' threads. Must not know: what a seat is (ranks.py), decisions, the socket itself (control.py).

Invariants
- An engine is answered or refused, never believed: sizes, layout, owner of the pidfd are checked before anything is mapped.
- Opening a pool on a GPU holds up nobody else. Whether it may be seated is asked again when it is open: who was seated meanwhile was first.
- Of one (instance, rank) one is at the door at a time. A line that goes is no death and ends nothing; Detach does. What else an engine says behind its Attach
  (that it has restored, what it wants to fetch) is heard behind it.
- Of whoever isn't seated nothing stays open: descriptors are closed here, a pool in its GPU's thread, however late it comes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from kvguard.core import events
from kvguard.daemon import schedulers
from kvguard.daemon.copies import gpu_of
from kvguard.daemon.descriptors import Lot, is_eventfd, process_of
from kvguard.daemon.seats import LocalRank
from kvguard.daemon.spares import Spares
from kvguard.daemon.workers import Job, Outcome, Workers
from kvguard.device.base import Device, Pool
from kvguard.errors import DeviceLost, KvguardError, Refused
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.limits import NAME_BYTES_MAX
from kvguard.types import NO_EPOCH, Epoch, Rank, is_scheduler

log = logging.getLogger(__name__)

Events = Iterable[events.Event]
PIDFD, BELL, TABLE, POOL = 0, 1, 2, 3  # places of an Attach's descriptors
UNHEARD_MAX = 64  # a client keeps 8 that it couldn't say


class NotYet(Refused):
    """An engine may try again in a moment."""


class Tells(Protocol):
    """control.ControlServer.send: descriptors stay the caller's; False where the connection is gone or doesn't read."""

    def __call__(self, connection: int, message: local.Local, descriptors: Sequence[int] = ()) -> bool: ...


class Arrival:
    """One Attach, with its descriptors: those that nobody takes are closed with it. `is_connected`: its line is up. `is_over`: it has gone away again."""

    def __init__(self, connection: int, message: local.Attach, descriptors: list[int]) -> None:
        self.connection, self.message = connection, message
        self.lifeline = descriptors.pop() if message.lifeline and len(descriptors) > POOL else None
        self.pool = Lot(descriptors[POOL:])  # whoever opens it is another thread
        self._own = descriptors[:POOL]
        self._taken: set[int] = set()
        self.is_connected, self.is_over = True, False
        self.unheard: list[Callable[[], Events]] = []

    @property
    def place(self) -> tuple[str, Rank]:
        return self.message.instance, self.message.stream.rank

    def __len__(self) -> int:
        return len(self._own) + len(self.pool)

    def __getitem__(self, place: int) -> int:
        return self._own[place]

    def take(self, place: int) -> int:
        """It is the caller's from now on."""
        self._taken.add(place)
        return self._own[place]

    def close(self) -> None:
        """Once."""
        for descriptor in (one for place, one in enumerate(self._own) if place not in self._taken):
            os.close(descriptor)
        if self.lifeline is not None:
            os.close(self.lifeline)
        self.pool.close()


class Desk(Protocol):
    """What is asked of ranks.Ranks."""

    def wanted(self, arrival: Arrival) -> Layout | None:
        """The layout of the pool that is to be opened before it can be seated, None for none. Raises Refused where it can't be seated, NotYet where not now."""

    def seat(self, arrival: Arrival, pool: Pool | None) -> tuple[LocalRank, Events]:
        """Raises as `wanted`, and OSError: then nothing has changed, and the pool is the caller's still."""

    def disconnected(self, connection: int) -> None:
        """Its line has gone."""


class Arrivals:
    """`epochs`: promised, by instance (perform_node.NodeShell)."""

    def __init__(self, device: Device, workers: Workers, desk: Desk, standbys: Spares, tell: Tells, epochs: dict[str, Epoch]) -> None:
        self._device, self._workers, self._desk, self._standbys = device, workers, desk, standbys
        self._tell, self._epochs = tell, epochs
        self._coming: dict[tuple[str, Rank], Arrival] = {}  # those whose pool is being opened

    def __len__(self) -> int:
        return len(self._coming)

    def attach(self, connection: int, pid: int, message: local.Attach, descriptors: list[int]) -> Events:
        """Takes ownership of the descriptors. Answers Attached or AttachRefused on the connection, now or in a later turn. `pid`: the kernel's word for it."""
        arrival = Arrival(connection, message, descriptors)
        try:
            if not len(arrival) or process_of(arrival[PIDFD]) != pid:
                raise Refused("the first descriptor is not this process's own pidfd. Try: kvguard.engine.attach")
            return self._begun(arrival)
        except (KvguardError, OSError) as error:
            return self._refused(arrival, error)

    def _begun(self, arrival: Arrival) -> Events:
        message = arrival.message
        if message.version != 1:
            raise Refused(f"protocol version {message.version} of the engine is not 1. Try: the same kvguard version in engine and daemon")
        if not 0 < len(message.instance.encode()) <= NAME_BYTES_MAX or len(message.endpoint.encode()) > 4 * NAME_BYTES_MAX:
            raise Refused(f"instance {message.instance!r} or endpoint is empty or too long. Try: at most {NAME_BYTES_MAX} bytes")
        if message.role == "standby":
            return self._standby(arrival)
        if message.role == "scheduler":
            arrival.message = schedulers.described(message, len(arrival))
        elif not _is_rank(message) or len(arrival) <= POOL:
            raise Refused(f"{message.role!r} can't be attached as it was described. Try: kvguard.engine.attach, or attach_standby")
        if not is_eventfd(arrival[BELL]):
            raise Refused("the second descriptor is not an eventfd: this daemon could not wait for it. Try: kvguard.engine.attach")
        if arrival.lifeline is not None:
            from kvguard.engine.lifeline import refuse_other

            refuse_other(arrival.lifeline)
        if arrival.place in self._coming:
            raise NotYet(f"the pool of rank {arrival.place[1]} of {message.instance!r} is being opened. Try: again in a moment")
        layout = self._desk.wanted(arrival)
        return self._seated(arrival, None) if layout is None else self._open(arrival, layout)

    def _standby(self, arrival: Arrival) -> Events:
        taken: list[int] = []
        told = self._standbys.attach(arrival.connection, arrival.message, arrival[PIDFD], taken)
        if taken:
            arrival.take(PIDFD)
        arrival.close()
        self._tell(arrival.connection, local.Attached(self._epochs.get(arrival.message.instance, NO_EPOCH)))
        return (told,)

    # ---- a pool -------------------------------------------------------------------------------------------------------------------

    def _open(self, arrival: Arrival, layout: Layout) -> Events:
        device = self._device
        gpu = device.where(arrival.pool.descriptors)
        self._coming[arrival.place] = arrival
        job = Job(
            lambda: device.open(layout, arrival.pool.take(), writable=False), lambda outcome: self._opened(arrival, outcome), discard=_closed, proves=True,
        )  # fmt: skip
        return self._workers.put(gpu, job, first=True)

    def _opened(self, arrival: Arrival, outcome: Outcome) -> Events:
        """In the loop's thread, also where nothing could be opened in time."""
        self._coming.pop(arrival.place, None)
        told = [*self._answered(arrival, outcome)]
        for hear in () if arrival.is_over else arrival.unheard:
            told += hear()
        if not arrival.is_connected:  # what it had said counts all the same
            self._desk.disconnected(arrival.connection)
        return told

    def _answered(self, arrival: Arrival, outcome: Outcome) -> Events:
        if outcome.error is not None:
            error = outcome.error
            return self._refused(arrival, NotYet(str(error)) if isinstance(error, (DeviceLost, OverflowError)) else error)
        pool = outcome.value
        try:
            if arrival.is_over:
                raise NotYet("it was detached before it was attached")
            return self._seated(arrival, pool)
        except (KvguardError, OSError) as error:
            self._workers.release(gpu_of(pool), pool.close)
            return self._refused(arrival, error)

    # ---- answers ------------------------------------------------------------------------------------------------------------------

    def _seated(self, arrival: Arrival, pool: Pool | None) -> Events:
        rank, told = self._desk.seat(arrival, pool)
        arrival.close()
        self._welcome(arrival, rank)
        return told

    def _welcome(self, arrival: Arrival, rank: LocalRank) -> None:
        """Attached, with what a pool on a GPU gives its engine: the ring that it packs its steps into. Then what it hasn't carried out yet."""
        descriptors: list[int] = []
        try:
            descriptors = rank.pool.welcome() if hasattr(rank.pool, "welcome") else []
        except (KvguardError, OSError) as error:  # it packs nothing then, and its pool is read
            log.error("no ring for %s: %s", rank.stream.id, str(error))
        self._tell(arrival.connection, local.Attached(self._epochs.get(arrival.message.instance, NO_EPOCH)), descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        if rank.order is not None:
            self._tell(arrival.connection, local.RestoreOrder(rank.order))

    def _refused(self, arrival: Arrival, error: Exception) -> Events:
        """Whatever it is, the daemon lives on without this engine."""
        arrival.close()
        name = arrival.message.stream or arrival.message.instance
        if isinstance(error, Refused):
            log.warning("attach of %s refused: %s", name, str(error))
            self._tell(arrival.connection, local.AttachRefused(str(error), type(error) is not NotYet))
        else:  # no descriptor, or no memory, left; or a bug
            log.error("attach of %s failed", name, exc_info=error)
            self._tell(arrival.connection, local.AttachRefused(f"the daemon can't take it: {error}. Try: a higher LimitNOFILE; its log says more", False))
        return ()

    # ---- going away ---------------------------------------------------------------------------------------------------------------

    def behind(self, connection: int, hear: Callable[[], Events]) -> bool:
        """Whether an Attach of that line is under way: then `hear` is called once it is answered, for the first UNHEARD_MAX messages."""
        arrival = next((one for one in self._coming.values() if one.connection == connection), None)
        if arrival is not None and len(arrival.unheard) < UNHEARD_MAX:
            arrival.unheard.append(hear)
        elif arrival is not None:
            log.warning("%s says more than %d things before it is attached: not heard", arrival.message.stream, UNHEARD_MAX)
        return arrival is not None

    def detach(self, connection: int) -> None:
        for arrival in self._coming.values():
            arrival.is_over = arrival.is_over or arrival.connection == connection

    def disconnected(self, connection: int) -> None:
        """The socket went; the process may live on and come back."""
        for arrival in self._coming.values():
            arrival.is_connected = arrival.is_connected and arrival.connection != connection

    def close(self) -> None:
        """Whoever still waits is not seated any more."""
        while self._coming:
            self._coming.popitem()[1].close()


def _closed(pool: Pool) -> None:
    pool.close()


def _is_rank(message: local.Attach) -> bool:
    """Whether it is described as a rank of its instance: in a place that a rank may have."""
    stream = message.stream
    named = stream is not None and stream.instance == message.instance and not is_scheduler(stream.rank)
    return message.role == "rank" and named and len(message.layouts) == 1
