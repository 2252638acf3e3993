"""Carrying a plan out: orders, parts done, resumption, failure, and letting go of what was pinned.

Knows: a planned round and its Done messages. Must not know: how the plan came about.
Invariants: a rank is given away only when its target has carried the plan and every transfer to it is acknowledged; Resume follows only when all parts are done
and is durable before it is sent; every order may be said again (by link, or after a restart) with the same epoch; former streams stay pinned until every
rebuilt rank is protected in the new epoch, and where sequences moved until all of those are delivered, or a bound has passed.
"""

from __future__ import annotations

import msgspec

from kvguard.core import settling, shards
from kvguard.core.known import Failure, Known, Round
from kvguard.core.membership import DEAD, MS
from kvguard.core.membership import Member as Place
from kvguard.format import moves
from kvguard.format.ledger import PLANNED, RESUMED, HistoryRecord, RecoveryRecord
from kvguard.format.messages import Done, Fence, RebuildOrder, Resume, Resumed, ResumeSequence
from kvguard.types import Clash, Epoch, Life, NodeId, Rank, SequenceId, StreamId, is_scheduler


def say_plan(known: Known, instance: str) -> None:
    """The plan to every linked node that hasn't heard it on its present link; an excluded node that is back must promise first, and is asked for nothing."""
    current = known.rounds[instance]
    record = current.record
    for node in known.linked():
        link = known.membership.nodes[node].link
        if current.asked.get(node) == link:
            continue
        current.asked[node] = link
        if node in record.excluded:
            known.tell_node(node, Fence(instance, record.epoch, record.lost, record.reason))
        for rebuild in record.order.rebuilds:
            if rebuild.node == node and rebuild.rank in current.ordered:
                current.ordered[rebuild.rank] = False
        known.tell_node(node, record.order)


def rank_done(current: Round, rank: Rank) -> Done | None:
    part = f"rank {rank}"
    return next((done for (_, name), done in current.dones.items() if name == part and not done.error), None)


def on_done(known: Known, node: NodeId, done: Done, start) -> None:
    """One part is carried out, or can't be: then a new round goes round what failed, once what is under way has arrived."""
    current = known.rounds.get(done.instance)
    if current is None or current.record.phase != PLANNED or done.epoch != current.record.epoch or done.node != node:
        known.note("stale_done", done.instance, f"{done.node}: {done.part} of epoch {done.epoch.counter} is waited for by nobody")
        return
    error = done.error or _what_is_missing(current.record, done)
    if not error:
        current.dones[node, done.part] = done
        advance(known, done.instance, start)
        return
    known.note("failed_part", done.instance, f"{node}: {done.part}: {error}", epoch=done.epoch.counter)
    reason = f"{done.part} failed on {node}: {error}"
    rebuilds = current.record.order.rebuilds
    failed = [rebuild for rebuild in rebuilds if done.part == f"rank {rebuild.rank}" and rebuild.node == node]
    clashes: tuple[Clash, ...] = ()
    if done.clashes:
        for rebuild in failed:
            current.ordered.pop(rebuild.rank, None)  # its standby was told of nothing
            clashes += _older(known, done, rebuild.rank)
    refused = () if done.clashes else tuple((rebuild.node, rebuild.standby) for rebuild in failed)
    survivors = tuple(rank for rank in _survivors(current.record) if done.part == f"rank {rank}" and not done.behind)
    excluded = (node,) if done.error and not done.part.startswith("rank ") else ()
    give_up(known, done.instance, Failure(survivors, reason, refused=refused, excluded=excluded, clashes=clashes), start)


def _older(known: Known, done: Done, rank: Rank) -> tuple[Clash, ...]:
    """Of two copies that can't stand in one pool the one of the rank's last life stays, whose sequences were served when it died, else of a mate's present one;
    of two older ones neither."""
    places = known.membership.members[done.instance]
    lives = [places[one].stream for one in (rank, *shards.mates(places, rank)) if one in places]
    named = {clash.stream for clash in done.clashes}
    kept = next((stream for stream in lives if stream in named), None)
    return tuple(clash for clash in done.clashes if clash.stream != kept)


def _what_is_missing(record: RecoveryRecord, done: Done) -> str:
    """Ids that were reported and are gone, to another life of the daemon or to a rank's last step: others would go on with what is planned from them."""
    if done.part != "holders":
        return ""
    given, order = {entry.sequence: len(entry.ids) // 4 for entry in done.known}, record.order
    short = sum(node == done.node and given.get(name, 0) < ids for name, ids, node in zip(order.sequences, order.ids, order.ids_node, strict=True))
    return f"it did not give all ids of {short} sequence{'s' * (short != 1)} that it had reported" if short else ""


def give_up(known: Known, instance: str, failure: Failure, start) -> None:
    """The plan can't be carried out whole."""
    settling.begin(known, known.rounds[instance], failure)
    advance(known, instance, start)


def _survivors(record: RecoveryRecord) -> dict[Rank, NodeId]:
    return {rank: member.node for text, member in record.members.items() if (rank := Rank.parse(text)) not in record.lost}


def parts(known: Known, record: RecoveryRecord) -> list[tuple[NodeId, str]]:
    """All that must be done before the instance resumes. A dead holder that nobody needs is not waited for."""
    nodes = known.membership.nodes
    needed = dict.fromkeys((*record.order.ids_node, *(rebuild.node for rebuild in record.order.rebuilds), *(holder for holder, *_ in record.order.transfers)))
    wanted = [(node, "holders") for node in dict.fromkeys((*nodes, *needed)) if node not in record.excluded and (node in needed or nodes[node].state != DEAD)]
    wanted += [(node, f"rank {rank}") for rank, node in _survivors(record).items()]
    wanted += [(holder, f"transfer {stream}") for holder, _, _, stream in record.order.transfers]
    return wanted + [(rebuild.node, f"rank {rebuild.rank}") for rebuild in record.order.rebuilds]


def advance(known: Known, instance: str, start) -> None:
    current = known.rounds[instance]
    record = current.record
    if record.phase == RESUMED:
        _unpin(known, instance)
        return
    if current.settling is not None:
        _settle(known, instance, start)
        return
    missing = [part for part in parts(known, record) if part not in current.dones]
    if not missing:
        _resume(known, instance)
        return
    nodes = known.membership.nodes
    dead = [(node, part) for node, part in missing if node in nodes and nodes[node].state == DEAD]
    if dead:
        give_up(known, instance, Failure((), f"{dead[0][0]} died before {dead[0][1]} was done: {nodes[dead[0][0]].reason}"), start)
        return
    _order_rebuilds(known, current, record.order.rebuilds)
    more = f" and {len(missing) - 4} more" if len(missing) > 4 else ""
    current.waiting = "waiting for " + ", ".join(f"{node}: {part}" for node, part in missing[:4]) + more
    if known.fair_ns - current.since_ns >= known.settings.restore_ns:
        slow = [rebuild for rebuild in record.order.rebuilds if current.ordered.get(rebuild.rank) and (rebuild.node, f"rank {rebuild.rank}") in missing]
        refused = tuple((rebuild.node, rebuild.standby) for rebuild in slow)
        late = tuple(node for node, part in missing if part.startswith("transfer "))
        survivors = tuple(rank for rank, node in _survivors(record).items() if (node, f"rank {rank}") in missing)
        start(known, instance, survivors, f"not done within {known.settings.restore_ns // MS} ms: {current.waiting}", refused=refused, excluded=late)


def _settle(known: Known, instance: str, start) -> None:
    """The next round begins when nobody is waited for any more."""
    current = known.rounds[instance]
    left = settling.under_way(known, current)
    if left:
        _order_rebuilds(known, current, left)  # again, where a node is linked anew
        ranks = ", ".join(f"{rebuild.node}: rank {rebuild.rank}" for rebuild in left)
        current.waiting = f"waiting for {ranks}, then begins again: {current.settling.failure.reason}"
        return
    start(known, instance, *current.settling.failure)


def _order_rebuilds(known: Known, current: Round, rebuilds) -> None:
    """A rank is given away once its target has carried the plan and has everything."""
    record = current.record
    for rebuild in rebuilds:
        pushes = [(holder, f"transfer {stream}") for holder, target, _, stream in record.order.transfers if target == rebuild.node]
        ready = all(part in current.dones for part in ((rebuild.node, "holders"), *pushes))
        open_ = not current.ordered.get(rebuild.rank) and (rebuild.node, f"rank {rebuild.rank}") not in current.dones
        if ready and open_ and known.tell_node(rebuild.node, RebuildOrder(record.instance, record.epoch, rebuild)):
            current.ordered[rebuild.rank] = True


def move_in(known: Known, current: Round, ranks) -> None:
    """Rebuilt ranks live where their Done came from."""
    record = current.record
    standbys = {rebuild.rank: rebuild for rebuild in record.order.rebuilds}
    for rank in ranks:
        done, rebuild = rank_done(current, rank), standbys[rank]
        places = known.membership.members[record.instance]
        old, stream = places.get(rank), done.stream
        if stream is None:
            stream = next((source.stream for source in rebuild.sources if source.kind == "pool"), None) or (old.stream if old else None)
        place = places[rank] = Place(rebuild.node, stream, rebuild.standby, done.endpoint)
        if old is not None:
            place.holders = tuple(node for node in old.holders if node != rebuild.node)
            place.former, place.fingerprint = old.former, old.fingerprint
        known.assigned.pop((record.instance, rank), None)
        known.keep_member(record.instance, rank)


def _resume(known: Known, instance: str) -> None:
    current = known.rounds[instance]
    record, order = current.record, current.record.order
    move_in(known, current, [rebuild.rank for rebuild in order.rebuilds])
    ids = {(node, entry.sequence): entry for (node, part), done in current.dones.items() if part == "holders" for entry in done.known}
    sequences, recomputed = [], 0
    proofs, places = _proofs(record), order.places or ((),) * len(order.sequences)
    columns = zip(order.sequences, order.positions, order.rungs, order.ids_node, places, strict=True)
    for sequence, position, rung, node, there in columns:
        entry = ids[node, sequence]
        sequences.append(ResumeSequence(sequence, position, rung, entry, there, proofs.get(sequence, b"")))
        recomputed += max(0, len(entry.ids) // 4 - 1 - position)
    moved: dict[str, int] = {}
    for done in current.dones.values():
        for rung, count in done.bytes_by_rung.items():
            moved[rung] = moved.get(rung, 0) + count
    timing = {**record.timing_ms, "restore": (known.now_ns - current.mark_ns) / MS}
    timing["total"] = sum(timing.values())
    _end_moved(known, record)
    resume = Resume(instance, record.epoch, known.directory(instance), tuple(sequences), timing, moved, moved=bool(order.moved))
    record = msgspec.structs.replace(record, phase=RESUMED, timing_ms=timing, order=order if order.moved else None)
    targets = {str(rebuild.rank): rebuild.node for rebuild in order.rebuilds}
    known.keep_history(HistoryRecord(
        instance, record.epoch, record.reason, record.lost, targets, timing, dict(zip(order.sequences, order.positions, strict=True)),
        dict(zip(order.sequences, order.rungs, strict=True)), dict(record.lost_sequences), moved, record.attempt, verdict_ns=record.verdict_ns,
        recomputed=recomputed, moved=len(proofs), ended=record.former if order.moved else (),
    ))  # fmt: skip
    _keep_resume(known, instance, resume)
    known.keep_round(instance, record)
    known.membership.recovering.pop(instance, None)
    current.asked, current.waiting, current.changed, current.since_ns = {}, "", True, known.fair_ns
    _say_resume(known, instance, resume)
    say_resumed(known, instance)
    figures = {"sequences": len(sequences), "lost": len(record.lost_sequences), "total_ms": round(timing["total"], 3)}
    known.note("resumed", instance, record.reason, epoch=record.epoch.counter, **figures)


def _proofs(record: RecoveryRecord) -> dict[SequenceId, bytes]:
    """Of the sequences that move: those of the dps that end."""
    order, dps = record.order, dict.fromkeys(rank.dp for rank in record.order.moved)
    return {
        sequence: moves.prove(order.secret, order.instance, sequence, order.epoch, position)
        for sequence, position, stream in zip(order.sequences, order.positions, order.ids_stream, strict=True) if stream.rank.dp in dps
    }  # fmt: skip


def _end_moved(known: Known, record: RecoveryRecord) -> None:
    """Ranks whose sequences went elsewhere are nobody's any more: whoever attaches as one of them later begins empty."""
    for rank in record.order.moved:
        known.membership.members.get(record.instance, {}).pop(rank, None)
        known.assigned.pop((record.instance, rank), None)
        known.keep_member(record.instance, rank)


def _moved(record: RecoveryRecord) -> tuple[Life, ...]:
    births = record.order.births_by_name()
    return tuple(Life(name, births.get(name, 0)) for name in _proofs(record))


def away(known: Known, instance: str) -> tuple[Life, ...]:
    """Sequences that are elsewhere by now: what is left of them here is nothing that a plan may bring back. Not those whose Resume nobody has adopted."""
    current = known.rounds.get(instance)
    if current is None:
        return ()
    lives = current.record.away_lives()
    if current.record.phase == RESUMED and current.record.order is not None and instance not in known.resumes:
        lives += _moved(current.record)
    return tuple(dict.fromkeys(life for life in lives if not known.is_delivered(instance, life)))


def _keep_resume(known: Known, instance: str, resume: Resume) -> None:
    """Durable until adopted; an instance that never had an emitter has nobody to keep it for."""
    if instance in known.emitters:
        known.resumes[instance] = resume
        known.persist(f"resume/{instance}", resume)


def _say_resume(known: Known, instance: str, resume: Resume) -> None:
    known.unheard.pop(instance, None)
    if not known.tell_emitter(instance, resume) and instance in known.resumes:
        known.unheard[instance] = True


def word(known: Known, instance: str, unpinned: tuple[StreamId, ...] = (), ended: tuple[StreamId, ...] = ()) -> Resumed:
    """That the instance runs; and whether what moved from it is still kept."""
    current = known.rounds.get(instance)
    kept = current is not None and current.record.phase == RESUMED and current.record.order is not None
    return Resumed(instance, known.epoch(instance), unpinned, ended, kept)


def say_resumed(known: Known, instance: str, again: bool = False) -> None:
    """To every node that hasn't heard it on its present link. `again`: with the plan before it, where it is still needed to answer fetches."""
    current = known.rounds[instance]
    for node in known.linked():
        link = known.membership.nodes[node].link
        if current.asked.get(node) != link:
            current.asked[node] = link
            if again and current.record.order is not None:
                known.tell_node(node, current.record.order)
            known.tell_node(node, word(known, instance))


def _unpin_moved(known: Known, instance: str) -> None:
    """Once all that moved is delivered; at the latest when the bound has passed, counted."""
    current = known.rounds[instance]
    if current.undelivered is None:
        current.undelivered = {life.sequence: life.birth for life in _moved(current.record) if not known.is_delivered(instance, life)}
    left = len(current.undelivered)
    if left and known.fair_ns - current.since_ns < known.settings.moved_ns:
        return
    record = current.record
    for node in known.linked():
        known.tell_node(node, Resumed(instance, record.epoch, record.former))
    why = f"{left} undelivered after {known.settings.moved_ns // MS} ms" if left else "all that moved is delivered"
    known.note("moved_undelivered" if left else "unpinned", instance, f"{_count(record.former)} may go: {why}", epoch=record.epoch.counter, sequences=left)
    known.keep_round(instance, None)


def _unpin(known: Known, instance: str) -> None:
    if known.rounds[instance].record.order is not None:
        _unpin_moved(known, instance)
        return
    record, places = known.rounds[instance].record, known.membership.members.get(instance, {})
    for rank in dict.fromkeys((*record.lost, *(mate for rank in record.lost for mate in shards.mates(places, rank)))) if record.former else ():
        if not _is_protected(known, instance, places.get(rank), record.epoch.counter):
            return
    if record.former:
        for node in known.linked():
            known.tell_node(node, Resumed(instance, record.epoch, record.former))
        known.note("unpinned", instance, f"{_count(record.former)} of former lives may go: the rebuilt ranks are protected", epoch=record.epoch.counter)
    known.keep_round(instance, None)


def _is_protected(known: Known, instance: str, place: Place | None, least_epoch: int) -> bool:
    """By its own node's word, in this epoch or a later one, as the life that it is now."""
    beat, session = place.beat if place is not None else None, known.membership.sessions.get(instance)
    if beat is None or place.lost or beat.stream != place.stream or beat.state != "protected" or beat.epoch.counter < least_epoch:
        return False
    # a pool whose table nobody has looked at yet has nothing unprotected, and nothing protected either
    return bool(beat.acked) or not (known.sequences(instance) or (session is not None and session.scheduled > 0))


def sweep(known: Known, node: NodeId, held: tuple[StreamId, ...]) -> None:
    """Replicas on `node` that nobody will ask for again: it was away when they were let go, or another recovery began before they could be."""
    for key in [key for key in known.unlisted if key[0] == node and key[1] not in held]:
        del known.unlisted[key]
    for instance in dict.fromkeys(stream.instance for stream in held):
        if instance in known.rounds or instance in known.failed or instance in known.held:
            continue
        gone = tuple(stream for stream in held if stream.instance == instance and _is_left_behind(known, node, stream))
        if gone and known.tell_node(node, word(known, instance, gone)):
            known.note("unpinned", instance, f"{_count(gone)} on {node} may go: the ranks are protected without", epoch=known.epoch(instance).counter)


def _is_left_behind(known: Known, node: NodeId, stream: StreamId) -> bool:
    """A former life of a rank that is protected again, or its present life where it protects nothing: at a former holder, or beside its own pool.

    Beside the pool it lies where a replica was sent back to the pool's node, for a rebuild that then adopted the pool after all.
    """
    if is_scheduler(stream.rank):
        return _is_unlisted(known, node, stream)
    place = known.membership.members.get(stream.instance, {}).get(stream.rank)
    if place is None:
        return is_ended(known, stream)  # and its round is over: nobody fetches from it any more
    places, epoch = known.membership.members[stream.instance], known.epoch(stream.instance)
    sharing = [place, *(places[mate] for mate in shards.mates(places, stream.rank))]  # of theirs it may be the last copy, too
    if place.beat is None or place.beat.epoch != epoch or not all(_is_protected(known, stream.instance, one, epoch.counter) for one in sharing):
        return False
    if stream != place.stream or node == place.node or node not in (*place.holders, *place.former, *place.beat.holders):
        return True
    return place.beat.as_rank is not None and place.beat.as_rank == known.copiers.get(stream.instance, {}).get(stream.rank)


def is_ended(known: Known, stream: StreamId, epoch: Epoch | None = None) -> bool:
    """Whether it is a life that ended because its sequences moved elsewhere.

    One that lives, in `epoch`, ended with every such plan of its dp since, known to it or not (its node was away); not where it had nothing and took up the
    newer epoch.
    """
    for record in known.history:
        if record.instance == stream.instance and record.ended:
            theirs = any(rank.dp == stream.rank.dp for rank in record.ranks)
            if stream in record.ended if epoch is None else theirs and epoch.counter < record.epoch.counter:
                return True
    return False


def _is_unlisted(known: Known, node: NodeId, stream: StreamId) -> bool:
    """A scheduler's table that no living node has had mapped for a while: its daemon's restart takes less."""
    nodes = known.membership.nodes.values()
    if any(beat.stream == stream for other in nodes if other.state != DEAD for beat in other.schedulers):
        known.unlisted.pop((node, stream), None)
        return False
    since = known.unlisted.setdefault((node, stream), known.fair_ns)
    if known.fair_ns - since < known.settings.replace_ns:
        return False
    del known.unlisted[node, stream]
    return True


def _count(streams: tuple) -> str:
    return f"{len(streams)} stream{'s' * (len(streams) != 1)}"


def fail(known: Known, instance: str, error: str) -> None:
    """The explicit end of a recovery that could not be: everyone who waits is told why."""
    current = known.rounds[instance]
    record = current.record
    timing = {**record.timing_ms, "total": sum(record.timing_ms.values()) + (known.now_ns - current.mark_ns) / MS}
    lost = dict(record.lost_sequences)
    entry = HistoryRecord(instance, record.epoch, record.reason, record.lost, {}, timing, {}, {}, lost, {}, record.attempt, error, record.verdict_ns)
    known.keep_history(entry)
    resume = Resume(instance, record.epoch, known.directory(instance), (), timing, {}, error)
    _keep_resume(known, instance, resume)
    for rank in record.lost:
        known.keep_member(instance, rank)
    known.keep_round(instance, None)
    known.membership.recovering.pop(instance, None)
    known.failed[instance] = error
    _say_resume(known, instance, resume)
    known.note("failed", instance, error, epoch=record.epoch.counter)
