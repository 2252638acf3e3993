"""Other processes' GPU memory, mapped here: each allocation once, however many pools lie in it, by handle or by descriptor.

Knows: a driver, cards. Must not know: pools, layouts.
Invariants: the last close of a mapping unmaps it, no other does; what was taken by descriptor is not taken twice: its name says that it is the same. Nothing
here waits for what was launched: whoever closes has waited for its own copies, and for no longer than it may.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from kvguard.device import card
from kvguard.device.driver import Driver
from kvguard.device.exports import close_all, mapped
from kvguard.device.virtual import Segment


@dataclass
class _Open:
    """`segment`: None for what was opened by handle."""

    address: int
    size: int
    segment: Segment | None
    users: int = 0


class Mappings:
    """Belongs to one driver; pools open in one thread and close in another."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._open: dict[bytes, _Open] = {}  # by handle, or name
        self._lock = threading.Lock()

    def open(self, terms: card.Card, descriptors: list[int]) -> tuple[int, int]:
        """(address, bytes) of the memory in which the card's pool lies. `descriptors`: what came behind the card, taken. Raises Refused, DeviceLost."""
        try:
            with self._lock:
                if terms.handle not in self._open:
                    self._open[terms.handle] = self._opened(terms, descriptors)
                found = self._open[terms.handle]
                found.users += 1
                return found.address, found.size
        finally:
            close_all(descriptors)

    def _opened(self, terms: card.Card, descriptors: list[int]) -> _Open:
        if terms.chunks:
            segment = mapped(self._driver, terms, descriptors)
            return _Open(segment.address, segment.size, segment)
        address = self._driver.open_handle(terms.handle)
        try:
            found = self._driver.allocation_of(address)
            return _Open(address, found.address + found.size - address, None)
        except BaseException:
            self._driver.close_handle(address)
            raise

    def close(self, terms: card.Card) -> None:
        """Of a user that has nothing on its way there any more. Raises DeviceLost, Refused; then it stays mapped until this process ends."""
        with self._lock:
            found = self._open[terms.handle]
            found.users -= 1
            if found.users:
                return
            del self._open[terms.handle]
            if found.segment is not None:
                found.segment.close()
            else:
                self._driver.close_handle(found.address)
