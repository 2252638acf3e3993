"""stream_out and stream_in: a sequence's KV from the ranks of one topology to those of another (pp and tp may both change).

Knows: layouts of both sides, pools, frames. Must not know: who decides that KV moves, addresses.
A transfer's frames are messages.KvFrame with one piece: session = transfer, nos = index of the old rank, starts and counts = positions, blocks = index of
the new rank, generations = the new rank's fingerprint, sums = xxh3_64 per token of this part. The payload is, token by token, the parts of the old rank's
canonical token that the new one needs, in the new one's order.

Invariants: a rank is whole when every old rank that owes it something has brought every position, in order; duplicates change nothing, so that a transfer cut
short is simply streamed again; nothing is written before its sums hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvguard.device.base import Pool
from kvguard.errors import BadFrame
from kvguard.format import pages, wire
from kvguard.format.layout import Layout
from kvguard.format.messages import PIECE_TOKENS, KvFrame
from kvguard.format.reshard import Move, reshard
from kvguard.limits import FRAME_BYTES_TARGET
from kvguard.stream.local import fetch, flush
from kvguard.transport.base import Transport
from kvguard.types import Epoch, Span


class Transfer(NamedTuple):
    """What both sides of a move know. `number`: random, non-zero, names the transfer. `old`, `new`: layouts by rank, in an order both sides share."""

    number: int
    epoch: Epoch
    old: Sequence[Layout]
    new: Sequence[Layout]
    span: Span


class Outgoing(NamedTuple):
    """One frame for new rank `target`."""

    target: int
    head: bytes
    payload: memoryview


def stream_out(transfer: Transfer, index: int, pool: Pool, blocks) -> Iterator[Outgoing]:
    """Frames of old rank `index`, whose pool holds the sequence in `blocks`. Raises BadConfig where the topologies don't fit each other."""
    owed = [_owed(moves, index) for moves in reshard(transfer.old, transfer.new)]
    width = pool.layout.token_bytes
    step = max(1, FRAME_BYTES_TARGET // width)
    number = 0
    for start in range(transfer.span.start, transfer.span.end, step):
        span = Span(start, min(start + step, transfer.span.end))
        tokens = np.frombuffer(flush(pool, blocks, span), dtype=np.uint8).reshape(-1, width)
        for target, moves in enumerate(owed):
            if not moves:
                continue
            part = np.concatenate([tokens[:, move.start : move.start + move.size] for move in moves], axis=1)
            payload = memoryview(part.reshape(-1))
            number += 1
            message = KvFrame(
                transfer.number, transfer.epoch, number, 0, (index,), (span.start,), (span.end - span.start,), (target,),
                (transfer.new[target].fingerprint,), (PIECE_TOKENS,), pages.pack_sums(pages.sums_of(payload, part.shape[1])),
            )  # fmt: skip
            yield Outgoing(target, wire.encode(message, payload.nbytes), payload)


class StreamIn:
    """New rank `index` of a transfer: takes frames in any interleaving of the old ranks, writes them to `blocks` of `pool`."""

    def __init__(self, transfer: Transfer, index: int, pool: Pool, blocks) -> None:
        """Raises BadConfig where the topologies don't fit each other."""
        moves = reshard(transfer.old, transfer.new)[index]
        self._owed = {source: _owed(moves, source) for source in sorted({move.source for move in moves})}
        self._have = dict.fromkeys(self._owed, transfer.span.start)
        self._transfer, self._index, self._pool, self._blocks = transfer, index, pool, blocks

    @property
    def position(self) -> int:
        """Positions below this are whole."""
        return min(self._have.values())

    @property
    def complete(self) -> bool:
        return self.position == self._transfer.span.end

    def receive(self, head: bytes, payload: memoryview) -> None:
        """Take one frame. Raises BadFrame for one that is damaged, of another transfer or rank, or that leaves a gap; nothing has changed then."""
        message, _ = wire.decode(head)
        source, span, part = self._checked(message, payload)
        have = self._have[source]
        if span.end <= have:
            return
        if span.start > have:
            raise BadFrame(f"rank {source} goes on at {span.start}, has brought {have}. Try: stream it out again")
        tokens = np.frombuffer(flush(self._pool, self._blocks, span), dtype=np.uint8).reshape(span.end - span.start, -1)
        at = 0
        for move in self._owed[source]:
            tokens[:, move.target : move.target + move.size] = part[:, at : at + move.size]
            at += move.size
        fetch(self._pool, self._blocks, span, tokens.reshape(-1))
        self._have[source] = span.end

    def _checked(self, message, payload: memoryview) -> tuple[int, Span, np.ndarray]:
        """The old rank, the positions, and [tokens, bytes] of a frame that belongs here and is sound."""
        transfer = self._transfer
        layout = transfer.new[self._index]
        if type(message) is not KvFrame or (message.session, message.epoch) != (transfer.number, transfer.epoch) or len(message.nos) != 1:
            raise BadFrame(f"not a frame of transfer {transfer.number}")
        source, span = message.nos[0], Span(message.starts[0], message.starts[0] + message.counts[0])
        if (message.blocks[0], message.generations[0]) != (self._index, layout.fingerprint) or source not in self._owed:
            raise BadFrame(f"a frame from rank {source} to rank {message.blocks[0]} isn't for rank {self._index} of this layout")
        width = sum(move.size for move in self._owed[source])
        tokens = span.end - span.start
        if not transfer.span.start <= span.start < span.end <= transfer.span.end or payload.nbytes != tokens * width:
            raise BadFrame(f"{payload.nbytes} bytes for positions [{span.start}, {span.end}), {width} each")
        if pages.pack_sums(pages.sums_of(payload, width)) != message.sums:
            raise BadFrame(f"checksum: positions [{span.start}, {span.end}) from rank {source} were damaged on the way")
        return source, span, np.frombuffer(payload, dtype=np.uint8).reshape(tokens, width)


class Sending:
    """Outgoing frames over a transport that never blocks: `pump` until it says True. `links`: by new rank."""

    def __init__(self, transport: Transport, links: Sequence[str], frames: Iterator[Outgoing]) -> None:
        self._transport, self._links, self._frames = transport, links, frames
        self._waiting: Outgoing | None = None

    def pump(self) -> bool:
        """Send what the links take now; True when all frames have been given to them."""
        while True:
            frame = self._waiting or next(self._frames, None)
            if frame is None:
                return True
            if not self._transport.send(self._links[frame.target], frame.head, frame.payload):
                self._waiting = frame
                return False
            self._waiting = None


def _owed(moves: Sequence[Move], source: int) -> tuple[Move, ...]:
    return tuple(move for move in moves if move.source == source)
