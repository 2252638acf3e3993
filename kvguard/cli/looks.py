"""kvguard status and kvguard check on the command line; quick.py has the same options for those who call them every few seconds.

Knows: options of the two verbs. Must not know: what they show (status.py, check.py).
"""

from __future__ import annotations

import sys

import click

from kvguard.cli import check as checking
from kvguard.cli import status as overview
from kvguard.cli.asking import Reach
from kvguard.cli.options import output_option, reaching


@click.command()
@reaching
@click.option("-o", "output", type=click.Choice(["table", "wide", "json"]), default="table", help="Form of the output.")
@click.option("--watch", is_flag=True, help="Again every second, until interrupted.")
def status(reach: Reach, output: str, watch: bool) -> None:
    """What is protected, where, and why not."""
    overview.run(reach, output, watch)


@click.command()
@reaching
@click.option("--lag-tokens", type=click.IntRange(0), default=checking.LAG_TOKENS, show_default=True, help="Warn where a rank's holders are further behind.")
@click.option(
    "--arena-percent", type=click.FloatRange(1, 100), default=checking.ARENA_PERCENT, show_default=True,
    help="Warn where replicas fill more of a node's budget.",
)  # fmt: skip
@output_option
def check(reach: Reach, lag_tokens: int, arena_percent: float, output: str) -> None:
    """For monitoring: is everything protected? Exit code 0 ok, 1 warning, 2 critical, 3 unknown."""
    sys.exit(checking.run(reach, checking.Limits(lag_tokens, arena_percent), output))
