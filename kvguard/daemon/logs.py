"""Logging of daemons: stderr, one line an entry (as text, as JSON, or with the journal's priorities), at most so many equal ones in a while.

Knows: stdlib logging. Must not know: what is logged. Invariant: a storm of faults costs a bounded number of lines, and says how many it left out.
"""

from __future__ import annotations

import json
import logging
import os
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


class JsonLines(logging.Formatter):
    """One JSON object a line. A note's own fields (what, subject, reason, epoch ...) stand beside the message."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "at_s": record.created, "process": self._process, "severity": record.levelname.lower(), "logger": record.name, "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }  # fmt: skip
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class Journal(logging.Formatter):
    """For systemd's journal, which knows time and process: the severity in front, as sd-daemon(3) has it."""

    PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (0, 7))

    def __init__(self) -> None:
        super().__init__("%(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        priority = next(number for level, number in self.PRIORITIES if record.levelno >= level)
        return "\n".join(f"<{priority}>{line}" for line in super().format(record).splitlines())


def to_stderr(level: str, name: str, form: str = "text") -> logging.Logger:
    """The process's root logger, set up once; `level` and `form` (text | json) as in config.py."""
    output = logging.StreamHandler()
    output.addFilter(AtMost())
    output.setFormatter(_formatter(name, form))
    root = logging.getLogger()
    root.handlers[:] = [output]
    set_level(level)
    return root


def _formatter(name: str, form: str) -> logging.Formatter:
    if form == "json":
        return JsonLines(name)
    return Journal() if _in_journal() else logging.Formatter(f"%(asctime)s {name} %(levelname)s %(name)s: %(message)s")


def _in_journal() -> bool:
    """Whether stderr goes to systemd's journal (systemd.exec(5), JOURNAL_STREAM)."""
    try:
        found = os.fstat(2)
    except OSError:
        return False
    return os.environ.get("JOURNAL_STREAM") == f"{found.st_dev}:{found.st_ino}"


def set_level(level: str) -> None:
    logging.getLogger().setLevel(level.upper())
