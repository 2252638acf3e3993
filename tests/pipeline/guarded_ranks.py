"""Toy ranks with real guards, commit tables and shareable pools, without a daemon: plans reach them as a daemon would hand them over.

Survivors get a RestoreOrder; the lost rank's table and pool are adopted by a claim, as a standby does.
"""

from __future__ import annotations

import os
from types import SimpleNamespace

from kvguard import engine
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.format.lineage import forked
from kvguard.format.messages import PlanOrder
from kvguard.format.rows import EPOCH_AT
from kvguard.engine.table import TableWriter
from kvguard.engine.tensors import tensor_of
from kvguard.errors import Fenced
from kvguard.pipeline import replies
from kvguard.pipeline.rank import RankLoad
from kvguard.pipeline.scheduler import Restored, Scheduler
from kvguard.pipeline.stage import carry_out, view_of
from kvguard.pipeline.steps import STEP, Message
from kvguard.types import Epoch, Rank
from tests.pipeline.toy_ranks import ToyInstance, ToyModel

EPOCH_WORD = EPOCH_AT // 8


class GuardedInstance(ToyInstance):
    """As ToyInstance; `socket`: where no daemon listens. Close it."""

    def __init__(self, bounds, socket: str, ranks: int = 2):
        self._socket, self._counter = socket, 0
        self._made = 0
        super().__init__(bounds, ranks)

    def _rank(self) -> RankLoad:
        layout = Layout.paged("toy", "float32", 1, self.bounds.blocks, self.bounds.block_tokens, 1, 1)
        pool = engine.allocate(layout)
        guard = engine.attach("toy", Rank(0, self._made, 0), pool, layout, socket=self._socket, rows=32)
        self._made += 1
        return RankLoad(ToyModel(), view_of(tensor_of(pool), layout), guard)

    def check(self) -> None:
        for rank in self.ranks:
            table = rank.guard.table
            assert set(table.sequences()) == set(rank.rows)
            for name, row in rank.rows.items():
                at = table.row(name)
                assert [row.position, row.blocks, row.ids] == [table.accepted(at), table.blocks(at), table.ids(at).tolist()]

    def cut_step(self, number: int) -> None:
        """A step in which rank `number` is fenced between entering and leaving; later ones get nothing."""
        step = self.scheduler.next_step()
        if step is None:
            return
        message = Message(STEP, 1, step.number, (), 0, step.facts, step.released)
        for rank in self.ranks[:number]:
            rank.run(message, memoryview(b""))
        rank = self.ranks[number]
        rank.guard.pulse = lambda: rank.guard.table.header.__setitem__(EPOCH_WORD, self._counter + 1)
        try:
            rank.run(message, memoryview(b""))
        except Fenced:
            return
        finally:
            del rank.guard.pulse
        raise AssertionError("a step that was left in an epoch that is over published")

    def recover(self, choose, lost: int, fresh: bool, forgotten: tuple[str, ...] = ()) -> list[dict]:
        self._counter += 1
        epoch = Epoch(self._counter, "test")
        tables = [rank.guard.table for rank in self.ranks]
        every = list(dict.fromkeys(name for table in tables for name in table.sequences() if name not in forgotten))
        restored, lineages = [], []
        for name in every:
            rows = [table.sequences().get(name) for table in tables]
            known = max((table.ids(row).tolist() for table, row in zip(tables, rows, strict=True) if row is not None), key=len)
            metas = [table.meta(row) for table, row in zip(tables, rows, strict=True) if row is not None]
            if not known:
                continue  # a plan names no sequence without an id to go on with
            longest = min((0 if row is None else table.accepted(row)) for table, row in zip(tables, rows, strict=True))
            position = max(0, choose(name, longest))
            restored.append(Restored(name, position, tuple(known), "pool" if position else "tokens", metas[0].request))
            lineages.append(forked(metas[0].lineage, epoch.counter, position))
        names = tuple(token.sequence for token in restored)
        plan = PlanOrder(
            "toy", epoch, names, tuple(token.position for token in restored), tuple(token.rung for token in restored), tuple(lineages),
            tuple(len(token.ids) for token in restored), ("node",) * len(names), (self.ranks[0].guard.stream,) * len(names), (), (), (),
        )  # fmt: skip
        for number, rank in enumerate(self.ranks):
            rank.guard.table.header[EPOCH_WORD] = epoch.counter
            if number == lost:
                self._replace(number, plan)
            else:
                rank.guard.received(local.RestoreOrder(plan), [])
            load = self.ranks[number]
            carry_out(load, load.guard.restore(1.0))
            assert load.guard.epoch == epoch and not load.guard.fenced
        states = [replies.unpack_state(rank.state()) for rank in self.ranks]
        if fresh:
            self.scheduler, self.events = Scheduler(self.bounds, 1 << 20), []
        self.scheduler.fenced()
        where, events = self.scheduler.resume(restored, states, fresh)
        self.events += events
        return where

    def _replace(self, number: int, plan: PlanOrder) -> None:
        """The process is gone, its memory is not: a claim adopts table and pool."""
        old = self.ranks[number]
        pool, layout = old.guard.pool, old.guard.layout
        line = SimpleNamespace(say=lambda message: None, end=lambda timeout: None, connected=False, refused="")

        def become(guard) -> None:
            guard.session = line

        claim = SimpleNamespace(
            instance="toy", rank=old.guard.rank, epoch=plan.epoch, plan=plan, adopt=(TableWriter.adopt(os.dup(old.guard.table.fd)), pool), arenas=[],
            order=SimpleNamespace(stream=old.guard.stream), session=line, become=become,
        )  # fmt: skip
        guard = engine.attach("toy", claim.rank, pool, layout, claim=claim)
        old.guard.detach()
        self.ranks[number] = RankLoad(ToyModel(), view_of(tensor_of(pool), layout), guard)

    def close(self) -> None:
        for rank in self.ranks:
            rank.guard.detach(timeout_s=0.1)
