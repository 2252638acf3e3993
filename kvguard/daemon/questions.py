"""Questions of the command line and of emitters: a verb with JSON arguments in, one JSON document or an error out.

Knows: messages.Query and Answer. Must not know: what verbs do.
Invariants: a question never ends a daemon, whatever it asks; a long answer is made in slices between turns, and at most SLICED_MAX at once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator

from kvguard.errors import KvguardError
from kvguard.format.messages import Answer, Query

log = logging.getLogger(__name__)

SLICED_MAX = 8
SLICE_PAUSE_NS = 1_000_000
ARGUMENTS_BYTES_MAX = 64 * 1024

Verb = Callable[[dict], "dict | Iterator[dict | None]"]  # a generator yields None between slices and the document last


class Questions:
    """Answers queries by `verbs`. `send(link, answer)`; `later(delay_ns, call)` runs a call in a later turn."""

    def __init__(self, verbs: dict[str, Verb], send: Callable[[str, Answer], None], later: Callable[[int, Callable], None]) -> None:
        self._verbs = verbs
        self._send = send
        self._later = later
        self._sliced = 0

    def asked(self, link: str, query: Query) -> None:
        verb = self._verbs.get(query.verb)
        if verb is None:
            self._refuse(link, query, f"{query.verb!r} is not a question that is answered here. Try: {', '.join(sorted(self._verbs))}", 2)
            return
        arguments = self.arguments_of(link, query)
        if arguments is not None:
            self._attempt(link, query, lambda: verb(arguments))

    def arguments_of(self, link: str, query: Query) -> dict | None:
        """The question's arguments; None where they are wrong, which was answered then."""
        try:
            arguments = json.loads(query.arguments) if len(query.arguments) <= ARGUMENTS_BYTES_MAX else None
            if not isinstance(arguments, dict):
                raise ValueError(f"not a JSON object within {ARGUMENTS_BYTES_MAX} bytes")
        except ValueError as error:
            self._refuse(link, query, f"{query.verb}: arguments are wrong: {error}. Try: {{}}", 2)
            return None
        return arguments

    def _attempt(self, link: str, query: Query, call: Callable[[], object]) -> None:
        try:
            found = call()
        except KvguardError as error:
            self._refuse(link, query, str(error), error.exit_code)
        except (ValueError, KeyError, TypeError) as error:
            self._refuse(link, query, f"{query.verb}: arguments are wrong: {type(error).__name__}: {error}. Try: kvguard --help", 2)
        except OSError as error:
            log.exception("%s failed", query.verb)
            self._refuse(link, query, f"{query.verb} failed: {error}", 1)
        else:
            if isinstance(found, dict):
                self.answer(link, query.id, found)
            elif found is not None:
                self._begin(link, query, found)

    def _begin(self, link: str, query: Query, slices: Iterator[dict | None]) -> None:
        if self._sliced >= SLICED_MAX:
            self._refuse(link, query, f"{SLICED_MAX} long questions are being answered already. Try: again in a while", 1)
            return
        self._sliced += 1
        self._slice(link, query, slices)

    def _slice(self, link: str, query: Query, slices: Iterator[dict | None]) -> None:
        ended = []

        def step() -> dict | None:
            try:
                found = next(slices)
            except BaseException:
                ended.append(True)
                raise
            if found is not None:
                ended.append(True)
            return found

        self._attempt(link, query, step)
        if ended:
            self._sliced -= 1
            return

        def again() -> tuple:
            self._slice(link, query, slices)
            return ()

        self._later(SLICE_PAUSE_NS, again)

    def answer(self, link: str, number: int, body: dict) -> None:
        self._send(link, Answer(number, json.dumps(body).encode()))

    def _refuse(self, link: str, query: Query, error: str, code: int) -> None:
        self._send(link, Answer(query.id, b"{}", error, code))
