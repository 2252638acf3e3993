"""kvguard node: runs a node's daemon in the foreground until SIGTERM.

Knows: how a configuration becomes a daemon. Must not know: what the daemon does.
"""

from __future__ import annotations

import click

from kvguard import config


@click.command()
@click.option("--config", "file", required=True, type=click.Path(), help="The file; conf.d/*.toml beside it and KVGUARD_NODE_* come on top.")
@click.option("--name", help="Overrides [node] name.")
@click.option("--log-level", help="Overrides [node] log_level.")
def node(file: str, name: str | None, log_level: str | None) -> None:
    """Run a node's daemon."""
    flags = {"name": name, "log_level": log_level}
    settings = config.load(config.NodeConfig, file, flags)
    from kvguard.daemon import node as daemon

    daemon.run(settings, lambda: config.load(config.NodeConfig, file, flags))
