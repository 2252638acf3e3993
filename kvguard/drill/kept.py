"""What a daemon that is killed or restarted held for others, and what of it its next life has.

Knows: a node's replicas, verify and stats. Must not know: where replicas are kept, what a drill expects.
Invariants: what was held is noted before the strike; "read back" is the new life's own count of what it found, not that replicas are there again: senders may
have sent them anew; what is there afterwards is read once more, byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable

from kvguard.errors import KvguardError


def held(ask: Callable[[str], dict], service: bool) -> dict:
    """Before the strike. `ask(verb)`: the node's answer. `promised`: a service manager keeps replicas over another life of this daemon."""
    return {"promised": service, "replicas": len({one["stream"] for one in ask("replicas")["replicas"]})}


def found(ask: Callable[[str], dict], before: dict) -> dict:
    """After it, once all is protected: replicas that the new life found, or couldn't read; positions whose sums didn't hold then; whether all do now.

    Bytes are read only where something is promised of them. `verified` None: they weren't, or (`unread`: why) not in the time that an answer may take.
    """
    store = ask("stats")["store"]
    found = {
        **before, "read_back": store.get("replicas_read_back", 0), "unreadable": store.get("replicas_unreadable", 0),
        "unsound": store.get("positions_unsound", 0), "verified": None,
    }  # fmt: skip
    if before["promised"] and before["replicas"]:
        try:
            found["verified"] = all(one["verified"] is not False for one in ask("verify")["replicas"])
        except KvguardError as error:  # the drill is over, and what else it found is worth more
            found["unread"] = str(error)
    return found
