"""The receiving half of a stream: one per (link, session). Puts both lanes in order, refuses what is over, acknowledges what was applied.

Knows: frame numbers, epochs, buffers by id. Must not know: bytes, pages, what a replica holds (store/).
States: probing (Probe asked) -> open -> broken (a gap: the sender was told to say Hello again) | over (a newer epoch or session; refused).
Invariants: every frame is applied at most once and in the order of its lane; a kv frame never before the ids frame that it requires, a cut never before the kv
frames that were sent before it; nothing of an epoch older than the promise is applied; every buffer that comes in goes out in Apply or FreeBuffer.
"""

from __future__ import annotations

from collections import deque

from kvguard.core.effects import Apply, Effect, FreeBuffer, Note, Probe, Send
from kvguard.core.events import Applied, Arrived, Event, Probed, TurnEnded
from kvguard.format.messages import Ack, Held, Hello, Holding, IdsFrame, KvFrame
from kvguard.limits import HELD_FRAMES_MAX
from kvguard.types import Epoch


def refusal(hello: Hello, epoch: Epoch, reason: str) -> Held:
    """The answer to a Hello that can't be granted."""
    return Held(hello.session, epoch, Holding(hello.stream, "replica", False, (), (), (), (), ()), reason)


class Receiver:
    """`start` asks the store; then frames of this link and session."""

    def __init__(self, link: str, hello: Hello) -> None:
        self.link, self.stream, self.session, self.epoch = link, hello.stream, hello.session, hello.epoch
        self.hello = hello
        self.state = "probing"
        self._ids_in = self._kv_in = 0  # the highest number handed to the store
        self._ids_done = self._kv_done = 0  # the highest number applied
        self._ids_held: deque[IdsFrame] = deque()
        self._kv_held: deque[tuple[KvFrame, int]] = deque()
        self._ids_seen = self._kv_seen = 0  # the highest number arrived, held ones included
        self._refused: list[tuple[int, str]] = []
        self._refusals = 0
        self._resync, self._what = "", "after_end"
        self._owes = False
        self._out: list[Effect] = []

    def start(self) -> tuple[Effect, ...]:
        return (Probe(self.link, self.hello),)

    def step(self, now_ns: int, event: Event) -> tuple[Effect, ...]:
        kind = type(event)
        if kind is Arrived:
            self._arrived(event)
        elif kind is Applied:
            self._applied(event)
        elif kind is TurnEnded:
            self._answer()
        elif kind is Probed:
            self._probed(event)
        out, self._out = tuple(self._out), []
        return out

    def next_deadline(self) -> int | None:
        return None

    def check(self) -> None:
        assert self._ids_done <= self._ids_in <= self._ids_seen and self._kv_done <= self._kv_in <= self._kv_seen
        assert len(self._ids_held) + len(self._kv_held) <= HELD_FRAMES_MAX
        assert self.state == "open" or not (self._ids_held or self._kv_held), "frames held by a session that is over"

    # ---- what the node asks ----

    def end(self, what: str, reason: str) -> tuple[Effect, ...]:
        """A newer session, a newer epoch or a lost link: nothing more is applied; what still comes is counted as `what`."""
        self.state, self._what, self._resync = "over", what, reason
        self._drop()
        out, self._out = tuple(self._out), []
        return out

    def broken(self, reason: str) -> tuple[Effect, ...]:
        """Something on this link was not a frame: what it was can only be sent again."""
        if self.state == "open":
            self._break(reason)
        out, self._out = tuple(self._out), []
        return out

    # ---- frames ----

    def _probed(self, event: Probed) -> None:
        if self.state != "probing":
            return
        self.state = "over" if event.reason else "open"
        self._out.append(Send(self.link, refusal(self.hello, self.epoch, event.reason) if event.reason else event.held))

    def _arrived(self, event: Arrived) -> None:
        message, buffer = event.message, event.buffer
        if self.state != "open":
            if self.state != "broken":  # after a gap the rest of the session is expected, and already answered
                self._out.append(Note(self._what, str(self.stream), f"frame {message.number} of a session that is {self.state}: {self._resync}"))
            self._free(buffer)
            return
        if message.epoch != self.epoch:
            self._out.append(Note("stale_epoch", str(self.stream), f"frame {message.number} of {message.epoch} in a session of {self.epoch}"))
            self._free(buffer)
            self._break("a frame of another epoch")
            return
        ids = type(message) is IdsFrame
        expected = (self._ids_seen if ids else self._kv_seen) + 1
        if message.number < expected:
            self._out.append(Note("duplicate", str(self.stream), f"{'ids' if ids else 'kv'} frame {message.number}"))
            self._free(buffer)
            return
        if message.number > expected:
            self._free(buffer)
            self._break(f"gap: {'ids' if ids else 'kv'} frame {message.number} came where {expected} was due")
            return
        if ids:
            self._ids_seen = expected
            self._ids_held.append(message)
        else:
            self._kv_seen = expected
            self._kv_held.append((message, buffer))
        self._pass_on()
        if len(self._ids_held) + len(self._kv_held) > HELD_FRAMES_MAX:
            self._break(f"more than {HELD_FRAMES_MAX} frames wait for an earlier one")

    def _pass_on(self) -> None:
        """Hand over what is in order: each lane's head, as long as the other lane has brought what it waits for."""
        ids, kv = self._ids_held, self._kv_held
        while True:
            if ids and ids[0].after_kv <= self._kv_in:
                frame = ids.popleft()
                self._ids_in = frame.number
                self._out.append(Apply(self.link, self.session, frame, 0))
            elif kv and kv[0][0].requires <= self._ids_in:
                frame, buffer = kv.popleft()
                self._kv_in = frame.number
                self._out.append(Apply(self.link, self.session, frame, buffer))
            else:
                return

    def _applied(self, event: Applied) -> None:
        """A frame that could not be applied, and all that were handed over behind it, are not acknowledged."""
        if self.state != "open":
            return
        if event.refused:
            self._refused.extend(event.refused)
            self._refusals += len(event.refused)
            self._owes = True
        if event.gap:
            self._break(event.gap)
            return
        done = self._ids_done if event.lane == "ids" else self._kv_done
        if event.number != done + 1:
            self._break(f"{event.lane} frame {event.number} was applied where {done + 1} was due")
            return
        if event.lane == "ids":
            self._ids_done = event.number
        else:
            self._kv_done = event.number
        self._owes = True

    def _break(self, reason: str) -> None:
        if self.state == "open":
            self.state = "broken"
            self._resync = reason
            self._owes = True
            self._out.append(Note("resync", str(self.stream), reason))
        self._drop()

    def _drop(self) -> None:
        for _, buffer in self._kv_held:
            self._free(buffer)
        self._ids_held.clear()
        self._kv_held.clear()

    def _free(self, buffer: int) -> None:
        if buffer:
            self._out.append(FreeBuffer(buffer))

    def _answer(self) -> None:
        """Once per turn; the word that a session is broken goes out once."""
        if not self._owes or self.state in ("probing", "over"):
            return
        self._owes = False
        resync = self._resync if self.state == "broken" else ""
        self._out.append(Send(self.link, Ack(self.session, self.epoch, self._ids_done, self._kv_done, tuple(self._refused), resync, self._refusals)))
        self._refused.clear()
