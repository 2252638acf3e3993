"""Text from token ids, one id at a time: half characters and beginnings of stop strings are held back.

Knows: a tokenizer's decoder, the rules of stop strings. Must not know: HTTP, instances, where an id came from: that is what makes a seam invisible.
Invariants: what was given out is never taken back; everything given out, and what flush() adds, is the text up to the stop string.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from kvguard.errors import BadConfig

PRIMING_IDS = 64  # the prompt's end, so that the first word's space is right; decoding all of a long prompt would cost as much as the prompt is long
BROKEN_PREFIX = "Invalid prefix encountered"

Decode = Callable[[int], str]  # the next id -> the text that is whole now


def load(path: str) -> Tokenizer:
    """The tokenizer in a model's directory, or in its tokenizer.json. Raises BadConfig."""
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exceptions
        raise BadConfig(f"{file} is not a tokenizer: {error}. Try: tokenizer = the model's directory, with a tokenizer.json") from error


def decoder(tokenizer: Tokenizer, prompt: Sequence[int], skip_special_tokens: bool) -> Decode:
    """A decoder of the ids that follow `prompt`."""
    stream = DecodeStream([], skip_special_tokens)

    def decode(token: int) -> str:
        nonlocal stream
        try:
            return stream.step(tokenizer, token) or ""
        except Exception as error:
            if not str(error).startswith(BROKEN_PREFIX):
                raise
        # Text that changes in hindsight (bytes that never become a character) breaks the library's stream: it begins anew with this id.
        stream = DecodeStream([], skip_special_tokens)
        return stream.step(tokenizer, token) or ""

    for token in prompt[-PRIMING_IDS:]:  # one by one: given all at once, a prompt that ends within a character comes back as the answer's text
        decode(token)
    return decode


class StopStrings:
    """Looks for stop strings as vLLM does: in the order in which they were given, in text that the newest id completed, not before `min_tokens` ids."""

    def __init__(self, stops: Sequence[str], include: bool, min_tokens: int) -> None:
        self.stops, self.include, self.min_tokens = tuple(stops), include, min_tokens
        self.held = ""  # the longest end of the text that could still become a stop string
        self.found = ""

    def feed(self, text: str, count: int) -> str:
        """The text of the `count`-th id -> what can be given out. `found` is set once a stop string is whole; nothing may follow then."""
        assert not self.found, "text after the stop string"
        if not self.stops:
            return text
        whole = self.held + text
        if count > self.min_tokens and text:
            for stop in self.stops:
                at = whole.find(stop, max(0, len(self.held) - len(stop) + 1))
                if at >= 0:
                    self.found, self.held = stop, ""
                    return whole[: at + len(stop)] if self.include else whole[:at]
        keep = self._beginning(whole)
        self.held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def flush(self) -> str:
        """The answer ended otherwise: what was held is text."""
        held, self.held = self.held, ""
        return held

    def _beginning(self, text: str) -> int:
        """The length of the longest end of `text` that a stop string, longer than it, begins with."""
        longest = max(map(len, self.stops)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(len(stop) > length and stop.startswith(end) for stop in self.stops):
                return length
        return 0
