"""What is left of a dead engine's GPU memory, brought into host memory before the mapping goes.

Knows: a rank's facts, its table, a pool that can be salvaged, the threads that read GPUs. Must not know: drivers, who restores it, plans.
Invariants: what a report says of a dead pool is what was brought out whole, and nothing else of it is captured; the mapping is closed whatever happens, so
that a restarted engine finds its memory free; it takes no longer than it may, beside the loop; after a fault of the GPU nothing is read. The death is suspected
at once and told when it is known what is left, so that a fencing round begins meanwhile, and waits for that only as far as it needs it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import NamedTuple

from kvguard.core import events
from kvguard.daemon.copies import gpu_of
from kvguard.daemon.descriptors import same_file
from kvguard.daemon.seats import LocalRank
from kvguard.daemon.workers import Job, Outcome, Workers
from kvguard.device.base import Pool, Salvageable
from kvguard.errors import Refused

log = logging.getLogger(__name__)


class Salvage(NamedTuple):
    """What is to be brought out of `pool`: (row, its blocks) of whole sequences, the short ones first, so that the most come out in the time that there is."""

    pool: Salvageable
    found: list[tuple[int, list[int]]]

    def carry(self, salvage_ms_max: int) -> tuple[Pool, int, float]:
        """(a host pool, how many of `found` are in it, ms taken); `pool` is closed, also where this raises KvguardError or OSError. In any thread."""
        began = time.monotonic()
        try:
            saved, whole = self.pool.salvage([blocks for _, blocks in self.found], salvage_ms_max)
        except BaseException:
            self.pool.close()
            raise
        return saved, whole, 1000 * (time.monotonic() - began)


def begun(rank: LocalRank) -> Salvage:
    """After the last look at the dead rank's table."""
    found = [(row, blocks) for row, committed in rank.facts.committed() if (blocks := _blocks(rank, row, committed)) is not None]
    found.sort(key=lambda one: len(one[1]))
    return Salvage(rank.pool, found)


def taken(rank: LocalRank, order: Salvage, outcome: Outcome) -> bool:
    """Whether the dead rank's pool can be planned with: it is a host pool from now on, or is gone with the KV of all its sequences."""
    if outcome.error is not None:
        log.error("nothing of %s could be salvaged: %s", rank.stream.id, str(outcome.error))
        rank.facts.keep(())
        rank.stream.kept = frozenset()
        return False
    saved, whole, ms = outcome.value
    rows = frozenset(row for row, _ in order.found[:whole])
    rank.facts.keep(rows)
    rank.stream.kept = rows
    rank.pool = rank.stream.pool = saved
    log.warning("%s: %d of %d sequences salvaged in %.0f ms", rank.stream.id, whole, len(order.found), ms)
    return True


class Salvaging:
    """`knows`: whether a rank is still one of this node's."""

    def __init__(self, workers: Workers, salvage_ms_max: int, knows: Callable[[LocalRank], bool]) -> None:
        self._workers, self._salvage_ms_max, self._knows = workers, salvage_ms_max, knows

    def begin(self, rank: LocalRank, reason: str) -> list[events.Event]:
        """Its process has ended, and was looked at for the last time: what the core hears of that now. A host pool is what it was."""
        if not hasattr(rank.pool, "salvage"):
            return [_died(rank, reason, rank.layout is not None)]
        order = begun(rank)
        job = Job(
            lambda: order.carry(self._salvage_ms_max), lambda outcome: self._ended(rank, order, reason, outcome), lambda: order.pool.copied_bytes,
            lambda value: value[0].close(),
        )  # fmt: skip
        rank.stream.leaving = True
        told = list(self._workers.put(gpu_of(order.pool), job, first=True))
        return [events.DeathSuspected(rank.stream.incarnation, rank.stream.id, reason), *told] if rank.stream.leaving else told

    def bring_out(self, rank: LocalRank) -> bool:
        """Whether a dead engine's memory that was kept for a successor is on its way into host memory: its sequences go on in instances that can't open it."""
        if rank.stream.leaving or not hasattr(rank.pool, "brought_out"):
            return rank.stream.leaving
        order, began, pool = begun(rank), time.monotonic(), rank.pool
        sequences = [blocks for _, blocks in order.found]

        def carry() -> tuple[Pool, int, float]:
            return *pool.brought_out(sequences, self._salvage_ms_max), 1000 * (time.monotonic() - began)

        job = Job(carry, lambda outcome: self._brought(rank, order, outcome), lambda: pool.copied_bytes, lambda value: value[0].close())
        rank.stream.leaving = True
        self._workers.put(pool.gpu, job)
        return rank.stream.leaving

    def _brought(self, rank: LocalRank, order: Salvage, outcome: Outcome) -> list[events.Event]:
        rank.stream.leaving = False
        if not outcome.begun:
            log.error("%s stays where it is: %s", rank.stream.id, str(outcome.error))
            return []
        self.unmap(order.pool)
        if self._knows(rank):
            taken(rank, order, outcome)
        elif outcome.error is None:
            self.unmap(outcome.value[0])
        return []

    def _ended(self, rank: LocalRank, order: Salvage, reason: str, outcome: Outcome) -> list[events.Event]:
        if not self._knows(rank):
            if outcome.error is None:
                self.unmap(outcome.value[0])
            return []
        if outcome.error is not None:
            self.unmap(order.pool)
        return [_died(rank, reason, taken(rank, order, outcome))]

    def unmap(self, pool: Pool) -> None:
        """A GPU's is closed in the thread that reads it, which may be at it. A host pool is read in the loop's alone, and by nobody once it is to go."""
        self._workers.release(gpu_of(pool), pool.close)


def _died(rank: LocalRank, reason: str, salvageable: bool) -> events.ProcessDied:
    rank.stream.alive = rank.stream.leaving = False
    return events.ProcessDied(rank.stream.incarnation, rank.stream.id, reason, salvageable)


def is_elsewhere(rank: LocalRank, descriptors: list[int]) -> bool:
    """Whether a successor brings another memory than the pool known here: a GPU's pool dies with its process, what was salvaged is in one of its own."""
    if rank.layout is None:
        return False
    try:
        former = rank.pool.export()
    except Refused:  # nothing could be salvaged
        return True
    try:
        return len(former) != len(descriptors) or not all(map(same_file, former, descriptors))
    finally:
        for descriptor in former:
            os.close(descriptor)


def goes_on_in(rank: LocalRank, pool: Pool) -> Pool:
    """The same blocks, in the successor's memory: what it says from now on counts. The former pool, to be closed."""
    former, rank.pool, rank.stream.pool = rank.pool, pool, pool
    rank.stream.lost, rank.stream.kept = "", None
    return former


def _blocks(rank: LocalRank, row: int, committed: int) -> list[int] | None:
    """The blocks of [0, committed); None where the row is not whole, or was given up before the death."""
    needed = -(-committed // rank.stream.shape.block_tokens)
    content = rank.reader.read_row(row)
    if content is None or content.meta is None or rank.reader.row_generation(row) != content.head.generation or len(content.blocks) < needed:
        return None
    blocks, generations = content.blocks[:needed], content.block_generations[:needed]
    return list(blocks) if rank.reader.generations([], blocks)[1].tolist() == list(generations) else None
