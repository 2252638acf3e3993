"""What travels beside an Attach in place of a host pool's memory: a sealed memfd that says where device memory is to be found.

Knows: the fields and their bounds. Must not know: drivers, rings' contents.
Invariants: a card is read once, from a file that can't change; whatever it claims is checked by who opens the handle (the allocation's own size decides).
"""

from __future__ import annotations

import fcntl
import os

import msgspec

from kvguard.device.driver import HANDLE_BYTES
from kvguard.device.pouch import DESCRIPTORS_MAX
from kvguard.errors import Refused
from kvguard.format.layout import POOL_BYTES_MAX

MAGIC = b"KVGCARD1"
CARD_BYTES_MAX = 4096
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE


class Card(msgspec.Struct, frozen=True, array_like=True):
    """Device memory of another process. `kind`: pool | ring. `uuid`: of the GPU. `handle`: of the whole allocation, in which it lies at `offset`.

    `size`: bytes of it; `rows`: of a ring. `chunks`: memory by descriptor, runs of (bytes, how many) that follow each other in one range of addresses; their
    descriptors come behind the card (exports.py), and `handle` is the name that its exporter gave it. `kept`: not to be given back with its engine's process.
    """

    kind: str
    uuid: str
    handle: bytes
    offset: int
    size: int
    rows: int = 0
    chunks: tuple[tuple[int, int], ...] = ()
    kept: bool = False

    def chunk_sizes(self) -> list[int]:
        """Bytes of each chunk, in order."""
        return [size for size, count in self.chunks for _ in range(count)]


_decoder = msgspec.msgpack.Decoder(Card)


def write(card: Card) -> int:
    """A descriptor that holds the card; the caller's to close."""
    descriptor = os.memfd_create("kvguard-card", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.write(descriptor, MAGIC + msgspec.msgpack.encode(card))
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read(descriptor: int) -> Card | None:
    """The card in a descriptor, which stays the caller's; None where there is another thing in it. Raises Refused for a card that makes no sense."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        content = os.pread(descriptor, CARD_BYTES_MAX, 0)
    except OSError:
        return None
    if not content.startswith(MAGIC):
        return None
    try:
        card = _decoder.decode(content[len(MAGIC) :])
    except (msgspec.DecodeError, RecursionError, OverflowError) as error:
        raise Refused(f"the descriptor's card can't be read: {error}. Try: the same kvguard version in engine and daemon") from error
    sizes = 0 <= card.offset <= POOL_BYTES_MAX and 0 < card.size <= POOL_BYTES_MAX and 0 <= card.rows <= POOL_BYTES_MAX
    sizes = sizes and all(0 < size <= POOL_BYTES_MAX and 0 < count for size, count in card.chunks) and sum(count for _, count in card.chunks) <= DESCRIPTORS_MAX
    if seals & SEALS != SEALS or not sizes or len(card.handle) != HANDLE_BYTES:
        raise Refused("the descriptor's card is not sealed, or its sizes make no sense. Try: Pool.export() of this version")
    return card
