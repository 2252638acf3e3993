"""Ranks without processes: the real RankLoad over a toy model whose logits are a function of the KV it reads, and a guard that checks as a commit table would.

A plan is carried out on them as a daemon would order it: rows cut, sequences that aren't named released, a lost rank rebuilt from copies.
"""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch

from kvguard.errors import Fenced
from kvguard.pipeline import replies
from kvguard.pipeline.rank import RankLoad
from kvguard.pipeline.scheduler import Bounds, Restored, Scheduler
from kvguard.pipeline.steps import STEP, Message

VOCAB = 31


class ToyModel:
    """First and last stage at once. KV of a position is its id (and a mark of its chunk's shape); logits hash all KV up to the position."""

    first = last = True
    layers = range(1)
    shape = SimpleNamespace(context=400, vocab=VOCAB, hidden=1)

    def forward(self, x, batch, kv, on_layer=None):
        out, row = [], 0
        for share in batch.shares:
            for position in range(*share.span):
                block, slot = share.blocks[position // batch.block_tokens], position % batch.block_tokens
                kv[0, 0, block, slot, 0, 0] = float(x[row])
                kv[0, 1, block, slot, 0, 0] = float(share.span.start if share.prefill else -1)  # bits depend on the shape they were computed in
                row += 1
            for position in range(share.span.end - share.logits, share.span.end):
                state = 1
                for read in range(position + 1):
                    cell = kv[0, :, share.blocks[read // batch.block_tokens], read % batch.block_tokens, 0, 0]
                    state = (state * 31 + int(cell[0]) * 7 + int(cell[1]) + 3) % 1_000_003
                out.append(np.random.default_rng(state).standard_normal(VOCAB).astype(np.float32))
        if on_layer is not None:
            on_layer(0)
        return torch.from_numpy(np.array(out, np.float32).reshape(-1, VOCAB))


class CheckedGuard:
    """What a commit table would refuse raises here. Publishing happens when the step is left; `cut_off` fences there instead."""

    def __init__(self, block_tokens: int):
        self.block_tokens = block_tokens
        self.table: dict[str, list] = {}  # sequence -> [length, blocks, ids, request]
        self.cut_off = False
        self.batched = 0

    @contextmanager
    def step(self, size: int):
        self._staged = {}
        yield self
        if self.cut_off:
            raise Fenced("the epoch is over")
        self.table |= self._staged

    def pulse(self) -> None:
        assert self._staged is not None

    def commit(self, sequence, length, blocks=(), tokens=(), sampler=None, request=None):
        assert sequence not in self._staged
        old = self.table.get(sequence)
        assert (old is None) == (request is not None), f"{sequence}: a request exactly with the first commit"
        old = old or [0, [], [], b""]
        row = [length, old[1] + list(blocks), old[2] + list(tokens), request or old[3]]
        assert old[0] <= length <= min(len(row[2]), len(row[1]) * self.block_tokens), (sequence, old, row)
        self._staged[sequence] = row
        return sequence

    def commit_batch(self, sequences, lengths, tokens=None, blocks=None):
        """Rows are names here; all else as one commit after the other."""
        for n, (sequence, length, token) in enumerate(zip(sequences, lengths.tolist(), tokens.tolist(), strict=True)):
            self.commit(sequence, length, (blocks or {}).get(n, ()), (token,))
            self.batched += 1

    def row(self, sequence):
        return sequence

    def truncate(self, sequence, position):
        row = self.table[sequence]
        assert sequence not in self._staged and position <= row[0]
        self.table[sequence] = [position, row[1][: -(-position // self.block_tokens)], row[2][:position], row[3]]

    def release(self, sequence):
        del self.table[sequence]


class ToyInstance:
    """A scheduler and ranks that all compute the whole model, so that any of them can be lost."""

    def __init__(self, bounds: Bounds, ranks: int = 2):
        self.bounds = bounds
        self.ranks = [self._rank() for _ in range(ranks)]
        self.scheduler = Scheduler(bounds)
        self.events: list[dict] = []

    def _rank(self) -> RankLoad:
        return RankLoad(ToyModel(), torch.full((1, 2, self.bounds.blocks, self.bounds.block_tokens, 1, 1), -9.0), CheckedGuard(self.bounds.block_tokens))

    def step(self, reach: int | None = None) -> bool:
        """One step on every rank, or (a fence strikes) only on the first `reach` of them; False when there is nothing to do."""
        step = self.scheduler.next_step()
        if step is None:
            self.events += self.scheduler.stuck()
            return False
        message = Message(STEP, 1, step.number, (), 0, step.facts, step.released)
        for number, rank in enumerate(self.ranks):
            assert rank.fault(message, memoryview(b"")) == ""
            if reach is None or number < reach:
                out = rank.run(message, memoryview(b""))
        if reach is None:
            self.events += self.scheduler.result(step.number, out.numpy())
            self.check()
        return True

    def finish(self) -> None:
        while self.step():
            pass

    def check(self) -> None:
        """Ranks, their tables and the scheduler say the same; no block is in two tables."""
        for rank in self.ranks:
            used = [block for row in rank.rows.values() for block in row.blocks]
            assert len(set(used)) == len(used)
            for name, row in rank.rows.items():
                assert [row.position, row.blocks, row.ids] == rank.guard.table[name][:3]
                if name in self.scheduler.tracks and not self.scheduler.tracks[name].error:
                    assert self.scheduler.tracks[name].position == row.position
                    assert tuple(row.blocks) == self.scheduler.pool.table(name)

    def recover(self, choose, lost: int, fresh: bool, forgotten: tuple[str, ...] = ()) -> list[dict]:
        """A plan carried out: `choose(name, longest)` is the position kept of at most `longest`; rank `lost` is rebuilt from its own copies elsewhere."""
        restored = []
        names = [name for name in self.ranks[0].guard.table if name not in forgotten]
        for name in names:
            rows = [rank.guard.table.get(name) for rank in self.ranks]
            ids = max((row[2] for row in rows if row), key=len)
            position = max(0, choose(name, min((row[0] if row else 0) for row in rows)))
            request = next(row[3] for row in rows if row)
            restored.append(Restored(name, position, tuple(ids), "replica" if position else "tokens", request))
        old = self.ranks[lost]
        self.ranks[lost] = self._rank()
        for token in restored:
            if token.sequence in old.guard.table:
                self.ranks[lost].guard.table[token.sequence] = old.guard.table[token.sequence]
                kept = old.guard.table[token.sequence][1]
                self.ranks[lost].kv[:, :, kept] = old.kv[:, :, kept]
        for rank in self.ranks:
            for name in list(rank.guard.table):
                if name not in names:
                    rank.guard.release(name)
            for token in restored:
                if token.sequence in rank.guard.table:
                    rank.guard._staged = {}
                    rank.guard.truncate(token.sequence, token.position)
            rank.adopt((name, row[0], row[1], row[2]) for name, row in rank.guard.table.items())
        states = [replies.unpack_state(rank.state()) for rank in self.ranks]
        if fresh:
            self.scheduler, self.events = Scheduler(self.bounds, 1 << 20), []
        self.scheduler.fenced()
        where, events = self.scheduler.resume(restored, states, fresh)
        self.events += events
        return where
