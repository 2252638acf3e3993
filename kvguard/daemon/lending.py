"""Memory that this node makes for an engine's pool, so that it outlives the engine: handed over by descriptor, mapped here when the engine attaches with it.

Knows: local messages, a device. Must not know: ranks, who will attach.
Invariants: nothing of it is held here between the answer and the Attach: an engine that dies in between takes it along; an engine is answered or refused.
"""

from __future__ import annotations

import logging
import os

from kvguard.daemon.ranks import Tells
from kvguard.device import open_device
from kvguard.device.base import Device
from kvguard.errors import KvguardError, Refused
from kvguard.format import local

log = logging.getLogger(__name__)
HOST = "host"


def lend(device: Device, tell: Tells, connection: int, message: local.PoolWanted, stuck: str = "") -> None:
    """Answers PoolLent or LendRefused. `stuck`: why a GPU's driver would not answer now, and this daemon with it."""
    descriptors: list[int] = []
    try:
        if message.device not in (device.kind, HOST):
            raise Refused(f"this daemon's pools are of the kind {device.kind!r}, not {message.device!r}. Try: device = \"{message.device}\" in [node]")
        if stuck and message.device != HOST:
            raise Refused(stuck)
        lender = open_device(HOST) if message.device == HOST else device  # a daemon with a GPU takes host pools as well
        descriptors = lender.lend(message.layout, message.gpu)
        tell(connection, local.PoolLent(), descriptors)
        log.info("memory lent for a pool of %d bytes", message.layout.pool_bytes)
    except (KvguardError, ValueError, OverflowError, OSError) as error:
        log.warning("no memory lent for a pool: %s", error)
        tell(connection, local.LendRefused(str(error)))
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
