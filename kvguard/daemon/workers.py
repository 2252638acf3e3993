"""A GPU's thread: jobs in, results out, a deadline. Whatever may take long on a GPU, or hang there, is such a job; the daemon's loop never waits for any.

Knows: jobs by GPU, an eventfd, when a job last moved, which devices can't be used. Must not know: what a job does, streams, the core.

Invariants
- What a job found comes back to the loop's thread, in the order in which a GPU's jobs ended, and exactly once: found, failed, refused or given up.
- "" is no GPU: such a job is done at once, in the caller's thread; so is every job where there is no loop. Only what gives its memory back has a thread, a
  pool or a replica's arena: the last unmapping of shared memory frees its pages, 150 to 250 ms a GB, without the interpreter's lock. It is never given up: the
  kernel is at it.
- A queue holds JOBS_MAX jobs; more are refused, not kept. What frees memory, or what an engine waits for, goes to its head.
- A thread that has ended, or whose job has not moved for STALL_NS, is given up, and its GPU is a device that can't be used: its jobs fail with DeviceLost and
  the reason, and so does whatever is put there until it moves again. What such a job still finds is thrown away where it was found. No fault of a job ends
  the loop, and nobody waits for a thread that was given up.
- A device is said to be unusable until a job that proves it has succeeded there.
- `progressing` is what the watchdog counts: every thread is idle, moves, or was given up and told of.
- The interpreter's lock is handed over after SWITCH_S, because a loop that has mail to read would wait for it longer than for the mail.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from kvguard.core import events
from kvguard.errors import DeviceLost, TimedOut

log = logging.getLogger(__name__)

Events = Iterable[events.Event]
JOBS_MAX = 1024  # of one GPU: the core asks for two captures a stream and holder
STALL_NS = 10_000_000_000  # a copy is waited for 1 s (device/paced.py), and a slow pace sleeps between pieces: what stands still for longer won't go on
LOOK_NS = 250_000_000  # between two looks at the threads while they work
SWITCH_S = 0.0005
JOIN_S = 2.0
HOST = "host"  # whose thread gives host memory back


class Turns(Protocol):
    """What is asked of loop.Loop."""

    def watch(self, descriptor: int, ready: Callable[[], Events]) -> None: ...

    def forget(self, descriptor: int) -> None: ...

    def after(self, delay_ns: int, ready: Callable[[], Events]) -> None: ...


class Outcome(NamedTuple):
    """What a job found, or why it found nothing. `begun`: whether anything of it was done."""

    value: Any = None
    error: Exception | None = None
    begun: bool = True


@dataclass(eq=False)
class Job:
    """`run`: in the GPU's thread. `ended`: in the loop's, with the outcome. `moved`: rises while it runs, any thread. `discard`: a value that nobody takes,
    in the GPU's thread. `proves`: its success shows that the GPU works."""

    run: Callable[[], Any]
    ended: Callable[[Outcome], Events]
    moved: Callable[[], int] = int
    discard: Callable[[Any], None] = lambda value: None
    proves: bool = False
    lasting: bool = False  # it is done also by a thread that was given up, should that come back
    told: bool = field(default=False)  # `ended` was called, or is about to be

    def done(self) -> Outcome:
        try:
            return Outcome(self.run())
        except Exception as error:
            return Outcome(None, error)

    def thrown_away(self, outcome: Outcome) -> Outcome:
        """What is left of an outcome that nobody waits for any more."""
        try:
            if outcome.error is None:
                self.discard(outcome.value)
            else:
                log.error("a job that nobody waits for any more failed: %s", str(outcome.error))
        except Exception:
            log.exception("what nobody waits for any more isn't given back")
        return Outcome(None, outcome.error)


class Worker:
    """One thread. The loop's thread alone calls anything but `_work` and what that calls."""

    def __init__(self, gpu: str, ring: Callable[[], None], clock: Callable[[], int]) -> None:
        """Raises RuntimeError where no thread can be had."""
        self.gpu = gpu
        self.given_up = ""
        self.found: deque[tuple[Job, Outcome]] = deque()
        self._ring, self._clock = ring, clock
        self._jobs: deque[Job] = deque()
        self._busy: Job | None = None
        self._ready = threading.Condition()
        self._stopping = False
        self._seen: tuple[Job | None, int] = (None, -1)
        self._moved_ns = clock()
        self._thread = threading.Thread(target=self._work, name=f"kvguard-{gpu}"[:15], daemon=True)
        self._thread.start()

    def put(self, job: Job, first: bool) -> None:
        """Raises OverflowError where JOBS_MAX wait; what goes `first` is always taken."""
        with self._ready:
            if len(self._jobs) >= JOBS_MAX and not first:
                raise OverflowError(f"{JOBS_MAX} jobs wait for {self.gpu} already")
            if first:
                self._jobs.appendleft(job)
            else:
                self._jobs.append(job)
            self._ready.notify()

    def _work(self) -> None:
        while (job := self._next()) is not None:
            outcome = job.done()
            if not self._handed(job, outcome):
                self._handed(job, job.thrown_away(outcome), late=True)
            job = outcome = None  # whatever they hold on to isn't held on to here while nothing is to be done
            self._ring()
        while self.found:
            job, outcome = self.found.popleft()
            if not job.told:
                job.thrown_away(outcome)

    def _next(self) -> Job | None:
        """None: it is to end, and nothing waits."""
        with self._ready:
            self._ready.wait_for(lambda: self._jobs or self._stopping)
            self._busy = self._jobs.popleft() if self._jobs else None
            return self._busy

    def _handed(self, job: Job, outcome: Outcome, late: bool = False) -> bool:
        """False where the job was given up meanwhile: nothing of it may be handed over but that it has ended, `late`."""
        with self._ready:
            if job.told and not late:
                return False
            self.found.append((job, outcome))
            self._busy = None
            return True

    @property
    def is_idle(self) -> bool:
        with self._ready:
            return self._busy is None and not self._jobs

    @property
    def ended(self) -> bool:
        return not self._thread.is_alive()

    def look(self) -> str:
        """Why it has to be given up, if so; "" as long as it moves, or has nothing to do."""
        with self._ready:
            busy = self._busy
            idle = busy is None and not self._jobs
        now, seen = self._clock(), (busy, busy.moved() if busy is not None else 0)
        if idle or seen != self._seen or (busy is None and not self.ended):
            self._seen, self._moved_ns = seen, now
        if self.ended and not self._stopping:
            return f"the thread that reads {self.gpu} has ended. Try: restart this daemon; its log says why"
        if now - self._moved_ns < STALL_NS:
            return ""
        return f"{self.gpu} has not moved a byte for {(now - self._moved_ns) // 1_000_000} ms. Try: nvidia-smi; dmesg | grep -i xid; restart this daemon"

    def abandoned(self) -> list[tuple[Job, bool]]:
        """Everything that has not ended, in order, and whether it was begun; nothing of it is waited for any more."""
        with self._ready:
            left = [*([(self._busy, True)] if self._busy is not None else ()), *((job, False) for job in self._jobs)]
            left = [(job, begun) for job, begun in left if not job.told and not job.lasting]
            self._jobs = deque(job for job in self._jobs if job.lasting)
            for job, _ in left:
                job.told = True
            return left

    def stop(self, wait_s: float) -> bool:
        """No more jobs than there are; whether the thread has ended."""
        with self._ready:
            self._stopping = True
            self._ready.notify()
        self._thread.join(wait_s)
        return self.ended


class Workers:
    """All of them, made when the first job for a GPU comes. `turns` None: every job is done at once."""

    def __init__(self, turns: Turns | None = None, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._turns, self._clock = turns, clock
        self._by_gpu: dict[str, Worker] = {}
        self._bell = -1
        self._looking = False
        self.releasing = 0  # pools and arenas that are not closed yet
        self.faults: dict[str, str] = {}  # by device, why it can't be used

    def put(self, gpu: str, job: Job, first: bool = False) -> Events:
        """Behind what waits there, or `first`. What is to be told at once: where it is refused, because that thread was given up (DeviceLost, with the reason)
        or too much waits (OverflowError), it has ended already."""
        if not gpu or self._turns is None:
            return self._tell(gpu, job, job.done())
        try:
            worker = self._worker(gpu)
            if worker.given_up:
                raise DeviceLost(worker.given_up)
            worker.put(job, first)
        except (DeviceLost, OverflowError) as error:
            return self._tell(gpu, job, Outcome(None, error, begun=False))
        self._look_soon()
        return ()

    def release(self, gpu: str, close: Callable[[], None]) -> None:
        """Close what lies on that GPU, in its thread, as soon as that can be; also where the thread was given up, should it ever come back.
        Host memory ("") in a thread of its own, or at once where none can be had."""
        if self._turns is None:
            close()
            return
        try:
            self._worker(gpu or HOST).put(Job(close, self._released, int if gpu else self._clock, lasting=True), first=True)
        except DeviceLost as error:
            if not gpu:
                close()
                return
            log.error("memory on %s isn't given back: %s", gpu, str(error))
            return
        self.releasing += 1
        self._look_soon()

    def _released(self, outcome: Outcome) -> Events:
        self.releasing -= 1
        if outcome.error is not None:
            log.error("memory isn't given back: %s", str(outcome.error))
        return ()

    def progressing(self) -> bool:
        """Whether every thread is idle, moves, or was given up: a loop that doesn't find out any more must not go on feeding a watchdog."""
        return all(worker.given_up or not worker.look() for worker in self._by_gpu.values())

    def _worker(self, gpu: str) -> Worker:
        """Raises DeviceLost where no thread can be had."""
        worker = self._by_gpu.get(gpu)
        if worker is None:
            try:
                bell = self._watched_bell()
                worker = self._by_gpu[gpu] = Worker(gpu, lambda: os.eventfd_write(bell, 1), self._clock)
            except (RuntimeError, OSError) as error:
                raise DeviceLost(f"no thread can be had to read {gpu}: {error}. Try: a higher TasksMax, and LimitNOFILE, in the unit") from error
        return worker

    def _watched_bell(self) -> int:
        """What all threads ring. Raises OSError where there can be none; then there is none."""
        if self._bell < 0:
            bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            try:
                self._turns.watch(bell, self._rung)
            except OSError:
                os.close(bell)
                raise
            self._bell = bell
            sys.setswitchinterval(SWITCH_S)
        return self._bell

    # ---- devices ------------------------------------------------------------------------------------------------------------------

    def prepared(self, device: str, said: Callable[[], str | None], silent: str) -> Events:
        """`said`: why the device can't be used, "" where it can, None as long as its driver doesn't answer: then it can't, because it is `silent`, and is asked
        again."""
        known = said()
        if known is None:
            self._turns.after(LOOK_NS, lambda: self.prepared(device, said, silent))
        return self.failed(device, silent if known is None else known)

    def failed(self, device: str, reason: str) -> Events:
        """It can't be used; or can again, without a reason."""
        if self.faults.get(device, "") == reason:
            return ()
        self.faults[device] = reason
        if not reason:
            del self.faults[device]
        return (self._devices(),)

    def _judged(self, gpu: str, job: Job, error: Exception | None) -> Events:
        """What an end says of the GPU. A device that refuses an engine because the GPU is lost says so as the cause."""
        lost = next((one for one in (error, getattr(error, "__cause__", None)) if type(one) in (DeviceLost, TimedOut)), None)
        if not gpu or lost is not None:
            return self.failed(gpu, str(lost)) if gpu else ()
        return (self._devices(),) if job.proves and error is None and self.faults.pop(gpu, None) is not None else ()

    def _devices(self) -> events.DevicesSeen:
        return events.DevicesSeen(tuple(sorted(self.faults.items())))

    # ---- in the loop's thread -----------------------------------------------------------------------------------------------------

    def _tell(self, gpu: str, job: Job, outcome: Outcome) -> Events:
        waited, job.told = not job.told, True
        told = job.ended(outcome) if waited else ()
        return (*told, *self._judged(gpu, job, outcome.error))

    def _rung(self) -> Events:
        try:
            os.eventfd_read(self._bell)
        except BlockingIOError:
            log.debug("the workers' bell was answered already")
        return self._ended()

    def _ended(self) -> list[events.Event]:
        told: list[events.Event] = []
        for worker in list(self._by_gpu.values()):
            while worker.found:
                job, outcome = worker.found.popleft()
                if worker.given_up:
                    log.warning("%s moves again", worker.gpu)
                    worker.given_up = ""
                told += self._tell(worker.gpu, job, outcome)
        return told

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            self._turns.after(LOOK_NS, self._look)

    def _look(self) -> Events:
        """From time to time while anything is to be done."""
        self._looking = False
        told = self._ended()
        for worker in list(self._by_gpu.values()):
            reason = worker.look()
            if reason and not worker.given_up:
                log.error("given up: %s", reason)
                worker.given_up = reason
                told += self.failed(worker.gpu, reason)
            for job, begun in worker.abandoned() if worker.given_up else ():
                told += job.ended(Outcome(None, DeviceLost(worker.given_up), begun))
        if any(not worker.is_idle for worker in self._by_gpu.values()):
            self._look_soon()
        return told

    def close(self) -> None:
        """What waits is done, or left behind after JOIN_S; nobody hears of it. Who was given up is not waited for."""
        deadline, all_ended = time.monotonic() + JOIN_S, True
        for gpu, worker in self._by_gpu.items():
            if not worker.stop(0.0 if worker.given_up else max(0.0, deadline - time.monotonic())):
                all_ended = False
                log.error("%s is still at work: what is mapped of it goes with this process", gpu)
        self._by_gpu.clear()
        if self._bell >= 0:
            self._turns.forget(self._bell)
            if all_ended:  # else it would be rung when it is another descriptor
                os.close(self._bell)
            self._bell = -1
