"""A node that an operator wants empty: its replicas are placed elsewhere, then its ranks are handed off, one by one.

Knows: members, placement, handoffs. Must not know: how a replica or a rank gets to another node.
Invariants: refused where something would be less protected afterwards, or a rank would have nowhere to go; a drained node gets nothing new, and keeps what
nobody else can take; being drained is durable, so a restarted coordinator goes on with it.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.core import handing, ladder
from kvguard.core.known import Known
from kvguard.core.membership import ALIVE, DEAD, MS
from kvguard.core.membership import Member as Place
from kvguard.core.placement import Seat, place
from kvguard.core.shards import copiers
from kvguard.types import NodeId, Rank

ORDERED = "drained by an operator"


class Outlook(NamedTuple):
    """What draining a node would do. `obstacles`: why it may not. `ranks`: (instance, rank, to). `replicas`: (instance, rank, to), one for each copy."""

    obstacles: tuple[str, ...]
    ranks: tuple[tuple[str, Rank, NodeId], ...]
    replicas: tuple[tuple[str, Rank, tuple[NodeId, ...]], ...]


def outlook(known: Known, node: NodeId) -> Outlook:
    home = known.membership.nodes.get(node)
    if home is None or home.state != ALIVE:
        return Outlook((f"node {node} is {'unknown' if home is None else f'{home.state}: {home.reason}'}",), (), ())
    living, held = _on(known, node), _held_on(known, node)
    obstacles = [f"a recovery of {name} is under way" for name in dict.fromkeys(name for name, *_ in (*living, *held)) if known.phase(name)]
    if living and known.paused:
        obstacles.append(f"recoveries are paused, and {len(living)} ranks live there")
    wishes = {(instance, rank): _seats(known, instance, rank, member, node) for instance, rank, member in living}
    seats = {key: seat[0] for key, seat in ladder.assign(wishes).items()}
    obstacles += [f"{instance}/{rank} lives there, and no standby fits on another node" for instance, rank in wishes if (instance, rank) not in seats]
    usable = tuple(one.node for one in known.membership.nodes.values() if one.state != DEAD and one.node != node and one.node not in known.drained)
    after, members = _copied_by(known, seats), known.membership.members
    copied = [(*key, seats.get(key, members[key[0]][key[1]].node), members[key[0]][key[1]].holders) for key in dict.fromkeys(after.values())]
    placed = tuple(Seat(instance, rank, there, tuple(holder for holder in had if holder != there)) for instance, rank, there, had in copied)
    places = place(placed, usable, {}, known.settings.replicas)
    for instance, rank, _, holders in copied:
        left, had = len(places[instance, rank].holders), min(len(holders), known.settings.replicas)
        if left < had:
            obstacles.append(f"{instance}/{rank} would have {left} of {had} replicas: no other node could hold it")
    present = _copied_by(known, {})
    leaving = [(instance, rank, member) for instance, rank, member in held if present.get((instance, rank)) == (instance, rank)]
    targets = {key: places[after[key]].holders for key in present}
    obstacles += _too_large(known, node, leaving, targets)
    ranks = tuple((instance, rank, seats[instance, rank]) for instance, rank, _ in living if (instance, rank) in seats)
    return Outlook(tuple(obstacles), ranks, tuple((instance, rank, targets[instance, rank]) for instance, rank, _ in leaving))


def _copied_by(known: Known, seats: dict[tuple[str, Rank], NodeId]) -> dict[tuple[str, Rank], tuple[str, Rank]]:
    """For each living rank the one that copies its bytes, once ranks live where `seats` has them."""
    found = {}
    for instance, members in sorted(known.membership.members.items()):
        elsewhere = {rank: to for (name, rank), to in seats.items() if name == instance}
        found |= {(instance, rank): (instance, copier) for rank, copier in copiers(members, elsewhere).items()}
    return found


def _too_large(known: Known, node: NodeId, held: list[tuple[str, Rank, Place]], places: dict[tuple[str, Rank], tuple[NodeId, ...]]) -> list[str]:
    """Replicas on `node` that don't fit where they would go. What a node said last counts; one that has not said how much it can hold has room."""
    nodes, found = known.membership.nodes, []
    room = {name: one.arena_bytes_max - one.arena_bytes for name, one in nodes.items() if one.arena_bytes_max}
    sizes = {stream: size for stream, _, size in nodes[node].replicas}
    for instance, rank, member in held:
        for target in places.get((instance, rank), ()):
            if target in room and target not in member.holders:
                room[target] -= sizes.get(member.stream, 0)
                if room[target] < 0:
                    found.append(f"{target} has no room for the replica of {instance}/{rank}")
    return found


def begin(known: Known, node: NodeId) -> None:
    if node not in known.drained:
        known.drained[node] = "begins"
        known.persist(f"drained/{node}", True)
        known.note("drain", node, ORDERED)


def undo(known: Known, node: NodeId) -> bool:
    """True where it was drained."""
    if known.drained.pop(node, None) is None:
        return False
    known.persist(f"drained/{node}", None)
    handing.abandon(known, node, f"the draining of {node} was undone")
    known.note("undrain", node, "an operator ended its draining")
    return True


def advance(known: Known) -> None:
    """One step for each drained node that has something left. `known.drained` says what it waits for, "" where it is empty."""
    for node in sorted(known.drained):
        waits = _next(known, node)
        if not waits and known.drained[node]:
            known.note("drained", node, "nothing is left on it")
        known.drained[node] = waits


def progress(known: Known, node: NodeId) -> str:
    """The reason that the status gives."""
    waits = known.drained[node]
    return f"{ORDERED}: {waits}" if waits else f"{ORDERED}: empty"


def _next(known: Known, node: NodeId) -> str:
    home = known.membership.nodes.get(node)
    if home is None or home.state == DEAD:
        return "the node is away"
    leaving = _held_on(known, node)
    if leaving:
        return f"{_names(leaving)}: replicas are being placed elsewhere"
    living = _on(known, node)
    for handoff in known.handoffs.values():
        if living:
            return f"{handoff.instance}/{handoff.rank} is being handed off to {handoff.target}; {len(living)} ranks are left"
    waiting = [_hand_off(known, node, *one) for one in living]
    if any(not why for why in waiting):
        return f"{len(living)} ranks are left"
    if waiting:
        return "; ".join(waiting[:3])
    return f"{len(home.replicas)} replicas are not dropped yet" if home.replicas else ""


def _hand_off(known: Known, node: NodeId, instance: str, rank: Rank, member: Place) -> str:
    """Begin, where it is this rank's turn; else why not."""
    until, why = known.redrains.get((instance, rank), (0, ""))
    if known.handoffs:
        return ""
    if known.fair_ns < until:
        return f"{instance}/{rank} again in {(until - known.fair_ns) // MS} ms: {why}"
    seats = _seats(known, instance, rank, member, node)
    if not seats:
        return f"{instance}/{rank}: no standby fits on another node"
    why = handing.refusal(known, instance, rank, seats[0][0])
    if why:
        return f"{instance}/{rank}: {why}"
    known.redrains.pop((instance, rank), None)
    handing.begin(known, instance, rank, seats[0][0], f"{node} is drained by an operator", node)
    return ""


def _seats(known: Known, instance: str, rank: Rank, member: Place, node: NodeId) -> list[tuple[NodeId, int]]:
    """Where the rank could go, best first: to one of its holders, then where fewest ranks live."""
    load = {name: sum(1 for _ in _on(known, name)) for name in known.membership.nodes}
    able = [name for name in known.membership.nodes if name != node and not handing.unfit(known, instance, rank, member, name)]
    able.sort(key=lambda name: (name not in member.holders, load[name], name))
    return [(name, standby) for name in able for standby in handing.standbys(known, instance, rank, member, name)]


def _on(known: Known, node: NodeId) -> list[tuple[str, Rank, Place]]:
    found = sorted(known.membership.members.items())
    return [(instance, rank, member) for instance, places in found for rank, member in sorted(places.items()) if member.node == node and not member.lost]


def _held_on(known: Known, node: NodeId) -> list[tuple[str, Rank, Place]]:
    """Ranks whose replicas are on the node, or may still be."""
    found = sorted(known.membership.members.items())
    return [(instance, rank, one) for instance, places in found for rank, one in sorted(places.items()) if node in (*one.holders, *one.former)]


def _names(entries: list) -> str:
    more = f" and {len(entries) - 4} more" if len(entries) > 4 else ""
    return ", ".join(f"{instance}/{rank}" for instance, rank, _ in entries[:4]) + more
