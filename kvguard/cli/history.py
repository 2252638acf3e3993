"""kvguard history: what the coordinator has decided, oldest first.

Knows: the coordinator's kvguard.history/1 document. Must not know: how it is made.
"""

from __future__ import annotations

import click

from kvguard.cli import show
from kvguard.cli.asking import Reach, reaching


@click.command()
@reaching
@show.output_option
def history(reach: Reach, output: str) -> None:
    """Epochs: why, who, how long, what was lost."""
    found = reach.coordinator("history")
    if output == "json":
        show.document(found)
        return
    columns = list(dict.fromkeys(key for entry in found["history"] for key in entry))
    show.table("History", columns, [[entry.get(key) for key in columns] for entry in found["history"]], "nothing has happened")
