"""Going on with a dead writer's table: the shadow is rebuilt from what readers could see, and cut to facts.

Knows: the table, and that its writer is dead (whoever hands over the descriptor has seen it die). Must not know: why, or what a plan will make of it.

Invariants
- What stays is each row's last complete version; what was staged, or half written, is as if it had never been.
- A position stays accepted only if its step's completion was seen: the next process counts steps on, and must not complete the dead one's.
- Where the dead writer had raised a generation and died before saying why, the row opens a new generation; nothing that was raised goes back.
"""

from __future__ import annotations

import numpy as np

from kvguard.engine.memory import U64
from kvguard.engine.table import TableWriter
from kvguard.errors import Refused
from kvguard.format import rows as fmt
from kvguard.format import tape

NUMBERS_END, TAPES_END = 1 << 62, 1 << 47  # nobody gets there by counting; beyond them there would soon be no next number


def rebuild(writer: TableWriter) -> None:
    """Fill the writer's private state from its table; publishes every row anew. Raises Refused, changing nothing, for a table that nobody can go on with."""
    views = writer.views
    given = (views.row_generations, views.block_generations, views.row_block_generations, views.heads[:, :, fmt.H_GENERATION])
    counter = max(writer.generations.counter, *(int(array.max()) for array in given))
    step = _last_step(writer)
    if max(counter, step, int(views.selectors.max())) >= NUMBERS_END or tape.split_word(writer.header[fmt.TAPE_AT // 8])[0] >= TAPES_END:
        raise Refused("the commit table's numbers are used up: its process must have written over it. Try: the replicas")
    writer.generations.counter, writer.step = counter, step
    writer.versions.numbers[:] = views.selectors
    memory = views.body
    touched = np.flatnonzero(views.selectors)
    kept = {row: found for row in touched.tolist() if (found := _last_version(memory, writer, row)) is not None}
    for row, found in kept.items():
        _take(writer, row, found)
    free = [row for row in range(writer.geometry.rows) if row not in kept]
    writer._free.clear()
    writer._free.extend(free)
    _close(writer, [row for row in free if views.selectors[row]])
    for row, found in kept.items():
        _mend(writer, row, found)
    writer.generations.raise_blocks(np.flatnonzero((writer.generations.references == 0) & (views.block_generations > 0)))
    for offset in (fmt.SUSPENDED_AT, fmt.SIZE_AT):
        views.words[offset // 8] = 0
    views.words[fmt.ENTERED_AT // 8] = views.words[fmt.LEFT_AT // 8] = writer.step


def _last_step(writer: TableWriter) -> int:
    """No step number of the dead process may be used again, whether or not it was ever completed."""
    words = writer.views.words
    used = [int(words[offset // 8]) for offset in (fmt.ENTERED_AT, fmt.LEFT_AT, fmt.WRITTEN_AT)]
    return max(*used, int(writer.views.heads[:, :, fmt.H_STEP].max()))


def _last_version(memory: memoryview, writer: TableWriter, row: int) -> fmt.Row | None:
    """The version that the selector names, or the one before where that one is torn, with its tape; None where no open version is whole."""
    version = int(writer.views.selectors[row])
    found = fmt.read_version(memory, writer.geometry, row, version)
    if found is None:
        found = fmt.read_version(memory, writer.geometry, row, version - 1)
    if found is None or not found.head.is_open:
        return None
    return tape.with_tape(memory, writer.geometry, found, writer.header[fmt.TAPE_AT // 8]) or found


def _take(writer: TableWriter, row: int, found: fmt.Row) -> None:
    """The row's ids and blocks go where its own are: the tape ends with its writer."""
    views = writer.views
    views.ids[row, : len(found.ids)] = found.ids
    views.row_blocks[row, : len(found.blocks)] = found.blocks
    views.row_block_generations[row, : len(found.blocks)] = found.block_generations
    fact = fmt.committed(found.head, writer.header[fmt.WRITTEN_AT // 8])
    head = found.head._replace(accepted=fact, prior=fact, base=fact, step=0, prior_step=0, tape=0, column=0)
    writer.versions.set(row, fmt.head_words(head))
    writer._names[found.meta.name] = row
    writer._metas[row] = found.meta
    np.add.at(writer.generations.references, np.array(found.blocks, np.intp), 1)


def _close(writer: TableWriter, rows: list[int]) -> None:
    """Rows without an open version read as released, in a generation of their own."""
    for row in rows:
        slot = writer.views.heads[row, int(writer.versions.numbers[row]) & 1, fmt.H_FLAGS] & U64(fmt.META_SLOT)
        closed = np.zeros(fmt.HEAD_WORDS, U64)
        closed[fmt.H_FLAGS] = slot
        closed[fmt.H_GENERATION] = writer.generations.raise_row(row)
        writer.versions.set(row, closed)
        writer.versions.publish_one(row)


def _mend(writer: TableWriter, row: int, found: fmt.Row) -> None:
    """Publish the row's facts; cut it where a generation had moved on without it."""
    views = writer.views
    moved = [n for n, block in enumerate(found.blocks) if views.block_generations[block] != found.block_generations[n]]
    writer.versions.publish_one(row)
    if moved:
        writer.truncate(row, min(writer.accepted(row), moved[0] * writer.geometry.block_tokens))
    elif int(views.row_generations[row]) != found.head.generation:
        writer.truncate(row, writer.accepted(row), keep_blocks=len(found.blocks))
