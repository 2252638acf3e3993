"""Which instance takes a request.

Knows: instances as values, load, places of a resume token. Must not know: I/O, what a request is.
Invariants: an instance that is not active never gets anything; the least loaded comes first, ties in configured order; a token's bytes are asked for only
where every rank of the sequence has its part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from kvguard.types import NodeId, Places, Rank


class Instance(NamedTuple):
    """One engine server as configured. `node`: where its ranks live, as long as the coordinator hasn't said more exactly."""

    name: str
    url: str
    node: NodeId


class Standing(NamedTuple):
    """What is known of an instance now. `members`: where each rank lives, where the coordinator said it."""

    instance: Instance
    active: bool
    load: int
    members: Mapping[Rank, NodeId]


def choose(standings: Iterable[Standing], fits: Callable[[Standing], bool] = lambda standing: True) -> Instance | None:
    """The least loaded active instance that fits."""
    found = [standing for standing in standings if standing.active and fits(standing)]
    return min(found, key=lambda standing: standing.load).instance if found else None


def is_place(standing: Standing, places: Places) -> bool:
    """Whether every rank of a moved sequence has its KV on the node where this instance's rank of the same place in the pipeline lives."""
    if not places:
        return False
    wanted: dict[Rank, set[NodeId]] = {}
    for rank, node in places:
        wanted.setdefault(rank, set()).add(node)
    return all(_nodes_of(standing, rank) & nodes for rank, nodes in wanted.items())


def _nodes_of(standing: Standing, rank: Rank) -> set[NodeId]:
    """Where ranks of the same (pp, tp) live, of any dp: an engine decides itself which of its dp ranks takes a request."""
    return {node for member, node in standing.members.items() if member[1:] == rank[1:]} or {standing.instance.node}
