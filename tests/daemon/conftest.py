"""An engine's two memories and the daemon's view of them, without processes; and what a test must let go before it counts what is left."""

from __future__ import annotations

import gc
import os

import numpy as np
import pytest

from kvguard.core import effects
from kvguard.daemon import capture as capturing
from kvguard.device.host import HostDevice
from kvguard.engine.look import TableReader
from kvguard.engine.table import TableWriter
from kvguard.format.rows import WRITTEN_AT, Geometry
from kvguard.types import Epoch, Fork, Rank, StreamId

ID = StreamId("llama", Rank(0, 1, 0), 7)


class Life:
    """An engine's two memories and the daemon's view of them."""

    def __init__(self, layout):
        self.pool = HostDevice().allocate(layout)
        np.frombuffer(self.pool.memory, np.uint8)[:] = np.random.default_rng(1).integers(0, 256, layout.pool_bytes, np.uint8)
        self.writer = TableWriter.create(Geometry(4, layout.blocks, layout.blocks, 64, layout.block_tokens))
        view = HostDevice().open(layout, self.pool.export(), writable=False)
        self.stream = capturing.Stream(ID, layout.shape(), view, TableReader(os.dup(self.writer.fd)), 1)
        self.facts = capturing.Facts()

    def commit(self, sequence, length, ids, blocks, sampler=None):
        self.writer.step += 1
        row = self.writer.sequences().get(sequence)
        if row is None:
            row = self.writer.open(sequence, (Fork(0, 0),), b"request")
        self.writer.commit(row, length, ids, blocks, sampler)
        self.writer.publish()
        self.writer.views.words[WRITTEN_AT // 8] = self.writer.step
        return row

    def look(self):
        found = capturing.as_event(ID, self.stream.table.look())
        self.facts.take(found)
        return found

    def order(self, pieces):
        """A Capture of (row, position, count, block, flag) with today's generations."""
        table = self.stream.table
        rows, starts, counts, blocks, flags = zip(*pieces, strict=True)
        of_rows, of_blocks = table.generations(rows, blocks)
        return effects.Capture(1, ID, Epoch(1, "c"), rows, tuple(of_rows.tolist()), starts, counts, blocks, tuple(of_blocks.tolist()), flags)


@pytest.fixture
def make_life():
    """Life(layout)."""
    return Life


@pytest.fixture
def let_go(caplog):
    """Call it before descriptors are counted: an error that was logged is kept by pytest, with its frames, with whatever was mapped in them."""

    def forget() -> None:
        for phase in ("setup", "call"):
            caplog.get_records(phase).clear()
        gc.collect()

    return forget
