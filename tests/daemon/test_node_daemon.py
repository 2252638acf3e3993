"""A node's daemon in one piece, in this process: what its parts are given of each other."""

from __future__ import annotations

import os
import threading

import pytest

from kvguard.config import NodeConfig
from kvguard.daemon.moments import Moments
from kvguard.daemon.node import NodeDaemon
from kvguard.daemon.notify import Notifier
from kvguard.format.messages import Hello, StreamShape
from kvguard.pipeline.ports import free_ports
from kvguard.store.arena import Arena
from kvguard.types import NO_EPOCH, Rank, StreamId

STREAM = StreamId("llama", Rank(0, 0, 0), 7)


@pytest.fixture
def daemon(tmp_path):
    [port] = free_ports(1)
    config = NodeConfig(
        name="a", listen="tcp://127.0.0.1:0", coordinator=f"tcp://127.0.0.1:{port}", runtime_dir=str(tmp_path), arena_bytes=1 << 20, keep_replicas="no"
    )
    made = NodeDaemon(config, Notifier({}), Moments())
    yield made
    made.close()


def test_a_dropped_replica_is_unmapped_beside_the_loop(daemon, monkeypatch):
    """Its pages are freed for a quarter of a second a GiB."""
    store, where, let = daemon.shell.store, [], threading.Event()
    unmap = Arena._unmap

    def unmapped(arena):
        assert let.wait(30)
        where.append(threading.current_thread().name)
        unmap(arena)

    monkeypatch.setattr(Arena, "_unmap", unmapped)
    assert not store.probe(Hello(STREAM, 77, NO_EPOCH, "b", StreamShape(1, 4, 10, 40, 64, True))).reason
    descriptor = store.replica(STREAM).arena.export()
    inode = os.fstat(descriptor).st_ino
    os.close(descriptor)
    store.drop(STREAM)
    assert store.streams() == () and store.budget.used == 0 and daemon.ranks.releasing == 1
    assert not store.probe(Hello(STREAM, 78, NO_EPOCH, "b", StreamShape(1, 4, 10, 40, 64, True))).reason, "the next one has its own"
    assert store.replica(STREAM).arena.inode() != inode
    let.set()
    while daemon.ranks.releasing:
        daemon.loop.turn(1.0)
    assert where == ["kvguard-host"]
