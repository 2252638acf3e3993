"""What the mains of both daemons share: notes in the log, a configuration read again.

Knows: notes, log levels. Must not know: what a process does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from kvguard.config import CoordinatorConfig, NodeConfig
from kvguard.core import effects
from kvguard.daemon import logs
from kvguard.errors import KvguardError

log = logging.getLogger(__name__)

LOUD = {"unprotected", "duplicate_rank", "refused", "hung", "stale_epoch", "fenced", "broken_frame", "suspect", "failed"}


def noted(note: effects.Note) -> None:
    log.log(logging.WARNING if note.what in LOUD else logging.INFO, f"{note.what}: %s: %s", note.subject, note.reason)


def reloading(reload: Callable[[], NodeConfig | CoordinatorConfig]) -> Callable[[], None]:
    """SIGHUP: the log level is taken over, a broken file changes nothing."""

    def reread() -> None:
        try:
            logs.set_level(reload().log_level)
        except KvguardError as error:
            log.error("the configuration stays as it was: %s", error)
        else:
            log.info("configuration read again: log_level was taken over, everything else waits for a restart")

    return reread
