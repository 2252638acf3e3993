"""How long the ids of released sequences stay: until they were delivered and a while longer, so that an emitter that dies can be told what it had emitted.

Knows: the store's replicas, time. Must not know: budgets, sessions, who delivers.
Invariants: at most RELEASED_MAX that are undelivered, counted beyond; what is delivered is one life of a name: another one that bears it stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from kvguard.format.lineage import is_other
from kvguard.store.replica import Replica
from kvguard.types import Life, SequenceId, StreamId

RELEASED_MAX = 16384  # undelivered answers whose ids are kept


class Released:
    """`replicas`: the store's own. `record`: writes down what changed in one. `clock`: monotonic nanoseconds."""

    def __init__(
        self, replicas: dict[StreamId, Replica], retention_ns: int, clock: Callable[[], int], record: Callable[[Replica], None], counters: Counter[str]
    ) -> None:
        self.retention_ns = retention_ns
        self._replicas, self._clock, self._record, self._counters = replicas, clock, record, counters
        self._kept: dict[tuple[StreamId, SequenceId], None] = {}  # oldest first; a name may be another sequence's by now

    def read_back(self, replica: Replica) -> None:
        """What a former life of this daemon kept. When exactly something was delivered isn't known any more: it counts from now on."""
        for sequence in replica.sequences.values():
            if sequence.released:
                self._kept[replica.stream, sequence.name] = None
            if sequence.expires_ns:
                sequence.expires_ns = self._clock() + self.retention_ns

    def keep(self, replica: Replica) -> None:
        """What was released since the last call."""
        for name in replica.released:
            self._kept[replica.stream, name] = None
        replica.released.clear()
        while len(self._kept) > RELEASED_MAX:
            self._forget(next(iter(self._kept)))
            self._counters["undelivered_ids_dropped"] += 1

    def delivered(self, instance: str, lives: tuple[Life, ...]) -> None:
        """These answers have reached their clients: ids may go retention_ns from now, once released."""
        at = self._clock() + self.retention_ns
        for stream, replica in self._replicas.items():
            for name, birth in lives if stream.instance == instance else ():
                sequence = replica.sequences.get(name)
                if sequence is not None and not sequence.expires_ns and not is_other(sequence.birth, birth):
                    sequence.expires_ns = at
                    replica.changes.lives[sequence] = None
            self._record(replica)

    def expire(self) -> int:
        """Drop ids whose time is up; how many."""
        now, due = self._clock(), []
        for key in self._kept:
            sequence = self._replicas[key[0]].sequences.get(key[1])
            if sequence is None or not sequence.released or 0 < sequence.expires_ns <= now:
                due.append(key)
        for key in due:
            self._forget(key)
        return len(due)

    def drop(self, stream: StreamId) -> None:
        """Its replica goes."""
        for key in [key for key in self._kept if key[0] == stream]:
            del self._kept[key]

    def clear(self) -> None:
        self._kept.clear()

    def _forget(self, key: tuple[StreamId, SequenceId]) -> None:
        del self._kept[key]
        replica = self._replicas.get(key[0])
        sequence = replica.sequences.get(key[1]) if replica else None
        if sequence is not None and sequence.released:
            replica.drop(sequence)
            self._record(replica)
