"""Placement carried out: who holds is made durable, then said to the rank's node.

Knows: members, nodes, what was assigned on which link. Must not know: how placement chooses (placement.py).
Invariants: a holder is durable before it is assigned, so that a fence knows everyone who may acknowledge; replaced holders stay named until they can't.
"""

from __future__ import annotations

from kvguard.core import hosting
from kvguard.core.known import Known
from kvguard.core.membership import DEAD
from kvguard.core.placement import Seat, place
from kvguard.format.messages import Assign
from kvguard.types import NodeId, Rank


def assign(known: Known) -> None:
    """Assign what changed. Ranks under recovery keep what they have until they live again."""
    nodes = known.membership.nodes.values()  # one known from the store alone is usable too: nothing moves because the coordinator restarted
    usable = tuple(node.node for node in nodes if node.state != DEAD and known.fair_ns - node.seen_ns < known.settings.replace_ns)
    open_ = tuple(node for node in usable if node not in known.drained)
    spares = [(node.node, standby) for node in nodes for standby in node.standbys]
    seats, fits, hosts = [], {}, {}
    for instance, places in known.membership.members.items():
        if known.phase(instance):
            continue
        if any(not member.worked or len(member.holders) < known.settings.replicas for member in places.values()):
            hosts.update({(instance, rank): beside for rank, beside in hosting.preferred(known, instance).items()})
        for rank, member in places.items():
            if not member.lost:
                seats.append(Seat(instance, rank, member.node, member.holders if member.worked else ()))  # before the first work, moving costs nothing
                text = str(rank)
                fits[instance, rank] = tuple(node for node, standby in spares if standby.instance == instance and text in standby.fingerprints)
    addresses = known.addresses()
    for (instance, rank), answer in place(tuple(seats), open_, fits, known.settings.replicas, hosts).items():
        member = known.membership.members[instance][rank]
        known.reasons[instance, rank] = answer.reason
        holders = _with_operators(known, instance, rank, answer.holders, usable)
        if holders != member.holders:
            member.former = tuple(dict.fromkeys(node for node in (*member.former, *member.holders) if node not in holders))
            member.holders = holders
            known.keep_member(instance, rank)
        said = (member.node, holders, tuple(addresses[node] for node in holders))
        if known.assigned.get((instance, rank)) == said or "" in said[2]:
            continue
        if known.tell_node(member.node, Assign(instance, rank, tuple(zip(said[1], said[2], strict=True)), answer.reason)):
            known.assigned[instance, rank] = said


def _with_operators(known: Known, instance: str, rank: Rank, holders: tuple[NodeId, ...], usable: tuple[NodeId, ...]) -> tuple[NodeId, ...]:
    """What an operator's orders add to a placement: the target of a handoff, and a drained node that has what nobody else can take."""
    member = known.membership.members[instance][rank]
    kept = [node for node in (*member.holders, *member.former) if node in known.drained and node in usable and node not in holders and node != member.node]
    holders = (*holders, *dict.fromkeys(kept[: max(0, known.settings.replicas - len(holders))]))
    handoff = known.handoffs.get((instance, rank))
    return holders if handoff is None or handoff.target in (*holders, member.node) else (*holders, handoff.target)
