"""Which standby takes a lost rank, and from which copies: the ladder pool -> replica -> tokens.

Knows: copies with their valid positions (columns.py), standbys by node. Must not know: reports, epochs, messages' order.
Invariants: a standby takes one rank; a pool is adopted only on its own node and whole (its table comes along, so nothing else is mixed in); a stream is pushed
to a target by at most one holder; every rank gets a standby whenever some assignment gives one to all (augmenting paths), preferences decide among those.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.core.columns import Copy, highest
from kvguard.format.messages import Source, StandbyBeat
from kvguard.types import NodeId, Rank, StreamId

Ints = tuple[int, ...]


class Offer(NamedTuple):
    """A copy of a lost rank (or of a mate's, whose bytes are the same) with its valid positions, capped by what the rest of the instance can reach.

    `stays`: it can't be sent to another node: a pool, a replica that lies beside the pool that it is of, or one that could not be sent before.
    """

    copy: Copy
    positions: Ints
    total: int
    stays: bool = False


class Choice(NamedTuple):
    """How one rank comes back. `source`: by sequence the index into `sources`, -1 for none. `transfers`: (holder, stream)."""

    rank: Rank
    node: NodeId
    standby: int
    kind: str  # pool | replica | tokens
    sources: tuple[Source, ...]
    source: Ints
    positions: Ints
    transfers: tuple[tuple[NodeId, StreamId], ...]


class Need(NamedTuple):
    """A lost rank, all that is left of it, and the node that it was on."""

    rank: Rank
    node: NodeId
    offers: tuple[Offer, ...]


class Wishes(NamedTuple):
    """What operators want: by rank the node it shall go to, and nodes that shall get nothing new. Both yield where nothing else fits."""

    targets: tuple[tuple[Rank, NodeId], ...] = ()
    avoided: tuple[NodeId, ...] = ()


def reach(need: Need, size: int) -> Ints:
    """The most that any copy has, by sequence."""
    columns = [offer.positions for offer in need.offers]
    return highest(columns) if columns else (0,) * size


def seats(need: Need, standbys: tuple[tuple[NodeId, StandbyBeat], ...], wishes: Wishes = Wishes()) -> list[tuple[NodeId, int]]:  # noqa: B008 - a frozen value
    """The (node, standby) that can take the rank, best first: where operators want it, where its pool is, where most of its replica is, then round the ring
    from its node."""
    text, wanted = str(need.rank), dict(wishes.targets).get(need.rank)
    known = {offer.copy.fingerprint for offer in need.offers if offer.copy.fingerprint}
    pools = {offer.copy.node: offer.total for offer in need.offers if offer.copy.kind == "pool"}
    replicas: dict[NodeId, int] = {}
    for offer in need.offers:
        if offer.copy.kind == "replica":
            replicas[offer.copy.node] = max(replicas.get(offer.copy.node, 0), offer.total)
    bar = max(replicas.values(), default=0)
    found = []
    for node, standby in standbys:
        print_ = standby.fingerprints.get(text)
        if print_ is None or (print_ and known and print_ not in known):
            continue
        pool = pools.get(node, -1)
        order = (node != wanted, pool < bar, -pool if pool >= bar else 0, node in wishes.avoided, -replicas.get(node, -1), node <= need.node, node)
        found.append(((*order, standby.standby), (node, standby.standby)))
    return [seat for _, seat in sorted(found)]


def assign(wishes: dict[Rank, list[tuple[NodeId, int]]]) -> dict[Rank, tuple[NodeId, int]]:
    """One seat per rank, in the order of `wishes`; ranks that stay without are missing from the answer."""
    taken: dict[tuple[NodeId, int], Rank] = {}

    def move(rank: Rank, tried: dict) -> bool:
        free = next((seat for seat in wishes[rank] if seat not in taken), None)
        if free is not None:
            taken[free] = rank
            return True
        for seat in wishes[rank]:
            if seat in tried:
                continue
            tried[seat] = True
            if move(taken[seat], tried):
                taken[seat] = rank
                return True
        return False

    for rank in wishes:
        move(rank, {})
    return {rank: seat for seat, rank in taken.items()}


def choose(need: Need, seat: tuple[NodeId, int], size: int) -> Choice:
    """The best way to bring the rank back at this seat. A pool on the spot wins ties: it costs no copy and keeps its stream."""
    node, standby = seat
    replicas = _from_replicas(need, node, standby, size)
    pool = max((offer for offer in need.offers if offer.copy.kind == "pool" and offer.copy.node == node), key=lambda offer: offer.total, default=None)
    if pool is None or pool.total < sum(replicas.positions):
        return replicas
    source = tuple([0 if position else -1 for position in pool.positions])
    return Choice(need.rank, node, standby, "pool", (Source("pool", node, pool.copy.stream),), source, pool.positions, ())


def _from_replicas(need: Need, node: NodeId, standby: int, size: int) -> Choice:
    offers = [offer for offer in need.offers if offer.copy.kind == "replica"]
    offers.sort(key=lambda offer: (offer.copy.node != node, -offer.total, offer.copy.node, offer.copy.stream))
    best, source = [0] * size, [-1] * size
    sources: list[Source] = []
    pushed: dict[StreamId, NodeId] = {}
    for offer in offers:
        stream, far = offer.copy.stream, offer.copy.node != node
        if far and (offer.stays or stream in pushed):
            continue
        if not sources:
            if not offer.total:
                continue
            best, source = list(offer.positions), [0 if position else -1 for position in offer.positions]
        else:
            gains = [i for i, (have, position) in enumerate(zip(best, offer.positions, strict=True)) if position > have]
            if not gains:
                continue
            for i in gains:
                best[i], source[i] = offer.positions[i], len(sources)
        if far:
            pushed[stream] = offer.copy.node
        sources.append(Source("replica", offer.copy.node, stream))
    used = dict.fromkeys(source)
    transfers = tuple((entry.node, entry.stream) for at, entry in enumerate(sources) if entry.node != node and at in used)
    return Choice(need.rank, node, standby, "replica" if sources else "tokens", tuple(sources), tuple(source), tuple(best), transfers)
