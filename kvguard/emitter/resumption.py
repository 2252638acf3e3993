"""What an emitter goes on with after a recovery.

Knows: Resume messages. Must not know: links, threads.
Invariant: every token's ids are its prefix and its tokens, split at the position; a sequence without an id beyond its position is refused, not guessed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from kvguard.errors import BadFrame
from kvguard.format.messages import Member, Resume
from kvguard.types import Epoch, ResumeToken


class Resumption:
    """One recovery's end: iterate it for its ResumeTokens. `members`: where the ranks live now; `timing_ms`, `bytes_by_rung`: as the coordinator saw it.

    `moved`: tokens with a proof name sequences that go on in another instance of the same model (moves.encode); the others go on here.
    """

    def __init__(self, resume: Resume):
        self.instance: str = resume.instance
        self.epoch: Epoch = resume.epoch
        self.members: tuple[Member, ...] = resume.members
        self.timing_ms = dict(resume.timing_ms)
        self.bytes_by_rung = dict(resume.bytes_by_rung)
        self.moved: bool = resume.moved
        self.tokens: tuple[ResumeToken, ...] = tuple(self._token(entry) for entry in resume.sequences)

    def __iter__(self) -> Iterator[ResumeToken]:
        return iter(self.tokens)

    def __len__(self) -> int:
        return len(self.tokens)

    def _token(self, entry) -> ResumeToken:
        known = entry.known
        if len(known.ids) % 4:
            raise BadFrame(f"sequence {entry.sequence!r}: {len(known.ids)} bytes of ids are not whole ids")
        ids = struct.unpack(f"<{len(known.ids) // 4}I", known.ids)
        if not 0 <= entry.position <= len(ids):
            raise BadFrame(f"sequence {entry.sequence!r}: position {entry.position} is beyond its {len(ids)} ids")
        prefix, tokens = ids[: entry.position], ids[entry.position :]
        return ResumeToken(
            self.instance, entry.sequence, self.epoch, entry.position, tokens, prefix, known.sampler, known.request, entry.rung, entry.places, entry.proof
        )
