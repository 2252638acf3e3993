"""The frozen values that every room speaks in.

Knows: the words of the field (rank, stream, sequence, span, epoch, lineage) and their arithmetic.
Must not know: bytes on a wire, memory, sockets, clocks.
Invariants: all values are immutable and hashable; a lineage's epochs and starts only rise.
"""

from __future__ import annotations

from typing import NamedTuple

Position = int  # one token's place in its sequence; KV "at position n" is complete for [0, n)
SequenceId = str  # the engine's own request id, unique within an instance while it lives
NodeId = str


class Rank(NamedTuple):
    """One worker of an instance. Text form `dp.pp.tp`, e.g. `0.1.0`."""

    dp: int
    pp: int
    tp: int

    def __str__(self) -> str:
        return f"{self.dp}.{self.pp}.{self.tp}" if self.pp != SCHEDULER_PP else f"{self.dp}.scheduler"

    @classmethod
    def parse(cls, text: str) -> Rank:
        """Raises ValueError unless `text` is three non-negative integers joined by dots."""
        parts = text.split(".")
        if len(parts) != 3 or not all(part.isdigit() for part in parts):
            raise ValueError(f"rank {text!r} is not of the form dp.pp.tp. Try: 0.1.0")
        return cls(*map(int, parts))


SCHEDULER_PP = 65535  # no pipeline is that long: the place of a scheduler's own stream beside its ranks'


def scheduler_of(dp: int) -> Rank:
    """What stands for the scheduler of one dp where a stream needs a rank: never a member, without KV."""
    return Rank(dp, SCHEDULER_PP, 0)


def is_scheduler(rank: Rank) -> bool:
    return rank.pp == SCHEDULER_PP


class Epoch(NamedTuple):
    """The fencing number of an instance. The issuer breaks no ties: a holder refuses an equal counter of another issuer."""

    counter: int
    issuer: str


NO_EPOCH = Epoch(0, "")  # what an instance lives in until its first fence


class Fork(NamedTuple):
    """From position `start` on, a sequence was written in `epoch` (the counter alone: lineages outlive issuers)."""

    epoch: int
    start: Position


Lineage = tuple[Fork, ...]  # oldest first; epochs rise strictly, starts never fall


class Life(NamedTuple):
    """One of the sequences that bear a name one after the other, told by its birth (format/lineage.py: birth_of); 0: unknown, any of them."""

    sequence: SequenceId
    birth: int = 0


class Span(NamedTuple):
    """Half-open range of positions."""

    start: Position
    end: Position


class StreamId(NamedTuple):
    """One life of one rank's KV pool. Watermarks of two streams are not comparable; block ids and generations mean something only within one."""

    instance: str
    rank: Rank
    pool: int  # 64-bit random token drawn when the pool was allocated

    def __str__(self) -> str:
        return f"{self.instance}/{self.rank}#{self.pool:016x}"


class Clash(NamedTuple):
    """A copy of `sequence` whose blocks from `position` on are claimed by a copy of another one, too, out of another life's pool: one pool can't hold both."""

    stream: StreamId
    sequence: SequenceId
    position: Position


Places = tuple[tuple[Rank, NodeId], ...]  # who has a part of a sequence, and where


class Rung:
    """Where a sequence's KV comes back from, cheapest first. Values are the words of the documents; order() ranks them."""

    POOL = "pool"
    REPLICA = "replica"
    TOKENS = "tokens"
    ALL = (POOL, REPLICA, TOKENS)

    @classmethod
    def worst(cls, rungs) -> str:
        return max(rungs, key=cls.ALL.index, default=cls.POOL)


class ResumeToken(NamedTuple):
    """Where and with what one sequence goes on.

    `position`: KV exists for [0, position) on every rank. `tokens`: all replicated ids from `position` on. Empty where the KV is ahead of them: the living
    emitter knows the next input itself; one that doesn't computes the last position once more.
    `prefix`: the ids below `position`, which a new emitter needs for text and penalties. `sampler`, `request`: opaque bytes as committed.
    `places`: of a sequence that moves, every (rank, node) whose daemon can give [0, position) to an engine of another instance; empty: compute from the ids.
    `proof`: what those daemons ask for.
    """

    instance: str
    sequence: SequenceId
    epoch: Epoch
    position: Position
    tokens: tuple[int, ...]
    prefix: tuple[int, ...]
    sampler: bytes
    request: bytes
    rung: str
    places: Places = ()
    proof: bytes = b""


class MovedToken(NamedTuple):
    """What an engine of another instance fetches a moved sequence's KV with: a resume token without its ids. JSON form: format/moves.py."""

    instance: str  # the dead one
    sequence: SequenceId
    epoch: Epoch
    position: Position
    proof: bytes
    places: Places = ()
