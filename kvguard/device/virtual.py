"""A range of addresses with memory behind it that came, or can go, by descriptor: made, opened, handed on, and taken down in order.

Knows: driver.Virtual. Must not know: pools, cards, sockets.
Invariants: what is mapped here is unmapped before its addresses are given back; a handle is held only until it is mapped (the mapping holds the memory);
whatever fails half way leaves nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from kvguard.device.driver import Chunk, Virtual
from kvguard.errors import Refused


def created(virtual: Virtual, size: int) -> tuple[int, int]:
    """(a descriptor of new memory of at least `size` bytes, its bytes). The memory lives as long as the descriptor, or a mapping of it. Raises Refused."""
    whole = -(-size // virtual.granularity) * virtual.granularity
    handle = virtual.create(whole)
    try:
        return virtual.descriptor_of(handle), whole
    finally:
        virtual.release(handle)


def chunks_of(virtual: Virtual, address: int, size: int) -> list[Chunk] | None:
    """The chunks behind [address, address + size), first and last one whole; None where it is memory of another kind. Raises Refused for a hole in it."""
    found: list[Chunk] = []
    at = address
    while at < address + size:
        chunk = virtual.chunk_of(at)
        if chunk is None and not found:
            return None
        if chunk is None:
            raise Refused(f"nothing is mapped {at - address} bytes into the pool of {size}. Try: memory that is mapped whole")
        found.append(chunk)
        at = chunk.address + chunk.size
    return found


def descriptor_at(virtual: Virtual, chunk: Chunk) -> int:
    """A descriptor of a chunk that is mapped here; the caller's. Raises Refused where it was not made to be shared so."""
    handle = virtual.retained(chunk.address)
    try:
        return virtual.descriptor_of(handle)
    finally:
        virtual.release(handle)


class Segment:
    """Memory of other processes, mapped side by side. `address`, `size`: of all chunks."""

    def __init__(self, virtual: Virtual, sizes: Sequence[int], lots: Iterable[list[int]]) -> None:
        """`sizes`: of the chunks, in order; `lots`: their descriptors, some at a time, which are closed here. Raises Refused where the two don't fit."""
        self._virtual = virtual
        self._mapped: list[int] = []  # sizes
        self._mapped_bytes = 0
        self.size = sum(sizes)
        if not sizes or any(size % virtual.granularity for size in sizes):
            raise Refused(f"chunks of {min(sizes, default=0)} bytes: this GPU maps multiples of {virtual.granularity}. Try: memory of the same GPU")
        self.address = virtual.reserve(self.size)
        try:
            for lot in lots:
                self._map_all(sizes, lot)
            if len(self._mapped) != len(sizes):
                raise Refused(f"{len(self._mapped)} descriptors came for {len(sizes)} chunks. Try: Pool.export() of this version")
        except BaseException:
            self.close()
            raise

    def _map_all(self, sizes: Sequence[int], lot: list[int]) -> None:
        try:
            for descriptor in lot:
                if len(self._mapped) == len(sizes):
                    raise Refused(f"more descriptors came than {len(sizes)} chunks. Try: Pool.export() of this version")
                at, size = self.address + self._mapped_bytes, sizes[len(self._mapped)]
                handle = self._virtual.imported(descriptor)
                try:
                    self._virtual.map(at, size, handle)
                finally:
                    self._virtual.release(handle)
                self._mapped.append(size)
                self._mapped_bytes += size
        finally:
            for descriptor in lot:
                os.close(descriptor)

    def close(self) -> None:
        """Unmap, chunk by chunk, then give the addresses back. Idempotent. Raises DeviceLost, Refused; what is still mapped then stays so.

        Nothing that was launched may touch it any more: nothing is waited for here.
        """
        while self._mapped:
            size = self._mapped[-1]
            self._virtual.unmap(self.address + self._mapped_bytes - size, size)
            self._mapped.pop()
            self._mapped_bytes -= size
        if self.size:
            self._virtual.unreserve(self.address, self.size)
        self.size = 0
