"""The channel over NIXL: frames with payloads, written straight into the peer's memory, in the place of the bulk channel of a link.

Knows: agents, zones, framing (format/wire.py), the control messages that belong to it. Must not know: ZeroMQ, how the link came to be, what frames mean.
Invariants: a frame becomes visible only behind its note, in order of its number, if its pages were free and its header has the sum that the note says (the
header has its tokens' sums, and with them whoever applies the payload proves it: a chain from the note to the last byte, no link of it made twice); one agent
and one zone are one life of one link: they end with it, at once, whatever the peer does, and the zone's addresses are quarantined; what nobody acknowledges
in `stuck_ms`, or a note that is missing for so long, ends the link; nothing blocks, nothing runs but in the link's calls.

The writer places frames in the reader's zone (Extents), copies each to the same place of a zone of its own, which is registered (a payload that was made in
lent memory stays where it is), and writes it there: payload first, header behind it. NIXL tells the note behind the last byte. A frame goes at once while
little is under way; those that come meanwhile go together, in one write with one note, which costs as much as a note for one frame. The reader hands out the
payload where it landed, or a copy, and says over the control connection whose pages are free again (Returned). NIXL has no thread and wakes nobody: both ends
look, often while something is under way, when UCX's own descriptors or a Knock on the control connection say so, else every IDLE_NS.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable

import numpy as np
import xxhash

from kvguard.errors import BadFrame
from kvguard.format import wire
from kvguard.limits import HEADER_BYTES_MAX, KIB, MIB, PAYLOAD_BYTES_MAX
from kvguard.transport import greeting, nixl_notes
from kvguard.transport.memory import PayloadMemory
from kvguard.transport.nixl_agent import Agent, ChannelLost, NixlSettings, Registered, life_name
from kvguard.transport.nixl_notes import BEAT, LIFE_BYTES, Landed
from kvguard.transport.nixl_zone import LENT_BYTES_MIN, PAGE_BYTES, Extents, Landing, Lending, Zone, pages_of, release, retire
from kvguard.transport.wakeup import IN, Wakeup

PROBE = 0  # the number of the write that proves the way before the link is up
HANDED_BYTES_MIN = 32 * KIB  # smaller payloads are copied: cheaper than following who looks at them
RETURNED_MAX = 512  # numbers in one message
WRITES_MAX = 2  # under way: one is copied while the other one's note is on its way; frames that come meanwhile are gathered, and go together
TOGETHER_BYTES = 8 * MIB  # in one write, or one frame: more only keeps the reader waiting
RETURN_NS = 2_000_000  # pages that are free are told of after so long, or when they are a quarter of the zone
SPIN_NS = 200_000  # without bells: look all the time for so long since something happened
HOT_NS = 20_000_000  # look often for so long after the peer has knocked
LOOK_MIN_NS, BELLED_MIN_NS, LOOK_MAX_NS, IDLE_NS = 50_000, 1_000_000, 20_000_000, 250_000_000
CROWDED_NS = 20_000_000  # nothing has come back for so long: what is in front is in somebody's hands, and the half that is copied from is used too
KNOCK_NS = 5_000_000  # after so long without a frame the peer may have stopped looking
RINGS_MAX = 64  # of one bell in a row for nothing: it is muted until the next look

ZONE_BYTES_MIN = 2 * pages_of(HEADER_BYTES_MAX + PAYLOAD_BYTES_MAX + wire.PREFIX.size) * PAGE_BYTES


class NixlChannel:
    """Frames both ways. Raises ChannelLost (an OSError) when the way is over, BadFrame for what the peer did wrong; then close it.

    `say`: puts a control message on the link's control connection. `call`: what is to be called when there is something to read.
    """

    def __init__(
        self, settings: NixlSettings, wakeup: Wakeup, call: Callable[[int], None], say: Callable[[greeting.Control], None], queue_bytes_max: int,
        lending: Lending, registered: Iterable[Registered] = (),
    ):  # fmt: skip
        self._settings, self._wakeup, self._call, self._say, self._queue_bytes_max = settings, wakeup, call, say, queue_bytes_max
        self._lending = lending
        self._agent = Agent(life_name(), settings)
        release(time.monotonic_ns())
        self._landing = Landing(max(settings.zone_bytes, ZONE_BYTES_MIN), settings.quarantine_s)
        self._source: Zone | None = None
        try:
            for zone in (self._landing.zone, lending.zone):
                self._agent.register(zone.address, zone.size)
            for memory in registered:
                self.register(memory)
        except ChannelLost:  # it will be tried again and again
            self._agent.close()
            self._landing.zone.close()
            raise
        self._life = os.urandom(LIFE_BYTES)
        self._peer: greeting.Zone | None = None
        self._base, self._extents = 0, Extents(0)  # of the peer's zone: the first page that is used, and which are free; until it has said where that is
        self._writes: deque[tuple[int, int, list, tuple]] = deque()  # write, since when, what it reads from, arguments of the write that follows it
        self._together = 1  # frames that the peer takes from one note
        self._queue: deque[tuple[bytes, memoryview | Registered | None]] = deque()
        self.queued_bytes = 0
        self._number = PROBE  # of the last frame that was written
        self._early: dict[int, Landed] = {}  # notes that came before one with a lower number
        self._expected = 1
        self._memory = PayloadMemory()
        self._frames: list[tuple[bytes, memoryview | None]] = []
        self._gone: list[int] = []  # frames whose pages are free, to be told
        self._gone_ns = 0  # since when there are some
        self._started = self._heard = self._reached = False
        now_ns = time.monotonic_ns()
        self._moved_ns = self._heard_ns = self._spoke_ns = self._sent_ns = self._looked_ns = now_ns
        self._returned_ns = self._landed_ns = self._settled_ns = now_ns
        self._hot_until_ns = 0
        self._carrier = ""
        self._rings: dict[int, int] = {bell: 0 for bell in self._agent.bells}
        for bell in self._rings:
            wakeup.watch(bell, lambda events, bell=bell: self._rung(bell))

    # ---- how it comes to be -------------------------------------------------------------------------------------------------------

    def zone(self) -> greeting.Zone:
        """What the peer needs to write here, and nowhere else; to be told over the authenticated control connection alone."""
        landing = self._landing.zone
        metadata = self._agent.metadata(landing.address, landing.size)
        return greeting.Zone(self._agent.name, metadata, landing.address, landing.size // PAGE_BYTES, self._life, nixl_notes.FRAMES_MAX)

    def meet(self, zone: greeting.Zone, probe_bytes: int = PAGE_BYTES) -> None:
        """Load what the peer said, and write the first bytes to it."""
        if self._peer is not None or zone.pages * PAGE_BYTES < ZONE_BYTES_MIN or zone.pages > 1 << 24 or len(zone.life) != LIFE_BYTES or len(zone.agent) > 64:
            raise BadFrame(f"a zone of {zone.pages} pages, or a second one")
        if not 0 < zone.address < (1 << 63) - zone.pages * PAGE_BYTES:
            raise BadFrame(f"a zone at {zone.address:#x}")
        pages = min(zone.pages, self._landing.pages)  # as much memory is needed here; of a larger zone the middle: half of it in front (_place)
        self._peer, self._base, self._extents = zone, (zone.pages - pages) // 2, Extents(pages)
        self._together = max(1, min(zone.frames, nixl_notes.FRAMES_MAX))
        self._source = Zone(pages * PAGE_BYTES)
        self._agent.register(self._source.address, self._source.size)
        self._agent.meet(zone.agent, zone.metadata)
        self._write([(PROBE, self._extents.take(PROBE, pages_of(probe_bytes)), os.urandom(probe_bytes), None)])  # its pages are free from start() on
        self._hot_until_ns = time.monotonic_ns() + HOT_NS

    def is_met(self) -> bool:
        """Bytes have gone both ways: this side's have arrived, the peer's were here as it said."""
        return self._heard and self._reached

    def start(self) -> None:
        """Give out what has come from now on: the peer has said that it is met."""
        self._started = True
        self._extents.give_back(PROBE)
        self._heard_ns = time.monotonic_ns()
        self._wakeup.again(self._call)

    def carrier(self) -> str:
        """"nixl" and what UCX really chose; known once it is met."""
        self._carrier = self._carrier or self._agent.carrier()
        return f"nixl {self._carrier}"

    def close(self) -> None:
        for bell in self._rings:
            self._wakeup.forget(bell)
        self._rings.clear()
        self._agent.close()  # nothing is written or read any more, here
        for kept in (self._writes, self._queue, self._frames, self._early):
            kept.clear()
        self.queued_bytes = 0
        if self._source is not None:
            self._source.close()
            self._source = None
        retire(self._landing)

    # ---- sending ------------------------------------------------------------------------------------------------------------------

    def register(self, memory: Registered) -> None:
        """Payloads may be sent from there until this channel ends."""
        self._agent.register(memory.address, memory.size, memory.device)

    def send(self, head: bytes, payload: memoryview | Registered | None) -> bool:
        """Write one frame, or queue it while there are no free pages. False when the queue is full."""
        size = len(head) + (len(payload) if payload is not None else 0)
        if self._queue and self.queued_bytes + size > self._queue_bytes_max:
            return False
        self._queue.append((head, payload))
        self.queued_bytes += size
        if self._writes and self._settle():
            self._moved_ns = time.monotonic_ns()
        self.flush()
        return True

    def flush(self) -> None:
        """Write what pages are free for: at once while little is under way, else as soon as it is, together."""
        while self._queue and self._has_room():
            frames = self._gather()
            if not frames:
                return
            now_ns = time.monotonic_ns()
            if now_ns - self._sent_ns > KNOCK_NS:
                self._say(greeting.Knock())
                if self._source is None:  # nobody was there to be told: the link has ended
                    return
            self._sent_ns = now_ns
            self._write(frames)

    def _has_room(self) -> bool:
        """For one more write. What has been done since it was last asked for frees its place: nothing else would say so."""
        return len(self._writes) < WRITES_MAX or self._settle() and len(self._writes) < WRITES_MAX

    def _gather(self) -> list[tuple[int, int, bytes, memoryview | Registered | None]]:
        """The next frames that pages are free for, as many as go together, each with its number and first page."""
        frames, together, far = [], 0, False
        while self._queue and len(frames) < self._together and not far:
            head, payload = self._queue[0]
            size, far = len(head) + (len(payload) if payload is not None else 0), isinstance(payload, Registered)
            if frames and (far or together + size > TOGETHER_BYTES):
                break
            first = self._place(self._number + 1, pages_of(size))
            if first is None:
                break
            self._number += 1
            self._queue.popleft()
            self.queued_bytes -= size
            together += size
            frames.append((self._number, first, head, payload))
        return frames

    def _place(self, number: int, count: int) -> int | None:
        """In front, where the reader hands payloads out without a copy (Landing.in_front); behind it only when that stays full."""
        first = self._extents.take(number, count, self._extents.pages // 2)
        if first is None and (not self._extents.taken() or time.monotonic_ns() - self._returned_ns > CROWDED_NS):
            first = self._extents.take(number, count)
        return first

    def _write(self, frames: list[tuple[int, int, bytes, memoryview | Registered | None]]) -> None:
        """One write, one note. A payload in registered memory goes alone: its header, of another kind of memory, follows with the note."""
        parts, landed, held, device, behind = [], [], [], None, ()
        for number, first, head, payload in frames:
            payload_bytes = len(payload) if payload is not None else 0
            landed.append(Landed(number, self._base + first, pages_of(payload_bytes + len(head)), payload_bytes, len(head), xxhash.xxh3_64_intdigest(head)))
            start, place = first * PAGE_BYTES, self._source.bytes
            place[start + payload_bytes : start + payload_bytes + len(head)] = np.frombuffer(head, np.uint8)
            source, target = self._source.address + start, self._peer.address + self._base * PAGE_BYTES + start
            header = (source + payload_bytes, target + payload_bytes, len(head))
            lent = self._lending.address_of(payload) if payload_bytes >= LENT_BYTES_MIN and not isinstance(payload, Registered) else 0
            if isinstance(payload, Registered):
                device, behind = payload.device, ([header], nixl_notes.pack(self._peer.life, landed))
                parts.append((payload.address, target, payload_bytes))
            elif lent:
                held.append(payload)
                parts += [(lent, target, payload_bytes), header]
            else:
                if payload_bytes:
                    place[start : start + payload_bytes] = np.frombuffer(payload, np.uint8)
                parts.append((source, target, payload_bytes + len(head)))
        del place  # a view would outlive the mapping
        write = self._agent.write(parts, b"" if behind else nixl_notes.pack(self._peer.life, landed), device)
        now_ns = time.monotonic_ns()
        if not self._writes:
            self._moved_ns = now_ns
        self._writes.append((write, now_ns, held, behind))
        self._spoke_ns = now_ns

    def returned(self, message: greeting.Returned) -> None:
        """The peer doesn't need these frames' pages any more."""
        for number in message.numbers:
            if number == PROBE:
                raise BadFrame("frame 0 is returned, which has no pages")
            self._extents.give_back(number)
        self._returned_ns = time.monotonic_ns()
        self.flush()

    def knocked(self) -> None:
        self._hot_until_ns = time.monotonic_ns() + HOT_NS
        self._wakeup.again(self._call)

    # ---- receiving ----------------------------------------------------------------------------------------------------------------

    def read(self) -> list[tuple[bytes, memoryview | None]]:
        """The frames that are complete, after one look at everything that is under way."""
        self._looked_ns = time.monotonic_ns()
        moved = self._look()
        if moved:
            self._moved_ns = self._looked_ns
            self._unmute()
        elif not self._rings and self._is_busy() and self._looked_ns - self._moved_ns < SPIN_NS:
            self._wakeup.again(self._call)
        if not self._started:
            return []
        frames, self._frames = self._frames, []
        self._give_back()
        return frames

    def _give_back(self) -> None:
        """Say which pages are free: not of every frame, because a word on the control connection costs as much as a frame."""
        had, landing = bool(self._gone), self._landing
        self._gone += landing.unseen()
        if not self._gone:
            return
        if not had:
            self._gone_ns = self._looked_ns
        if 4 * landing.freed < landing.pages and self._looked_ns - self._gone_ns < RETURN_NS:
            return
        gone, self._gone, landing.freed = self._gone, [], 0
        for start in range(0, len(gone), RETURNED_MAX):
            self._say(greeting.Returned(tuple(gone[start : start + RETURNED_MAX])))  # may end the link, so it comes last

    def _look(self) -> bool:
        """Did anything happen?"""
        moved = False
        for agent, notes in self._agent.told().items():
            if self._peer is None or agent != self._peer.agent:
                raise BadFrame(f"notes of {agent!r}, whom nobody knows")
            moved, self._heard_ns = True, self._looked_ns
            for note in notes:
                if note != BEAT:
                    self._take(note)
        moved = self._settle() or moved
        if moved:
            self.flush()
        return moved

    def _settle(self) -> bool:
        """Ask after what is being written: without that nothing of it, and no note, leaves. True when the oldest is done."""
        moved = False
        while self._writes and self._agent.is_done(self._writes[0][0]):
            write, _, _, behind = self._writes.popleft()
            self._agent.release(write)
            self._reached, self._settled_ns, moved = True, time.monotonic_ns(), True
            if behind:
                self._writes.appendleft((self._agent.write(*behind), time.monotonic_ns(), None, ()))
        for write, *_ in list(self._writes)[1:]:
            self._agent.is_done(write)
        return moved

    def _take(self, note: bytes) -> None:
        """A note: its frames are visible once those before them are."""
        for frame in nixl_notes.unpack(self._life, note):
            if frame.number == PROBE:
                self._landing.claim(PROBE, frame.first, frame.pages, frame.payload_bytes + frame.head_bytes)
                self._head_of(frame)
                self._landing.free(PROBE)
                self._heard = True
            elif frame.number < self._expected or frame.number in self._early or len(self._early) >= self._landing.pages:
                raise BadFrame(f"frame {frame.number} where {self._expected} was expected")
            else:
                self._landed_ns = self._landed_ns if self._early else self._looked_ns
                self._early[frame.number] = frame
        while self._expected in self._early:
            self._land(self._early.pop(self._expected))
            self._expected, self._landed_ns = self._expected + 1, self._looked_ns

    def _land(self, frame: Landed) -> None:
        """Make the frame visible: where it lies, or copied, and then its pages are free again."""
        number, payload_bytes = frame.number, frame.payload_bytes
        self._landing.claim(number, frame.first, frame.pages, payload_bytes + frame.head_bytes)
        head = self._head_of(frame)
        if wire.check(head).payload_bytes != payload_bytes:
            raise BadFrame(f"payload of {payload_bytes} bytes, prefix says {wire.read_prefix(head).payload_bytes}")
        payload = None
        if payload_bytes >= HANDED_BYTES_MIN and self._landing.in_front(number):
            self._frames.append((head, self._landing.view_of(number, 0, payload_bytes)))
            return
        if payload_bytes:
            payload = self._memory.take(payload_bytes)
            payload[:] = memoryview(self._landing.bytes_of(number, 0, payload_bytes))
        self._frames.append((head, payload))
        self._landing.free(number)
        self._gone.append(number)

    def _head_of(self, frame: Landed) -> bytes:
        head = self._landing.bytes_of(frame.number, frame.payload_bytes, frame.payload_bytes + frame.head_bytes).tobytes()
        if xxhash.xxh3_64_intdigest(head) != frame.head_sum:
            raise BadFrame(f"frame {frame.number} isn't what its note says: torn or damaged on the way")
        return head

    # ---- time ---------------------------------------------------------------------------------------------------------------------

    def _is_busy(self) -> bool:
        return bool(self._writes) or self._looked_ns < self._hot_until_ns or self._peer is not None and not self.is_met()

    def tick(self, now_ns: int) -> int:
        """Beats, deadlines; returns when to look next. Raises ChannelLost."""
        stuck_ns, beat_ns = self._settings.stuck_ms * 1_000_000, self._settings.beat_ms * 1_000_000
        if self._writes and now_ns - max(self._settled_ns, self._writes[0][1]) > stuck_ns:
            raise ChannelLost(f"the peer took nothing for {self._settings.stuck_ms} ms", silent=True)
        if self._early and now_ns - self._landed_ns > stuck_ns:
            raise ChannelLost(f"the note of frame {self._expected} has been missing for {self._settings.stuck_ms} ms", silent=True)
        if self._started and now_ns - self._heard_ns > stuck_ns + beat_ns:
            raise ChannelLost(f"nothing heard over nixl for {(now_ns - self._heard_ns) // 1_000_000} ms", silent=True)
        if self._started and now_ns - self._spoke_ns > beat_ns:
            self._spoke_ns = now_ns
            self._agent.tell(BEAT)
        if self._queue and now_ns - self._returned_ns > CROWDED_NS:
            self.flush()
        returns_ns = self._gone_ns + RETURN_NS if self._gone and self._started else 0
        due_ns = self._looked_ns + self._interval_ns(now_ns)
        if due_ns <= now_ns or 0 < returns_ns <= now_ns:
            self._looked_ns = now_ns
            self._unmute()
            self._wakeup.again(self._call)
            due_ns = now_ns + self._interval_ns(now_ns)
        crowded_ns = self._returned_ns + CROWDED_NS if self._queue else 0
        return min(at for at in (due_ns, crowded_ns, returns_ns) if at > now_ns)

    def _interval_ns(self, now_ns: int) -> int:
        if not self._is_busy() and not self._landing.is_watched():
            return IDLE_NS
        return min(max((now_ns - self._moved_ns) // 4, BELLED_MIN_NS if self._rings else LOOK_MIN_NS), LOOK_MAX_NS)

    def _rung(self, bell: int) -> None:
        self._rings[bell] = rings = self._rings.get(bell, 0) + 1
        if rings == RINGS_MAX + 1:
            self._wakeup.change(bell, 0)
        self._call(IN)

    def _unmute(self) -> None:
        for bell, rings in self._rings.items():
            if rings > RINGS_MAX:
                self._wakeup.change(bell, IN)
            self._rings[bell] = 0
