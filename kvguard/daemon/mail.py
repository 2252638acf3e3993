"""What a process reads from its transport: questions are answered here, everything else becomes the core's events.

Knows: frames, questions. Must not know: what events mean.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from kvguard.core import events
from kvguard.daemon.perform import Shell, arrived
from kvguard.daemon.questions import Questions
from kvguard.format import wire
from kvguard.format.messages import Answer, Message, Query


class Mail:
    """`intercept`: messages for the shell itself by type; called with link and message."""

    def __init__(self, shell: Shell, questions: Questions, intercept: dict[type[Message], Callable[[str, Message], None]] | None = None) -> None:
        self._shell = shell
        self.questions = questions
        self._intercept = intercept or {}

    def read(self) -> Iterable[events.Event]:
        return self._events()

    def _events(self) -> Iterator[events.Event]:
        for incoming in self._shell.transport.receive():
            event = arrived(self._shell, incoming)
            if type(event) is events.Arrived:
                kind = type(event.message)
                react = self._intercept.get(kind, self.questions.asked if kind is Query else None)
                if react is not None:
                    react(event.link, event.message)
                    continue
            yield event


def answering(shell: Shell) -> Callable[[str, Answer], None]:
    """Questions' way back. An answer too large for a frame becomes an error that says so."""

    def send(link: str, answer: Answer) -> None:
        try:
            head = wire.encode(answer)
        except wire.BadFrame as error:
            head = wire.encode(Answer(answer.id, b"{}", f"the answer is too large: {error}. Try: --instance, or one sequence", 1))
        if not shell.transport.send(link, head):
            shell.counters["answers_dropped"] += 1

    return send
