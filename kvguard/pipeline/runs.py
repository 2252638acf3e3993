"""What the driver knows of each sequence: who asked for it, its ids, how far its KV is, what was told to the ranks.

Knows: requests and their packed form (opaque bytes to everybody else, what a new driver rebuilds a run from). Must not know: steps, blocks, sockets.
Invariants: ids only grow; the last known id of a sequence is never computed before it is told to the ranks; a complete sequence gets no more ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from kvguard.errors import BadFrame
from kvguard.format.lineage import life_of
from kvguard.limits import NAME_BYTES_MAX, REQUEST_BYTES_MAX
from kvguard.pipeline.sampling import Sampling
from kvguard.types import Life

SEQUENCES_KEPT_MAX = 256  # running, waiting and finished but not released; as many rows has a rank's table


class Request(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's request. `index` of `count` sequences in the run; its name is RUN-INDEX. `born`: random, tells runs of one name apart."""

    run: str
    index: int
    count: int
    prompt_tokens: int
    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int
    ignore_eos: bool
    born: int = 0

    @property
    def name(self) -> str:
        return f"{self.run}-{self.index}"

    def fault(self) -> str:
        """Why this can't be run, or ""."""
        if not self.run or len(self.name.encode()) > NAME_BYTES_MAX:
            return f"run name {self.run!r} is empty or longer than {NAME_BYTES_MAX - 8} bytes"
        if not 0 <= self.index < self.count or self.prompt_tokens < 1 or self.max_tokens < 1:
            return f"sequence {self.index} of {self.count}, {self.prompt_tokens} prompt tokens, {self.max_tokens} to generate: each must be at least 1"
        try:
            self.sampling()
        except ValueError as error:
            return str(error)
        return ""

    def sampling(self) -> Sampling:
        """Sequences of one run draw differently: the seed is the run's plus the index."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.seed + self.index)


_decoder = msgspec.msgpack.Decoder(Request)


def pack_request(request: Request) -> bytes:
    blob = msgspec.msgpack.encode(request)
    assert len(blob) <= REQUEST_BYTES_MAX, len(blob)
    return blob


def unpack_request(blob: bytes) -> Request:
    """Raises BadFrame for bytes that no driver packed."""
    try:
        request = _decoder.decode(blob)
    except (msgspec.DecodeError, ValueError) as error:
        raise BadFrame(f"request of {len(blob)} bytes is not a driver's: {error}") from error
    if request.fault():
        raise BadFrame(f"request can't be run: {request.fault()}")
    return request


@dataclass
class Track:
    """One sequence. KV is complete on every rank for [0, position); `told` ids are with the ranks; `opened`: so is the request."""

    request: Request
    ids: list[int]
    eos: tuple[int, ...]
    position: int = 0
    told: int = 0
    opened: bool = False
    admitted: bool = False
    error: str = ""
    checksums: dict[int, int] = field(default_factory=dict)  # position -> checksum of its logits, as first computed

    @property
    def name(self) -> str:
        return self.request.name

    @property
    def life(self) -> Life:
        """Which of the sequences of this name it is: runs' names are given away again."""
        return life_of(self.name, pack_request(self.request))

    @property
    def prompt(self) -> int:
        return self.request.prompt_tokens

    @property
    def generated(self) -> int:
        return len(self.ids) - self.prompt

    @property
    def complete(self) -> bool:
        """All its ids are known."""
        if self.generated <= 0:
            return False
        return self.generated >= self.request.max_tokens or (not self.request.ignore_eos and self.ids[-1] in self.eos)

    @property
    def computable(self) -> int:
        """How many ids have a position to be computed: the last id of a complete sequence has none."""
        return len(self.ids) - 1 if self.complete else len(self.ids)

    @property
    def rests(self) -> bool:
        """Nothing is left to do for it: failed, or complete in ids, in KV and in what the ranks were told."""
        return bool(self.error) or (self.complete and self.position >= self.computable and self.told == len(self.ids))

    @property
    def positions_max(self) -> int:
        """Positions that it may come to take."""
        return self.computable if self.complete else self.prompt + self.request.max_tokens - 1

    def labels(self) -> dict:
        return {"run": self.request.run, "sequence": self.request.index}
