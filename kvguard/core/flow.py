"""The traffic of one stream to one holder: what is unsent, what is under way, what is acknowledged.

Knows: copies by row, both lanes' numbers, the window, captures. Must not know: how a session opens or ends (core/sender.py), bytes, sockets.
Invariants: acked <= sent <= committed for every copy; frames leave in the order in which their captures were asked for; at most CAPTURES_MAX captures are under
way; captures and unacknowledged frames together stay within the window; a retransmission captures again, so nothing is kept for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from kvguard.core.effects import Capture, Effect, FreeBuffer, Note, SendIds, SendKv
from kvguard.core.events import Captured, Looked
from kvguard.core.ledger import Ledger, Row
from kvguard.core.pieces import Copy, Fills, Pieces
from kvguard.format.lineage import UNBOUNDED
from kvguard.format.messages import PIECE_BLOCK, PIECE_TOKENS, CutOp, IdsFrame, KvFrame, Op, OpenOp, ReleaseOp
from kvguard.limits import FRAME_BYTES_TARGET
from kvguard.types import Epoch, StreamId

CAPTURES_MAX = 2  # one in the gather, one behind it
IDS_FRAMES_MAX = 64  # ids frames in flight; beyond it ids coalesce
IDS_BYTES_TARGET = 512 * 1024  # ids and requests of one ids frame: headers stay far below limits.HEADER_BYTES_MAX
SAMPLES_MAX = 4096


class Flow:
    """`live`: a session is open, so what changes is sent. Effects collect in `out`."""

    def __init__(self, stream: StreamId, ledger: Ledger, link: str, capture_ids: Iterator[int], window_bytes: int) -> None:
        self.stream, self.ledger, self.link = stream, ledger, link
        self._capture_ids, self._window_bytes = capture_ids, window_bytes
        self.out: list[Effect] = []
        self.live = False
        self.session, self.epoch = 0, Epoch(0, "")
        self.copies: dict[int, Copy] = {}
        self.refused: dict[int, Copy] = {}  # by row: what the holder won't keep
        self.captures: dict[int, Pieces] = {}  # in the order asked; frames leave in it
        self.lag_tokens = 0
        self.lag_samples: deque[int] = deque(maxlen=SAMPLES_MAX)
        self.protected_ns: deque[int] = deque(maxlen=SAMPLES_MAX)
        self.hazard = ""  # why the session must be opened anew: the holder was told of bytes that never left
        self.stop()

    def stop(self) -> None:
        """The session is over. Watermarks stay for those who ask; what is under way will be thrown away."""
        self.live = False
        self.by_no: dict[int, Copy] = {}
        self.fills = Fills(self.ledger.shape)
        self.ops: list[Op] = []
        self.dirty: dict[int, Copy] = {}
        self.ids_number = self.kv_number = self.ids_acked = self.kv_acked = 0
        self.ids_flight: deque[tuple[int, list[Copy], list[int]]] = deque()
        self.kv_flight: deque[tuple[int, int, list[Copy], list[int], int]] = deque()
        self._ids_whole = False
        self._unsure: list[tuple[list[Copy], list[int]]] = []  # ids sent since the last look: rows that moved meanwhile were left out
        self.hazard = ""
        self._next_no = 0
        for pieces in self.captures.values():
            pieces.spoiled = True
        self.flight_bytes = sum(pieces.bytes for pieces in self.captures.values())

    def check(self) -> None:
        for number, copy in self.copies.items():
            row = copy.row
            assert row is self.ledger.rows.get(number), f"copy of a row that is gone: {row.sequence}"
            if self.live and not copy.shed:
                assert copy.acked <= copy.sent <= row.committed, (row.sequence, copy.acked, copy.sent, row.committed)
                assert copy.acked_ids <= copy.sent_ids <= row.ids, row.sequence
                assert number in self.dirty or copy.sent == row.committed and copy.sent_ids == row.ids, f"{row.sequence} is forgotten"
        assert len(self.captures) <= CAPTURES_MAX
        assert self.flight_bytes == sum(pieces.bytes for pieces in self.captures.values()) + sum(frame[1] for frame in self.kv_flight)
        assert self.flight_bytes <= max(self._window_bytes, self.ledger.shape.block_bytes, self.ledger.shape.token_bytes)
        assert len(self.ids_flight) <= IDS_FRAMES_MAX
        assert list(self.refused) == [] or all(self.copies[number].shed for number in self.refused)

    # ---- what is true of the table ----

    def looked(self, now: int, event: Looked) -> None:
        for number in event.released:
            self._release(number)
        if event.cut:
            self._cut(event)
        self._unsure.clear()
        for opened in event.opened:
            copy = self.copies.get(opened.row)
            row = self.ledger.rows[opened.row]
            if copy is None or copy.row is not row:
                self._release(opened.row)
                self._open(now, opened.row, row)
        for grown in event.grown:
            self._unstick(grown.row)
        copies, dirty, lag = self.copies, self.dirty, 0
        for number in event.rows:
            copy = copies.get(number)
            if copy is None or copy.shed:
                continue
            dirty[number] = copy
            copy.stuck = False
            if copy.caught:
                behind = copy.row.previous - copy.acked
                if behind > lag:
                    lag = behind
        if event.rows:
            self.lag_tokens = lag
            self.lag_samples.append(lag)

    def _unstick(self, number: int) -> None:
        copy = self.copies.get(number)
        if copy is not None and not copy.shed:
            copy.stuck = False
            self.dirty[number] = copy

    def _open(self, now: int, number: int, row: Row) -> Copy:
        copy = self.copies[number] = Copy(number, row, 0, now)
        if self.live:
            self.name(copy)
            self.ops.append(OpenOp(copy.no, row.sequence, row.generation, row.lineage, row.request))
        return copy

    def name(self, copy: Copy) -> None:
        copy.no = self.number()
        self.by_no[copy.no] = copy
        self.dirty[copy.number] = copy

    def number(self) -> int:
        """The next name of a sequence in this session."""
        self._next_no += 1
        return self._next_no

    def _release(self, number: int) -> None:
        copy = self.copies.pop(number, None)
        if copy is None:
            return
        self.dirty.pop(number, None)
        self.refused.pop(number, None)
        if self.live and self.by_no.pop(copy.no, None) is not None:
            self.ops.append(ReleaseOp(copy.no))
            self._forget(copy)

    def _forget(self, copy: Copy) -> None:
        self.fills.fall(copy, 0)
        self._spoil(copy, 0)

    def _cut(self, event: Looked) -> None:
        """What is in flight below the cut still counts; what lies beyond it never will."""
        limits: dict[int, tuple[int, int]] = {}
        for cut in event.cut:
            copy = self.copies.get(cut.row)
            if copy is None:
                continue
            kept = ids = self.ledger.kept(cut)
            for copies, starts in self._unsure:
                if copy in copies:
                    ids = min(ids, starts[copies.index(copy)])
            if self.live and not copy.shed:
                self.ops.append(CutOp(copy.no, kept, cut.generation, cut.lineage))
                if copy.sent > kept:
                    self.fills.fall(copy, kept)
                self._spoil(copy, kept)
            copy.sent, copy.sent_ids = min(copy.sent, kept), min(copy.sent_ids, ids)
            copy.acked, copy.acked_ids = min(copy.acked, kept), min(copy.acked_ids, ids)
            self._unstick(cut.row)
            limits[cut.row] = (kept, ids)
        for column, flight in ((1, [frame[1:] for frame in self.ids_flight]), (0, [frame[2:4] for frame in self.kv_flight])):
            for copies, ends in flight:
                for index, copy in enumerate(copies):
                    limit = limits.get(copy.number)
                    if limit is not None and ends[index] > limit[column]:
                        ends[index] = limit[column]  # a copy that is gone may have had this row before: nobody asks it any more

    def _spoil(self, copy: Copy, position: int) -> None:
        """`sent` of this copy is at most `position` by now, so captures under way that begin there or later need not fall back for it once more."""
        for pieces in self.captures.values():
            for index, other in enumerate(pieces.copies):
                if other is copy:
                    pieces.spoiled = True
                    if pieces.begins[index] >= position:
                        pieces.begins[index] = UNBOUNDED

    # ---- sending ----

    def flush(self, now: int) -> None:
        if self.ops or self.dirty:
            self._ids(now)
        while self.dirty and len(self.captures) < CAPTURES_MAX and self._capture(now):
            pass

    def _ids(self, now: int) -> None:
        """Ids frames while there are ops or extensions. Frames that cut or release wait at the holder for the kv frames that were sent before them."""
        self._ids_whole = False
        while len(self.ids_flight) < IDS_FRAMES_MAX:
            ops, after_kv, size = self._take_ops()
            items: list[tuple[int, ...]] = []
            copies: list[Copy] = []
            for copy in self.dirty.values() if not self.ops else ():
                row, start = copy.row, copy.sent_ids
                end = row.ids
                if end <= start:
                    continue
                size += 4 * (end - start) + 8
                if size > IDS_BYTES_TARGET:
                    end -= (size - IDS_BYTES_TARGET + 3) // 4
                    if end <= start:
                        break
                items.append((copy.number, row.generation, copy.no, start, end - start, end))
                copies.append(copy)
                copy.sent_ids = end
            if not ops and not items:
                self._ids_whole = True
                return
            rows, row_generations, nos, starts, counts, ends = zip(*items, strict=True) if items else ((),) * 6
            self.ids_number += 1
            message = IdsFrame(self.session, self.epoch, self.ids_number, ops, nos, starts, counts, b"", (), b"", after_kv)
            self.out.append(SendIds(self.link, message, self.stream, rows, row_generations))
            self.ids_flight.append((self.ids_number, copies, list(ends)))
            self._unsure.append((copies, starts))
            if size < IDS_BYTES_TARGET // 2:
                self._ids_whole = True
                return

    def _take_ops(self) -> tuple[tuple[Op, ...], int, int]:
        """As many ops as fit a frame, the kv frame that they wait for, and their size."""
        if not self.ops:
            return (), 0, 0
        size = count = after_kv = 0
        for op in self.ops:
            size += 64
            if type(op) is OpenOp:
                size += len(op.request) + 20 * len(op.lineage)
            else:
                after_kv = self.kv_number
            count += 1
            if size > IDS_BYTES_TARGET:
                break
        ops = tuple(self.ops[:count])
        del self.ops[:count]
        return ops, after_kv, size

    def _capture(self, now: int) -> bool:
        """One capture: small backlogs first, then the smallest. Half of the window, at most a frame, is kept for the small."""
        bound = self.ledger.shape.block_tokens
        room = self._window_bytes - self.flight_bytes
        if room <= 0:
            return False
        pieces, lone = Pieces(self.session, now), not self.flight_bytes
        left, large = self.fills.gather(self.dirty.values(), pieces, min(FRAME_BYTES_TARGET, room), lone, bound)
        room -= min(FRAME_BYTES_TARGET, self._window_bytes // 2)
        if large and room > 0 and not left:
            large.sort(key=lambda copy: (copy.row.committed - copy.sent, copy.no))
            self.fills.gather(large, pieces, min(FRAME_BYTES_TARGET, room), lone, UNBOUNDED)
        if self._ids_whole and not left and not large and len(pieces.moves) == len(self.dirty):
            self.dirty.clear()  # the usual step: every row that moved goes, wholly
        else:
            self.dirty = {number: copy for number, copy in self.dirty.items() if copy.sent < copy.row.committed or copy.sent_ids < copy.row.ids}
        if not pieces.items:
            return False
        pieces.close()
        pieces.id = next(self._capture_ids)
        self.captures[pieces.id] = pieces
        self.flight_bytes += pieces.bytes
        columns = (pieces.rows, pieces.row_generations, pieces.starts, pieces.counts, pieces.blocks, pieces.generations, pieces.flags)
        self.out.append(Capture(pieces.id, self.stream, self.epoch, *columns))
        return True

    def captured(self, event: Captured) -> None:
        """Frames leave in the order in which they were asked for, whatever the order in which captures end."""
        self.captures[event.id].done = event
        while self.captures:
            first = next(iter(self.captures.values()))
            if first.done is None:
                return
            del self.captures[first.id]
            self.flight_bytes -= first.bytes
            self._leave(first, first.done)

    def _leave(self, pieces: Pieces, event: Captured) -> None:
        keep = self._unstale(pieces, event.stale) if event.stale and not pieces.spoiled else None
        if pieces.spoiled or keep == []:
            if event.buffer:
                self.out.append(FreeBuffer(event.buffer))
            if pieces.session == self.session and self.live:
                for copy, begin in zip(pieces.copies, pieces.begins, strict=True):
                    self._fall(copy, begin)
            return
        self.kv_number += 1
        columns = (pieces.nos, pieces.starts, pieces.counts, pieces.blocks, pieces.generations, pieces.flags)
        if keep is not None:
            columns = tuple(tuple([column[index] for index in keep]) for column in columns)
        message = KvFrame(self.session, self.epoch, self.kv_number, self.ids_number, *columns, event.sums)
        self.out.append(SendKv(self.link, message, event.buffer))
        self.kv_flight.append((self.kv_number, event.payload_bytes, pieces.copies, pieces.ends, pieces.at_ns))
        self.flight_bytes += event.payload_bytes

    def _unstale(self, pieces: Pieces, stale: tuple[int, ...]) -> list[int]:
        """Which pieces can still go. A good piece behind a stale one of its sequence would be a hole: then the whole frame is taken again."""
        fallen: dict[int, int] = {}
        for index in stale:
            fallen.setdefault(pieces.nos[index], pieces.starts[index])
        keep = [index for index in range(len(pieces.nos)) if index not in stale]
        shape = self.ledger.shape
        if any(pieces.starts[index] > fallen.get(pieces.nos[index], UNBOUNDED) for index in keep):
            pieces.spoiled = True
        for index in stale:
            copy = self.by_no.get(pieces.nos[index])
            if copy is None:
                continue
            block = pieces.starts[index] // shape.block_tokens
            same = block < len(copy.row.blocks) and copy.row.generations[block] == pieces.generations[index]
            copy.stuck = same and copy.row.generation == pieces.row_generations[index]
        if pieces.spoiled or not keep:
            return []
        for index, copy in enumerate(pieces.copies):
            if copy.no in fallen:
                self._fall(copy, fallen[copy.no])
                pieces.ends[index] = min(pieces.ends[index], fallen[copy.no])
        return keep

    def _fall(self, copy: Copy, position: int) -> None:
        """What was captured from `position` on did not leave."""
        if self.by_no.get(copy.no) is not copy or copy.sent <= position:
            return
        if self.fills.fall(copy, position):
            self.hazard = "a block that others refer to was not sent"
        copy.sent = position
        self.dirty[copy.number] = copy
        self._spoil(copy, position)

    # ---- the holder's word ----

    def acknowledged(self, now: int, ids_number: int, kv_number: int) -> bool:
        """True where something moved. The caller has checked that both numbers were sent."""
        before = self.ids_acked, self.kv_acked
        flight = self.ids_flight
        while flight and flight[0][0] <= ids_number:
            self.ids_acked, copies, ends = flight.popleft()
            for copy, end in zip(copies, ends, strict=True):
                copy.acked_ids = end
        frames = self.kv_flight
        while frames and frames[0][0] <= kv_number:
            self.kv_acked, size, copies, ends, _ = frames.popleft()
            self.flight_bytes -= size
            for copy, end in zip(copies, ends, strict=True):
                copy.acked = end
                if not copy.caught and end >= copy.row.committed:
                    copy.caught = True
                    self.protected_ns.append(now - copy.opened_ns)
        return (self.ids_acked, self.kv_acked) != before

    def shed(self, no: int, reason: str, retry_ns: int) -> None:
        """The holder won't keep this sequence: no more bytes for it until `retry_ns`."""
        copy = self.by_no.pop(no, None)
        if copy is None:
            return
        self._forget(copy)
        self.dirty.pop(copy.number, None)
        self.ops = [op for op in self.ops if op.no != no]
        refused = self.copies[copy.number] = Copy(copy.number, copy.row, 0, copy.opened_ns)  # acknowledgements under way move the old one
        refused.shed, refused.retry_ns = reason, retry_ns
        self.refused[copy.number] = refused
        self.out.append(Note("unprotected", f"{self.stream} {copy.row.sequence}", reason))

    def retry(self, now: int) -> None:
        """Sequences that were refused long enough ago are offered anew."""
        for copy in [copy for copy in self.refused.values() if copy.retry_ns <= now]:
            del self.refused[copy.number]
            self._open(copy.opened_ns, copy.number, copy.row)

    def oldest_ns(self) -> int | None:
        """When the oldest frame without an acknowledgement was asked for."""
        if self.kv_flight:
            return self.kv_flight[0][4]
        return next((pieces.at_ns for pieces in self.captures.values()), None)
