"""The emitter of one instance: its session with the coordinator, what it adopted, what it may release.

Knows: the emitter's messages, one transport with a thread that owns it. Must not know: models, scheduling, HTTP.
Invariants: an epoch is adopted once and never an older one after it; a coordinator that is away changes nothing but that resume() and welcome() wait; no call
blocks without a timeout; what is remembered for a coordinator that is away is bounded; close() leaves no thread and no socket.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterable

from kvguard import errors
from kvguard.emitter.releasing import Questions
from kvguard.emitter.resumption import Resumption
from kvguard.errors import BadConfig, BadFrame, KvguardError, TimedOut
from kvguard.format import messages, wire
from kvguard.limits import NAME_BYTES_MAX
from kvguard.transport.ask import own_name
from kvguard.transport.base import Broken, Down, Frame, Up
from kvguard.transport.keys import Keys
from kvguard.transport.wakeup import Wakeup
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import NO_EPOCH, Epoch, Life, Position, ResumeToken, SequenceId

COORDINATOR = "coordinator"
BEAT_MS = 100
BEATS_PER_SILENCE = 3  # one lost, one late: no sign of death
DELIVERED_MAX = 4096  # said again on every new session: the coordinator answers them with nothing, and a link may have lost them
DELIVERED_PER_MESSAGE = 512
FLUSH_S = 1.0  # at the end: so long a coordinator that is away, or slow, is waited for
UNASKED, ASKED, HEARD = range(3)  # at the end, on this session: whether the coordinator has heard everything

log = logging.getLogger(__name__)


def connect(
    instance: str,
    coordinator: str,
    keys: Keys | None = None,
    *,
    insecure: bool = False,
    name: str = "",
    beat_ms: int = BEAT_MS,
    epoch: Epoch = NO_EPOCH,
    moves: bool = False,
    silence_ms: int = 0,
) -> Emitter:
    """The one emitter of `instance`; a later one anywhere ends this one's session. `coordinator`: its address. `epoch`: what an earlier life had adopted.
    `moves`: sequences can be submitted to other instances of the same model: then no recovery waits for a standby (Resumption.moved).
    `silence_ms`: what this process promises the coordinator: an emitter that is silent for longer is dead. 0: as the coordinator is set (`emitter_ms`), which
    is also the least that counts; `emitter_ms_max` is the most.

    Returns at once, whether or not the coordinator is there. Raises BadConfig for an address that can't be dialled without keys, or a promise that beats each
    `beat_ms` can't keep.
    """
    if not instance or len(instance.encode()) > NAME_BYTES_MAX:
        raise BadConfig(f"instance {instance!r} isn't 1 to {NAME_BYTES_MAX} bytes. Try: the name in the daemons' configuration")
    if silence_ms < 0 or 0 < silence_ms < BEATS_PER_SILENCE * beat_ms:
        raise BadConfig(f"silence_ms = {silence_ms} is too short for a beat each {beat_ms} ms. Try: {BEATS_PER_SILENCE * beat_ms} or more, or 0")
    return Emitter(instance, coordinator, keys, insecure, name or own_name(keys).replace("ask-", "emitter-"), beat_ms, epoch, moves, silence_ms)


class Emitter:
    """Made by connect(). All methods may be called from any thread."""

    def __init__(self, instance: str, coordinator: str, keys: Keys | None, insecure: bool, name: str, beat_ms: int, epoch: Epoch, moves: bool, silence_ms: int):
        self.instance, self.incarnation = instance, int.from_bytes(os.urandom(8), "little") >> 1 or 1
        self._link = f"{COORDINATOR}/{instance}"  # one process may be the emitter of several instances, with one key
        self._coordinator, self._beat_s, self._moves, self._silence_ms = coordinator, beat_ms / 1000, moves, silence_ms
        self._changed, self._keys = threading.Condition(), keys
        self._adopted, self._announced = epoch, messages.Fenced(instance, epoch, "")
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._welcome: messages.Welcome | None = None
        self._resume: messages.Resume | None = None
        self._members: tuple[messages.Member, ...] = ()
        self._scheduled = self._progress = 0
        self._delivered: deque[Life] = deque(maxlen=DELIVERED_MAX)
        self._undelivered = 0  # of those at the end, how many haven't been said on this session
        self._adopt_unsaid = False
        self._session = False
        self._closing = False
        self._flush, self._flush_until = UNASKED, float("inf")
        self.problems: deque[str] = deque(maxlen=32)  # what the transport said, newest last
        self._transport = ZeromqTransport(name, keys, insecure, bulk=False, incarnation=self.incarnation)
        self._questions = Questions(instance, self._transport)
        try:
            self._transport.expect(self._link)
            self._transport.dial(self._link, coordinator)
            self._wakeup = Wakeup()
        except BadConfig:
            self._transport.close()
            os.close(self._bell)
            raise
        self._wakeup.watch(self._transport.fileno(), _nothing)
        self._thread = threading.Thread(target=self._run, name=f"kvguard-emitter-{instance}", daemon=True)
        self._thread.start()

    # ---- facts ----

    def scheduled(self, count: int) -> None:
        """How many sequences have work in flight; travels with the next beat."""
        self._scheduled = count

    def progress(self, count: int) -> None:
        """A number that rises with every result that reached the emitter; travels with the next beat."""
        self._progress = count

    @property
    def epoch(self) -> Epoch:
        return self._adopted

    @property
    def fenced(self) -> messages.Fenced | None:
        """The newest announcement, from the moment it came until its epoch, or a newer one, is adopted. Cheap: ask between steps."""
        announced = self._announced
        return announced if announced.epoch.counter > self._adopted.counter else None

    def fileno(self) -> int:
        """Readable while `fenced`: for a driver that waits on descriptors."""
        return self._bell

    @property
    def connected(self) -> bool:
        """True while there is a session with the coordinator. Serving goes on without."""
        return self._session

    @property
    def members(self) -> tuple[messages.Member, ...]:
        return self._members

    # ---- the session ----

    def welcome(self, timeout: float) -> messages.Welcome:
        """The coordinator's newest greeting. Raises TimedOut."""
        with self._changed:
            self._wait(lambda: self._welcome is not None, timeout, f"no welcome from the coordinator at {self._coordinator}. Try: check that it runs")
            return self._welcome

    def resume(self, timeout: float) -> Resumption:
        """Block until the newest announced epoch's recovery has ended. Raises TimedOut, or KvguardError where the recovery failed for good.

        May be called before anything was announced: it then waits for the next recovery.
        """
        with self._changed:
            self._wait(self._resumable, timeout, f"no resumption of {self.instance!r} after epoch {self._adopted.counter}. Try: kvguard history")
            resume = self._resume
        if resume.error:
            raise KvguardError(f"recovery of {self.instance!r} in epoch {resume.epoch.counter} failed: {resume.error}. Try: kvguard history")
        return Resumption(resume)

    def adopt(self, what: Resumption | ResumeToken) -> messages.Adopted:
        """Go on in the epoch of `what`; everything older is over. Again with the same epoch changes nothing. Raises errors.Fenced for one that is over."""
        with self._changed:
            if what.epoch != self._adopted:
                newest = max(self._announced.epoch.counter, self._adopted.counter)
                if what.epoch.counter <= self._adopted.counter or what.epoch.counter < newest:
                    raise errors.Fenced(f"epoch {what.epoch.counter} is over, the newest is {newest}. Try: resume() again")
                if self.fenced is not None:
                    os.eventfd_read(self._bell)
                self._adopted = what.epoch
                self._adopt_unsaid = True
                self._wakeup.again(_nothing)
            return messages.Adopted(self.instance, self.incarnation, self._adopted)

    def delivered(self, sequences: SequenceId | Life | Iterable[SequenceId | Life]) -> None:
        """The answer of a sequence, or of several, has reached its client: the ids may go.

        Who gives a name away again says which of its lives it was (`life_of`): this is said again with every session. A name alone means all of its lives.
        """
        several = (sequences,) if isinstance(sequences, (str, Life)) else sequences
        some = [Life(one) if isinstance(one, str) else one for one in several]
        with self._changed:
            self._delivered.extend(some)
            self._undelivered = min(self._undelivered + len(some), len(self._delivered))
            self._wakeup.again(_nothing)

    def releasable(self, sequence: SequenceId | Life, timeout: float = 1.0) -> Position:
        """How far every rank's ids and KV of `sequence` are acknowledged elsewhere: with ack = "strict" no token beyond it may leave.

        Where the name was given away before, ask for the life: a daemon that hasn't looked since would answer for the former one.
        Asks the ranks' daemons. Raises TimedOut when one doesn't answer; what to do then is the caller's (strict_timeout_ms).
        """
        with self._changed:
            question = self._questions.ask(Life(sequence) if isinstance(sequence, str) else sequence, self._members)
            self._wakeup.again(_nothing)
            try:
                self._wait(question.done, timeout, f"a rank's daemon didn't say how far {question.life.sequence!r} is protected. Try: kvguard status")
            finally:
                self._questions.end(question)
            if question.error is not None:
                raise question.error
            return min(question.positions)

    def rekey(self, keys: Keys) -> None:
        """Other keys from now on (transport.zeromq.ZeromqTransport.rekey), soon. Raises BadConfig where this emitter was made without keys."""
        if self._keys is None:
            raise BadConfig("an emitter that was made without keys can't have some. Try: connect() again")
        with self._changed:
            self._keys = keys
            if not self._closing:
                self._wakeup.again(_nothing)

    def close(self, flush_s: float = FLUSH_S) -> None:
        """The end, once the coordinator has heard what was delivered; after `flush_s` at the latest, and then said loudly what it may not have heard."""
        with self._changed:
            if self._closing:
                return
            self._closing = True
            self._flush_until = time.monotonic() + flush_s
            self._wakeup.again(_nothing)
            self._changed.notify_all()
        self._thread.join()
        self._transport.close()
        self._wakeup.close()
        os.close(self._bell)

    def __enter__(self) -> Emitter:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- the thread ----

    def _wait(self, true, timeout: float, otherwise: str) -> None:
        self._changed.wait_for(lambda: self._closing or true(), timeout)
        if self._closing:
            raise KvguardError("the emitter is closed. Try: connect() again")
        if not true():
            raise TimedOut(f"{otherwise} (waited {timeout:g} s)")

    def _resumable(self) -> bool:
        resume = self._resume
        return resume is not None and resume.epoch.counter > self._adopted.counter and resume.epoch.counter >= self._announced.epoch.counter

    def _run(self) -> None:
        next_beat = 0.0
        while True:
            self._wakeup.wait(max(0.0, min(next_beat, self._flush_until) - time.monotonic()))
            with self._changed:
                if self._closing and self._flushed():
                    return
                self._wakeup.ready()
                if self._keys is not None:
                    self._transport.rekey(self._keys)  # nothing where they are the same
                for event in self._transport.receive():
                    self._take(event)
                self._say_pending()
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + self._beat_s
                    self._beat()
                self._changed.notify_all()

    def _flushed(self) -> bool:
        """Whether nothing delivered need be said any more, or nothing can be."""
        if not self._delivered or self._flush == HEARD:
            return True
        if time.monotonic() < self._flush_until:
            return False
        self.problems.append(
            f"closed before {self._coordinator} had heard which answers are delivered (up to {len(self._delivered)}): what is kept for them may stay until the "
            "bounds on it. Try: kvguard status, or a longer flush_s"
        )
        log.warning("%s: %s", self.instance, self.problems[-1])
        return True

    def _take(self, event) -> None:
        if isinstance(event, Up) and event.link == self._link:
            self._session, self._flush = True, UNASKED
            self._undelivered = len(self._delivered)
            self._adopt_unsaid = self._adopted != NO_EPOCH
            self._say(messages.EmitterHello(self.instance, self.incarnation, self._adopted, self._moves, self._silence_ms))
        elif isinstance(event, Down):
            if event.link == self._link:
                self._session = False
            else:
                self._questions.down(event.link)
        elif isinstance(event, Broken):
            self.problems.append(f"{event.link}: {event.reason}")
        elif isinstance(event, Frame):
            try:
                message, _ = wire.decode(event.head)
            except BadFrame as error:
                self.problems.append(f"{event.link}: {error}")
                return
            if isinstance(message, messages.Answer) and event.link == self._link:
                self._flush = HEARD  # whatever it says: what was said before the question has arrived
            elif isinstance(message, messages.Answer):
                self._questions.answered(event.link, message)
            elif event.link == self._link and getattr(message, "instance", None) == self.instance:
                self._on_message(message)

    def _on_message(self, message: messages.Message) -> None:
        if isinstance(message, messages.Welcome):
            first, self._welcome = self._welcome is None, message
            self._members = message.members or self._members
            if first and not message.recovering and self._adopted == NO_EPOCH:
                self._adopted = message.epoch  # nothing to resume: this life begins in the instance's epoch
            self._announce(message.epoch, "a recovery that this emitter hasn't resumed from")
        elif isinstance(message, messages.Fenced):
            self._announce(message.epoch, message.reason)
        elif isinstance(message, messages.Resume):
            if message.epoch.counter <= self._adopted.counter or (self._resume is not None and message.epoch.counter < self._resume.epoch.counter):
                return  # said again, or over
            self._announce(message.epoch, message.error or "recovered")
            self._resume = message
            if not message.error:
                self._members = message.members

    def _announce(self, epoch: Epoch, reason: str) -> None:
        if epoch.counter > max(self._announced.epoch.counter, self._adopted.counter):
            if self.fenced is None:
                os.eventfd_write(self._bell, 1)
            self._announced = messages.Fenced(self.instance, epoch, reason)
            self._beat()  # at once: a round may wait for the word that nothing older reaches a client any more

    def _beat(self) -> None:
        fenced = max(self._announced.epoch.counter, self._adopted.counter)
        self._say(messages.EmitterBeat(self.instance, self.incarnation, self._adopted, self._scheduled, self._progress, fenced))

    def _say_pending(self) -> None:
        if self._adopt_unsaid and self._say(messages.Adopted(self.instance, self.incarnation, self._adopted)):
            self._adopt_unsaid = False
        while self._undelivered:
            some = list(self._delivered)[-self._undelivered :][:DELIVERED_PER_MESSAGE]
            if not self._say(messages.Delivered.of(self.instance, tuple(some))):
                break
            self._undelivered -= len(some)
        if self._closing and not self._undelivered and self._flush == UNASKED and self._say(messages.Query(0, "heard")):
            self._flush = ASKED
        self.problems += self._questions.say(self._members)

    def _say(self, message: messages.Message) -> bool:
        return self._transport.send(self._link, wire.encode(message))


def _nothing(events: int) -> None:
    """The thread looks at everything whenever it wakes."""
