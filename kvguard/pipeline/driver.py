"""The driver of the reference engine, and its emitter: `python -m kvguard.pipeline.driver SETTINGS.toml`.

Commands arrive as JSON lines on stdin (run, digest, release, quit), events leave as JSON lines on stdout; logs go to stderr.

Knows: sockets, clocks, text, the emitter. Must not know: what to schedule or where to resume (scheduler.py decides), tensors' meaning, torch.
Invariants: the next step's message is queued before the events of the last one are written, so an id is on its way to the ranks before anybody sees it;
a result of an older epoch, or of a step that isn't in flight, is dropped; after a fence nothing is sent before the resumption is adopted.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np
import zmq

from kvguard.errors import BadFrame, KvguardError, TimedOut
from kvguard.pipeline import replies
from kvguard.pipeline import settings as settings_
from kvguard.pipeline.commands import Commands, Quit, Release, Run, decode
from kvguard.pipeline.links import Links
from kvguard.pipeline.membership import Alone, Guarded
from kvguard.pipeline.scheduler import Bounds, Scheduler
from kvguard.pipeline.settings import DriverSettings
from kvguard.pipeline.steps import DIGEST, STATE, STEP, Message
from kvguard.pipeline.tokenizer import Text, TextStream
from kvguard.pipeline.weights import ModelFiles, open_model

STATE_RETRY_S = 0.25  # a state question that isn't answered is asked again: a stage may not have been listening yet
WAKE_MS = 5  # how late a fence may be noticed
log = logging.getLogger("kvguard.pipeline")


class Stopped(BaseException):
    """SIGTERM or quit, wherever the process was."""


class Driver:
    """The shell around one Scheduler."""

    def __init__(self, settings: DriverSettings, files: ModelFiles, text: Text | None, links: Links, members):
        self.settings, self.text, self.links, self.members = settings, text, links, members
        shape = files.shape
        eos = tuple(dict.fromkeys([*shape.eos, *([text.eos] if text and text.eos is not None else [])]))
        self.vocab = shape.vocab
        bounds = Bounds(settings.blocks, settings.block_tokens, settings.chunk, settings.sequences_max, shape.context, shape.vocab, eos)
        # Numbers of two drivers never meet: results of a dead one's steps are not taken for this one's.
        first = random.SystemRandom().getrandbits(40) << 20
        self.scheduler = Scheduler(bounds, first_number=first)
        self.commands = Commands(0)
        self.epoch = 0
        self.route: tuple[str, ...] = ()
        self.dropped = 0
        self._question = first  # of another kind than steps, so they may share numbers
        self._asking: Message | None = None  # a digest that is not answered
        self._digests: deque[str] = deque()
        self._texts: dict[str, TextStream] = {}
        self._began_ns: dict[str, int] = {}
        self._poller = zmq.Poller()
        self._poller.register(links.inbox, zmq.POLLIN)
        self._poller.register(self.commands.fileno(), zmq.POLLIN)

    def run(self) -> None:
        """Until Stopped, or raises KvguardError where there is no going on."""
        recovering = self._join(self.members.welcome(self.settings.resume_timeout_s))
        if recovering:
            self._resume(fresh=True)
        else:
            states = self._states()
            if states is not None and not self.settings.coordinator:
                self.scheduler.forget(states)
        self._write({"event": "ready", "epoch": self.epoch, "endpoints": list(self.route[:-1])})
        while True:
            if self.members.fenced():
                self._resume(fresh=not self._began_ns)  # with no run of its own yet, it is its predecessor's runs that come back
            self._advance([])
            self._poller.poll(WAKE_MS)
            for line in self.commands.read():
                self._obey(line)
            if self.commands.ended:
                raise Stopped
            while not self.members.fenced() and (received := self.links.receive()) is not None:
                self._take(*received)

    # ---- commands ---------------------------------------------------------------------------------------------------------------

    def _obey(self, line: bytes) -> None:
        try:
            command = decode(line)
        except BadFrame as error:
            return self._write({"event": "error", "message": str(error)})
        if isinstance(command, Run):
            self._start(command)
        elif isinstance(command, Release):
            lives = tuple(self.scheduler.tracks[name].life for name in self.scheduler.names(command.run))
            self._advance(self.scheduler.release(command.run))
            self.members.delivered(lives)
        elif isinstance(command, Quit):
            raise Stopped
        elif not self.scheduler.names(command.run):
            self._write({"event": "error", "message": f"run {command.run!r} is not there. Try: the name that the run was started with"})
        else:
            self._digests.append(command.run)

    def _start(self, command: Run) -> None:
        try:
            requests, prompts = command.prepare(self.text)
        except KvguardError as error:
            return self._write({"event": "error", "message": f"run {command.run!r}: {error}"})
        if self.text is not None:
            self._texts |= {request.name: self.text.stream() for request in requests if request.name not in self._texts}
        self._began_ns.setdefault(command.run, time.monotonic_ns())
        self._advance(self.scheduler.add_run(requests, prompts))

    # ---- steps ------------------------------------------------------------------------------------------------------------------

    def _advance(self, events: list[dict]) -> None:
        """Sends what comes next, then writes what came of the last."""
        if self._asking is None and self.scheduler.in_flight is None and not self.members.fenced():
            if self._digests:
                self._ask_digest(self._digests[0])
            elif (step := self.scheduler.next_step()) is not None:
                message = Message(STEP, self.epoch, step.number, self.route, 0, step.facts, step.released)
                self.members.report(self.scheduler.scheduled, self.scheduler.progress)
                self.links.send(self.route[0], message)
            else:
                events = events + self.scheduler.stuck()
                self.members.report(self.scheduler.scheduled, self.scheduler.progress)
        for event in events:
            self._write(event)

    def _take(self, message: Message, tensor: memoryview) -> None:
        step = self.scheduler.in_flight
        if message.epoch != self.epoch:
            self._drop(message, f"the epoch is {self.epoch}")
        elif message.kind == STEP and step is not None and message.number == step.number:
            self._take_result(message.number, tensor)
        elif message.kind == DIGEST and self._asking is not None and message.number == self._asking.number:
            self._take_digest(message)
        else:
            self._drop(message, "nothing like it is in flight")

    def _take_result(self, number: int, tensor: memoryview) -> None:
        try:
            if len(tensor) % (4 * self.vocab):
                raise BadFrame(f"{len(tensor)} bytes are not rows of {self.vocab} logits")
            logits = np.frombuffer(tensor, dtype=np.float32).reshape(-1, self.vocab)
            events = self.scheduler.result(number, logits)
        except BadFrame as error:
            self.dropped += 1
            return self._write({"event": "error", "message": f"a result was dropped: {error}"})
        self._advance(events)

    def _drop(self, message: Message, reason: str) -> None:
        self.dropped += 1
        log.warning("dropped %s %d of epoch %d (%d so far): %s", message.kind[:16], message.number, message.epoch, self.dropped, reason)

    # ---- questions --------------------------------------------------------------------------------------------------------------

    def _ask(self, kind: str, names: tuple[str, ...] = ()) -> Message:
        self._question += 1
        message = Message(kind, self.epoch, self._question, self.route, 0, released=names)
        self.links.send(self.route[0], message)
        return message

    def _ask_digest(self, run: str) -> None:
        self._asking = self._ask(DIGEST, self.scheduler.names(run))

    def _take_digest(self, message: Message) -> None:
        run, asked = self._digests.popleft(), self._asking
        self._asking = None
        try:
            answers = [replies.unpack_digest(reply) for reply in message.replies]
        except BadFrame as error:
            return self._write({"event": "error", "message": f"digest of run {run!r}: {error}"})
        digests = {}
        for pp, answer in enumerate(answers):
            found = {name: [f"{digest:016x}" for digest in answer[name]] for name in asked.released if name in answer}
            digests[f"0.{pp}.0"] = {name.removeprefix(f"{run}-"): column for name, column in found.items()}
        self._advance([{"event": "digest", "run": run, "digests": digests}])

    def _states(self) -> list[replies.State] | None:
        """What every rank says it has; None when a fence came first. Raises TimedOut."""
        deadline_ns = time.monotonic_ns() + int(self.settings.resume_timeout_s * 1e9)
        numbers = {self._ask(STATE).number}
        asked_ns = time.monotonic_ns()
        while not self.members.fenced():
            received = self.links.receive()
            if received is not None:
                message = received[0]
                whole = message.kind == STATE and len(message.replies) == self.settings.stages
                if whole and message.epoch == self.epoch and message.number in numbers:
                    return [replies.unpack_state(reply) for reply in message.replies]
                self._drop(message, "only the ranks' state is waited for")
                continue
            now_ns = time.monotonic_ns()
            if now_ns > deadline_ns:
                raise TimedOut(f"the stages at {', '.join(self.route[:-1])} didn't answer for {self.settings.resume_timeout_s} s. Try: look at their logs")
            if now_ns - asked_ns > STATE_RETRY_S * 1e9:
                numbers.add(self._ask(STATE).number)
                asked_ns = now_ns
            self.links.inbox.poll(10)
        return None

    # ---- recovery ---------------------------------------------------------------------------------------------------------------

    def _join(self, welcome) -> bool:
        self.epoch = welcome.epoch
        self._set_route(welcome.endpoints)
        return welcome.recovering

    def _set_route(self, endpoints: tuple[str, ...]) -> None:
        self.route = (*endpoints, self.settings.listen)
        self.links.keep(self.route[:1])

    def _resume(self, fresh: bool) -> None:
        """From a fence to the next step; once more where another fence comes in between."""
        while True:
            self.scheduler.fenced()
            self._asking = None
            self._write({"event": "fenced", "epoch": self.epoch, "reason": "the coordinator announced a newer epoch"})
            resumption = self.members.resume(self.settings.resume_timeout_s)
            self.epoch = resumption.epoch
            self._set_route(resumption.endpoints)
            states = self._states()
            if states is None:
                continue
            sequences, events = self.scheduler.resume(resumption.sequences, states, fresh)
            if fresh and self.text is not None:
                self._texts = {name: self.text.stream() for name in self.scheduler.tracks}
            now_ns = time.monotonic_ns()
            for track in self.scheduler.tracks.values():
                self._began_ns.setdefault(track.request.run, now_ns)
            resumed = {
                "event": "resumed", "epoch": self.epoch, "timing_ms": resumption.timing_ms, "bytes_by_rung": resumption.bytes_by_rung,
                "members": resumption.members, "sequences": sequences, "endpoints": list(resumption.endpoints),
            }  # fmt: skip
            return self._advance([resumed, *events])

    # ---- events -----------------------------------------------------------------------------------------------------------------

    def _write(self, event: dict) -> None:
        if event["event"] == "token":
            event["text"] = self._text_of(event)
        elif event["event"] == "finished":
            event["elapsed_s"] = (time.monotonic_ns() - self._began_ns.get(event["run"], time.monotonic_ns())) / 1e9
        elif event["event"] == "released":
            self._began_ns.pop(event["run"], None)
            self._texts = {name: stream for name, stream in self._texts.items() if name in self.scheduler.tracks}
        event["t_ns"] = time.monotonic_ns()
        sys.stdout.write(json.dumps(event, ensure_ascii=False) + "\n")
        sys.stdout.flush()

    def _text_of(self, event: dict) -> str:
        stream = self._texts.get(f"{event['run']}-{event['sequence']}")
        if stream is None:
            return ""
        piece = stream.push(event["id"])
        return piece + stream.flush() if event["last"] else piece


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s driver %(message)s")
    if len(arguments) != 1:
        print("usage: python -m kvguard.pipeline.driver SETTINGS.toml", file=sys.stderr)
        return 2

    def stop(*_) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    links = members = None
    try:
        settings = settings_.read(Path(arguments[0]), DriverSettings)
        files = open_model(settings.model)
        text = Text(settings.model) if (Path(settings.model) / "tokenizer.json").is_file() else None
        links = Links(settings.listen)
        members = Guarded(settings) if settings.coordinator else Alone(settings)
        Driver(settings, files, text, links, members).run()
    except Stopped:
        log.info("stopped")
        return 0
    except KvguardError as error:
        log.error("%s", error)
        print(json.dumps({"event": "error", "message": str(error), "t_ns": time.monotonic_ns()}), flush=True)
        return error.exit_code
    except BrokenPipeError:
        os.close(sys.stdout.fileno())
        return 1
    finally:
        if members is not None:
            members.close()
        if links is not None:
            links.close(linger_ms=200)
    return 0


if __name__ == "__main__":
    sys.exit(main())
