"""What kvguard check says: one line and an exit code for monitoring in the manner of Nagios: 0 ok, 1 warning, 2 critical, 3 unknown.

Knows: the coordinator's kvguard.status/1. Must not know: how it is made; options, and the library for them (looks.py).
Invariants: what can't be asked is unknown, never ok; every finding names its subject and the reason that the status gives; the worst finding decides, and
what is known to be wrong stands before what isn't known: a dead node is critical, also where no rank is attached yet or any more.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.cli import copied, show
from kvguard.cli.asking import Reach
from kvguard.errors import KvguardError

LAG_TOKENS, ARENA_PERCENT = 64, 90.0  # beyond these it warns
OK, WARNING, CRITICAL, UNKNOWN = range(4)
WORDS = ("ok", "warning", "critical", "unknown")
RANKS = {"unprotected": WARNING, "recovering": WARNING, "lost": CRITICAL}
NODES = {"suspect": WARNING, "dead": CRITICAL}
INSTANCES = {"recovering": WARNING, "failed": CRITICAL}
SCHEDULERS = {"unprotected": WARNING, "recovering": WARNING, "lost": WARNING}


class Finding(NamedTuple):
    severity: int
    subject: str
    reason: str


class Limits(NamedTuple):
    """What is tolerated. `arena_percent`: of a node's budget for replicas."""

    lag_tokens: int
    arena_percent: float


def findings(status: dict, limits: Limits) -> list[Finding]:
    """What is not as it should be, worst first; behind it what can't be judged."""
    found = []
    for node in status["nodes"]:
        if node["state"] in NODES:
            found.append(Finding(NODES[node["state"]], f"node {node['node']}", f"{node['state']}: {node['reason']}"))
        if node["arena_bytes"] * 100 > node["arena_bytes_max"] * limits.arena_percent:
            said = f"replicas fill {show.size(node['arena_bytes'])} of {show.size(node['arena_bytes_max'])}"
            found.append(Finding(WARNING, f"node {node['node']}", said))
        for fault in node.get("device_faults", ()):
            found.append(Finding(CRITICAL, f"device {fault['device']} of node {node['node']}", f"can't be used: {fault['reason']}"))
    for instance in status["instances"]:
        if instance["state"] in INSTANCES:
            found.append(Finding(INSTANCES[instance["state"]], f"instance {instance['instance']}", f"{instance['state']}: {instance['reason']}"))
    for rank in status["ranks"]:
        name = f"rank {rank['rank']} of {rank['instance']}"
        if rank["state"] in RANKS:
            found.append(Finding(RANKS[rank["state"]], name, f"{rank['state']}{copied.said(rank)}: {rank['reason']}"))
        elif rank["lag_tokens"] > limits.lag_tokens:
            found.append(Finding(WARNING, name, f"{rank['lag_tokens']} tokens behind at its holders{copied.said(rank)}, {limits.lag_tokens} are tolerated"))
    for scheduler in status.get("schedulers", ()):
        if scheduler["state"] in SCHEDULERS:
            found.append(Finding(SCHEDULERS[scheduler["state"]], f"scheduler {scheduler['dp']} of {scheduler['instance']}", scheduler["reason"]))
    if status["paused"]:
        found.append(Finding(WARNING, "automatic failovers", "paused by an operator (kvguard unpause)"))
    unjudged = [] if status["ranks"] else [Finding(UNKNOWN, "ranks", "none is attached anywhere")]
    return [*sorted(found, key=lambda finding: -finding.severity), *unjudged]


def figures(status: dict) -> dict[str, int]:
    """Performance data: what a monitor plots."""
    ranks = [rank for rank in status["ranks"] if rank["state"] != "standby"]
    return {
        "ranks": len(ranks), "protected": sum(rank["state"] == "protected" for rank in ranks), "standbys": len(status["ranks"]) - len(ranks),
        "unprotected_sequences": sum(rank["unprotected_sequences"] for rank in ranks), "lag_tokens": max((rank["lag_tokens"] for rank in ranks), default=0),
    }  # fmt: skip


def line(state: int, found: list[Finding], numbers: dict[str, int]) -> str:
    """What a monitor shows."""
    said = "; ".join(f"{finding.subject}: {finding.reason}" for finding in found)
    if not said:
        said = f"{numbers['protected']} ranks protected, {numbers['standbys']} standbys"
    told = f"KVGUARD {WORDS[state].upper()} - {said}".replace("|", "/")  # a bar begins the figures
    return told + (" | " + " ".join(f"{name}={value}" for name, value in numbers.items()) if numbers else "")


def run(reach: Reach, limits: Limits, output: str) -> int:
    """The exit code. `output`: table or json."""
    try:
        status = reach.coordinator("status")
    except KvguardError as error:
        return unknown(error, output)
    found, numbers = findings(status, limits), figures(status)
    return told(found[0].severity if found else OK, found, numbers, output)


def unknown(error: KvguardError, output: str) -> int:
    """Nobody could be asked, or nobody knows whom to ask."""
    return told(UNKNOWN, [Finding(UNKNOWN, "coordinator", " ".join(str(error).split()))], {}, output)


def told(state: int, found: list[Finding], numbers: dict[str, int], output: str) -> int:
    if output == "json":
        findings_ = [{"severity": WORDS[finding.severity], "subject": finding.subject, "reason": finding.reason} for finding in found]
        show.document({"schema": "kvguard.check/1", "state": WORDS[state], "findings": findings_, "figures": numbers})
    else:
        show.say(line(state, found, numbers))
    return state
