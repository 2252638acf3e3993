"""The commit table: the memory that an engine shares with its node's daemon, as pure arithmetic over bytes.

Knows: where every word lies, how a row's version is encoded, checked and decoded, and in which order its stores are made.
Must not know: numpy, mappings, processes, who reads.

Invariants
- A row has two heads. Its selector counts versions; the low bit chooses the head, and the head repeats the count: a stale head never passes for a new one.
- A head carries a checksum over itself and hashes over everything it refers to (ids, blocks, meta). Any subset or order of a version's stores reads either
  as that version, as the one before, or as "not yet" (None), never as something that was not committed.
- ids and blocks are append-only within a generation; meta has two slots and the live one is never written.
- Generations are never reused: one counter in the header, raised before a generation is given out, over rows and blocks alike.
- A head that names a tape is that version plus the tape's records (format/tape.py): read_row is there.
- committed(head, written) is a fact: it counts only positions of steps whose completion word has been seen.

Hashes are sums of (value + 1) * odd multipliers by place, so that both sides add only what is new. They detect tearing; they are not meant against an attacker:
the engine owns the table, and a reader checks every bound before it uses a count.

Areas, each page aligned: header | selectors u64[rows] | row generations u64[rows] | block generations u64[blocks] | heads u64[rows][2][HEAD_WORDS]
| meta u64[rows][2][META_WORDS] | block ids u32[rows][blocks_per_row] | their generations u64[rows][blocks_per_row] | ids u32[rows][ids_per_row]
| tape u64[tape_steps][slot words] (format/tape.py)
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

from kvguard.errors import BadFrame
from kvguard.limits import BLOCKS_PER_ROW_MAX, FORKS_MAX, IDS_PER_ROW_MAX, NAME_BYTES_MAX, REQUEST_BYTES_MAX, ROWS_MAX, SAMPLER_BYTES_MAX
from kvguard.types import Fork, Lineage

MAGIC = int.from_bytes(b"KVGROWS1", "little")
VERSION = 3
PAGE_BYTES = 4096
BLOCKS_MAX = 1 << 24
TAPE_STEPS, TAPE_STEPS_MAX = 128, 1 << 12
MASK = (1 << 64) - 1

# Words of the header page, each on a cache line of its own where it is written after creation.
LINE = 64
EPOCH_AT = 2 * LINE  # written by the daemon, read by the engine
WRITTEN_AT = 3 * LINE  # the last step whose KV is complete on the device
ENTERED_AT = 4 * LINE
LEFT_AT = 5 * LINE
SIZE_AT = 6 * LINE
PULSE_AT = 7 * LINE
SUSPENDED_AT = 8 * LINE
COUNTER_AT = 9 * LINE  # the last generation given out
TAPE_AT = 10 * LINE  # the tape's number and how many records it has

# Words of a head: first what commits change; the rest changes with samplers, generations, lineage and tapes.
(
    H_VERSION, H_ACCEPTED, H_STEP, H_PRIOR, H_PRIOR_STEP, H_BASE, H_IDS, H_IDS_HASH, H_BLOCKS, H_BLOCKS_HASH,
    H_SUM, H_FLAGS, H_BIRTH, H_GENERATION, H_PREVIOUS, H_KEPT, H_KEPT_BLOCKS, H_META_HASH, H_SAMPLER, _, _, _, H_TAPE, H_COLUMN,
) = range(24)  # fmt: skip
HEAD_WORDS = 24  # three cache lines
OPEN, META_SLOT = 1, 2  # flags; bits 8..15: bytes of sampler state

RECORD_WORDS = 6  # of a tape's record before its blocks and ids; the format is format/tape.py's

# Words of a meta slot: sizes, name, forks, request
NAME_WORDS, FORK_WORDS, REQUEST_WORDS = NAME_BYTES_MAX // 8, 2 * FORKS_MAX, REQUEST_BYTES_MAX // 8
M_SIZES, M_NAME, M_FORKS, M_REQUEST = 0, 1, 1 + NAME_WORDS, 1 + NAME_WORDS + FORK_WORDS
META_WORDS = M_REQUEST + REQUEST_WORDS + 7  # rounded up to a cache line

IDS_SALT, BLOCKS_SALT, META_SALT, HEAD_SALT = 0, 1 << 40, 2 << 40, 3 << 40
FOLD = 0xD6E8FEB86659FD93
assert SAMPLER_BYTES_MAX == 32 and META_WORDS % 8 == 0 and HEAD_WORDS % 8 == 0


class Geometry(NamedTuple):
    """How many of everything. `blocks`: of the pool; `block_tokens`: slots per block; `tape_steps`: records on a tape."""

    rows: int
    blocks: int
    blocks_per_row: int
    ids_per_row: int
    block_tokens: int
    tape_steps: int = TAPE_STEPS


class Areas(NamedTuple):
    """Byte offsets of the areas, and the table's size."""

    selectors: int
    row_generations: int
    block_generations: int
    heads: int
    meta: int
    row_blocks: int
    row_block_generations: int
    ids: int
    tape: int
    table_bytes: int


class Meta(NamedTuple):
    """What is said once per sequence (the lineage once per epoch)."""

    name: str
    lineage: Lineage
    request: bytes


class Head(NamedTuple):
    """One version of a row, in the order of its words. Steps and positions as in the module's docstring; `sampler` opaque, `meta_slot` 0 or 1.

    `tape`: the number of the tape that goes on from here, 0 for none; `column`: the row's place in its records."""

    version: int
    accepted: int
    step: int
    prior: int
    prior_step: int
    base: int
    ids: int
    ids_hash: int
    blocks: int
    blocks_hash: int
    is_open: bool
    birth: int
    generation: int
    previous: int
    kept: int
    kept_blocks: int
    meta_hash: int
    sampler: bytes = b""
    meta_slot: int = 0
    tape: int = 0
    column: int = 0


class Row(NamedTuple):
    """A row's complete content in one version. A closed row has neither meta nor lists."""

    head: Head
    meta: Meta | None
    ids: tuple[int, ...]
    blocks: tuple[int, ...]
    block_generations: tuple[int, ...]


class Store(NamedTuple):
    """One store of 4 or 8 bytes, the unit in which memory changes."""

    offset: int
    width: int
    value: int


# ---- places ---------------------------------------------------------------------------------------------------------------------


def check_geometry(geometry: Geometry) -> None:
    """Raises BadFrame where a count leaves its bounds."""
    bounds = Geometry(ROWS_MAX, BLOCKS_MAX, BLOCKS_PER_ROW_MAX, IDS_PER_ROW_MAX, 1 << 16, TAPE_STEPS_MAX)
    for name, value, bound in zip(Geometry._fields, geometry, bounds, strict=True):
        if not 1 <= value <= bound:
            raise BadFrame(f"commit table: {name} is {value}, must be within 1..{bound}")


def slot_words(rows: int) -> int:
    """Of one record of the tape: its head, an id for every row, a new block for every row."""
    return RECORD_WORDS + 3 * rows


@lru_cache(maxsize=64)
def areas(geometry: Geometry) -> Areas:
    """Where everything lies. Raises BadFrame for a geometry out of bounds."""
    check_geometry(geometry)
    rows = geometry.rows
    sizes = (
        8 * rows, 8 * rows, 8 * geometry.blocks, 16 * HEAD_WORDS * rows, 16 * META_WORDS * rows,
        4 * rows * geometry.blocks_per_row, 8 * rows * geometry.blocks_per_row, 4 * rows * geometry.ids_per_row, 8 * geometry.tape_steps * slot_words(rows),
    )  # fmt: skip
    offsets, at = [], PAGE_BYTES
    for size in sizes:
        offsets.append(at)
        at += -(-size // PAGE_BYTES) * PAGE_BYTES
    return Areas(*offsets, at)


_header = struct.Struct("<9Q")
HEADER_BYTES = _header.size


def encode_header(geometry: Geometry) -> bytes:
    """The first words."""
    words = (MAGIC, VERSION, *geometry)
    return _header.pack(*words, additive(words, HEAD_SALT))


def decode_header(data) -> Geometry:
    """Raises BadFrame unless `data` starts with a header of this version."""
    if len(data) < PAGE_BYTES:
        raise BadFrame(f"a commit table of {len(data)} bytes is shorter than its header")
    words = _header.unpack_from(data)
    if words[0] != MAGIC or words[1] != VERSION:
        raise BadFrame("not a commit table of this version. Try: the same kvguard version in engine and daemon")
    if words[8] != additive(words[:8], HEAD_SALT):
        raise BadFrame("commit table: the header's checksum doesn't match")
    geometry = Geometry(*words[2:8])
    check_geometry(geometry)
    return geometry


# ---- hashes ---------------------------------------------------------------------------------------------------------------------


def multiplier(index: int) -> int:
    """splitmix64 of the place, made odd so that a single missing store always shows."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return (z ^ z >> 31) | 1


def additive(values, salt: int, first: int = 0) -> int:
    """Hash of `values` at places first, first + 1, ...; hashes of neighbouring runs add up modulo 2**64."""
    return sum((value + 1) * multiplier(salt + first + n) for n, value in enumerate(values)) & MASK


def ids_hash(ids, first: int = 0) -> int:
    return additive(ids, IDS_SALT, first)


def blocks_hash(blocks, generations, first: int = 0) -> int:
    pairs = [word for pair in zip(blocks, generations, strict=True) for word in pair]
    return additive(pairs, BLOCKS_SALT, 2 * first)


def head_sum(words) -> int:
    """Checksum of a head: not linear, so that words of two versions don't cancel out."""
    total = 0
    for n, word in enumerate(words):
        if n != H_SUM:
            mixed = word * multiplier(HEAD_SALT + n) & MASK
            total += (mixed ^ mixed >> 32) * FOLD
    return total & MASK


# ---- encoding -------------------------------------------------------------------------------------------------------------------


def head_words(head: Head) -> tuple[int, ...]:
    """The HEAD_WORDS words of a version, checksum included."""
    flags = (OPEN if head.is_open else 0) | (META_SLOT if head.meta_slot else 0) | len(head.sampler) << 8
    sampler = struct.unpack("<4Q", head.sampler.ljust(SAMPLER_BYTES_MAX, b"\0"))
    words = [*head[:H_SUM], 0, flags, *head[H_SUM + 1 : H_SUM + 7], *sampler, head.tape, head.column]
    words[H_SUM] = head_sum(words)
    return tuple(words)


def meta_words(meta: Meta) -> tuple[int, ...]:
    """The words of a meta slot that are in use. Raises ValueError where a bound is broken."""
    name = meta.name.encode()
    if not 0 < len(name) <= NAME_BYTES_MAX:
        raise ValueError(f"sequence name {meta.name!r} has {len(name)} bytes, must be 1..{NAME_BYTES_MAX}. Try: a shorter request id")
    if len(meta.request) > REQUEST_BYTES_MAX:
        raise ValueError(f"request parameters of {meta.name!r} have {len(meta.request)} bytes, at most {REQUEST_BYTES_MAX}. Try: packing them tighter")
    if len(meta.lineage) > FORKS_MAX:
        raise ValueError(f"lineage of {meta.name!r} has {len(meta.lineage)} forks, at most {FORKS_MAX}")
    forks = [word for fork in meta.lineage for word in fork] + [0] * (FORK_WORDS - 2 * len(meta.lineage))
    request = meta.request.ljust(-(-len(meta.request) // 8) * 8, b"\0")
    sizes = len(name) | len(meta.lineage) << 16 | len(meta.request) << 32
    return (sizes, *struct.unpack(f"<{NAME_WORDS}Q", name.ljust(NAME_BYTES_MAX, b"\0")), *forks, *struct.unpack(f"<{len(request) // 8}Q", request))


def meta_hash(words) -> int:
    return additive(words, META_SALT)


def row_stores(geometry: Geometry, row: int, before: Row, after: Row) -> list[Store]:
    """All stores that make `after` the row's content, in the order in which a writer makes them. `before`: the content they replace.

    Raised generations (of the row and of blocks) are the caller's, and come first.
    """
    at = areas(geometry)
    stores = []
    ids, blocks = _standing(before, after)
    for n in range(ids, len(after.ids)):
        stores.append(Store(at.ids + 4 * (row * geometry.ids_per_row + n), 4, after.ids[n]))
    for n in range(blocks, len(after.blocks)):
        place = row * geometry.blocks_per_row + n
        stores.append(Store(at.row_blocks + 4 * place, 4, after.blocks[n]))
        stores.append(Store(at.row_block_generations + 8 * place, 8, after.block_generations[n]))
    if after.meta is not None and after.meta != before.meta:
        base = at.meta + 8 * META_WORDS * (2 * row + after.head.meta_slot)
        stores += [Store(base + 8 * n, 8, word) for n, word in enumerate(meta_words(after.meta))]
    base = at.heads + 8 * HEAD_WORDS * (2 * row + (after.head.version & 1))
    stores += [Store(base + 8 * n, 8, word) for n, word in enumerate(head_words(after.head))]
    stores.append(Store(at.selectors + 8 * row, 8, after.head.version))
    return stores


def _standing(before: Row, after: Row) -> tuple[int, int]:
    """How many ids and blocks of `before` still stand in `after`: all that is kept within one birth."""
    if not before.head.is_open or before.head.birth != after.head.birth:
        return 0, 0
    if before.head.generation == after.head.generation:
        return len(before.ids), len(before.blocks)
    return min(len(before.ids), after.head.kept), min(len(before.blocks), after.head.kept_blocks)


CLOSED = Row(Head(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, False, 0, 0, 0, 0, 0, 0), None, (), (), ())


# ---- decoding -------------------------------------------------------------------------------------------------------------------


def decode_head(words, version: int, geometry: Geometry) -> Head | None:
    """The head whose words these are, or None: torn, stale, or out of bounds."""
    flags = words[H_FLAGS]
    sampler_bytes = flags >> 8
    if words[H_VERSION] != version or words[H_SUM] != head_sum(words) or sampler_bytes > SAMPLER_BYTES_MAX:
        return None
    sampler = struct.pack("<4Q", *words[H_SAMPLER : H_SAMPLER + 4])[:sampler_bytes]
    head = Head(*words[:H_SUM], bool(flags & OPEN), *words[H_BIRTH:H_SAMPLER], sampler, int(bool(flags & META_SLOT)), *words[H_TAPE:])
    return head if in_bounds(head, geometry) else None


def in_bounds(head: Head, geometry: Geometry) -> bool:
    """Whether the counts may be used to address memory, and no more is accepted than ids and blocks stand for."""
    return (
        head.ids <= geometry.ids_per_row and head.blocks <= geometry.blocks_per_row and head.accepted <= min(head.ids, head.blocks * geometry.block_tokens)
        and head.prior <= head.accepted and head.base <= head.prior
    )  # fmt: skip


def decode_meta(words) -> Meta | None:
    """The meta slot whose words start `words` (all META_WORDS of it), or None where sizes or text are impossible. The hash is the caller's to check."""
    sizes = words[M_SIZES]
    name_bytes, forks, request_bytes = sizes & 0xFFFF, sizes >> 16 & 0xFFFF, sizes >> 32
    if not 0 < name_bytes <= NAME_BYTES_MAX or forks > FORKS_MAX or request_bytes > REQUEST_BYTES_MAX:
        return None
    try:
        name = struct.pack(f"<{NAME_WORDS}Q", *words[M_NAME:M_FORKS])[:name_bytes].decode()
    except UnicodeDecodeError:
        return None
    lineage = tuple(Fork(words[M_FORKS + 2 * n], words[M_FORKS + 2 * n + 1]) for n in range(forks))
    request = struct.pack(f"<{REQUEST_WORDS}Q", *words[M_REQUEST : M_REQUEST + REQUEST_WORDS])[:request_bytes]
    return Meta(name, lineage, request)


def meta_words_used(words) -> int:
    """How many words of a slot its hash covers."""
    return min(M_REQUEST + -(-(words[M_SIZES] >> 32) // 8), META_WORDS)


def read_version(memory, geometry: Geometry, row: int, version: int) -> Row | None:
    """What the head of a certain version says, without a tape; None where it is not there completely."""
    if version == 0:
        return CLOSED  # never written
    at = areas(geometry)
    head_at = at.heads + 8 * HEAD_WORDS * (2 * row + (version & 1))
    head = decode_head(struct.unpack_from(f"<{HEAD_WORDS}Q", memory, head_at), version, geometry)
    if head is None:
        return None
    if not head.is_open:
        return Row(head, None, (), (), ())
    words = struct.unpack_from(f"<{META_WORDS}Q", memory, at.meta + 8 * META_WORDS * (2 * row + head.meta_slot))
    meta = decode_meta(words)
    ids = struct.unpack_from(f"<{head.ids}I", memory, at.ids + 4 * row * geometry.ids_per_row)
    blocks = struct.unpack_from(f"<{head.blocks}I", memory, at.row_blocks + 4 * row * geometry.blocks_per_row)
    generations = struct.unpack_from(f"<{head.blocks}Q", memory, at.row_block_generations + 8 * row * geometry.blocks_per_row)
    whole = (
        meta is not None and meta_hash(words[: meta_words_used(words)]) == head.meta_hash and ids_hash(ids) == head.ids_hash
        and blocks_hash(blocks, generations) == head.blocks_hash and all(block < geometry.blocks for block in blocks)
    )  # fmt: skip
    return Row(head, meta, ids, blocks, generations) if whole else None


def committed(head: Head, written: int) -> int:
    """Positions whose KV is a fact when steps up to `written` are complete."""
    if written >= head.step:
        return head.accepted
    return head.prior if written >= head.prior_step else head.base


def shifted(head: Head, step: int, written: int) -> Head:
    """The head before a commit of `step`: what was accepted so far belongs to the steps before. A second commit of one step shifts nothing."""
    if head.step == step:
        return head
    return head._replace(step=step, prior=head.accepted, prior_step=head.step, base=committed(head, written))
