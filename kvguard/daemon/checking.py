"""Replicas of a former life, those that are doubted, and those that are about to be pushed on are verified in slices of the loop, the ones that somebody waits
for first.

Knows: the store's unchecked replicas, who waits. Must not know: how pages are verified, what the core makes of the answers.
Invariants: nothing of an unchecked replica is promised: a sender's Hello waits for its verification, a Report for REPORT_WAIT_NS at most, and then it states
what is verified by then; every one who waits is answered; the loop is never held for longer than a slice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from kvguard.core import events
from kvguard.daemon.perform_node import NodeShell, go_on, probe, send_report
from kvguard.types import StreamId

log = logging.getLogger(__name__)

REPORT_WAIT_NS = 1_000_000_000  # below the coordinator's `exclude_ms`


class Checking:
    """`after`: loop.Loop.after. Begins at once where there is something to verify. `pause_ns`: between two slices.
    `ended`: called whenever all is verified."""

    def __init__(
        self, shell: NodeShell, after: Callable[[int, Callable[[], Iterable[events.Event]]], None], pause_ns: int = 0, ended: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        self._shell = shell
        self._after = after
        self._pause_ns, self._ended = pause_ns, ended
        self._began_ns = shell.clock()
        self.ended_ns = self._began_ns  # when the last page was verified
        self._busy = self._unverified = False
        self._unsaid: tuple[StreamId, ...] = ()
        shell.store.doubted = self.begin
        if shell.store.unchecked():
            self.begin()

    def begin(self, unsaid: tuple[StreamId, ...] = ()) -> None:
        """Something is unchecked (or was an instant ago), or waits to be pushed on. `unsaid`: of these the senders don't know yet that they are doubted."""
        self._unsaid += unsaid
        if not self._busy:
            self._busy, self._began_ns = True, self._shell.clock()
            self._after(0, self._slice)

    def _slice(self) -> Iterable[events.Event]:
        shell = self._shell
        self._unverified = self._unverified or shell.store.unchecked() > 0
        for stream in shell.store.check_some(shell.slice_bytes, shell.probes):
            log.info("replica of %s: verified", stream)
        told: list[events.Event] = [events.ReplicaDoubted(stream, "bytes that don't match their sums were read: it is verified") for stream in self._unsaid]
        self._unsaid = ()
        told += self._answered()
        for push in list(shell.pushes.values())[:1]:  # a recovery waits for it
            told += go_on(shell, push) or ()
        if self._unverified and not shell.store.unchecked():
            self._unverified, self.ended_ns = False, shell.clock()
            self._ended()
            unsound = shell.store.counters["positions_unsound"]
            level = logging.WARNING if unsound else logging.INFO
            log.log(level, "all replicas are verified after %d ms: %d positions did not hold", (self.ended_ns - self._began_ns) // 1_000_000, unsound)
        self._busy = self._unverified or bool(shell.pushes)
        if self._busy:
            self._after(self._pause_ns, self._slice)
        return told

    def _answered(self) -> list[events.Event]:
        shell, told = self._shell, []
        for stream in [stream for stream in shell.probes if not shell.store.unchecked(stream)]:
            told += probe(shell, shell.probes.pop(stream))
        for instance, (since_ns, effect) in list(shell.reports.items()):
            if not shell.store.unchecked(instance=instance) or shell.clock() - since_ns >= REPORT_WAIT_NS:
                del shell.reports[instance]
                told += send_report(shell, effect, waited=True)
        return told
