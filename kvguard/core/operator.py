"""An operator's orders: pause, unpause, failover.

Knows: what an order changes. Must not know: who may give it (the shell has checked).
Invariants: every order is answered once; a dry run changes nothing; a pause is durable and holds recoveries back, it doesn't forget them.
"""

from __future__ import annotations

from kvguard.core import rounds
from kvguard.core.effects import AnswerAsked
from kvguard.core.events import Asked
from kvguard.core.known import Known
from kvguard.types import Rank


def asked(known: Known, event: Asked) -> None:
    verb, arguments = event.verb, event.arguments
    dry = bool(arguments.get("dry_run"))
    if verb in ("pause", "unpause"):
        if not dry and known.paused != (verb == "pause"):
            known.paused = verb == "pause"
            known.persist("paused", known.paused)
            held, known.held = known.held, {}
            for instance, (ranks, reason) in held.items() if verb == "unpause" else ():
                rounds.start(known, instance, ranks, f"{reason} (held while paused)")
        known.out.append(AnswerAsked(event.id, {"paused": known.paused, "dry_run": dry}))
    elif verb == "failover":
        _failover(known, event, arguments, dry)
    else:
        known.out.append(AnswerAsked(event.id, {}, f"the coordinator doesn't know {verb!r}. Try: pause, unpause, failover", 2))


def _failover(known: Known, event: Asked, arguments: dict, dry: bool) -> None:
    instance = str(arguments.get("instance", ""))
    try:
        rank = Rank.parse(str(arguments.get("rank", "")))
    except ValueError as error:
        known.out.append(AnswerAsked(event.id, {}, str(error), 2))
        return
    member = known.membership.members.get(instance, {}).get(rank)
    if member is None or known.phase(instance) or known.paused:
        why = "no such rank" if member is None else "recoveries are paused" if known.paused else "a recovery is under way"
        known.out.append(AnswerAsked(event.id, {}, f"failover of {instance}/{rank}: {why}. Try: kvguard status", 4))
        return
    counter = known.epoch(instance).counter + 1
    if not dry:
        known.starts.pop(instance, None)  # an operator's word resets the bound on automatic failovers
        lost = tuple(other for other, place_ in known.membership.members[instance].items() if place_.lost)
        rounds.start(known, instance, (rank, *lost), "ordered by an operator")
    known.out.append(AnswerAsked(event.id, {"instance": instance, "rank": str(rank), "node": member.node, "epoch": counter, "dry_run": dry}))
