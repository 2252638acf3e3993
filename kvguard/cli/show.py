"""How verbs show documents: JSON as one document, tables on terminals and in pipes.

Knows: rich. Must not know: what a document means. Invariant: JSON goes to stdout unadorned; NO_COLOR is obeyed (rich does).
"""

from __future__ import annotations

import json
import sys

import click

WIDTH_IN_PIPES = 200
COLORS = {
    **dict.fromkeys(("protected", "alive"), "green"), "standby": "cyan", **dict.fromkeys(("unprotected", "suspect", "recovering"), "yellow"),
    **dict.fromkeys(("lost", "dead"), "red"),
}  # fmt: skip

output_option = click.option("-o", "output", type=click.Choice(["table", "json"]), default="table", help="Form of the output.")


def document(value: dict) -> None:
    click.echo(json.dumps(value))


def table(title: str, columns: list[str], rows: list[list[object]], empty: str) -> None:
    """A table on stdout; `empty` where there are no rows."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_IN_PIPES, no_color=True)
    if not rows:
        console.print(f"{title}: {empty}", markup=False)
        return
    shown = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for row in rows:
        cells = [text(cell) for cell in row]
        shown.add_row(*(f"[{COLORS[cell]}]{cell}[/]" if cell in COLORS else escape(cell) for cell in cells))
    console.print(shown)


def text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.1f}"
    if isinstance(value, list | tuple):
        return ", ".join(map(text, value)) or "-"
    return str(value)


def size(value: int) -> str:
    """Bytes for people."""
    amount = float(value)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"
