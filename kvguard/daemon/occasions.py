"""When an operator's programs are run: a recovery begins, a recovery has ended, a rank is no longer protected.

Knows: notes of the coordinator's core, ranks as its status shows them. Must not know: how programs are run (hooks.py).
Invariant: a rank's loss of protection is told once, and again only after it was protected in between.
"""

from __future__ import annotations

from kvguard.core.effects import Note
from kvguard.daemon.hooks import Hooks

EVENTS = ("on_failover", "on_recovered", "on_unprotected")


class Occasions:
    """What is told to `hooks`, and when."""

    def __init__(self, hooks: Hooks) -> None:
        self.hooks = hooks
        self._protected: dict[tuple[str, str], bool] = {}

    @property
    def watched(self) -> int:
        """Ranks whose loss of protection would be told."""
        return sum(self._protected.values())

    def noted(self, note: Note) -> None:
        """Every note of the core, as it comes."""
        fields = dict(note.fields)
        if note.what == "fenced":
            self.hooks.tell("on_failover", instance=note.subject, reason=note.reason, **fields)
        elif note.what == "resumed":
            self.hooks.tell("on_recovered", instance=note.subject, reason=note.reason, error="", **fields)
        elif note.what == "failed":
            self.hooks.tell("on_recovered", instance=note.subject, reason=note.reason, error=note.reason, **fields)

    def seen(self, ranks: list[dict]) -> None:
        """The status's ranks, looked at from time to time."""
        for rank in ranks:
            key = rank["instance"], rank["rank"]
            if rank["state"] == "protected":
                self._protected[key] = True
            elif rank["state"] == "unprotected" and self._protected.get(key):
                self._protected[key] = False
                self.hooks.tell("on_unprotected", instance=key[0], rank=key[1], node=rank["node"], reason=rank["reason"], sequences=rank["sequences"])
        there = {(rank["instance"], rank["rank"]) for rank in ranks}
        self._protected = {key: value for key, value in self._protected.items() if key in there}
