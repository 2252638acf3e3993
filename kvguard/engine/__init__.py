"""What a serving process calls: join, commit what is true, come back after a failure. Never torch, never a wait inside a step."""

from __future__ import annotations

from kvguard.engine.attach import allocate, attach, attach_scheduler, attach_standby
from kvguard.engine.borrowing import borrow
from kvguard.engine.fetch import Fetch, Fetched
from kvguard.engine.guard import Guard, Step
from kvguard.engine.restore import Restored, RestoredSequence
from kvguard.engine.standby import Claim, Standby
from kvguard.format.layout import Layout
from kvguard.types import Rank

__all__ = [
    "Claim", "Fetch", "Fetched", "Guard", "Layout", "Rank", "Restored", "RestoredSequence", "Standby", "Step", "allocate", "attach", "attach_scheduler",
    "attach_standby", "borrow",
]  # fmt: skip
