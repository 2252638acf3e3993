"""Waiting for what an order began: the coordinator's status is asked until it is over.

Knows: the status's handoffs and nodes. Must not know: how orders are carried out.
Invariants: every wait has an end, and its error says what was being waited for; progress goes to stderr; a coordinator that restarts is waited for, and what it
has forgotten is told.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import click

from kvguard.cli.asking import Reach
from kvguard.errors import KvguardError, TimedOut, Unreachable

PAUSE_S = 0.1


def handed_off(reach: Reach, number: int | None, wait_s: float) -> dict:
    """The handoff's last word in the status. Raises KvguardError where it failed, TimedOut."""

    def look(status: dict) -> tuple[dict | None, str]:
        found = next((one for one in status.get("handoffs", ()) if one["handoff"] == number), None)
        if found is None:
            raise KvguardError("the coordinator was restarted and has given the handoff up, unless it was fenced already. Try: kvguard status, kvguard history")
        over = found["state"] in ("done", "failed")
        return found if over else None, f"{found['state']}: {found['reason']}"

    found = until(reach, look, wait_s, "the handoff")
    if found["state"] == "failed":
        raise KvguardError(f"handoff of {found['instance']}/{found['rank']} to {found['to']}: {found['reason']}. Try: kvguard status, kvguard history")
    return found


def drained(reach: Reach, node: str, wait_s: float) -> dict:
    """The node as the status says it, once nothing is left on it. Raises KvguardError where somebody undid it, TimedOut."""

    def look(status: dict) -> tuple[dict | None, str]:
        found = next((one for one in status["nodes"] if one["node"] == node), None)
        if found is None:
            return None, f"{node} has not said hello to a coordinator that was restarted"
        if not found.get("drain"):
            raise KvguardError(f"the draining of {node} was undone meanwhile. Try: kvguard status")
        return found if found.get("drain") == "drained" else None, found["reason"]

    return until(reach, look, wait_s, f"the draining of {node}, which goes on")


def until(reach: Reach, look: Callable[[dict], tuple[dict | None, str]], wait_s: float, what: str) -> dict:
    """`look(status)`: (what was waited for or None, how it stands)."""
    deadline, said = time.monotonic() + wait_s, ""
    while True:
        try:
            found, stands = look(reach.coordinator("status"))
        except (Unreachable, TimedOut) as error:
            found, stands = None, str(error)
        if found is not None:
            return found
        if stands != said:
            said = stands
            click.echo(said, err=True)
        if time.monotonic() >= deadline:
            raise TimedOut(f"{what} is not over within {wait_s:g} s; {said}. Try: kvguard status, or a longer --wait")
        time.sleep(PAUSE_S)
