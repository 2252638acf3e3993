"""kvguard node: runs a node's daemon in the foreground until SIGTERM.

Knows: its options. Must not know: what the daemon does, how it is started (starting.py).
"""

from __future__ import annotations

import click

from kvguard.cli import starting


@click.command()
@click.option("--config", "file", required=True, type=click.Path(), help="The file; conf.d/*.toml beside it and KVGUARD_NODE_* come on top.")
@click.option("--name", help="Overrides [node] name.")
@click.option("--log-level", help="Overrides [node] log_level.")
def node(file: str, name: str | None, log_level: str | None) -> None:
    """Run a node's daemon."""
    starting.daemon("node", {"config": file, "name": name, "log-level": log_level})
