"""One link over ZeroMQ, as both the dialling and the accepting side have it: state, flow control, which channel a frame takes.

Knows: a ZeroMQ socket, control messages, the bulk channel. Must not know: how the link came to be (dialling.py, accepting.py), what frames mean.
Invariants: bytes under way on the control connection are bounded by what the peer has said that it took (ZeroMQ's own high-water marks are a backstop: a ROUTER
at its mark drops, and marks count messages); frames of one type take one channel from Up to Down, or change it once without a gap (changing.py); nothing is
sent before Up or after Down.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import zmq

from kvguard.errors import BadConfig, BadFrame
from kvguard.format import wire
from kvguard.limits import KIB, MIB, PAYLOAD_BYTES_MAX
from kvguard.transport import admit, greeting
from kvguard.transport.base import Carries, Down, Frame, Up
from kvguard.transport.bulk import BulkChannel, raise_if_misused
from kvguard.transport.changing import Trial
from kvguard.transport.memory import fresh
from kvguard.transport.nixl_agent import ChannelLost, Registered
from kvguard.transport.shared import Shared
from kvguard.transport.wakeup import OUT

TOLD_BYTES, TOLD_FRAMES = 64 * KIB, 32  # what may be taken before the peer is told
FRAMES_MAX = 800  # under way on one control connection; below ZeroMQ's high-water mark of 1000
QUEUE_BYTES_MAX = 32 * MIB
RETRY_NS = 20_000_000
MESSAGES_PER_TURN = 256
GREETING, UP, DOWN = "greeting", "up", "down"

assert PAYLOAD_BYTES_MAX <= admit.FRAME_BYTES_MAX


def _once(*told) -> None:
    """It has been told."""


class Link:
    """`fail(link, reason)` is called, once, when the link can't go on."""

    def __init__(self, shared: Shared, name: str, socket: zmq.Socket, routing: bytes | None, touched: Callable[[int], None], fail: Callable[[Link, str], None]):
        self._shared, self.name, self._socket, self._routing, self._touched, self._fail = shared, name, socket, routing, touched, fail
        self.state = GREETING
        self.node = ""
        self.deadline_ns = time.monotonic_ns() + shared.settings.greeting_ms * 1_000_000
        self.channel = None  # what payloads are sent over: `bulk` or `nixl`
        self.bulk: BulkChannel | None = None
        self.nixl = None  # a NixlChannel
        self.over_nixl = False
        self.nixl_fault = ""  # why the next attempt should do without
        self.note = ""  # why payloads don't take NIXL
        self.trial: Trial | None = None
        self.tried: Callable[[str], None] = _once  # called with what was wrong when a trial is over, "" where it carries
        self.met: Callable[[], None] = _once  # called when a channel over NIXL has carried bytes both ways
        self._outbox: deque[bytes] = deque()
        self._sent_bytes = self._sent_frames = 0
        self._peer_took_bytes = self._peer_took_frames = 0
        self._took_bytes = self._took_frames = self._told_bytes = self._told_frames = 0

    # ---- sending ----

    def send(self, head: bytes, payload: memoryview | Registered | None) -> bool:
        if self.state != UP or isinstance(payload, Registered) and not self.over_nixl:
            return False
        payload_bytes = len(payload) if payload is not None else 0
        if self.channel is not None and wire.may_carry_payload(head):
            try:
                return self.channel.send(head, payload)
            except OSError as error:
                self.fail(f"{'nixl' if self.over_nixl else 'bulk channel'}: {error}")
                return False
        size = len(head) + payload_bytes
        under_way = self._sent_bytes - self._peer_took_bytes
        if self._sent_frames - self._peer_took_frames >= FRAMES_MAX or under_way > TOLD_BYTES and under_way + size > self._shared.settings.queue_bytes_max:
            return False
        self.flush()
        if self._outbox or not self._put([head, payload] if payload_bytes else [head]):
            return False
        self._sent_bytes += size
        self._sent_frames += 1
        return True

    def say(self, message: greeting.Control) -> None:
        self._outbox.append(greeting.pack(message))
        self.flush()

    def flush(self) -> None:
        """Send control messages that are still waiting."""
        while self._outbox and self._put([self._outbox[0]]):
            self._outbox.popleft()

    def waiting(self) -> bool:
        return bool(self._outbox)

    def _put(self, parts: list) -> bool:
        if self.state == DOWN:
            return False
        try:
            self._transmit(parts)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self.fail("not connected any more")
            return False
        return True

    def _transmit(self, parts: list) -> None:
        """Copies: ZeroMQ's zero-copy needs a thread of its own in the process, and large payloads have the bulk channel."""
        try:
            if self._routing is not None:
                self._socket.send(self._routing, zmq.NOBLOCK | zmq.SNDMORE)
            if len(parts) == 2:
                self._socket.send(parts[0], zmq.NOBLOCK | zmq.SNDMORE)
            self._socket.send(parts[-1], zmq.NOBLOCK)
        finally:
            if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # the call may have swallowed the edge, also when it failed
                self._shared.wakeup.again(self._touched)

    def last_word(self, reason: str) -> None:
        """Bye, after the link went down here: worth nothing when nobody is there or there is no room, because then silence says the same."""
        try:
            self._transmit([greeting.pack(greeting.Bye(reason))])
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self._shared.count("bye_unsent")

    # ---- receiving ----

    def arrived(self, head: bytes, payload: memoryview | None, reason: str) -> None:
        """One message of the control connection that is not a control message. `reason`: why its parts are no frame."""
        payload_bytes = len(payload) if payload is not None else 0
        self._took_bytes += len(head) + payload_bytes
        self._took_frames += 1
        if self._took_bytes - self._told_bytes >= TOLD_BYTES or self._took_frames - self._told_frames >= TOLD_FRAMES:
            self._told_bytes, self._told_frames = self._took_bytes, self._took_frames
            self.say(greeting.Taken(self._took_bytes, self._took_frames))
        reason = reason or admit.misfit(head, payload_bytes)
        if not reason and self.channel is not None and payload_bytes:
            reason = "a frame with payload beside the bulk channel"
        if self.state != UP:
            self._shared.count("stray")
        elif reason:
            self._shared.broken(self.name, "broken", reason)
        else:
            self._shared.out.append(Frame(self.name, head, payload))

    def peer_took(self, taken: greeting.Taken) -> None:
        if not self._peer_took_bytes <= taken.bytes <= self._sent_bytes or not self._peer_took_frames <= taken.frames <= self._sent_frames:
            self.fail("the peer says that it took more than was sent")
            return
        self._peer_took_bytes, self._peer_took_frames = taken.bytes, taken.frames

    # ---- the bulk channel ----

    def adopt(self, connection) -> None:
        """The bulk channel of this link; read only once the link is up."""
        self.channel = self.bulk = BulkChannel(connection, self._shared.wakeup, self.bulk_ready, self._shared.settings.queue_bytes_max)

    def bulk_ready(self, events: int) -> None:
        with self._guarded("bulk channel"):
            if events & OUT:
                self.bulk.flush()
            if events & ~OUT:
                if self.state != UP:
                    raise ConnectionResetError("the peer closed the bulk channel")  # nothing else is reported before start()
                self._give_out(self.bulk.read())
        self._go_on()

    def _give_out(self, frames: list) -> None:
        raise_if_misused(frames)
        for head, payload in frames:
            self._shared.out.append(Frame(self.name, head, payload))

    @contextmanager
    def _guarded(self, what: str) -> Iterator[None]:
        """What goes wrong in a channel ends the link, or the trial that it is on."""
        try:
            yield
        except (BadFrame, OSError, BadConfig) as error:
            bad = isinstance(error, BadFrame)
            if bad:
                self._shared.broken(self.name, "broken", f"{what}: {error}")
            if what == "nixl" and self.trial is not None and self.trial.is_alone():
                self.end_trial(str(error))
                return
            silent = isinstance(error, ChannelLost) and error.silent
            if self.over_nixl and not bad and (self.state != UP or silent):
                self.nixl_fault = str(error)
            self.fail(f"{what} silent: {error}" if silent else f"{what}: {error}")

    # ---- the channel over NIXL ----

    def open_nixl(self) -> None:
        """Make this side's end, and say where the peer may write."""
        self.over_nixl = True
        with self._guarded("nixl"):
            self.channel = self._nixl_channel()
            self.say(self.nixl.zone())

    def _nixl_channel(self):
        from kvguard.transport.nixl import NixlChannel  # numpy and the library come with it

        shared = self._shared
        memory = shared.lending, shared.registered
        self.nixl = NixlChannel(shared.settings.nixl, shared.wakeup, self.nixl_ready, self.say, shared.settings.queue_bytes_max, *memory)
        return self.nixl

    def register(self, memory: Registered) -> None:
        if self.nixl is not None:
            with self._guarded("nixl"):
                self.nixl.register(memory)

    def told_nixl(self, message: greeting.Control) -> None:
        """A control message of the channel."""
        if self.nixl is None or type(message) is greeting.Changed and self.trial is None:
            self._shared.count("stray")
            if type(message) is greeting.Changed:
                self.fail("nixl: the peer changed to what is not there any more")
            return
        with self._guarded("nixl"):
            if type(message) is greeting.Returned:
                self.nixl.returned(message)
            elif type(message) is greeting.Knock:
                self.nixl.knocked()
            elif self.trial is not None:
                self.trial.told(message)
            else:
                self.nixl.meet(message)
        self._go_on()

    def nixl_ready(self, events: int) -> None:
        if self.nixl is None:
            return
        with self._guarded("nixl"):
            frames = self.nixl.read()
            if self.state == UP:  # what it had to say may have ended the link
                self._give_out(frames)
            elif self.state == GREETING and self.nixl.is_met():
                met, self.met = self.met, _once
                met()
        self._go_on()

    def look_again_ns(self, now_ns: int) -> int:
        """When the channel has to be looked at next, 0 for when it says so itself."""
        if self.trial is not None and now_ns >= self.trial.deadline_ns:
            with self._guarded("nixl"):
                raise ChannelLost("the peer didn't answer, or bytes didn't get through, in time", silent=True)
        if self.nixl is None:
            return 0
        with self._guarded("nixl"):
            due_ns = self.nixl.tick(now_ns)
            return due_ns if self.trial is None else min(due_ns, self.trial.deadline_ns)
        return 0

    # ---- NIXL beside the bulk channel ----

    def try_nixl(self) -> None:
        """Begin a trial: only where payloads take the bulk channel, and no other trial is under way that a side depends on."""
        if self.trial is not None:
            self.end_trial("another one began")
        self._shared.count("nixl_trials")
        try:
            self.trial = Trial(self.bulk, self._nixl_channel(), self.say, time.monotonic_ns())
        except (OSError, BadConfig) as error:
            self.tried(str(error))
            return
        with self._guarded("nixl"):
            self.say(self.nixl.zone())

    def end_trial(self, why: str) -> None:
        """It didn't carry: everything stays as it was."""
        self.trial.channel.close()
        self.trial = self.nixl = None
        self.tried(why)

    def _go_on(self) -> None:
        """With a trial, after whatever happened."""
        if self.trial is None or self.state != UP:
            return
        with self._guarded("nixl"):
            if self.trial.proceed() and self.state == UP:  # what it had to say may have ended the link
                self.channel, self.over_nixl, self.note = self.nixl, True, ""
                self._shared.tell(Carries(self.name, self.carrier()))
            if self.trial is not None and self.trial.is_over():
                self.bulk.rest()
                self.trial = None
                self.tried("")

    def annotate(self, note: str) -> None:
        """Why payloads don't take NIXL; it is told where the link is up."""
        self.note = note
        if self.state == UP:
            self._shared.tell(Carries(self.name, self.carrier()))

    def carrier(self) -> str:
        """What payloads travel over: "nixl cma/memory", "tcp" (the bulk channel), "control"; in brackets why it isn't NIXL."""
        if self.over_nixl and self.nixl is not None:
            return self.nixl.carrier()
        return ("control" if self.channel is None else "tcp") + (f" ({self.note})" if self.note else "")

    # ---- state ----

    def come_up(self, node: str) -> None:
        self.state, self.deadline_ns = UP, 0
        if self.channel is not None:
            self.channel.start()
        self._shared.tell(Up(self.name, node, self.carrier()))

    def fail(self, reason: str) -> None:
        if self.state != DOWN:
            self._fail(self, reason)

    def go_down(self, reason: str, silent: bool = False) -> None:
        """The end: Down is told if Up was, unless the caller hung up itself."""
        was, self.state = self.state, DOWN
        for channel in (self.bulk, self.nixl):
            if channel is not None:
                channel.close()
        self.channel = self.bulk = self.nixl = self.trial = None
        if was == UP and not silent:
            self._shared.tell(Down(self.name, reason))


def take_rest(socket: zmq.Socket, head) -> tuple[memoryview | None, str]:
    """The parts after `head` of the message that is being received: the payload, and why they don't belong to it ("" when they do)."""
    payload, reason = None, ""
    if socket.getsockopt(zmq.RCVMORE):
        try:
            expected = wire.read_prefix(head).payload_bytes
        except BadFrame as error:
            expected, reason = 0, str(error)
        payload = memoryview(fresh(expected))
        got = socket.recv_into(payload, flags=zmq.NOBLOCK)
        if got != expected and not reason:
            payload, reason = None, f"payload of {got} bytes, prefix says {expected}"
    extra = 0
    while socket.getsockopt(zmq.RCVMORE):
        socket.recv_into(bytearray(), flags=zmq.NOBLOCK)
        extra += 1
    return payload, reason or (f"{2 + extra} parts where a frame has at most 2" if extra else "")
