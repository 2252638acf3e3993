"""How verbs show documents: JSON as one document, tables on terminals and in pipes.

Knows: rich. Must not know: what a document means. Invariant: JSON goes to stdout unadorned; NO_COLOR is obeyed (rich does).
"""

from __future__ import annotations

import json
import os
import shutil
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
    cells = [[text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH_IN_PIPES
    plain = all(cell.isascii() and cell.isprintable() for row in cells for cell in row)
    if cells and plain and sum(widths) + 2 * (len(widths) - 1) <= room:
        ruled(title, columns, cells, widths)
    else:
        wrapped(title, columns, cells, empty)


def ruled(title: str, columns: list[str], cells: list[list[str]], widths: list[int]) -> None:
    """What fits is written as rich would, without it: rich takes longer over a table of 64 ranks than the coordinator over its answer."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def line(row: list[str], style) -> str:
        return "  ".join(style(cell) + " " * (width - len(cell)) for cell, width in zip(row, widths, strict=True))

    lines = [
        click.style(title, italic=True) + " " * (sum(widths) + 2 * (len(widths) - 1) - len(title)), line(columns, lambda cell: click.style(cell, bold=True)),
        *(line(row, lambda cell: click.style(cell, fg=COLORS[cell]) if cell in COLORS else cell) for row in cells),
    ]  # fmt: skip
    click.echo("\n".join(lines), color=bool(color))


def wrapped(title: str, columns: list[str], cells: list[list[str]], empty: str) -> None:
    """With cells that are wrapped or hold more than ASCII, or with nothing in it: rich knows how wide things are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_IN_PIPES, no_color=True)
    if not cells:
        console.print(f"{title}: {empty}", markup=False)
        return
    shown = Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)
    for row in cells:
        shown.add_row(*(f"[{COLORS[cell]}]{cell}[/]" if cell in COLORS else escape(cell) for cell in row))
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
