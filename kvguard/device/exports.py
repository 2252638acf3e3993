"""A pool as another process finds it: a card that names it, and behind the card the descriptors of its memory where it goes by descriptor.

Knows: cards, handles, chunks, pouches. Must not know: pools, layouts, rings.
Descriptors: [card] for an allocation that has a handle; [card, one for each chunk] up to DIRECT_MAX chunks, [card, pouch] beyond.
Invariants: what can't be shared is refused with what to set; every descriptor made or taken here is closed whatever happens.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

from kvguard.device import card, pouch
from kvguard.device.driver import HANDLE_BYTES, Chunk, Driver
from kvguard.device.virtual import Segment, chunks_of, created, descriptor_at
from kvguard.errors import Refused

DIRECT_MAX = 8  # beside a message, whose descriptors are bounded
NOT_SHAREABLE = (
    "the pool lies in virtual memory that was not made to be shared by descriptor: expandable segments of a torch before 2.5, with "
    "TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=0, or of a torch that took fabric handles; or another allocator's. "
    "Try: PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False, TORCH_CUDA_EXPANDABLE_SEGMENTS_IPC=1, or a pool from kvguard.engine.allocate or borrow"
)


def new_name() -> bytes:
    """Of memory by descriptor: two cards with one name are one memory, opened once."""
    return os.urandom(HANDLE_BYTES)


def exported(driver: Driver, address: int, size: int, name: bytes) -> list[int]:
    """Descriptors of this process's memory [address, address + size); the caller's. `name`: what to call it where it goes by descriptor. Raises Refused."""
    chunks = chunks_of(driver.virtual, address, size)
    if chunks is not None:
        return _by_descriptor(driver, address, size, name, chunks)
    found = driver.allocation_of(address)
    if not found.exportable:
        raise Refused(
            "the pool's memory has neither a handle nor a descriptor that another process could open (cudaMallocAsync, managed or imported memory?). "
            "Try: memory of cudaMalloc (PYTORCH_CUDA_ALLOC_CONF=backend:native,expandable_segments:False), or a pool from kvguard.engine.allocate"
        )
    return [card.write(card.Card("pool", driver.uuid, driver.handle_of(found.address), address - found.address, size))]


def _by_descriptor(driver: Driver, address: int, size: int, name: bytes, chunks: Sequence[Chunk]) -> list[int]:
    if not all(chunk.shareable for chunk in chunks):
        raise Refused(NOT_SHAREABLE)
    if len(chunks) > pouch.DESCRIPTORS_MAX:
        raise Refused(f"the pool lies in {len(chunks)} chunks, at most {pouch.DESCRIPTORS_MAX} can be shared. Try: kvguard.engine.allocate")
    runs = tuple((bytes_each, sum(1 for _ in same)) for bytes_each, same in itertools.groupby(chunk.size for chunk in chunks))
    made = (descriptor_at(driver.virtual, chunk) for chunk in chunks)
    behind: list[int] = []
    try:
        if len(chunks) > DIRECT_MAX:
            behind.append(pouch.filled(made))
        else:
            behind.extend(made)  # one by one: what was made before a fault is in the list
        return [card.write(card.Card("pool", driver.uuid, name, address - chunks[0].address, size, chunks=runs)), *behind]
    except BaseException:
        close_all(behind)
        raise


def lent(driver: Driver, size: int) -> list[int]:
    """Descriptors of new memory for an engine whose life it is to outlast; the caller's. Raises Refused where there isn't enough."""
    descriptor, whole = created(driver.virtual, size)
    try:
        return [card.write(card.Card("pool", driver.uuid, new_name(), 0, size, chunks=((whole, 1),), kept=True)), descriptor]
    except BaseException:
        os.close(descriptor)
        raise


def mapped(driver: Driver, terms: card.Card, descriptors: list[int]) -> Segment:
    """The memory of a card by descriptor, mapped here; `descriptors`: what came behind the card, taken. Raises Refused, DeviceLost."""
    sizes = terms.chunk_sizes()
    if len(sizes) > DIRECT_MAX and len(descriptors) == 1:
        with pouch.emptied(descriptors.pop()) as lots:
            return Segment(driver.virtual, sizes, lots)
    try:
        return Segment(driver.virtual, sizes, _one_by_one(descriptors))
    finally:
        close_all(descriptors)


def _one_by_one(descriptors: list[int]) -> Iterator[list[int]]:
    while descriptors:
        yield [descriptors.pop(0)]


def close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())
