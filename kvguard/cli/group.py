"""The group that all verbs are in, as click sees it.

Knows: click, the names of verbs. Must not know: what they do.
"""

from __future__ import annotations

import importlib

import click

from kvguard import __version__
from kvguard.cli import VERBS


class Verbs(click.Group):
    """Verbs by name, each imported when it is called; their one-line help stands in kvguard/cli/__init__.py."""

    def list_commands(self, context: click.Context) -> list[str]:
        return sorted(VERBS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        return getattr(importlib.import_module(VERBS[name][0]), name.replace("-", "_"))

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, VERBS[name][1]) for name in self.list_commands(context)])


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="kvguard")
def verbs() -> None:
    """Streams KV to a peer node and resumes exactly where a dead rank stopped."""
