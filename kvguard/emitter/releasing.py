"""How far a sequence may leave: questions to the daemons of its instance's ranks, and their answers.

Knows: Query and Answer, the emitter's transport. Must not know: the session with the coordinator, threads, who waits.
Invariants: a question is answered by every rank, or by one error; a daemon whose link went down is asked again once it is back; links are dialled once
somebody asks; at most QUESTIONS_MAX are open.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from kvguard.errors import BadConfig, BadFrame, KvguardError
from kvguard.format import wire
from kvguard.format.messages import Answer, Member, Query
from kvguard.transport.ask import body_of
from kvguard.transport.base import Transport
from kvguard.types import Life

QUESTIONS_MAX = 1024


class Question:
    """One of them: the answers that are still out, by query id."""

    def __init__(self, life: Life, ranks: dict[int, tuple[str, str]]) -> None:
        self.life, self.ranks = life, ranks  # id -> (link, rank text)
        self.unsent = set(ranks)
        self.positions: list[int] = []
        self.error: KvguardError | None = None

    def done(self) -> bool:
        return self.error is not None or len(self.positions) == len(self.ranks)


class Questions:
    """All of one instance."""

    def __init__(self, instance: str, transport: Transport) -> None:
        self._instance, self._transport = instance, transport
        self._open: dict[int, Question] = {}
        self._next = 1
        self._dialled: dict[str, str] = {}

    def ask(self, life: Life, members: tuple[Member, ...]) -> Question:
        """Raises KvguardError where nobody is known to ask, or too many questions are open."""
        if not members:
            raise KvguardError(f"the members of {self._instance!r} aren't known yet. Try: welcome() first")
        if len(self._open) >= QUESTIONS_MAX:
            raise KvguardError(f"{QUESTIONS_MAX} questions are still open. Try: fewer at a time")
        ranks = {number: (f"peer:{member.node}", str(member.rank)) for number, member in enumerate(members, self._next)}
        self._next += len(members)
        question = Question(life, ranks)
        self._open.update(dict.fromkeys(ranks, question))
        return question

    def end(self, question: Question) -> None:
        for number in question.ranks:
            self._open.pop(number, None)

    def down(self, link: str) -> None:
        """Its answers won't come: ask again once it is back."""
        for number, question in self._open.items():
            if question.ranks[number][0] == link:
                question.unsent.add(number)

    def answered(self, link: str, answer: Answer) -> None:
        question = self._open.get(answer.id)
        if question is None or question.ranks[answer.id][0] != link or answer.id in question.unsent:
            return  # too late
        try:
            position = body_of(answer).get("position")
            if type(position) is not int:
                raise BadFrame(f"{link}: an answer to releasable without a position")
            question.positions.append(position)
            del self._open[answer.id]
        except KvguardError as error:
            question.error = error

    def say(self, members: tuple[Member, ...]) -> Iterable[str]:
        """Dial and ask whom there is to ask. Yields what is wrong with an address."""
        if not self._open:
            return
        addresses = {f"peer:{member.node}": member.address for member in members}
        for link in [link for link in self._dialled if link not in addresses]:
            self._transport.hang_up(link)
            del self._dialled[link]
        for link, address in addresses.items():
            if self._dialled.get(link) != address:
                self._dialled[link] = address
                try:
                    self._transport.dial(link, address)
                except BadConfig as error:
                    yield f"{link}: {error}"
        for number, question in self._open.items():
            if number in question.unsent:
                link, rank = question.ranks[number]
                arguments = {"instance": self._instance, "rank": rank, "sequence": question.life.sequence, "birth": question.life.birth}
                if self._transport.send(link, wire.encode(Query(number, "releasable", json.dumps(arguments).encode()))):
                    question.unsent.discard(number)
