"""What this node's shell last said of its store and its devices: heartbeats say it on.

Knows: ReplicasSeen, DevicesSeen. Must not know: stores, devices, when a heartbeat is due.
Invariants: figures are said with their age; a device's fault is noted once, when it comes.
"""

from __future__ import annotations

from kvguard.core.effects import Effect, Note
from kvguard.core.events import DevicesSeen, ReplicasSeen

MS = 1_000_000


class Seen:
    """`device_faults`: (device, why it can't be used)."""

    def __init__(self) -> None:
        self.replicas = ReplicasSeen((), 0, 0)
        self.device_faults: tuple[tuple[str, str], ...] = ()
        self._at_ns = 0

    def store(self, now: int, event: ReplicasSeen) -> tuple[Effect, ...]:
        self.replicas, self._at_ns = event, now
        return ()

    def devices(self, now: int, event: DevicesSeen) -> tuple[Effect, ...]:
        new = [fault for fault in event.faults if fault not in self.device_faults]
        self.device_faults = event.faults
        return tuple(Note("device_fault", device, reason) for device, reason in new)

    def age_ms(self, now: int) -> float:
        """Of the store's figures."""
        return (now - self._at_ns) / MS
