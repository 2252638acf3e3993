"""An operator's own programs, run when something has happened: one JSON document on stdin.

Knows: subprocesses, a thread. Must not know: what events mean; whoever tells waits for nothing.
Invariants: telling never blocks and never raises; at most WAITING_MAX events wait, more are dropped and counted; one program at a time, in the order of events,
each with TIMEOUT_S to live and the whole of its group killed after that; what it says goes to the log, bounded, and no more than that is kept; nobody waits for
what a program left behind in another group; close() leaves no process and no thread, but for a program that the kernel doesn't let die within JOIN_S.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections import Counter

log = logging.getLogger(__name__)

WAITING_MAX = 64
TIMEOUT_S = 10.0
SAID_BYTES_MAX = 2000
READ_BYTES = 65536
JOIN_S = 5.0


class Hooks:
    """`programs`: event -> path; an event without one, or with an empty one, is nobody's."""

    def __init__(self, programs: dict[str, str], timeout_s: float = TIMEOUT_S) -> None:
        self._programs = {event: program for event, program in programs.items() if program}
        self._timeout_s = timeout_s
        self._waiting: queue.Queue[tuple[str, dict] | None] = queue.Queue(WAITING_MAX)
        self._ended = threading.Event()
        self.counters: Counter[str] = Counter()  # run | failed | timed_out | dropped
        self._thread = threading.Thread(target=self._run, name="kvguard-hooks", daemon=True)
        if self._programs:
            self._thread.start()

    def tell(self, event: str, **document: object) -> None:
        """Run the event's program with {"event", "at_s", **document} on its stdin, some time soon."""
        if event not in self._programs:
            return
        try:
            self._waiting.put_nowait((event, {"schema": "kvguard.hook/1", "event": event, "at_s": time.time(), **document}))
        except queue.Full:
            self.counters["dropped"] += 1
            log.warning("hook %s is dropped: %d events wait already", event, WAITING_MAX)

    def _run(self) -> None:
        while (waiting := self._waiting.get()) is not None and not self._ended.is_set():
            event, document = waiting
            program = self._programs[event]
            try:
                self._carry_out(event, program, json.dumps(document).encode())
            except OSError as error:
                self.counters["failed"] += 1
                log.error("hook %s: %s can't be run: %s. Try: an executable file", event, program, error.strerror)

    def _carry_out(self, event: str, program: str, document: bytes) -> None:
        with tempfile.TemporaryFile() as told:
            told.write(document)
            told.seek(0)
            with subprocess.Popen([program], start_new_session=True, stdin=told, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
                self.counters["run"] += 1
                said, ended = self._listen(running)
                if not ended:
                    os.killpg(running.pid, signal.SIGKILL)  # it isn't waited for yet, so its number is still its own
                    if not self._ended.is_set():
                        self.counters["timed_out"] += 1
                        log.error("hook %s: %s was killed: it ran longer than %g s", event, program, self._timeout_s)
        code = running.returncode
        if code > 0:
            self.counters["failed"] += 1
        if code > 0 or said:
            log.log(logging.ERROR if code else logging.INFO, "hook %s: %s ended with %d: %s", event, program, code, text_of(said))

    def _listen(self, running: subprocess.Popen) -> tuple[bytes, bool]:
        """What it says, as far as the log goes; False where its time is up, or this process is ending, before it and all who can speak for it have ended."""
        deadline, said = time.monotonic() + self._timeout_s, b""
        while not self._ended.is_set() and (left := deadline - time.monotonic()) > 0:
            if select.select([running.stdout], [], [], min(0.1, left))[0]:
                some = os.read(running.stdout.fileno(), READ_BYTES)
                if not some:
                    return said, self._left(running, deadline)
                said = (said + some)[: SAID_BYTES_MAX + 1]
        return said, False

    def _left(self, running: subprocess.Popen, deadline: float) -> bool:
        """Whether a program that says no more ends in time."""
        while not self._ended.is_set() and time.monotonic() < deadline:
            try:
                running.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            return True
        return False

    def close(self) -> None:
        """Whoever runs is killed; who waits never runs."""
        self._ended.set()
        if self._thread.is_alive():
            while True:
                try:
                    self._waiting.put_nowait(None)
                    break
                except queue.Full:
                    self._waiting.get_nowait()
            self._thread.join(JOIN_S)
            if self._thread.is_alive():
                log.error("a hook's program was killed and has not ended: nobody waits for it. Try: what it waits for (its file system?)")


def text_of(said: bytes) -> str:
    """What a program said, on one line of the log."""
    text = said[:SAID_BYTES_MAX].decode(errors="replace").strip().replace("\n", " / ")
    return text + (" ..." if len(said) > SAID_BYTES_MAX else "") or "(nothing)"
