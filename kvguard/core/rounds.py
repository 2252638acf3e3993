"""Fencing and planning: how a recovery begins, round by round, until its plan is durable and ordered.

Knows: one round's record and reports, plan(). Must not know: how a plan is carried out (resuming.py).
Invariants (I3, I7): the round is durable before its Fence leaves; a round waits for every node that isn't dead, up to a deadline, then excludes it durably;
nothing is planned before each lost rank's old writer is known to be unable to be acknowledged; a further loss means a new epoch and a new round; rounds and
failovers are bounded, and past the bound the failure is explicit. The memory of a process that is being torn down is waited for only as far as it is needed
(dying.py).
"""

from __future__ import annotations

import msgspec

from kvguard.core import dying, hosting, resuming, sessions
from kvguard.core.known import Failure, Known, Round, member_record
from kvguard.core.ladder import Wishes
from kvguard.core.membership import DEAD, MS
from kvguard.core.recovery import Plan, Situation, Unplannable, plan
from kvguard.format import ledger, moves
from kvguard.format.ledger import FENCING, PLANNED, RecoveryRecord
from kvguard.format.messages import Fence, Fenced, Report
from kvguard.types import Clash, Epoch, NodeId, Rank


def start(
    known: Known, instance: str, ranks: tuple[Rank, ...], reason: str, detect_ms: float = 0.0, dead_writers: tuple[Rank, ...] = (),
    excluded: tuple[NodeId, ...] = (), refused: tuple[tuple[NodeId, int], ...] = (), clashes: tuple[Clash, ...] = (),
    targets: tuple[tuple[Rank, NodeId], ...] = (),
) -> None:  # fmt: skip
    """Raise the epoch and fence. A round under way is replaced: what it had not brought back is lost again, and what had failed of it has."""
    places = known.membership.members.setdefault(instance, {})
    before = known.rounds.get(instance)
    if known.paused:
        failure = Failure(ranks, reason, detect_ms, dead_writers, excluded, refused, clashes)
        old = known.held.get(instance)
        known.held[instance] = old.and_also(failure) if old is not None else failure
        if old is None or known.held[instance].ranks != old.ranks:
            known.note("paused", instance, f"would raise the epoch to {known.epoch(instance).counter + 1} and recover {_list(ranks)}: {reason}")
        return
    if before is not None and before.settling is not None:
        failure = Failure(ranks, reason, 0.0, dead_writers, excluded, refused, clashes)
        ranks, _, _, dead_writers, excluded, refused, clashes = failure.and_also(before.settling.failure)
    attempt, timing, stuck = 1, {"detect": detect_ms}, ()
    away = resuming.away(known, instance)
    if before is not None and before.record.phase != ledger.RESUMED:
        record = before.record
        attempt, timing = record.attempt + 1, {**record.timing_ms, "earlier": record.timing_ms.get("earlier", 0.0) + (known.now_ns - before.mark_ns) / MS}
        ranks, targets = (*ranks, *record.lost), targets or record.targets
        dead_writers, refused, clashes = (*dead_writers, *record.dead_writers), (*refused, *record.refused), (*clashes, *record.clashes)
        stuck = record.stuck
        if record.phase == PLANNED:
            late = [(holder, stream) for holder, _, _, stream in record.order.transfers if holder in excluded]
            stuck += tuple((holder, stream) for holder, stream in late if (holder, f"transfer {stream}") not in before.dones)
            back = [rank for rank in record.lost if resuming.rank_done(before, rank) and rank not in ranks[: len(ranks) - len(record.lost)]]
            ranks = tuple(rank for rank in ranks if rank not in back)
            resuming.move_in(known, before, back)
    epoch = Epoch(known.epoch(instance).counter + 1, known.issuer)
    for rank in ranks:
        if rank in places:
            places[rank].lost = True
    record = RecoveryRecord(
        instance, epoch, FENCING, reason, tuple(sorted(dict.fromkeys(ranks))), {str(rank): member_record(place) for rank, place in sorted(places.items())},
        tuple(dict.fromkeys(excluded)), tuple(sorted(dict.fromkeys(dead_writers))), attempt, tuple(dict.fromkeys(refused)), timing_ms=timing,
        verdict_ns=known.now_ns, away=tuple(life.sequence for life in away), targets=targets, away_births=tuple(life.birth for life in away),
        clashes=tuple(dict.fromkeys(clashes)), stuck=tuple(dict.fromkeys(stuck)),
    )  # fmt: skip
    current = known.rounds[instance] = Round(record, known.fair_ns, known.now_ns)
    known.epochs[instance] = epoch
    known.keep_round(instance, record)
    known.persist(f"epoch/{instance}", epoch)
    if known.resumes.pop(instance, None) is not None:
        known.persist(f"resume/{instance}", None)
    known.failed.pop(instance, None)
    sessions.begun_anew(known, instance)
    known.membership.recovering[instance] = known.fair_ns
    known.note("fenced", instance, reason, epoch=epoch.counter, lost=_list(record.lost), attempt=attempt)
    if not _within_bounds(known, instance, current):
        return
    say_fence(known, instance)
    known.tell_emitter(instance, Fenced(instance, epoch, reason))
    advance(known, instance)


def go_round(known: Known, instance: str, failure: Failure) -> None:
    """A new round for a further loss; where a plan is being carried out, once those that are taking their ranks have them (settling.py)."""
    if known.phase(instance) == PLANNED:
        resuming.give_up(known, instance, failure, start)
    else:
        start(known, instance, *failure)


def _within_bounds(known: Known, instance: str, current: Round) -> bool:
    """Back-off and the bound on failovers per window (a flapping rank must not keep an instance from serving for ever). False: it has failed."""
    settings, record = known.settings, current.record
    if record.attempt > settings.attempts_max:
        resuming.fail(known, instance, f"{record.attempt - 1} rounds did not bring it back; the last began because: {record.reason}")
        return False
    if not record.lost or record.attempt > 1:
        return True
    recent = [at for at in known.starts.get(instance, []) if known.fair_ns - at < settings.window_ns]
    known.starts[instance] = [*recent, known.fair_ns]
    if len(recent) >= settings.failovers_max:
        resuming.fail(known, instance, f"{len(recent)} failovers within {settings.window_ns // MS} ms: it flaps. Try: find the cause, then kvguard failover")
        return False
    if len(recent) >= settings.backoff_free:
        current.not_before_ns = known.fair_ns + min(settings.backoff_ns << (len(recent) - settings.backoff_free), settings.standby_ns // 2)
    return True


def say_fence(known: Known, instance: str) -> None:
    """To every node that is linked and hasn't heard this round on its present link."""
    current = known.rounds[instance]
    record = current.record
    for node in known.linked():
        link = known.membership.nodes[node].link
        if node not in current.reports and current.asked.get(node) != link:
            current.asked[node], current.asked_ns[node] = link, known.fair_ns
            known.tell_node(node, Fence(instance, record.epoch, record.lost, record.reason))


def on_report(known: Known, node: NodeId, report: Report) -> None:
    current = known.rounds.get(report.instance)
    if current is None or current.record.phase != FENCING or report.epoch != current.record.epoch:
        known.note("stale_report", report.instance, f"{report.node} reports for epoch {report.epoch.counter}, which nobody waits for")
        return
    if node in current.record.excluded:
        known.note("refused", report.instance, f"the report of {report.node} on the link of {node} doesn't count: it is excluded from this epoch")
        if current.tried is not None:  # all that the round still waits for is a standby: with this node's there may be one
            start(known, report.instance, (), f"{node}, excluded from epoch {report.epoch.counter}, answers again")
        return
    current.reports[node] = report
    current.heard += 1
    advance(known, report.instance)


def on_death(current: Round, node: NodeId, rank: Rank, seen: bool, fair_ns: int) -> None:
    """More of the death that this round is about. Seen: an old writer less; it is kept with the next record, and without it the round only waits for more.
    Still suspected: the node lives and waits for that death, so that it isn't excluded for it, and its pool may be waited for."""
    if seen:
        current.record = msgspec.structs.replace(current.record, dead_writers=tuple(sorted(dict.fromkeys((*current.record.dead_writers, rank)))))
    else:
        current.asked_ns[node] = fair_ns


def advance(known: Known, instance: str) -> None:
    """Go as far as what is known allows. Called after every event that may have moved the round; does nothing when none has."""
    current = known.rounds.get(instance)
    if current is None:
        return
    if current.record.phase != FENCING:
        resuming.advance(known, instance, start)
        return
    record, age_ns = current.record, known.fair_ns - current.since_ns
    answered = (*current.reports, *record.excluded)
    silent = tuple(node.node for node in known.membership.nodes.values() if node.state != DEAD and node.node not in answered)
    if silent and age_ns < known.settings.standby_ns and any(known.fair_ns < answer_due(known, current, node) for node in silent):
        current.waiting = f"waiting for the reports of {', '.join(silent)}"
        return
    if silent:
        record = msgspec.structs.replace(record, excluded=(*record.excluded, *silent))
        known.keep_round(instance, record)
        known.note("excluded", instance, f"no report within {known.settings.exclude_ns // MS} ms from {', '.join(silent)}", epoch=record.epoch.counter)
    if known.fair_ns < current.not_before_ns:
        current.waiting = f"waiting {(current.not_before_ns - known.fair_ns) // MS} ms: failovers come too fast"
        return
    unsealed = _unsealed(known, current)
    if unsealed:
        current.waiting = f"waiting for {unsealed}"
        if age_ns >= known.settings.seal_ns:
            resuming.fail(known, instance, f"{unsealed}: an old writer could still be acknowledged. Try: make sure it is dead, then kvguard failover")
        return
    _try_plan(known, instance)


def answer_due(known: Known, current: Round, node: NodeId) -> int:
    """Until when a node's report is waited for. One that came while the round waited for a standby has its time too: it may be what brings one."""
    return max(current.since_ns, current.asked_ns.get(node, 0)) + known.settings.exclude_ns


def _unsealed(known: Known, current: Round) -> str:
    """Whose silence still matters: "" when no old writer can be acknowledged or heard by the emitter any more.

    Old writers are the lost ranks and every rank on a node that didn't answer: a node that answered has promised, and fenced its own ranks.
    """
    record = current.record
    session = known.membership.sessions.get(record.instance)
    if session is not None and not session.ended and session.fenced >= record.epoch.counter:
        return ""
    for text, member in record.members.items():
        rank = Rank.parse(text)
        if rank in record.dead_writers or member.node in current.reports:
            continue
        open_ = [node for node in dict.fromkeys((*member.holders, *member.former)) if node not in current.reports]
        if open_:
            return f"{', '.join(open_)} (may acknowledge rank {rank} on {member.node}), or the emitter's word"
    return ""


def _least_gain(known: Known, current: Round) -> int:
    """How much a plan must gain from pools of dying processes to be worth waiting for them now; more than there is, where nobody waits any more.

    Their nodes say again that they are dying; one that falls silent about it isn't waited for.
    """
    pending = [node for node, report in current.reports.items() if report.pending]
    age_ns = known.fair_ns - current.since_ns
    if age_ns >= known.settings.standby_ns or all(known.fair_ns >= answer_due(known, current, node) for node in pending):
        return dying.MUCH + 1
    return dying.LITTLE if age_ns < known.settings.pool_ns else dying.MUCH


def _without_pending(known: Known, current: Round, situation: Situation, least: int, answer: Plan) -> Plan | None:
    """`answer`, with what it leaves behind in pools of dying processes; None where these are waited for."""
    streams = [str(stream) for report in current.reports.values() for stream in report.pending]
    if not streams:
        return answer
    members = known.membership.members[situation.instance]
    reports = dying.afterwards(tuple(current.reports.values()), tuple(place.stream for place in members.values()))
    later = plan(situation._replace(reports=reports))
    if dying.gain(answer, later, known.settings.pool_lag_tokens, situation.emitter_lives, bool(situation.hosts)) >= least:
        current.waiting = f"waiting for the memory of {', '.join(streams)}: its process is being torn down, and replicas have less"
        return None
    return answer if situation.moves else answer._replace(lost=(*answer.lost, *dying.left_behind(answer, later)))


def _try_plan(known: Known, instance: str) -> None:
    current = known.rounds[instance]
    record = current.record
    standbys = tuple(
        (node.node, standby) for node in known.membership.nodes.values() if node.node in current.reports
        for standby in node.standbys if standby.instance == instance and (node.node, standby.standby) not in record.refused
    )  # fmt: skip
    may_move = known.moves(instance) and known.fair_ns - current.since_ns >= known.settings.move_ns
    hosts = hosting.hosts(known, instance, tuple(current.reports)) if may_move else ()
    least = _least_gain(known, current)
    key = (current.heard, standbys, may_move, hosts, least)
    if current.tried != key:
        current.tried = key
        members = {rank: place.node for rank, place in sorted(known.membership.members[instance].items())}
        lives = known.emitter_lives(instance)
        over = dict(known.delivered.get(instance, {}))
        if lives:  # it may use a name again; what it has delivered of a known birth will never be wanted, and others have its blocks by now
            over = {name: tuple(birth for birth in births if birth) for name, births in over.items()}
        for name, birth in record.away_lives():
            over[name] = (*over.get(name, ()), birth)
        situation = Situation(
            instance, record.epoch, members, record.lost, dying.without(tuple(current.reports.values())), standbys, known.addresses(),
            known.forks.get(instance, {}), record.excluded, over, lives, may_move, hosts, Wishes(record.targets, tuple(known.drained)),
            known.births.get(instance, {}), record.clashes, {rank: place.fingerprint for rank, place in known.membership.members[instance].items()},
            record.stuck,
        )  # fmt: skip
        answer = plan(situation)
        if not isinstance(answer, Unplannable):
            answer = _without_pending(known, current, situation, least, answer)
            if answer is not None:
                _order(known, instance, answer)
            return
        current.waiting = "waiting: " + "; ".join(answer.reasons)
        known.note("unplannable", instance, "; ".join(answer.reasons), epoch=record.epoch.counter)
    if known.fair_ns - current.since_ns >= known.settings.standby_ns:
        why = current.waiting.removeprefix("waiting: ")
        resuming.fail(known, instance, f"{why} within {known.settings.standby_ns // MS} ms. Try: start a standby, then kvguard failover")


def _order(known: Known, instance: str, answer) -> None:
    """The plan is durable before anyone hears of it; so are the forks it decides."""
    current = known.rounds[instance]
    record = current.record
    timing = {**record.timing_ms, "fence": (known.now_ns - current.mark_ns) / MS}
    for rank in answer.lost_ranks:
        known.membership.members[instance][rank].lost = True
    record = msgspec.structs.replace(
        record, phase=PLANNED, order=answer.order, lost=answer.lost_ranks, lost_sequences=answer.lost, former=answer.former, timing_ms=timing,
        members={str(rank): member_record(place) for rank, place in sorted(known.membership.members[instance].items())},
        excluded=tuple(dict.fromkeys((*record.excluded, *(node.node for node in known.membership.nodes.values() if node.node not in current.reports)))),
    )  # fmt: skip
    if answer.order.moved:
        secret = moves.secret_of(known.secret, instance, record.epoch)
        lives = (known.membership.members[instance][rank].stream for rank in answer.order.moved)
        former = tuple(dict.fromkeys((*record.former, *lives)))
        record = msgspec.structs.replace(record, order=msgspec.structs.replace(answer.order, secret=secret), former=former)
    known.keep_round(instance, record)  # first: forks of a plan that nobody was told would cut the next one for nothing
    known.forks[instance] = dict(zip(answer.order.sequences, answer.order.lineages, strict=True))
    known.persist(f"forks/{instance}", known.forks[instance])
    known.births[instance] = answer.order.births_by_name()
    known.persist(f"births/{instance}", known.births[instance])
    for node, stream, sequence in answer.strange:
        known.note("other_life", f"{instance} {sequence}", f"{node} has another sequence that bore this name, of {stream}: nothing of it is used")
    current.mark_ns, current.since_ns, current.plan_open = known.now_ns, known.fair_ns, True
    current.asked, current.waiting = {}, ""
    known.note("planned", instance, f"{len(answer.order.sequences)} sequences go on, {len(answer.lost)} are lost", epoch=record.epoch.counter)
    resuming.say_plan(known, instance)


def _list(ranks: tuple[Rank, ...]) -> str:
    return ", ".join(str(rank) for rank in ranks) or "no rank"
