"""In which thread and in which turn a capture is taken, and what becomes of one that ends after the world has moved on.

Knows: captures in two halves (capture.py), threads by GPU (workers.py), which streams and epochs there are now. Must not know: drivers, the core's decisions.

A GPU's pool is read by that GPU's own thread: a copy is waited for there, paced, for up to a second. Host memory is read in the loop's thread. A token of an
8B model takes about 0.1 ms with its sums and a frame of 1 MiB about 0.25, most of it under the interpreter's lock: another thread would win nothing and cost
two switches. But a node's windows hold many such frames, so those of LARGE_BYTES and more take turns: SLICE_BYTES a turn of the loop, in the order in which
they were asked for. Decoding, acknowledgements and heartbeats wait for one slice at most. A host pool is salvaged without a copy.

Invariants
- Every Capture is completed once, by a Captured event in the loop's thread; one whose stream, process or epoch is another by then has no byte of it.
- One whose pool was salvaged meanwhile is taken anew, from where it is now.
- A pool that was lost is never read again; the core hears of it once, with the reason.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from kvguard.core import effects, events
from kvguard.daemon import capture as capturing
from kvguard.daemon.capture import Begun, Stream
from kvguard.daemon.workers import Job, Outcome, Workers
from kvguard.errors import DeviceLost
from kvguard.types import NO_EPOCH

if TYPE_CHECKING:
    from kvguard.daemon.perform_node import NodeShell

log = logging.getLogger(__name__)

Events = Iterable[events.Event]
LARGE_BYTES = 256 << 10
SLICE_BYTES = 4 << 20  # about 1 ms


def gpu_of(pool) -> str:
    """The GPU whose thread reads this pool, "" for host memory."""
    return getattr(pool, "gpu", "")


class Copies:
    """`workers` None, `after` None: every capture is taken at once, in the caller's thread. `large_bytes`: what takes turns."""

    def __init__(
        self, workers: Workers | None = None, after: Callable[[int, Callable[[], Events]], None] | None = None, large_bytes: int = LARGE_BYTES,
    ) -> None:  # fmt: skip
        self.workers = workers or Workers()
        self._after, self._large_bytes = after, large_bytes
        self._large: deque[tuple[NodeShell, Begun]] = deque()

    def take(self, shell: NodeShell, effect: effects.Capture) -> Events:
        """What completes `effect`, now or in a later turn."""
        stream = shell.streams.get(effect.stream)
        if stream is None or stream.lost:
            return all_stale(effect)
        if gpu := gpu_of(stream.pool):
            return self._put(shell, gpu, stream, effect)
        order = capturing.begun(stream, effect, shell.lend)
        if self._after is None or len(order.out) < self._large_bytes:
            return self._at_once(shell, order)
        self._large.append((shell, order))
        if len(self._large) == 1:
            self._after(0, self._slice)
        return ()

    def _at_once(self, shell: NodeShell, order: Begun) -> Events:
        return self._ended(shell, order, _copied(order, DeviceLost))

    def _slice(self) -> Events:
        told: list[events.Event] = []
        left_bytes = SLICE_BYTES
        while self._large and left_bytes > 0:
            shell, order = self._large.popleft()
            left_bytes -= len(order.out)
            told += self._ended(shell, order, _copied(order, Exception))
        if self._large:
            self._after(0, self._slice)
        return told

    # ---- a GPU's --------------------------------------------------------------------------------------------------------------------

    def _put(self, shell: NodeShell, gpu: str, stream: Stream, effect: effects.Capture) -> Events:
        if stream.leaving:  # once it is known what was salvaged

            def found(outcome: Outcome) -> Events:
                return self._again(shell, effect) if outcome.error is None else self._refused(shell, stream, effect, outcome.error)

            return self.workers.put(gpu, Job(lambda: None, found))
        order = capturing.begun(stream, effect, shell.lend)
        pool = stream.pool
        job = Job(lambda: capturing.copied(order), lambda outcome: self._ended(shell, order, outcome), lambda: pool.copied_bytes, proves=True)
        return self.workers.put(gpu, job)

    def _ended(self, shell: NodeShell, order: Begun, outcome: Outcome) -> Events:
        stream, effect = order.stream, order.effect
        promised = shell.epochs.get(effect.stream.instance, NO_EPOCH)
        if shell.streams.get(effect.stream) is not stream or stream.incarnation != order.incarnation or promised.counter > effect.epoch.counter:
            shell.counters["captures_late"] += 1
            return all_stale(effect)
        if stream.pool is not order.pool:
            return self._again(shell, effect)
        if outcome.error is not None:
            return self._refused(shell, stream, effect, outcome.error)
        data, stale, sums = outcome.value
        shell.counters["captures"] += 1
        shell.counters["pieces_stale"] += len(stale)
        buffer = shell.buffers.keep(data) if len(data) else 0
        return (events.Captured(effect.id, effect.stream, effect.epoch, buffer, len(data), stale, sums),)

    def _again(self, shell: NodeShell, effect: effects.Capture) -> Events:
        """From the memory that the stream has now. Nobody else would catch what goes wrong here."""
        try:
            return self.take(shell, effect)
        except Exception as error:
            return self._failed(shell, effect, error)

    @staticmethod
    def _failed(shell: NodeShell, effect: effects.Capture, error: Exception) -> Events:
        shell.counters["deeds_failed_Capture"] += 1
        log.error("a capture of %s failed", effect.stream, exc_info=error)
        return all_stale(effect)

    def _refused(self, shell: NodeShell, stream: Stream, effect: effects.Capture, error: Exception) -> Events:
        """No byte of it, and where the device was lost nothing of this pool is sent from here on: its positions stay unprotected, and the daemon lives."""
        if type(error) is OverflowError:
            shell.counters["captures_refused"] += 1
            log.warning("%s: %s", stream.id, str(error))
            return all_stale(effect)
        if type(error) is not DeviceLost:
            return self._failed(shell, effect, error)
        if stream.lost:
            return all_stale(effect)
        log.error("%s can't be replicated any more: %s", stream.id, str(error))
        stream.lost = str(error)
        return (*all_stale(effect), events.PoolLost(stream.id, stream.incarnation, stream.lost))


def _copied(order: Begun, caught: type[Exception]) -> Outcome:
    """In a frame of its own: one that kept the outcome would be in a circle with its error, and keep what is mapped until the collector comes."""
    try:
        return Outcome(capturing.copied(order))
    except caught as error:
        return Outcome(None, error)


def all_stale(effect: effects.Capture, _why: str = "") -> Events:
    return (events.Captured(effect.id, effect.stream, effect.epoch, 0, 0, tuple(range(len(effect.rows))), b""),)
