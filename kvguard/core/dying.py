"""Pools whose processes were told to die and may not be dead yet: what a plan can do without them, and what it would gain from them.

Knows: reports with pending streams, two plans of one situation. Must not know: how long anything is waited for (rounds.py), how a plan comes about.
Invariants: a pending pool is never planned with, neither as what is left of a lost rank nor as a survivor's; "dead" is two facts: the node's report says that
nothing of the stream can be acknowledged any more (it is fenced), the death that its memory can be read. The first is all that safety needs.
"""

from __future__ import annotations

from msgspec.structs import replace

from kvguard.core.recovery import Plan, Unplannable
from kvguard.format.messages import Report
from kvguard.types import SequenceId, StreamId

NOTHING, LITTLE, MUCH = range(3)


def without(reports: tuple[Report, ...]) -> tuple[Report, ...]:
    """What can be planned with now."""
    return tuple(_readable(report) if report.pending else report for report in reports)


def afterwards(reports: tuple[Report, ...], members: tuple[StreamId, ...]) -> tuple[Report, ...]:
    """What there may be once the pending processes are dead: their pools, with what the last look found in them. `members`: the lives that are ranks now."""
    found = []
    for report in reports:
        pools = (one for one in report.holdings if one.kind == "pool" and one.stream in report.pending and one.stream in members)
        dead = tuple(replace(one, alive=False) for one in pools)
        found.append(replace(report, holdings=(*dead, *_readable(report).holdings)) if report.pending else report)
    return tuple(found)


def gain(now: Plan, later: Plan | Unplannable, lag_tokens: int, emitter_lives: bool, elsewhere: bool) -> int:
    """What `later`, with the pools, brings back that `now` doesn't: MUCH where a sequence would be lost, would have to be computed from its ids, or would fall
    behind by more than `lag_tokens`.

    LITTLE: fewer tokens than that, or copies that adopting a pool would spare. An emitter that lives knows the ids itself; where it can go on `elsewhere`, a
    short sequence of which no replica has anything is computed there before anybody could start here.
    """
    if isinstance(later, Unplannable):
        return NOTHING
    found, have = NOTHING, {name: facts for name, *facts in _column(now)}
    for name, position, ids, rung in _column(later):
        at, known, by = have.get(name, (0, 0, ""))
        short = max(position - at, 0 if emitter_lives else ids - known)
        if short > lag_tokens or (not elsewhere and (not by or position > at == 0)):
            return MUCH
        found = LITTLE if short > 0 or by != rung else found
    return found


def _column(answer: Plan):
    order = answer.order
    return zip(order.sequences, order.positions, order.ids, order.rungs, strict=True)


def left_behind(now: Plan, later: Plan | Unplannable) -> tuple[tuple[SequenceId, str], ...]:
    """Sequences that only the pools know, each with why it can't go on."""
    known = dict.fromkeys((*now.order.sequences, *(name for name, _ in now.lost)))
    names = later.order.sequences if isinstance(later, Plan) else ()
    return tuple((name, "only the memory of a process that is still dying has it, and that was waited for no longer") for name in names if name not in known)


def _readable(report: Report) -> Report:
    return replace(report, holdings=tuple(one for one in report.holdings if one.kind != "pool" or one.stream not in report.pending))
