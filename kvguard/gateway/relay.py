"""One relayed request: passed to an instance as it came, and its answer passed back as it comes. Not resumable, and it says so.

Knows: fleet, bytes. Must not know: what the bytes mean, beyond JSON and whole events: nonsense is an instance's, and lost, not a client's.
Invariant: as long as no byte has reached the client another instance is asked; after that a loss ends the answer in an error, never in a second beginning.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing

from kvguard.gateway.events import DONE, Lost, check_no_failure, json_object
from kvguard.gateway.fleet import Member, NoInstance, unless
from kvguard.gateway.journey import Surroundings
from kvguard.gateway.watching import key_of


class Relay:
    """`path`: at the instance. `body`: the client's, refused fields already refused."""

    def __init__(self, around: Surroundings, path: str, body: dict, request: str, headers: Mapping[str, str]) -> None:
        self._around, self._path, self.request, self._headers = around, path, request, headers
        self._body = {name: value for name, value in body.items() if name != "request_id"}
        self._asked: list[tuple[Member, str]] = []

    async def whole(self) -> bytes:
        """The JSON answer. Raises NoInstance, Declined, Lost."""
        while True:
            member, key = self._begin()
            try:
                async with aclosing(self._parts(member, key, member.upstream.passed)) as parts:
                    answer = b"".join([some async for some in parts])
                json_object(answer)
                return answer
            except Lost as lost:
                self._lost(member, lost)
            finally:
                member.watch.left(key)

    async def stream(self) -> AsyncIterator[bytes]:
        """The answer, in whole events: those that have data, as others say nothing. Raises NoInstance, Declined, Lost: once events were given out, Lost is for
        good."""
        given = False
        while True:
            member, key = self._begin()
            last = b""
            try:
                async with aclosing(self._parts(member, key, member.upstream.streamed)) as parts:
                    async for part in parts:
                        member.watch.heard()
                        for event in part:
                            check_no_failure(event.data)
                        given, last = True, part[-1].data
                        yield b"".join([event.raw for event in part])
                if last != DONE:
                    raise Lost("ended", "the stream ended without [DONE]")
                return
            except Lost as lost:
                self._lost(member, lost)
                if given:
                    raise
            finally:
                member.watch.left(key)

    def end(self) -> None:
        for member, key in self._asked:
            member.watch.end(key)
        self._asked.clear()

    def _begin(self) -> tuple[Member, str]:
        failed = frozenset(member.name for member, _ in self._asked)
        member = self._around.fleet.choose(without=failed)
        if member is None:
            raise NoInstance("no instance is active. Try: kvguard status")
        key = key_of(self.request, len(self._asked))
        self._asked.append((member, key))
        member.watch.begin(key, resumable=False)
        return member, key

    def _parts(self, member: Member, key: str, asked: Callable[..., AsyncGenerator]) -> AsyncGenerator:
        return unless(member.watch.fenced, asked(self._path, self._body, key, self._headers))

    def _lost(self, member: Member, lost: Lost) -> None:
        self._around.counters.lost.labels(lost.kind).inc()
        member.doubt(lost)
