"""The commit table's writer without numpy: every operation as the list of stores that it makes, for cutting, reordering and comparing."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvguard.format import rows as fmt
from kvguard.format.lineage import forked
from kvguard.format.rows import CLOSED, Geometry, Meta, Row, Store

GEOMETRY = Geometry(rows=3, blocks=12, blocks_per_row=6, ids_per_row=24, block_tokens=4)


def apply(memory: bytearray, stores: list[Store]) -> None:
    for store in stores:
        memory[store.offset : store.offset + store.width] = store.value.to_bytes(store.width, "little")


def new_memory(geometry: Geometry = GEOMETRY) -> bytearray:
    memory = bytearray(fmt.areas(geometry).table_bytes)
    memory[:64] = fmt.encode_header(geometry)
    return memory


@dataclass
class PureTable:
    """`rows`: what is published. Every operation publishes at once and returns its stores in program order."""

    geometry: Geometry = GEOMETRY
    rows: list[Row] = field(default_factory=list)
    counter: int = 0
    written: int = 0

    def __post_init__(self) -> None:
        self.rows = [CLOSED] * self.geometry.rows
        self.block_generations = [0] * self.geometry.blocks

    def _raise(self) -> tuple[int, Store]:
        self.counter += 1
        return self.counter, Store(fmt.COUNTER_AT, 8, self.counter)

    def _raise_row(self, row: int) -> tuple[int, list[Store]]:
        generation, store = self._raise()
        return generation, [store, Store(fmt.areas(self.geometry).row_generations + 8 * row, 8, generation)]

    def _raise_dropped(self, dropped: tuple[int, ...], but: int) -> list[Store]:
        live = {block for n, row in enumerate(self.rows) for block in row.blocks if n != but}
        stores = []
        for block in sorted(set(dropped) - live):
            generation, store = self._raise()
            self.block_generations[block] = generation
            stores += [store, Store(fmt.areas(self.geometry).block_generations + 8 * block, 8, generation)]
        return stores

    def _publish(self, row: int, after: Row) -> list[Store]:
        after = after._replace(head=after.head._replace(version=self.rows[row].head.version + 1))
        stores = fmt.row_stores(self.geometry, row, self.rows[row], after)
        self.rows[row] = after
        return stores

    def open(self, row: int, name: str, epoch: int, request: bytes, step: int, length: int, ids, blocks, sampler: bytes) -> list[Store]:
        generation, stores = self._raise_row(row)
        meta = Meta(name, forked((), epoch, 0), request)
        slot = 1 - self.rows[row].head.meta_slot
        head = CLOSED.head._replace(is_open=True, birth=generation, generation=generation, meta_hash=fmt.meta_hash(fmt.meta_words(meta)), meta_slot=slot)
        return stores + self._extend(row, Row(head, meta, (), (), ()), step, length, ids, blocks, sampler)

    def commit(self, row: int, step: int, length: int, ids, blocks, sampler: bytes | None) -> list[Store]:
        return self._extend(row, self.rows[row], step, length, ids, blocks, sampler)

    def _extend(self, row: int, base: Row, step: int, length: int, ids, blocks, sampler: bytes | None) -> list[Store]:
        ids, blocks = base.ids + tuple(ids), base.blocks + tuple(blocks)
        generations = base.block_generations + tuple(self.block_generations[block] for block in blocks[len(base.blocks) :])
        head = fmt.shifted(base.head, step, self.written)._replace(
            accepted=length, ids=len(ids), blocks=len(blocks), ids_hash=fmt.ids_hash(ids), blocks_hash=fmt.blocks_hash(blocks, generations)
        )
        if sampler is not None:
            head = head._replace(sampler=sampler)
        return self._publish(row, Row(head, base.meta, ids, blocks, generations))

    def truncate(self, row: int, position: int, epoch: int | None = None) -> list[Store]:
        base = self.rows[row]
        kept = -(-position // self.geometry.block_tokens)
        generation, stores = self._raise_row(row)
        meta, slot = base.meta, base.head.meta_slot
        if epoch is not None:
            meta, slot = meta._replace(lineage=forked(meta.lineage, epoch, position)), 1 - slot
        stores += self._raise_dropped(base.blocks[kept:], row if not set(base.blocks[kept:]) & set(base.blocks[:kept]) else -1)
        ids, blocks, generations = base.ids[:position], base.blocks[:kept], base.block_generations[:kept]
        head = base.head._replace(
            generation=generation, previous=base.head.generation, kept=position, kept_blocks=kept, accepted=min(base.head.accepted, position),
            prior=min(base.head.prior, position), base=min(base.head.base, position), ids=len(ids), blocks=kept, ids_hash=fmt.ids_hash(ids),
            blocks_hash=fmt.blocks_hash(blocks, generations), meta_slot=slot, meta_hash=fmt.meta_hash(fmt.meta_words(meta)),
        )  # fmt: skip
        return stores + self._publish(row, Row(head, meta, ids, blocks, generations))

    def release(self, row: int) -> list[Store]:
        base = self.rows[row]
        generation, stores = self._raise_row(row)
        stores += self._raise_dropped(base.blocks, row)
        head = CLOSED.head._replace(birth=base.head.birth, generation=generation, previous=base.head.generation, meta_slot=base.head.meta_slot)
        return stores + self._publish(row, Row(head, None, (), (), ()))

    def complete(self, step: int) -> list[Store]:
        self.written = step
        return [Store(fmt.WRITTEN_AT, 8, step)]
