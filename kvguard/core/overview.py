"""The documents that people and scripts read: kvguard.status/1 and the history.

Knows: interfaces' field names. Must not know: how anything is decided.
Invariant (I8): a rank is called protected only by its own daemon's fresh word in the present epoch, never by the coordinator's hope;
figures that a heartbeat brought say how old they are.
"""

from __future__ import annotations

from kvguard.core import draining, handing
from kvguard.core.known import Known
from kvguard.core.membership import ALIVE, DEAD, MS
from kvguard.core.membership import Member as Place
from kvguard.types import Rank

CLAIM_NS = 2_000_000_000  # a claim that was not said again for so long is over
NOTHING = (0,) * 7


def status(known: Known) -> dict:
    """kvguard.status/1."""
    nodes = [
        {"node": node.node, "state": node.state, "reason": _node_reason(known, node), "drain": _drain(known, node.node),
         "heartbeat_age_ms": (known.now_ns - node.beat_ns) / MS, "version": node.version,
         "address": node.address, "arena_bytes": node.arena_bytes, "arena_bytes_max": node.arena_bytes_max, "standbys": len(node.standbys),
         "carriers": dict(node.carriers) if node.state != DEAD else {},
         "device_faults": [{"device": device, "reason": reason} for device, reason in node.device_faults] if node.state != DEAD else [],
         "figures_age_ms": _age_ms(known, node.figures_ns)}
        for node in sorted(known.membership.nodes.values(), key=lambda node: node.node)
    ]  # fmt: skip
    ranks = [_rank(known, instance, rank, place) for instance, places in sorted(known.membership.members.items()) for rank, place in sorted(places.items())]
    for node in sorted(known.membership.nodes.values(), key=lambda node: node.node):
        ranks += [_standby(node.node, standby.instance, standby.standby) for standby in node.standbys if node.state != DEAD]
    ranks[:0] = [_duplicate(known, *claim) for claim, seen_ns in sorted(known.duplicates.items()) if known.now_ns - seen_ns < CLAIM_NS]
    names = dict.fromkeys((*sorted(known.epochs), *sorted(known.membership.members)))
    instances = [_instance(known, name) for name in names]
    coordinator = {"issuer": known.issuer, "state": "running", "heartbeat_ms": known.settings.patience.heartbeat_ns / MS}
    return {
        "schema": "kvguard.status/1", "coordinator": coordinator, "paused": known.paused, "nodes": nodes, "instances": instances, "ranks": ranks,
        "schedulers": _schedulers(known), "handoffs": [*known.handed, *map(handing.described, known.handoffs.values())], "held": held(known),
    }  # fmt: skip


def held(known: Known) -> list[dict]:
    """What would have been done if recoveries weren't paused."""
    return [
        {"instance": instance, "ranks": [str(rank) for rank in sorted(one.ranks)], "epoch": known.epoch(instance).counter + 1, "reason": one.reason}
        for instance, one in sorted(known.held.items())
    ]  # fmt: skip


def _node_reason(known: Known, node) -> str:
    return draining.progress(known, node.node) if node.state == ALIVE and node.node in known.drained else node.reason


def _drain(known: Known, node: str) -> str:
    """draining | drained, "" where nobody ordered it."""
    return "" if node not in known.drained else "draining" if known.drained[node] else "drained"


def _instance(known: Known, name: str) -> dict:
    epoch, current, session = known.epoch(name), known.rounds.get(name), known.membership.sessions.get(name)
    phase = known.phase(name)
    state = "recovering" if phase else "failed" if name in known.failed else "running"
    reason = f"{phase}: {current.waiting or current.record.reason}" if phase else known.failed.get(name, "")
    if name in known.held:
        held_back = known.held[name]
        ranks = ", ".join(map(str, sorted(held_back.ranks))) or "no rank"
        reason = f"paused: would raise the epoch to {epoch.counter + 1} and recover {ranks}: {held_back.reason}"
    emitter = "none" if session is None else "silent" if session.ended else "linked" if session.link else "unlinked"
    pending = name in known.resumes
    return {"instance": name, "epoch": epoch.counter, "issuer": epoch.issuer, "state": state, "reason": reason, "emitter": emitter, "resume_pending": pending}


def _rank(known: Known, instance: str, rank: Rank, place: Place) -> dict:
    beat, node = place.beat, known.membership.nodes.get(place.node)
    state, reason = (beat.state, beat.reason) if beat is not None else ("unprotected", "not heard of yet")
    phase = known.phase(instance)
    if phase:
        current = known.rounds[instance]
        state, reason = "recovering", current.waiting or current.record.reason
    elif place.lost:
        state, reason = "lost", known.failed.get(instance, "its node or process is gone")
    elif node is None or node.state != ALIVE:
        state, reason = "unprotected", f"node {place.node}: {'unknown' if node is None else node.reason}"
    elif place.absent_ns is not None:
        state, reason = "unprotected", f"not re-attached to {place.node} yet"
    elif state == "unprotected" and not place.holders:
        reason = known.reasons.get((instance, rank), reason) or reason
    numbers = NOTHING
    if beat is not None:
        numbers = (beat.sequences, beat.unprotected_sequences, beat.committed, beat.acked, beat.lag_tokens, beat.lag_bytes, beat.lag_ms)
    copier = known.copiers.get(instance, {}).get(rank, rank)
    return {
        "instance": instance, "rank": str(rank), "node": place.node, "holders": list(place.holders), "state": state, "reason": reason, **_numbers(numbers),
        "figures_age_ms": _age_ms(known, place.beat_ns), "copied_as": str(copier),
    }  # fmt: skip


def _age_ms(known: Known, at_ns: int | None) -> float | None:
    """How old what a heartbeat said is: its figures are of the moment when it came, not of this one. None: none has come."""
    return None if at_ns is None else (known.now_ns - at_ns) / MS


def _numbers(numbers: tuple) -> dict:
    return dict(zip(("sequences", "unprotected_sequences", "committed", "acked", "lag_tokens", "lag_bytes", "lag_ms"), numbers, strict=True))


def _schedulers(known: Known) -> list[dict]:
    """Schedulers' own streams: whether the ids that they accepted are held elsewhere."""
    found = []
    for node in sorted(known.membership.nodes.values(), key=lambda node: node.node):
        for beat in node.schedulers:
            state, reason = (beat.state, beat.reason) if node.state == ALIVE else ("unprotected", f"node {node.node}: {node.reason}")
            found.append({
                "instance": beat.stream.instance, "dp": beat.stream.rank.dp, "node": node.node, "holders": list(beat.holders), "state": state, "reason": reason,
                "sequences": beat.sequences, "ids": beat.ids, "acked_ids": beat.acked_ids, "epoch": beat.epoch.counter, "stream": str(beat.stream),
                "figures_age_ms": _age_ms(known, node.told_ns),
            })  # fmt: skip
    return found


def _duplicate(known: Known, instance: str, rank: Rank, node: str) -> dict:
    """A second live process of a rank: it is not served by anybody, and says so as long as it claims the place."""
    home = known.membership.members.get(instance, {}).get(rank)
    reason = f"a second process claims rank {rank}, which lives on {home.node if home else 'another node'}: the first keeps it"
    return {"instance": instance, "rank": str(rank), "node": node, "holders": [], "state": "unprotected", "reason": reason, **_numbers(NOTHING)}


def _standby(node: str, instance: str, standby: int) -> dict:
    return {"instance": instance, "rank": "", "node": node, "holders": [], "state": "standby", "reason": f"incarnation {standby}", **_numbers(NOTHING)}


def history(known: Known) -> list[dict]:
    """Finished recoveries, oldest first."""
    return [
        {"instance": record.instance, "epoch": record.epoch.counter, "issuer": record.epoch.issuer, "reason": record.reason,
         "ranks": [str(rank) for rank in record.ranks],
         "targets": record.targets, "timing_ms": record.timing_ms, "positions": record.positions, "rungs": record.rungs, "lost": record.lost,
         "bytes_by_rung": record.bytes_by_rung, "attempts": record.attempt, "error": record.error, "verdict_ns": record.verdict_ns,
         "recomputed": record.recomputed}
        for record in known.history
    ]  # fmt: skip
