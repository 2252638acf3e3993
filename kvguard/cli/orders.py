"""kvguard failover | pause | unpause: orders to the coordinator.

Knows: the coordinator's verbs. Must not know: how they are carried out.
Invariant: what interrupts an instance asks first, unless --yes, and can be tried with --dry-run.
"""

from __future__ import annotations

import click

from kvguard.cli import show
from kvguard.cli.asking import Reach, reaching
from kvguard.errors import Refused
from kvguard.types import Rank


def answered(reach: Reach, verb: str, arguments: dict, output: str) -> None:
    found = reach.coordinator(verb, arguments)
    if output == "json":
        show.document(found)
    else:
        click.echo(", ".join(f"{key} {show.text(value)}" for key, value in found.items() if key != "schema") or "done")


@click.command()
@reaching
@show.output_option
def pause(reach: Reach, output: str) -> None:
    """Stop automatic failovers. Replication goes on."""
    answered(reach, "pause", {}, output)


@click.command()
@reaching
@show.output_option
def unpause(reach: Reach, output: str) -> None:
    """Allow automatic failovers again."""
    answered(reach, "unpause", {}, output)


def as_rank(_context, _parameter, value: str) -> str:
    try:
        return str(Rank.parse(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@reaching
@click.argument("instance")
@click.argument("rank", callback=as_rank)
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option("--yes", is_flag=True, help="Don't ask.")
@show.output_option
def failover(reach: Reach, instance: str, rank: str, dry_run: bool, yes: bool, output: str) -> None:
    """Fence INSTANCE and rebuild RANK (dp.pp.tp) elsewhere."""
    known = [one for one in reach.coordinator("status")["ranks"] if (one["instance"], one["rank"]) == (instance, rank) and one["state"] != "standby"]
    if not known:
        raise Refused(f"no rank {rank} of {instance!r} is known. Try: kvguard status")
    said = f"{instance} {rank} on {known[0]['node']} is {known[0]['state']}, holders {show.text(known[0]['holders'])}"
    if dry_run:
        show.document({"instance": instance, "rank": rank, "would": "fence and rebuild", **known[0]}) if output == "json" else click.echo(f"would fence {said}")
        return
    if not yes:
        click.confirm(f"{said}. Fence it and rebuild the rank?", abort=True, err=True)
    answered(reach, "failover", {"instance": instance, "rank": rank}, output)
