"""How a serving process joins: as a rank, as a scheduler, or as a standby.

Knows: which parts make a guard. Must not know: steps, plans.
Invariants: every function returns at once, whether or not a daemon is there; what can't be right (a layout with faults, a claim for another rank) raises here.
"""

from __future__ import annotations

import os

from kvguard.device import open_device
from kvguard.engine.client import socket_path
from kvguard.engine.guard import Guard
from kvguard.engine.standby import Claim, Standby
from kvguard.engine.table import TableWriter
from kvguard.errors import BadConfig, BadFrame, Refused
from kvguard.format.layout import Layout
from kvguard.format.rows import Geometry
from kvguard.limits import BLOCKS_PER_ROW_MAX, IDS_PER_ROW_MAX, NAME_BYTES_MAX
from kvguard.types import NO_EPOCH, Epoch, Rank, StreamId

ROWS_DEFAULT = 256
POSITIONS_DEFAULT = 32768


def allocate(layout: Layout, device: str = "host"):
    """A KV pool in shareable memory (device.base.Pool; a host pool's `memory` is what tensors are made of). Raises BadConfig."""
    return open_device(device).allocate(layout)


def attach(
    instance: str, rank: Rank, pool, layout: Layout | None = None, *, endpoint: str = "", socket: str | os.PathLike | None = None, claim: Claim | None = None,
    epoch: Epoch = NO_EPOCH, rows: int = ROWS_DEFAULT, positions_max: int | None = None,
) -> Guard:  # fmt: skip
    """Become a rank: `pool` from allocate() or claim.adopt, of `layout` (pool.layout where it isn't given).

    `endpoint`: opaque, how the emitter reaches this rank. `rows`: sequences at once. `positions_max`: of the longest sequence. `claim`: what standby.wait gave;
    the guard enters no step until restore() is carried out. Raises BadConfig for a layout or sizes with faults, Refused for a claim of another rank.
    """
    layout = layout or pool.layout
    layout.check(layout.pool_bytes)
    _check_name(instance)
    if claim is not None and (claim.instance, claim.rank) != (instance, rank):
        raise Refused(f"the claim is of {claim.rank} of {claim.instance!r}, not {rank} of {instance!r}. Try: attach(claim.instance, claim.rank, ...)")
    if claim is not None and claim.adopt is not None:
        table, stream = claim.adopt[0], claim.order.stream
        if pool is not claim.adopt[1]:
            raise Refused("the claim brings the dead rank's pool. Try: attach(..., pool=claim.adopt[1])")
    else:
        table = _create(layout.blocks, layout.block_tokens, rows, positions_max)
        stream = StreamId(instance, rank, int.from_bytes(os.urandom(8), "little"))
    guard = Guard("rank", instance, rank, table, pool, layout, stream, endpoint, epoch)
    if claim is None:
        guard.connect(socket_path(socket))
    else:
        guard.claim = claim
    return guard


def attach_scheduler(
    instance: str, blocks: int, block_tokens: int, *, dp: int = 0, endpoint: str = "", socket: str | os.PathLike | None = None, epoch: Epoch = NO_EPOCH,
    rows: int = ROWS_DEFAULT, positions_max: int | None = None,
) -> Guard:  # fmt: skip
    """A scheduler beside a daemon: commits, truncates and releases without a pool of its own; block ids are those of the ranks' pools. Raises BadConfig.

    What it accepts is held elsewhere before the ranks' rows have it: their ids, not their KV. It is fenced and restored like a rank, but nobody waits for it.
    """
    _check_name(instance)
    rank = Rank(dp, 0, 0)
    guard = Guard("scheduler", instance, rank, _create(blocks, block_tokens, rows, positions_max), None, None, StreamId(instance, rank, 0), endpoint, epoch)
    guard.connect(socket_path(socket))
    return guard


def attach_standby(
    instance: str, layouts: dict[Rank | str, Layout], *, endpoint: str = "", socket: str | os.PathLike | None = None, device: str = "host",
) -> Standby:  # fmt: skip
    """A spare that can take any of the ranks in `layouts`. Raises BadConfig for a layout with faults."""
    _check_name(instance)
    for layout in layouts.values():
        layout.check(layout.pool_bytes)
    return Standby(instance, {str(rank): layout for rank, layout in layouts.items()}, endpoint, socket_path(socket), device)


def _check_name(instance: str) -> None:
    if not 0 < len(instance.encode()) <= NAME_BYTES_MAX:
        raise BadConfig(f"instance name {instance!r} must have 1..{NAME_BYTES_MAX} bytes. Try: a shorter one")


def _create(blocks: int, block_tokens: int, rows: int, positions_max: int | None) -> TableWriter:
    positions = min(positions_max or min(POSITIONS_DEFAULT, blocks * block_tokens), IDS_PER_ROW_MAX - 1)
    blocks_per_row = min(-(-(positions + 1) // block_tokens) + 1, BLOCKS_PER_ROW_MAX)
    try:
        return TableWriter.create(Geometry(rows, blocks, blocks_per_row, positions + 1, block_tokens))
    except BadFrame as error:
        raise BadConfig(f"{error}. Try: fewer rows, or a smaller positions_max") from error
