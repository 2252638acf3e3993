"""An adapter in 100 lines: a toy engine with a paged pool, and all that kvguard has to be told of it. tests/adapters/test_toy_engine.py kills it.

    python toy_engine.py rank|standby INSTANCE SOCKET

Commands come as JSON lines on stdin: {"generate": NAME, "ids": [...], "new": N}, {"release": NAME}. Ids leave as JSON lines, one per token.
"""

from __future__ import annotations

import json
import sys

import numpy as np

from kvguard.device import proof
from kvguard.engine import Layout, Rank, allocate, attach, attach_standby
from kvguard.errors import Fenced

LAYERS, BLOCKS, TOKENS, HEADS, DIM = 2, 64, 16, 2, 8
RANK = Rank(0, 0, 0)
LAYOUT = Layout.paged("toy-1", "float32", LAYERS, BLOCKS, TOKENS, HEADS, DIM)  # (1) where every token's bytes lie


class Toy:
    """The engine itself: it knows nothing of kvguard, only that its pool's memory was given to it."""

    def __init__(self, memory: memoryview) -> None:
        self.kv = np.frombuffer(memory, np.float32).reshape(LAYERS, 2, BLOCKS, TOKENS, HEADS, DIM)

    def write(self, block: int, slot: int, token: int, position: int) -> None:
        place = np.arange(1, LAYERS * 2 * HEADS * DIM + 1, dtype=np.float32).reshape(LAYERS, 2, HEADS, DIM)
        self.kv[:, :, block, slot] = np.sin(place * (token + 1) + position)

    def forward(self, blocks: list[int], ids: list[int], start: int) -> int:
        """Writes the KV of positions [start, len(ids)), reads all of it, chooses the next id."""
        for position in range(start, len(ids)):
            self.write(blocks[position // TOKENS], position % TOKENS, ids[position], position)
        seen = self.kv[:, :, blocks].reshape(LAYERS, 2, -1, HEADS, DIM)[:, :, : len(ids)]
        return int(abs(seen.astype(np.float64).sum()) * 1000) % 500


class Adapter:
    """One rank. `rows`: by sequence, [position, blocks, how many ids the table knows]."""

    def __init__(self, role: str, instance: str, socket: str) -> None:
        self.claim = None
        if role == "standby":  # (2) a spare: weights loaded, no rank yet
            spare = attach_standby(instance, {RANK: LAYOUT}, endpoint="toy", socket=socket)
            print(json.dumps({"standby": True}), flush=True)
            while self.claim is None:
                self.claim = spare.wait(1.0)
        self.pool = self.claim.adopt[1] if self.claim and self.claim.adopt else allocate(LAYOUT)
        self.toy, self.rows = Toy(self.pool.memory), {}
        if self.claim is None:  # (3) the layout is proved: the engine's own code writes one token, and only the named bytes may change
            proof.prove(LAYOUT, self.pool.memory, lambda block, slot: self.toy.write(block, slot, 7, 3))
        self.guard = attach(instance, RANK, self.pool, LAYOUT, endpoint="toy", socket=socket, claim=self.claim)
        if self.claim is not None:
            self.restore()
        print(json.dumps({"rank": {name: row[0] for name, row in self.rows.items()}}), flush=True)

    def restore(self) -> None:
        """(4) A claimed rank, or a survivor in a new epoch: what the plan says is what there is."""
        restored = self.guard.restore(30.0)
        table = self.guard.table
        self.rows = {one.name: [one.position, list(one.blocks), len(table.ids(table.row(one.name)))] for one in restored.pull()}
        restored.done()

    def free(self) -> list[int]:
        used = {block for _, blocks, _ in self.rows.values() for block in blocks}
        return [block for block in range(BLOCKS) if block not in used]

    def generate(self, name: str, ids: list[int], new: int) -> None:
        for _ in range(new):
            try:
                ids = [*ids, self.step(name, ids)]
            except Fenced:  # (5) the epoch is over: this step's result is dropped, and the driver says where to go on
                self.restore()
                print(json.dumps({"fenced": name}), flush=True)
                return
            print(json.dumps({"sequence": name, "id": ids[-1]}), flush=True)

    def step(self, name: str, ids: list[int]) -> int:
        start, blocks, known = self.rows.get(name, (0, [], 0))
        start = min(start, len(ids) - 1)  # at least one position is computed: its result is what is wanted
        with self.guard.step(len(ids) - start) as step:  # (6) entered before the forward pass, left after it
            if name in self.rows and (start < self.rows[name][0] or known > len(ids)):
                step.truncate(name, start)  # (7) before the overwriting work is launched
                blocks, known = blocks[: -(-start // TOKENS)], start
            more = self.free()[: -(-len(ids) // TOKENS) - len(blocks)]
            token = self.toy.forward([*blocks, *more], ids, start)
            request = None if name in self.rows else b"toy"  # the first commit opens the sequence
            step.commit(name, len(ids), blocks=more, tokens=ids[known:], request=request)  # (8) deltas, and only what is complete
        self.rows[name] = [len(ids), [*blocks, *more], len(ids)]
        return token

    def release(self, name: str) -> None:
        with self.guard.step(0) as step:
            step.release(name)  # (9) before its blocks are used again
        del self.rows[name]


if __name__ == "__main__":
    adapter = Adapter(*sys.argv[1:])
    for line in sys.stdin:
        command = json.loads(line)
        if "release" in command:
            adapter.release(command["release"])
        else:
            adapter.generate(command["generate"], command["ids"], command["new"])
    adapter.guard.detach()  # (10) a clean end: nothing is lost, nothing needs recovery
