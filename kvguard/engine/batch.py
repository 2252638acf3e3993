"""Many rows committed at once, whatever their lengths: the vectorised way, for steps that a tape can't take.

Knows: columns of rows, lengths, ids, blocks. Must not know: tapes, publishing.
Invariants: a batch that can't be raises ValueError before anything has changed.
"""

from __future__ import annotations

import numpy as np

from kvguard.engine.memory import U64
from kvguard.format import rows as fmt


def stage(writer, rows: np.ndarray, lengths: np.ndarray, new: np.ndarray | None, blocks: dict | None) -> bool:
    """TableWriter.commit_batch for rows that are distinct rows of the table: int64 [n] rows and lengths, u64 [n] ids (overwritten here) or None.

    True where every row went on by one position and one id, as a tape would take them.
    """
    versions = writer.versions
    heads = versions.heads.take(rows, 0)
    signed = heads.view(np.int64)
    known = signed[:, fmt.H_IDS]
    slots = versions.slots.take(rows)
    if blocks:
        _count_blocks(writer, blocks, heads, slots)
    bound = np.minimum(known if new is None else known + 1, slots)
    bad = lengths > bound
    bad |= lengths < signed[:, fmt.H_ACCEPTED]
    if bad.any():
        _explain(writer, rows, heads, lengths, known + (new is not None), slots)
    plain = new is not None and bool((lengths == signed[:, fmt.H_ACCEPTED] + 1).all())
    if new is not None:
        try:
            writer.views.ids[rows, known] = new
        except IndexError:  # nothing is stored then
            _explain(writer, rows, heads, lengths, known + 1, slots)
            raise
        multipliers = writer.views.id_multipliers.take(known)
        new *= multipliers
        new += multipliers  # (id + 1) * multiplier
        heads[:, fmt.H_IDS_HASH] += new
        signed[:, fmt.H_IDS] += 1
    for index, appended in (blocks or {}).items():
        for block in map(int, appended):
            versions.list_block(int(rows[index]), heads[index], block, versions.block_generations[block])
    _shift(writer, heads)
    signed[:, fmt.H_ACCEPTED] = lengths
    versions.keep(rows, heads)
    return plain


def _count_blocks(writer, blocks: dict, heads: np.ndarray, slots: np.ndarray) -> None:
    """Add what a batch appends to `slots` [n]. Raises ValueError."""
    geometry = writer.geometry
    for index, appended in blocks.items():
        for block in appended:
            if not 0 <= block < geometry.blocks:
                raise ValueError(f"block {block} is not one of the pool's {geometry.blocks}")
        if int(heads[index, fmt.H_BLOCKS]) + len(appended) > geometry.blocks_per_row:
            raise ValueError(f"over {geometry.blocks_per_row} blocks in one row. Try: attach with positions_max= as long as the longest sequence")
        if slots[index] >= 0:
            slots[index] += len(appended) * geometry.block_tokens


def _explain(writer, rows, heads, lengths, total, slots) -> None:
    """Raises ValueError for the first row of a batch that can't be."""
    columns = (column.tolist() for column in (rows, heads, lengths, total, slots))
    for row, head, length, ids, room in zip(*columns, strict=True):
        if not head[fmt.H_FLAGS] & fmt.OPEN:
            raise ValueError(f"row {row} holds no sequence: released?")
        check(writer, row, head, length, ids, room // writer.geometry.block_tokens)


def check(writer, row: int, head: list[int], length: int, ids: int, blocks: int) -> None:
    """Raises ValueError where a commit says what can't be: `length` positions in so many ids and blocks, behind what is accepted, or over the table."""
    geometry, name = writer.geometry, writer.meta(row).name
    slots = blocks * geometry.block_tokens
    if ids > geometry.ids_per_row or blocks > geometry.blocks_per_row:
        raise ValueError(
            f"sequence {name!r}: {ids} ids in {blocks} blocks are over the table's {geometry.ids_per_row} and {geometry.blocks_per_row}. "
            "Try: attach with positions_max= as long as the longest sequence"
        )
    if length > slots:
        raise ValueError(f"sequence {name!r}: {length} positions are beyond the block list's {slots}. Try: pass the new blocks with this commit")
    if length > ids:
        raise ValueError(f"sequence {name!r}: {length} positions, but only {ids} token ids are known. Try: tokens= with every commit")
    if length < head[fmt.H_ACCEPTED]:
        raise ValueError(f"sequence {name!r}: commit of {length} is behind {head[fmt.H_ACCEPTED]}. Try: truncate")


def _shift(writer, heads: np.ndarray) -> None:
    """What was accepted before this step becomes `prior` (format.rows.shifted)."""
    written, steps, accepted = writer.header[fmt.WRITTEN_AT // 8], heads[:, fmt.H_STEP], heads[:, fmt.H_ACCEPTED]
    if (again := steps == writer.step).any():
        rows = np.flatnonzero(~again)  # a second commit of one step shifts nothing
        if len(rows):
            earlier = heads[rows]
            _shift(writer, earlier)
            heads[rows] = earlier
        return
    older = np.where(U64(written) >= heads[:, fmt.H_PRIOR_STEP], heads[:, fmt.H_PRIOR], heads[:, fmt.H_BASE])
    heads[:, fmt.H_BASE] = np.where(U64(written) >= steps, accepted, older)
    heads[:, fmt.H_PRIOR] = accepted
    heads[:, fmt.H_PRIOR_STEP] = steps
    heads[:, fmt.H_STEP] = writer.step


def as_ids(ids) -> np.ndarray:
    """Token ids as a new u64 array. Raises ValueError outside 0 .. 2**32 - 1."""
    array = np.asarray(ids)
    if not array.size:
        return np.zeros(0, U64)
    wide = array.astype(U64)  # a negative one becomes a huge one
    if array.dtype.kind not in "iu" or int(np.maximum.reduce(wide, axis=None)) >> 32:
        raise ValueError(f"token ids must be integers within 0..{2**32 - 1}, got {array.dtype}. Try: plain ids without padding marks")
    return wide
