"""What the scheduler's side of the vLLM connector tells its workers with each step: plain columns, made to be pickled.

Knows: fields. Must not know: vLLM, torch, tables, guards.
Invariants: a sequence has a number of its own for as long as the scheduler knows it, and numbers are never reused; deltas of one sequence arrive in the order
of the steps; ids are accepted tokens only, never drafts and never placeholders, and `length` never exceeds what is known by ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Begun:
    """A sequence that the workers hear of for the first time."""

    no: int
    name: str
    request: bytes
    ids: list[int]
    blocks: list[int]
    length: int


@dataclass(slots=True)
class Grown:
    """Deltas of a known sequence in the general case; the usual one travels in StepFacts' columns."""

    no: int
    ids: list[int]
    blocks: list[int]
    length: int


@dataclass(slots=True)
class Load:
    """KV of a moved sequence to be fetched: [0, position) into `blocks`, block n of the sequence into blocks[n]. `ids_sum`: of the ids of these positions."""

    request_id: str
    token: dict
    blocks: list[int]
    position: int
    ids_sum: int = 0


@dataclass(slots=True)
class StepFacts:
    """One scheduled step. Applied in this order: `over`, `cut` before the forward pass, all others once its KV is complete.

    `size`: positions in the step. `over`: sequences that are finished. `cut`: preempted ones, whose KV is void. `nos`, `lengths`, `ids`: decoding sequences
    with one new id each; `blocks`: appended ones by index in these columns. `spans`: where a GPU packs its own steps, (sequence, first, end) of all positions
    that this one may write, rejected drafts included. `ended`: why the scheduler's side can't go on: nothing is true any more, detach. `idle`: nothing is in
    this step, nor in one before it that is under way still.
    """

    size: int = 0
    over: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)
    begun: list[Begun] = field(default_factory=list)
    grown: list[Grown] = field(default_factory=list)
    nos: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    blocks: dict[int, list[int]] = field(default_factory=dict)
    loads: list[Load] = field(default_factory=list)
    spans: list[tuple[int, int, int]] = field(default_factory=list)
    ended: str = ""
    idle: bool = False


@dataclass(slots=True)
class LoadEnd:
    """How a load went: `error` is empty where `position` positions are in the request's blocks."""

    request_id: str
    position: int
    moved_bytes: int
    load_ms: float
    error: str = ""
