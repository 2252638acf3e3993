"""The tape of a commit table: what decoding adds, step by step, to rows that go on together; pure functions over bytes.

Knows: a record's words and checksum, what records add to a row. Must not know: numpy, who writes, who looks.

A usual step adds one position and one id to each of the same rows, and few blocks. It is one record in one place instead of a version of every row. A head that
names a tape and a column in it is the row before the tape's first record; the row is that plus the records that the tape's word counts.

Invariants
- A tape's number is never used again; the word (number and count) chooses the records, and each of them repeats number and place and carries a checksum over
  all of itself, so that any subset or order of stores reads as records that were published or as "not yet".
- A tape begins when the heads that name it are published, and ends when its rows have heads that don't: the next number's word comes after them.
  So a head that names a later tape than the word has no records yet; one that names an earlier one is itself being replaced: not yet.
- A record is published once: what was staged and taken back is never in the shared memory.

Record: sum | number | place in the tape | step | rows | new blocks | (column << 32 | block, generation)[new blocks] | ids u64[rows]
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from kvguard.format import rows as fmt
from kvguard.format.rows import Geometry, Head, Row, Store

COUNT_BITS = 16
BODY = struct.Struct("<5Q")  # number, place, step, rows, new blocks
BODY_WORDS = BODY.size // 8
B_NUMBER, B_PLACE, B_STEP, B_ROWS, B_NEW = range(BODY_WORDS)
ENTRY = struct.Struct("<IIQ")  # a block in the lower half of the word, its column in the upper
SUM_BYTES = 8
HEAD_BYTES = SUM_BYTES + BODY.size
assert HEAD_BYTES == 8 * fmt.RECORD_WORDS and fmt.TAPE_STEPS_MAX < 1 << COUNT_BITS


class NewBlock(NamedTuple):
    """Appended to the list of the row in `column`."""

    column: int
    block: int
    generation: int


class Record(NamedTuple):
    """One step of all the tape's rows."""

    step: int
    ids: tuple[int, ...]
    blocks: tuple[NewBlock, ...] = ()


def tape_word(number: int, count: int) -> int:
    return number << COUNT_BITS | count


def split_word(word: int) -> tuple[int, int]:
    """A tape's number and count of records."""
    return word >> COUNT_BITS, word & (1 << COUNT_BITS) - 1


record_sum = xxhash.xxh3_64_intdigest  # of a record's body


def are_ids(words: bytes) -> bool:
    """Whether u64 words are all below 2**32."""
    return not (any(words[4::8]) or any(words[5::8]) or any(words[6::8]) or any(words[7::8]))


def encode_body(number: int, place: int, record: Record) -> bytes:
    """All of a record but its sum."""
    head = BODY.pack(number, place, record.step, len(record.ids), len(record.blocks))
    entries = [ENTRY.pack(block, column, generation) for column, block, generation in record.blocks]
    return b"".join((head, *entries, struct.pack(f"<{len(record.ids)}Q", *record.ids)))


def record_stores(geometry: Geometry, number: int, place: int, record: Record) -> list[Store]:
    """The stores that put one more record on the tape, in program order; the last one publishes it."""
    body = encode_body(number, place, record)
    words = (record_sum(body), *struct.unpack(f"<{len(body) // 8}Q", body))
    base = fmt.areas(geometry).tape + 8 * place * fmt.slot_words(geometry.rows)
    return [*(Store(base + 8 * n, 8, word) for n, word in enumerate(words)), Store(fmt.TAPE_AT, 8, tape_word(number, place + 1))]


def body_bytes(memory, geometry: Geometry, number: int, place: int) -> bytes | None:
    """A record's body, whole, or None: torn, or of another tape. `place` within tape_steps. Blocks are not yet checked."""
    base = fmt.areas(geometry).tape + 8 * place * fmt.slot_words(geometry.rows)
    rows, blocks = struct.unpack_from("<2Q", memory, base + SUM_BYTES + 8 * B_ROWS)
    if rows > geometry.rows or blocks > geometry.rows:
        return None
    body = bytes(memory[base + SUM_BYTES : base + HEAD_BYTES + 16 * blocks + 8 * rows])
    found = BODY.unpack_from(body)
    if found[B_NUMBER] != number or found[B_PLACE] != place or found[B_ROWS:] != (rows, blocks):
        return None
    return body if struct.unpack_from("<Q", memory, base)[0] == record_sum(body) and are_ids(ids_bytes(body)) else None


def step_of(body: bytes) -> int:
    return BODY.unpack_from(body)[B_STEP]


def ids_bytes(body: bytes) -> bytes:
    """The ids of a whole record, as they stand there: u64."""
    return body[len(body) - 8 * BODY.unpack_from(body)[B_ROWS] :]


def listed_blocks(body: bytes) -> tuple[NewBlock, ...]:
    """What a whole record appends; bounds are the caller's to check."""
    words = struct.unpack_from(f"<{2 * BODY.unpack_from(body)[B_NEW]}Q", body, BODY.size)
    return tuple(NewBlock(words[n] >> 32, words[n] & 0xFFFFFFFF, words[n + 1]) for n in range(0, len(words), 2))


def new_blocks(body: bytes, geometry: Geometry) -> tuple[NewBlock, ...] | None:
    """What a whole record appends, or None where it leaves its bounds."""
    found, rows = listed_blocks(body), BODY.unpack_from(body)[B_ROWS]
    return found if all(new.column < rows and new.block < geometry.blocks for new in found) else None


def read_record(memory, geometry: Geometry, number: int, place: int) -> Record | None:
    """One record, whole and within bounds, or None."""
    body = body_bytes(memory, geometry, number, place)
    blocks = new_blocks(body, geometry) if body is not None else None
    if blocks is None:
        return None
    said = ids_bytes(body)
    return Record(step_of(body), struct.unpack(f"<{len(said) // 8}Q", said), blocks)


# ---- rows with their tape ---------------------------------------------------------------------------------------------------------


def read_row(memory, geometry: Geometry, row: int) -> Row | None:
    """The row's present content from a table's bytes, or None: not yet (torn or reordered), try at the next look."""
    (word,) = struct.unpack_from("<Q", memory, fmt.TAPE_AT)
    (version,) = struct.unpack_from("<Q", memory, fmt.areas(geometry).selectors + 8 * row)
    found = fmt.read_version(memory, geometry, row, version)
    return with_tape(memory, geometry, found, word) if found is not None else None


def with_tape(memory, geometry: Geometry, row: Row, word: int) -> Row | None:
    """What the tape, as its word says it is, makes of a row; None: not yet."""
    number, count = split_word(word)
    if row.head.tape == 0 or row.head.tape > number:
        return row
    if row.head.tape < number or count > geometry.tape_steps:
        return None
    (written,) = struct.unpack_from("<Q", memory, fmt.WRITTEN_AT)
    for place in range(count):
        record = read_record(memory, geometry, number, place)
        if record is None or row.head.column >= len(record.ids):
            return None
        row = extended(row, record, written)
    return row if fmt.in_bounds(row.head, geometry) else None


def extended(row: Row, record: Record, written: int) -> Row:
    """A row after one more record."""
    head, column = row.head, row.head.column
    new = [entry for entry in record.blocks if entry.column == column]
    blocks, generations = tuple(entry.block for entry in new), tuple(entry.generation for entry in new)
    token = (record.ids[column],)
    head = fmt.shifted(head, record.step, written)._replace(
        accepted=head.accepted + 1,
        ids=head.ids + 1,
        ids_hash=head.ids_hash + fmt.ids_hash(token, head.ids) & fmt.MASK,
        blocks=head.blocks + len(new),
        blocks_hash=head.blocks_hash + fmt.blocks_hash(blocks, generations, head.blocks) & fmt.MASK,
    )
    return Row(head, row.meta, row.ids + token, row.blocks + blocks, row.block_generations + generations)


def committed(head: Head, steps, written: int) -> int:
    """Positions that are a fact, of a row whose head is `head` before a tape with records of `steps` (ascending)."""
    complete = sum(1 for step in steps if step <= written)
    return head.accepted + complete if complete else fmt.committed(head, written)
