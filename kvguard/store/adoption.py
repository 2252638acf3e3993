"""Replicas of a former life of the daemon: read back from what a shelf kept, then verified page by page.

Knows: arenas, indexes, the budget. Must not know: sessions, epochs, when there is time to verify.
Invariants (I1, I11): what can't be read is dropped whole, with a reason; a page counts only under the generation that the index names and with sums that hold;
positions behind one that doesn't are cut; nothing is stated before it was verified (Replica.stated).
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterator
from typing import NamedTuple

from kvguard.format import pages
from kvguard.limits import IDS_PER_ROW_MAX, NAME_BYTES_MAX
from kvguard.store.arena import Arena
from kvguard.store.budget import Budget
from kvguard.store.index import Known, Loaded, Unreadable
from kvguard.store.replica import ID_BYTES, Replica, Sequence
from kvguard.types import StreamId

ARENA, INDEX = ".arena", ".index"
TOKEN_COST_BYTES = 4096  # what a token's own check costs, in bytes hashed


class Dropped(NamedTuple):
    """What was kept under `name` and is not any more."""

    name: str
    reason: str


def pairs(kept: dict[str, int]) -> Iterator[tuple[str, int | None, int | None]]:
    """(name without suffix, arena, index) of what a shelf kept; None for a half that isn't there. Other names are passed over, their descriptors closed."""
    stems = dict.fromkeys(name.rpartition(".")[0] for name in sorted(kept) if name.endswith((ARENA, INDEX)))
    for name, descriptor in kept.items():
        if not name.endswith((ARENA, INDEX)):
            os.close(descriptor)
    for stem in stems:
        yield stem, kept.get(stem + ARENA), kept.get(stem + INDEX)


def read_back(arena: int | None, index: int | None, owner: bytes, budget: Budget, belongs: Callable[[StreamId], bool]) -> Replica:
    """The replica that these two descriptors hold; they belong to it, or are closed. Its sequences are unchecked. `belongs`: whether a stream is kept under
    their name. Raises Unreadable."""
    opened = None
    try:
        if arena is None or index is None:
            raise Unreadable("its other half is missing")
        found = Loaded(index, owner)
        shape = found.head.shape
        if not belongs(found.head.stream):
            raise Unreadable(f"it is {found.head.stream}, under another's name")
        if os.fstat(arena).st_ino != found.head.inode or os.fstat(arena).st_size != shape.blocks * pages.page_bytes(shape):
            raise Unreadable("its arena is another one")
        opened = Arena(arena, shape, budget)
        replica = Replica(found.head.stream, shape, opened, budget)
    except (Unreadable, OSError, ValueError) as error:
        if opened is not None:
            opened.close()
        elif arena is not None:
            os.close(arena)
        if index is not None:
            os.close(index)
        raise Unreadable(str(error)) from error
    replica.index, replica.carried = found.index(), found.carried
    for number, known in found.sequences.items():
        adopt(replica, number, known, budget)
    opened.punch_unused(block for sequence in replica.sequences.values() for block in sequence.blocks)
    replica.index.rewrite(replica.changes.snapshot(replica.sequences.values(), replica.carried))
    return replica


def adopt(replica: Replica, number: int, known: Known, budget: Budget) -> None:
    """One sequence, as far as its pages are of the generations that the index names. What makes no sense, or doesn't fit the budget, is left out."""
    life, shape, arena = known.life, replica.shape, replica.arena
    blocks, generations = array("I", bytes(known.blocks)), array("Q", bytes(known.generations))
    if not 0 < len(life.name.encode()) <= NAME_BYTES_MAX or life.name in replica.sequences or len(blocks) != len(generations) or not life.lineage:
        return
    if len(known.ids) > IDS_PER_ROW_MAX * ID_BYTES or known.position > len(blocks) * max(shape.block_tokens, 1) or known.position < 0:
        return
    sequence = Sequence(life.name, life.generation, life.lineage, known.request)
    sequence.released, sequence.sampler = life.released, known.sampler
    sequence.expires_ns = int(life.delivered)  # when exactly isn't known any more: the store says from when on
    wanted = -(-known.position // shape.block_tokens)
    whole = 0
    while whole < wanted and blocks[whole] < shape.blocks and arena.generation(blocks[whole]) == generations[whole]:
        whole += 1
    position = min(known.position, whole * shape.block_tokens)
    fresh = len(dict.fromkeys(block for block in blocks[:whole] if not arena.refs[block]))
    size = len(known.ids) + len(known.request)
    if not budget.promise(size + fresh * arena.page_bytes):
        return
    budget.use(size)
    sequence.ids = known.ids
    for at, block in enumerate(blocks[:whole]):
        arena.adopt(block, min(shape.block_tokens, position - at * shape.block_tokens))
    sequence.blocks, sequence.position = blocks[:whole], position
    replica.sequences[life.name] = sequence
    if not life.released:
        replica.readmit(sequence)
    if position:
        replica.unchecked[life.name] = 0


def check(replica: Replica, cost_bytes: int) -> tuple[int, int]:
    """Verify unchecked positions of a replica for about `cost_bytes`. What doesn't hold is cut. Returns (cost left over, positions cut)."""
    shape, cut = replica.shape, 0
    while replica.unchecked and cost_bytes > 0:
        name, done = next(iter(replica.unchecked.items()))
        sequence = replica.sequences[name]
        if done >= sequence.position:
            del replica.unchecked[name]
            continue
        block = sequence.blocks[done // shape.block_tokens]
        count = min(shape.block_tokens, sequence.position - done)
        held = replica.sound(block, count)
        cost_bytes -= count * (shape.token_bytes + TOKEN_COST_BYTES)
        if held < count:
            gone = replica.cut_damaged(sequence, done + held)
            cut, replica.unsound = cut + gone, replica.unsound + gone
            replica.record()
        replica.unchecked[name] = min(done + count, sequence.position)
    return cost_bytes, cut


def scrubbing(replica: Replica) -> Iterator[tuple[int, int]]:
    """Verify everything that is held, which stays stated meanwhile, a page a step; what doesn't hold is cut. Yields (cost in bytes, positions cut)."""
    shape = replica.shape
    for sequence in replica.live():
        done = 0
        while replica.sequences.get(sequence.name) is sequence and done < sequence.position:
            count = min(shape.block_tokens, sequence.position - done)
            held = replica.sound(sequence.blocks[done // shape.block_tokens], count)
            done += count
            cut = replica.cut_damaged(sequence, done - count + held) if held < count else 0
            if cut:
                replica.record()
            yield count * (shape.token_bytes + TOKEN_COST_BYTES), cut


def doubt(replica: Replica) -> None:
    """All that is held is unchecked again."""
    replica.unsound = 0
    replica.unchecked = {sequence.name: 0 for sequence in replica.live() if sequence.position}


__all__ = ["ARENA", "INDEX", "Dropped", "adopt", "check", "doubt", "pairs", "read_back", "scrubbing"]
