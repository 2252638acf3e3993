"""The engines of this node: ranks and standbys that attached, their memories as mapped here, their deaths.

Knows: local messages, descriptors, pools, tables, pidfds. Must not know: how an engine comes to its seat (arrivals.py), decisions, the socket, peers.
Invariants: of one (instance, rank) one process lives at a time; a death is told after a last look, so that facts committed just before it count; what was
mapped goes with forget, once; whoever can't be watched has no seat.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvguard.core import events
from kvguard.daemon import schedulers
from kvguard.daemon.arrivals import BELL, PIDFD, TABLE, Arrival, Arrivals, NotYet, Tells
from kvguard.daemon.capture import Stream, as_event
from kvguard.daemon.copies import gpu_of
from kvguard.daemon.descriptors import readable, same_file, stopped
from kvguard.daemon.lifelines import Lifelines, Watches
from kvguard.daemon.salvage import Salvaging, goes_on_in, is_elsewhere
from kvguard.daemon.seats import LocalRank
from kvguard.daemon.spares import Spares
from kvguard.daemon.workers import Workers
from kvguard.device.base import Device, Pool
from kvguard.errors import Refused
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.format.messages import IDS_ONLY, Holding, KnownIds, PlanOrder, Rebuild
from kvguard.store.store import ReplicaStore
from kvguard.types import NO_EPOCH, Epoch, StreamId

if TYPE_CHECKING:
    from kvguard.engine.look import TableReader

log = logging.getLogger(__name__)

Events = Iterable[events.Event]
RANKS_MAX = 256
SALVAGE_MS_MAX = 300


class Ranks:
    """`streams`, `local`, `epochs`, `counters`: the shell's (perform_node.NodeShell). Implements perform_node.Engines."""

    def __init__(
        self, device: Device, store: ReplicaStore, watches: Watches, tell: Tells, streams: dict[StreamId, Stream], local_streams: dict[StreamId, Stream],
        epochs: dict[str, Epoch], salvage_ms_max: int = SALVAGE_MS_MAX, workers: Workers | None = None, counters: Counter | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self._watches = watches
        self._lifelines = Lifelines(watches)
        self._tell = tell
        self._streams, self._local, self._epochs = streams, local_streams, epochs
        self._workers = workers or Workers()
        self._counters = Counter() if counters is None else counters
        self._salvaging = Salvaging(self._workers, salvage_ms_max, lambda rank: self.ranks.get(rank.stream.id) is rank)
        self.ranks: dict[StreamId, LocalRank] = {}
        self._standbys = Spares(watches)
        self.spares = self._standbys.known
        self._arrivals = Arrivals(device, self._workers, self, self._standbys, tell, epochs)

    # ---- attaching (arrivals.Desk) --------------------------------------------------------------------------------------------------

    def attach(self, connection: int, pid: int, message: local.Attach, descriptors: list[int]) -> Events:
        """See arrivals.py."""
        return self._arrivals.attach(connection, pid, message, descriptors)

    def behind(self, connection: int, hear: Callable[[], Events]) -> bool:
        """See arrivals.py: whether what was said over that line is heard later, behind its Attach."""
        return self._arrivals.behind(connection, hear)

    def wanted(self, arrival: Arrival) -> Layout | None:
        """See arrivals.Desk."""
        message = arrival.message
        known = self._refused(arrival)
        if known is None:
            return next(iter(message.layouts.values()), None)  # a scheduler has none, and no pool
        return known.layout if known.stream.incarnation != message.incarnation and is_elsewhere(known, arrival.pool.descriptors) else None

    def _refused(self, arrival: Arrival) -> LocalRank | None:
        """What is known here of its stream. Raises Refused, NotYet where it can't be seated."""
        message = arrival.message
        self._refuse_second(message)
        known = self.ranks.get(message.stream)
        if known is None:
            if len(self.ranks) + len(self._arrivals) >= RANKS_MAX:
                raise Refused(f"{RANKS_MAX} ranks are attached already")
            return None
        if not same_file(known.table_descriptor, arrival[TABLE]):
            raise Refused(f"{message.stream} is known here with another table. Try: a new pool token for a new pool")
        if known.stream.leaving or known.stream.alive and known.stream.incarnation != message.incarnation and gpu_of(known.pool):
            raise NotYet(f"what the process left that was {message.stream} is still being read. Try: again in a moment")
        return known

    def _refuse_second(self, message: local.Attach) -> None:
        """Two live processes as one rank would both write its sequences. One that was killed and is still dying is fenced: it keeps its own memory, not the
        rank."""
        for stream, rank in self.ranks.items():
            same = (stream.instance, stream.rank) == (message.instance, message.stream.rank)
            if not same or not rank.stream.alive or rank.stream.incarnation == message.incarnation or readable(rank.pidfd):
                continue
            if rank.killed and stream == message.stream:
                raise NotYet(f"the process that was {stream} was killed, and is still dying. Try: again in a moment")
            if not rank.killed:
                raise Refused(f"rank {stream.rank} of {stream.instance!r} is held by a process that lives. Try: end it first, or attach as another rank")

    def seat(self, arrival: Arrival, pool: Pool | None) -> tuple[LocalRank, Events]:
        """See arrivals.Desk."""
        known = self._refused(arrival)
        told = self._new(arrival, pool) if known is None else self._again(known, arrival, pool)
        rank = self.ranks[arrival.message.stream]
        rank.connection = arrival.connection
        self._lifelines.hold(rank.stream, arrival.lifeline)
        self._standbys.took_rank(arrival.connection)
        return rank, told

    def _again(self, known: LocalRank, arrival: Arrival, pool: Pool | None) -> Events:
        """The same process over a new connection, or another one that goes on with a dead one's table, and with its pool or `pool`."""
        message = arrival.message
        told: list[events.Event] = []
        if known.stream.incarnation == message.incarnation:
            if not known.watched:
                self._watch(known, known.bell, known.pidfd)
        else:
            self._watch(known, arrival[BELL], arrival[PIDFD])
            told += self._leave(known, "its process ended") if known.stream.alive else ()
            if pool is not None:
                self._salvaging.unmap(goes_on_in(known, pool))
            self._unwatch(known)
            os.close(known.pidfd)
            os.close(known.bell)
            known.pidfd, known.bell, known.killed = arrival.take(PIDFD), arrival.take(BELL), ""
        known.watched = True
        known.stream.incarnation, known.stream.endpoint, known.stream.alive = message.incarnation, message.endpoint, True
        known.stream.kept = None
        told.append(events.StreamAttached(known.stream.id, known.stream.shape, message.incarnation, self._epoch_of(message, known.reader), message.endpoint))
        return [*told, *self.look(known.stream.id)]

    def _new(self, arrival: Arrival, pool: Pool | None) -> Events:
        message, layout = arrival.message, pool.layout if pool is not None else None
        reader, kept = _table(arrival, layout)
        shape, pool = layout.shape() if layout is not None else IDS_ONLY, pool or schedulers.NoPool()
        stream = Stream(message.stream, shape, pool, reader, message.incarnation, message.endpoint)
        rank = LocalRank(stream, pool, reader, layout, kept, arrival[PIDFD], arrival[BELL], arrival.connection, watched=True)
        try:
            self._watch(rank, rank.bell, rank.pidfd)
        except OSError:
            os.close(kept)
            raise
        arrival.take(PIDFD), arrival.take(BELL)
        self.ranks[stream.id] = rank
        self._streams[stream.id] = self._local[stream.id] = stream
        reader.set_epoch(self._epochs.get(message.instance, NO_EPOCH).counter)  # before the look: what is published after it was checked against the word
        seen = self.look(stream.id)
        return [events.StreamAttached(stream.id, shape, stream.incarnation, self._epoch_of(message, reader), stream.endpoint), *seen]

    def _epoch_of(self, message: local.Attach, reader: TableReader) -> Epoch:
        """Who never had anything to restore lives in the epoch that it finds: its engine says so itself, by the same word (Guard._attached)."""
        promise = self._epochs.get(message.instance, NO_EPOCH)
        return promise if message.epoch.counter < promise.counter and reader.is_untouched else message.epoch

    # ---- looking ------------------------------------------------------------------------------------------------------------------

    def look(self, stream: StreamId) -> Events:
        rank = self.ranks[stream]
        told: list[events.Event] = []
        found = as_event(stream, rank.reader.look())
        if rank.layout is None:
            found = schedulers.ids_alone(found)
        if found.rows or found.released or found.cut or found.opened or found.grown:
            rank.facts.take(found)
            told.append(found)
        steps = rank.reader.steps()
        if steps != rank.steps and rank.stream.alive and rank.layout is not None:
            rank.steps = steps
            rank.stopped = False
            told.append(events.StepsSeen(stream, *steps))
        return told

    def _look_closer(self, stream: StreamId, rank: LocalRank) -> Events:
        """A look that also tells a process that is stopped from one that waits for its next step: both write nothing."""
        before = rank.steps
        told = list(self.look(stream))
        if rank.steps is before and before is not None and stopped(rank.pidfd) != rank.stopped:
            rank.stopped = not rank.stopped
            told.append(events.StepsSeen(stream, *before, rank.stopped))
        return told

    def look_at_all(self) -> Events:
        """For the slow poll: completion words move without a bell."""
        return [event for stream, rank in self.ranks.items() if rank.stream.alive for event in self._look_closer(stream, rank)]

    def any_alive(self) -> bool:
        return any(rank.stream.alive for rank in self.ranks.values())

    def _rung(self, rank: LocalRank) -> Events:
        try:
            os.read(rank.bell, 8)
        except BlockingIOError:
            log.debug("a bell of %s was answered already", rank.stream.id)
        return self.look(rank.stream.id)

    def _watch(self, rank: LocalRank, bell: int, pidfd: int) -> None:
        """What is, or is about to be, this rank's: before anything of it is kept. Raises OSError where no more can be watched; then neither is."""
        os.set_blocking(bell, False)
        self._watches.watch(bell, lambda: self._rung(rank))
        try:
            self._watches.watch(pidfd, lambda: self._rank_died(rank))
        except OSError:
            self._watches.forget(bell)
            raise

    def _unwatch(self, rank: LocalRank) -> None:
        self._lifelines.let_go(rank.stream.id)
        if rank.watched:
            self._watches.forget(rank.bell)
            self._watches.forget(rank.pidfd)
            rank.watched = False

    # ---- leaving ------------------------------------------------------------------------------------------------------------------

    def detach(self, connection: int) -> Events:
        """A clean end of whatever attached over this connection."""
        self._arrivals.detach(connection)
        told: list[events.Event] = []
        for rank in [rank for rank in self.ranks.values() if rank.connection == connection and rank.stream.alive]:
            told += self.look(rank.stream.id)
            self._unwatch(rank)
            rank.stream.alive, rank.connection = False, 0
            told.append(events.StreamDetached(rank.stream.id, rank.stream.incarnation))
        return [*told, *self._standbys.detach(connection)]

    @property
    def releasing(self) -> int:
        """Pools, and arenas, that nobody needs any more and that are not closed yet."""
        return self._workers.releasing

    def disconnected(self, connection: int) -> None:
        """The socket went; the process may live on and come back."""
        self._arrivals.disconnected(connection)
        for rank in self.ranks.values():
            if rank.connection == connection:
                rank.connection = 0

    def _rank_died(self, rank: LocalRank) -> Events:
        return self._leave(rank, rank.killed or "its process ended")

    def _leave(self, rank: LocalRank, reason: str) -> list[events.Event]:
        told = list(self.look(rank.stream.id))
        self._unwatch(rank)
        rank.connection, rank.order = 0, None
        log.warning("%s: %s", rank.stream.id, reason)
        return [*told, *self._salvaging.begin(rank, reason)]

    def bring_out(self, stream: StreamId) -> bool:
        """Whether a dead engine's memory is on its way to where other processes can read it."""
        return self._salvaging.bring_out(self.ranks[stream])

    def forget(self, stream: StreamId) -> None:
        rank = self.ranks.pop(stream, None)
        if rank is not None:
            self._unwatch(rank)
            self._salvaging.unmap(rank.pool)
            for descriptor in (rank.table_descriptor, rank.pidfd, rank.bell):
                os.close(descriptor)

    def close(self) -> None:
        self._arrivals.close()
        self._lifelines.close()
        for stream in list(self.ranks):
            self.forget(stream)
        self._standbys.close()
        self._workers.close()

    # ---- orders (perform_node.Engines) --------------------------------------------------------------------------------------------

    def holding(self, stream: StreamId) -> Holding:
        rank = self.ranks[stream]
        return rank.facts.holding(rank.stream)

    def known(self, stream: StreamId, sequences: tuple[str, ...], counts: tuple[int, ...]) -> list[KnownIds]:
        rank = self.ranks[stream]
        return rank.facts.known(rank.stream, sequences, counts)

    def set_epoch(self, stream: StreamId, epoch: Epoch) -> None:
        self.ranks[stream].reader.set_epoch(epoch.counter)

    def order_restore(self, stream: StreamId, plan: PlanOrder) -> None:
        """Where the line is down, or dropped because the engine doesn't read it, the order is said when the engine is back; the coordinator has a deadline."""
        rank = self.ranks.get(stream)
        if rank is None or not rank.stream.alive or rank.stream.leaving:
            raise Refused(f"no engine of {stream} lives here: it can't be told to truncate. Try: kvguard status")
        rank.order = plan
        if not rank.connection or not self._tell(rank.connection, local.RestoreOrder(plan)):
            log.warning("the engine of %s is not connected: it is told to truncate when it is", stream)

    def claim(self, plan: PlanOrder, rebuild: Rebuild) -> None:
        spare = self.spares.get(rebuild.standby)
        if spare is None:
            raise Refused(f"standby {rebuild.standby} is not attached here. Try: another standby")
        pools = [source.stream for source in rebuild.sources if source.kind == "pool" and source.stream in self.ranks]
        descriptors: list[int] = []
        try:
            if pools:
                rank = self.ranks[pools[0]]
                if rank.stream.leaving:  # its files are about to be closed, in another thread
                    raise Refused(f"what is left of {rank.stream.id} is being copied to the host. Try: again in a moment")
                self._standbys.hand(spare, rank.stream.id, self.kill)
                descriptors += [os.dup(rank.table_descriptor), *rank.pool.export()]
                order = local.ClaimOrder(plan.instance, rebuild.rank, plan.epoch, plan, rebuild, True, rank.stream.id, rank.layout, ())
            else:
                replicas = []
                for source in rebuild.sources:
                    descriptor, pages = self._store.pages(source.stream)
                    descriptors.append(descriptor)
                    replicas.append(pages)
                spare.sources = tuple(source.stream for source in rebuild.sources)
                order = local.ClaimOrder(plan.instance, rebuild.rank, plan.epoch, plan, rebuild, False, None, None, tuple(replicas))
            if not self._tell(spare.connection, order, descriptors):
                raise Refused(f"standby {rebuild.standby} doesn't read its socket. Try: another standby")
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def restored(self, connection: int, message: local.Restored) -> Events:
        """An engine has carried out its part of a plan."""
        said = (one for one in self.ranks.values() if one.connection == connection and (one.layout is None or one.stream.id.rank == message.rank))
        rank = next(said, None)
        if rank is not None and rank.order is not None and rank.order.epoch.counter <= message.epoch.counter:
            rank.order = None
        stream = rank.stream.id if rank else StreamId(message.instance, message.rank, 0)
        told = self.look(stream) if rank else ()
        by_rung = tuple(sorted(message.bytes_by_rung.items()))
        endpoint = rank.stream.endpoint if rank else ""
        if message.error:
            self._scrub(connection)
        error = message.error or ("" if rank else "restored, but not attached as this rank")
        answer = events.EngineRestored(
            message.instance, stream.rank, message.epoch, stream, endpoint, error, by_rung, message.restore_ms, behind=message.behind
        )
        return [*told, answer]

    def _scrub(self, connection: int) -> None:
        """A pull failed: whatever the replicas hold that their sums don't vouch for goes before anybody plans with it again."""
        for stream in self._standbys.failed(connection):
            log.warning("a pull from the replica of %s failed: it is verified", stream)
            self._store.damaged(stream)

    def kill(self, incarnation: int) -> None:
        """SIGKILL through the pidfd: never through a number that may be another's by now. Processes are counted, not signals: one is told to die as often as a
        fence is said while it does."""
        ranks = [rank for rank in self.ranks.values() if rank.stream.alive and rank.stream.incarnation == incarnation]
        everyone = [*ranks, *(spare for spare in self.spares.values() if spare.incarnation == incarnation)]
        self._counters["processes_killed"] += any(not one.killed for one in everyone)
        for one in everyone:
            one.killed = "killed by its node's daemon"
            with contextlib.suppress(ProcessLookupError):  # dead and buried: its pidfd says so
                signal.pidfd_send_signal(one.pidfd, signal.SIGKILL)


def _table(arrival: Arrival, layout: Layout | None) -> tuple[TableReader, int]:
    """An engine's commit table, and a descriptor of it for whoever adopts it. Raises Refused where it is not for this layout."""
    from kvguard.engine.look import TableReader

    kept = os.dup(arrival[TABLE])
    try:
        reader = TableReader(arrival.take(TABLE))
        if layout is not None and (reader.geometry.blocks, reader.geometry.block_tokens) != (layout.blocks, layout.block_tokens):
            raise Refused(f"the table is of {reader.geometry.blocks} blocks of {reader.geometry.block_tokens}, the layout says otherwise")
    except BaseException:
        os.close(kept)
        raise
    return reader, kept
