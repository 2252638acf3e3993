"""Ranks of equal bytes that are copied once: which one's copy is a rank's, and whom else a copy is for.

Knows: `copied_as` of kvguard.status/1, `copied_for` of rows that asking.gathered made. Must not know: who chooses that rank, options, and the library for them.
Invariants: what is held of a rank is looked for under its own name, too (from before it was copied as another one, or of a former life); one that is copied
for itself is shown as if there were no others.
"""

from __future__ import annotations

from kvguard.cli import show


def other(rank: dict) -> str:
    """Of a row of the status: the rank whose copy is this one's; "" where it is copied for itself."""
    said = rank.get("copied_as", "")
    return "" if said == rank["rank"] else said


def said(rank: dict) -> str:
    """Behind what is said of a row of the status."""
    return f", copied as {other(rank)}" if other(rank) else ""


def names(status: dict, instance: str, rank: str) -> list[str]:
    """Under which ranks' names that is held which is this one's, its own first."""
    rows = [one for one in status["ranks"] if (one["instance"], one["rank"]) == (instance, rank)]
    return list(dict.fromkeys([rank, *filter(None, map(other, rows))]))


def covered(status: dict) -> dict[tuple[str, str], list[str]]:
    """By (instance, rank that is copied) the other ranks that its copy is for."""
    found: dict[tuple[str, str], list[str]] = {}
    for one in status["ranks"]:
        if other(one):
            found.setdefault((one["instance"], other(one)), []).append(one["rank"])
    return found


def columns(plain: list[str], key: str, rows: list[dict]) -> list[str]:
    """`plain` with `key` behind the rank, where a row has it."""
    behind = plain.index("rank") + 1
    return [*plain[:behind], key, *plain[behind:]] if any(row.get(key) for row in rows) else plain


def table(title: str, plain: list[str], rows: list[dict], empty: str) -> None:
    """Rows about what is held of ranks."""
    shown = columns(plain, "copied_for", rows)
    show.table(title, shown, [[row.get(key) for key in shown] for row in rows], empty)
