"""Planned handoffs: a rank goes to a node that an operator names, once everything is acknowledged there.

Knows: members with their beats, standbys, rounds.start. Must not know: how a recovery proceeds, who gives orders.
Invariants: nothing is fenced before the target has everything (at most each sequence's newest position excepted), so what it can't bring back it doesn't begin;
what is copied first adds a holder and takes none away; one handoff per instance at a time; a wait ends, with a reason; a handoff that hasn't fenced
is forgotten with this coordinator's life, one that has is an ordinary recovery, durable with its target.
"""

from __future__ import annotations

from kvguard.core import rounds
from kvguard.core.known import Handoff, Known
from kvguard.core.membership import ALIVE, DEAD, MS
from kvguard.core.membership import Member as Place
from kvguard.types import NodeId, Rank

COPYING, MOVING, DONE, FAILED = "copying", "moving", "done", "failed"


def refusal(known: Known, instance: str, rank: Rank, target: NodeId) -> str:
    """Why this can't begin now; "" where it can."""
    member = known.membership.members.get(instance, {}).get(rank)
    if member is None:
        return "no such rank"
    if known.phase(instance):
        return "a recovery is under way"
    if member.lost or instance in known.failed:
        return "its last recovery failed"
    if known.paused:
        return "recoveries are paused"
    if any(handoff.instance == instance for handoff in known.handoffs.values()):
        return "another handoff of this instance is under way"
    home = known.membership.nodes.get(member.node)
    if home is None or home.state != ALIVE:
        return f"its own node {member.node} is {'unknown' if home is None else f'{home.state}: {home.reason}'}"
    if member.absent_ns is not None:
        return f"it is not re-attached to {member.node} yet"
    return unfit(known, instance, rank, member, target)


def unfit(known: Known, instance: str, rank: Rank, member: Place, target: NodeId) -> str:
    """Why the rank couldn't live on that node; "" where it could."""
    node = known.membership.nodes.get(target)
    if target == member.node:
        return f"it lives on {target} already"
    if node is None or node.state != ALIVE:
        return f"node {target} is {'unknown' if node is None else f'{node.state}: {node.reason}'}"
    if target in known.drained:
        return f"node {target} is drained by an operator"
    return "" if standbys(known, instance, rank, member, target) else f"no standby on {target} fits"


def standbys(known: Known, instance: str, rank: Rank, member: Place, node: NodeId) -> list[int]:
    """Spare processes on a node that could take the rank."""
    text = str(rank)
    there = known.membership.nodes[node].standbys if node in known.membership.nodes else ()
    prints = {standby.standby: standby.fingerprints[text] for standby in there if standby.instance == instance and text in standby.fingerprints}
    return [standby for standby, shape in prints.items() if not shape or not member.fingerprint or shape == member.fingerprint]


def begin(known: Known, instance: str, rank: Rank, target: NodeId, why: str, drain: NodeId = "") -> Handoff:
    """Copy to the target first; `refusal` said nothing. `drain`: the node whose draining this is part of."""
    member = known.membership.members[instance][rank]
    handoff = Handoff(known.now_ns, instance, rank, member.stream, member.node, target, why, known.fair_ns, drain)
    known.handoffs[instance, rank] = handoff
    known.note("handoff", f"{instance}/{rank}", f"from {member.node} to {target}: {why}")
    return handoff


def advance(known: Known) -> None:
    """Go as far as what is known allows."""
    for handoff in list(known.handoffs.values()):
        if handoff.epoch:
            _moving(known, handoff)
        else:
            _copying(known, handoff)


def abandon(known: Known, drain: NodeId, reason: str) -> None:
    """Those of a node's draining that haven't fenced."""
    for handoff in list(known.handoffs.values()):
        if handoff.drain == drain and not handoff.epoch:
            _end(known, handoff, FAILED, reason)


def _copying(known: Known, handoff: Handoff) -> None:
    instance, rank, target = handoff.instance, handoff.rank, handoff.target
    member = known.membership.members.get(instance, {}).get(rank)
    if known.phase(instance) or member is None or member.lost or member.stream != handoff.stream:
        _end(known, handoff, FAILED, "the rank was lost, or left, before everything was copied: what is true of it now the status and the history say")
        return
    node = known.membership.nodes[target]
    gone = "recoveries were paused meanwhile" if known.paused else f"node {target} is dead: {node.reason}" if node.state == DEAD else ""
    if not gone and node.state == ALIVE:
        gone = unfit(known, instance, rank, member, target)
    if gone:
        _end(known, handoff, FAILED, f"{gone}; nothing was fenced, the rank goes on on {handoff.source}")
        return
    beat = member.beat
    fresh = beat is not None and beat.stream == member.stream and beat.epoch == known.epoch(instance) and node.state == ALIVE
    if fresh and target in member.holders and target in beat.whole:
        known.starts.pop(instance, None)  # an operator's word resets the bound on automatic failovers
        reason = f"rank {rank} is handed off from {handoff.source} to {target}: {handoff.why}"
        rounds.start(known, instance, (rank,), reason, targets=((rank, target),))
        handoff.epoch = known.epoch(instance).counter
    elif known.fair_ns - handoff.since_ns >= known.settings.handoff_ns:
        said = f"{beat.state}: {beat.reason}" if beat is not None else "not heard of"
        waited = f"{target} did not have everything within {known.settings.handoff_ns // MS} ms (the rank is {said})"
        _end(known, handoff, FAILED, f"{waited}; nothing was fenced, the rank goes on on {handoff.source}")


def _moving(known: Known, handoff: Handoff) -> None:
    """The recovery that it became is over when the instance runs, or has failed."""
    instance, rank = handoff.instance, handoff.rank
    if known.phase(instance):
        return
    record = max((one for one in known.history if one.instance == instance and one.epoch.counter >= handoff.epoch), key=lambda one: one.epoch, default=None)
    member = known.membership.members.get(instance, {}).get(rank)
    if record is None or record.error or member is None:
        _end(known, handoff, FAILED, record.error if record is not None else "its recovery left no record", record)
    elif member.node != handoff.target:
        _end(known, handoff, FAILED, f"it was brought back on {member.node} instead of {handoff.target} (attempt {record.attempt})", record)
    else:
        _end(known, handoff, DONE, f"{len(record.positions)} sequences go on, {len(record.lost)} are lost", record)


def _end(known: Known, handoff: Handoff, state: str, reason: str, record=None) -> None:
    del known.handoffs[handoff.instance, handoff.rank]
    told = {**described(handoff), "state": state, "reason": reason}
    if record is not None:
        told |= {
            "epoch": record.epoch.counter, "sequences": len(record.positions), "lost": sorted(record.lost), "recomputed": record.recomputed,
            "total_ms": record.timing_ms.get("total"),
        }  # fmt: skip
    known.handed.append(told)
    if state == FAILED and handoff.drain:
        known.redrains[handoff.instance, handoff.rank] = (known.fair_ns + known.settings.redrain_ns, reason)
    known.note("handed_off" if state == DONE else "handoff_failed", f"{handoff.instance}/{handoff.rank}", reason)


def described(handoff: Handoff) -> dict:
    """As the status says it."""
    state, reason = (MOVING, "fenced: being rebuilt there") if handoff.epoch else (COPYING, f"until {handoff.target} has everything")
    return {
        "handoff": handoff.number, "instance": handoff.instance, "rank": str(handoff.rank), "from": handoff.source, "to": handoff.target, "state": state,
        "reason": reason, "why": handoff.why, "epoch": handoff.epoch,
    }  # fmt: skip
