"""What the bytes of a slot must be: a function of the rank and of every token id up to that position.

Knows: the layouts of the simulated pools. Must not know: who holds what.
Invariant: two prefixes of ids that differ anywhere give other bytes at every position from there on, so that a wrong lineage shows in any single slot.
"""

from __future__ import annotations

from functools import lru_cache

import xxhash

from kvguard.format.layout import Layout, Shard

BLOCKS, BLOCK_TOKENS = 28, 4
LAYERS, TOKEN_BYTES = 2, 32


@lru_cache(maxsize=64)
def layout_of(stage: int, stages: int, addressable: bool) -> Layout:
    """The pool of one pipeline stage: BLOCKS blocks of BLOCK_TOKENS tokens of TOKEN_BYTES bytes."""
    shard = Shard((stage * LAYERS, (stage + 1) * LAYERS, stages * LAYERS), (0, 1, 1), shared=True)
    if addressable:
        return Layout.paged("simulated", "float32", LAYERS, BLOCKS, BLOCK_TOKENS, 1, 2, shard=shard)
    return Layout.opaque("simulated", "packed", LAYERS, BLOCKS, BLOCK_TOKENS, BLOCK_TOKENS * TOKEN_BYTES // LAYERS, shard=shard)


@lru_cache(maxsize=1 << 16)
def link(before: int, token: int) -> int:
    """The chain over ids: what position n depends on."""
    return xxhash.xxh3_64_intdigest(b"%d,%d" % (before, token))


def chain(ids, known: list[int] | None = None) -> list[int]:
    """By position, the chain value of ids[: position + 1]."""
    out, last = [], 1
    for token in ids:
        last = link(last, token)
        out.append(last)
    return out


@lru_cache(maxsize=1 << 16)
def slot_bytes(value: int, stage: int) -> bytes:
    """TOKEN_BYTES canonical bytes of the position whose chain value is `value`, on one stage."""
    return b"".join(xxhash.xxh3_64_digest(b"%d,%d,%d" % (value, stage, n)) for n in range(TOKEN_BYTES // 8))


def poison(number: int) -> bytes:
    """What stands in a slot that was freed: never what any position has."""
    return b"\xde\xad" + number.to_bytes(TOKEN_BYTES - 2, "little")


def token_of(sequence: str, position: int, salt: int) -> int:
    """The id that the model samples; `salt` 0 in the greedy model, else what makes another run choose otherwise."""
    return xxhash.xxh3_64_intdigest(b"%s,%d,%d" % (sequence.encode(), position, salt)) & 0xFFFF


def write_slots(pool, blocks: list[int], slots: list[int], data: list[bytes]) -> None:
    """Write one token's bytes into each (block, slot) of a pool, addressable or not."""
    if pool.layout.addressable:
        pool.scatter(blocks, slots, [1] * len(blocks), memoryview(b"".join(data)))
        return
    half = TOKEN_BYTES // LAYERS
    for block, slot, token in zip(blocks, slots, data, strict=True):
        page = bytearray(pool.layout.block_bytes)
        pool.capture_blocks([block], memoryview(page))
        for layer in range(LAYERS):
            at = layer * BLOCK_TOKENS * half + slot * half
            page[at : at + half] = token[layer * half : (layer + 1) * half]
        pool.scatter_blocks([block], memoryview(page))


def token_in(block: bytes, slot: int, addressable: bool) -> bytes:
    """One token's bytes out of a block's canonical bytes."""
    if addressable:
        return bytes(block[slot * TOKEN_BYTES : (slot + 1) * TOKEN_BYTES])
    half = TOKEN_BYTES // LAYERS
    return b"".join(bytes(block[layer * BLOCK_TOKENS * half + slot * half :][:half]) for layer in range(LAYERS))


def read_slots(pool, blocks: list[int]) -> list[bytes]:
    """By block, its canonical bytes."""
    size = pool.layout.block_bytes
    out = bytearray(size * len(blocks))
    if blocks:
        pool.capture_blocks(blocks, memoryview(out))
    return [bytes(out[n * size : (n + 1) * size]) for n in range(len(blocks))]
