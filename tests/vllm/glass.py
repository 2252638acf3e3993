"""A look at one rank's pool and at its replica, from outside of both: whether every committed byte is in the other node's arena.

Knows: /proc/PID/fd, the commit table, pages. Must not know: vLLM's process tree beyond a process group.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kvguard.device.host import HostDevice, HostPool
from kvguard.engine.look import TableReader
from kvguard.engine.vllm_layouts import Pages, column_keys
from kvguard.errors import BadFrame, Stale
from kvguard.format.layout import Layout, whole
from kvguard.format.pages import PageReader, page_bytes

LAYERS, HEADS, DIM, TOKENS, ITEMSIZE = 30, 3, 64, 32, 2  # SmolLM2-135M in bfloat16, blocks of 32


def processes_of(group: int) -> list[int]:
    """Pids of a process group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
            except ProcessLookupError:
                continue
    return sorted(found)


def descriptors(pids: list[int], name: str) -> list[int]:
    """Own descriptors of what those processes hold under a memfd's or file's name; one per inode."""
    seen, found = set(), []
    for pid in pids:
        for link in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name)):
            try:
                target = os.readlink(link)
                if name not in target or not target.startswith(("/memfd:", "/")) or target.startswith("/dev/"):
                    continue
                opened = os.open(link, os.O_RDWR)
            except OSError:
                continue
            else:
                inode = os.fstat(opened).st_ino
                if inode in seen:
                    os.close(opened)
                else:
                    seen.add(inode)
                    found.append(opened)
    return found


def workers_of(group: int) -> list[int]:
    """An engine's workers, in the order of their titles, which vLLM makes of their ranks."""
    found = [pid for pid in processes_of(group) if holds(pid, "kvguard-vllm-pool")]
    return sorted(found, key=lambda pid: Path(f"/proc/{pid}/cmdline").read_bytes())


def smollm2_layout(slab_bytes: int, layers: int = LAYERS, heads: int = HEADS) -> Layout:
    """As the adapter makes it on a CPU without AMX, of so many layers and heads; names of model and shard don't matter here."""
    page = 2 * heads * TOKENS * DIM * ITEMSIZE
    blocks = slab_bytes // (layers * page)
    row = 2 * DIM * ITEMSIZE
    pages = Pages(0, blocks * page, page, TOKENS * row, row, layers, blocks, heads, TOKENS, 2 * DIM, ITEMSIZE)
    return Layout("", "bfloat16", ITEMSIZE, blocks, TOKENS, column_keys(pages), whole(layers, heads), True, slab_bytes)


class Glass:
    """One engine's only worker (by its process group), or that `worker` of it, and the daemon that holds its replica (by pid). `positions`: how far that daemon
    has each sequence now; `layout`: of a pool of so many bytes."""

    def __init__(
        self, group: int, holder: int, positions: Callable[[], dict[str, int]], worker: int = 0, layout: Callable[[int], Layout] = smollm2_layout,
    ) -> None:  # fmt: skip
        [worker] = [worker] if worker else workers_of(group)
        [slab] = descriptors([worker], "kvguard-vllm-pool")
        self.pool: HostPool = HostDevice().open(layout(os.fstat(slab).st_size), [slab], writable=False)
        [table] = descriptors([worker], "kvguard-table")
        self.table = TableReader(table)
        self.worker, self._holder, self._positions = worker, holder, positions
        self._blocks: dict[int, list[int]] = {}
        self._committed: dict[int, int] = {}
        self._rows: dict[str, int] = {}
        self._voids: dict[int, int] = {}  # by row: how often what it held became void

    def look(self) -> dict[str, tuple[list[int], int]]:
        """Sequence -> (blocks, committed positions), of all live rows."""
        look = self.table.look()
        for row in [*look.released, *(cut.row for cut in look.cut)]:
            self._voids[row] = self._voids.get(row, 0) + 1
        for row in look.released:
            self._blocks.pop(row, None)
            self._committed.pop(row, None)
        for cut in look.cut:
            self._blocks[cut.row] = self._blocks[cut.row][: cut.blocks]
            self._committed[cut.row] = min(self._committed.get(cut.row, 0), cut.kept)
        for opened in look.opened:
            self._blocks[opened.row], self._committed[opened.row] = [], 0
        for grown in look.grown:
            self._blocks[grown.row] = self._blocks[grown.row][: grown.first] + list(grown.blocks)
        self._committed.update(zip(look.rows, look.committed, strict=True))
        self._rows = {meta.name: row for row in self._blocks if (meta := self.table.sequence(row)) is not None}
        return {name: (list(self._blocks[row]), self._committed.get(row, 0)) for name, row in self._rows.items()}

    def block(self, block: int, tokens: int) -> bytes:
        """Canonical bytes of the first tokens of a pool's block."""
        out = memoryview(bytearray(tokens * self.pool.layout.token_bytes))
        self.pool.capture([block], [0], [tokens], out)
        return bytes(out)

    def arenas(self) -> list[PageReader]:
        """The holder's pages for pools of this shape: this one's, and what it keeps of former lives."""
        shape = self.pool.layout.shape()
        wanted = shape.blocks * page_bytes(shape)
        found = descriptors([self._holder], "")
        try:
            fitting = [fd for fd in found if os.fstat(fd).st_size >= wanted and os.fstat(fd).st_size != self.pool.layout.pool_bytes]
            return [PageReader(fd, shape) for fd in fitting]
        finally:
            for fd in found:
                os.close(fd)

    def compared(self, look: dict[str, tuple[list[int], int]], damage: bool = False) -> tuple[int, int, int]:
        """Of the last look: (positions equal in pool and arena, positions not there yet, positions whose block went on meanwhile). Raises AssertionError where
        bytes differ.

        `damage`: flips a bit of what was read from the pool: the comparison must notice.
        """
        arenas, equal, missing, gone = self.arenas(), 0, 0, 0
        rows, voids, whole = dict(self._rows), dict(self._voids), self._positions()
        for name, (blocks, committed) in look.items():
            row = rows[name]
            for index in range(-(-committed // TOKENS)):
                # Beyond a sequence's position a page holds what it held before, with sums that hold: nobody may read there.
                tokens = min(TOKENS, committed - index * TOKENS, whole.get(name, 0) - index * TOKENS)
                if tokens <= 0:
                    missing += committed - index * TOKENS
                    break
                block = blocks[index]
                generation = int(self.table.views.block_generations[block])
                held = next((found for arena in arenas if (found := page_of(arena, block, generation, tokens)) is not None), None)
                here = self.block(block, tokens)
                if int(self.table.views.block_generations[block]) != generation:
                    gone += tokens
                elif held is None:
                    missing += tokens
                elif bytes([here[0] ^ damage]) + here[1:] == held:
                    equal += tokens
                else:
                    # Whatever overwrites a block says so in the table first: a look after the bytes were read tells whether they still were this sequence's.
                    self.look()
                    gone += tokens
                    over = self._voids.get(row, 0) != voids.get(row, 0)
                    assert over, f"{name}: block {block} (index {index}, {tokens} tokens) differs between pool and replica"
        return equal, missing, gone


def page_of(arena: PageReader, block: int, generation: int, tokens: int) -> bytes | None:
    """A page that holds, None where it isn't there (yet)."""
    try:
        return bytes(arena.page(block, generation, tokens))
    except (Stale, BadFrame):
        return None


def holds(pid: int, name: str) -> bool:
    """Whether a process has a descriptor of that name open."""
    try:
        return any(name in os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, PermissionError):
        return False
