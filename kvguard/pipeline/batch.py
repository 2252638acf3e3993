"""Which positions the next step computes, for whom, and in what shape: pure functions over numbers.

Knows: prompt chunks, decoding, replay, a step's bound. Must not know: tensors, pools, who asked, torch.
Invariants: the shape in which a position is computed is a function of (position, prompt length, chunk) alone, so a resume at any position
replays the shapes of the first time: positions of the prompt in chunks that end at absolute multiples of `chunk` or at the prompt's end, later
ones each in its own row. A step never plans more than its bound, and never starves: decoding comes first, then the oldest prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from kvguard.types import Position, SequenceId, Span

PREFILL_CHUNK = 64  # C: positions of a prompt that are computed together
BLOCK_TOKENS = 16


class Need(NamedTuple):
    """Where a sequence stands: KV is complete for [0, position), `known` ids are there, the first `prompt` of them are the prompt."""

    sequence: SequenceId
    position: Position
    known: int
    prompt: int


class Share(NamedTuple):
    """One sequence's part of a step: compute the positions of `span`, writing KV into `blocks` (which cover [0, span.end) in order).

    `prefill`: all positions in one tile, as a chunk of the prompt; else each in its own row, as when decoding. `logits`: of how many of the
    last positions the last stage returns logits (usually 1 or 0).
    """

    sequence: SequenceId
    span: Span
    prefill: bool
    blocks: tuple[int, ...]
    logits: int

    @property
    def count(self) -> int:
        return self.span.end - self.span.start


class Batch(NamedTuple):
    """One step's shares. Rows of hidden states are the shares' positions, concatenated in this order; so are rows of logits."""

    shares: tuple[Share, ...]
    block_tokens: int = BLOCK_TOKENS

    @property
    def rows(self) -> int:
        return sum(share.count for share in self.shares)

    @property
    def logit_rows(self) -> int:
        return sum(share.logits for share in self.shares)

    def check(self, blocks: int) -> None:
        """Asserts what a forward pass relies on; `blocks` is the pool's size. A batch that fails this is a bug of the driver."""
        seen: set[SequenceId] = set()
        for share in self.shares:
            assert share.sequence not in seen, f"{share.sequence} has two shares in one step"
            seen.add(share.sequence)
            assert 0 <= share.span.start < share.span.end, f"{share.sequence}: empty span {share.span}"
            assert 0 <= share.logits <= share.count, f"{share.sequence}: logits of {share.logits} of {share.count} positions"
            assert len(share.blocks) * self.block_tokens >= share.span.end, f"{share.sequence}: {len(share.blocks)} blocks, end {share.span.end}"
            assert all(0 <= block < blocks for block in share.blocks), f"{share.sequence}: a block beyond the pool's {blocks}"


def resume_position(position: Position, prompt: int, chunk: int = PREFILL_CHUNK) -> Position:
    """The highest position <= `position` from which the original shapes can be replayed: inside a prompt, the start of its chunk."""
    return position if position >= prompt else position - position % chunk


def next_span(need: Need, chunk: int = PREFILL_CHUNK, replay: int = 8) -> Span | None:
    """The positions that `need.sequence` computes next; None if all its known ids are computed (it waits for a token).

    Inside the prompt: to the end of the chunk. Beyond: up to `replay` positions whose ids are known already (one while decoding; more only
    after a resume from ids). A position inside a chunk is an error of the caller: it asks resume_position first.
    """
    if need.position >= need.known:
        return None
    if need.position < need.prompt:
        assert need.position % chunk == 0, f"{need.sequence}: position {need.position} is inside a chunk of {chunk}"
        assert need.known >= need.prompt, f"{need.sequence}: {need.known} ids known of a prompt of {need.prompt}"
        return Span(need.position, min(need.position + chunk, need.prompt))
    return Span(need.position, min(need.position + replay, need.known))


class Planned(NamedTuple):
    """A share without blocks: the driver allocates for [0, span.end) and makes it a Share."""

    sequence: SequenceId
    span: Span
    prefill: bool
    logits: int

    def with_blocks(self, blocks: Iterable[int]) -> Share:
        return Share(self.sequence, self.span, self.prefill, tuple(blocks), self.logits)


def plan_step(needs: Iterable[Need], *, positions_max: int = 2 * PREFILL_CHUNK, chunk: int = PREFILL_CHUNK, replay: int = 8) -> tuple[Planned, ...]:
    """What the next step computes. `needs` in order of age, at most one per sequence.

    Every sequence beyond its prompt gets at least one position, whatever the bound; prompts' chunks and replayed positions share
    `positions_max` (>= chunk), oldest first, each chunk whole or not at all. Logits are asked of a share's last position where it is the last
    known one. Returns decoding shares first.
    """
    assert positions_max >= chunk >= 1 and replay >= 1, (positions_max, chunk, replay)
    left = positions_max
    decoding: list[Planned] = []
    prefills: list[Planned] = []
    for need in needs:
        span = next_span(need, chunk, replay)
        if span is None:
            continue
        logits = int(span.end == need.known)
        if need.position < need.prompt:
            count = span.end - span.start
            if count <= left:
                left -= count
                prefills.append(Planned(need.sequence, span, True, logits))
            else:
                left = 0  # a younger, shorter prompt doesn't overtake: else a long one could wait for ever
        else:
            extra = min(span.end - span.start - 1, left)
            left -= extra
            end = span.start + 1 + extra
            decoding.append(Planned(need.sequence, Span(span.start, end), False, int(end == need.known)))
    return (*decoding, *prefills)
