"""kvguard history: what the coordinator has decided, oldest first.

Knows: the coordinator's kvguard.history/1 document. Must not know: how it is made.
"""

from __future__ import annotations

import click

from kvguard.cli import show
from kvguard.cli.asking import Reach
from kvguard.cli.options import output_option, reaching
from kvguard.types import Rung


@click.command()
@reaching
@output_option
def history(reach: Reach, output: str) -> None:
    """Epochs: why, who, how long, what was lost."""
    found = reach.coordinator("history")
    if output == "json":
        show.document(found)
        return
    for one in found.get("held", ()):
        ranks = ", ".join(one["ranks"]) or "no rank"
        click.echo(f"Held back while paused: {one['instance']} would be in epoch {one['epoch']} and {ranks} recovered: {one['reason']}")
    show.table("History", COLUMNS, [row(entry) for entry in found["history"]], "nothing has happened")


COLUMNS = [
    "instance", "epoch", "issuer", "reason", "ranks", "went to", "sequences", "rung", "detect ms", "fence", "plan", "restore", "total", "recomputed", "lost",
    "error",
]  # fmt: skip


def row(entry: dict) -> list[object]:
    """One recovery: why, who, how long, what was lost."""
    timing = entry["timing_ms"]
    went = [f"{rank} -> {node}" for rank, node in sorted(entry["targets"].items())]
    lost = [f"{name}: {reason}" for name, reason in sorted(entry["lost"].items())]
    times = [timing.get(phase) for phase in ("detect", "fence", "plan", "restore", "total")]
    rung = Rung.worst(entry["rungs"].values()) if entry["rungs"] else None
    return [
        entry["instance"], entry["epoch"], entry["issuer"], entry["reason"], entry["ranks"], went, len(entry["positions"]), rung, *times, entry["recomputed"],
        lost, entry["error"],
    ]  # fmt: skip
