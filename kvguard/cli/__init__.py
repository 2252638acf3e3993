"""The command line: one file per group of verbs, imported when its verb is called, so that `kvguard status` starts in a blink.

Knows: names of verbs and where they live; how an operating error ends a process. Must not know: what the verbs do, how they are parsed (group.py).
Invariants: documents go to stdout, everything else to stderr; exit codes are those of errors.py (2: usage).
"""

from __future__ import annotations

import os
import sys

from kvguard.errors import KvguardError

VERBS = {
    "bench": ("kvguard.cli.bench", "What this machine and link can carry, against memcpy and raw sockets."),
    "check": ("kvguard.cli.looks", "For monitoring: is everything protected? 0 ok, 1 warning, 2 critical, 3 unknown."),
    "config": ("kvguard.cli.config", "Write, check and show configurations."),
    "coordinator": ("kvguard.cli.coordinator", "Run the coordinator."),
    "demo": ("kvguard.cli.demo", "Kill something in mid-generation and watch the text go on."),
    "drill": ("kvguard.cli.drill", "Fire faults on purpose, prove them, and judge what follows."),
    "drain": ("kvguard.cli.orders", "Empty a node: its replicas elsewhere, then its ranks, one by one."),
    "failover": ("kvguard.cli.orders", "Fence an instance and rebuild one of its ranks elsewhere."),
    "gateway": ("kvguard.cli.gateway", "Run the OpenAI-compatible gateway in front of the instances."),
    "handoff": ("kvguard.cli.orders", "Move a rank to another node, without loss."),
    "history": ("kvguard.cli.history", "Epochs: why, who, how long, what was lost."),
    "keys": ("kvguard.cli.keys", "Make, list and rotate keys."),
    "node": ("kvguard.cli.node", "Run a node's daemon."),
    "pause": ("kvguard.cli.orders", "Stop automatic failovers."),
    "replicas": ("kvguard.cli.replicas", "List, show, verify and export replicas."),
    "resync": ("kvguard.cli.orders", "Have replicas verified, and what is damaged sent again."),
    "status": ("kvguard.cli.looks", "What is protected, where, and why not."),
    "systemd": ("kvguard.cli.systemd", "The daemons as systemd services."),
    "top": ("kvguard.cli.top", "A live screen: ranks, lag, windows, arenas, epochs, recoveries."),
    "unpause": ("kvguard.cli.orders", "Allow automatic failovers again."),
    "wait-salvaged": ("kvguard.cli.salvaged", "Wait until nothing of a dead engine's memory is held here: for ExecStartPre."),
}
DAEMONS = ("node", "coordinator")  # what starts without the rest (starting.py)
QUICK = ("status", "check")  # and what is asked without it (quick.py)


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Operating errors end with their message on stderr and their exit code; bugs end loudly with a traceback."""
    given = sys.argv[1:] if arguments is None else arguments
    try:
        if given and given[0] in DAEMONS:
            from kvguard.cli import starting

            values = starting.plain(given)
            if values is not None:
                starting.daemon(given[0], values)
                return
        if given and given[0] in QUICK:
            from kvguard.cli import quick

            asked = quick.asked(given)
            if asked is not None:
                sys.exit(quick.run(given[0], asked))
        from kvguard.cli.group import verbs

        verbs.main(args=arguments, prog_name="kvguard")
    except KvguardError as error:
        if given[:1] == ["check"]:  # a monitor reads exit codes of its own, and nothing but stdout
            from kvguard.cli import check

            sys.exit(check.unknown(error, "json" if {"json", "-ojson"} & set(given) else "table"))
        print(f"kvguard: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # who read the output has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
