"""How verbs show documents: JSON as one document, tables on terminals and in pipes.

Knows: rich. Must not know: what a document means. Invariants: JSON goes to stdout unadorned; NO_COLOR is obeyed (rich does); nothing is imported for what can
be shown without it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys

WIDTH_IN_PIPES = 200
COLORS = {
    **dict.fromkeys(("protected", "alive"), "green"), "standby": "cyan", **dict.fromkeys(("unprotected", "suspect", "recovering"), "yellow"),
    **dict.fromkeys(("lost", "dead"), "red"),
}  # fmt: skip

STYLES = {"bold": "1", "italic": "3", "green": "32", "cyan": "36", "yellow": "33", "red": "31"}  # as terminals number them


def say(line: str, err: bool = False) -> None:
    """A line, at once: what reads a pipe waits for it."""
    print(line, file=sys.stderr if err else sys.stdout, flush=True)


def clear() -> None:
    """The screen, where there is one."""
    if sys.stdout.isatty():
        say("\x1b[2J\x1b[1;1H")


def document(value: dict) -> None:
    say(json.dumps(value))


def table(title: str, columns: list[str], rows: list[list[object]], empty: str) -> None:
    """A table on stdout; `empty` where there are no rows."""
    cells = [[text(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH_IN_PIPES
    plain = all(cell.isascii() and cell.isprintable() for row in cells for cell in row)
    if not cells:
        say(f"{title}: {empty}")
    elif plain and sum(widths) + 2 * (len(widths) - 1) <= room:
        ruled(title, columns, cells, widths)
    else:
        wrapped(title, columns, cells)


def ruled(title: str, columns: list[str], cells: list[list[str]], widths: list[int]) -> None:
    """What fits is written as rich would, without it: rich takes longer over a table of 64 ranks than the coordinator over its answer."""
    color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")

    def styled(cell: str, style: str) -> str:
        return f"\x1b[{STYLES[style]}m{cell}\x1b[0m" if color and style else cell

    def line(row: list[str], style) -> str:
        return "  ".join(styled(cell, style(cell)) + " " * (width - len(cell)) for cell, width in zip(row, widths, strict=True))

    lines = [
        styled(title, "italic") + " " * (sum(widths) + 2 * (len(widths) - 1) - len(title)), line(columns, lambda _: "bold"),
        *(line(row, lambda cell: COLORS.get(cell, "")) for row in cells),
    ]  # fmt: skip
    say("\n".join(lines))


def wrapped(title: str, columns: list[str], cells: list[list[str]]) -> None:
    """With cells that are wrapped or hold more than ASCII: rich knows how wide things are."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console() if sys.stdout.isatty() else Console(width=WIDTH_IN_PIPES, no_color=True)
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
