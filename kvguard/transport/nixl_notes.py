"""What is told behind the last byte of a write: which frames it brought, and where they lie.

Knows: the bytes of a note. Must not know: NIXL, zones, links.
Invariants: a note names frames of one life of one link; it names at least one, and no more than this side has said that it reads.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from kvguard.errors import BadFrame

FRAMES_MAX = 32  # named by one note
LIFE_BYTES = 16
BEAT = b"beat"  # a note that names none: the way is open
_RECORD = struct.Struct(f"<{LIFE_BYTES}sQIIIIQ")
RECORD_BYTES = _RECORD.size


class Landed(NamedTuple):
    """One frame: `pages` in a row from page `first` on have its payload and then its header, which has the sum `head_sum` (xxh3_64)."""

    number: int
    first: int
    pages: int
    payload_bytes: int
    head_bytes: int
    head_sum: int


def pack(life: bytes, frames: Iterable[Landed]) -> bytes:
    return b"".join([_RECORD.pack(life, *frame) for frame in frames])


def unpack(life: bytes, note: bytes) -> list[Landed]:
    """The frames, in the note's order. Raises BadFrame for one of another life, or that is no note."""
    if not note or len(note) % RECORD_BYTES or len(note) > FRAMES_MAX * RECORD_BYTES:
        raise BadFrame(f"a note of {len(note)} bytes")
    frames = []
    for said, *rest in _RECORD.iter_unpack(note):
        if said != life:
            raise BadFrame("a note for another life of this link")
        frames.append(Landed(*rest))
    return frames
