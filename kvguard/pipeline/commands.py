"""What a driver is told on its standard input: JSON lines, one command each.

Knows: the commands' fields, reading lines without waiting. Must not know: scheduling, sockets.
Invariants: a line that is not a command is refused by name and changes nothing; a line is bounded.
"""

from __future__ import annotations

import os
import secrets

import msgspec

from kvguard.errors import BadConfig, BadFrame
from kvguard.limits import MIB
from kvguard.pipeline.runs import Request
from kvguard.pipeline.tokenizer import Text

LINE_BYTES_MAX = 16 * MIB


class Run(msgspec.Struct, frozen=True, tag_field="do", tag="run"):
    """Generate for each of `prompts`: text, or a list of ids. `chat`: put a text into the model's chat template."""

    run: str
    prompts: list[str | list[int]]
    max_tokens: int
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    chat: bool = True
    ignore_eos: bool = False

    def prepare(self, text: Text | None) -> tuple[list[Request], list[list[int]]]:
        """Requests and prompt ids, one per prompt. Raises BadConfig: text without a tokenizer, no prompts."""
        if not self.prompts:
            raise BadConfig("no prompts. Try: a list of texts, or of lists of ids")
        prompts = [self._ids(prompt, text) for prompt in self.prompts]
        common = (self.max_tokens, self.temperature, self.top_k, self.top_p, self.seed, self.ignore_eos, secrets.randbits(63))
        return [Request(self.run, index, len(prompts), len(ids), *common) for index, ids in enumerate(prompts)], prompts

    def _ids(self, prompt: str | list[int], text: Text | None) -> list[int]:
        if isinstance(prompt, list):
            return prompt
        if text is None:
            raise BadConfig("a prompt is text, but the model has no tokenizer. Try: lists of ids")
        return text.chat([{"role": "user", "content": prompt}]) if self.chat else text.encode(prompt)


class Digest(msgspec.Struct, frozen=True, tag_field="do", tag="digest"):
    """Checksums of every position's KV on every rank."""

    run: str


class Release(msgspec.Struct, frozen=True, tag_field="do", tag="release"):
    """The run is over: its KV may go."""

    run: str


class Quit(msgspec.Struct, frozen=True, tag_field="do", tag="quit"):
    """The end."""


Command = Run | Digest | Release | Quit
_decoder = msgspec.json.Decoder(Command)


def decode(line: bytes) -> Command:
    """Raises BadFrame for anything that is not a command."""
    try:
        return _decoder.decode(line)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"not a command: {error}. Try: {{\"do\": \"run\", \"run\": NAME, \"prompts\": [...], \"max_tokens\": N}}") from error


class Commands:
    """Lines from a descriptor that is never waited for. `ended`: the other side has closed it."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        self._rest = b""
        self.ended = False

    def fileno(self) -> int:
        return self._descriptor

    def read(self) -> list[bytes]:
        """Whole lines that have come; call when the descriptor is readable, or at any time."""
        import select

        lines: list[bytes] = []
        while not self.ended and select.select([self._descriptor], [], [], 0)[0]:
            data = os.read(self._descriptor, MIB)
            if not data:
                self.ended = True
                break
            *whole, self._rest = (self._rest + data).split(b"\n")
            lines += [line for line in whole if line.strip()]
            if len(self._rest) > LINE_BYTES_MAX:
                self._rest = b""
                lines.append(b"a line beyond the bound")
        return lines
