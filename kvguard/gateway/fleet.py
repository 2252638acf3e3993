"""The instances together: who is active, who takes the next request, streams that end when their instance is fenced.

Knows: watches, upstreams, routing. Must not know: what a request means, clients.
Invariants: an instance is active after a look at its server said so, and until a connection to it fails, it answers garbage, or it is fenced; no chunk that
comes after the fence of its instance is given out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import aclosing

from kvguard.errors import KvguardError
from kvguard.gateway.continuation import Chunk
from kvguard.gateway.counters import Counters
from kvguard.gateway.events import Declined, Lost
from kvguard.gateway.news import News
from kvguard.gateway.routing import Standing, choose
from kvguard.gateway.upstream import Upstream
from kvguard.gateway.watching import Watch

log = logging.getLogger(__name__)
UNREACHABLE = ("unreached", "connection")  # kinds of losses after which the next look says whether the server is there
DOUBT_S = 2.0  # how long an instance that answered garbage, or nothing, is left alone
HEALTH_S = 2.0


class NoInstance(KvguardError):
    """Nobody can take a request."""


class Member:
    """An instance with all that belongs to it."""

    def __init__(self, watch: Watch, upstream: Upstream) -> None:
        self.watch, self.upstream = watch, upstream
        self._doubted: asyncio.TimerHandle | None = None

    @property
    def name(self) -> str:
        return self.watch.instance.name

    def standing(self) -> Standing:
        standing = self.watch.standing()
        return standing._replace(active=standing.active and self._doubted is None)

    def doubt(self, lost: Lost) -> None:
        """After a loss: one request's trouble (status) says nothing of the instance, and a fence says it all itself."""
        if lost.kind in UNREACHABLE:
            self.watch.looked(False)
        elif lost.kind in ("garbage", "idle", "ended"):
            if self._doubted is not None:
                self._doubted.cancel()
            self._doubted = asyncio.get_running_loop().call_later(DOUBT_S, self._undoubted)

    def _undoubted(self) -> None:
        self._doubted = None
        self.watch.news.tell()

    async def while_active(self, asking: Coroutine) -> object:
        """What comes of `asking`, as long as the instance is active: whoever hangs is not waited for. Raises Lost."""
        working = asyncio.ensure_future(asking)
        leaving = asyncio.ensure_future(self.watch.news.until(lambda: not self.watch.standing().active))
        try:
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not working.done():
                raise Lost("idle", "the instance is not active any more")
            return working.result()
        finally:
            working.cancel()
            leaving.cancel()
            await asyncio.gather(working, leaving, return_exceptions=True)

    async def chunks(self, body: dict, key: str, headers: Mapping[str, str]) -> AsyncIterator[Chunk]:
        """A completion, chunk by chunk. Raises Lost, Declined."""
        async with aclosing(self.upstream.completion(body, key, headers)) as source, aclosing(unless(self.watch.fenced, source)) as guarded:
            async for chunk in guarded:
                self.watch.heard()
                yield chunk


async def unless(fenced: asyncio.Event, source: AsyncIterator) -> AsyncIterator:
    """The items of `source` until `fenced` is set: then Lost, at once, and an item that came in the same moment is dropped."""
    waiting = asyncio.ensure_future(fenced.wait())
    read: asyncio.Future | None = None
    try:
        while True:
            read = asyncio.ensure_future(anext(source))
            await asyncio.wait((read, waiting), return_when=asyncio.FIRST_COMPLETED)
            if fenced.is_set():
                raise Lost("fenced", "the instance is fenced")
            try:
                item = read.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        waiting.cancel()
        if read is not None and not read.done():
            read.cancel()
        await asyncio.gather(waiting, *([read] if read is not None else []), return_exceptions=True)


class Fleet:
    """`probe_s`: between two looks at each server. `news`: the watches' one."""

    def __init__(self, members: list[Member], counters: Counters, probe_s: float, headers: Mapping[str, str], news: News) -> None:
        self.members = {member.name: member for member in members}
        self._counters, self._probe_s, self._headers = counters, probe_s, headers
        self._news = news
        self._looking: list[asyncio.Task] = []

    def choose(self, fits: Callable[[Standing], bool] = lambda standing: True, without: frozenset[str] = frozenset()) -> Member | None:
        found = choose((member.standing() for name, member in self.members.items() if name not in without), fits)
        return self.members[found.name] if found else None

    async def wait(self, timeout_s: float, without: Callable[[], frozenset[str]]) -> Member:
        """As choose, but waits for one. `without` is asked at each piece of news. Raises NoInstance."""
        if not await self._news.until(lambda: self.choose(without=without()) is not None, timeout_s):
            raise NoInstance(f"no instance became active within {timeout_s:g} s. Try: kvguard status")
        return self.choose(without=without())

    @property
    def active(self) -> int:
        return sum(member.standing().active for member in self.members.values())

    @property
    def model(self) -> str:
        """What answers name the model where the request doesn't."""
        return next((member.watch.model for member in self.members.values() if member.watch.model), "")

    # ---- looking ----

    async def start(self) -> None:
        """The first look at all, then each by itself: one that hangs delays no other."""
        for member in self.members.values():
            self._counters.active.labels(member.name).set_function(lambda member=member: member.standing().active)
        await asyncio.gather(*map(self._look_at, self.members.values()))
        self._looking = [asyncio.create_task(self._keep_looking(member)) for member in self.members.values()]

    async def close(self) -> None:
        for task in self._looking:
            task.cancel()
        await asyncio.gather(*self._looking, return_exceptions=True)
        await asyncio.gather(*(member.watch.close() for member in self.members.values()))  # each may wait for a coordinator that is away

    async def _keep_looking(self, member: Member) -> None:
        while True:
            await asyncio.sleep(self._probe_s)
            await self._look_at(member)

    async def _look_at(self, member: Member) -> None:
        watch, was = member.watch, member.watch.up
        up = await member.upstream.healthy(HEALTH_S)
        if up and (not was or not watch.model):
            up = await self._learn(member)
        watch.looked(up)
        if up != was:
            log.info("%s is %s", member.name, "up" if up else "down")

    async def _learn(self, member: Member) -> bool:
        """What the instance serves. An instance that doesn't say is not up."""
        try:
            document = await member.upstream.models(self._headers, HEALTH_S)
        except Declined:
            return True  # it wants a key that only clients have
        except Lost as error:
            log.info("%s: %s", member.name, error)
            return False
        cards = document.get("data")
        card = next((one for one in cards if isinstance(one, dict)), {}) if isinstance(cards, list) else {}
        name, context = card.get("id"), card.get("max_model_len")
        member.watch.model = name if isinstance(name, str) else ""
        member.watch.context_tokens = context if type(context) is int else 0
        return True
