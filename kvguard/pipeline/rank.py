"""One rank at work: what its sequences' rows say, a step's facts applied to them, the forward pass between entering and leaving the step.

Knows: rows (blocks, ids, position), the guard's step, the stage's model and pool. Must not know: sockets, the daemon, who schedules.
Invariants: a step is checked whole before anything of it is applied; facts are published only by leaving the step; rows in memory say what the commit table
says, and are rebuilt from it after every restore.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import xxhash

from kvguard.engine.pull import pieces_of
from kvguard.limits import BLOCKS_PER_ROW_MAX, NAME_BYTES_MAX, REQUEST_BYTES_MAX, SAMPLER_BYTES_MAX
from kvguard.pipeline import replies
from kvguard.pipeline.batch import Batch, Share
from kvguard.pipeline.model import StageModel
from kvguard.pipeline.steps import Facts, Message
from kvguard.types import Span


@dataclass
class Row:
    """One sequence on this rank: KV is complete for [0, position), ids are those told so far. `handle`: its name in batches, None until asked."""

    position: int
    blocks: list[int]
    ids: list[int]
    handle: int | None = None


class NoStep:
    """A step that publishes nothing."""

    def commit(self, sequence: str, length: int, **facts) -> None:
        """Nobody is told."""

    def commit_batch(self, sequences: np.ndarray, lengths: np.ndarray, tokens: np.ndarray, blocks: dict) -> None:
        """Nobody is told."""

    def truncate(self, sequence: str, position: int) -> None:
        """Nobody is told."""

    def release(self, sequence: str) -> None:
        """Nobody is told."""

    def wrote(self, blocks, starts, counts) -> None:
        """Nobody packs."""


class NoGuard:
    """Stands where a guard would: the same engine without kvguard, in epoch 0 for ever."""

    @contextmanager
    def step(self, size: int) -> Iterator[NoStep]:
        yield NoStep()

    def pulse(self) -> None:
        """Nobody watches."""

    def row(self, sequence: str) -> int:
        """Of no table."""
        return -1


class RankLoad:
    """The rank's model, pool and rows. `kv`: float32 [layers, 2, blocks, block_tokens, kv_heads, head_dim], where the model is. Not thread-safe."""

    def __init__(self, model: StageModel, kv: torch.Tensor, guard):
        self.model, self.kv, self.guard = model, kv, guard
        self.blocks, self.block_tokens = kv.shape[2], kv.shape[3]
        self._packs = hasattr(getattr(guard, "pool", None), "wrote")  # a host pool's daemon reads the rows: nothing is said for it
        self.rows: dict[str, Row] = {}

    def adopt(self, rows: Iterable[tuple[str, int, Iterable[int], Iterable[int]]]) -> None:
        """Rows as the table says after a restore: (sequence, position, blocks, ids) each."""
        self.rows = {name: Row(position, list(blocks), list(ids)) for name, position, blocks, ids in rows}

    # ---- a step -----------------------------------------------------------------------------------------------------------------

    def fault(self, message: Message, tensor: memoryview) -> str:
        """Why a step can't be run as it is, or "": nothing of it has been applied then."""
        names = [fact.sequence for fact in message.facts]
        if len(set(names)) != len(names):
            return "a sequence has two shares in one step"
        for fact in message.facts:
            fault = self._fact_fault(fact, None if fact.sequence in message.released else self.rows.get(fact.sequence))
            if fault:
                return f"{fact.sequence[:NAME_BYTES_MAX]!r}: {fault}"
        rows = sum(fact.end - fact.start for fact in message.facts)
        wanted = 0 if self.model.first else rows * self.model.shape.hidden * 4
        return "" if len(tensor) == wanted else f"{len(tensor)} bytes of hidden states for {rows} rows, expected {wanted}"

    def run(self, message: Message, tensor: memoryview) -> torch.Tensor:
        """One step, within the guard's; returns hidden states, or logits on the last stage. Raises errors.Fenced: nothing of it is published then."""
        shares = [fact for fact in message.facts if fact.end > fact.start]
        with self.guard.step(sum(fact.end - fact.start for fact in shares)) as step:
            for name in message.released:
                if self.rows.pop(name, None) is not None:
                    step.release(name)
            told = [self._apply(step, fact) for fact in message.facts]
            batch = Batch(tuple(self._share(fact) for fact in shares), self.block_tokens)
            out = self.model.forward(self._input(shares, tensor), batch, self.kv, lambda layer: self.guard.pulse())
            self._commit(step, message.facts, told)
            if self._packs and shares:
                pieces = [piece for fact in shares for piece in pieces_of(self.rows[fact.sequence].blocks, fact.start, fact.end, self.block_tokens)]
                step.wrote(*zip(*pieces, strict=True))
        return out

    def _commit(self, step, facts: tuple[Facts, ...], told: list[tuple[bool, tuple[int, ...]]]) -> None:
        """What decodes, one position and one id each, goes as one batch: that is what costs a step nothing (engine/tape.py)."""
        decoded = []
        for fact, (fresh, ids) in zip(facts, told, strict=True):
            row = self.rows[fact.sequence]
            row.position = fact.end
            if len(ids) == 1 and fact.end == fact.start + 1 and not (fresh or fact.sampler):
                row.handle = self.guard.row(fact.sequence) if row.handle is None else row.handle
                decoded.append((row.handle, fact.end, ids[0], fact.blocks))
                continue
            more = {"request": fact.request} if fresh else {}
            if fact.sampler:
                more["sampler"] = fact.sampler
            row.handle = step.commit(fact.sequence, fact.end, blocks=fact.blocks, tokens=ids, **more)
        if decoded:
            handles, lengths, ids, blocks = zip(*decoded, strict=True)
            appended = {n: listed for n, listed in enumerate(blocks) if listed}
            step.commit_batch(np.array(handles), np.array(lengths, np.int64), np.array(ids, np.int64), appended)

    def _fact_fault(self, fact: Facts, row: Row | None) -> str:
        row = row or Row(0, [], [])
        kept = self._kept(fact, row)
        blocks, ids = (row.blocks[:kept], min(fact.start, len(row.ids))) if kept is not None else (row.blocks, len(row.ids))
        slots = (len(blocks) + len(fact.blocks)) * self.block_tokens
        named = 0 < len(fact.sequence.encode()) <= NAME_BYTES_MAX
        if not named or len(fact.request) > REQUEST_BYTES_MAX or len(fact.sampler) > SAMPLER_BYTES_MAX:
            return "its name, request or sampler state is out of bounds"
        if not 0 <= fact.start <= fact.end <= min(self.model.shape.context, slots) or fact.start > row.position:
            return f"positions [{fact.start}, {fact.end}) after {row.position}, with {slots} slots and a context of {self.model.shape.context}"
        if not 0 <= fact.first_token <= ids or fact.end > max(ids, fact.first_token + len(fact.tokens)):
            return f"{len(fact.tokens)} ids from {fact.first_token} on, {ids} are known, {fact.end} are needed"
        if not 0 <= fact.logits <= fact.end - fact.start or len(blocks) + len(fact.blocks) > BLOCKS_PER_ROW_MAX:
            return f"{fact.logits} rows of logits, {len(fact.blocks)} blocks more"
        if not all(0 <= block < self.blocks for block in fact.blocks) or not all(0 <= token < self.model.shape.vocab for token in fact.tokens):
            return "a block beyond the pool, or an id beyond the vocabulary"
        return ""

    def _kept(self, fact: Facts, row: Row) -> int | None:
        """How many of its blocks a row keeps when it must be truncated to the fact's start; None when it goes on as it is."""
        kept = -(-fact.start // self.block_tokens)
        overlap = row.ids[fact.first_token : fact.first_token + len(fact.tokens)]
        if fact.start < row.position or len(row.blocks) > kept or overlap != list(fact.tokens[: len(overlap)]):
            return kept
        return None

    def _apply(self, step, fact: Facts) -> tuple[bool, tuple[int, ...]]:
        """Brings the row to where the forward pass needs it; (it is new, ids that the table doesn't know yet)."""
        row = self.rows.get(fact.sequence)
        fresh = row is None
        if row is None:
            row = self.rows[fact.sequence] = Row(0, [], [])
        kept = self._kept(fact, row)
        if kept is not None:
            step.truncate(fact.sequence, fact.start)
            row.position = fact.start
            del row.blocks[kept:], row.ids[fact.start :]
        ids = fact.tokens[max(0, len(row.ids) - fact.first_token) :]
        row.ids.extend(ids)
        row.blocks.extend(fact.blocks)
        return fresh, ids

    def _share(self, fact: Facts) -> Share:
        return Share(fact.sequence, Span(fact.start, fact.end), fact.prefill, tuple(self.rows[fact.sequence].blocks), fact.logits)

    def _input(self, shares: list[Facts], tensor: memoryview) -> torch.Tensor:
        if self.model.first:
            return torch.tensor([token for fact in shares for token in self.rows[fact.sequence].ids[fact.start : fact.end]], dtype=torch.int64)
        if not len(tensor):
            return torch.empty((0, self.model.shape.hidden))
        return torch.frombuffer(bytearray(tensor), dtype=torch.float32).view(-1, self.model.shape.hidden)

    # ---- questions --------------------------------------------------------------------------------------------------------------

    def state(self) -> bytes:
        """{sequence: [position, blocks that hold it]}, packed."""
        return replies.pack({name: (row.position, row.blocks[: -(-row.position // self.block_tokens)]) for name, row in self.rows.items()})

    def digest(self, names: Iterable[str]) -> bytes:
        """{sequence: [xxh3_64 of each position's canonical KV bytes]}, packed. By torch's own strides, to testify on copies that were made without torch."""
        found = {}
        for name in names:
            row = self.rows.get(name)
            if row is None:
                continue
            positions = torch.arange(row.position)
            slots = torch.tensor(row.blocks, dtype=torch.int64)[positions // self.block_tokens] * self.block_tokens + positions % self.block_tokens
            flat = self.kv.flatten(2, 3).index_select(2, slots.to(self.kv.device))  # [layers, 2, positions, kv_heads, head_dim]
            tokens = flat.permute(2, 0, 1, 3, 4).contiguous().flatten(1).view(torch.uint8).cpu().numpy() if row.position else np.empty((0, 0), np.uint8)
            found[name] = [xxhash.xxh3_64_intdigest(token.data) for token in tokens]
        return replies.pack(found)
