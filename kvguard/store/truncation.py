"""A plan's truncation of one replica.

Knows: what a plan says of each sequence. Must not know: epochs promised, sessions, how often a plan comes (store.py).
Invariants: beyond the fork of a lineage nothing stays, whatever the plan's position; a sequence that the plan doesn't name goes, and so does another one that
bears the name of one that it names.
"""

from __future__ import annotations

from kvguard.format import lineage as lineages
from kvguard.format.messages import PlanOrder
from kvguard.limits import IDS_PER_ROW_MAX
from kvguard.store.replica import Replica


def cut_to_plan(replica: Replica, plan: PlanOrder) -> int:
    """Live sequences are cut to the plan's positions and ids, and are of its lineages from then on. Returns how many of another birth went."""
    others = 0
    places = {name: index for index, name in enumerate(plan.sequences)}
    for sequence in replica.live():
        index = places.get(sequence.name)
        if index is None:
            replica.drop(sequence)
            continue
        if plan.births and lineages.is_other(sequence.birth, plan.births[index]):
            replica.drop(sequence)
            others += 1
            continue
        agreed = lineages.agreed(sequence.lineage, plan.lineages[index])
        ids = plan.ids[index] if agreed >= plan.positions[index] else agreed  # of a copy that forked earlier nothing beyond that is of this sequence
        replica.cut(sequence, min(agreed, plan.positions[index]), min(ids, IDS_PER_ROW_MAX))
        replica.fork(sequence, sequence.generation, plan.lineages[index])
    return others
