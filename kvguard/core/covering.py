"""How far a local stream is held elsewhere by the copy of another one: that of a mate on this node, whose bytes are the same (shards.py).

Knows: the ledgers of both, the mate's senders. Must not know: who decided that they are mates, links.
Invariants: a row counts as held only as far as the mate's row of the same sequence (name and birth) is, below the fork that parts their lineages, and never
beyond its own committed positions; rows are told by sequence, since their numbers can differ; a mate that is dead, fenced, of another epoch or by now of
another shape covers nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvguard.core.ledger import Row
from kvguard.core.sender import Sender
from kvguard.format.lineage import UNBOUNDED, agreed, birth_of, is_other
from kvguard.format.shapes import is_shared
from kvguard.types import Life, NodeId, Position

if TYPE_CHECKING:
    from kvguard.core.local import LocalStream


def able(local: LocalStream, mate: LocalStream | None) -> bool:
    """Whether the mate's holders say anything about this stream."""
    return mate is not None and mate.watched and not mate.fenced and mate.epoch == local.epoch and _equal(mate, local)


def _equal(mate: LocalStream, local: LocalStream) -> bool:
    return mate.shape.fingerprint == local.shape.fingerprint and is_shared(local.shape.fingerprint)


def row_of(mate: LocalStream, row: Row) -> tuple[int, Position] | None:
    """The mate's row of the same sequence, and up to where the two are one; None where it has none."""
    number = mate.ledger.numbers.get(row.sequence, -1)
    same = mate.ledger.rows.get(number)
    if same is None or (same.request != row.request and is_other(birth_of(same.request), birth_of(row.request))):
        return None
    return number, UNBOUNDED if same.lineage == row.lineage else agreed(same.lineage, row.lineage)


def best(mate: LocalStream, row: Row) -> Position:
    """The furthest position of a row that a holder of the mate's has."""
    found = row_of(mate, row)
    return min(mate.held(found[0]), found[1], row.committed) if found is not None else 0


def caught(mate: LocalStream, row: Row) -> bool:
    found = row_of(mate, row)
    return found is not None and any(sender.flow.copies[found[0]].caught for sender in mate.senders.values())


def releasable(mate: LocalStream, row: Row, life: Life) -> Position:
    """How many ids of a row all holders of the mate's have."""
    found = row_of(mate, row)
    return min(mate.releasable(life), found[1]) if found is not None else 0


def whole(local: LocalStream, mate: LocalStream) -> tuple[NodeId, ...]:
    """The mate's holders that have everything but, of each sequence, the newest position at most."""
    rows = local.ledger.rows.values()
    return tuple(node for node, sender in mate.senders.items() if sender.state == "stream" and all(_follows(mate, sender, row) for row in rows))


def covers(local: LocalStream, mate: LocalStream, old: Sender) -> bool:
    """Whether every holder of the mate's has what one of this stream's own has: that one may go."""
    new = [sender for node, sender in mate.senders.items() if node not in mate.ending]
    if not new or any(sender.state != "stream" for sender in new):
        return False
    had = old.flow.copies
    return all(_has(mate, sender, row, had[number].acked, had[number].acked_ids) for sender in new for number, row in local.ledger.rows.items())


def _follows(mate: LocalStream, sender: Sender, row: Row) -> bool:
    return _has(mate, sender, row, max(row.committed - 1, min(row.committed, 1)), row.committed)


def _has(mate: LocalStream, sender: Sender, row: Row, position: Position, ids: int) -> bool:
    found = row_of(mate, row)
    if found is None:
        return not position and not ids
    copy = sender.flow.copies[found[0]]
    return not copy.shed and min(copy.acked, found[1]) >= position and min(copy.acked_ids, found[1]) >= ids
