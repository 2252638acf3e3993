"""The sending half of a stream: one per (stream, holder node). Compares what is committed (core/ledger.py) with what was sent, and sends the difference.

Knows: sessions, what a holder says that it has, deadlines. Must not know: bytes, sockets, tables, other holders. What goes next is core/flow.py's.
States: down -> probe (Hello said) -> stream (Held answered); wait (refused, or asked to resync too often) and fenced (the epoch is over) lead back to probe.
Invariants: watermarks of a new session come from the holder's answer alone, lineage first; an acknowledgement of what was not sent is an error, never progress.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from kvguard.core.effects import Effect, FreeBuffer, Note, Send
from kvguard.core.events import Arrived, Captured, Event, LinkDown, LinkUp, Looked, Tick
from kvguard.core.flow import Flow
from kvguard.core.ledger import Ledger, Row
from kvguard.core.pieces import Copy
from kvguard.format.lineage import UNBOUNDED, agreed
from kvguard.format.messages import Ack, CutOp, Held, Hello, Holding, OpenOp, ReleaseOp
from kvguard.limits import WINDOW_BYTES_DEFAULT
from kvguard.types import Epoch, NodeId, StreamId

BACKOFF_NS = 10_000_000  # doubled with every session that brought nothing


class SenderSettings(NamedTuple):
    """`retry_ns`: before a refused sequence or stream is offered again. `answer_ns`: without a word from the holder for so long, probe again."""

    node: NodeId
    incarnation: int
    window_bytes: int = WINDOW_BYTES_DEFAULT
    retry_ns: int = 5_000_000_000
    answer_ns: int = 2_000_000_000


class Sender:
    """`ledger` is shared by a stream's senders, and has seen a Looked before they do. `sessions`, `captures`: the node's counters, so no number comes twice."""

    def __init__(
        self,
        stream: StreamId,
        ledger: Ledger,
        holder: NodeId,
        link: str,
        epoch: Epoch,
        sessions: Iterator[int],
        captures: Iterator[int],
        settings: SenderSettings,
    ) -> None:
        self.stream, self.ledger, self.holder, self.link, self.epoch = stream, ledger, holder, link, epoch
        self._sessions, self._settings = sessions, settings
        self.flow = Flow(stream, ledger, link, captures, settings.window_bytes)
        self.state, self.reason = "down", "holder unreachable"
        self.linked = False
        self.session = 0
        self._refusals = 0  # how many of this session have been heard of
        self.deadline: int | None = None
        self._failures = 0
        for number, row in ledger.rows.items():
            self.flow.copies[number] = Copy(number, row, 0, 0)

    # ---- the contract of a core ----

    def step(self, now_ns: int, event: Event) -> tuple[Effect, ...]:
        kind = type(event)
        if kind is Looked:
            self.flow.looked(now_ns, event)
        elif kind is Captured:
            self._captured(event)
        elif kind is Arrived:
            if type(event.message) is Ack:
                self._ack(now_ns, event.message)
            elif type(event.message) is Held:
                self._held(now_ns, event.message)
        elif kind is LinkUp:
            self.linked = True
            if self.state != "fenced":
                self._probe(now_ns)
        elif kind is LinkDown:
            self.linked = False
            if self.state != "fenced":
                self._stop("down", "holder unreachable")
        elif kind is Tick:
            self._tick(now_ns)
        return self._effects(now_ns)

    def _effects(self, now: int) -> tuple[Effect, ...]:
        flow = self.flow
        if self.state == "stream":
            flow.flush(now)
            if flow.hazard:
                self._resync(now, flow.hazard)
            elif not flow.kv_flight and not flow.ids_flight:
                self.deadline = None
            elif self.deadline is None:
                self.deadline = now + self._settings.answer_ns
        out, flow.out = tuple(flow.out), []
        return out

    def next_deadline(self) -> int | None:
        due = [] if self.deadline is None else [self.deadline]
        if self.state == "stream":
            due += [copy.retry_ns for copy in self.flow.refused.values()]
        return min(due, default=None)

    def check(self) -> None:
        self.flow.check()
        assert self.flow.live == (self.state == "stream")
        assert self.state in ("down", "probe", "wait", "stream", "fenced")
        assert self.state not in ("probe", "wait") or self.deadline is not None, "a wait without an end"

    # ---- what the node asks ----

    def fence(self) -> None:
        """The epoch is over: nothing more is sent until `adopt`."""
        self._stop("fenced", "the epoch is over")

    def adopt(self, now_ns: int, epoch: Epoch) -> tuple[Effect, ...]:
        """The rank lives in `epoch` now: ask the holder again what it has."""
        self.epoch = epoch
        self._stop("down", "holder unreachable")
        self._failures = 0
        if self.linked:
            self._probe(now_ns)
        return self._effects(now_ns)

    def resync(self, now_ns: int, reason: str) -> tuple[Effect, ...]:
        if self.state == "stream":
            self._resync(now_ns, reason)
        return self._effects(now_ns)

    def caught_up(self) -> bool:
        """Everything that is committed is acknowledged, by a holder that answers."""
        flow = self.flow
        if self.state != "stream" or flow.ops or flow.ids_flight:
            return False
        return all(not copy.shed and copy.acked >= copy.row.committed and copy.acked_ids >= copy.row.ids for copy in flow.copies.values())

    def lag_ms(self, now_ns: int) -> float:
        """Age of the oldest capture that is not acknowledged."""
        oldest = self.flow.oldest_ns()
        return 0.0 if oldest is None else (now_ns - oldest) / 1e6

    # ---- sessions ----

    def _stop(self, state: str, reason: str) -> None:
        self.state, self.reason, self.deadline = state, reason, None
        self.flow.stop()

    def _probe(self, now: int) -> None:
        self._stop("probe", "waiting for the holder's answer")
        count = next(self._sessions)
        self.session, self._refusals = (self._settings.incarnation & 0xFFFFFFFF) << 32 | count, 0
        self._failures += 1
        self.deadline = now + self._settings.answer_ns * min(1 << self._failures - 1, 16)
        self.flow.out.append(Send(self.link, Hello(self.stream, self.session, self.epoch, self._settings.node, self.ledger.shape)))

    def _resync(self, now: int, reason: str) -> None:
        self.flow.out.append(Note("resync", f"{self.stream} -> {self.holder}", reason))
        if self._failures == 0:
            self._probe(now)
        else:
            self._stop("wait", reason)
            self._failures += 1
            self.deadline = now + (BACKOFF_NS << min(self._failures, 8))

    def _tick(self, now: int) -> None:
        if self.state == "stream":
            self.flow.retry(now)
        if self.deadline is None or now < self.deadline:
            return
        if self.state == "stream":
            self._resync(now, "no acknowledgement in time")
        elif self.state == "probe":
            self._probe(now)
            self.reason = "holder unreachable: no answer"
        elif self.state == "wait":
            reason = self.reason
            self._probe(now)
            self.reason = reason  # true until the holder says something else

    def _held(self, now: int, held: Held) -> None:
        if self.state != "probe" or held.session != self.session:
            self.flow.out.append(Note("stale_answer", f"{self.stream} -> {self.holder}", f"Held of session {held.session:#x}"))
            return
        if held.reason:
            self._stop("wait", held.reason)
            self.deadline = now + self._settings.retry_ns
            self.flow.out.append(Note("refused", f"{self.stream} -> {self.holder}", held.reason))
            return
        holding = held.holding
        columns = (holding.sequences, holding.generations, holding.lineages, holding.positions, holding.ids)
        if held.epoch != self.epoch or holding.stream != self.stream or len({len(column) for column in columns}) != 1:
            self._stop("wait", "the holder's answer makes no sense")
            self.deadline = now + self._settings.retry_ns
            self.flow.out.append(Note("protocol_error", f"{self.stream} -> {self.holder}", self.reason))
            return
        self.state, self.reason, self.deadline = "stream", "", None
        self._start(now, holding)

    def _start(self, now: int, holding: Holding) -> None:
        """The first frames of a session say what goes on, what starts over and what is over at the holder."""
        flow = self.flow
        former, flow.copies, flow.refused = flow.copies, {}, {}
        flow.live, flow.session, flow.epoch = True, self.session, self.epoch
        has = {sequence: index for index, sequence in enumerate(holding.sequences)}
        for number, row in self.ledger.rows.items():
            old = former.get(number)
            if old is not None and old.row is not row:
                old = None
            if old is not None and old.shed and now < old.retry_ns:
                flow.copies[number] = flow.refused[number] = old
                continue
            copy = flow.copies[number] = Copy(number, row, 0, now if old is None else old.opened_ns or now)
            copy.caught = old is not None and old.caught
            flow.name(copy)
            index = has.pop(row.sequence, None)
            if index is None:
                flow.ops.append(OpenOp(copy.no, row.sequence, row.generation, row.lineage, row.request))
            else:
                self._continue(copy, holding.generations[index], holding.lineages[index], holding.positions[index], holding.ids[index])
        for sequence, index in has.items():
            no = flow.number()
            flow.ops.append(OpenOp(no, sequence, holding.generations[index], holding.lineages[index], b""))
            flow.ops.append(ReleaseOp(no))

    def _continue(self, copy: Copy, generation: int, lineage, position: int, ids: int) -> None:
        """The holder has this sequence: keep what agrees, cut the rest by name. A cut that the holder missed is one that it can still be told."""
        row, flow = copy.row, self.flow
        limit = agree(row, generation, lineage)
        kept = max(0, min(position, ids, row.committed, limit))
        if limit <= 0:
            generation, lineage, ids, kept = row.generation, row.lineage, UNBOUNDED, 0
        flow.ops.append(OpenOp(copy.no, row.sequence, generation, lineage, row.request))
        if generation != row.generation or lineage != row.lineage or position > kept or ids > min(row.ids, limit):
            flow.ops.append(CutOp(copy.no, kept, row.generation, row.lineage))
            ids = kept
        copy.sent = copy.acked = kept
        copy.sent_ids = copy.acked_ids = ids
        copy.caught = copy.caught or 0 < row.committed <= kept
        flow.fills.cover(copy, kept)

    # ---- what comes back ----

    def _captured(self, event: Captured) -> None:
        if event.id in self.flow.captures:
            self.flow.captured(event)
        elif event.buffer:
            self.flow.out.append(FreeBuffer(event.buffer))

    def _ack(self, now: int, ack: Ack) -> None:
        flow = self.flow
        if self.state != "stream":
            flow.out.append(Note("stale_answer", f"{self.stream} -> {self.holder}", f"Ack of session {ack.session:#x}"))
            return
        if ack.session < self.session and ack.session >> 32 == self.session >> 32:
            flow.out.append(Note("stale_answer", f"{self.stream} -> {self.holder}", f"Ack of a former session, {ack.session:#x}"))
            return
        wrong = ""
        if ack.session != self.session or ack.epoch != self.epoch:
            wrong = f"acknowledges session {ack.session:#x} in {ack.epoch}, this is {self.session:#x} in {self.epoch}"
        elif ack.ids_number > flow.ids_number or ack.kv_number > flow.kv_number:
            wrong = f"acknowledges frames {ack.ids_number} and {ack.kv_number}, {flow.ids_number} and {flow.kv_number} were sent"
        if wrong:
            flow.out.append(Note("protocol_error", f"{self.stream} -> {self.holder}", wrong))
            self._resync(now, "protocol error")
            return
        if ack.refusals - len(ack.refused) > self._refusals and not ack.resync:
            self._resync(now, f"{ack.refusals - self._refusals} refusals, {len(ack.refused)} of them told: an acknowledgement was lost")
            return
        self._refusals = max(self._refusals, ack.refusals)
        for no, reason in ack.refused:
            flow.shed(no, reason, now + self._settings.retry_ns)
        if flow.acknowledged(now, ack.ids_number, ack.kv_number):
            self._failures = 0
            self.deadline = now + self._settings.answer_ns
        if ack.resync:
            self._resync(now, ack.resync)


def agree(row: Row, generation: int, lineage) -> int:
    """The position below which a copy of this generation and lineage is still what the row holds; 0 where nothing is known of it."""
    limit = UNBOUNDED if generation == row.generation else row.former.get(generation, 0)
    return min(limit, agreed(lineage, row.lineage))
