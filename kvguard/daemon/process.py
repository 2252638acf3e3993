"""What the mains of both daemons share: notes in the log, a service manager kept informed, a configuration read again, a clean end.

Knows: notes, log levels, what may change while a process runs. Must not know: what a process does.
Invariants: a broken configuration changes nothing and says so, loudly; a key that can't change at run time is named when it differs; the manager hears READY
once the process can be reached, and again after every reload.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import logging
import os
from collections.abc import Callable, Iterable
from typing import Protocol

from kvguard.config import CoordinatorConfig, NodeConfig
from kvguard.core import effects
from kvguard.daemon import logs
from kvguard.daemon.loop import Loop, obey_signals
from kvguard.daemon.moments import Moments
from kvguard.daemon.notify import Notifier, Watchdog
from kvguard.errors import KvguardError
from kvguard.transport import keys as keyring
from kvguard.transport.zeromq import ZeromqTransport

log = logging.getLogger(__name__)

LOUD = {"unprotected", "duplicate_rank", "refused", "hung", "stale_epoch", "fenced", "broken_frame", "suspect", "failed", "device_fault"}
STATUS_NS = 1_000_000_000
Config = NodeConfig | CoordinatorConfig


class Daemon(Protocol):
    """What is asked of daemon/node.py and daemon/coordinator.py. `RELOADED`: keys that `take_over` puts into force at run time."""

    config: Config
    loop: Loop
    transport: ZeromqTransport
    RELOADED: tuple[str, ...]

    def take_over(self, config: Config) -> None: ...

    def summary(self) -> str:
        """One line of what it does now."""


def noted(note: effects.Note) -> None:
    fields = {"what": note.what, "subject": note.subject, "reason": note.reason, **dict(note.fields)}
    log.log(logging.WARNING if note.what in LOUD else logging.INFO, f"{note.what}: %s: %s", note.subject, note.reason, extra={"fields": fields})


def begun(config: Config) -> Notifier:
    """Before a daemon is made: its log, and what the service manager says."""
    logs.to_stderr(config.log_level, os.environ.get("KVGUARD_LOG_NAME", config.name), config.log_format)
    faulthandler.enable()  # a watchdog's SIGABRT shows where it hung
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # nothing here multiplies matrices: numpy would start a thread a core
    return Notifier(os.environ)


def serve(daemon: Daemon, notifier: Notifier, reload: Callable[[], Config], moments: Moments, progressing: Callable[[], bool] = lambda: True) -> None:
    """Run until SIGTERM, or an error that only a restart mends. `progressing`: whether every thread beside the loop moves, or is known not to."""
    obey_signals(daemon.loop, lambda: reread(daemon, notifier, reload))
    Watchdog(notifier, [daemon.loop], progressing)
    notifier.ready(daemon.summary())
    moments.reached("ready")
    gc.freeze()  # what was made until here stays
    gc.enable()

    def say() -> Iterable:
        daemon.loop.after(STATUS_NS, say)
        notifier.status(daemon.summary())
        return ()

    if notifier.present:
        daemon.loop.after(STATUS_NS, say)
    daemon.loop.run()
    notifier.stopping()


def reread(daemon: Daemon, notifier: Notifier, reload: Callable[[], Config]) -> None:
    """SIGHUP: what may change at run time is taken over, keys among it; a broken file changes nothing."""
    notifier.reloading()
    refused = ""
    try:
        changed = differing(daemon.config, found := reload())
        keys = keyring.load(daemon.config.keys) if daemon.config.keys else None  # the file that was named at the start; what is in it may change
        now = [key for key in changed if key in ("log_level", *daemon.RELOADED)]
        logs.set_level(found.log_level)
        daemon.take_over(found)
        if keys is not None and daemon.transport.rekey(keys):
            log.info("keys read again: %s", keys)
        daemon.config = dataclasses.replace(daemon.config, **{key: getattr(found, key) for key in now})
    except KvguardError as error:
        refused = f"the configuration stays as it was: {error}"
        log.error("%s", refused)
    else:
        later = [key for key in changed if key not in now]
        log.info("configuration read again: %s", f"now in force: {', '.join(now)}" if now else "nothing to take over")
        if later:
            log.warning("only a restart takes over %s: the old values stay in force", ", ".join(later))
    notifier.ready(refused or daemon.summary())


def differing(old: Config, new: Config) -> list[str]:
    return [field.name for field in dataclasses.fields(old) if getattr(old, field.name) != getattr(new, field.name)]
