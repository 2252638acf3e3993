"""Placement carried out: who holds is made durable, then said to the rank's node.

Knows: members, nodes, what was assigned on which link. Must not know: how placement chooses (placement.py).
Invariants: a holder is durable before it is assigned, so that a fence knows everyone who may acknowledge; replaced holders stay named until they can't;
what mates on one node share is assigned to one of them, and all of them are known to be held where it is.
"""

from __future__ import annotations

from kvguard.core import hosting
from kvguard.core.known import Known
from kvguard.core.membership import DEAD
from kvguard.core.placement import Seat, place
from kvguard.core.shards import copiers
from kvguard.format.messages import Assign
from kvguard.types import NodeId, Rank


def assign(known: Known) -> None:
    """Assign what changed. Ranks under recovery keep what they have until they live again."""
    nodes = known.membership.nodes.values()  # one known from the store alone is usable too: nothing moves because the coordinator restarted
    usable = tuple(node.node for node in nodes if node.state != DEAD and known.fair_ns - node.seen_ns < known.settings.replace_ns)
    open_ = tuple(node for node in usable if node not in known.drained)
    spares = [(node.node, standby) for node in nodes for standby in node.standbys]
    seats, fits, hosts, shards = [], {}, {}, {}
    for instance, places in known.membership.members.items():
        if known.phase(instance):
            continue
        if any(not member.worked or len(member.holders) < known.settings.replicas for member in places.values()):
            hosts.update({(instance, rank): beside for rank, beside in hosting.preferred(known, instance).items()})
        known.copiers[instance] = copiers(places)
        for rank, copier in known.copiers[instance].items():
            shards.setdefault((instance, copier), []).append(rank)
        for rank in dict.fromkeys(known.copiers[instance].values()):
            sharing = [places[one] for one in shards[instance, rank] if places[one].worked]  # before the first work, moving costs nothing
            held = next((member.holders for member in sharing if member.holders), ())
            seats.append(Seat(instance, rank, places[rank].node, held))
            text = str(rank)
            fits[instance, rank] = tuple(node for node, standby in spares if standby.instance == instance and text in standby.fingerprints)
    for (instance, rank), answer in place(tuple(seats), open_, fits, known.settings.replicas, hosts).items():
        holders = _with_operators(known, instance, rank, shards[instance, rank], answer.holders, usable)
        for one in shards[instance, rank]:
            _say(known, instance, one, rank, holders, answer.reason)


def _say(known: Known, instance: str, rank: Rank, copier: Rank, holders: tuple[NodeId, ...], reason: str) -> None:
    """Who holds this rank's bytes; its node hears of them by the rank that copies them."""
    member, addresses = known.membership.members[instance][rank], known.addresses()
    known.reasons[instance, rank] = reason
    if holders != member.holders:
        member.former = tuple(dict.fromkeys(node for node in (*member.former, *member.holders) if node not in holders))
        member.holders = holders
        known.keep_member(instance, rank)
    if rank == copier:
        message = Assign(instance, rank, tuple((node, addresses[node]) for node in holders), reason)
    else:
        message = Assign(instance, rank, (), f"its bytes are those of rank {copier} and copied with them", copier)
    said = (member.node, message.holders, message.as_rank)
    if known.assigned.get((instance, rank)) != said and all(address for _, address in message.holders) and known.tell_node(member.node, message):
        known.assigned[instance, rank] = said


def _with_operators(
    known: Known, instance: str, rank: Rank, sharing: list[Rank], holders: tuple[NodeId, ...], usable: tuple[NodeId, ...]
) -> tuple[NodeId, ...]:  # fmt: skip
    """What an operator's orders add to a placement: targets of handoffs of ranks that share it, and a drained node that has what nobody else can take."""
    member = known.membership.members[instance][rank]
    kept = [node for node in (*member.holders, *member.former) if node in known.drained and node in usable and node not in holders and node != member.node]
    holders = (*holders, *dict.fromkeys(kept[: max(0, known.settings.replicas - len(holders))]))
    handoffs = [known.handoffs[instance, one] for one in sharing if (instance, one) in known.handoffs]
    return (*holders, *dict.fromkeys(handoff.target for handoff in handoffs if handoff.target not in (*holders, member.node)))
