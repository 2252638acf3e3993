"""One followed request through as many instances as it takes.

Knows: fleet, continuation, the order of things after a loss. Must not know: the client's connection, the form of its answer.
Invariants: a piece is given out once; after a loss the next instance is asked for exactly what is missing; where nobody can go on the journey ends in an
error that says so; `end()` tells every instance that was asked that nothing need be kept; what is counted as restored is what the instance said it restored.

After a loss, with ids already given out: wait for the recovery's resume token (bounded); submit prompt + ids with it to an active instance that is one of its
places; without one, or when that instance doesn't go on either, with the ids alone to any other (rung tokens: computed again). Where no other is active
the lost instance may be started again: it is a place, too, of what its former life left. Before the first id there is nothing to lose: the request begins
again elsewhere at once.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import NamedTuple

from tokenizers import Tokenizer

from kvguard.config import GatewayConfig
from kvguard.emitter import moves
from kvguard.errors import BadFrame, KvguardError
from kvguard.gateway.continuation import Chunk, Continuation, Piece
from kvguard.gateway.counters import Counters
from kvguard.gateway.events import Declined, Lost
from kvguard.gateway.fleet import UNREACHABLE, Fleet, Member, NoInstance
from kvguard.gateway.policy import Followed
from kvguard.gateway.routing import Standing, is_place
from kvguard.gateway.stalls import FENCE, FIRST_TOKEN, PLACING, RECOVERY, Stall
from kvguard.gateway.text import decoder
from kvguard.gateway.watching import key_of
from kvguard.types import Epoch, ResumeToken, Rung

log = logging.getLogger(__name__)
TELL_S = 1.0  # how long an answer that is whole waits for the instance's word on what it restored: it follows at once, or never comes
UNTOLD = "untold"  # the instance was asked to restore, and hasn't said whether it did


class Unbounded(KvguardError):
    """A request without max_tokens to a model whose context nobody says: nothing could be counted on. To be relayed."""


class Surroundings(NamedTuple):
    """What every journey has in common."""

    fleet: Fleet
    settings: GatewayConfig
    tokenizer: Tokenizer
    counters: Counters


class Journey:
    """`request`: the gateway's id of it. `headers`: the client's."""

    def __init__(self, around: Surroundings, followed: Followed, request: str, headers: Mapping[str, str]) -> None:
        self._around, self._followed, self.request, self._headers = around, followed, request, headers
        self._attempts = 0
        self._asked: list[tuple[Member, str]] = []
        self._failed: dict[str, tuple[Epoch, bool]] = {}  # instances that failed since the last id came: in which life, and whether they had been reached
        self._token: ResumeToken | None = None
        self._asked_rung = ""  # what the attempt under way was asked to restore from
        self._stall: Stall | None = None  # from the first loss to the next id
        self.answer: Continuation | None = None

    async def start(self) -> Continuation:
        """The prompt's ids. Raises NoInstance, Declined, Lost, Unbounded."""
        followed, ids, context = self._followed, (), 0
        if isinstance(followed.prompt, tuple):
            member = self._around.fleet.choose()
            ids, context = followed.prompt, member.watch.context_tokens if member else 0
        else:
            asked = {"model": followed.ask.model} if followed.ask.model is not None else {}
            if followed.template is not None:
                asked |= followed.template
            else:
                asked |= {"prompt": followed.prompt, "add_special_tokens": followed.add_special_tokens}
            tokenized = await self._anywhere(lambda member: member.upstream.tokenize(asked, self.request, self._headers))
            ids, context = tokenized.ids, tokenized.context_tokens
        if followed.ask.max_tokens is None and not context:
            raise Unbounded("the context's length isn't known")
        ask = followed.ask.bounded(len(ids), context, self._around.settings.max_tokens_default)
        self.answer = Continuation(ask, ids, decoder(self._around.tokenizer, ids, ask.skip_special_tokens))
        return self.answer

    async def pieces(self) -> AsyncIterator[Piece]:
        """The answer. Raises Declined (before the first id), NoInstance, Lost (when too many instances failed)."""
        answer, around = self.answer, self._around
        member, moved = await self._somebody(), None
        while True:
            key = key_of(self.request, self._attempts)
            self._attempts += 1
            self._asked.append((member, key))
            life, since = member.watch.life, self._now()
            member.watch.begin(key)
            salt, cached = secrets.token_urlsafe(32) if answer.ids else "", None
            try:
                async with aclosing(member.chunks(answer.body(moved, salt), key, self._headers)) as chunks:
                    async for chunk in chunks:
                        piece = self._taken(chunk)
                        yield piece
                        if answer.finish_reason:
                            cached = await _told(chunks) if moved is not None and chunk.finish_reason else None
                            return
                raise Lost("ended", "[DONE] before the end of the answer")
            except (Lost, Declined) as error:
                if isinstance(error, Declined) and not answer.ids:
                    raise
                # Who refuses the rest of what another one took (a smaller context, another model) lives, and has nothing of it.
                lost = error if isinstance(error, Lost) else Lost("status", str(error))
                asked = isinstance(error, Lost) and lost.kind != "unreached"
                if not asked:
                    self._asked_rung = ""
                self._lost(member, life, lost)
            finally:
                member.watch.left(key)
                self._count(cached)
            if self._attempts >= around.settings.attempts:
                raise Lost("ended", f"{self._attempts} instances in turn did not go on with the answer")
            if answer.ids and asked:
                await self._recovered(member, key, since)
            member, moved = await self._next()

    def end(self) -> None:
        """The client has the answer, or will never have more of it."""
        for member, key in self._asked:
            member.watch.end(key)
        self._asked.clear()

    # ---- inside ----

    def _taken(self, chunk: Chunk) -> Piece:
        try:
            piece = self.answer.take(chunk)
        except BadFrame as error:
            raise Lost("garbage", str(error)) from error
        if chunk.ids:
            if self._stall is not None:
                self._stalled(self._stall)
                self._stall = None
            self._failed.clear()
        return piece

    def _lost(self, member: Member, life: Epoch, lost: Lost) -> None:
        """`life`: the one that was asked; the instance may have another by now."""
        log.warning("%s: %s lost after %d ids: %s: %s", self.request, member.name, len(self.answer.ids), lost.kind, lost)
        self._around.counters.lost.labels(lost.kind).inc()
        member.doubt(lost)
        self._failed[member.name] = life, lost.kind not in UNREACHABLE
        self._waited(FIRST_TOKEN)

    async def _recovered(self, lost: Member, key: str, since: float) -> None:
        """The recovery of an instance that was asked, as far as it is waited for. `since`: when it was asked: a fence before that is none of this loss."""
        settings = self._around.settings
        token = await lost.watch.token(key, settings.fence_ms / 1000, settings.resume_ms / 1000)
        fenced_at = lost.watch.fenced_at
        self._waited(FENCE, fenced_at if fenced_at >= since else None)
        self._waited(RECOVERY)
        # Who was asked to go on may be lost before it restored anything: what a former loss has left is still there, and more.
        self._token = max((one for one in (token, self._token) if one is not None), key=lambda one: one.position if one.places else 0, default=None)

    async def _next(self) -> tuple[Member, dict | None]:
        """Who goes on, and with which token."""
        around = self._around
        if not self.answer.ids:
            around.counters.resumed.labels("none").inc()  # nothing had come of it
            return await self._somebody(), None
        if not self._usable():
            around.counters.resumed.labels(Rung.TOKENS).inc()
            return await self._somebody(), None
        target = around.fleet.choose(self._is_place, self._failing()) or await self._somebody()
        if not self._is_place(target.standing()):
            log.warning("%s: no place of its token is active: %s computes it", self.request, target.name)
            around.counters.unplaced.labels("no_active_place").inc()
            around.counters.resumed.labels(Rung.TOKENS).inc()
            return target, None
        self._asked_rung = self._token.rung
        return target, moves.encode(self._token)

    # ---- what the client waits for ----

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _waited(self, part: str, until: float | None = None) -> None:
        """The client has waited for `part`, until now or `until`."""
        now = self._now()
        if self._stall is None:
            self._stall = Stall(now)
        self._stall.until(part, now if until is None else until)

    def _stalled(self, stall: Stall) -> None:
        """The next id has come."""
        stall.until(FIRST_TOKEN, self._now())
        self._around.counters.stall.observe(stall.seconds)
        for part, seconds in stall.parts.items():
            self._around.counters.stall_part.labels(part).observe(seconds)
        log.info("%s: %s goes on after %s", self.request, self._asked[-1][0].name, stall)

    def _usable(self) -> bool:
        """Whether there is a token that KV can be asked for with."""
        token = self._token
        if token is None:
            return False
        if not self.answer.known(token):
            log.error("%s: the recovery's token is of other ids: not used", self.request)
            self._around.counters.unplaced.labels("mismatch").inc()
            return False
        return bool(token.places and token.position)

    def _is_place(self, standing: Standing) -> bool:
        return is_place(standing, self._token.places)

    def _count(self, cached: int | None) -> None:
        """An attempt has ended. `cached`: how many positions it says it didn't compute; its salt is its own, so they were restored."""
        rung, self._asked_rung = self._asked_rung, ""
        if rung:
            self._around.counters.resumed.labels(UNTOLD if cached is None else rung if cached else Rung.TOKENS).inc()

    def _failing(self, reached: bool = False) -> frozenset[str]:
        """Instances that failed since the last id came, and are still in the life that did. `reached`: only those that had been reached: of the others the
        looks say when they are there again."""
        members = self._around.fleet.members
        return frozenset(name for name, (life, was) in self._failed.items() if members[name].watch.life == life and (was or not reached))

    async def _somebody(self) -> Member:
        """Any active instance, rather one that hasn't just failed, for which it waits."""
        fleet = self._around.fleet
        found = fleet.choose(without=self._failing())
        if found is None and not self._attempts:
            raise NoInstance("no instance is active. Try: kvguard status")

        def without() -> frozenset[str]:
            useless = self._failing(reached=True)
            return useless if len(useless) < len(fleet.members) else frozenset()

        try:
            found = found or await fleet.wait(self._around.settings.resume_ms / 1000, without)
        except NoInstance:
            found = fleet.choose()  # nobody else came: who failed may do better this time, or the answer is lost for sure
            if found is None:
                raise
        if self._stall is not None:
            self._waited(PLACING)
        return found

    async def _anywhere(self, ask: Callable) -> object:
        """An answer that any instance can give. Raises NoInstance, Declined, Lost."""
        tried: set[str] = set()
        while True:
            member = self._around.fleet.choose(without=frozenset(tried))
            if member is None:
                raise NoInstance("no instance is active. Try: kvguard status")
            try:
                return await member.while_active(ask(member))
            except Lost as lost:
                self._around.counters.lost.labels(lost.kind).inc()
                member.doubt(lost)
                tried.add(member.name)


async def _told(chunks: AsyncIterator[Chunk]) -> int | None:
    """What stands behind the end of an answer that is whole: nothing of it can be lost any more."""
    try:
        async with asyncio.timeout(TELL_S):
            async for chunk in chunks:
                if chunk.cached_tokens is not None:
                    return chunk.cached_tokens
    except (TimeoutError, Lost):
        log.debug("the instance didn't say what it restored")
    return None
