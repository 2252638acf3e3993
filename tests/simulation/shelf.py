"""Memory of a machine that outlives its daemon: what a service manager's descriptor store, or a tmpfs, is to a real one.

Knows: names and descriptors. Must not know: what is kept. Invariant: it goes with its machine.
"""

from __future__ import annotations

import os

from kvguard.store.shelf import new_memfd


class Shelf:
    """store.shelf.Shelf. `keeps` False: every life of the daemon starts empty."""

    def __init__(self, keeps: bool) -> None:
        self.keeps = keeps
        self._held: dict[str, int] = {}

    def create(self, name: str) -> int:
        self.remove(name)
        descriptor = new_memfd(name)
        if self.keeps:
            self._held[name] = os.dup(descriptor)
        return descriptor

    def kept(self) -> dict[str, int]:
        return {name: os.dup(descriptor) for name, descriptor in self._held.items()}

    def remove(self, name: str) -> None:
        descriptor = self._held.pop(name, None)
        if descriptor is not None:
            os.close(descriptor)

    def burn(self) -> None:
        """The machine is gone."""
        for name in list(self._held):
            self.remove(name)
