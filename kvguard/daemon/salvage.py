"""What is left of a dead engine's GPU memory, brought into host memory before the mapping goes.

Knows: a rank's facts, its table, a pool that can be salvaged. Must not know: drivers, who restores it, plans.
Invariants: what a report says of a dead pool is what was brought out whole; the mapping is closed whatever happens, so that a restarted engine finds its memory
free; it takes no longer than it may, during which this thread does nothing else; after a fault of the GPU nothing is read.
"""

from __future__ import annotations

import logging
import os
import time

from kvguard.daemon.descriptors import same_file
from kvguard.daemon.seats import LocalRank
from kvguard.device.base import Pool
from kvguard.errors import KvguardError, Refused

log = logging.getLogger(__name__)


def salvaged(rank: LocalRank, salvage_ms_max: int) -> bool:
    """Whether the dead rank's pool can be planned with. A host pool is what it was; a GPU's is a host pool afterwards, or is gone with all its sequences."""
    salvage = getattr(rank.pool, "salvage", None)
    if salvage is None:
        return rank.layout is not None
    found = [(row, blocks) for row, committed in rank.facts.committed() if (blocks := _blocks(rank, row, committed)) is not None]
    found.sort(key=lambda one: len(one[1]))  # the most sequences in the time that there is
    began = time.monotonic()
    try:
        pool, whole = salvage([blocks for _, blocks in found], salvage_ms_max)
    except (KvguardError, OSError) as error:
        log.error("nothing of %s could be salvaged: %s", rank.stream.id, error)
        rank.facts.keep(())
        rank.pool.close()
        return False
    rank.facts.keep({row for row, _ in found[:whole]})
    rank.pool = rank.stream.pool = pool
    log.warning("%s: %d of %d sequences salvaged in %.0f ms", rank.stream.id, whole, len(found), 1000 * (time.monotonic() - began))
    return True


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


def goes_on_in(rank: LocalRank, pool: Pool) -> None:
    """The same blocks, in the successor's memory: what it says from now on counts."""
    rank.pool.close()
    rank.pool = rank.stream.pool = pool
    rank.stream.lost = ""


def _blocks(rank: LocalRank, row: int, committed: int) -> list[int] | None:
    """The blocks of [0, committed); None where the row is not whole, or was given up before the death."""
    needed = -(-committed // rank.stream.shape.block_tokens)
    content = rank.reader.read_row(row)
    if content is None or content.meta is None or rank.reader.row_generation(row) != content.head.generation or len(content.blocks) < needed:
        return None
    blocks, generations = content.blocks[:needed], content.block_generations[:needed]
    return list(blocks) if rank.reader.generations([], blocks)[1].tolist() == list(generations) else None
