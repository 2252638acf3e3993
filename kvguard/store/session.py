"""Frames of one session, applied to the replica that it opened.

Knows: messages.IdsFrame and KvFrame, the session's numbers for sequences. Must not know: order and numbering of frames (core/receiver.py), links.
Invariants: a sequence that is refused is dropped whole, reported once, and what still comes for it is passed over; a gap stops the frame where it is found:
what was applied before stays, nothing after it is looked at.

Ids frames overtake kv frames. A kv frame that doesn't require the ids frame with a sequence's cut was sent before that cut: of its pieces only what lies below
the cut still means this sequence (else bytes of the old generation would pass for the new one's). What comes for a released sequence is passed over.
"""

from __future__ import annotations

from kvguard.errors import BadFrame, StoreFull
from kvguard.format import pages
from kvguard.format.lineage import UNBOUNDED
from kvguard.format.messages import IDS_ONLY, PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, CutOp, IdsFrame, KvFrame, OpenOp, ReleaseOp
from kvguard.limits import FORKS_MAX, NAME_BYTES_MAX, REQUEST_BYTES_MAX, ROWS_MAX, SAMPLER_BYTES_MAX
from kvguard.store.replica import ID_BYTES, Replica, Sequence

Refusals = tuple[tuple[int, str], ...]


class Session:
    """One life of a sender towards this holder."""

    def __init__(self, number: int, replica: Replica) -> None:
        self.number = number
        self.replica = replica
        self._sequences: dict[int, Sequence] = {}
        self._refused: set[int] = set()
        self._cuts: dict[int, list[tuple[int, int]]] = {}  # by number: (ids frame, position) of cuts that kv frames on their way may not know
        self._highest = 0

    def apply_ids(self, frame: IdsFrame) -> tuple[Refusals, str]:
        """(refused, gap) as in core.events.Applied."""
        refusals: list[tuple[int, str]] = []
        try:
            if sum(frame.counts) * ID_BYTES != len(frame.ids) or sum(frame.sampler_bytes) != len(frame.samplers) or min(frame.counts, default=0) < 0:
                raise BadFrame("ids or sampler states don't add up to their columns")
            for op in frame.ops:
                if op.no in self._refused and isinstance(op, ReleaseOp):
                    self._refused.discard(op.no)
                elif op.no not in self._refused or isinstance(op, OpenOp):
                    self._guarded(op.no, refusals, self._operate, op, frame.number)
            ids, samplers = memoryview(frame.ids), memoryview(frame.samplers)
            at = sampler_at = 0
            for no, start, count, sampler_bytes in zip(frame.nos, frame.starts, frame.counts, frame.sampler_bytes, strict=True):
                own = ids[at : at + count * ID_BYTES], bytes(samplers[sampler_at : sampler_at + sampler_bytes])
                at, sampler_at = at + count * ID_BYTES, sampler_at + sampler_bytes
                if no not in self._refused:
                    if start < 0 or not 0 <= sampler_bytes <= SAMPLER_BYTES_MAX:
                        raise BadFrame(f"sequence number {no}: start {start} or {sampler_bytes} bytes of sampler state are out of bounds")
                    self._guarded(no, refusals, self.replica.extend_ids, self._sequence(no), start, *own)
        except BadFrame as error:
            return tuple(refusals), str(error)
        return tuple(refusals), ""

    def apply_kv(self, frame: KvFrame, payload: memoryview) -> tuple[Refusals, str]:
        """(refused, gap). `payload` is read before this returns, never kept."""
        refusals: list[tuple[int, str]] = []
        try:
            sizes, numbers = self._extents(frame, payload)
            sums = pages.unpack_sums(frame.sums)
            columns = zip(frame.nos, frame.starts, frame.counts, frame.blocks, frame.generations, frame.flags, sizes, numbers, strict=True)
            shape, at, sum_at = self.replica.shape, 0, 0
            for no, start, count, block, generation, flag, size, number in columns:
                sequence = self._sequences.get(no)
                if sequence is None and no > self._highest:
                    raise BadFrame(f"sequence number {no} is not open in this session")
                limit = self._limit(no, frame.requires) if self._cuts else UNBOUNDED
                if sequence is not None and start < limit:
                    data, own = payload[at : at + size], sums[sum_at : sum_at + number]
                    if start + count > limit:
                        count = limit - start
                        if flag == PIECE_TOKENS:
                            data, own = data[: count * shape.token_bytes], own[:count]
                    self._guarded(no, refusals, self.replica.apply, self._sequence(no), start, count, block, generation, flag, data, own)
                at, sum_at = at + size, sum_at + number
        except BadFrame as error:
            return tuple(refusals), str(error)
        return tuple(refusals), ""

    def _limit(self, no: int, requires: int) -> int:
        """Below which position a kv frame that knows ids frames up to `requires` still speaks of the sequence as it is now."""
        cuts = self._cuts.get(no)
        if cuts is None:
            return UNBOUNDED
        cuts[:] = [cut for cut in cuts if cut[0] > requires]
        if not cuts:
            del self._cuts[no]
        return min((position for _, position in cuts), default=UNBOUNDED)

    def _extents(self, frame: KvFrame, payload: memoryview) -> tuple[list[int], list[int]]:
        """Bytes and sums of each piece; BadFrame where they don't add up, or a flag isn't one for this shape."""
        shape = self.replica.shape
        carrying = PIECE_TOKENS if shape.addressable else PIECE_BLOCK
        if shape == IDS_ONLY and frame.nos:
            raise BadFrame("KV for a stream that has ids alone")
        if any(flag not in (carrying, PIECE_REFERENCE) for flag in frame.flags) or min(frame.counts, default=1) <= 0:
            raise BadFrame("a piece's flag or count is not one for this stream's shape")
        if shape.addressable:
            numbers = [0 if flag == PIECE_REFERENCE else count for flag, count in zip(frame.flags, frame.counts, strict=True)]
            sizes = [number * shape.token_bytes for number in numbers]
        else:
            numbers = [0 if flag == PIECE_REFERENCE else 1 for flag in frame.flags]
            sizes = [number * shape.block_bytes for number in numbers]
        if sum(sizes) != len(payload) or 8 * sum(numbers) != len(frame.sums):
            raise BadFrame(f"pieces of {sum(sizes)} bytes and {sum(numbers)} sums, payload has {len(payload)} and {len(frame.sums) // 8}")
        return sizes, numbers

    def _guarded(self, no: int, refusals: list, operation, *arguments) -> None:
        """Run one operation; a sequence that can't be kept is dropped whole and reported."""
        try:
            operation(*arguments)
        except StoreFull as error:
            sequence = self._sequences.pop(no, None)
            if sequence is not None and self.replica.sequences.get(sequence.name) is sequence:
                self.replica.drop(sequence)
            self._refused.add(no)
            refusals.append((no, str(error)))

    def _operate(self, op, number: int) -> None:
        if isinstance(op, OpenOp):
            self._open(op, number)
            return
        sequence = self._sequence(op.no)
        if isinstance(op, CutOp):
            if not 0 <= op.position or op.generation < 0 or not 0 < len(op.lineage) <= FORKS_MAX:
                raise BadFrame(f"sequence {sequence.name}: a cut to {op.position} is out of bounds")
            self.replica.cut(sequence, op.position, op.position)
            self.replica.fork(sequence, op.generation, op.lineage)
            self._cuts.setdefault(op.no, []).append((number, op.position))
        else:
            del self._sequences[op.no]
            self._cuts.pop(op.no, None)
            self.replica.release(sequence)

    def _open(self, op: OpenOp, number: int) -> None:
        name_bytes = len(op.sequence.encode())
        if not 0 < name_bytes <= NAME_BYTES_MAX or len(op.request) > REQUEST_BYTES_MAX or not 0 < len(op.lineage) <= FORKS_MAX or op.generation < 0:
            raise BadFrame(f"sequence number {op.no}: its name, request, lineage or generation is out of bounds")
        held = self._sequences.get(op.no)
        if held is None and len(self._sequences) >= ROWS_MAX:
            raise BadFrame(f"over {ROWS_MAX} sequences are open in one session")
        again = op.no in self._refused or (held is not None and held.name == op.sequence)
        if op.no <= self._highest and not again:
            raise BadFrame(f"sequence number {op.no} was another's in this session, {op.sequence} needs its own")
        self._highest = max(self._highest, op.no)
        self._refused.discard(op.no)
        if again:
            self._cuts.setdefault(op.no, []).append((number, 0))
        self._sequences[op.no] = self.replica.open(op.sequence, op.generation, op.lineage, op.request)

    def _sequence(self, no: int) -> Sequence:
        sequence = self._sequences.get(no)
        if sequence is None or self.replica.sequences.get(sequence.name) is not sequence:
            raise BadFrame(f"sequence number {no} is not open in this session")
        return sequence

