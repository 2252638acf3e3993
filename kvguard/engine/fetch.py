"""A sequence of a dead instance goes on in this one: its KV comes from this node's daemon into blocks that this engine chose.

Knows: the line to the daemon, a moved token, this rank's pool. Must not know: plans, who decided that the sequence moves here.

Invariants
- Bounded: no call takes longer than its timeout, but for the batch in hand; at most ASKS_MAX questions are out at once, and a lost answer is asked for again.
- Nothing of this instance's table is touched: what was fetched is the caller's to commit, as a sequence of its own.
- A fetch that fails may have written some of the given blocks: they hold nothing that may be used. A descriptor that comes late is closed.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from kvguard.device import open_device
from kvguard.device.gpu_pool import GpuPool
from kvguard.engine.arriving import Arriving
from kvguard.engine.pull import pull_pages, pull_pool, token_counts
from kvguard.errors import BadFrame, Refused, Stale, TimedOut
from kvguard.format import local
from kvguard.format.pages import PageReader
from kvguard.types import MovedToken, Position

ASKS_MAX = 4  # the line keeps a few unsent messages: fetches must not push each other out of it
REPEAT_S = 0.5
AGAIN_S = 0.01


class Fetched(NamedTuple):
    """KV of [0, position) is in the blocks. `bytes`: copied; `ms`: from the question to the last byte."""

    position: Position
    bytes: int
    ms: float


class Fetch:
    """One moved sequence, found at this node's daemon and not yet copied: from guard.fetch_begin. Close it, or use `with`; pull() may be called once or again.

    `position`: how much of it is here; `blocks_needed`: how many blocks that takes.
    """

    def __init__(self, pool, moved: MovedToken, given: local.FetchGiven, descriptor: int, since: float, due: float) -> None:
        self.moved, self.position = moved, given.position
        self._pool, self._given, self._since, self._due = pool, given, since, due
        self._counts = token_counts(given.position, given.shape.block_tokens)
        self._reader: PageReader | None = None
        self._source = None
        if given.layout is None:
            try:
                self._reader = PageReader(descriptor, given.shape)
            finally:
                os.close(descriptor)
        else:
            self._source = open_device("host").open(given.layout, [descriptor], writable=False)  # owns the descriptor, also on refusal

    @property
    def blocks_needed(self) -> int:
        return len(self._counts)

    def pull(self, blocks: Sequence[int]) -> Fetched:
        """Block n of the sequence into blocks[n] of this rank's pool, verified. Where tokens aren't addressable the last block comes whole.

        Raises TimedOut, BadFrame (a sum doesn't hold), Refused (given up meanwhile, or too few or foreign blocks).
        """
        if len(blocks) < self.blocks_needed:
            raise Refused(f"{self.position} positions of {self.moved.sequence!r} need {self.blocks_needed} blocks, {len(blocks)} were given. Try: more blocks")
        here, given = list(blocks[: self.blocks_needed]), self._given
        try:
            if self._reader is not None:
                copied = pull_pages(self._pool, self._reader, given.blocks, given.generations, self._counts, here, self._due)
            else:
                copied = pull_pool(self._pool, self._source, given.blocks, self._counts, here, self._due)
        except Stale as error:
            raise Refused(f"{self.moved.sequence!r} is not here any more: {error}. Try: compute it from its ids") from error
        except TimedOut as error:
            raise TimedOut(f"fetching {self.moved.sequence!r} of {self.moved.instance!r} took too long: {error}") from error
        return Fetched(self.position, copied, 1e3 * (time.monotonic() - self._since))

    def begin(self, blocks: Sequence[int]) -> Arriving:
        """As pull, into a pool on a GPU, and without waiting: the forward pass may run behind `.wait(layer)`; nothing is committed before `.finish()` returned.

        Close it, or use `with`, before this fetch. Raises what pull raises, and Refused where only pull can bring it.
        """
        if self._reader is None or not isinstance(self._pool, GpuPool) or len(blocks) < self.blocks_needed:
            raise Refused(f"{self.moved.sequence!r} doesn't come layer by layer into {len(blocks)} blocks. Try: pull, with enough blocks")
        given = self._given
        return Arriving(self._pool, self._reader, given.blocks, given.generations, self._counts, list(blocks[: self.blocks_needed]), self._due)

    def close(self) -> None:
        """Unmap. Idempotent."""
        if self._reader is not None:
            self._reader.close()
        if self._source is not None:
            self._source.close()
        self._reader = self._source = None

    def __enter__(self) -> Fetch:
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Fetches:
    """A guard's questions to its daemon. `ask` is called from any thread, `answered` from the client thread."""

    def __init__(self, guard) -> None:
        self._guard = guard
        self._changed = threading.Condition()
        self._waiting: dict[int, tuple[local.Local, list[int]] | None] = {}
        self._next = 1
        self._closed = False

    def begin(self, moved: MovedToken, timeout_s: float, ids: tuple[int, int] = (0, 0)) -> Fetch:
        """Raises Refused: forged, stale, another layout, other ids, not here. TimedOut: no answer."""
        since = time.monotonic()
        due = since + timeout_s
        pool = self._guard.pool
        if pool is None:
            raise Refused(f"{self._guard.role} of {self._guard.instance!r} has no pool to fetch into. Try: guard.fetch in a rank")
        given, descriptor = self._ask(moved, due, ids)
        fitting = given.shape.fingerprint == pool.layout.fingerprint and 0 <= given.position == moved.position
        needed = -(-given.position // given.shape.block_tokens) if given.shape.block_tokens > 0 else -1
        if not fitting or needed != len(given.blocks) or needed != len(given.generations):
            os.close(descriptor)
            raise Refused(f"what the daemon has of {moved.sequence!r} doesn't fit this rank's pool. Try: compute it from its ids")
        return Fetch(pool, moved, given, descriptor, since, due)

    def _ask(self, moved: MovedToken, due: float, ids: tuple[int, int]) -> tuple[local.FetchGiven, int]:
        number = self._enter(moved, due)
        try:
            while True:
                message, descriptors = self._answer(local.Fetch(number, moved, *ids), due)
                if isinstance(message, local.FetchGiven):
                    if len(descriptors) != 1:
                        _close(descriptors)
                        raise BadFrame(f"an answer to a fetch with {len(descriptors)} descriptors")
                    return message, descriptors[0]
                _close(descriptors)
                if not message.again or time.monotonic() + AGAIN_S > due:
                    raise Refused(f"{moved.sequence!r} of {moved.instance!r}: {message.reason}. Try: compute it from its ids")
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, AGAIN_S)
        finally:
            with self._changed:
                late = self._waiting.pop(number, None)
                self._changed.notify_all()
            if late is not None:
                _close(late[1])

    def _enter(self, moved: MovedToken, due: float) -> int:
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or len(self._waiting) < ASKS_MAX, max(0.0, due - time.monotonic())):
                raise TimedOut(f"{ASKS_MAX} fetches were out all the time that {moved.sequence!r} waited. Try: a longer timeout, or compute it from its ids")
            number, self._next = self._next, self._next + 1
            self._waiting[number] = None
            return number

    def _answer(self, question: local.Fetch, due: float) -> tuple[local.Local, list[int]]:
        """Say it until it is answered: a daemon that restarts forgets what it was asked."""
        number, moved = question.number, question.token
        while True:
            session = self._guard.session
            if session is None or session.refused or self._closed:
                raise Refused(f"this rank is not attached ({session.refused if session else 'no line to a daemon'}). Try: compute it from its ids")
            session.say(question)
            with self._changed:
                left = due - time.monotonic()
                if self._changed.wait_for(lambda: self._closed or self._waiting[number] is not None, max(0.0, min(left, REPEAT_S))) and not self._closed:
                    answer, self._waiting[number] = self._waiting[number], None
                    return answer
            if not self._closed and time.monotonic() >= due:
                raise TimedOut(f"the daemon didn't say where {moved.sequence!r} of {moved.instance!r} is. Try: compute it from its ids")

    def answered(self, message: local.FetchGiven | local.FetchRefused, descriptors: list[int]) -> None:
        """Takes the descriptors: what nobody waits for (any more) is closed."""
        with self._changed:
            if message.number in self._waiting and self._waiting[message.number] is None and not self._closed:
                self._waiting[message.number] = (message, descriptors)
                self._changed.notify_all()
                return
        _close(descriptors)

    def close(self) -> None:
        """Whoever waits is refused at once."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()


def _close(descriptors: list[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
