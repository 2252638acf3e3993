"""All replicas of a node: streams, sessions, promises, plans.

Knows: who may write (epochs), which plan was carried out, one byte budget. Must not know: links, order of frames, what a coordinator is.
Invariants: a frame of an epoch older than the instance's promise changes nothing (I3); a plan cuts once per (instance, epoch), however often it comes; used +
promised bytes never exceed the budget. What changed is in the index when a call returns, so that whatever is acknowledged or stated outlives this process
wherever the shelf keeps anything. How long released ids stay: released.py.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import xxhash

from kvguard.errors import Fenced, Refused
from kvguard.format.local import ReplicaPages
from kvguard.format.messages import IDS_ONLY, Held, Hello, Holding, IdsFrame, KnownIds, KvFrame, PlanOrder, StreamShape
from kvguard.limits import PAYLOAD_BYTES_MAX
from kvguard.store import adoption
from kvguard.store.adoption import ARENA, INDEX, Dropped
from kvguard.store.arena import Arena, at_once
from kvguard.store.budget import Budget
from kvguard.store.index import VERSION, Head, Index, Unreadable
from kvguard.store.released import Released
from kvguard.store.replica import ID_BYTES, Replica
from kvguard.store.session import Refusals, Session
from kvguard.store.shelf import Memfds, Shelf
from kvguard.store.truncation import cut_to_plan
from kvguard.types import NO_EPOCH, Epoch, Life, NodeId, Rank, SequenceId, Span, StreamId, is_scheduler

STREAMS_MAX = 1024
BLOCKS_MAX = 1 << 26
TOKENS_PER_BLOCK_MAX = 65535  # fill is 16 bits wide


class Kept(NamedTuple):
    """One row of `kvguard replicas list`."""

    stream: StreamId
    sequence: SequenceId
    epoch: int  # of its newest fork
    positions: int
    bytes: int
    ids: int
    released: bool


class ReplicaStore:
    """`shelf`: keeps arenas and indexes beyond this process, or doesn't (None: memfds). `owner`: a mark; only what bears it is read back.
    `clock`: monotonic nanoseconds."""

    def __init__(
        self, shelf: Shelf | None, budget_bytes: int, ids_retention_ns: int, clock: Callable[[], int] = time.monotonic_ns, owner: bytes = b""
    ) -> None:
        self.budget = Budget(budget_bytes)
        self.counters: Counter[str] = Counter()
        self._shelf = shelf if shelf is not None else Memfds()
        self._owner = owner
        self._replicas: dict[StreamId, Replica] = {}
        self._sessions: dict[int, Session] = {}
        self._current: dict[StreamId, int] = {}
        self._promises: dict[str, Epoch] = {}
        self._carried: dict[str, Epoch] = {}
        self._released = Released(self._replicas, ids_retention_ns, clock, self._record, self.counters)
        self._found_damaged: set[StreamId] = set()
        # Replicas are to be verified again: whoever does it begins. And tells the senders of these, whose sessions are over.
        self.doubted: Callable[[tuple[StreamId, ...]], None] = lambda unsaid: None
        self.let_go = at_once  # of a dropped replica's memory: see Arena.close

    # ---- a former life ------------------------------------------------------------------------------------------------------------------

    def read_back(self) -> tuple[Dropped, ...]:
        """Take up what a former life left on the shelf; what can't be is dropped, and returned. All of it is unchecked until `check_some` has been over it."""
        dropped = []
        for name, arena, index in adoption.pairs(self._shelf.kept()):
            try:
                replica = adoption.read_back(arena, index, self._owner, self.budget, lambda stream, name=name: name == name_of(stream))
            except Unreadable as error:
                dropped.append(Dropped(name, str(error)))
                self._unshelve(name)
                continue
            stream = replica.stream
            assert stream not in self._replicas
            self._replicas[stream] = replica
            if replica.carried is not None:
                self._carried[stream.instance] = max(replica.carried, self._carried.get(stream.instance, replica.carried))
            self._released.read_back(replica)
        self.counters["replicas_read_back"] += len(self._replicas)
        self.counters["positions_read_back"] += sum(sequence.position for replica in self._replicas.values() for sequence in replica.sequences.values())
        self.counters["replicas_unreadable"] += len(dropped)
        return tuple(dropped)

    def check_some(self, cost_bytes: int, first: Iterable[StreamId] = ()) -> tuple[StreamId, ...]:
        """Verify what was read back, for about `cost_bytes` of hashing, `first` before the others; the streams that are through with it now."""
        done = []
        for stream in dict.fromkeys((*first, *self._replicas)):
            replica = self._replicas.get(stream)
            if replica is not None and replica.unchecked and cost_bytes > 0:
                cost_bytes, cut = adoption.check(replica, cost_bytes)
                self.counters["positions_damaged" if stream in self._found_damaged else "positions_unsound"] += cut
                if not replica.unchecked:
                    self._found_damaged.discard(stream)
                    done.append(stream)
        return tuple(done)

    def unchecked(self, stream: StreamId | None = None, instance: str | None = None) -> int:
        """How many sequences of a stream, of an instance, or of all are read back and not yet verified."""
        if stream is not None:
            return len(self._replicas[stream].unchecked) if stream in self._replicas else 0
        return sum(len(replica.unchecked) for held, replica in self._replicas.items() if instance in (None, held.instance))

    def _unshelve(self, name: str) -> None:
        self._shelf.remove(name + ARENA)
        self._shelf.remove(name + INDEX)

    def resize(self, budget_bytes: int, ids_retention_ns: int) -> None:
        """Other bounds from now on. What is held and promised stays; nothing more is admitted until it is below the new budget."""
        self.budget.resize(budget_bytes)
        self._released.retention_ns = ids_retention_ns

    # ---- fencing ------------------------------------------------------------------------------------------------------------------------

    def promise(self, instance: str, epoch: Epoch) -> None:
        """From now on older epochs of `instance` change nothing here. The caller has made it durable. A lower one than known is ignored."""
        if epoch.counter > self._promises.get(instance, NO_EPOCH).counter or instance not in self._promises:
            self._promises[instance] = epoch

    def _stale(self, instance: str, epoch: Epoch) -> str:
        promised = self._promises.get(instance)
        if promised is None or epoch == promised or epoch.counter > promised.counter:
            return ""
        self.counters["stale_epoch"] += 1
        return f"fenced: epoch {epoch.counter} of {epoch.issuer!r}, promised is {promised.counter} of {promised.issuer!r}"

    # ---- a stream -----------------------------------------------------------------------------------------------------------------------

    def probe(self, hello: Hello) -> Held:
        """Open or make the replica of a stream; sessions before this one are over. Held.reason says why not."""
        empty = Holding(hello.stream, "replica", False, (), (), (), (), ())
        reason = self._stale(hello.stream.instance, hello.epoch) or self._unfit(hello)
        if reason:
            return Held(hello.session, hello.epoch, empty, reason)
        replica = self._replicas.get(hello.stream)
        if replica is None:
            try:
                replica = self._replicas[hello.stream] = self._made(hello.stream, hello.shape)
            except (OSError, OverflowError, ValueError) as error:
                return Held(hello.session, hello.epoch, empty, f"no arena: {error}")
        assert not replica.unchecked, "a session would write what nobody has verified"
        self._sessions.pop(self._current.get(hello.stream, 0), None)
        self._current[hello.stream] = hello.session
        self._sessions[hello.session] = Session(hello.session, replica)
        return Held(hello.session, hello.epoch, replica.holding())

    def _made(self, stream: StreamId, shape: StreamShape) -> Replica:
        """A new replica, with an index where anything outlives this process. Raises OSError."""
        name = name_of(stream)
        descriptor = self._shelf.create(name + ARENA)
        try:
            arena = Arena(descriptor, shape, self.budget)
        except BaseException:
            os.close(descriptor)
            self._shelf.remove(name + ARENA)
            raise
        replica = Replica(stream, shape, arena, self.budget)
        replica.carried = self._carried.get(stream.instance)
        if self._shelf.keeps:
            try:
                replica.index = Index(self._shelf.create(name + INDEX), Head(VERSION, self._owner, stream, shape, arena.inode()))
            except OSError:
                replica.close()
                self._unshelve(name)
                raise
            replica.index.rewrite(replica.changes.snapshot((), replica.carried))
        return replica

    def _unfit(self, hello: Hello) -> str:
        shape, known = hello.shape, self._replicas.get(hello.stream)
        if is_scheduler(hello.stream.rank) != (shape == IDS_ONLY):
            return "a scheduler's stream has ids alone, and no other has"
        if known is not None:
            return "" if known.shape == shape else "the stream is known here with another shape"
        if len(self._replicas) >= STREAMS_MAX:
            return f"{STREAMS_MAX} streams are held already"
        smallest = min(shape.block_tokens, shape.token_bytes, shape.block_bytes, shape.blocks)
        if (smallest <= 0 and shape != IDS_ONLY) or shape.block_tokens > TOKENS_PER_BLOCK_MAX or shape.blocks > BLOCKS_MAX:
            return "the shape's sizes are out of bounds"
        if shape.addressable and shape.block_bytes != shape.block_tokens * shape.token_bytes:
            return f"{shape.block_tokens} tokens of {shape.token_bytes} bytes are not a block of {shape.block_bytes}"
        if (shape.token_bytes if shape.addressable else shape.block_bytes) > PAYLOAD_BYTES_MAX:
            return f"a token (or block) is larger than a frame of {PAYLOAD_BYTES_MAX} bytes"
        other = self._sessions.get(hello.session)
        return "the session is another stream's" if other is not None and other.replica.stream != hello.stream else ""

    def apply_ids(self, session: int, frame: IdsFrame) -> tuple[Refusals, str]:
        """(refused, gap) for events.Applied."""
        found = self._sessions.get(session)
        if found is None:
            return (), "the session is over: say Hello again"
        gap = self._stale(found.replica.stream.instance, frame.epoch)
        if gap:
            return (), gap
        refused, gap = found.apply_ids(frame)
        self._released.keep(found.replica)
        self._record(found.replica)
        self._count(refused, gap)
        return refused, gap

    def apply_kv(self, session: int, frame: KvFrame, payload: memoryview) -> tuple[Refusals, str]:
        """(refused, gap) for events.Applied. The payload is not kept."""
        found = self._sessions.get(session)
        if found is None:
            return (), "the session is over: say Hello again"
        gap = self._stale(found.replica.stream.instance, frame.epoch)
        if gap:
            return (), gap
        refused, gap = found.apply_kv(frame, payload)
        self._record(found.replica)
        self._count(refused, gap)
        return refused, gap

    def _record(self, replica: Replica) -> None:
        whole = replica.index is None or not replica.index.broken
        replica.record()
        if whole and replica.index is not None and replica.index.broken:
            self.counters["indexes_broken"] += 1

    def _count(self, refused: Refusals, gap: str) -> None:
        if refused:
            self.counters["refused"] += len(refused)
        if gap:
            self.counters["checksum_failures" if gap.startswith("checksum") else "gaps"] += 1

    def drop(self, stream: StreamId, epoch: Epoch | None = None) -> None:
        """All pages and ids of a stream go. Raises Fenced where `epoch` is given and older than the promise. An unknown stream is dropped already."""
        stale = self._stale(stream.instance, epoch) if epoch is not None else ""
        if stale:
            raise Fenced(f"{stream} stays: {stale}")
        replica = self._replicas.pop(stream, None)
        if replica is None:
            return
        self._sessions.pop(self._current.pop(stream, 0), None)
        self._released.drop(stream)
        self._unshelve(name_of(stream))  # first: whoever lets go last frees the pages, and that is not to be the loop
        replica.close(self.let_go)

    # ---- released ids -------------------------------------------------------------------------------------------------------------------

    def delivered(self, instance: str, lives: tuple[Life, ...]) -> None:
        """These answers have reached their clients: ids may go ids_retention_ns from now, once released."""
        self._released.delivered(instance, lives)

    def expire(self) -> int:
        """Drop released ids whose time is up; how many."""
        return self._released.expire()

    # ---- recovery -----------------------------------------------------------------------------------------------------------------------

    def holding(self, stream: StreamId) -> Holding:
        return self.replica(stream).holding()

    def holdings(self, instance: str) -> tuple[Holding, ...]:
        """All replicas of an instance, for Report."""
        return tuple(replica.holding() for stream, replica in self._replicas.items() if stream.instance == instance)

    def carry_plan(self, plan: PlanOrder, node: NodeId) -> tuple[KnownIds, ...]:
        """Cut and drop what is held as ordered, once per epoch; then what `node` answers for. Raises Fenced where a later epoch was promised."""
        stale = self._stale(plan.instance, plan.epoch)
        if stale:
            raise Fenced(f"plan of {plan.instance}: {stale}")
        for stream, replica in self._replicas.items():
            if stream.instance == plan.instance and (replica.carried is None or replica.carried.counter < plan.epoch.counter):
                self.counters["other_lives_dropped"] += cut_to_plan(replica, plan)
                replica.carried = replica.changes.carried = plan.epoch
                self._record(replica)
        self._carried[plan.instance] = max(plan.epoch, self._carried.get(plan.instance, plan.epoch))
        known = []
        for name, ids, answers, stream in zip(plan.sequences, plan.ids, plan.ids_node, plan.ids_stream, strict=True):
            replica = self._replicas.get(stream)
            sequence = replica.sequences.get(name) if replica and answers == node else None
            if sequence is not None:
                known.append(KnownIds(name, bytes(sequence.ids[: ids * ID_BYTES]), sequence.sampler, sequence.request))
        return tuple(known)

    def pages(self, stream: StreamId) -> tuple[int, ReplicaPages]:
        """A duplicate of the arena's descriptor (the caller's to close) and what is in it, for the engine that pulls."""
        replica = self.replica(stream)
        return replica.arena.export(), replica.pages()

    # ---- looking ------------------------------------------------------------------------------------------------------------------------

    def streams(self) -> tuple[StreamId, ...]:
        return tuple(self._replicas)

    def shape(self, stream: StreamId) -> StreamShape:
        return self.replica(stream).shape

    def read(self, stream: StreamId, sequence: SequenceId, span: Span) -> bytes:
        """Canonical bytes of `span`. Raises Refused beyond what is held."""
        return self.replica(stream).read(sequence, span)

    def verify(self, stream: StreamId, sequence: SequenceId | None = None) -> dict[SequenceId, int]:
        """By sequence, how many leading positions' bytes match their sums."""
        replica = self.replica(stream)
        names = [sequence] if sequence is not None else [live.name for live in replica.live()]
        return {name: replica.verify(name) for name in names}

    def list(self) -> tuple[Kept, ...]:
        return tuple(
            Kept(stream, s.name, s.lineage[-1].epoch, s.position, s.position * replica.shape.token_bytes, s.known, s.released)
            for stream, replica in self._replicas.items()
            for s in replica.sequences.values()
        )

    def beat(self) -> tuple[tuple[StreamId, int, int], ...]:
        """Beat.replicas: (stream, live sequences that are verified, bytes of pages)."""
        held = self._replicas.items()
        return tuple((stream, len(one.live()) - len(one.unchecked), one.arena.pages_live() * one.arena.page_bytes) for stream, one in held)

    def scrub(self, stream: StreamId) -> Iterator[int]:
        """A replica is read whole and cut to what its sums vouch for, a page at every step of the iterator, which gives the step's cost in bytes. Ends early
        where the replica goes. Raises Refused for a stream that isn't held here."""
        replica = self.replica(stream)
        for cost, cut in adoption.scrubbing(replica):
            self.counters["positions_damaged"] += cut
            yield cost
            if self._replicas.get(stream) is not replica:
                return

    def damaged(self, stream: StreamId) -> None:
        """Somebody read bytes of this replica that don't match their sums: it is doubted, so that the next report is true. Unknown streams are gone already."""
        if stream in self._replicas:
            self._found_damaged.add(stream)
            self._doubt((stream,), (stream,))

    def _doubt(self, streams: tuple[StreamId, ...], unsaid: tuple[StreamId, ...] = ()) -> None:
        for stream in streams:
            self._sessions.pop(self._current.pop(stream, 0), None)
            adoption.doubt(self._replicas[stream])
        self.doubted(unsaid)

    def recheck(self, instance: str, rank: Rank | None) -> tuple[StreamId, ...]:
        """Doubted: nothing of them is stated, and no session writes to them, until `check_some` has been over them. Which streams' replicas these are."""
        doubted = tuple(stream for stream in self._replicas if stream.instance == instance and rank in (None, stream.rank))
        self._doubt(doubted)
        return doubted

    def damage(self, stream: StreamId, sequence: SequenceId, position: int, bytes_only: bool = False) -> None:
        """For drills: a held position's byte changes; with its sum (the negative control), or alone."""
        self.replica(stream).damage(sequence, position, bytes_only)

    def close(self) -> None:
        """Forget everything here. What the shelf keeps stays for the next life; `drop` what shall not."""
        for replica in self._replicas.values():
            replica.close()
        self._replicas.clear()
        self._sessions.clear()
        self._current.clear()
        self._released.clear()

    def check(self) -> None:
        """Asserts what holds between calls; for tests and sampled in production."""
        used = 0
        for replica in self._replicas.values():
            replica.check()
            used += replica.arena.pages_live() * replica.arena.page_bytes
            used += sum(len(s.ids) + len(s.request) for s in replica.sequences.values())
        self.budget.check()
        assert used == self.budget.used

    def replica(self, stream: StreamId) -> Replica:
        """Raises Refused for a stream that isn't held here."""
        if stream not in self._replicas:
            raise Refused(f"no replica of {stream} is held here. Try: kvguard replicas list")
        return self._replicas[stream]


def name_of(stream: StreamId) -> str:
    """Under which a shelf keeps a stream's arena and index."""
    return f"{xxhash.xxh3_64_intdigest(str(stream).encode()):016x}"
