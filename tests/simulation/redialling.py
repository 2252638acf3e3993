"""Worlds in which the emitter's link breaks again and again: it says each time anew what was delivered, also of names that are other sequences' by then.

Knows: the world, the driver's link. Must not know: what should come of it (checks.py).
Invariants: its randomness is apart: worlds in which no link breaks so are what they were; from calm() on nothing breaks any more.
"""

from __future__ import annotations

from random import Random

MS = 1_000_000
SHARE = 0.2


class Redialling:
    """`on`: whether this is such a world; names are given away again in all of them."""

    def __init__(self, world) -> None:
        self.world = world
        self.random = Random(f"redialling {world.seed}")
        self.on = self.random.random() < SHARE
        if self.on:
            world.reuses = 0.5

    def plan(self, end_ns: int) -> None:
        if not self.on:
            return
        self._again()
        at = self.random.randrange(150 * MS, max(end_ns, 151 * MS))
        self.world.after(at, lambda: self.world.faults.strike("kill_driver"))  # so that a plan is made without it
        self.world.after(at + self.random.randrange(400) * MS, lambda: self.world.faults.strike("kill_rank"))

    def _again(self) -> None:
        world = self.world
        if not world.faults.calmed:
            world.count("emitter_redialled", world.network.reset_link("driver", "coordinator"))
            world.after(self.random.randrange(20, 200) * MS, self._again)
