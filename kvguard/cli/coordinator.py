"""kvguard coordinator: runs the coordinator in the foreground until SIGTERM.

Knows: its options. Must not know: what the coordinator does, how it is started (starting.py).
"""

from __future__ import annotations

import click

from kvguard.cli import starting


@click.command()
@click.option("--config", "file", required=True, type=click.Path(), help="The file; conf.d/*.toml beside it and KVGUARD_COORDINATOR_* come on top.")
@click.option("--log-level", help="Overrides [coordinator] log_level.")
def coordinator(file: str, log_level: str | None) -> None:
    """Run the coordinator."""
    starting.daemon("coordinator", {"config": file, "log-level": log_level})
