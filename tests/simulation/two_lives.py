"""Worlds in which a rank's second life dies while the replicas of its first are still held: what comes back is taken from both.

Knows: the world's processes, when the driver went on. Must not know: what should come of it (checks.py).
Invariants: its randomness is apart: worlds in which no life is lost so are what they were; from calm() on nothing is lost any more, and every word is heard.

The word that replicas of the first life may go is heard late, as behind a slow link, and sequences are preempted often: others take their blocks.
"""

from __future__ import annotations

from random import Random

from kvguard.format import messages

MS = 1_000_000
SHARE = 0.15


class TwoLives:
    """`on`: whether this is such a world. `deaf`: nodes don't hear that anything may go."""

    def __init__(self, world) -> None:
        self.world = world
        self.random = Random(f"two lives {world.seed}")
        self.on = self.random.random() < SHARE
        self.deaf = False
        if self.on:
            world.preempts, world.width = 0.3, max(world.width, 4)

    def plan(self, end_ns: int) -> None:
        if self.on:
            self.world.after(self.random.randrange(100 * MS, max(end_ns // 2, 101 * MS)), self._lose)

    def hears(self, message) -> bool:
        """Whether a node hears this of the coordinator's words now."""
        held = self.deaf and not self.world.faults.calmed and type(message) is messages.Resumed and bool(message.unpinned)
        self.world.count("unpinned_later", held)
        return not held

    def _lose(self) -> None:
        """The first life, and when its successor has served a while that one, too."""
        process = self._kill(None)
        if process is not None:
            self.deaf = True
            self.world.after(MS, lambda: self._again(process.guard.rank, 1500))

    def _again(self, rank, left_ms: int) -> None:
        world, driver = self.world, self.world.driver_host.life
        new = world.processes.get(driver.members.get(rank, "")) if driver is not None else None
        if left_ms <= 0 or world.faults.calmed:
            self.deaf = False
        elif new is not None and new.alive and driver.announced == driver.adopted:
            world.after(self.random.randrange(5, 150) * MS, lambda: self._second(rank))
        else:
            world.after(10 * MS, lambda: self._again(rank, left_ms - 10))

    def _second(self, rank) -> None:
        self.world.count("second_lives_lost", self._kill(rank) is not None)
        self.world.after(self.random.randrange(100, 400) * MS, lambda: setattr(self, "deaf", False))

    def _kill(self, rank):
        """One rank's process, with the spares of its node, so that its pool is nobody's."""
        world = self.world
        ranks = [one for one in world.processes.values() if one.alive and one.guard is not None and one.instance == world.instance and rank in (None, one.guard.rank)]
        if world.faults.calmed or world.moving.on or not ranks:
            return None
        process = self.random.choice(ranks)
        for one in list(world.processes.values()):
            if one is process or (one.alive and one.guard is None and one.node == process.node):
                one.kill("with what its node had to go on with")
        return process
