"""The command line: one file per group of verbs, imported when its verb is called, so that `kvguard status` starts in a blink.

Knows: names of verbs and where they live; how an operating error ends a process. Must not know: what the verbs do.
Invariants: documents go to stdout, everything else to stderr; exit codes are those of errors.py (2: usage).
"""

from __future__ import annotations

import importlib
import sys

import click

from kvguard import __version__
from kvguard.errors import KvguardError

VERBS = {
    "check": ("kvguard.cli.check", "For monitoring: is everything protected? 0 ok, 1 warning, 2 critical, 3 unknown."),
    "config": ("kvguard.cli.config", "Write, check and show configurations."),
    "coordinator": ("kvguard.cli.coordinator", "Run the coordinator."),
    "demo": ("kvguard.cli.demo", "Kill something in mid-generation and watch the text go on."),
    "drill": ("kvguard.cli.drill", "Fire faults on purpose, prove them, and judge what follows."),
    "drain": ("kvguard.cli.orders", "Empty a node: its replicas elsewhere, then its ranks, one by one."),
    "failover": ("kvguard.cli.orders", "Fence an instance and rebuild one of its ranks elsewhere."),
    "gateway": ("kvguard.cli.gateway", "Run the OpenAI-compatible gateway in front of the instances."),
    "handoff": ("kvguard.cli.orders", "Move a rank to another node, without loss."),
    "history": ("kvguard.cli.history", "Epochs: why, who, how long, what was lost."),
    "keys": ("kvguard.cli.keys", "Make and list keys."),
    "node": ("kvguard.cli.node", "Run a node's daemon."),
    "pause": ("kvguard.cli.orders", "Stop automatic failovers."),
    "replicas": ("kvguard.cli.replicas", "List, show and verify replicas."),
    "resync": ("kvguard.cli.orders", "Have replicas verified, and what is damaged sent again."),
    "status": ("kvguard.cli.status", "What is protected, where, and why not."),
    "systemd": ("kvguard.cli.systemd", "The daemons as systemd services."),
    "top": ("kvguard.cli.top", "A live screen: ranks, lag, windows, arenas, epochs, recoveries."),
    "unpause": ("kvguard.cli.orders", "Allow automatic failovers again."),
}


class Verbs(click.Group):
    """Verbs by name, each imported when it is called; their one-line help stands here."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return getattr(importlib.import_module(VERBS[name][0]), name)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, VERBS[name][1]) for name in self.list_commands(context)])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvguard")
def verbs() -> None:
    """Streams KV to a peer node and resumes exactly where a dead rank stopped."""


def main(arguments: list[str] | None = None) -> None:
    """Entry point. Operating errors end with their message on stderr and their exit code; bugs end loudly with a traceback."""
    try:
        verbs.main(args=arguments, prog_name="kvguard")
    except KvguardError as error:
        click.echo(f"kvguard: {error}", err=True)
        sys.exit(error.exit_code)
