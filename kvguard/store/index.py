"""One replica's sequences, written down beside its arena so that the next life of the daemon finds them: a log that is rewritten when it has doubled.

Knows: records of what changed, their framing, two regions of one sparse file. Must not know: pages, budgets, sessions, who keeps the file.
Invariants (I11): a record counts whole or not at all, in order; whatever point the writer dies at, the log reads as it was after some earlier record; what was
acknowledged was recorded before; memory that can't be had makes the log empty, never wrong.

    A region starts at 0 or at REGION_BYTES and is a run of records, each: body bytes u64, serial u64 (one more than the one before), xxh3_64 of both and
    the body u64, body (MessagePack). The first is a Head, the second a Record from nothing (the snapshot), the others are Records on top of it.
    Of two regions that are both readable the one with the higher serials counts: the other was being replaced.

Process death loses no store that was made: nothing here is synced, and a reboot is told by the owner's mark, which names the boot.
"""

from __future__ import annotations

import ctypes
import os
import struct

import msgspec
import xxhash

from kvguard.format.messages import StreamShape
from kvguard.types import Epoch, Lineage, StreamId

VERSION = 1
REGION_BYTES = 1 << 40
REWRITE_BYTES_MIN = 1 << 20
_prefix = struct.Struct("<QQQ")
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


class Unreadable(Exception):
    """What lies there is no index of this owner; the message says why."""


class Head(msgspec.Struct, frozen=True, array_like=True):
    """`owner`: opaque, names the boot and the journal that the replica belongs to. `inode`: of the arena."""

    version: int
    owner: bytes
    stream: StreamId
    shape: StreamShape
    inode: int


class Life(msgspec.Struct, frozen=True, array_like=True):
    """A sequence begins, or something of it other than its contents is another now. `request`: with the first mention alone."""

    number: int
    name: str
    generation: int
    lineage: Lineage
    released: bool
    delivered: bool
    request: bytes | None


class Record(msgspec.Struct, frozen=True, array_like=True):
    """What changed, applied in the order of the fields. Columns that belong together have equal length.

    `cuts`: (number, blocks kept, ids kept). `blocks`, `generations`: u32 and u64, little-endian, by `block_counts`; `ids`: u32 by `id_counts`.
    """

    gone: list[int] = []
    lives: list[Life] = []
    cuts: list[tuple[int, int, int]] = []
    numbers: list[int] = []
    positions: list[int] = []
    block_numbers: list[int] = []
    block_counts: list[int] = []
    blocks: bytes = b""
    generations: bytes = b""
    id_numbers: list[int] = []
    id_counts: list[int] = []
    ids: bytes = b""
    sampler_numbers: list[int] = []
    samplers: list[bytes] = []
    carried: Epoch | None = None


class Known:
    """One sequence as the log tells of it."""

    __slots__ = ("blocks", "generations", "ids", "life", "position", "request", "sampler")

    def __init__(self, life: Life) -> None:
        self.life, self.request = life, life.request or b""
        self.blocks, self.generations = bytearray(), bytearray()
        self.ids, self.sampler, self.position = bytearray(), b"", 0


_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_head = msgspec.msgpack.Decoder(Head).decode


class Index:
    """Appends to the log in `descriptor`, which it owns from now on. `broken`: no memory for it; the replica will not be found again."""

    def __init__(self, descriptor: int, head: Head, serial: int = 0, region: int = 1) -> None:
        self.descriptor, self.head = descriptor, head
        self.broken = ""
        self._serial, self._region = serial, region
        self._at = self._rewrite_at = 0

    def append(self, record: Record) -> bool:
        """Write what changed. True when the log has doubled: `rewrite` is due."""
        if self.broken:
            return False
        self._at += self._write(self._at, _framed(self._serial, _encode(record)))
        self._serial += 1
        return self._at > self._rewrite_at

    def rewrite(self, snapshot: Record) -> None:
        """All that there is, into the other region; then this one goes."""
        former, self._region = self._region, 1 - self._region
        start = self._region * REGION_BYTES
        data = _framed(self._serial, _encode(self.head)) + _framed(self._serial + 1, _encode(snapshot))
        self._serial += 2
        size = self._write(start, data)
        self._at = start + size
        self._rewrite_at = self._at + max(REWRITE_BYTES_MIN, size)
        punch(self.descriptor, former * REGION_BYTES, REGION_BYTES)

    def _write(self, at: int, data: bytes) -> int:
        try:
            written = os.pwrite(self.descriptor, data, at)
        except OSError as error:
            written = -1
            self.broken = str(error)
        if written != len(data):
            self.broken = self.broken or f"{written} of {len(data)} bytes were taken"
            for region in (0, 1):
                punch(self.descriptor, region * REGION_BYTES, REGION_BYTES)
        return len(data)

    def close(self) -> None:
        os.close(self.descriptor)


class Loaded:
    """What a log says: `sequences` by number, the last epoch whose plan was carried out, and where it ends."""

    def __init__(self, descriptor: int, owner: bytes) -> None:
        """Raises Unreadable."""
        self.descriptor = descriptor
        found = [start for start in (_start(descriptor, region, owner) for region in (0, 1)) if start is not None]
        if not found:
            raise Unreadable("there is no readable log in it")
        self.serial, self.region, self.head, self.end = max(found, key=lambda start: start[0])
        self.sequences: dict[int, Known] = {}
        self.carried: Epoch | None = None
        self._replay()

    def _replay(self) -> None:
        records = 0
        while (body := _record(self.descriptor, self.end, self.serial)) is not None:
            try:
                self._apply(_decode_record(body))
            except (msgspec.DecodeError, KeyError, ValueError) as error:
                raise Unreadable(f"record {records} makes no sense: {error!r}") from error
            self.end += _prefix.size + len(body)
            self.serial += 1
            records += 1
        if not records:
            raise Unreadable("its snapshot is not whole")

    def _apply(self, record: Record) -> None:
        known = self.sequences
        for number in record.gone:
            del known[number]
        for life in record.lives:
            if life.number in known:
                known[life.number].life = life
            else:
                known[life.number] = Known(life)
        for number, blocks, ids in record.cuts:
            one = known[number]
            del one.blocks[4 * blocks :], one.generations[8 * blocks :], one.ids[4 * ids :]
        for number, position in zip(record.numbers, record.positions, strict=True):
            known[number].position = position
        at = 0
        for number, count in zip(record.block_numbers, record.block_counts, strict=True):
            known[number].blocks += record.blocks[4 * at : 4 * (at + count)]
            known[number].generations += record.generations[8 * at : 8 * (at + count)]
            at += count
        at = 0
        for number, count in zip(record.id_numbers, record.id_counts, strict=True):
            known[number].ids += record.ids[4 * at : 4 * (at + count)]
            at += count
        for number, sampler in zip(record.sampler_numbers, record.samplers, strict=True):
            known[number].sampler = sampler
        self.carried = record.carried or self.carried

    def index(self) -> Index:
        """The log, to go on with once its state was written anew (`Index.rewrite`): what a torn record left goes with the old region."""
        punch(self.descriptor, (1 - self.region) * REGION_BYTES, REGION_BYTES)
        return Index(self.descriptor, self.head, self.serial, self.region)


def _start(descriptor: int, region: int, owner: bytes) -> tuple[int, int, Head, int] | None:
    """(serial of the snapshot, region, head, where the snapshot starts) of a region with a whole head and snapshot. Raises Unreadable for another's."""
    at = region * REGION_BYTES
    body = _record(descriptor, at, None)
    if body is None:
        return None
    try:
        head = _decode_head(body)
    except msgspec.DecodeError as error:
        raise Unreadable(f"its head is of another version: {error}") from error
    if head.version != VERSION or head.owner != owner:
        raise Unreadable(f"version {head.version} of another owner" if head.owner != owner else f"version {head.version}, this is {VERSION}")
    serial = _prefix.unpack(os.pread(descriptor, _prefix.size, at))[1] + 1
    start = at + _prefix.size + len(body)
    return (serial, region, head, start) if _record(descriptor, start, serial) is not None else None


def _framed(serial: int, body: bytes) -> bytes:
    return _prefix.pack(len(body), serial, _digest(serial, body)) + body


def _digest(serial: int, body: bytes) -> int:
    return xxhash.xxh3_64_intdigest(body, seed=(serial ^ len(body)) & 0xFFFFFFFFFFFFFFFF)


def _record(descriptor: int, at: int, serial: int | None) -> bytes | None:
    """The body of the record at `at`; None where there is none, or not a whole one, or not the one with `serial`."""
    prefix = os.pread(descriptor, _prefix.size, at)
    if len(prefix) != _prefix.size:
        return None
    size, number, digest = _prefix.unpack(prefix)
    if not 0 < size <= os.fstat(descriptor).st_blocks * 512 or (serial is not None and number != serial):  # the file is sparse: its memory bounds a record
        return None
    body = os.pread(descriptor, size, at + _prefix.size)
    return body if len(body) == size and _digest(number, body) == digest else None


def punch(descriptor: int, start: int, size: int) -> None:
    """Give memory back to the system; what is read there afterwards is zero."""
    if _libc.fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, start, size):
        error = ctypes.get_errno()
        raise OSError(error, f"punching {size} bytes at {start}: {os.strerror(error)}")
