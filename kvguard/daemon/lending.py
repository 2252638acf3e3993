"""Memory that this node makes for an engine's pool, so that it outlives the engine: handed over by descriptor, mapped here when the engine attaches with it.

Knows: local messages, a device, the GPUs' threads. Must not know: ranks, who will attach.
Invariants: nothing of it is held here between the answer and the Attach: an engine that dies in between takes it along; an engine is answered or refused, once,
also where its GPU doesn't answer; for a line one pool at a time is made.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from kvguard.core import events
from kvguard.daemon.arrivals import Tells
from kvguard.daemon.descriptors import Lot
from kvguard.daemon.workers import Job, Outcome, Workers
from kvguard.device import open_device
from kvguard.device.base import Device
from kvguard.errors import KvguardError, Refused
from kvguard.format import local

log = logging.getLogger(__name__)
HOST = "host"


class Lending:
    """`lend` for every local.PoolWanted that comes in."""

    def __init__(self, device: Device, workers: Workers, tell: Tells) -> None:
        self._device, self._workers, self._tell = device, workers, tell
        self._asking: set[int] = set()

    def lend(self, connection: int, message: local.PoolWanted) -> Iterable[events.Event]:
        """Answers PoolLent or LendRefused on the connection, now or in a later turn."""
        try:
            if message.device not in (self._device.kind, HOST):
                kinds = f"{self._device.kind!r}, not {message.device!r}"
                raise Refused(f"this daemon's pools are of the kind {kinds}. Try: device = \"{message.device}\" in [node]")
            if connection in self._asking:
                raise Refused("a pool is being made for this line already. Try: one after the other")
            lender = open_device(HOST) if message.device == HOST else self._device  # a daemon with a GPU takes host pools as well
            gpu = lender.lends_on(message.gpu)
        except KvguardError as error:
            self._refuse(connection, error)
            return ()
        self._asking.add(connection)
        job = Job(
            lambda: Lot(lender.lend(message.layout, message.gpu)), lambda outcome: self._lent(connection, message, outcome), discard=Lot.close, proves=True,
        )  # fmt: skip
        return self._workers.put(gpu, job)

    def _lent(self, connection: int, message: local.PoolWanted, outcome: Outcome) -> Iterable[events.Event]:
        self._asking.remove(connection)
        if outcome.error is not None:
            self._refuse(connection, outcome.error)
            return ()
        self._tell(connection, local.PoolLent(), outcome.value.descriptors)
        outcome.value.close()
        log.info("memory lent for a pool of %d bytes", message.layout.pool_bytes)
        return ()

    def _refuse(self, connection: int, error: Exception) -> None:
        log.warning("no memory lent for a pool: %s", str(error))
        self._tell(connection, local.LendRefused(str(error)))
