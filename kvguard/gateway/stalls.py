"""What a client waits for between a loss and the next id, part by part.

Knows: names of parts, times. Must not know: instances, clocks. Invariant: the parts follow each other without a gap: their sum is the stall.
"""

from __future__ import annotations

FENCE, RECOVERY, PLACING, FIRST_TOKEN = PARTS = ("fence", "recovery", "placing", "first_token")


class Stall:
    """Begins at `now` (seconds on one clock, as all times here). `parts`: seconds.

    fence: from the loss to the fence, or until none was waited for any more; recovery: from there to the resume token; placing: until an instance that takes
    the rest was there; first_token: from asking it to its first id, restoring included (also of one that was asked in vain).
    """

    def __init__(self, now: float) -> None:
        self._at = now
        self.parts = dict.fromkeys(PARTS, 0.0)

    def until(self, part: str, now: float) -> None:
        """What lasted until `now` was `part`. Times before the newest count nothing."""
        if now > self._at:
            self.parts[part] += now - self._at
            self._at = now

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        return f"{1e3 * self.seconds:.1f} ms: " + ", ".join(f"{part} {1e3 * seconds:.1f}" for part, seconds in self.parts.items())
