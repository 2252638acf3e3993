"""What kvguard status shows.

Knows: the coordinator's kvguard.status/1 document. Must not know: how it is made; options, and the library for them (looks.py).
"""

from __future__ import annotations

import time

from kvguard.cli import copied, show
from kvguard.cli.asking import Reach
from kvguard.errors import KvguardError

EVERY_S = 1.0
NODES = ["node", "state", "reason", "heartbeat_age_ms", "version"]
RANKS = ["instance", "rank", "node", "holders", "state", "reason", "sequences", "unprotected_sequences", "lag_tokens"]
SCHEDULERS = ["instance", "dp", "node", "holders", "state", "reason", "sequences", "ids", "acked_ids"]
WIDE = [*RANKS, "committed", "acked", "lag_bytes", "lag_ms"]
AGE = "figures_age_ms"
BEATS_OLD = 2  # figures that are older than so many heartbeats say so


def run(reach: Reach, output: str, watch: bool) -> None:
    """`output`: table, wide or json. `watch`: again every second, until interrupted."""
    if not watch:
        display(reach.coordinator("status"), output)
        return
    try:
        while True:
            look(reach, output)
            time.sleep(EVERY_S)  # the pace of the screen
    except KeyboardInterrupt:
        return


def look(reach: Reach, output: str) -> None:
    """One more. A coordinator that is away for a moment is no end to watching; in JSON, one document a line, the reason goes to stderr."""
    try:
        found = reach.coordinator("status")
    except KvguardError as error:
        if output != "json":
            show.clear()
        show.say(f"kvguard: {error}", err=True)
        return
    if output != "json":
        show.clear()
    display(found, output)


def display(found: dict, output: str) -> None:
    if output == "json":
        show.document(found)
        return
    if found["paused"]:
        show.say("Automatic failovers are PAUSED.  (kvguard unpause)")
    for one in found.get("held", ()):
        ranks = ", ".join(one["ranks"]) or "no rank"
        show.say(f"Held back: {one['instance']} would be in epoch {one['epoch']} and {ranks} recovered: {one['reason']}")
    for one in found.get("handoffs", ()):
        if one["state"] in ("copying", "moving"):
            show.say(f"Handoff of {one['instance']} {one['rank']} from {one['from']} to {one['to']}, {one['state']}: {one['reason']}")
    for node in found["nodes"]:
        for fault in node.get("device_faults", ()):
            show.say(f"Device {fault['device']} of node {node['node']} can't be used: {fault['reason']}")
    ranks = [row | {"copied_as": copied.other(row) or None} for row in found["ranks"]]
    columns = copied.columns(WIDE if output == "wide" else RANKS, "copied_as", ranks)
    ways = [[node["node"], peer, carrier] for node in found["nodes"] for peer, carrier in node.get("carriers", {}).items()]
    show.table("Nodes", NODES, [[node.get(key) for key in NODES] for node in found["nodes"]], "none has said hello")
    show.table("Instances", ["instance", "epoch", "issuer"], [[one[key] for key in ("instance", "epoch", "issuer")] for one in found["instances"]], "none")
    aged("Ranks", columns, ranks, found, "none is attached")
    if output == "wide" or any(carrier != "tcp" for _, _, carrier in ways):  # the usual needs no telling
        show.table("Payloads", ["from", "to", "over"], ways, "no node has a holder")
    if found.get("schedulers"):
        aged("Schedulers", SCHEDULERS, found["schedulers"], found, "none")


def aged(title: str, columns: list[str], rows: list[dict], found: dict, empty: str) -> None:
    """A table of what heartbeats said. A row that the last ones didn't bring anew says how old it is."""
    old = [row[AGE] if is_old(row, found) else None for row in rows]
    shown = [*columns, AGE] if any(old) else columns
    show.table(title, shown, [[*(row.get(key) for key in columns), age][: len(shown)] for row, age in zip(rows, old, strict=True)], empty)


def is_old(row: dict, found: dict) -> bool:
    """Whether the row's figures are older than BEATS_OLD heartbeats; of a coordinator or a node that doesn't say nobody knows."""
    heartbeat_ms = found.get("coordinator", {}).get("heartbeat_ms", 0.0)
    return bool(heartbeat_ms) and (row.get(AGE) or 0.0) > BEATS_OLD * heartbeat_ms
