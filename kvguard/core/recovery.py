"""plan(): what all nodes report about an instance -> the order that brings it back, which explains itself. A pure function over columns.

Knows: holdings with lineage, who is lost, which standbys are there, forks that former plans decided.
Must not know: messages' way, time, how a plan is carried out.
Invariants (I1): a sequence's position is never beyond what each survivor's live pool and each lost rank's chosen source has of the authoritative lineage,
and leaves an id that somebody knows to compute; of copies of another sequence that bore the name (births) nothing counts; a sequence whose ids nobody knows is
lost and named; every sequence planned has an explanation; the same reports in the same order give the same plan. A rank that is called a survivor but reports
no live pool is lost. Where ranks can't be rebuilt and the emitter moves, every rank of their dp ends, and its sequences go on elsewhere (moving.py).
"""

from __future__ import annotations

from typing import NamedTuple

from msgspec.structs import replace

from kvguard.core import ladder, moving
from kvguard.core.columns import Copy, Longest, align, authoritative, births, estrange, highest, lowest, newest_lives, not_over, table, valid, without_clashes
from kvguard.core.shards import are_mates
from kvguard.format.lineage import forked
from kvguard.format.messages import Holding, PlanOrder, Rebuild, Report, StandbyBeat
from kvguard.limits import FORKS_MAX
from kvguard.types import Clash, Epoch, Fork, Lineage, NodeId, Places, Rank, Rung, SequenceId, StreamId, scheduler_of

Ints = tuple[int, ...]


class Situation(NamedTuple):
    """All that a plan depends on.

    `members`: every rank of the instance and its node. `lost`: which of them. `reports`: one per node that answered.
    `standbys`: not yet claimed, fitting or not. `forks`, `births`: lineages that former plans decided, and of which life of the name, by sequence.
    `excluded`: nodes whose copies don't count. `over`: what is known to be delivered, births by name. `emitter_lives`: the emitter knows ids that were never
    replicated. `moves`: it can submit sequences elsewhere, and needn't wait for a standby; `hosts`: to whom. `wishes`: which seats operators want.
    `clashes`: copies that can't stand in one pool with others beyond a position, as earlier rounds found when they were side by side.
    `prints`: ranks' fingerprints as far as they are known: of a lost one what is held of its mates (shards.py) is as good as what is held of it.
    `stuck`: replicas by holder that could not be brought elsewhere in an earlier round: they serve where they lie, or two of them would take turns to fail.
    """

    instance: str
    epoch: Epoch
    members: dict[Rank, NodeId]
    lost: tuple[Rank, ...]
    reports: tuple[Report, ...]
    standbys: tuple[tuple[NodeId, StandbyBeat], ...] = ()
    addresses: dict[NodeId, str] = {}
    forks: dict[SequenceId, Lineage] = {}
    excluded: tuple[NodeId, ...] = ()
    over: dict[SequenceId, Ints] = {}
    emitter_lives: bool = False
    moves: bool = False
    hosts: tuple[moving.Host, ...] = ()
    wishes: ladder.Wishes = ladder.Wishes()
    births: dict[SequenceId, int] = {}
    clashes: tuple[Clash, ...] = ()
    prints: dict[Rank, int] = {}
    stuck: tuple[tuple[NodeId, StreamId], ...] = ()


class Plan(NamedTuple):
    """`lost`: sequences that can't go on, with the reason.

    `former`: streams of lost ranks that the plan leaves behind, pinned until the new ones are protected.
    `strange`: copies that bear a planned sequence's name and are another's: holders drop them, survivors release them.
    """

    order: PlanOrder
    lost_ranks: tuple[Rank, ...]
    lost: tuple[tuple[SequenceId, str], ...]
    former: tuple[StreamId, ...]
    strange: tuple[tuple[NodeId, StreamId, SequenceId], ...] = ()


class Unplannable(NamedTuple):
    """No plan now. It may be possible when a standby appears."""

    reasons: tuple[str, ...]


class _Group(NamedTuple):
    """The ranks of one dp: a sequence lives in one group only."""

    base: tuple[SequenceId, ...]
    lineages: tuple[Lineage, ...]
    survivors: list[Copy]
    caps: Ints  # what survivors and ids allow
    written: list[Ints]  # every copy's valid positions
    ids: Longest
    needs: list[ladder.Need]
    reaches: list[Ints]
    births: Ints
    strange: tuple[tuple[NodeId, StreamId, SequenceId], ...]
    remarks: dict[SequenceId, str]  # what their explanations say besides


def plan(situation: Situation) -> Plan | Unplannable:
    """The order for `situation`, or why there is none. Raises nothing for any reports that passed the decoder."""
    held = [(report.node, holding) for report in situation.reports if report.node not in situation.excluded for holding in report.holdings]
    held = newest_lives([(node, holding) for node, holding in held if holding.stream.instance == situation.instance])
    held = without_clashes(not_over(held, situation.over, situation.emitter_lives), situation.clashes)
    live = _live_pools(situation, held)
    lost = tuple(sorted(rank for rank in situation.members if rank not in live))
    if not situation.members:
        return Unplannable((f"{situation.instance}: no rank is known",))
    groups = [_group(situation, dp, held, live, lost) for dp in sorted({rank.dp for rank in situation.members})]
    needs = [need for group in groups for need in group.needs]
    wishes = {need.rank: ladder.seats(need, situation.standbys, situation.wishes) for need in sorted(needs, key=_pool_first)}
    seats = ladder.assign(wishes)
    missing = tuple(_without_seat(need.rank, wishes[need.rank], situation.standbys) for need in needs if need.rank not in seats)
    if missing:
        return _moved(situation, held, lost) if situation.moves else Unplannable(missing)
    return _compose(situation, groups, seats, lost, held, tuple(live[rank][1].stream for rank in sorted(live)))


def _pool_first(need: ladder.Need) -> tuple:
    return (not any(offer.copy.kind == "pool" for offer in need.offers), need.rank)


def _without_seat(rank: Rank, wishes: list, standbys: tuple) -> str:
    if wishes:
        return f"rank {rank}: its {len(wishes)} fitting standbys are taken by other lost ranks"
    return f"rank {rank}: no standby fits" + (f" ({len(standbys)} are there, of other shapes)" if standbys else " (none is there)")


def _live_pools(situation: Situation, held: list[tuple[NodeId, Holding]]) -> dict[Rank, tuple[NodeId, Holding]]:
    """The survivors' pools: on the member's node where two claim the same rank."""
    live: dict[Rank, tuple[NodeId, Holding]] = {}
    for node, holding in held:
        rank = holding.stream.rank
        if holding.kind == "pool" and holding.alive and rank in situation.members and rank not in situation.lost and situation.members[rank] == node:
            live.setdefault(rank, (node, holding))
    return live


def _group(situation: Situation, dp: int, held: list, live: dict, lost: tuple[Rank, ...]) -> _Group:
    pools = [live[rank] for rank in sorted(live) if rank.dp == dp]
    mine = [rank for rank in lost if rank.dp == dp]
    left = [(node, holding) for node, holding in held if any(_is_of(situation, holding, rank) for rank in mine)]
    of_lost = [(node, holding) for node, holding in left if holding.kind != "pool" or not holding.alive]
    beside = [(node, holding) for node, holding in held if holding.stream.rank == scheduler_of(dp)]
    base, aligned = table([*pools, *of_lost, *beside])
    survivors, copies, leads = aligned[: len(pools)], aligned[len(pools) : len(aligned) - len(beside)], aligned[len(aligned) - len(beside) :]
    lineages = authoritative(base, survivors + copies, situation.forks)
    if leads and () in lineages:  # what no rank has begun, its scheduler knows
        lineages = tuple([known or own for known, own in zip(lineages, authoritative(base, leads, {}), strict=True)])
    born = _births(situation, base, lineages, survivors + copies, leads)
    solid = [valid(copy.positions, copy, lineages) for copy in survivors]
    fragile = [valid(copy.positions, copy, lineages) for copy in copies]
    ids = _known_ids(base, lineages, born, [*survivors, *_replicas_first(copies), *_replicas_first(leads)], held, live, dp)
    # The input that comes next must be known: by the emitter, or it is the last of the ids, whose position is then computed once more.
    inputs = tuple(ids.counts) if situation.emitter_lives else tuple([count - 1 if count else 0 for count in ids.counts])
    caps = lowest([*solid, inputs])
    of = {rank: [(p, copy) for p, copy in zip(fragile, copies, strict=True) if _is_of(situation, copy, rank)] for rank in mine}
    reaches = [highest([*(positions for positions, _ in of[rank]), (0,) * len(base)]) for rank in mine]
    within = lowest([caps, *reaches])
    pools_at = [(report.node, stream) for report in situation.reports for stream in report.pending]  # of those that die nothing else is told yet
    pools_at += [(node, holding.stream) for node, holding in held if holding.kind == "pool"]
    needs, stay = [], dict.fromkeys((*pools_at, *situation.stuck))
    for rank in mine:
        offers = []
        for positions, copy in of[rank]:
            capped = lowest([positions, within])
            offers.append(ladder.Offer(copy, capped, sum(capped), copy.kind == "pool" or (copy.node, copy.stream) in stay))
        needs.append(ladder.Need(rank, situation.members[rank], tuple(offers)))
    strange = tuple((copy.node, copy.stream, base[i]) for copy in aligned for i in copy.strange)
    remarks = {sequence: f"; of another sequence that bore this name is what {node} has of {stream.rank}" for node, stream, sequence in strange}
    for stream, sequence, position in situation.clashes:
        remarks[sequence] = f"{remarks.get(sequence, '')}; from {position} on another sequence had its blocks in another life of {stream.rank}"
    return _Group(base, lineages, survivors, caps, [*solid, *fragile], ids, needs, reaches, born, strange, remarks)


def _is_of(situation: Situation, held: Holding | Copy, rank: Rank) -> bool:
    """Whether a lost rank can come back from this: from what is held of it, or from a replica of a mate, lost or not."""
    theirs, known = held.stream.rank, situation.prints.get(rank, 0)
    return theirs == rank or (held.kind == "replica" and are_mates(theirs, rank, held.fingerprint, known))


def _births(situation: Situation, base: tuple[SequenceId, ...], lineages: tuple[Lineage, ...], copies: list[Copy], leads: list[Copy]) -> Ints:
    """The authoritative births; every copy is marked. A scheduler counts where no rank says: its lineages are its own."""
    forks, known = situation.forks, situation.births
    decided = [known.get(name, 0) if name in forks and lineage is forks[name] else 0 for name, lineage in zip(base, lineages, strict=True)] if known else []
    born = births(copies, lineages, tuple(decided))
    for lead in leads:
        born = tuple([a or b for a, b in zip(born, lead.births, strict=True)]) if born and lead.births else born or lead.births
    estrange([*copies, *leads], born)
    return born


def _replicas_first(copies: list[Copy]) -> list[Copy]:
    return [*(copy for copy in copies if copy.kind == "replica"), *(copy for copy in copies if copy.kind == "pool")]


def _known_ids(base, lineages, born: Ints, copies: list[Copy], held: list, live: dict, dp: int) -> Longest:
    """Where the longest valid ids are: live pools first, replicas before dead pools, schedulers' last; replicas of survivors only where nothing else knows any.

    A scheduler's stream counts ids that it accepted before any rank had them.
    """
    longest = Longest(len(base))
    for copy in copies:
        longest.offer(valid(copy.ids, copy, lineages), copy.node, copy.stream)
    if 0 in longest.counts:
        for node, holding in held:
            if holding.kind == "replica" and holding.stream.rank in live and holding.stream.rank.dp == dp:
                copy = align(base, node, holding)
                estrange([copy], born)
                longest.offer(valid(copy.ids, copy, lineages), node, holding.stream)
    return longest


def _compose(situation: Situation, groups: list[_Group], seats: dict, lost: tuple[Rank, ...], held: list, survivors: tuple[StreamId, ...]) -> Plan:
    """The groups' columns one after the other, and the rebuilds' sources stretched over all of them."""
    parts, gone, rebuilds, transfers, seen = [], [], [], [], {}
    kept_of = []
    for group in groups:
        choices = [ladder.choose(need, seats[need.rank], len(group.base)) for need in group.needs]
        positions = lowest([group.caps, *(choice.positions for choice in choices)])
        kept = _kept(group, seen, gone)
        parts.append(_columns(situation.epoch, group, choices, positions, kept))
        kept_of.append((kept, choices, positions))
    total = sum(len(kept) for kept, _, _ in kept_of)
    offset = 0
    for kept, choices, positions in kept_of:
        for choice in choices:
            mine = tuple([choice.source[i] if positions[i] else -1 for i in kept])
            source = (-1,) * offset + mine + (-1,) * (total - offset - len(kept))
            rebuilds.append(Rebuild(choice.rank, choice.node, choice.standby, choice.sources, source))
            used = dict.fromkeys(mine)
            pushes = [(entry.node, entry.stream) for at, entry in enumerate(choice.sources) if at in used]
            address = situation.addresses.get(choice.node, "")
            transfers += [(node, choice.node, address, stream) for node, stream in choice.transfers if (node, stream) in pushes]
        offset += len(kept)
    columns = [tuple(entry for part in parts for entry in part[k]) for k in range(9)] if len(parts) != 1 else parts[0]
    transfers = dict.fromkeys(transfers)  # one that serves two ranks of a node goes there once
    order = PlanOrder(situation.instance, situation.epoch, *columns[:7], tuple(rebuilds), tuple(transfers), columns[7], survivors, births=columns[8])
    adopted = {source.stream for rebuild in rebuilds for source in rebuild.sources if source.kind == "pool"}
    former = dict.fromkeys(holding.stream for _, holding in held if holding.stream.rank in lost and holding.stream not in adopted)
    return Plan(order, lost, tuple(gone), tuple(former), tuple(one for group in groups for one in group.strange))


def _kept(group: _Group, seen: dict, gone: list[tuple[SequenceId, str]]) -> list[int]:
    """Which of the group's sequences go on; those whose ids nobody knows are told in `gone`."""
    kept = [i for i, sequence in enumerate(group.base) if group.ids.counts[i] and sequence not in seen]
    for i, sequence in enumerate(group.base):
        if not group.ids.counts[i] and sequence not in seen:
            written = max((column[i] for column in group.written), default=0)
            gone.append((sequence, f"nobody knows its token ids; {written} positions of KV without them are worth nothing"))
    seen.update(dict.fromkeys(group.base))
    return kept


def _moved(situation: Situation, held: list[tuple[NodeId, Holding]], lost: tuple[Rank, ...]) -> Plan:
    """No rank is rebuilt. Those that live beside a lost one are ended, so that their pools count as a dead process's do; other dps go on."""
    dps = dict.fromkeys(rank.dp for rank in lost)
    ending = tuple(sorted(rank for rank in situation.members if rank.dp in dps))
    ended = [rank for rank in ending if rank not in lost]
    held = [
        (node, replace(holding, alive=False) if holding.stream.rank in ended and situation.members[holding.stream.rank] == node else holding)
        for node, holding in held
    ]
    situation = situation._replace(lost=ending)
    live = _live_pools(situation, held)
    parts, gone, seen, transfers, strange = [], [], {}, [], []
    places: tuple[Places, ...] = ()
    for dp in sorted({rank.dp for rank in situation.members}):
        group = _group(situation, dp, held, live, ending)
        kept = _kept(group, seen, gone)
        strange += group.strange
        if not group.needs:
            parts.append(_columns(situation.epoch, group, [], group.caps, kept))
            places += ((),) * len(kept)
            continue
        spread = moving.spread(group.needs, situation.hosts, len(group.base))
        parts.append(_rows(situation.epoch, group, spread.positions, spread.rungs, [spread.explanations[i] for i in kept], kept))
        places += tuple([spread.places[i] for i in kept])
        transfers += [(holder, target, situation.addresses.get(target, ""), stream) for holder, target, stream in spread.transfers]
    columns = [tuple(entry for part in parts for entry in part[k]) for k in range(9)]
    survivors = tuple(live[rank][1].stream for rank in sorted(live))
    order = PlanOrder(
        situation.instance, situation.epoch, *columns[:7], (), tuple(dict.fromkeys(transfers)), columns[7], survivors, ending, places, births=columns[8],
    )  # fmt: skip
    former = dict.fromkeys(holding.stream for _, holding in held if holding.stream.rank in ending)
    return Plan(order, ending, tuple(gone), tuple(former), tuple(strange))


def _columns(epoch: Epoch, group: _Group, choices: list[ladder.Choice], positions: Ints, kept: list[int]) -> tuple:
    """sequences, positions, rungs, lineages, ids, ids_node, ids_stream, explanations, births of the sequences at indices `kept`."""
    moved = Rung.worst([Rung.POOL if choice.kind == "pool" else Rung.REPLICA for choice in choices])
    rungs = [moved] * len(positions)
    if 0 in positions:
        for i, position in enumerate(positions):
            if not position:
                rungs[i] = Rung.TOKENS if any(column[i] for column in group.written) else Rung.POOL
    return _rows(epoch, group, positions, rungs, _explanations(group, choices, positions, rungs, kept), kept)


def _rows(epoch: Epoch, group: _Group, positions: Ints, rungs, explanations, kept: list[int]) -> tuple:
    lineages = [_fork(group.lineages[i], epoch.counter, positions[i]) for i in kept]
    where = [group.ids.where[i] for i in kept]
    if group.remarks:
        explanations = [text + group.remarks.get(group.base[i], "") for text, i in zip(explanations, kept, strict=True)]
    return (
        tuple([group.base[i] for i in kept]), tuple([positions[i] for i in kept]), tuple([rungs[i] for i in kept]), tuple(lineages),
        tuple([group.ids.counts[i] for i in kept]), tuple([place[0] for place in where]), tuple([place[1] for place in where]),
        tuple(explanations), tuple([group.births[i] for i in kept]) if group.births else (0,) * len(kept),
    )  # fmt: skip


def _fork(lineage: Lineage, epoch: int, position: int) -> Lineage:
    """format.lineage.forked, its common case first: nothing of the lineage vanishes."""
    if lineage and position > lineage[-1].start and epoch > lineage[-1].epoch and len(lineage) < FORKS_MAX:
        return (*lineage, Fork(epoch, position))
    return forked(lineage, epoch, position)


def _explanations(group: _Group, choices: list[ladder.Choice], positions: Ints, rungs: list[str], kept: list[int]) -> tuple[str, ...]:
    """One sentence per distinct case (rung, what limited, each choice's source), shared by its sequences."""
    limits = [0] * len(positions)  # 0 survivors or ids, k + 1 lost rank k
    for k, have in enumerate(group.reaches):
        limits = [old or (k + 1 if most < cap and most == at else 0) for old, most, cap, at in zip(limits, have, group.caps, positions, strict=True)]
    cases = list(zip(rungs, limits, map(bool, positions), *(choice.source for choice in choices), strict=True))
    told = {case: _sentence(group, choices, case[0], case[1], case[3:], case[2]) for case in dict.fromkeys(cases)}
    texts = list(map(told.__getitem__, cases))
    return tuple(texts) if len(kept) == len(texts) else tuple([texts[i] for i in kept])


def _sentence(group: _Group, choices: list[ladder.Choice], rung: str, limit: int, source: Ints, some: bool) -> str:
    if not some and rung == Rung.POOL:
        return "nothing was written yet: starts at its first token"
    came = []
    for choice, at in zip(choices, source, strict=True):
        if not some or at < 0:
            came.append(f"{choice.rank} on {choice.node} starts empty")
            continue
        entry = choice.sources[at]
        whose = "" if entry.stream.rank == choice.rank else f"of {entry.stream.rank}, whose bytes are the same, "
        way = f"pulls the replica {whose}{'on' if entry.node == choice.node else 'sent from'} {entry.node}"
        if entry.kind == "pool":
            way = "adopts the pool of its dead process"
        came.append(f"{choice.rank} on {choice.node} {way}")
    if not choices:
        came.append("no rank is lost: live pools go on")
    if limit:
        choice = choices[limit - 1]
        why = f"limited by what {'is left' if choice.kind != 'pool' else 'had been written'} of {choice.rank}"
    else:
        why = "limited by the survivors' committed positions and the ids known" if group.survivors else "limited by the ids known"
    return f"{rung}: {'; '.join(came)}; {why}"
