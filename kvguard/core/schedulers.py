"""A scheduler's own stream: the ids that it has accepted, on their way to the holders of the ranks beside it, sooner than the ranks' rows have them.

Knows: the ledger and senders of one scheduler's table, which rank's holders it uses. Must not know: KV (its shape has none), faults, plans.
Invariants: a scheduler is no rank: its death raises no epoch, and nothing waits for it; a dead life's ids stay until its successor has committed and is held,
or a plan has taken them into account; at most one dead life of a scheduler is kept.
"""

from __future__ import annotations

from kvguard.core.effects import Effect, Note
from kvguard.core.local import LocalStream
from kvguard.core.outbound import Outbound
from kvguard.format.messages import SchedulerBeat
from kvguard.types import Epoch, StreamId, is_scheduler

Effects = tuple[Effect, ...]


def lives(outbound: Outbound, stream: StreamId) -> list[LocalStream]:
    """All lives of one scheduler that are known here, oldest first."""
    return [local for local in outbound.of(stream.instance) if local.stream.rank == stream.rank]


def beats(outbound: Outbound, now: int, promises) -> tuple[SchedulerBeat, ...]:
    """`promises`: core.promises.Promises."""
    return tuple(_beat(local, now, promises.of(local.stream.instance)) for local in outbound.streams.values() if is_scheduler(local.stream.rank))


def _beat(local: LocalStream, now: int, promised: Epoch) -> SchedulerBeat:
    """Protected: all ids that were known at the beat before this one are acknowledged by a holder that answers."""
    answering = [sender for sender in local.senders.values() if sender.state == "stream"]
    ids = acked = unprotected = 0
    before, local.ids_before = local.ids_before, {}
    for number, row in local.ledger.rows.items():
        best = max((sender.flow.copies[number].acked_ids for sender in answering), default=0)
        best = min(best, row.ids)
        ids, acked = ids + row.ids, acked + best
        unprotected += best < min(before.get(number, 1), row.ids)
        local.ids_before[number] = row.ids
    state, reason = local.judged(promised, bool(answering), unprotected)
    if state == "lost":
        reason += "; ids come from the ranks' rows until a scheduler attaches again"
    return SchedulerBeat(
        local.stream, local.epoch, local.incarnation, local.endpoint, state, reason, tuple(local.senders), len(local.ledger.rows), ids, acked
    )  # fmt: skip


def died(outbound: Outbound, local: LocalStream, reason: str) -> Effects:
    """Its ids go on to the holders; nobody's KV is lost. Of lives that died before it none is needed any more."""
    local.alive, local.death = False, f"died: {reason}"
    told: Effects = (Note("scheduler_died", str(local.stream), reason),)
    for older in lives(outbound, local.stream):
        if older is not local and not older.alive:
            told += outbound.detach(older, "another life of its scheduler died after it")
    return told


def succeeded(outbound: Outbound) -> Effects:
    """Dead lives whose successor has committed, and is held, are let go."""
    told: Effects = ()
    for dead in [local for local in outbound.streams.values() if not local.alive and is_scheduler(local.stream.rank)]:
        for other in lives(outbound, dead.stream):
            if other.alive and other.ledger.rows and other.senders and all(sender.caught_up() for sender in other.senders.values()):
                told += outbound.detach(dead, "its successor has committed")
                break
    return told
