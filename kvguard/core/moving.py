"""Sequences that go on in another active instance: from which nodes each of them can, and how far. A pure function over columns.

Knows: what is left of each rank that ends (ladder.Need), which nodes host an equal rank of another instance. Must not know: reports, messages, time.
Invariants (I1): a position is never beyond what one place has for every rank; only places that have the whole of it are named; a place is one instance's ranks,
because an engine can't go on with half of its pipeline; without a host the node of the ended rank itself is the place, for an engine started there
again.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.core.columns import highest, lowest
from kvguard.core.ladder import Need, Offer
from kvguard.types import NodeId, Places, Rank, Rung, StreamId

Ints = tuple[int, ...]


class Host(NamedTuple):
    """One dp of an active instance whose ranks hold interchangeable bytes: the nodes by (pp, tp)."""

    instance: str
    dp: int
    nodes: tuple[tuple[tuple[int, int], NodeId], ...]


class Way(NamedTuple):
    """One place: by rank its node, and by sequence how far it reaches there, and from which rung."""

    nodes: dict[Rank, NodeId]
    positions: Ints
    rungs: tuple[str, ...]


class Spread(NamedTuple):
    """By sequence: position, places, rung, why. `transfers`: (holder, target, stream), replicas that have no host beside them."""

    positions: Ints
    places: tuple[Places, ...]
    rungs: tuple[str, ...]
    explanations: tuple[str, ...]
    transfers: tuple[tuple[NodeId, NodeId, StreamId], ...] = ()


def spread(needs: list[Need], hosts: tuple[Host, ...], size: int) -> Spread:
    """`needs`: every rank of one dp; their offers are capped already by what ids and the other ranks allow."""
    hosted = [nodes for nodes in (_nodes_of(needs, host) for host in hosts) if nodes is not None]
    ways = [_way(needs, nodes, (), size) for nodes in hosted]
    transfers: tuple = ()
    if hosted and not any(any(way.positions) for way in ways):
        transfers, way = _pushed(needs, hosted, size)
        ways.append(way)
    home = _way(needs, {need.rank: need.node for need in needs}, (), size)
    if home.nodes in hosted:
        home = home._replace(positions=(0,) * size)
    columns = [way.positions for way in ways]
    best = highest(columns) if columns else (0,) * size
    positions = tuple([there or here for there, here in zip(best, home.positions, strict=True)])
    named: dict[tuple, Places] = {}
    places, rungs, explanations = [], [], []
    for i, position in enumerate(positions):
        able = [way for way in ways if position and way.positions[i] >= position] or ([home] if position else [])
        key = tuple(map(id, able))
        if key not in named:
            named[key] = tuple(sorted(dict.fromkeys((rank, node) for way in able for rank, node in way.nodes.items())))
        places.append(named[key])
        rungs.append(able[0].rungs[i] if able else Rung.TOKENS)
        explanations.append(_sentence(named[key], rungs[i], bool(able) and able[0] is home))
    return Spread(positions, tuple(places), tuple(rungs), tuple(explanations), transfers)


def _nodes_of(needs: list[Need], host: Host) -> dict[Rank, NodeId] | None:
    """None where this host lacks a counterpart of some rank."""
    there = dict(host.nodes)
    nodes = {need.rank: there.get((need.rank.pp, need.rank.tp)) for need in needs}
    return None if None in nodes.values() else nodes


def _at(need: Need, node: NodeId) -> list[Offer]:
    return [offer for offer in need.offers if offer.copy.node == node]


def _way(needs: list[Need], nodes: dict[Rank, NodeId], pushed: tuple[tuple[Rank, Offer], ...], size: int) -> Way:
    """`pushed`: copies that will be at their rank's node by then."""
    columns, pools = [], []
    for need in needs:
        offers = [*_at(need, nodes[need.rank]), *(offer for rank, offer in pushed if rank == need.rank)]
        columns.append(highest([(0,) * size, *(offer.positions for offer in offers)]))
        replicas = highest([(0,) * size, *(offer.positions for offer in offers if offer.copy.kind == "replica")])
        pools.append([held < most for held, most in zip(replicas, columns[-1], strict=True)])
    positions = lowest(columns)
    rungs = [Rung.POOL if all(column[i] for column in pools) else Rung.REPLICA for i in range(size)]
    return Way(nodes, positions, tuple([rung if position else Rung.TOKENS for rung, position in zip(rungs, positions, strict=True)]))


def _pushed(needs: list[Need], hosted: list[dict[Rank, NodeId]], size: int) -> tuple[tuple, Way]:
    """The host to which most can be sent, by the holders of what is nowhere beside a host."""
    best: tuple[tuple, Way] | None = None
    for nodes in hosted:
        sent = []
        for need in needs:
            far = [offer for offer in need.offers if offer.copy.kind == "replica" and not offer.stays and offer.copy.node != nodes[need.rank] and offer.total]
            if far and not any(offer.total for offer in _at(need, nodes[need.rank])):
                sent.append((need.rank, max(far, key=lambda offer: offer.total)))
        way = _way(needs, nodes, tuple(sent), size)
        if best is None or sum(way.positions) > sum(best[1].positions):
            moves = tuple((offer.copy.node, nodes[rank], offer.copy.stream) for rank, offer in sent)
            best = (moves if any(way.positions) else (), way)
    assert best is not None, "there are hosts"
    return best


def _sentence(places: Places, rung: str, is_home: bool) -> str:
    if not places:
        return "goes on in another instance from its ids: no place has KV of it for every rank"
    where = "; ".join(f"{rank} at {node}" for rank, node in places)
    return f"{rung}: {'an engine started again goes on from' if is_home else 'goes on in another instance from'} {where}"


def stays(places: tuple[Places, ...], rank: Rank, node: NodeId) -> bool:
    """Whether some sequence may be fetched from what `node` has of `rank`."""
    return any((rank, node) in named for named in dict.fromkeys(places))
