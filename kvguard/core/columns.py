"""Holdings side by side: the same sequences in the same order, one tuple per fact.

Knows: reports' columns, lineage and births. Must not know: ranks' roles, standbys, plans.
Invariants: a column has one entry per sequence of the table; what a holding doesn't list is (position 0, no lineage, no ids); a position that is handed out
is never beyond the fork that parts its copy from the authoritative lineage, and 0 for a copy of another sequence that bore the name; nor is it where blocks
were found to be another copy's, too. Work is per column, in C
where columns agree: 10,000 sequences times 16 ranks.
"""

from __future__ import annotations

from operator import itemgetter

from msgspec import structs

from kvguard.format.lineage import agreed, is_one_of, is_other
from kvguard.format.messages import Holding
from kvguard.types import Clash, Lineage, NodeId, SequenceId, StreamId

Ints = tuple[int, ...]


def newest_lives(held: list[tuple[NodeId, Holding]]) -> list[tuple[NodeId, Holding]]:
    """The same holdings, without copies whose generation an other copy of the same stream has left behind.

    Within one stream a generation names one life of a sequence since its last truncation: a holder that was cut off meanwhile may have more positions of
    an older one, or of another sequence of the same name, and its lineage can't tell. What is dropped here is computed again at worst.
    """
    together: dict[StreamId, list[Holding]] = {}
    for _, holding in held:
        together.setdefault(holding.stream, []).append(holding)
    newest: dict[StreamId, dict[SequenceId, int]] = {}
    for stream, holdings in together.items():
        first = holdings[0]
        if any((other.sequences, other.generations) != (first.sequences, first.generations) for other in holdings[1:]):
            best = newest[stream] = {}
            for holding in holdings:
                for sequence, generation in zip(holding.sequences, holding.generations, strict=True):
                    if generation > best.get(sequence, -1):
                        best[sequence] = generation
    return [(node, _of_lives(holding, newest[holding.stream]) if holding.stream in newest else holding) for node, holding in held]


def _of_lives(holding: Holding, newest: dict[SequenceId, int]) -> Holding:
    pairs = zip(holding.sequences, holding.generations, strict=True)
    return _picked(holding, [i for i, (sequence, generation) in enumerate(pairs) if generation >= newest[sequence]])


def not_over(held: list[tuple[NodeId, Holding]], over: dict[SequenceId, Ints], sure: bool) -> list[tuple[NodeId, Holding]]:
    """The same holdings, without copies of sequences that are over (their births, by name; 0: whatever bore it): they say nothing of what bears the name
    by now.

    `sure`: without those only that are known to be such a life. Else a copy of unknown birth goes, too.
    """
    return [(node, holding if over.keys().isdisjoint(holding.sequences) else _not_over(holding, over, sure)) for node, holding in held] if over else held


def _not_over(holding: Holding, over: dict[SequenceId, Ints], sure: bool) -> Holding:
    def goes(birth: int, ended: Ints) -> bool:
        return birth in ended or 0 in ended if sure else is_one_of(birth, ended)

    pairs = zip(holding.sequences, holding.births or (0,) * len(holding.sequences), strict=True)
    return _picked(holding, [i for i, (sequence, birth) in enumerate(pairs) if not goes(birth, over.get(sequence, ()))])


def without_clashes(held: list[tuple[NodeId, Holding]], clashes: tuple[Clash, ...]) -> list[tuple[NodeId, Holding]]:
    """The same holdings, replicas' positions cut to where their blocks begin to be another copy's, too. Ids stand in no block, and stay."""
    bounds: dict[StreamId, dict[SequenceId, int]] = {}
    for stream, sequence, position in clashes:
        named = bounds.setdefault(stream, {})
        named[sequence] = min(position, named.get(sequence, position))
    return [(node, _bounded(holding, bounds[holding.stream]) if _has_bounds(holding, bounds) else holding) for node, holding in held]


def _has_bounds(holding: Holding, bounds: dict) -> bool:
    return holding.kind == "replica" and holding.stream in bounds


def _bounded(holding: Holding, bounds: dict[SequenceId, int]) -> Holding:
    pairs = zip(holding.sequences, holding.positions, strict=True)
    return structs.replace(holding, positions=tuple([min(position, bounds.get(sequence, position)) for sequence, position in pairs]))


def _picked(holding: Holding, kept: list[int]) -> Holding:
    if len(kept) == len(holding.sequences):
        return holding
    columns = ("sequences", "generations", "lineages", "positions", "ids", *(("births",) if holding.births else ()))
    return structs.replace(holding, **{name: tuple([getattr(holding, name)[i] for i in kept]) for name in columns})


class Copy:
    """One holding, aligned. `positions` and `ids` are what was reported; `valid()` cuts them to what agrees with the authoritative lineage and birth.

    `births` is empty where nobody says; `strange`: indices of what is of another sequence than the plan is about.
    """

    __slots__ = ("agrees_with", "alive", "births", "fingerprint", "ids", "kind", "lineages", "node", "positions", "strange", "stream")

    def __init__(self, node: NodeId, holding: Holding, positions: Ints, ids: Ints, lineages: tuple[Lineage | None, ...], births: Ints):
        self.node, self.kind, self.alive, self.stream, self.fingerprint = node, holding.kind, holding.alive, holding.stream, holding.fingerprint
        self.positions, self.ids, self.lineages, self.births = positions, ids, lineages, births
        self.strange: Ints = ()
        self.agrees_with: tuple | None = None  # the authoritative column that this one was found equal to: spares the second comparison


def table(holdings: list[tuple[NodeId, Holding]]) -> tuple[tuple[SequenceId, ...], list[Copy]]:
    """All sequences in the order of first mention, and every holding's columns in that order."""
    if not holdings:
        return (), []
    first = holdings[0][1].sequences
    ats = [None if holding.sequences == first else dict(zip(holding.sequences, range(len(holding.sequences)), strict=True)) for _, holding in holdings]
    base, seen = first, None
    for at in ats:
        if at is not None:
            seen = dict.fromkeys(first) if seen is None else seen
            if not at.keys() <= seen.keys():
                seen.update(dict.fromkeys(at))
    if seen is not None and len(seen) != len(first):
        base = tuple(seen)
    return base, [_aligned(base, node, holding, at) for (node, holding), at in zip(holdings, ats, strict=True)]


def align(base: tuple[SequenceId, ...], node: NodeId, holding: Holding) -> Copy:
    """The holding's columns in the order of `base`; sequences that `base` hasn't are left out."""
    return _aligned(base, node, holding, None)


def _aligned(base: tuple[SequenceId, ...], node: NodeId, holding: Holding, at: dict[SequenceId, int] | None) -> Copy:
    if holding.sequences == base:
        return Copy(node, holding, holding.positions, holding.ids, holding.lineages, holding.births)
    at = dict(zip(holding.sequences, range(len(holding.sequences)), strict=True)) if at is None else at
    if len(at) >= len(base) > 1:
        try:
            pick = itemgetter(*itemgetter(*base)(at))  # in C: this is where the time of a large plan goes
            births = pick(holding.births) if holding.births else ()
            return Copy(node, holding, pick(holding.positions), pick(holding.ids), pick(holding.lineages), births)
        except KeyError:
            pass  # a sequence of the table that this holding hasn't: the slower way below fills it in
    where = [at.get(sequence, -1) for sequence in base]
    positions, ids, lineages = (*holding.positions, 0), (*holding.ids, 0), (*holding.lineages, None)  # index -1 finds the default
    births = (*holding.births, 0) if holding.births else ()
    columns = [tuple([column[i] for i in where]) if column else () for column in (positions, ids, lineages, births)]
    return Copy(node, holding, *columns)


def _newer(a: Lineage | None, b: Lineage | None) -> Lineage | None:
    """The one whose last epoch is later; `a` where they are equally new."""
    if not a or not b:
        return b if a is None or (b and not a) else a
    return b if b[-1].epoch > a[-1].epoch else a


def authoritative(base: tuple[SequenceId, ...], copies: list[Copy], forks: dict[SequenceId, Lineage]) -> tuple[Lineage, ...]:
    """The newest lineage per sequence, earlier copies first where two are equally new; `forks` decided by former plans count when they are newer still."""
    column: tuple = copies[0].lineages if copies else (None,) * len(base)
    if copies:
        copies[0].agrees_with = column
    for copy in copies[1:]:
        if copy.lineages == column:
            copy.agrees_with = column
            continue
        better = tuple([a if a is b else _newer(a, b) for a, b in zip(column, copy.lineages, strict=True)])
        if better != column:
            column = better
        if copy.lineages == column:
            copy.agrees_with = column
    if forks:
        known = tuple([forks.get(sequence) for sequence in base])
        better = tuple([a if b is None or a is b else _newer(a, b) for a, b in zip(column, known, strict=True)])
        if better != column:
            column = better
    return tuple([lineage or () for lineage in column]) if None in column else column


def births(copies: list[Copy], lineages: tuple[Lineage, ...], former: Ints = ()) -> Ints:
    """By sequence, of which birth it is: of the copies whose lineage is the newest, the first that says; () where none does.

    `former`: what former plans decided, where they are newer than every copy (their lineage is the authoritative one).
    """
    column, disputed = former, {}
    for copy in copies:
        if not copy.births or copy.births == column:
            continue
        if not column:
            column = copy.births
            continue
        disputed.update(dict.fromkeys([i for i, (a, b) in enumerate(zip(column, copy.births, strict=True)) if is_other(a, b)]))
        if 0 in column:
            column = tuple([a or b for a, b in zip(column, copy.births, strict=True)])
    if not disputed:
        return column
    decided = list(column)
    for i in disputed:
        last = lineages[i][-1].epoch if lineages[i] else -1
        newest = [copy.births[i] for copy in copies if copy.births and copy.births[i] and copy.lineages[i] and copy.lineages[i][-1].epoch == last]
        decided[i] = newest[0] if newest else column[i]
    return tuple(decided)


def estrange(copies: list[Copy], births_: Ints) -> None:
    """Mark what is of another birth than the authoritative one: nothing of it counts."""
    for copy in copies:
        if copy.births and births_ and copy.births != births_:
            copy.strange = tuple([i for i, (a, b) in enumerate(zip(copy.births, births_, strict=True)) if is_other(a, b)])


def valid(values: Ints, copy: Copy, lineages: tuple[Lineage, ...]) -> Ints:
    """Positions (or counts of ids) of `copy`, cut at the fork where its lineage leaves the authoritative one; 0 where it is of another sequence."""
    if copy.agrees_with is not lineages and copy.lineages != lineages:
        values = tuple([
            value if a == b else 0 if a is None else min(value, agreed(a, b))
            for value, a, b in zip(values, copy.lineages, lineages, strict=True)
        ])  # fmt: skip
    if not copy.strange:
        return values
    cut = list(values)
    for i in copy.strange:
        cut[i] = 0
    return tuple(cut)


def lowest(columns: list[Ints]) -> Ints:
    return columns[0] if len(columns) == 1 else tuple(map(min, *columns))


def highest(columns: list[Ints]) -> Ints:
    return columns[0] if len(columns) == 1 else tuple(map(max, *columns))


class Longest:
    """Per sequence the largest count of ids seen, and where: earlier offers win ties."""

    def __init__(self, size: int):
        self.counts: list[int] = [0] * size
        self.where: list[tuple[NodeId, StreamId] | None] = [None] * size

    def offer(self, counts: Ints, node: NodeId, stream: StreamId) -> None:
        place = (node, stream)
        if not any(self.counts):
            self.counts, self.where = list(counts), [place if count else None for count in counts]
            return
        if tuple(self.counts) == counts:
            return
        for i, (count, best) in enumerate(zip(counts, self.counts, strict=True)):
            if count > best:
                self.counts[i], self.where[i] = count, place
