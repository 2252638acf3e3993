"""Server-sent events of an instance, taken apart; chunks of vLLM's completions, understood.

Knows: the wire form of both, bounds. Must not know: connections.
Invariant: whatever the bytes are, the outcome is chunks, Declined by the instance, or Lost: never more memory than EVENT_BYTES_MAX and one read.
"""

from __future__ import annotations

import codecs
import re
from typing import NamedTuple

import msgspec

from kvguard.errors import KvguardError
from kvguard.gateway.continuation import Chunk
from kvguard.limits import MIB

EVENT_BYTES_MAX = 16 * MIB  # the first event of a prompt brings all its ids: two million of them
EVENT_LINES_MAX = 4096  # a line of three bytes costs twenty times as much memory once it is one
DONE, ERROR = b"[DONE]", b'{"error"'
_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")  # atomic: one CRLF is not two ends
_FIELD = re.compile(rb"[\w-]*(?::|$)")  # what a line begins with; b"" and comments included


class Lost(KvguardError):
    """An instance that doesn't go on with an answer. `kind`: unreached | connection | status | garbage | idle | fenced | ended: the label it is counted under.

    Whoever is unreached was asked nothing; with `connection`, that isn't known.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Declined(KvguardError):
    """An instance's well-formed refusal of the request itself, which any other would repeat. `body`: its JSON, as it came."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"the instance refused with {status}")
        self.status, self.body = status, body


class Event(NamedTuple):
    """`raw`: as it came, its end included. `data`: b"" where there is none: a comment, say."""

    raw: bytes
    data: bytes


class Events:
    """Bytes in, whole events out. As the specification has it: lines end with LF, CRLF or CR, an empty one ends an event, which may have no data; comments and
    fields of other names mean nothing. What comes behind the last end is no event."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._begun = False

    def feed(self, some: bytes) -> list[Event]:
        """Raises Lost for an event without an end, or of too many lines, and for lines that are no fields."""
        at = max(0, len(self._rest) - 3)  # an end may have begun there; a long line is looked through once, not again with each of its parts
        self._rest += some
        events, begun = [], 0
        while (found := _END.search(self._rest, at)) is not None:
            at = found.end()
            events.append(self._event(bytes(self._rest[begun:at])))
            begun = at
        del self._rest[:begun]
        if len(self._rest) > EVENT_BYTES_MAX:
            raise Lost("garbage", f"an event of more than {EVENT_BYTES_MAX} bytes")
        return events

    def _event(self, raw: bytes) -> Event:
        if not self._begun:
            self._begun, raw = True, raw.removeprefix(codecs.BOM_UTF8)
        if raw.count(b"\n") + raw.count(b"\r") > EVENT_LINES_MAX:
            raise Lost("garbage", f"an event of more than {EVENT_LINES_MAX} lines")
        lines = raw.splitlines()
        if not all(map(_FIELD.match, lines)):
            raise Lost("garbage", "what is no server-sent event")
        return Event(raw, b"\n".join([line[5:].strip() for line in lines if line.startswith(b"data:")]).strip())


def json_object(said: bytes) -> dict:
    """Raises Lost for anything else."""
    try:
        document = msgspec.json.decode(said)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise Lost("garbage", f"what isn't JSON: {error}") from error
    if not isinstance(document, dict):
        raise Lost("garbage", "JSON that isn't an object")
    return document


def check_no_failure(data: bytes) -> None:
    """Raises Lost where an event says, as vLLM writes it, that the instance itself failed: its engine died, and the server ended the stream in order."""
    if data.startswith(ERROR) and (document := json_object(data)).get("error") is not None:
        said = document["error"]
        code = said.get("code") if isinstance(said, dict) else None
        if not (isinstance(code, int) and 400 <= code < 500):
            raise _failed(said)


def _failed(said: object) -> Lost:
    return Lost("status", f"the engine says {str(said.get('message') if isinstance(said, dict) else said)[:200]!r}")


def chunk(data: bytes) -> Chunk | None:
    """One event of a completion with return_token_ids; None for one without news. Raises Lost."""
    document = json_object(data)
    if document.get("error") is not None:
        raise _failed(document["error"])
    choices = document.get("choices")
    if not isinstance(choices, list) or len(choices) > 1:
        raise Lost("garbage", "an event without its one choice")
    if not choices:
        return _usage(document.get("usage"))
    choice = choices[0]
    if not isinstance(choice, dict) or choice.get("index", 0) != 0:
        raise Lost("garbage", "a choice that nobody asked for")
    ids, prompt, finish = choice.get("token_ids"), choice.get("prompt_token_ids"), choice.get("finish_reason") or ""
    if ids is None and (choice.get("text") or finish):
        raise Lost("garbage", "text without its token ids. Try: a vLLM that knows return_token_ids")
    stop = choice.get("stop_reason")
    if not isinstance(ids, list | None) or not isinstance(prompt, list | None) or not isinstance(finish, str) or not isinstance(stop, int | str | None):
        raise Lost("garbage", "a choice whose fields are of other types")
    return Chunk(tuple(ids or ()), finish, stop, len(prompt) if prompt is not None else None)


def _usage(usage: object) -> Chunk | None:
    """What stands behind an answer's end: how much of the prompt was not computed, from a vLLM that was started with --enable-prompt-tokens-details."""
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Chunk((), cached_tokens=cached) if type(cached) is int else None
