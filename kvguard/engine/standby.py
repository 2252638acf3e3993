"""A spare process: weights loaded, no rank yet, ready to be claimed.

Knows: claims and their descriptors. Must not know: who decides on claims.
Invariants: a claim's descriptors are owned here until they are mapped or the claim is closed; a newer claim replaces one that nobody took.
"""

from __future__ import annotations

import os
import threading

from kvguard.device import open_device
from kvguard.engine.client import Session, client
from kvguard.engine.packets import close_all
from kvguard.engine.table import TableWriter
from kvguard.errors import KvguardError, Refused
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.format.messages import PlanOrder
from kvguard.types import NO_EPOCH, Epoch, Rank


class Claim:
    """This process is to be `rank` of `instance` from `epoch` on: attach(..., claim=claim), then restore.

    `adopt`: (table, pool) of the dead process, mapped here, or None: allocate a pool and pull. `plan`, `order`: as they came. `arenas`: replicas' descriptors.
    """

    def __init__(self, order: local.ClaimOrder, descriptors: list[int], session: Session, device: str) -> None:
        self.order, self.session = order, session
        self.instance: str = order.instance
        self.rank: Rank = order.rank
        self.epoch: Epoch = order.epoch
        self.plan: PlanOrder = order.plan
        self.arenas: list[int] = []
        self.adopt: tuple[TableWriter, object] | None = None
        if not order.adopt:
            self.arenas = descriptors
            self._refuse_odd_arenas()
            return
        if order.layout is None or order.stream is None or len(descriptors) < 2:
            close_all(descriptors)
            self._refuse("an adoption without layout, stream, table or pool")
        pool = None
        try:
            pool = open_device(device).open(order.layout, descriptors[1:])  # owns them, also on refusal
            self.adopt = (TableWriter.adopt(os.dup(descriptors[0])), pool)
        except (KvguardError, OSError) as error:
            if pool is not None:
                pool.close()
            self._refuse(f"the dead process's table or pool can't be adopted: {error}")
        finally:
            os.close(descriptors[0])

    def _refuse_odd_arenas(self) -> None:
        if len(self.arenas) != len(self.order.replicas):
            self.close()
            self._refuse(f"{len(self.order.replicas)} replicas with {len(self.arenas)} descriptors")

    def _refuse(self, reason: str) -> None:
        self.session.say(local.Restored(self.instance, self.rank, self.epoch, reason))
        raise Refused(f"claim of {self.rank} of {self.instance!r}: {reason}. Try: wait for the next claim")

    def become(self, guard) -> None:
        """The standby's line is the rank's from now on; the rank's Attach goes out before anything else."""
        self.close()
        guard.session = self.session
        self.session.attach_again(guard.attachment, guard.received)

    def close(self) -> None:
        """Close the replicas' descriptors. Idempotent."""
        close_all(self.arenas)
        self.arenas = []


class Standby:
    """From attach_standby. `wait` belongs to one thread."""

    def __init__(self, instance: str, layouts: dict[str, Layout], endpoint: str, path: str, device: str) -> None:
        self.instance, self.layouts, self.endpoint = instance, layouts, endpoint
        self.incarnation = int.from_bytes(os.urandom(8), "little") >> 1
        self._device = device
        self._changed = threading.Condition()
        self._order: tuple[local.ClaimOrder, list[int]] | None = None
        self._taken = NO_EPOCH
        self._claimed = False
        self.session = Session(path, self._attachment, self._received)
        client().add(self.session)

    @property
    def connected(self) -> bool:
        return self.session.connected

    def wait(self, timeout_s: float) -> Claim | None:
        """The claim of a rank, or None when there is none within `timeout_s`. Raises Refused (also said to the daemon) for one that can't be taken."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._order is not None, timeout_s):
                return None
            (order, descriptors), self._order = self._order, None
            self._taken = order.epoch
        claim = Claim(order, descriptors, self.session, self._device)
        self._claimed = True
        return claim

    def detach(self, timeout_s: float = 1.0) -> None:
        """A clean end of a spare that was not claimed; after a claim the guard's detach ends the line."""
        with self._changed:
            if self._order is not None:
                close_all(self._order[1])
                self._order = None
        if not self._claimed:
            self.session.say(local.Detach())
            self.session.end(timeout_s)

    def _attachment(self) -> tuple[local.Local, list[int], list[int]]:
        pidfd = os.pidfd_open(os.getpid())
        return local.Attach("standby", self.instance, self.incarnation, NO_EPOCH, self.endpoint, None, self.layouts), [pidfd], [pidfd]

    def _received(self, message: local.Local, descriptors: list[int]) -> None:
        with self._changed:
            if not isinstance(message, local.ClaimOrder) or message.epoch.counter <= self._taken.counter:
                close_all(descriptors)  # said again while it is being carried out: the answer comes when it is
                return
            if self._order is not None:
                close_all(self._order[1])
            self._order = (message, descriptors)
            self._changed.notify_all()
