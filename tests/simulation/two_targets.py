"""Worlds in which mates are lost together, and one replica is what both come back from, on two other nodes: it is pushed to both at once.

Knows: the world's processes, which daemon sends what to whom. Must not know: what should come of it (checks.py).
Invariants: its randomness is apart: worlds in which no mates are lost so are what they were; from calm() on nothing is lost any more.
"""

from __future__ import annotations

from random import Random

MS = 1_000_000
SHARE = 0.06
PAUSE_MS = 20
NODES = 4  # the mates', their replica's, and one for each of two


class TwoTargets:
    """`on`: whether this is such a world: with mates, enough nodes, and spares on all of them."""

    def __init__(self, world) -> None:
        self.world = world
        self.random = Random(f"two targets {world.seed}")
        self.on = self.random.random() < SHARE

    def plan(self, end_ns: int) -> None:
        for _ in range(2 if self.on else 0):
            self.world.after(self.random.randrange(100 * MS, max(end_ns, 101 * MS)), self._lose)

    def _lose(self) -> None:
        """All ranks of a stage, with the spares beside them and beside their replica; elsewhere one spare a node is left."""
        world = self.world
        living = [process for process in world.processes.values() if process.alive and process.instance == world.instance]
        stage = self.random.randrange(world.stages)
        mates = [process for process in living if process.guard is not None and process.guard.rank.pp == stage]
        if world.faults.calmed or world.moving.on or not mates:
            return
        world.count("mates_lost_together", len(mates) > 1)
        full = dict.fromkeys([process.node for process in mates] + [node for process in mates for node in self._holders(process)])
        for process in [process for process in living if process.guard is None]:
            if process.node in full:
                process.kill("so that its node has no spare, or one")
            full[process.node] = None
        for process in mates:
            process.kill("with its mates")
        world.faults.pause(world.coordinator, PAUSE_MS)  # so that it hears of all of them before it plans

    def _holders(self, process) -> list[str]:
        life = self.world.nodes[process.node].life
        local = life.core.outbound.streams.get(process.guard.stream) if life is not None else None
        return list(local.senders) if local is not None else []
