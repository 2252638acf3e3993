"""kvguard failover | handoff | drain | pause | unpause | resync: what an operator orders.

Knows: the coordinator's verbs, the nodes' resync. Must not know: how they are carried out.
Invariants: every order can be tried with --dry-run, which changes nothing; what interrupts an instance asks first, unless --yes. Documents are kvguard.order/1,
but for resync's, which is kvguard.resync/1.
"""

from __future__ import annotations

import click

from kvguard.cli import copied, show, waiting
from kvguard.cli.asking import Reach, gathered
from kvguard.cli.options import output_option, reaching
from kvguard.errors import Refused, Unreachable
from kvguard.types import Rank


def answered(reach: Reach, verb: str, arguments: dict, output: str) -> None:
    found = reach.coordinator(verb, arguments)
    if output == "json":
        document(verb, found)
    else:
        click.echo(", ".join(f"{key} {show.text(value)}" for key, value in found.items()) or "done")


def document(verb: str, found: dict) -> None:
    show.document({"schema": "kvguard.order/1", "order": verb, **found})


dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done.")
yes_option = click.option("--yes", is_flag=True, help="Don't ask.")
unasked_option = click.option("--yes", is_flag=True, expose_value=False, help="Don't ask (it never does).")


@click.command()
@reaching
@dry_run_option
@unasked_option
@output_option
def pause(reach: Reach, dry_run: bool, output: str) -> None:
    """Stop automatic failovers. Replication goes on; what would have been done is logged, and stands in status and history."""
    answered(reach, "pause", {"dry_run": dry_run}, output)


@click.command()
@reaching
@dry_run_option
@unasked_option
@output_option
def unpause(reach: Reach, dry_run: bool, output: str) -> None:
    """Allow automatic failovers again. Those that were held back begin."""
    if not dry_run:
        answered(reach, "unpause", {}, output)
        return
    held = reach.coordinator("history")["held"]
    if output == "json":
        document("unpause", {**reach.coordinator("unpause", {"dry_run": True}), "held": held})
        return
    for one in held:
        click.echo(f"would begin: {one['instance']} in epoch {one['epoch']}, {show.text(one['ranks'])} recovered: {one['reason']}")
    if not held:
        click.echo("would begin nothing: nothing is held back")


def as_rank(_context, _parameter, value: str | None) -> str | None:
    try:
        return None if value is None else str(Rank.parse(value))
    except ValueError as error:
        raise click.BadParameter(str(error)) from error


@click.command()
@reaching
@click.argument("instance")
@click.argument("rank", callback=as_rank)
@dry_run_option
@yes_option
@output_option
def failover(reach: Reach, instance: str, rank: str, dry_run: bool, yes: bool, output: str) -> None:
    """Fence INSTANCE and rebuild RANK (dp.pp.tp) elsewhere."""
    known = [one for one in reach.coordinator("status")["ranks"] if (one["instance"], one["rank"]) == (instance, rank) and one["state"] != "standby"]
    if not known:
        raise Refused(f"no rank {rank} of {instance!r} is known. Try: kvguard status")
    said = f"{instance} {rank} on {known[0]['node']} is {known[0]['state']}, holders {show.text(known[0]['holders'])}{copied.said(known[0])}"
    if dry_run:
        would = {"instance": instance, "rank": rank, "would": "fence and rebuild", "dry_run": True, **known[0]}
        document("failover", would) if output == "json" else click.echo(f"would fence it and rebuild the rank: {said}")
        return
    if not yes:
        click.confirm(f"{said}. Fence it and rebuild the rank?", abort=True, err=True)
    answered(reach, "failover", {"instance": instance, "rank": rank}, output)


wait_option = click.option("--wait", "wait_s", type=click.FloatRange(0), default=120.0, show_default=True, help="Seconds until it must be over; 0: don't wait.")


@click.command()
@reaching
@click.argument("instance")
@click.argument("rank", callback=as_rank)
@click.option("--to", "target", required=True, help="The node that shall have it; a standby must be there.")
@dry_run_option
@yes_option
@wait_option
@output_option
def handoff(reach: Reach, instance: str, rank: str, target: str, dry_run: bool, yes: bool, wait_s: float, output: str) -> None:
    """Move RANK (dp.pp.tp) of INSTANCE to another node, without loss."""
    order = {"instance": instance, "rank": rank, "to": target}
    found = reach.coordinator("handoff", {**order, "dry_run": True})
    if not dry_run:
        if not yes:
            click.confirm(f"{found['does']}. Do it?", abort=True, err=True)
        found = reach.coordinator("handoff", order)
        if wait_s:
            found = waiting.handed_off(reach, found.get("handoff"), wait_s)
    if output == "json":
        document("handoff", found)
    elif dry_run or not wait_s:
        click.echo(f"{'would do' if dry_run else 'begun'}: {found['does']}")
    else:
        took = f", {found['total_ms']:.0f} ms" if found.get("total_ms") is not None else ""
        again = f"{found.get('recomputed', 0)} positions are computed again"
        click.echo(f"{instance} {rank} lives on {target} now, in epoch {found['epoch']}: {found['reason']}, {again}{took}")


def also(ranks: list[str] | None) -> str:
    return f" (also that of {show.text(ranks)})" if ranks else ""


@click.command()
@reaching
@click.argument("node")
@click.option("--undo", is_flag=True, help="End it: the node gets replicas and ranks again.")
@dry_run_option
@yes_option
@wait_option
@output_option
def drain(reach: Reach, node: str, undo: bool, dry_run: bool, yes: bool, wait_s: float, output: str) -> None:
    """Empty NODE: its replicas are placed elsewhere, then its ranks are handed off, one by one. Nothing new is placed on it until --undo."""
    if undo:
        answered(reach, "drain", {"node": node, "undo": True, "dry_run": dry_run}, output)
        return
    found = reach.coordinator("drain", {"node": node, "dry_run": True})
    covered = copied.covered(reach.coordinator("status"))
    alike = {(instance, rank) for (instance, _), ranks in covered.items() for rank in ranks}  # they have no replica of their own
    replicas = [
        f"the replica of {one['instance']}/{one['rank']}{also(covered.get((one['instance'], one['rank'])))} goes to {show.text(one['to'])}"
        for one in found.get("replicas", ()) if (one["instance"], one["rank"]) not in alike
    ]  # fmt: skip
    ranks = [f"{one['instance']}/{one['rank']} is handed off to {one['to']}" for one in found.get("ranks", ())]
    does = "; ".join([*replicas, *ranks]) or "nothing is on it; nothing will be placed on it"
    if not dry_run:
        if not yes:
            click.confirm(f"{does}. Drain {node}?", abort=True, err=True)
        found = reach.coordinator("drain", {"node": node})
        if wait_s:
            found |= waiting.drained(reach, node, wait_s)
    if output == "json":
        document("drain", found)
    else:
        click.echo(f"would do: {does}" if dry_run else f"{node}: {found['reason']}" if wait_s else f"begun: {does}")


@click.command()
@reaching
@click.argument("instance", required=False)
@click.argument("rank", required=False, callback=as_rank)
@dry_run_option
@unasked_option
@output_option
def resync(reach: Reach, instance: str | None, rank: str | None, dry_run: bool, output: str) -> None:
    """Doubt the replicas of all instances (of INSTANCE, of its RANK): holders verify them, drop what is damaged, and get it again.

    A rank that is copied as another one is held in that one's replicas: they are what is verified.
    """
    asked = [None] if instance is None or rank is None else copied.names(reach.coordinator("status"), instance, rank)
    if len(asked) > 1:
        show.say(f"{instance}/{rank} is copied as {asked[1]}: the replicas of that rank are verified, for both", err=True)
    found, silent = gathered(reach, "verify" if dry_run else "resync", *({"instance": instance, "rank": name} for name in asked))
    if not found["replicas"] and not silent:
        what = " or ".join("/".join(filter(None, (instance, name))) for name in asked)
        raise Refused(f"no node holds a replica{' of ' if what else ''}{what}. Try: kvguard replicas list")
    if output == "json":
        show.document({**found, "schema": "kvguard.resync/1", "dry_run": dry_run, "unreachable": silent})
    elif dry_run:
        damaged = [one for one in found["replicas"] if one["verified"] is False]
        columns = ["instance", "rank", "sequence", "holder", "positions"]
        copied.table("Would be sent again from the first damaged position on", columns, damaged, "nothing is damaged")
    else:
        rows = [{**one, "damaged, sent again": one["dropped"]} for one in found["replicas"]]
        copied.table("Verified anew", ["instance", "rank", "holder", "sequences", "positions", "damaged, sent again"], rows, "none")
    if silent:
        raise Unreachable("no answer from " + "; ".join(silent) + ". Try: kvguard status")
