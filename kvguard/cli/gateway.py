"""kvguard gateway: runs the OpenAI-compatible gateway in the foreground until SIGTERM.

Knows: how a configuration becomes a gateway. Must not know: what it serves.
"""

from __future__ import annotations

import click

from kvguard import config
from kvguard.errors import BadConfig


@click.command()
@click.option("--config", "file", required=True, type=click.Path(), help="The file; conf.d/*.toml beside it and KVGUARD_GATEWAY_* come on top.")
@click.option("--log-level", help="Overrides [gateway] log_level.")
def gateway(file: str, log_level: str | None) -> None:
    """Run the gateway."""
    settings = config.load(config.GatewayConfig, file, {"log_level": log_level})
    try:
        from kvguard.gateway import process
    except ModuleNotFoundError as error:
        raise BadConfig(f"{error.name} isn't installed. Try: pip install 'kvguard[gateway]'") from error
    process.run(settings)
