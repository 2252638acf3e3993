"""kvguard coordinator: runs the coordinator in the foreground until SIGTERM.

Knows: how a configuration becomes a coordinator. Must not know: what it decides.
"""

from __future__ import annotations

import click

from kvguard import config


@click.command()
@click.option("--config", "file", required=True, type=click.Path(), help="The file; conf.d/*.toml beside it and KVGUARD_COORDINATOR_* come on top.")
@click.option("--log-level", help="Overrides [coordinator] log_level.")
def coordinator(file: str, log_level: str | None) -> None:
    """Run the coordinator."""
    flags = {"log_level": log_level}
    settings = config.load(config.CoordinatorConfig, file, flags)
    from kvguard.daemon import coordinator as daemon

    daemon.run(settings, lambda: config.load(config.CoordinatorConfig, file, flags))
