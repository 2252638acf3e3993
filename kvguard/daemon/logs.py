"""Logging of daemons: stderr, one line an entry, at most so many equal ones in a while.

Knows: stdlib logging. Must not know: what is logged. Invariant: a storm of faults costs a bounded number of lines, and says how many it left out.
"""

from __future__ import annotations

import logging
import time

BURST = 10  # lines of one kind ...
PERIOD_S = 10.0  # ... in this time
KINDS_MAX = 1024


class AtMost(logging.Filter):
    """Lets BURST records of one kind (the message before its arguments are filled in) through per period; the next one says how many were left out."""

    def __init__(self, clock=time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[str, list] = {}  # kind -> [start of the period, how many]

    def filter(self, record: logging.LogRecord) -> bool:
        now = self._clock()
        if len(self._seen) > KINDS_MAX:
            self._seen.clear()
        entry = self._seen.setdefault(str(record.msg), [now, 0])
        if now - entry[0] > PERIOD_S:
            if entry[1] > BURST:
                record.msg = f"{record.msg} [{entry[1] - BURST} more of these were left out]"
            entry[:] = [now, 0]
        entry[1] += 1
        return entry[1] <= BURST


def to_stderr(level: str, name: str) -> logging.Logger:
    """The process's root logger, set up once; `level` as in config.py."""
    output = logging.StreamHandler()
    output.addFilter(AtMost())
    output.setFormatter(logging.Formatter(f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [output]
    set_level(level)
    return root


def set_level(level: str) -> None:
    logging.getLogger().setLevel(level.upper())
