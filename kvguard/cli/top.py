"""kvguard top: a live screen of ranks, lag, windows, arenas, epochs and recoveries.

Knows: documents of the coordinator and of the nodes. Must not know: how they are made.
Invariants: what a node doesn't say is shown as unknown, and who didn't is named; without a terminal one screen is written and that is all.
"""

from __future__ import annotations

import sys
import time
from typing import NamedTuple

import click
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvguard.cli import copied, show
from kvguard.cli.asking import Reach
from kvguard.cli.options import output_option, reaching
from kvguard.cli.status import AGE, is_old
from kvguard.errors import KvguardError

RECOVERIES = 5
BAR = 20


class Seen(NamedTuple):
    """One look. `nodes`: each node's kvguard.node/1, or why there is none. `history`: finished recoveries, oldest first."""

    status: dict
    history: list[dict]
    nodes: dict[str, dict | str]


def look(reach: Reach) -> Seen:
    status = reach.coordinator("status")
    nodes: dict[str, dict | str] = {}
    for node in status["nodes"]:
        if node["state"] == "dead":
            nodes[node["node"]] = f"dead: {node['reason']}"
            continue
        try:
            nodes[node["node"]] = reach.node(node["node"], node["address"], "status")
        except KvguardError as error:
            nodes[node["node"]] = str(error)
    return Seen(status, reach.coordinator("history")["history"], nodes)


def bar(used: int, limit: int) -> str:
    """How full something is, in BAR characters."""
    filled = min(BAR, round(BAR * used / limit)) if limit else 0
    return "█" * filled + "░" * (BAR - filled)


def screen(seen: Seen) -> Group:
    """All of it, as rich renders it."""
    status = seen.status
    head = Text(f"kvguard top   coordinator {status['coordinator']['issuer']}   nodes {len(status['nodes'])}   ranks {len(status['ranks'])}")
    if status["paused"]:
        head.append("   automatic failovers are PAUSED", "bold yellow")
    return Group(head, Text(), _ranks(seen), Text(), _nodes(seen), Text(), _instances(seen), Text(), _recoveries(seen))


def _table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=None, pad_edge=False)


def _state(word: str) -> str:
    return f"[{show.COLORS[word]}]{word}[/]" if word in show.COLORS else escape(word)


def _as_of(row: dict, seen: Seen) -> str:
    """Of which moment the figures are, where that isn't this one."""
    return f" ({row[AGE] / 1000:.1f} s ago)" if is_old(row, seen.status) else ""


def _named(rank: dict) -> str:
    return f"{rank['rank']} as {copied.other(rank)}" if copied.other(rank) else rank["rank"]


def _ranks(seen: Seen) -> Table:
    table = _table("Ranks", "instance", "rank", "node", "holders", "state", "sequences", "committed", "lag tokens", "lag", "window", "reason")
    windows = {
        (rank["instance"], rank["rank"]): rank.get("window_bytes", 0) for node in seen.nodes.values() if isinstance(node, dict) for rank in node["ranks"]
    }
    for rank in seen.status["ranks"]:
        window = windows.get((rank["instance"], rank["rank"]))
        cells = [
            escape(rank["instance"]), _named(rank), escape(rank["node"]), escape(show.text(rank["holders"])), _state(rank["state"]),
            f"{rank['sequences'] - rank['unprotected_sequences']}/{rank['sequences']}", str(rank["committed"]), str(rank["lag_tokens"]),
            f"{rank['lag_ms']:.0f} ms{_as_of(rank, seen)}", "-" if window is None else show.size(window), escape(rank["reason"]),
        ]  # fmt: skip
        table.add_row(*cells)
    return table


def _nodes(seen: Seen) -> Table:
    table = _table("Nodes", "node", "state", "heartbeat", "standbys", "arena", "", "reason")
    for node in seen.status["nodes"]:
        own = seen.nodes[node["node"]]
        faults = [f"{fault['device']} can't be used: {fault['reason']}" for fault in node.get("device_faults", ())]
        reason = "; ".join(faults) or (node["reason"] if isinstance(own, dict) else own)
        used = f"{show.size(node['arena_bytes'])} of {show.size(node['arena_bytes_max'])}"
        table.add_row(
            escape(node["node"]), _state(node["state"]), f"{node['heartbeat_age_ms']:.0f} ms ago", str(node["standbys"]),
            bar(node["arena_bytes"], node["arena_bytes_max"]), used, escape(reason),
        )  # fmt: skip
    return table


def _instances(seen: Seen) -> Table:
    table = _table("Instances", "instance", "epoch", "issuer", "state", "emitter", "reason")
    for one in seen.status["instances"]:
        names = (escape(one["instance"]), str(one["epoch"]), escape(one["issuer"]))
        table.add_row(*names, _state(one["state"]), escape(str(one["emitter"])), escape(one["reason"]))
    return table


def _recoveries(seen: Seen) -> Table:
    table = _table(f"Recoveries, the last {RECOVERIES} of {len(seen.history)}", "instance", "epoch", "ranks", "rung", "took", "lost", "reason")
    for one in reversed(seen.history[-RECOVERIES:]):
        rungs = show.text(sorted(set(one["rungs"].values()))) if not one["error"] else "failed"
        table.add_row(
            escape(one["instance"]), str(one["epoch"]), show.text(one["ranks"]), rungs, f"{one['timing_ms'].get('total', 0.0):.0f} ms", str(len(one["lost"])),
            escape(one["error"] or one["reason"]),
        )  # fmt: skip
    return table


@click.command()
@reaching
@click.option("--every", "every_s", type=click.FloatRange(0.1, 60.0), default=1.0, show_default=True, help="Seconds between two looks.")
@output_option
def top(reach: Reach, every_s: float, output: str) -> None:
    """A live screen: ranks, lag, windows, arenas, epochs, recoveries. Ends with Ctrl-C."""
    if output == "json":
        seen = look(reach)
        show.document({"schema": "kvguard.top/1", "status": seen.status, "history": seen.history, "nodes": seen.nodes})
        return
    if not sys.stdout.isatty():
        Console(width=show.WIDTH_IN_PIPES, no_color=True).print(screen(look(reach)))
        return
    with Live(screen(look(reach)), screen=True, auto_refresh=False) as live:
        try:
            while True:
                time.sleep(every_s)  # the pace of the screen
                try:
                    live.update(screen(look(reach)), refresh=True)
                except KvguardError as error:
                    live.update(Text(f"kvguard: {error}", "red"), refresh=True)
        except KeyboardInterrupt:
            return
