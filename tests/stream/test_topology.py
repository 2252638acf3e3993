"""KV moved between two topologies over a transport: the new ranks hold the same elements, whatever pp, tp, strides and interruptions."""

from __future__ import annotations

import itertools
from random import Random

import numpy as np
import pytest

from kvguard.device import open_device
from kvguard.errors import BadFrame, Refused
from kvguard.format.layout import Layout, Shard
from kvguard.stream import topology
from kvguard.stream.local import fetch, flush
from kvguard.transport.base import Frame
from kvguard.transport.inproc import Network
from kvguard.types import Epoch, Span

LAYERS, HEADS, DIM, TOKENS = 5, 4, 8, 4
SPAN = Span(3, 30)
BLOCKS = [9, 2, 5, 0, 7, 3, 8, 1]


def ranks(pp: int, tp: int, order: str) -> list[Layout]:
    def part(total, n, index):
        return (total * index // n, total * (index + 1) // n, total)

    shards = [Shard(part(LAYERS, pp, p), part(HEADS, tp, t)) for p, t in itertools.product(range(pp), range(tp))]
    sizes = [(s.layers[1] - s.layers[0], s.heads[1] - s.heads[0]) for s in shards]
    return [Layout.paged("m", "float32", n, 10, TOKENS, h, DIM, shard=s, order=order) for s, (n, h) in zip(shards, sizes, strict=True)]


def truth(layout: Layout, span: Span) -> bytes:
    """Every element names its place in the model."""
    (first, end, _), (head, head_end, _) = layout.shard.layers, layout.shard.heads
    everything = np.arange(100 * LAYERS * 2 * HEADS * DIM, dtype=np.float32).reshape(100, LAYERS, 2, HEADS, DIM)
    return everything[span.start : span.end, first:end, :, head:head_end].tobytes()


def filled(layout: Layout):
    pool = open_device("host").allocate(layout)
    fetch(pool, BLOCKS, Span(0, 32), truth(layout, Span(0, 32)))
    return pool


@pytest.mark.parametrize("old, new", [((1, 1), (2, 2)), ((3, 1), (2, 1)), ((1, 4), (2, 1)), ((2, 2), (5, 4)), ((2, 2), (2, 2))])
def test_new_ranks_hold_the_same_elements(old, new, monkeypatch):
    monkeypatch.setattr(topology, "FRAME_BYTES_TARGET", 4096)
    transfer = topology.Transfer(77, Epoch(1, "c"), ranks(*old, "layer,kv,block,slot,head,dim"), ranks(*new, "block,slot,layer,kv,head,dim"), SPAN)
    network = Network(Random(1))
    targets = []
    for index, layout in enumerate(transfer.new):
        end, pool = network.join(f"new{index}"), open_device("host").allocate(layout)
        end.listen(f"inproc://new{index}")
        targets.append((end, topology.StreamIn(transfer, index, pool, BLOCKS[::-1]), pool))
    sources = []
    for index, layout in enumerate(transfer.old):
        end, pool = network.join(f"old{index}"), filled(layout)
        links = [f"peer:new{target}" for target in range(len(targets))]
        for target, link in enumerate(links):
            end.dial(link, f"inproc://new{target}")
        sources.append((topology.Sending(end, links, topology.stream_out(transfer, index, pool, BLOCKS)), pool, end))
    pending = [sending for sending, _, _ in sources]
    for turn in range(1, 1000):
        network.advance(turn * 1_000_000)
        for _, _, end in sources:
            end.receive()  # the links come up
        pending = [sending for sending in pending if not sending.pump()]
        for end, stream_in, _ in targets:
            for incoming in end.receive():
                if isinstance(incoming, Frame):
                    stream_in.receive(incoming.head, incoming.payload)
        if all(stream_in.complete for _, stream_in, _ in targets):
            break
    assert not pending
    for layout, (_, stream_in, pool) in zip(transfer.new, targets, strict=True):
        assert stream_in.position == SPAN.end
        assert flush(pool, BLOCKS[::-1], SPAN) == truth(layout, SPAN)
        pool.close()
    for _, pool, _ in sources:
        pool.close()


@pytest.fixture
def moving(monkeypatch):
    """(frames of the only old rank, StreamIn of the only new one, its pool)."""
    monkeypatch.setattr(topology, "FRAME_BYTES_TARGET", 4096)
    transfer = topology.Transfer(77, Epoch(1, "c"), ranks(1, 1, "layer,kv,block,slot,head,dim"), ranks(1, 1, "block,slot,layer,kv,head,dim"), SPAN)
    source, target = filled(transfer.old[0]), open_device("host").allocate(transfer.new[0])
    yield list(topology.stream_out(transfer, 0, source, BLOCKS)), topology.StreamIn(transfer, 0, target, BLOCKS), target
    source.close()
    target.close()


def test_a_transfer_cut_short_is_streamed_again(moving):
    frames, stream_in, pool = moving
    assert len(frames) > 3
    for frame in frames[:2]:
        stream_in.receive(frame.head, frame.payload)
    with pytest.raises(BadFrame, match="Try: stream it out again"):
        stream_in.receive(frames[3].head, frames[3].payload)
    half = stream_in.position
    assert SPAN.start < half < SPAN.end and not stream_in.complete
    for frame in frames:
        stream_in.receive(frame.head, frame.payload)
    assert stream_in.complete and flush(pool, BLOCKS, SPAN) == truth(pool.layout, SPAN)


def test_damaged_or_foreign_frames_change_nothing(moving):
    frames, stream_in, pool = moving
    damaged = memoryview(bytearray(frames[0].payload))
    damaged[5] ^= 1
    with pytest.raises(BadFrame, match="checksum"):
        stream_in.receive(frames[0].head, damaged)
    with pytest.raises(BadFrame):
        stream_in.receive(frames[0].head, damaged[:-1])
    stranger = topology.StreamIn(stream_in._transfer._replace(number=78), 0, pool, BLOCKS)
    with pytest.raises(BadFrame, match="not a frame of transfer 78"):
        stranger.receive(frames[0].head, frames[0].payload)
    source = filled(stream_in._transfer.old[0])
    *_, beyond = topology.stream_out(stream_in._transfer._replace(span=Span(SPAN.start, SPAN.end + 1)), 0, source, BLOCKS)
    source.close()
    with pytest.raises(BadFrame, match=r"positions \[\d+, 31\)"):
        stream_in.receive(beyond.head, beyond.payload)
    assert stream_in.position == SPAN.start and not any(pool.memory)


def test_what_is_another_ranks_is_refused_though_it_would_fit():
    halves = topology.Transfer(77, Epoch(1, "c"), ranks(1, 1, "layer,kv,block,slot,head,dim"), ranks(1, 2, "layer,kv,block,slot,head,dim"), SPAN)
    source, target = filled(halves.old[0]), open_device("host").allocate(halves.new[0])
    stream_in = topology.StreamIn(halves, 0, target, BLOCKS)
    others = [frame for frame in topology.stream_out(halves, 0, source, BLOCKS) if frame.target == 1]
    with pytest.raises(BadFrame, match="isn't for rank 0"):
        stream_in.receive(others[0].head, others[0].payload)
    assert stream_in.position == SPAN.start and not any(target.memory)
    source.close()
    target.close()


def test_what_was_taken_already_is_not_written_again(moving):
    frames, stream_in, pool = moving
    for frame in frames:
        stream_in.receive(frame.head, frame.payload)
    np.frombuffer(pool.memory, np.uint8)[:] = 7  # the new rank goes on
    for frame in frames:
        stream_in.receive(frame.head, frame.payload)
    assert stream_in.complete and set(pool.memory) == {7}


def test_a_link_that_takes_nothing_for_now_loses_nothing(moving):
    frames, _, _ = moving
    taken, calls = [], []

    class Busy:
        def send(self, link: str, head: bytes, payload: memoryview) -> bool:
            calls.append(link)
            if len(calls) % 3 == 0:
                taken.append((link, head, payload))
            return len(calls) % 3 == 0

    sending = topology.Sending(Busy(), ["peer:new"], iter(frames))
    pumps = 1
    while not sending.pump():
        pumps += 1
    assert taken == [("peer:new", frame.head, frame.payload) for frame in frames] and pumps > len(frames)


def test_flush_reads_what_fetch_wrote():
    pool = open_device("host").allocate(ranks(1, 1, "block,head,slot,kv,dim,layer")[0])
    fetch(pool, BLOCKS, SPAN, truth(pool.layout, SPAN))
    assert flush(pool, BLOCKS, Span(5, 17)) == truth(pool.layout, Span(5, 17))
    with pytest.raises(Refused):
        flush(pool, BLOCKS, Span(0, 33))
    pool.close()
