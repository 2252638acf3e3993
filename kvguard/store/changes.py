"""What of a replica's sequences isn't in its index yet.

Knows: sequences by object, how a Record is made of them. Must not know: files, pages beyond their generation.
Invariant: after `record` or `snapshot` was written, the index says exactly what the replica holds.

A sequence's `number` names it in the index (0: not mentioned yet), `logged_blocks` and `logged_ids` are how much of it the index has.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable

from kvguard.store.index import Life, Record
from kvguard.types import Epoch


class Changes:
    """`generation`: of a page, by block."""

    def __init__(self, generation: Callable[[int], int]) -> None:
        self.grown: dict = {}  # sequences with more positions or blocks
        self.told: dict = {}  # sequences with more ids, or another sampler state
        self.cut: dict = {}
        self.lives: dict = {}
        self.carried: Epoch | None = None
        self._gone: list[int] = []
        self._generation = generation
        self._last = 0

    def begun(self, sequence) -> None:
        self.lives[sequence] = None

    def dropped(self, sequence) -> None:
        for kind in (self.grown, self.told, self.cut, self.lives):
            kind.pop(sequence, None)
        if sequence.number:
            self._gone.append(sequence.number)

    def any(self) -> bool:
        return bool(self.grown or self.told or self.cut or self.lives or self._gone or self.carried)

    def forget(self) -> None:
        """Nobody keeps an index."""
        for kind in (self.grown, self.told, self.cut, self.lives, self._gone):
            kind.clear()
        self.carried = None

    def adopt(self, sequence, number: int) -> None:
        """A sequence that the index has already."""
        sequence.number, sequence.logged_blocks, sequence.logged_ids = number, len(sequence.blocks), sequence.known
        self._last = max(self._last, number)

    def record(self) -> Record:
        """All that isn't written yet, as one record; from now on it counts as written."""
        lives = [self._life(sequence) for sequence in self.lives]
        cuts = [(sequence.number, sequence.logged_blocks, sequence.logged_ids) for sequence in self.cut if sequence.number]
        moved, told = ({**self.grown, **self.cut}, {**self.told, **self.cut}) if self.cut else (self.grown, self.told)
        made = self._contents(lives, cuts, moved, told, self._gone, self.carried)
        self._gone = []
        self.forget()
        return made

    def snapshot(self, sequences: Iterable, carried: Epoch | None) -> Record:
        """The same of everything, from nothing."""
        held = list(sequences)
        for sequence in held:
            sequence.number = sequence.logged_blocks = sequence.logged_ids = 0
        lives = [self._life(sequence) for sequence in held]
        self._gone = []
        self.forget()
        return self._contents(lives, [], held, held, [], carried)

    def _life(self, sequence) -> Life:
        request = None
        if not sequence.number:
            self._last += 1
            sequence.number, request = self._last, sequence.request
        return Life(sequence.number, sequence.name, sequence.generation, sequence.lineage, sequence.released, sequence.expires_ns > 0, request)

    def _contents(self, lives, cuts, moved, told, gone, carried) -> Record:
        with_blocks, block_counts, blocks, generations = [], [], [], []
        for sequence in moved:
            if len(sequence.blocks) != sequence.logged_blocks:
                new = sequence.blocks[sequence.logged_blocks :]
                with_blocks.append(sequence.number)
                block_counts.append(len(new))
                blocks.append(new.tobytes())
                generations.append(struct.pack(f"<{len(new)}Q", *map(self._generation, new)))
                sequence.logged_blocks = len(sequence.blocks)
        with_ids, id_counts, ids = [], [], []
        for sequence in told:
            known = sequence.known
            if known != sequence.logged_ids:
                with_ids.append(sequence.number)
                id_counts.append(known - sequence.logged_ids)
                ids.append(sequence.ids[4 * sequence.logged_ids :])
                sequence.logged_ids = known
        samplers = [sequence for sequence in told if sequence.sampler]
        return Record(
            gone, lives, cuts, [sequence.number for sequence in moved], [sequence.position for sequence in moved], with_blocks, block_counts,
            b"".join(blocks), b"".join(generations), with_ids, id_counts, b"".join(ids), [sequence.number for sequence in samplers],
            [sequence.sampler for sequence in samplers], carried,
        )  # fmt: skip
