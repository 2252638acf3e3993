"""One instance under watch: its emitter's session, whether it is fenced, and the resume tokens of the requests that were in flight.

Knows: emitter.connect's object, asyncio. Must not know: HTTP bodies, clients.
Invariants: which life of its server an instance is in, the coordinator says, by the epoch: every life has one of its own as long as the emitter lives; looks at
the server say whether it can be reached, and nothing else; the epoch of a recovery is adopted once its tokens are here, before any is given out; a token is
given to the one request that it is of, once; the token of a request that nobody waits for is answered with delivered(), so that nothing stays pinned for it;
the emitter's blocking calls run in a thread of the watch's own.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from kvguard.emitter import Emitter, Resumption
from kvguard.errors import Fenced, KvguardError, TimedOut
from kvguard.gateway.news import News
from kvguard.gateway.routing import Instance, Standing
from kvguard.types import Epoch, Rank, ResumeToken

log = logging.getLogger(__name__)
RESUME_WAIT_S = 0.5  # how long a thread waits at once: what a shutdown waits for. A recovery's end is told within it, at once
LOOK_S = 0.2  # between two looks at an instance that dropped a connection and isn't fenced
HEALTHY_LOOKS = 2  # in a row: an engine's server may still answer while the engine dies
KEY = re.compile(r"kvg-[0-9a-f]{24}-\d+")  # an engine may add something of its own to the name


def key_of(request: str, attempt: int) -> str:
    """What an instance is given as X-Request-Id, which is the sequence's name there: `request` (kvg-...) in its `attempt`-th life."""
    return f"{request}-{attempt}"


class Watch:
    """All methods are called from the event loop's thread. `news`: told whenever anything changes that somebody may wait for."""

    def __init__(self, instance: Instance, emitter: Emitter, healthy: Callable[[], Awaitable[bool]], news: News | None = None) -> None:
        self.instance, self._emitter, self._healthy, self.news = instance, emitter, healthy, news or News()
        self.up = False  # the last look at its server
        self.context_tokens = 0
        self.model = ""
        self.fenced = asyncio.Event()
        self.fenced_at = 0.0  # when it last was, on the loop's clock
        self._flying: set[str] = set()  # under way in the engine
        self._owed: set[str] = set()  # those, and what the engine lost as long as its client waits: their tokens count
        self._tokens: dict[str, ResumeToken | None] = {}  # of owed keys, after a recovery; None: the recovery has nothing for it
        self._in_doubt = 0  # answers that want to know whether the server lives
        self._good_looks = 0  # in a row, since the newest doubt
        self._progress = 0
        self._recovering: asyncio.Task | None = None
        self._looking: asyncio.Task | None = None
        self._thread = ThreadPoolExecutor(1, f"kvguard-resume-{instance.name}")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(emitter.fileno(), self._on_fence)

    # ---- requests ----

    def begin(self, key: str, resumable: bool = True) -> None:
        """`key` is submitted to this instance."""
        self._flying.add(key)
        if resumable:
            self._owed.add(key)
        self._emitter.scheduled(len(self._flying))

    def heard(self) -> None:
        """Something came of one of them."""
        self._progress += 1
        self._emitter.progress(self._progress)

    def left(self, key: str) -> None:
        """The instance has no more to do with `key`, because it ended or because it was lost."""
        self._flying.discard(key)
        self._emitter.scheduled(len(self._flying))

    def end(self, key: str) -> None:
        """The client has what it will get: nothing need be kept for it."""
        self._owed.discard(key)
        token = self._tokens.pop(key, None)
        self._emitter.delivered(token.sequence if token else key)

    def looked(self, up: bool) -> None:
        """Whether its server answers."""
        self._good_looks = self._good_looks + 1 if up else 0
        self.up = up
        self.news.tell()

    @property
    def life(self) -> Epoch:
        """Which life of its server answers now: the coordinator raises the epoch when one ends. Without a coordinator all are one."""
        return self._emitter.epoch

    def standing(self) -> Standing:
        members = {Rank(*member.rank): member.node for member in self._emitter.members}
        return Standing(self.instance, self.up and not self.fenced.is_set(), len(self._flying), members)

    # ---- recoveries ----

    async def token(self, key: str, fence_s: float, resume_s: float) -> ResumeToken | None:
        """What the recovery says of a request that this instance lost; None where it has nothing, or none comes in time.

        Waits `fence_s` for the fence, or until the instance proves to be alive after all; from the fence on `resume_s` for its end.
        """
        await self._fence_or_life(key, fence_s)
        if self.fenced.is_set():
            await self.news.until(lambda: key in self._tokens, resume_s)
        return self._tokens.get(key)

    async def _fence_or_life(self, key: str, timeout_s: float) -> None:
        """However many answers wait, the server is looked at once in LOOK_S; the fence doesn't wait for the end of a look."""
        self._good_looks = 0  # every loss is a new doubt
        self._in_doubt += 1
        if self._looking is None:
            self._looking = asyncio.create_task(self._look())
            self._looking.add_done_callback(_loud)
        try:
            await self.news.until(lambda: key in self._tokens or self.fenced.is_set() or self._good_looks >= HEALTHY_LOOKS, timeout_s)
        finally:
            self._in_doubt -= 1
            if not self._in_doubt:
                self._looking.cancel()
                self._looking = None

    async def _look(self) -> None:
        while True:
            self.looked(await self._healthy())
            await asyncio.sleep(LOOK_S)

    def _on_fence(self) -> None:
        self._loop.remove_reader(self._emitter.fileno())  # it stays readable until the epoch is adopted
        log.warning("%s is fenced: %s", self.instance.name, getattr(self._emitter.fenced, "reason", ""))
        self.fenced_at = self._loop.time()
        self.fenced.set()
        self.news.tell()
        self._recovering = asyncio.create_task(self._recover())
        self._recovering.add_done_callback(_loud)

    async def _recover(self) -> None:
        said = ""
        while True:
            try:
                resumption = await self._loop.run_in_executor(self._thread, self._emitter.resume, RESUME_WAIT_S)
                self._emitter.adopt(resumption)
            except (TimedOut, Fenced):  # not over yet, or overtaken by a newer epoch, whose recovery ends as well
                continue
            except KvguardError as error:  # failed for good: nothing comes for those who wait; a later epoch may bring the instance back
                if str(error) != said:
                    said = str(error)
                    log.warning("%s: %s", self.instance.name, said)
                self._publish({})
                await asyncio.sleep(RESUME_WAIT_S)
                continue
            break
        self._take(resumption)
        self.up = await self._healthy()  # of whoever is there in the new epoch
        if self._emitter.fenced is None:  # else the next one is at the door
            self.fenced.clear()
        self._loop.add_reader(self._emitter.fileno(), self._on_fence)
        self.news.tell()

    def _take(self, resumption: Resumption) -> None:
        found: dict[str, ResumeToken] = {}
        nobodys = []
        for token in resumption:
            key = KEY.search(token.sequence)
            if key and key[0] in self._owed and key[0] not in found:
                found[key[0]] = token
            else:
                nobodys.append(token.sequence)
        if nobodys:
            self._emitter.delivered(nobodys)
        log.info(
            "%s goes on in epoch %d with %d of %d requests; the coordinator's part: %s", self.instance.name, resumption.epoch.counter, len(found),
            len(self._owed), ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in resumption.timing_ms.items()) or "untold",
        )  # fmt: skip
        self._publish(found)

    def _publish(self, found: dict[str, ResumeToken]) -> None:
        for key in sorted(self._owed):
            if self._tokens.get(key) is None:
                self._tokens[key] = found.get(key)
        self.news.tell()

    async def close(self) -> None:
        if not self.fenced.is_set():
            self._loop.remove_reader(self._emitter.fileno())
        if self._recovering is not None:
            self._recovering.cancel()
            await asyncio.gather(self._recovering, return_exceptions=True)
        await asyncio.to_thread(self._emitter.close)  # which ends a resume() as well
        self._thread.shutdown()


def _loud(task: asyncio.Task) -> None:
    """A bug here would leave an instance fenced, or in doubt, in silence."""
    if not task.cancelled() and task.exception() is not None:
        log.error("a watch ended in a bug", exc_info=task.exception())
