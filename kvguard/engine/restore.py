"""Carrying out what a plan says of one rank, inside the engine's process: truncate, release, pull.

Knows: a plan's columns, replica pages, the table. Must not know: how the plan was made, where the pages came from.

Invariants
- Nothing is pulled without its checksum: a page that doesn't match fails the restore, loudly; it is never used.
- A sequence ends at the plan's position with ids [0, position) and the plan's lineage, whatever it had before; one that the plan doesn't name is released,
  and so is another one that bears the name of one that it names: nothing of its KV or ids is taken for that one's.
- A row is published only when all of its KV is in the pool.
- A pull ends by its deadline: then it has failed, as a whole.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from kvguard.engine.pull import pull_pages, token_counts
from kvguard.errors import BadFrame, DeviceLost, Refused, Stale, TimedOut
from kvguard.format import local
from kvguard.format.clashes import clashes
from kvguard.format.lineage import birth_of, is_other
from kvguard.format.messages import PlanOrder
from kvguard.format.pages import PageReader
from kvguard.types import Epoch, Lineage, Rung


PULL_S_MAX = 120.0


class RestoredSequence(NamedTuple):
    """One sequence as it stands now: KV and ids for [0, position), in `blocks`."""

    name: str
    position: int
    lineage: Lineage
    blocks: tuple[int, ...]


class Restored:
    """The new state of a rank. `epoch`: adopted by done(). `sequences`: in the plan's order, those with a position here. `bytes_by_rung`: KV pulled."""

    def __init__(self, guard, epoch: Epoch, plan: PlanOrder | None) -> None:
        self._guard, self._plan, self._claim = guard, plan, None
        self._since = time.monotonic()
        self.epoch = epoch
        self.sequences: tuple[RestoredSequence, ...] = ()
        self.bytes_by_rung: dict[str, int] = {}

    @classmethod
    def of_nothing(cls, guard) -> Restored:
        """No fence is up: nothing was to be done."""
        return cls(guard, guard.epoch, None)

    @classmethod
    def of_order(cls, guard, plan: PlanOrder) -> Restored | None:
        """A survivor, cut to the plan; None where another plan must come first."""
        restored = cls(guard, plan.epoch, plan)
        return restored if restored._cut() else None

    @classmethod
    def of_claim(cls, guard, claim) -> Restored:
        """A claimed rank: cut to the plan where its pool was adopted, else still to be pulled."""
        restored = cls(guard, claim.plan.epoch, claim.plan)
        restored._claim = claim
        if claim.adopt is not None:
            restored._cut()
            named = {sequence.name for sequence in restored.sequences}
            rungs = {rung for name, rung in zip(claim.plan.sequences, claim.plan.rungs, strict=True) if name in named}
            restored.bytes_by_rung = dict.fromkeys(sorted(rungs & {Rung.POOL}), 0)  # adopted as it is: nothing was moved
        return restored

    # ---- survivors ----------------------------------------------------------------------------------------------------------------

    def _cut(self) -> bool:
        """False where a survivor has less than was reported of it. A step that was entered before the fence may truncate and release after the report, once:
        what is reported for the next plan is what the plan finds."""
        plan, table = self._plan, self._guard.table
        live = self._live_of_the_plan()
        if self._guard.pool is None:
            self._cut_ids(live)
            return True
        short = [
            f"{name}: {table.accepted(live[name]) if name in live else 0} < {position}"
            for name, position in zip(plan.sequences, plan.positions, strict=True)
            if position > (table.accepted(live[name]) if name in live else 0)
        ]
        if short:
            reason = f"the plan wants more than this rank has: {', '.join(short[:3])}"
            if self._claim is not None or self._guard.behind not in (None, self.epoch):
                self.failed(reason)
            self._guard.behind = self.epoch
            self._say_failed(reason, behind=True)
            return False
        for name, row in live.items():
            if name not in set(plan.sequences):
                table.release(row)
        found = []
        for name, position, lineage, ids in zip(plan.sequences, plan.positions, plan.lineages, plan.ids, strict=True):
            if name in live:
                table.truncate(live[name], position, lineage, keep_ids=ids)  # beyond what the plan knows, whoever goes on may choose others
                found.append(RestoredSequence(name, position, lineage, tuple(table.blocks(live[name]))))
        self.sequences = tuple(found)
        return True

    def _live_of_the_plan(self) -> dict[str, int]:
        """Names and rows, when those that are of another birth than the plan says have been released: the scheduler had given their names away again."""
        plan, table = self._plan, self._guard.table
        live, births = table.sequences(), plan.births_by_name()
        for name in [name for name, row in live.items() if is_other(birth_of(table.meta(row).request), births.get(name, 0))]:
            table.release(live.pop(name))
        return live

    def _cut_ids(self, live: dict[str, int]) -> None:
        """A scheduler, without KV: what it has accepted is cut to the plan, what it hasn't it need not have."""
        plan, table = self._plan, self._guard.table
        planned = dict(zip(plan.sequences, zip(plan.positions, plan.lineages, plan.ids, strict=True), strict=True))
        if any(rank.dp == self._guard.rank.dp for rank in plan.moved):
            planned = {}  # they go on elsewhere, under other names
        found = []
        for name, row in live.items():
            if name not in planned:
                table.release(row)
                continue
            position, lineage, ids = planned[name]
            position = min(position, table.accepted(row))
            table.truncate(row, position, lineage, keep_ids=ids)
            found.append(RestoredSequence(name, position, lineage, tuple(table.blocks(row))))
        self.sequences = tuple(found)

    # ---- claims -------------------------------------------------------------------------------------------------------------------

    def pull(self, remap: Callable[[int], int] | None = None, timeout_s: float = PULL_S_MAX) -> tuple[RestoredSequence, ...]:
        """Copy the replicas' verified blocks into the pool and publish the rows. Returns `sequences`; [] was to be pulled where the pool was adopted.

        `remap`: block id in the replica -> block id here; by default they stay the same, so that a scheduler's block tables stay valid.
        Raises Refused: a page whose sum or generation doesn't hold, a replica that lacks what the plan names, blocks that this pool doesn't have,
        not everything here within `timeout_s`, a GPU that had a fault.
        """
        claim = self._claim
        if claim is None or claim.adopt is not None:
            return self.sequences
        pulls = [_Pull(self._guard.pool, pages, fd, remap) for pages, fd in zip(claim.order.replicas, claim.arenas, strict=True)]
        try:
            self.sequences = tuple(self._stage_one(n, name, pulls) for n, name in enumerate(self._plan.sequences) if self._is_sourced(n))
            found = clashes(self._plan, claim.order.rebuild, {pull.pages.stream: pull.pages for pull in pulls})
            if found:  # the daemon looks before it claims: this is the last line
                raise Refused(f"{len(found)} copies, of {found[0].sequence!r} among others, claim blocks that copies of another life have otherwise")
            due = time.monotonic() + timeout_s
            for pull in pulls:
                pull.carry(due)
        except (BadFrame, Stale, Refused, TimedOut, DeviceLost, ValueError) as error:
            self._guard.table.roll_back()
            self.failed(f"pulling failed: {error}")
        finally:
            for pull in pulls:
                pull.close()
        self._guard.table.publish()
        return self.sequences

    def _is_sourced(self, n: int) -> bool:
        return self._claim.order.rebuild.source[n] >= 0 and self._plan.positions[n] > 0

    def _stage_one(self, n: int, name: str, pulls: list[_Pull]) -> RestoredSequence:
        """Its row, not published yet; its blocks are the pull's to carry."""
        plan, table = self._plan, self._guard.table
        source = self._claim.order.rebuild.sources[self._claim.order.rebuild.source[n]]
        pull = next((pull for pull in pulls if pull.pages.stream == source.stream), None)
        if pull is None:
            raise Refused(f"sequence {name!r}: its source {source.stream} did not come with the claim")
        position, lineage = plan.positions[n], plan.lineages[n]
        blocks, column, moved = pull.sequence(name, position, plan.births[n] if plan.births else 0)
        ids = np.frombuffer(pull.pages.ids[column], "<u4")[: max(position, plan.ids[n])]
        table.step = max(table.step, 0)
        row = table.open(name, lineage, pull.pages.requests[column])
        table.commit(row, position, ids, blocks, pull.pages.samplers[column])
        rung = plan.rungs[n]
        self.bytes_by_rung[rung] = self.bytes_by_rung.get(rung, 0) + moved
        return RestoredSequence(name, position, lineage, tuple(blocks))

    # ---- the end ------------------------------------------------------------------------------------------------------------------

    def done(self) -> None:
        """Adopt the epoch and say so: the next step may be entered."""
        if self._plan is None:
            return
        guard = self._guard
        answer = local.Restored(guard.instance, guard.rank, self.epoch, "", dict(self.bytes_by_rung), 1e3 * (time.monotonic() - self._since))
        claim, self._claim = self._claim, None
        if claim is not None:
            guard.epoch = self.epoch  # the Attach of the rank says it, and goes out first
            claim.become(guard)
        guard.adopt(self.epoch, answer)

    def failed(self, reason: str) -> None:
        """Tell the daemon that this rank can't be restored; raises Refused."""
        raise Refused(f"{self._say_failed(reason)}. Try: kvguard history, and starting the rank empty")

    def _say_failed(self, reason: str, behind: bool = False) -> str:
        guard = self._guard
        message = f"rank {guard.rank} of {guard.instance!r}: {reason}"
        session = guard.session or (self._claim.session if self._claim is not None else None)
        if session is not None:
            session.say(local.Restored(guard.instance, guard.rank, self.epoch, message, behind=behind))
        return message


class _Pull:
    """What one replica's pages are to bring into the pool; blocks that sequences share are copied once, as far as the longest of them goes."""

    def __init__(self, pool, pages: local.ReplicaPages, descriptor: int, remap: Callable[[int], int] | None) -> None:
        if pages.shape.fingerprint != pool.layout.fingerprint:
            raise Refused(f"the replica of {pages.stream} is of another layout than this pool. Try: a standby of the same model, dtype and shard")
        self.pool, self.pages = pool, pages
        self._remap = remap or (lambda block: block)
        self._reader = PageReader(descriptor, pages.shape)
        self._columns = {name: column for column, name in enumerate(pages.sequences)}
        self._wanted: dict[int, tuple[int, int]] = {}  # replica's block -> generation, tokens

    def close(self) -> None:
        self._reader.close()

    def sequence(self, name: str, position: int, birth: int) -> tuple[list[int], int, int]:
        """[0, position) of the sequence of this birth (0: unknown) is wanted: the block ids here, the sequence's column, the bytes that this adds."""
        column = self._columns.get(name, -1)
        if column >= 0 and is_other(birth_of(self.pages.requests[column]), birth):
            raise Refused(f"sequence {name!r}: the replica of {self.pages.stream} is of another sequence that bore this name")
        if column < 0 or self.pages.positions[column] < position:
            held = self.pages.positions[column] if column >= 0 else 0
            raise Refused(f"sequence {name!r}: the replica of {self.pages.stream} holds {held} of {position} positions")
        shape = self.pages.shape
        tokens = shape.block_tokens
        needed = -(-position // tokens)
        blocks, generations = self.pages.blocks[column][:needed], self.pages.generations[column][:needed]
        if len(blocks) < needed or len(self.pages.ids[column]) < 4 * position:
            raise Refused(f"sequence {name!r}: the replica names {len(blocks)} blocks and {len(self.pages.ids[column]) // 4} ids for {position} positions")
        added = 0
        for block, generation, count in zip(blocks, generations, token_counts(position, tokens), strict=True):
            had = self._wanted.get(block)
            if had is not None and had[0] != generation:
                raise Refused(f"sequence {name!r}: the replica of {self.pages.stream} names block {block} in two generations")
            if had is None or had[1] < count:
                self._wanted[block] = generation, count
                added += (count - (had[1] if had else 0)) * shape.token_bytes if shape.addressable else 0 if had else shape.block_bytes
        return [self._remap(block) for block in blocks], column, added

    def carry(self, due: float) -> None:
        """Copy everything that is wanted. Raises as pull_pages does."""
        blocks = sorted(self._wanted)
        generations, counts = ([self._wanted[block][part] for block in blocks] for part in (0, 1))
        pull_pages(self.pool, self._reader, blocks, generations, counts, [self._remap(block) for block in blocks], due)
