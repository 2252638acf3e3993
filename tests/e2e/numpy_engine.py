"""A serving engine without a model: it writes pseudo-random KV, commits it, and does what it is told on stdin, one JSON object a line.

Knows: the engine API. Must not know: daemons. Bytes of a slot are a function of (sequence, position, rank), so that any copy can be checked anywhere.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
import sys

import numpy as np
import xxhash

from kvguard.device import open_device
from kvguard.engine import Layout, Rank, allocate, attach, attach_scheduler, attach_standby, borrow
from kvguard.errors import Fenced, KvguardError
from kvguard.format.moves import decode, ids_sum

BLOCKS, TOKENS = 256, 16
DEVICE = os.environ.get("ENGINE_DEVICE", "host")
BORROWS = "ENGINE_BORROWS" in os.environ  # its pool from its daemon, to outlive it
IN_PIECES = "ENGINE_IN_PIECES" in os.environ  # its pool in virtual memory that is mapped piece by piece, as torch's expandable segments are


def layout_of(rank: str, model: str = "numpy") -> Layout:
    """Of the model "latent" the tensor-parallel ranks of a stage hold the same latent vectors, as MLA's do."""
    if model == "latent":
        return Layout.latent(f"{model} {whose(rank, model)}", "float32", 3, BLOCKS, TOKENS, 64)
    return Layout.paged(f"{model} {rank}", "float32", 3, BLOCKS, TOKENS, 2, 16)


def whose(rank: str, model: str) -> str:
    """What the bytes of a slot depend on."""
    return rank.rpartition(".")[0] if model == "latent" else rank


def slot_bytes(sequence: str, position: int, rank: str, size: int) -> bytes:
    return hashlib.shake_128(f"{sequence}/{position}/{rank}".encode()).digest(size)


def in_pieces(layout: Layout):
    """A pool somewhere in pieces of memory, each the smallest that there is."""
    device = open_device(DEVICE)
    virtual = device.driver().virtual
    size = virtual.granularity
    count = -(-(layout.pool_bytes + 512) // size)
    address = virtual.reserve(count * size)
    for n in range(count):
        handle = virtual.create(size)
        virtual.map(address + n * size, size, handle)
        virtual.release(handle)
    return device.share(layout, address + 512)


def pool_of(rank: str, model: str, socket: str):
    """The engine's own, or its daemon's."""
    layout = layout_of(rank, model)
    if IN_PIECES:
        return in_pieces(layout)
    return borrow(layout, DEVICE, socket=socket) if BORROWS else allocate(layout, DEVICE)


class Engine:
    """One rank. `free`: blocks that no sequence holds."""

    def __init__(self, rank: str, guard, pool) -> None:
        self.rank, self.guard, self.pool = rank, guard, pool
        self.lengths: dict[str, int] = {}
        self.blocks: dict[str, list[int]] = {}
        self.free = list(range(BLOCKS))
        self.written: list[tuple[int, int, int]] = []  # pieces of this step: block, start, count

    def step(self, commits: list) -> dict:
        """[[sequence, new positions], ...] in one step."""
        try:
            with self.guard.step(sum(count for _, count in commits)) as step:
                self.written = []
                for sequence, count in commits:
                    self._write(step, sequence, count)
                if self.written:
                    step.wrote(*map(list, zip(*self.written, strict=True)))
        except Fenced as error:
            return {"fenced": str(error)}
        return {"lengths": self.lengths}

    def _write(self, step, sequence: str, count: int) -> None:
        start, fresh = self.lengths.get(sequence, 0), sequence not in self.lengths
        blocks, new = self.blocks.setdefault(sequence, []), []
        while len(blocks) * TOKENS < start + count:
            new.append(self.free.pop(0))
            blocks.append(new[-1])
        width = self.pool.layout.token_bytes
        for position in range(start, start + count):
            data = memoryview(slot_bytes(sequence, position, self.rank, width))
            self.pool.scatter([blocks[position // TOKENS]], [position % TOKENS], [1], data)
        first, last = start // TOKENS, (start + count - 1) // TOKENS
        ends = [min(TOKENS, start + count - index * TOKENS) for index in range(first, last + 1)]
        starts = [max(0, start - index * TOKENS) for index in range(first, last + 1)]
        self.written += [(blocks[first + n], starts[n], ends[n] - starts[n]) for n in range(len(ends))]
        known = 0 if fresh else start + 1  # ids run one ahead: the next step's input is known
        step.commit(sequence, start + count, blocks=new, tokens=list(range(known, start + count + 1)), request=b"request" if fresh else None)
        self.lengths[sequence] = start + count

    def release(self, sequence: str) -> dict:
        with self.guard.step(0) as step:
            step.release(sequence)
        self.free += self.blocks.pop(sequence)
        del self.lengths[sequence]
        return {"lengths": self.lengths}

    def truncate(self, sequence: str, position: int) -> dict:
        with self.guard.step(0) as step:
            step.truncate(sequence, position)
        keep = -(-position // TOKENS)
        self.free += self.blocks[sequence][keep:]
        del self.blocks[sequence][keep:]
        self.lengths[sequence] = position
        return {"lengths": self.lengths}

    def fetch(self, token: dict, timeout_s: float, first: int = 0) -> dict:
        """Go on with a dead instance's sequence: its KV into blocks of this one, committed as a sequence of its own. `first`: the first of its ids."""
        moved = decode(token)
        needed = -(-moved.position // TOKENS)
        blocks = self.free[:needed]
        try:
            ids = struct.pack(f"<{moved.position}I", first, *range(1, moved.position))
            fetched = self.guard.fetch(moved, blocks, timeout_s, (moved.position, ids_sum(ids)))
        except KvguardError as error:
            return {"refused": f"{type(error).__name__}: {error}"}
        del self.free[:needed]
        self.blocks[moved.sequence], self.lengths[moved.sequence] = blocks, moved.position
        with self.guard.step(0) as step:
            step.commit(moved.sequence, moved.position, blocks=blocks, tokens=list(range(moved.position + 1)), request=b"moved")
        return {"position": fetched.position, "bytes": fetched.bytes, "ms": fetched.ms}

    def sums(self) -> dict:
        """By sequence, xxh3_64 of each position's canonical bytes, read from the pool."""
        width, found = self.pool.layout.token_bytes, {}
        for sequence, length in self.lengths.items():
            out = memoryview(bytearray(length * width))
            blocks = self.blocks[sequence]
            counts = [min(TOKENS, length - index * TOKENS) for index in range(len(blocks))]
            self.pool.capture(blocks, [0] * len(blocks), counts, out)
            found[sequence] = [xxhash.xxh3_64_intdigest(out[n * width : (n + 1) * width]) for n in range(length)]
        return {"sums": found}

    def intact(self) -> dict:
        """Whether every committed position still holds what was written there, wherever it was written."""
        width, wrong = self.pool.layout.token_bytes, []
        for sequence, sums in self.sums()["sums"].items():
            wanted = [xxhash.xxh3_64_intdigest(slot_bytes(sequence, n, self.rank, width)) for n in range(len(sums))]
            wrong += [[sequence, n] for n, pair in enumerate(zip(sums, wanted, strict=True)) if pair[0] != pair[1]]
        return {"wrong": wrong, "lengths": self.lengths}

    def restore(self, timeout_s: float) -> dict:
        """Survivor: truncate to the plan and go on."""
        restored = self.guard.restore(timeout_s)
        self.take(restored)
        return {"epoch": self.guard.epoch.counter, "lengths": self.lengths}

    def take(self, restored) -> None:
        """The sequences as they are after a plan."""
        sequences = restored.pull()  # what was adopted, or merely truncated, is there already
        self.lengths = {one.name: one.position for one in sequences}
        self.blocks = {one.name: list(one.blocks) for one in sequences}
        used = {block for blocks in self.blocks.values() for block in blocks}
        self.free = [block for block in range(BLOCKS) if block not in used]
        restored.done()

    def status(self) -> dict:
        return {"connected": self.guard.connected, "refused": self.guard.refused, "fenced": self.guard.fenced, "epoch": self.guard.epoch.counter}

    def hold(self, mib: int) -> dict:
        """Memory that takes a while to be torn down, as a model's weights do."""
        self.weights = np.ones(mib << 20, np.uint8)
        return {"held": mib}

    def unsaid(self) -> dict:
        """Whether a block that no sequence ever had is as the first engine of this memory left it: nobody copies such a block."""
        out = memoryview(bytearray(self.pool.layout.block_bytes))
        self.pool.capture_blocks([BLOCKS - 1], out)
        return {"as_it_was": bytes(out) == b"\xa5" * len(out)}

    def counts(self) -> dict:
        """Of a pool on a GPU: whether it has a ring, steps packed into it and skipped."""
        return {"joined": self.pool.joined, "packed": self.pool.packed, "skipped": self.pool.skipped, "lost": self.pool.lost}

    def end_client_thread(self) -> dict:
        """The thread that talks to the daemon ends as no program ends one; everything else goes on."""

        def gone() -> None:
            ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)

        self.guard.session.attach_again(gone, self.guard.session.received)
        return {"ended": True}


class Lead:
    """A scheduler: ids ahead of the ranks' KV."""

    def __init__(self, guard) -> None:
        self.guard = guard
        self.known: dict[str, int] = {}

    def accept(self, sequence: str, length: int, ids: int) -> dict:
        """`length` positions are accepted, `ids` ids are known."""
        known = self.known.get(sequence)
        first = -(-(ids if known is None else 0) // TOKENS)
        try:
            with self.guard.step(0) as step:
                new = list(range(known or 0, ids))
                step.commit(sequence, length, blocks=list(range(first)), tokens=new, request=b"request" if known is None else None)
        except Fenced as error:
            return {"fenced": str(error)}
        self.known[sequence] = ids
        return {"known": self.known}

    def restore(self, timeout_s: float) -> dict:
        restored = self.guard.restore(timeout_s)
        restored.done()
        return {"epoch": self.guard.epoch.counter, "lengths": {one.name: one.position for one in restored.sequences}}

    def status(self) -> dict:
        return {"connected": self.guard.connected, "refused": self.guard.refused, "fenced": self.guard.fenced, "epoch": self.guard.epoch.counter}


def serve(engine: Engine | Lead) -> None:
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do")
        if verb == "detach":
            engine.guard.detach()
            say({"detached": True})
            return
        say(getattr(engine, verb)(**command))


def say(document: dict) -> None:
    print(json.dumps(document), flush=True)


def main(role: str, instance: str, rank: str, socket: str, model: str = "numpy") -> None:
    if role == "scheduler":
        engine = Lead(attach_scheduler(instance, BLOCKS, TOKENS, dp=Rank.parse(rank).dp, socket=socket))
        say({"attached": True})
    elif role == "standby":
        spare = attach_standby(instance, {rank: layout_of(rank, model)}, endpoint=f"spare of {rank}", socket=socket, device=DEVICE)
        say({"standby": True})
        claim = None
        while claim is None:
            claim = spare.wait(1.0)
        pool = claim.adopt[1] if claim.adopt is not None else allocate(layout_of(rank, model), DEVICE)
        guard = attach(instance, Rank.parse(rank), pool, claim=claim, endpoint=f"engine of {rank}")
        engine = Engine(whose(rank, model), guard, pool)
        adopted = claim.adopt is not None
        engine.take(guard.restore(10.0))
        say({"claimed": True, "adopted": adopted, "lengths": engine.lengths})
    else:
        pool = pool_of(rank, model, socket)
        pool.scatter_blocks(range(BLOCKS), memoryview(b"\xa5" * pool.layout.pool_bytes))  # what nobody wrote is no zero
        guard = attach(instance, Rank.parse(rank), pool, endpoint=f"engine of {rank}", socket=socket, positions_max=1024)
        engine = Engine(whose(rank, model), guard, pool)
        say({"attached": True})
    serve(engine)


if __name__ == "__main__":
    main(*sys.argv[1:])
