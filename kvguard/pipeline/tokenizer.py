"""Text to ids and back, a token at a time.

Knows: tokenizer.json (through the tokenizers library), the chat template, where a character ends. Must not know: models, transformers, sampling.
Invariants: the pieces that TextStream hands out, joined, are the decoding of all its ids; no piece ends inside a character.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from kvguard.errors import BadConfig

_BROKEN = "\ufffd"  # what a decoder puts for bytes that are not yet a character


class Text:
    """The tokenizer of a model directory. Raises BadConfig where there is none."""

    def __init__(self, directory: str | Path):
        from tokenizers import Tokenizer

        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise BadConfig(f"{directory} has no tokenizer.json: it can be run on lists of ids only. Try: a directory with tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for a file that it can't parse
            raise BadConfig(f"{path} is not a tokenizer: {error}. Try: copy the model anew") from error
        self._config = _json_if_there(directory / "tokenizer_config.json")
        self._template = _template(directory, self._config)

    @property
    def eos(self) -> int | None:
        """The id that ends a text, if the tokenizer names one."""
        token = self._config.get("eos_token")
        token = token.get("content") if isinstance(token, dict) else token
        return None if token is None else self._tokenizer.token_to_id(token)

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Ids of `text`; `special` adds what the tokenizer puts around a text (nothing, for chats: the template has it)."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, special tokens left out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Ids of a conversation ({"role", "content"} each), ready for the assistant's answer; without a template, of the contents in lines."""
        if self._template is None:
            return self.encode("\n".join(message["content"] for message in messages))
        return self.encode(self.render(messages), special=False)

    def render(self, messages: list[dict[str, str]]) -> str:
        """The chat template's text for `messages`. Raises BadConfig where there is no template or it refuses them."""
        from jinja2 import TemplateError

        if self._template is None:
            raise BadConfig("the model has no chat template. Try: a plain prompt")
        tokens = {name: value.get("content") if isinstance(value, dict) else value
                  for name, value in self._config.items() if name.endswith("_token") and value is not None}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **tokens)
        except TemplateError as error:
            raise BadConfig(f"the chat template refuses these messages: {error}. Try: roles user and assistant in turn") from error

    def stream(self) -> TextStream:
        return TextStream(self)


class TextStream:
    """Ids in, text out, for one sequence. A resume pushes the ids known so far again and drops what comes out."""

    def __init__(self, text: Text):
        self._text = text
        self._ids: list[int] = []
        self._from = 0  # decoding starts here: far enough back that spaces and characters come out as in the whole
        self._shown = 0  # ids whose text has been handed out

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """What is left at the end of the sequence, an unfinished character as U+FFFD."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        before = self._text.decode(self._ids[self._from:self._shown])
        now = self._text.decode(self._ids[self._from:])
        if now.endswith(_BROKEN) and not final:
            return ""
        if len(now) > len(before):
            self._from, self._shown = self._shown, len(self._ids)
        return now[len(before):]


def _json_if_there(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadConfig(f"{path} is not JSON: {error}. Try: copy the model anew") from error
    return document if isinstance(document, dict) else {}


def _template(directory: Path, config: dict):
    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    path = directory / "chat_template.jinja"
    source = path.read_text(encoding="utf-8") if path.is_file() else config.get("chat_template")
    if not isinstance(source, str):
        return None

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=refuse, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return environment.from_string(source)
    except TemplateError as error:
        raise BadConfig(f"{directory}: the chat template can't be parsed: {error}. Try: copy the model anew") from error
