"""kvguard node and kvguard coordinator as a service manager calls them: straight to the daemon, without the rest of the command line.

Knows: the options of the two verbs that are daemons. Must not know: click, what a daemon does.
Invariant: a restart takes as long as it takes to import what it needs: nothing else is imported on this way.
"""

from __future__ import annotations

import gc
import importlib

from kvguard import config
from kvguard.cli import plain as plainly
from kvguard.daemon.moments import Moments

OPTIONS = {"node": ("config", "name", "log-level"), "coordinator": ("config", "log-level")}


def plain(arguments: list[str]) -> dict[str, str | None] | None:
    """The values of a daemon's options, by name; None where `arguments` are anything else, or anything more."""
    known = OPTIONS.get(arguments[0]) if arguments else None
    given = plainly.parsed(arguments[1:], {f"--{name}": str for name in known}) if known is not None else None
    if not given or not given.get("--config"):
        return None
    return {name: given.get(f"--{name}") for name in known}


def daemon(kind: str, values: dict[str, str | None]) -> None:
    """Run it until SIGTERM. Raises KvguardError where it can't start."""
    gc.disable()  # what is imported stays: looking through it for garbage again and again would be part of every restart (process.serve turns it on again)
    moments = Moments()
    moments.reached("entered")
    flags = {option.replace("-", "_"): value for option, value in values.items() if option != "config"}
    file = values["config"]
    settings = config.load(config.KINDS[kind], file, flags)
    running = importlib.import_module(f"kvguard.daemon.{kind}")
    moments.reached("imported")
    running.run(settings, lambda: config.load(config.KINDS[kind], file, flags), moments)
