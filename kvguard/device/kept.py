"""Memory that outlives its engine: the node's daemon makes it, engine and daemon map it, and whoever takes a dead engine's rank goes on in it, without a copy.

Knows: cards by descriptor, a daemon's view of a pool. Must not know: who lives, who takes a rank.

Invariants
- It is one file behind one card, dup'ed and never made anew: equal files are the same memory, whoever hands them on.
- It lives while anybody maps it or holds its descriptors, and goes with the last of them.
- After a fault of the GPU it is as lost as any: nobody goes on in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from kvguard.device import card
from kvguard.device.driver import Driver
from kvguard.device.exports import DIRECT_MAX, close_all, mapped
from kvguard.device.host import HostPool
from kvguard.device.mappings import Mappings
from kvguard.device.opened import OpenedPool
from kvguard.errors import Refused
from kvguard.format.layout import Layout


def refuse_unkeepable(terms: card.Card, descriptors: Sequence[int]) -> None:
    """Raises Refused for what could not be handed on again."""
    if not 0 < len(terms.chunk_sizes()) <= DIRECT_MAX or len(descriptors) != 1 + len(terms.chunk_sizes()):
        raise Refused(f"{len(descriptors)} descriptors are no memory that can be kept for a successor. Try: kvguard.engine.borrow")


class Kept:
    """Descriptors of such memory, held here to be handed on."""

    def __init__(self, descriptors: Sequence[int]) -> None:
        self._descriptors = [os.dup(descriptor) for descriptor in descriptors]

    def export(self) -> list[int]:
        """The caller's to close."""
        return [os.dup(descriptor) for descriptor in self._descriptors]

    def close(self) -> None:
        close_all(self._descriptors)


class KeptMemory:
    """It, as its present engine has it mapped. `address`: of the pool."""

    def __init__(self, driver: Driver, terms: card.Card, descriptors: Sequence[int]) -> None:
        """`descriptors`: the caller's. Raises Refused, DeviceLost."""
        refuse_unkeepable(terms, descriptors)
        if sum(terms.chunk_sizes()) < terms.offset + terms.size:
            raise Refused(f"the memory has {sum(terms.chunk_sizes())} bytes, too few for the pool that it is said to hold. Try: kvguard.engine.borrow")
        self._kept = Kept(descriptors)
        try:
            self._segment = mapped(driver, terms, [os.dup(descriptor) for descriptor in descriptors[1:]])
        except BaseException:
            self._kept.close()
            raise
        self.address = self._segment.address + terms.offset

    def export(self) -> list[int]:
        """[card, ...], the caller's to close."""
        return self._kept.export()

    def close(self) -> None:
        """Nothing that was launched may touch it any more. Raises DeviceLost, Refused."""
        self._kept.close()
        self._segment.close()


class KeptPool(OpenedPool):
    """Its daemon's view. What is committed in it when its engine dies is where it was, for whoever takes the rank."""

    def __init__(self, driver: Driver, layout: Layout, mappings: Mappings, terms: card.Card, descriptors: list[int], **how) -> None:
        """`descriptors`: [card, ...], the caller's. `how`: as OpenedPool."""
        refuse_unkeepable(terms, descriptors)
        self._kept = Kept(descriptors)
        try:
            super().__init__(driver, layout, mappings, terms, [os.dup(descriptor) for descriptor in descriptors[1:]], **how)
        except BaseException:
            self._kept.close()
            raise

    def export(self) -> list[int]:
        """The same files as ever. Raises Refused after a fault of the GPU, and once it was closed."""
        if self.lost or self._closed:
            raise Refused(self.lost or "the pool was closed. Try: attach again")
        return self._kept.export()

    def salvage(self, sequences: Sequence[Sequence[int]], salvage_ms_max: int) -> tuple[KeptPool, int]:
        """All of it is where it was, and stays mapped; the ring is the successor's. Raises DeviceLost after a fault of the GPU."""
        self._refuse_lost()
        if self._ring is not None:
            self._ring.forget()
        return self, len(sequences)

    def brought_out(self, sequences: Sequence[Sequence[int]], salvage_ms_max: int) -> tuple[HostPool, int]:
        """What salvage is for memory that nobody keeps: for those who can't open this. Raises DeviceLost."""
        return super().salvage(sequences, salvage_ms_max)

    def close(self) -> None:
        super().close()
        self._kept.close()
