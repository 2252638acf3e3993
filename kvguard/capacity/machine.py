"""What this machine does to every byte that is protected, against memcpy of the same bytes: checksum, capture from a pool, append to an arena.

Knows: the calls that the daemon's loop makes for one frame (device, format.pages, store). Must not know: links, live pools, live stores: it makes its own.
Invariants: the very code that daemons run is measured, on one thread, as there; every figure stands beside memcpy of as many bytes in the same round; nothing
is left behind (memfds go with their descriptors).

The layout is a usual one: paged, a tensor per layer, 8 KV heads of 128 float16, so many layers that a token is about `bytes_per_token`; blocks of 16 tokens.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import numpy as np

from kvguard.device import open_device
from kvguard.device.base import Pool
from kvguard.format import pages
from kvguard.format.layout import Layout
from kvguard.format.messages import PIECE_TOKENS, Hello, IdsFrame, KvFrame, OpenOp, ReleaseOp
from kvguard.limits import FRAME_BYTES_TARGET, MIB
from kvguard.store.store import ReplicaStore
from kvguard.types import Epoch, Fork, Rank, StreamId

HEADS, HEAD_DIM, BLOCK_TOKENS = 8, 128, 16
LAYER_BYTES = 2 * HEADS * HEAD_DIM * 2  # K and V of a token in one layer, float16
LAYERS_MAX = 512
POOL_BYTES = 64 * MIB
COPY_BYTES = 64 * MIB  # more than most caches hold
STREAM = StreamId("bench", Rank(0, 0, 0), 1)
EPOCH = Epoch(1, "bench")


def layout_of(bytes_per_token: int) -> Layout:
    """The layout whose tokens come nearest."""
    layers = min(LAYERS_MAX, max(1, round(bytes_per_token / LAYER_BYTES)))
    blocks = max(2, POOL_BYTES // (layers * LAYER_BYTES * BLOCK_TOKENS))
    return Layout.per_layer("bench", "float16", layers, blocks, BLOCK_TOKENS, HEADS, HEAD_DIM)


class Copies:
    """Plain memcpy, `size` bytes at a time, through memory that no cache holds."""

    def __init__(self, size: int) -> None:
        self.size, self._at = size, 0
        self._from, self._to = np.ones(COPY_BYTES, np.uint8), np.zeros(COPY_BYTES, np.uint8)

    def __call__(self) -> int:
        if self._at + self.size > COPY_BYTES:
            self._at = 0
        span = slice(self._at, self._at + self.size)
        np.copyto(self._to[span], self._from[span])
        self._at += self.size
        return self.size


class Captures:
    """A decode step's slots: one token of each of as many blocks as fill a frame, gathered into a buffer; or whole blocks, as after a prefill."""

    def __init__(self, pool: Pool, whole: bool) -> None:
        layout = pool.layout
        self._pool, self._whole = pool, whole
        unit = layout.block_bytes if whole else layout.token_bytes
        self._count = max(1, min(layout.blocks, FRAME_BYTES_TARGET // unit))
        self._out = memoryview(bytearray(self._count * unit))
        self._random = np.random.default_rng(1)
        self.size = self._count * unit

    def __call__(self) -> int:
        blocks = self._random.choice(self._pool.layout.blocks, self._count, replace=False)
        if self._whole:
            return self._pool.capture_blocks(blocks, self._out)
        return self._pool.capture(blocks, self._random.integers(0, BLOCK_TOKENS, self._count), np.ones(self._count, np.int64), self._out)


class Appends:
    """A holder's part: frames of a growing sequence, each token's sum verified, then written to the arena. A full one is released, the next gets its pages."""

    def __init__(self, layout: Layout) -> None:
        self._shape = layout.shape()
        self._store = ReplicaStore(None, 4 * POOL_BYTES, 0)
        self._store.probe(Hello(STREAM, 1, EPOCH, "bench", self._shape))
        self._tokens = max(1, FRAME_BYTES_TARGET // self._shape.token_bytes)
        payload = os.urandom(self._tokens * self._shape.token_bytes)
        self._payload = memoryview(payload)
        self._sums = pages.sums_of(self._payload, self._shape.token_bytes)
        self.size = len(payload)
        self._no = self._position = self._ids = self._kv = 0
        self._open()

    def _open(self) -> None:
        released = (ReleaseOp(self._no),) if self._no else ()
        self._no, self._position, self._ids = self._no + 1, 0, self._ids + 1
        tokens = self._shape.blocks * BLOCK_TOKENS
        opened = OpenOp(self._no, f"s{self._no}", self._no, (Fork(1, 0),), b"")
        frame = IdsFrame(1, EPOCH, self._ids, (*released, opened), (self._no,), (0,), (tokens,), bytes(4 * tokens), (0,), b"")
        self._applied(self._store.apply_ids(1, frame))

    @staticmethod
    def _applied(done: tuple) -> None:
        refused, gap = done
        assert not refused and not gap, done

    def __call__(self) -> int:
        if self._position + self._tokens > self._shape.blocks * BLOCK_TOKENS:
            self._open()
        starts, counts, at, end = [], [], self._position, self._position + self._tokens
        while at < end:
            count = min(BLOCK_TOKENS - at % BLOCK_TOKENS, end - at)
            starts.append(at)
            counts.append(count)
            at += count
        self._position, self._kv, pieces = end, self._kv + 1, len(starts)
        blocks = tuple(start // BLOCK_TOKENS for start in starts)
        columns = ((self._no,) * pieces, tuple(starts), tuple(counts), blocks, (self._no,) * pieces, (PIECE_TOKENS,) * pieces)
        self._applied(self._store.apply_kv(1, KvFrame(1, EPOCH, self._kv, self._ids, *columns, pages.pack_sums(self._sums)), self._payload))
        return self.size

    def through(self) -> None:
        """Once over all pages, so that their memory is there."""
        for _ in range(self._shape.blocks * BLOCK_TOKENS // self._tokens):
            self()

    def close(self) -> None:
        self._store.close()


def measure(bytes_per_token: int, round_s: float = 0.05, rounds: int = 5, say: Callable[[str], None] = lambda line: None) -> dict:
    """{"cores", "layout", "rows"}: per deed its GB/s, memcpy's beside it, and their ratio, a median over rounds."""
    layout = layout_of(bytes_per_token)
    pool = open_device("host").allocate(layout)
    np.frombuffer(pool.memory, np.uint8)[:] = 1
    appends = Appends(layout)
    try:
        say("arena: first touch")
        appends.through()
        captured = memoryview(bytearray(os.urandom(FRAME_BYTES_TARGET)))

        def summed() -> int:
            pages.sums_of(captured, layout.token_bytes)
            return len(captured)

        whole = Copies(COPY_BYTES)
        deeds: tuple[tuple[str, Callable[[], int], int], ...] = (
            ("memcpy", whole, whole.size), ("checksum", summed, len(captured)), ("capture, decode", (decode := Captures(pool, False)), decode.size),
            ("capture, whole blocks", (blocks := Captures(pool, True)), blocks.size), ("arena append", appends, appends.size),
        )  # fmt: skip
        rows = [_compared(what, deed, size, round_s, rounds, say) for what, deed, size in deeds]
    finally:
        appends.close()
        pool.close()
    about = {"layers": len(layout.regions), "block_tokens": BLOCK_TOKENS, "token_bytes": layout.token_bytes}
    return {"cores": len(os.sched_getaffinity(0)), "layout": about, "rows": rows}


def _compared(what: str, deed: Callable[[], int], size: int, round_s: float, rounds: int, say: Callable[[str], None]) -> dict:
    copies, speeds, ratios = Copies(min(size, COPY_BYTES)), [], []
    for number in range(-1, rounds):  # the first only warms up
        say(what)
        pair = _speed(deed, round_s), _speed(copies, round_s)
        if number >= 0:
            speeds.append(pair)
            ratios.append(pair[0] / pair[1])
    mine, memcpy = (statistics.median(column) for column in zip(*speeds, strict=True))
    return {"what": what, "bytes_each": size, "gb_s": mine, "memcpy_gb_s": memcpy, "ratio": statistics.median(ratios), "ratio_low": min(ratios),
            "ratio_high": max(ratios), "rounds": rounds}  # fmt: skip


def _speed(deed: Callable[[], int], round_s: float) -> float:
    """GB/s of as many calls as fit into `round_s`, one at least."""
    started, done, now = time.perf_counter(), 0, 0.0
    while True:
        done += deed()
        now = time.perf_counter()
        if now - started >= round_s:
            return done / (now - started) / 1e9
