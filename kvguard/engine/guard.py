"""What a serving process holds of kvguard: a rank's guard, and the steps in which it says what is true.

Knows: the order of a step (fence, stage, publish, completion, bell), the adopted epoch. Must not know: who replicates, what a plan is for.

Invariants
- A step never waits: it writes memory, rings an eventfd that can't block, and raises only Fenced or what the caller did wrong.
- What a step commits becomes visible when it ends well, and a fact when its completion word is written; a step that raises, or whose epoch is over at its
  exit, commits nothing. Releases and truncations are true when the call returns.
- A fenced guard enters no step until `restore` has been carried out.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from kvguard.device.host import HostPool
from kvguard.engine.client import Session, client
from kvguard.engine.fetch import Fetch, Fetched, Fetches
from kvguard.engine.table import TableWriter
from kvguard.errors import Fenced, TimedOut
from kvguard.format import local
from kvguard.format import rows as fmt
from kvguard.format.layout import Layout
from kvguard.format.lineage import forked
from kvguard.format.messages import PlanOrder
from kvguard.types import Epoch, MovedToken, Rank, StreamId


_EPOCH, _WRITTEN, _ENTERED, _LEFT, _SIZE = (at // 8 for at in (fmt.EPOCH_AT, fmt.WRITTEN_AT, fmt.ENTERED_AT, fmt.LEFT_AT, fmt.SIZE_AT))
_PULSE, _SUSPENDED = fmt.PULSE_AT // 8, fmt.SUSPENDED_AT // 8
_NO_EPOCH = -1  # older than every epoch: no step is entered


class Step:
    """One engine step; from `guard.step(size)`. Sequences are named by the engine's request ids; commit answers with a row, the handle for commit_batch."""

    # What a step touches is here and not behind the guard: whatever else would have to be fetched is cold between two steps.
    __slots__ = ("words", "newest", "_table", "_guard", "_written")

    def __init__(self, guard: Guard) -> None:
        self._guard, self._table = guard, guard.table
        self.words, self._written = guard.table.header, guard.table.views.word(fmt.WRITTEN_AT)
        self.newest = _NO_EPOCH  # the counter beyond which the epoch is over

    def close(self) -> None:
        """Nothing shared is touched from here on."""
        self.words = memoryview(bytearray(fmt.PAGE_BYTES)).cast("Q")
        self._written = self.words[_WRITTEN : _WRITTEN + 1]

    def __enter__(self) -> Step:
        return self

    def __exit__(self, kind, error, trace) -> None:
        guard, table, words = self._guard, self._table, self.words
        number = table.step
        if kind is not None or words[_EPOCH] > self.newest:
            table.roll_back()
            words[_LEFT] = number
            guard._ring()
            if kind is None:
                guard._raise_fenced()
            return
        tape, pool = table.tape, guard.pool
        if tape is not None and tape.staged is not None:
            tape.publish()
        else:
            table.publish()
        if pool is None or type(pool) is HostPool:  # what was written is complete: spares a call
            words[_WRITTEN] = number
        else:
            pool.publish(self._written, number)
        words[_LEFT] = number
        guard._ring()

    def commit(self, sequence: str, length: int, blocks=(), tokens=(), sampler: bytes | None = None, request: bytes | None = None) -> int:
        """KV of [0, length) is complete once this step is; `blocks`, `tokens`: appended ids (ints), deltas. The first commit of a sequence opens it and brings
        `request` (opaque bytes; b"" for none). `sampler`: <= 32 opaque bytes. Returns the row.

        Raises KeyError: an unknown sequence without `request`. ValueError: a live sequence with one, positions beyond blocks or tokens, or going back.
        """
        table = self._table
        if request is None:
            row = table.row(sequence)
            table.commit(row, length, tokens, blocks, sampler)
            return row
        row = table.open(sequence, forked((), self._guard.epoch.counter, 0), request)
        try:
            table.commit(row, length, tokens, blocks, sampler)
        except BaseException:
            table.unstage(row)
            raise
        return row

    def commit_batch(self, sequences, lengths, tokens=None, blocks=None) -> None:
        """Many decoding sequences: rows (int array, the fast way) or names; int [n] lengths; one new token each (int [n]) or None.

        `blocks`: {index in the batch: appended block ids}. Raises KeyError, ValueError; then nothing of the batch is staged.
        """
        table = self._table
        tape = table.tape
        if tape is not None and tape.stage(table.step, sequences, lengths, tokens, blocks):
            return
        if len(sequences) and isinstance(sequences[0], str):
            sequences = np.array([table.row(sequence) for sequence in sequences], np.intp)
        table.commit_batch(sequences, lengths, tokens, blocks)

    def truncate(self, sequence: str, position: int, keep_blocks: int = 0) -> None:
        """KV and tokens beyond `position` are void, at once; call before the overwriting work is launched. Blocks beyond the position leave the list, except
        where `keep_blocks` says how many stay. Raises KeyError, ValueError (a position beyond what is accepted; a commit of the same step came first)."""
        table = self._table
        table.truncate(table.row(sequence), position, keep_blocks=keep_blocks)

    def release(self, sequence: str) -> None:
        """The sequence is over, at once; call before its blocks are reused. Raises KeyError."""
        table = self._table
        table.release(table.row(sequence))

    def wrote(self, blocks, starts, counts) -> None:
        """Which slots this step writes: pools that capture in the engine's process start from it. A host pool needs none: its daemon reads the rows."""
        capture = getattr(self._guard.pool, "wrote", None)
        if capture is not None:
            capture(blocks, starts, counts)


class Guard:
    """One attachment: a rank (with a pool) or a scheduler (without). Steps, truncate, release and restore: one thread at a time; `fenced`, `pulse`: any.

    `epoch`: the adopted one. `table`, `pool`, `layout`, `stream`: what the daemon maps. `session`: the line to it.
    """

    def __init__(
        self, role: str, instance: str, rank: Rank, table: TableWriter, pool, layout: Layout | None, stream: StreamId, endpoint: str, epoch: Epoch,
    ) -> None:  # fmt: skip
        self.role, self.instance, self.rank, self.endpoint = role, instance, rank, endpoint
        self.table, self.pool, self.layout, self.stream = table, pool, layout, stream
        self.incarnation = int.from_bytes(os.urandom(8), "little") >> 1
        self.session: Session | None = None
        self.on_order: Callable[[], None] | None = None  # see received()
        self._said = 0  # how often the attachment was said to a daemon
        self._order: PlanOrder | None = None
        self._restored: local.Restored | None = None
        self.behind: Epoch | None = None  # whose plan counted on what this rank's last step had taken back
        self._changed = threading.Condition()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._step = Step(self)
        self._epoch, self._claim = epoch, None
        self._say_newest()
        self._fetches = Fetches(self)
        self._detached = False

    # ---- steps ------------------------------------------------------------------------------------------------------------------

    def step(self, size: int) -> Step:
        """Enter a step of `size` positions, before its forward pass: `with guard.step(size) as step`. Raises Fenced where the epoch is over."""
        step = self._step
        words, table = step.words, self.table
        if words[_EPOCH] > step.newest:
            self._raise_fenced()
        table.step = number = table.step + 1
        words[_SIZE] = size
        words[_ENTERED] = number
        return step

    def _ring(self) -> None:
        try:  # contextlib.suppress is ten times as much code
            os.eventfd_write(self._bell, 1)
        except BlockingIOError:
            pass  # the counter is full: the bell has been ringing all along

    def _raise_fenced(self) -> None:
        if self.claim is not None:
            raise Fenced(f"rank {self.rank} of {self.instance!r} was claimed and is not restored yet. Try: guard.restore(timeout), then its done()")
        raise Fenced(
            f"epoch {self.epoch.counter} of {self.instance!r} is over, {self._step.words[_EPOCH]} has begun. "
            "Try: drop this step's results and call guard.restore(timeout)"
        )

    @property
    def fenced(self) -> bool:
        """Whether the adopted epoch is over: one memory read."""
        return self._step.words[_EPOCH] > self.epoch.counter

    @property
    def connected(self) -> bool:
        """Whether there is a line to the daemon now. Nothing depends on it."""
        return self.session is not None and self.session.connected

    @property
    def refused(self) -> str:
        """Why the daemon refused this attachment for good; empty where it didn't."""
        return self.session.refused if self.session else ""

    def row(self, sequence: str) -> int:
        """A live sequence's handle for commit_batch. Raises KeyError."""
        return self.table.row(sequence)

    def pulse(self) -> None:
        """Progress within a long step: once per layer of a long prefill, say."""
        self._step.words[_PULSE] += 1

    @contextlib.contextmanager
    def suspended(self):
        """A known pause (compilation, weight updates): no hang is suspected meanwhile."""
        self._step.words[_SUSPENDED] = 1
        self._ring()
        try:
            yield
        finally:
            self._step.words[_SUSPENDED] = 0
            self._ring()

    # ---- epochs -----------------------------------------------------------------------------------------------------------------

    @property
    def epoch(self) -> Epoch:
        """The adopted one."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: Epoch) -> None:
        self._epoch = epoch
        self._say_newest()

    @property
    def claim(self):
        """What this guard is to restore before its first step; None for nothing."""
        return self._claim

    @claim.setter
    def claim(self, claim) -> None:
        self._claim = claim
        self._say_newest()

    def _say_newest(self) -> None:
        self._step.newest = self._epoch.counter if self._claim is None else _NO_EPOCH

    def restore(self, timeout_s: float):
        """A survivor, or a claimed rank: wait for what the plan says of this rank. A survivor's rows are truncated and released when this returns.

        Returns engine.restore.Restored: `.epoch`, `.sequences`, `.pull()` for a claim without a pool, then `.done()`. Where the plan asks for more than is here
        the daemon is told, and another plan waited for: the fence fell into a step that truncated or released. Raises TimedOut; Refused where that plan does so
        again.
        """
        from kvguard.engine.restore import Restored

        if self.claim is not None:
            return Restored.of_claim(self, self.claim)
        deadline, restored = time.monotonic() + timeout_s, None
        while restored is None:
            with self._changed:
                if not self._changed.wait_for(lambda: self._has_order() or not self.fenced, deadline - time.monotonic()):
                    who = f"{self.rank} of {self.instance!r}"
                    raise TimedOut(f"no restore order for {who} within {timeout_s} s. Try: kvguard status; is the coordinator there?")
                order, self._order = (self._order, None) if self._has_order() else (None, self._order)
            restored = Restored.of_nothing(self) if order is None else Restored.of_order(self, order)
        return restored

    def _has_order(self) -> bool:
        return self._order is not None and self._order.epoch.counter > self.epoch.counter and self._order.epoch.counter >= self._step.words[_EPOCH]

    def adopt(self, epoch: Epoch, restored: local.Restored) -> None:
        """The epoch in which this guard goes on, and the answer that is said now, and again when asked again. Called by Restored.done()."""
        with self._changed:
            self.claim = self.behind = None
            self.epoch = epoch
            self._restored = restored
        if self.session is not None:
            self.session.say(restored)

    # ---- sequences that move here -------------------------------------------------------------------------------------------------

    def fetch(self, moved: MovedToken, blocks: Sequence[int], timeout_s: float, ids: tuple[int, int] = (0, 0)) -> Fetched:
        """KV [0, moved.position) of a dead instance's sequence into this rank's own `blocks` (block n of the sequence into blocks[n]), verified; the tail block
        whole where tokens aren't addressable. From any thread, beside steps; the blocks must be of no sequence that runs. Commit it as a sequence of your own.

        `ids`: how many of its ids the caller knows, and their moves.ids_sum: KV of other ids is refused.

        Raises Refused (forged, stale, not on this node, another layout), TimedOut, BadFrame (a sum doesn't hold): compute it from its ids then.
        """
        with self.fetch_begin(moved, timeout_s, ids) as found:
            return found.pull(blocks)

    def fetch_begin(self, moved: MovedToken, timeout_s: float = 5.0, ids: tuple[int, int] = (0, 0)) -> Fetch:
        """The first half of fetch: found and mapped, `.pull(blocks)` copies, for adapters that choose blocks and moment. Raises Refused, TimedOut."""
        return self._fetches.begin(moved, timeout_s, ids)

    # ---- the line to the daemon (client thread) -----------------------------------------------------------------------------------

    def connect(self, path: str) -> None:
        """Open the line; returns at once, whether or not a daemon is there."""
        self.session = Session(path, self.attachment, self.received)
        client().add(self.session)

    def attachment(self) -> tuple[local.Local, list[int], list[int]]:
        """What is said whenever the line is new: Attach, its descriptors, and those of them to close afterwards."""
        self._said += 1
        exported = self.pool.export() if self.pool is not None else []
        pidfd = os.pidfd_open(os.getpid())
        layouts = {} if self.layout is None else {str(self.rank): self.layout}
        message = local.Attach(self.role, self.instance, self.incarnation, self.epoch, self.endpoint, self.stream, layouts)
        return message, [pidfd, self._bell, self.table.fd, *exported], [pidfd, *exported]

    def received(self, message: local.Local, descriptors: list[int]) -> None:
        """In the client thread. So is `on_order`, once an order to restore is here: for an engine that looks in its steps alone, and is idle."""
        if isinstance(message, local.FetchGiven | local.FetchRefused):
            self._fetches.answered(message, descriptors)
            return
        join = getattr(self.pool, "join", None)
        if descriptors and join is not None and not self._detached and isinstance(message, local.Attached):
            join(descriptors)  # the daemon's ring, into which a pool on a GPU packs its steps; owned there
            descriptors = []
        for descriptor in descriptors:
            os.close(descriptor)
        if self._detached:  # by what came before this on the same line
            return
        again, ordered = None, False
        with self._changed:
            if isinstance(message, local.Attached):
                self._attached(message.epoch)
            elif isinstance(message, local.RestoreOrder | local.ClaimOrder):
                plan = message.plan
                if self._restored is not None and plan.epoch == self._restored.epoch:
                    again = self._restored
                elif isinstance(message, local.RestoreOrder) and plan.epoch.counter > self.epoch.counter:
                    self._order, ordered = plan, True
            self._changed.notify_all()
        if again is not None:
            self.session.say(again)
        if ordered and self.on_order is not None:
            self.on_order()

    def _attached(self, epoch: Epoch) -> None:
        """Nothing has to be restored where no plan can have counted on this attachment: no sequence was ever here, or this answers the first Attach ever said
        (what was committed in the moment before is as new as what follows; the daemon, which saw it come from an epoch that is over, is told again)."""
        if epoch.counter <= self.epoch.counter or self.claim is not None:
            return
        if self.table.is_untouched:
            self.epoch = epoch
        elif self._said == 1:
            self.epoch = epoch
            self.session.attach_again(self.attachment, self.received)

    def detach(self, timeout_s: float = 1.0) -> None:
        """A clean end: the daemon is told, if it listens, and the table is closed. The pool stays the caller's. Idempotent."""
        if self._detached:
            return
        self._detached = True
        self._fetches.close()
        if self.session is not None:
            self.session.say(local.Detach())
            self.session.end(timeout_s)
        self._step.close()  # a late pulse or question touches nothing that is shared
        self.table.close()
        os.close(self._bell)


