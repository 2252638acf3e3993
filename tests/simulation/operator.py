"""An operator at work while things break: ranks handed off, nodes drained and taken back, replicas doubted.

Knows: orders and whom they go to. Must not know: what should come of them (checks.py).
Invariants: drawn from randomness of its own, so that worlds without an operator stay what they were; from calm() on nothing is drained any more.
"""

from __future__ import annotations

from random import Random

from simulation.lives import MS

from kvguard.core.events import Asked, ResyncAsked


class Operator:
    def __init__(self, world) -> None:
        self.world = world
        self.random = Random(f"operator {world.seed}")
        self.works = self.random.random() < 0.25

    def plan(self, end_ns: int) -> None:
        for _ in range(self.random.randrange(1, 4) if self.works else 0):
            order = self.random.choice((self._handoff, self._handoff, self._drain, self._undo, self._resync))
            self.world.after(self.random.randrange(100 * MS, max(end_ns, 101 * MS)), order)

    def calm(self) -> None:
        for node in self.world.nodes if self.works else ():
            self._again(node)

    def _again(self, node: str) -> None:
        """Until somebody has heard it."""
        life = self.world.coordinator.life
        if life is None or node in life.core.known.drained:
            self._ask("drain", node=node, undo=True)
            self.world.after(100 * MS, lambda: self._again(node))

    def _ask(self, verb: str, **arguments) -> None:
        life = self.world.coordinator.life
        if life is not None:
            self.world.count(f"ordered_{verb}")
            self.world.note(f"ORDER {verb} {arguments}")
            life.loop.feed(Asked(1, verb, arguments))
            self.world.wake("coordinator")

    def _handoff(self) -> None:
        stage = self.random.randrange(self.world.stages)
        tp = self.random.randrange(self.world.mates) if self.world.mates > 1 else 0
        self._ask("handoff", instance=self.world.instance, rank=f"0.{stage}.{tp}", to=self.random.choice(sorted(self.world.nodes)))

    def _drain(self) -> None:
        self._ask("drain", node=self.random.choice(sorted(self.world.nodes)))

    def _undo(self) -> None:
        self._ask("drain", node=self.random.choice(sorted(self.world.nodes)), undo=True)

    def _resync(self) -> None:
        for host in self.world.nodes.values():
            if host.life is not None:
                self.world.count("ordered_resync")
                host.life.loop.feed(ResyncAsked(self.world.instance))
                self.world.wake(host.name)
