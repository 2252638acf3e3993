"""Worlds in which a step goes back, and lets go, a while after it was entered, and another rank dies in between: the report comes first.

Knows: the world's processes. Must not know: what should come of it (checks.py).
Invariants: its randomness is apart: worlds in which no step goes back late are what they were; from calm() on nobody dies of it any more.
"""

from __future__ import annotations

from random import Random

MS = 1_000_000
SHARE = 0.06
DEATHS = 4


class GoingBack:
    """`on`: whether this is such a world; sequences are preempted often in it."""

    def __init__(self, world) -> None:
        self.world = world
        self.random = Random(f"late acts {world.seed}")
        self.on = self.random.random() < SHARE
        self._deaths = DEATHS
        if self.on:
            world.preempts = 0.3

    def entered(self, process, order, go_on) -> None:
        """`process` has entered the step of `order`: `go_on` now, or later."""
        if not self.on:
            go_on()
            return
        process.later(self.random.randrange(10_000, 30 * MS), go_on)
        if order.acts and self._deaths and process.steps > 8 and self.random.random() < 0.2:
            self._deaths -= 1
            self.world.after(self.random.randrange(MS), lambda: self._kill_beside(process))

    def _kill_beside(self, process) -> None:
        living = [one for one in self.world.processes.values() if one.alive and one.guard is not None and one.instance == process.instance]
        others = [one for one in living if one is not process]
        if others and not self.world.faults.calmed:
            self.random.choice(others).kill("while another rank is in a step")
