"""Who holds whose replica: a pure function of who is there.

Knows: names of nodes and ranks, current holders, which nodes have a standby for which rank, or host an equal one of another
instance. Must not know: how a replica gets to its holder.
Invariants: never the rank's own node; the same input gives the same answer whatever the order of dicts; a current holder that is usable stays, so that
nothing is copied twice; each rank has min(replicas, other nodes) holders.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.types import NodeId, Rank

NO_OTHER_NODE = "no other node"


class Seat(NamedTuple):
    """A rank of an instance where it lives, with its holders so far."""

    instance: str
    rank: Rank
    node: NodeId
    holders: tuple[NodeId, ...]


class Place(NamedTuple):
    """Who shall hold, best first. `reason` says why there are fewer than asked, or what decided."""

    holders: tuple[NodeId, ...]
    reason: str


def place(
    seats: tuple[Seat, ...], nodes: tuple[NodeId, ...], fits: dict[tuple[str, Rank], tuple[NodeId, ...]], replicas: int = 1,
    hosts: dict[tuple[str, Rank], tuple[NodeId, ...]] = {},  # noqa: B006 - never written
) -> dict[tuple[str, Rank], Place]:  # fmt: skip
    """Holders by (instance, rank). `nodes`: usable as holders. `fits`: nodes with a standby that could take the rank. `hosts`: nodes where another instance
    could go on with the rank's sequences."""
    ring = sorted(nodes)
    load = dict.fromkeys(ring, 0)
    kept: dict[tuple[str, Rank], list[NodeId]] = {}
    ordered = sorted(seats, key=lambda seat: (seat.instance, seat.rank))
    for seat in ordered:
        stay = [node for node in seat.holders if node in load and node != seat.node][:replicas]
        kept[seat.instance, seat.rank] = stay
        for node in stay:
            load[node] += 1
    places = {}
    for seat in ordered:
        holders = kept[seat.instance, seat.rank]
        fitting, hosting = fits.get((seat.instance, seat.rank), ()), hosts.get((seat.instance, seat.rank), ())
        while len(holders) < replicas:
            others = [node for node in ring if node != seat.node and node not in holders]
            if not others:
                break
            after = [node for node in ring if node > seat.node]
            best = min(others, key=lambda node: (node not in fitting, node not in hosting, load[node], node not in after, node))
            holders.append(best)
            load[best] += 1
        places[seat.instance, seat.rank] = Place(tuple(holders), _reason(holders, replicas, fitting, hosting))
    return places


def _reason(holders: list[NodeId], replicas: int, fitting: tuple[NodeId, ...], hosting: tuple[NodeId, ...]) -> str:
    if not holders:
        return NO_OTHER_NODE
    if len(holders) < replicas:
        return f"{len(holders)} of {replicas} replicas: {NO_OTHER_NODE}"
    if holders[0] in hosting and holders[0] not in fitting:
        return "beside an active instance that could go on"
    return "on a node with a fitting standby" if holders[0] in fitting else "no standby fits on any other node" if not fitting else "kept where it is"
