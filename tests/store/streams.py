"""A sender for store tests: frames over bytes that are a function of (sequence, generation, position), so that any span can be checked anywhere."""

from __future__ import annotations

import hashlib
import os
import struct

from kvguard.format import pages
from kvguard.format.messages import PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, CutOp, Hello, IdsFrame, KvFrame, OpenOp, ReleaseOp, StreamShape
from kvguard.store.shelf import new_memfd
from kvguard.types import Epoch, Fork, Rank, StreamId

STREAM = StreamId("i", Rank(0, 0, 0), 7)
EPOCH = Epoch(1, "c")
LINEAGE = (Fork(1, 0),)
SHAPE = StreamShape(99, 4, 24, 96, 64, True)
WHOLE = StreamShape(98, 4, 24, 96, 64, False)


class Kept:
    """A shelf whose descriptors outlive stores, as a service manager's do."""

    keeps = True

    def __init__(self) -> None:
        self.held: dict[str, int] = {}

    def create(self, name: str) -> int:
        self.remove(name)
        self.held[name] = new_memfd(name)
        return os.dup(self.held[name])

    def kept(self) -> dict[str, int]:
        return {name: os.dup(descriptor) for name, descriptor in self.held.items()}

    def remove(self, name: str) -> None:
        if name in self.held:
            os.close(self.held.pop(name))

    def close(self) -> None:
        for name in list(self.held):
            self.remove(name)


def token(key: str, position: int, size: int = SHAPE.token_bytes) -> bytes:
    return hashlib.shake_128(f"{key}/{position}".encode()).digest(size)


class Sent:
    """One session of a sender; numbers count up, `requires` is the last ids frame, as a sender on one lane would say."""

    def __init__(self, store, shape=SHAPE, stream=STREAM, epoch=EPOCH, session=1) -> None:
        self.store, self.shape, self.stream, self.epoch, self.session = store, shape, stream, epoch, session
        self.ids_number = self.kv_number = 0
        self.held = store.probe(Hello(stream, session, epoch, "n", shape))

    def ids(self, *ops, extend=()):
        """`extend`: (no, start, ids)."""
        self.ids_number += 1
        data = b"".join(struct.pack(f"<{len(ids)}I", *ids) for _, _, ids in extend)
        columns = zip(*((no, start, len(ids)) for no, start, ids in extend), strict=True) if extend else ((), (), ())
        nos, starts, counts = columns
        frame = IdsFrame(self.session, self.epoch, self.ids_number, tuple(ops), tuple(nos), tuple(starts), tuple(counts), data, (0,) * len(nos), b"")
        return self.store.apply_ids(self.session, frame)

    def open(self, no, name, count, generation=1, lineage=LINEAGE):
        return self.ids(OpenOp(no, name, generation, lineage, b"r"), extend=((no, 0, range(count)),))

    def cut(self, no, position, generation, lineage=LINEAGE):
        return self.ids(CutOp(no, position, generation, lineage))

    def release(self, no):
        return self.ids(ReleaseOp(no))

    def piece(self, no, key, start, count, block, generation=1, flag=None):
        """One piece with its bytes: (columns, bytes, sums)."""
        flag = flag if flag is not None else PIECE_TOKENS if self.shape.addressable else PIECE_BLOCK
        if flag == PIECE_REFERENCE:
            return (no, start, count, block, generation, flag), b"", b""
        if flag == PIECE_TOKENS:
            data = b"".join(token(key, start + n) for n in range(count))
            return (no, start, count, block, generation, flag), data, pages.pack_sums(pages.sums_of(memoryview(data), self.shape.token_bytes))
        data = token(f"{key}@{start + count}", start // self.shape.block_tokens, self.shape.block_bytes)
        return (no, start, count, block, generation, flag), data, pages.pack_sums(pages.sums_of(memoryview(data), self.shape.block_bytes))

    def kv(self, *pieces, requires=None, damage=None):
        self.kv_number += 1
        columns = tuple(zip(*(columns for columns, _, _ in pieces), strict=True))
        payload = bytearray(b"".join(data for _, data, _ in pieces))
        if damage is not None:
            payload[damage] ^= 1
        sums = b"".join(sums for _, _, sums in pieces)
        frame = KvFrame(self.session, self.epoch, self.kv_number, self.ids_number if requires is None else requires, *columns, sums)
        return self.store.apply_kv(self.session, frame, memoryview(payload))

    def fill(self, no, key, blocks, end, generation=1):
        """Positions [0, end) in `blocks`, in one frame."""
        tokens = self.shape.block_tokens
        spans = [(start, min(tokens, end - start)) for start in range(0, end, tokens)]
        return self.kv(*(self.piece(no, key, start, count, blocks[n], generation) for n, (start, count) in enumerate(spans)))
