"""An operator's orders: pause, unpause, failover, handoff, drain.

Knows: what an order changes. Must not know: who may give it (the shell has checked).
Invariants: every order is answered once, at once: what takes longer is told in the status; a dry run changes nothing; a pause is durable and holds recoveries
back, it doesn't forget them.
"""

from __future__ import annotations

from kvguard.core import draining, handing, rounds
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
            for instance, failure in held.items() if verb == "unpause" else ():
                rounds.start(known, instance, *failure._replace(reason=f"{failure.reason} (held while paused)"))
        known.out.append(AnswerAsked(event.id, {"paused": known.paused, "dry_run": dry}))
    elif verb == "failover":
        _failover(known, event, arguments, dry)
    elif verb == "handoff":
        _handoff(known, event, arguments, dry)
    elif verb == "drain":
        _drain(known, event, str(arguments.get("node", "")), dry, bool(arguments.get("undo")))
    else:
        known.out.append(AnswerAsked(event.id, {}, f"the coordinator doesn't know {verb!r}. Try: pause, unpause, failover, handoff, drain", 2))


def _failover(known: Known, event: Asked, arguments: dict, dry: bool) -> None:
    instance, rank = str(arguments.get("instance", "")), _rank_of(known, event, arguments)
    if rank is None:
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


def _rank_of(known: Known, event: Asked, arguments: dict) -> Rank | None:
    """None where it isn't one, which was answered then."""
    try:
        return Rank.parse(str(arguments.get("rank", "")))
    except ValueError as error:
        known.out.append(AnswerAsked(event.id, {}, str(error), 2))
        return None


def _handoff(known: Known, event: Asked, arguments: dict, dry: bool) -> None:
    instance, target, rank = str(arguments.get("instance", "")), str(arguments.get("to", "")), _rank_of(known, event, arguments)
    if rank is None:
        return
    why = handing.refusal(known, instance, rank, target)
    if why:
        known.out.append(AnswerAsked(event.id, {}, f"handoff of {instance}/{rank} to {target}: {why}. Try: kvguard status, or a standby there", 4))
        return
    member = known.membership.members[instance][rank]
    first = "has everything already" if target in member.holders else f"gets a replica first (held so far by {', '.join(member.holders) or 'nobody'})"
    said = {
        "instance": instance, "rank": str(rank), "from": member.node, "to": target, "epoch": known.epoch(instance).counter + 1, "dry_run": dry,
        "does": f"{target} {first}; then a new epoch fences the rank on {member.node}, ends its process and rebuilds it on {target}",
    }  # fmt: skip
    if not dry:
        said["handoff"] = handing.begin(known, instance, rank, target, "ordered by an operator").number
    known.out.append(AnswerAsked(event.id, said))


def _drain(known: Known, event: Asked, node: str, dry: bool, undo: bool) -> None:
    if undo:
        was = node in known.drained if dry else draining.undo(known, node)
        known.out.append(AnswerAsked(event.id, {"node": node, "was_drained": was, "dry_run": dry}))
        return
    found = draining.outlook(known, node)
    if found.obstacles:
        known.out.append(AnswerAsked(event.id, {}, f"draining {node}: {'; '.join(found.obstacles)}. Try: another node or standby first, kvguard status", 4))
        return
    if not dry:
        draining.begin(known, node)
    known.out.append(AnswerAsked(event.id, {
        "node": node, "dry_run": dry, "replicas": [{"instance": instance, "rank": str(rank), "to": list(to)} for instance, rank, to in found.replicas],
        "ranks": [{"instance": instance, "rank": str(rank), "to": to} for instance, rank, to in found.ranks],
    }))  # fmt: skip
