"""The commit table's writer without numpy: every operation as the list of stores that it makes, for cutting, reordering and comparing."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvguard.format import rows as fmt
from kvguard.format import tape as form
from kvguard.format.lineage import forked
from kvguard.format.rows import CLOSED, Geometry, Meta, Row, Store

GEOMETRY = Geometry(rows=3, blocks=12, blocks_per_row=6, ids_per_row=24, block_tokens=4, tape_steps=5)


def apply(memory: bytearray, stores: list[Store]) -> None:
    for store in stores:
        memory[store.offset : store.offset + store.width] = store.value.to_bytes(store.width, "little")


def new_memory(geometry: Geometry = GEOMETRY) -> bytearray:
    memory = bytearray(fmt.areas(geometry).table_bytes)
    memory[: fmt.HEADER_BYTES] = fmt.encode_header(geometry)
    return memory


def content(row: Row | None):
    """What a row says, however it is stored: as one version or as a version and its tape. Which of the steps in flight count later is left out."""
    if row is None:
        return None
    head = row.head._replace(version=0, tape=0, column=0, meta_slot=0, prior=0, prior_step=0, base=0)
    return row._replace(head=head)


@dataclass
class PureTable:
    """`rows`: what is published. Every operation publishes at once and returns its stores in program order.

    `heads`: the versions in the rows' own places; of those on the tape, from before its first record. `facts`: (step, positions) of a row's generation."""

    geometry: Geometry = GEOMETRY
    rows: list[Row] = field(default_factory=list)
    counter: int = 0
    written: int = 0

    def __post_init__(self) -> None:
        self.rows = [CLOSED] * self.geometry.rows
        self.heads = list(self.rows)
        self.facts: list[list[tuple[int, int]]] = [[(0, 0)] for _ in self.rows]  # the first entry names the generation
        self.number = self.count = self.last_step = 0
        self.taped: tuple[int, ...] = ()
        self.records: list[form.Record] = []
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
        after = after._replace(head=after.head._replace(version=self.heads[row].head.version + 1))
        stores = fmt.row_stores(self.geometry, row, self.heads[row], after)
        self.rows[row] = self.heads[row] = after
        if after.head.generation != self.facts[row][0][0]:
            kept = [(step, min(positions, after.head.kept)) for step, positions in self.facts[row][1:]] if after.head.previous else []
            self.facts[row] = [(after.head.generation, 0), *(kept if after.head.is_open else [])]
        self.facts[row].append((after.head.step, after.head.accepted))
        return stores

    def _on_tape(self, row: int, number: int, column: int) -> list[Store]:
        now = self.rows[row]
        return self._publish(row, now._replace(head=now.head._replace(tape=number, column=column)))

    def settle(self) -> list[Store]:
        """The tape is over: its rows say it themselves."""
        taped, self.taped, stores = self.taped, (), []
        for row in taped:
            self.rows[row] = self.heads[row]
            for record in self.records:
                self.rows[row] = form.extended(self.rows[row], record, self.written)
            stores += self._on_tape(row, 0, 0)
        return stores

    def tape(self, rows: tuple[int, ...], step: int, ids: tuple[int, ...], blocks: tuple[tuple[int, int], ...]) -> list[Store]:
        """One record of `rows`, on a new tape where they have none. `blocks`: (index in rows, block)."""
        stores = []
        if rows != self.taped or self.count >= self.geometry.tape_steps or step <= self.last_step:
            stores += self.settle()
            self.number, self.count, self.taped, self.records = self.number + 1, 0, rows, []
            for column, row in enumerate(rows):
                stores += self._on_tape(row, self.number, column)
            stores.append(Store(fmt.TAPE_AT, 8, form.tape_word(self.number, 0)))
        record = form.Record(step, ids, tuple(form.NewBlock(index, block, self.block_generations[block]) for index, block in blocks))
        stores += form.record_stores(self.geometry, self.number, self.count, record)
        self.count, self.last_step = self.count + 1, step
        self.records.append(record)
        for row in rows:
            self.rows[row] = form.extended(self.rows[row], record, self.written)
            self.facts[row].append((step, self.rows[row].head.accepted))
        return stores

    def committed(self, row: int) -> int:
        """What is a fact of a row: no more may be reported, and `fmt.committed` of its head at least."""
        return max((positions for step, positions in self.facts[row][1:] if step <= self.written), default=0)

    def open(self, row: int, name: str, epoch: int, request: bytes, step: int, length: int, ids, blocks, sampler: bytes) -> list[Store]:
        settled = self.settle()
        generation, stores = self._raise_row(row)
        meta = Meta(name, forked((), epoch, 0), request)
        slot = 1 - self.rows[row].head.meta_slot
        head = CLOSED.head._replace(is_open=True, birth=generation, generation=generation, meta_hash=fmt.meta_hash(fmt.meta_words(meta)), meta_slot=slot)
        return settled + stores + self._extend(row, Row(head, meta, (), (), ()), step, length, ids, blocks, sampler)

    def commit(self, row: int, step: int, length: int, ids, blocks, sampler: bytes | None) -> list[Store]:
        return self.settle() + self._extend(row, self.rows[row], step, length, ids, blocks, sampler)

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
        settled = self.settle()
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
        return settled + stores + self._publish(row, Row(head, meta, ids, blocks, generations))

    def release(self, row: int) -> list[Store]:
        settled = self.settle()
        base = self.rows[row]
        generation, stores = self._raise_row(row)
        stores += self._raise_dropped(base.blocks, row)
        head = CLOSED.head._replace(birth=base.head.birth, generation=generation, previous=base.head.generation, meta_slot=base.head.meta_slot)
        return settled + stores + self._publish(row, Row(head, None, (), (), ()))

    def complete(self, step: int) -> list[Store]:
        self.written = step
        return [Store(fmt.WRITTEN_AT, 8, step)]
