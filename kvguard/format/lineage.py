"""Lineage: which positions of two copies of a sequence may be compared (house rule "Lineage"), and whether two copies of one name are of one sequence at all.

Knows: lists of (epoch, start), births. Must not know: where copies are kept.
Invariant: agreed(a, b) is symmetric, and never larger than the truth: when in doubt it is smaller, because dropping costs time and keeping costs correctness.
"""

from __future__ import annotations

from collections.abc import Iterable

import xxhash

from kvguard.limits import FORKS_MAX
from kvguard.types import Fork, Life, Lineage, Position, SequenceId

UNBOUNDED: Position = 1 << 62


def agreed(a: Lineage, b: Lineage) -> Position:
    """The position below which copies with lineages `a` and `b` hold the same tokens; UNBOUNDED when neither forked from the other."""
    for fork_a, fork_b in zip(a, b, strict=False):
        if fork_a != fork_b:
            return min(fork_a.start, fork_b.start)
    if len(a) == len(b):
        return UNBOUNDED
    longer = a if len(a) > len(b) else b
    return longer[min(len(a), len(b))].start


def forked(lineage: Lineage, epoch: int, position: Position) -> Lineage:
    """The lineage of a sequence that goes on in `epoch` from `position`. Forks at or beyond the position vanish with what they named."""
    kept = tuple(fork for fork in lineage if fork.start < position and fork.epoch < epoch)
    if len(kept) >= FORKS_MAX:
        kept = ()  # starts anew: agrees with nothing older, so older copies are dropped and sent again
    return (*kept, Fork(epoch, position if kept else 0))


def newest(lineages) -> Lineage:
    """The one that names the latest epoch: epochs of one instance are totally ordered and only a plan opens one."""
    return max(lineages, key=lambda lineage: lineage[-1].epoch if lineage else -1, default=())


def birth_of(request: bytes) -> int:
    """Which sequence bears a name, told from what every rank, scheduler and holder has of it since its first commit; 0 where its request says nothing.

    A name that is given away again within one epoch has the lineage of its former life: only this parts the two. Whoever gives names away again makes requests
    differ (the adapters put a random number into them).
    """
    return (xxhash.xxh3_64_intdigest(request) or 1) if request else 0


def life_of(sequence: SequenceId, request: bytes) -> Life:
    """The sequence that was begun under this name with these parameters, whatever else bears the name."""
    return Life(sequence, birth_of(request))


def is_other(a: int, b: int) -> bool:
    """Whether two births are of two sequences, as far as they were told."""
    return a != b and a != 0 and b != 0


def is_one_of(birth: int, births: Iterable[int]) -> bool:
    """Whether it may be one of these births, as far as they were told."""
    return any(not is_other(birth, known) for known in births)
