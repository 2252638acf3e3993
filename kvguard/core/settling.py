"""A plan that failed in part: what of it is still under way, and how long the next round waits for that.

Knows: a planned round, what was ordered and done of it. Must not know: how a round begins, what is planned in it.
Invariants: a standby that is taking its rank is waited for as long as it may come, because the next fence would kill it as one whose rank is given away;
nothing new is given away meanwhile; the wait ends with settle_ns at the latest (I7); whatever the next round begins for, it knows what has failed. Nothing of
it is durable: nodes say failures again, to a coordinator that restarts as to any other, which takes it that its former life has given every rank of the plan
away.
"""

from __future__ import annotations

from kvguard.core.known import Failure, Known, Round, Settling
from kvguard.core.membership import DEAD
from kvguard.format.messages import Rebuild


def begin(known: Known, current: Round, failure: Failure) -> None:
    """The plan has failed in (another) part."""
    before = current.settling
    if before is None:
        waits = tuple(rebuild.rank for rebuild in current.record.order.rebuilds if rebuild.rank in current.ordered)
        current.settling = Settling(failure, waits, known.fair_ns)
        return
    waits = tuple(rank for rank in before.waits if rank in current.ordered)  # one whose standby was told of nothing may have been among them
    current.settling = before._replace(failure=before.failure.and_also(failure), waits=waits)


def under_way(known: Known, current: Round) -> list[Rebuild]:
    """Ranks that standbys are taking still. [] when the next round need not wait (any longer)."""
    (failure, waits, since_ns), record, nodes = current.settling, current.record, known.membership.nodes
    if known.fair_ns - since_ns >= known.settings.settle_ns:
        return []

    def may_come(rebuild: Rebuild) -> bool:
        node = rebuild.node
        gone = node in failure.excluded or node in record.excluded or (node in nodes and nodes[node].state == DEAD)
        return not gone and (node, rebuild.standby) not in failure.refused and (node, f"rank {rebuild.rank}") not in current.dones

    return [rebuild for rebuild in record.order.rebuilds if rebuild.rank in waits and may_come(rebuild)]
