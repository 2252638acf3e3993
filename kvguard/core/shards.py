"""Which ranks of an instance hold equal bytes: mates. Those on one node are one shard, copied once, by the first of them for all.

Knows: members with their nodes and fingerprints. Must not know: how a shard is copied (covering.py), what is left of a lost rank (recovery.py).
Invariants: mates have equal dp and pp and equal fingerprints that say themselves that the bytes are equal (the shard is part of one, so that a distinct part
never has an equal one; ranks that merely forgot to name their parts are no mates);
who copies lives, on the node of all whom it copies for, and copies for itself; the same members give the same answer, also after the coordinator's restart.
"""

from __future__ import annotations

from kvguard.core.membership import Member
from kvguard.format.shapes import is_shared
from kvguard.types import NodeId, Rank

Places = dict[Rank, Member]


def are_mates(one: Rank, other: Rank, print_: int, other_print: int) -> bool:
    """Whether what is held of one rank is as good for the other one."""
    return (one.dp, one.pp) == (other.dp, other.pp) and print_ == other_print and is_shared(print_)


def mates(places: Places, rank: Rank) -> list[Rank]:
    """All others, on any node, lost or not, whose bytes are this rank's."""
    mine = places[rank].fingerprint if rank in places else 0
    return [other for other, member in sorted(places.items()) if other != rank and are_mates(rank, other, mine, member.fingerprint)]


def copiers(places: Places, elsewhere: dict[Rank, NodeId] = {}) -> dict[Rank, Rank]:  # noqa: B006 - only read
    """For each living rank the one that copies its bytes: the lowest of its living mates on its node, most often itself. `elsewhere`: where some would be."""
    first: dict[tuple, Rank] = {}
    found = {}
    for rank, member in sorted(places.items()):
        if not member.lost:
            key = elsewhere.get(rank, member.node), rank.dp, rank.pp, member.fingerprint
            found[rank] = first.setdefault(key, rank) if is_shared(member.fingerprint) else rank
    return found
