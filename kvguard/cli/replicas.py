"""kvguard replicas list | show SEQUENCE | verify [SEQUENCE].

Knows: each node's kvguard.replicas/1 document. Must not know: stores.
Invariant: what a node didn't say is named, never left out silently (exit code 3).
"""

from __future__ import annotations

import click

from kvguard.cli import show
from kvguard.cli.asking import Reach, reaching
from kvguard.errors import KvguardError, Refused, Unreachable

COLUMNS = ["instance", "rank", "sequence", "holder", "epoch", "positions", "bytes", "tier", "verified"]


@click.group()
def replicas() -> None:
    """List, show and verify replicas."""


def gathered(reach: Reach, verb: str, arguments: dict) -> tuple[dict, list[str]]:
    """One document of all living nodes' answers, and the nodes that gave none with the reason."""
    merged: dict = {"schema": "kvguard.replicas/1", "replicas": []}
    silent = []
    for node in reach.coordinator("status")["nodes"]:
        if node["state"] == "dead":
            continue
        try:
            merged["replicas"] += reach.node(node["node"], node["address"], verb, arguments)["replicas"]
        except KvguardError as error:
            silent.append(f"{node['node']}: {error}")
    merged["replicas"].sort(key=lambda one: (one["instance"], one["rank"], one["sequence"], one["holder"]))
    return merged, silent


def finish(found: dict, silent: list[str], output: str, title: str) -> None:
    if output == "json":
        show.document({**found, "unreachable": silent})
    else:
        rows = [[show.size(one[key]) if key == "bytes" else one.get(key) for key in COLUMNS] for one in found["replicas"]]
        show.table(title, COLUMNS, rows, "none")
    if silent:
        raise Unreachable("no answer from " + "; ".join(silent) + ". Try: kvguard status")


@replicas.command("list")
@reaching
@click.option("--instance", help="Only this instance's.")
@show.output_option
def list_(reach: Reach, instance: str | None, output: str) -> None:
    """All replicas on all living nodes, by sequence."""
    finish(*gathered(reach, "replicas", {"instance": instance}), output, "Replicas")


@replicas.command("show")
@reaching
@click.argument("sequence")
@click.option("--instance", help="Only this instance's.")
@show.output_option
def show_(reach: Reach, sequence: str, instance: str | None, output: str) -> None:
    """One sequence's replicas, with lineage, blocks and how many ids are known."""
    found, silent = gathered(reach, "replicas", {"instance": instance, "sequence": sequence, "detail": True})
    if not found["replicas"] and not silent:
        raise Refused(f"no node holds a replica of {sequence!r}. Try: kvguard replicas list")
    finish(found, silent, output, f"Replicas of {sequence}")


@replicas.command()
@reaching
@click.argument("sequence", required=False)
@click.option("--instance", help="Only this instance's.")
@show.output_option
def verify(reach: Reach, sequence: str | None, instance: str | None, output: str) -> None:
    """Read the bytes of all replicas (or SEQUENCE's) and compare with their checksums. Exit code 1 where one is wrong."""
    found, silent = gathered(reach, "verify", {"instance": instance, "sequence": sequence})
    finish(found, silent, output, "Verified")
    wrong = [f"{one['sequence']} of {one['instance']}/{one['rank']} on {one['holder']}" for one in found["replicas"] if one["verified"] is False]
    if wrong:
        raise KvguardError(f"damaged: {', '.join(wrong)}. Try: kvguard resync")
