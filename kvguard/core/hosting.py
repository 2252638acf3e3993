"""Which instances could go on with another one's sequences: the coordinator's members, by what their bytes are.

Knows: members, their nodes and fingerprints. Must not know: what is left of a dead rank (moving.py), when anything moves.
Invariants: only ranks that live, of instances that aren't recovering, host; equal fingerprints at equal (pp, tp), for every rank of a dp; nothing
depends on the order of dicts.
"""

from __future__ import annotations

from kvguard.core.known import Known
from kvguard.core.membership import DEAD
from kvguard.core.moving import Host
from kvguard.types import NodeId, Rank


def hosts(known: Known, instance: str, among: tuple[NodeId, ...] | None = None) -> tuple[Host, ...]:
    """Of `instance`'s sequences, by name: other instances whose ranks are interchangeable with its own, and live on nodes `among` these."""
    mine = {(rank.pp, rank.tp): member.fingerprint for rank, member in sorted(known.membership.members.get(instance, {}).items())}
    if not mine or not all(mine.values()):
        return ()
    found = []
    for other, members in sorted(known.membership.members.items()):
        if other == instance or known.phase(other):
            continue
        for dp in sorted(dict.fromkeys(rank.dp for rank in members)):
            ranks = {(rank.pp, rank.tp): member for rank, member in sorted(members.items()) if rank.dp == dp}
            there = among is None or all(member.node in among for member in ranks.values())
            if there and ranks.keys() == mine.keys() and all(_hosts(known, member, mine[place]) for place, member in ranks.items()):
                found.append(Host(other, dp, tuple((place, member.node) for place, member in ranks.items())))
    return tuple(found)


def _hosts(known: Known, member, fingerprint: int) -> bool:
    node = known.membership.nodes.get(member.node)
    return not member.lost and member.fingerprint == fingerprint and node is not None and node.state != DEAD


def preferred(known: Known, instance: str) -> dict[Rank, tuple[NodeId, ...]]:
    """For each rank the node on which its replica would be at hand: those of one instance, beside which least is held so far."""
    able = [host for host in hosts(known, instance) if all(node != member.node for _, node, member in _pairs(known, instance, host))]
    if not able:
        return {}
    load: dict[NodeId, int] = {}
    for other, members in known.membership.members.items():
        for node in (node for member in members.values() for node in member.holders if other != instance):
            load[node] = load.get(node, 0) + 1
    best = min(able, key=lambda host: (sum(load.get(node, 0) for _, node in host.nodes), host.instance < instance, host.instance, host.dp))
    return {rank: (node,) for rank, node, _ in _pairs(known, instance, best)}


def _pairs(known: Known, instance: str, host: Host):
    there = dict(host.nodes)
    return [(rank, there[rank.pp, rank.tp], member) for rank, member in sorted(known.membership.members[instance].items())]
