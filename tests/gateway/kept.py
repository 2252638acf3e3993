"""KV for the fake backend, kept by a real kvguard node: bytes that are a function of the ids so far, written, committed, fetched and compared.

Knows: the engine API. Must not know: HTTP.
"""

from __future__ import annotations

import hashlib
from array import array

from kvguard.engine import Layout, Rank, allocate, attach
from kvguard.errors import KvguardError
from kvguard.format.moves import decode

BLOCKS, TOKENS = 1024, 16


class Kept:
    """One rank with its pool. `outcomes`: of resumed requests: [position, whether the fetched bytes are those of the ids] or an error."""

    def __init__(self, instance: str, socket: str) -> None:
        self._pool = allocate(Layout.paged("toy 0.0.0", "float32", 1, BLOCKS, TOKENS, 1, 4))
        self._guard = attach(instance, Rank(0, 0, 0), self._pool, socket=socket)
        self._guard.on_order = lambda: self._guard.restore(0.0).done()  # an idle engine has no step in which it could join a new epoch
        self._blocks: dict[str, list[int]] = {}
        self._written: dict[str, int] = {}
        self._known: dict[str, int] = {}  # ids said
        self._free = list(range(BLOCKS))
        self.outcomes: list = []
        self._restored: dict[str, int] = {}  # positions, by the dead instance's name of the sequence

    def _slot(self, ids: list[int], position: int) -> bytes:
        return hashlib.shake_128(array("I", ids[: position + 1]).tobytes()).digest(self._pool.layout.token_bytes)

    def fetch(self, name: str, ids: list[int], token: dict) -> None:
        """The KV of a moved sequence into blocks of this one; may be called from a thread."""
        try:
            moved = decode(token)
            blocks = self._take(moved.position)
            fetched = self._guard.fetch(moved, blocks, 10.0)
        except KvguardError as error:
            self.outcomes.append(f"{type(error).__name__}: {error}")
            return
        position = min(fetched.position, len(ids) - 1)
        width, out = self._pool.layout.token_bytes, bytearray(position * self._pool.layout.token_bytes)
        counts = [min(TOKENS, position - index * TOKENS) for index in range(-(-position // TOKENS))]
        self._pool.capture(blocks[: len(counts)], [0] * len(counts), counts, memoryview(out))
        same = all(bytes(out[at * width : (at + 1) * width]) == self._slot(ids, at) for at in range(position))
        self._blocks[name], self._written[name] = blocks, position
        self.outcomes.append([position, same])
        self._restored[moved.sequence] = position if same else 0

    def restored(self, sequence: str) -> int:
        return self._restored.get(sequence, 0)

    def commit(self, name: str, ids: list[int]) -> None:
        """All ids so far; the KV of the newest is not yet there."""
        length, written = len(ids) - 1, self._written.get(name, 0)
        listed = name in self._known
        blocks = self._blocks.setdefault(name, [])
        new = self._take(length - len(blocks) * TOKENS)
        blocks += new
        with self._guard.step(max(1, length - written)) as step:
            for position in range(written, length):
                self._pool.scatter([blocks[position // TOKENS]], [position % TOKENS], [1], memoryview(self._slot(ids, position)))
            step.commit(
                name, length, blocks=new if listed else list(blocks), tokens=ids[self._known.get(name, 0) :], request=None if listed else b"request"
            )
        self._written[name], self._known[name] = length, len(ids)

    def release(self, name: str) -> None:
        if name in self._known:
            with self._guard.step(0) as step:
                step.release(name)
            del self._known[name]
        self._free += self._blocks.pop(name, [])
        self._written.pop(name, None)

    def _take(self, positions: int) -> list[int]:
        count = max(0, -(-positions // TOKENS))
        taken, self._free = self._free[:count], self._free[count:]
        assert len(taken) == count, "the toy's pool is full"
        return taken
