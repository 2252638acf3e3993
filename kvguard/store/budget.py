"""The bytes that all replicas of a node may take.

Knows: three sums. Must not know: pages, sequences.
Invariants (check): used + promised <= bytes_max at all times, so that whatever was admitted can be kept (a bound that was made smaller holds once they are
below it, and until then they don't grow); used + retained <= bytes_max, where retained memory (freed, not yet given back to the system) is given back as
soon as it stands in the way.
"""

from __future__ import annotations

from collections.abc import Callable

from kvguard.errors import StoreFull


class Budget:
    """`used`: live pages and ids. `promised`: what admitted sequences will still need. `retained`: freed pages whose memory is kept for the next use."""

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = self._ceiling = bytes_max
        self.used = 0
        self.promised = 0
        self.retained = 0
        self.reclaimers: list[Callable[[], None]] = []  # each gives its retained memory back and lowers `retained`

    def resize(self, bytes_max: int) -> None:
        """Another bound; nothing that was admitted goes for it."""
        self.bytes_max = bytes_max
        self._ceiling = max(bytes_max, self.used + self.promised)
        if self.used + self.retained > bytes_max:
            self.reclaim()

    def full(self, what: str) -> StoreFull:
        """The error that says so."""
        return StoreFull(f"arena of {self.bytes_max} bytes is full: no room for {what}. Try: a larger store budget, or fewer replicas on this node")

    def promise(self, more: int) -> bool:
        """Reserve `more` bytes (negative gives back); False, and nothing reserved, when they can't be had."""
        if more > 0 and self.used + self.promised + more > self.bytes_max:
            return False
        self.promised += more
        return True

    def use(self, size: int) -> None:
        """Turn a promise into use."""
        assert size <= self.promised, f"{size} bytes used, {self.promised} promised"
        self.promised -= size
        self.used += size
        if self.used + self.retained > self.bytes_max:
            self.reclaim()

    def reclaim(self) -> None:
        """Give all retained memory back to the system."""
        for reclaim in self.reclaimers:
            reclaim()

    def free(self, size: int) -> None:
        assert size <= self.used, f"{size} bytes freed, {self.used} used"
        self.used -= size

    def check(self) -> None:
        assert self.used + self.promised <= self._ceiling and min(self.used, self.promised, self.retained) >= 0
