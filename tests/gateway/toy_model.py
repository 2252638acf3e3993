"""A model whose next id is a function of all ids before it, and its tokenizer: 256 bytes and an end of text. No torch, no state."""

from __future__ import annotations

import zlib
from array import array
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS = 256
CHARACTERS = [one.encode() for one in "abcdefgh ,.éß漢字😀🚀"]
CONTEXT_TOKENS = 4096


def tokenizer() -> Tokenizer:
    """Ids are bytes: every character beyond ASCII is several tokens."""
    # The byte-level alphabet stands for bytes by visible characters; ids in order of bytes.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {byte: chr(byte) for byte in visible}
    table |= {byte: chr(256 + number) for number, byte in enumerate(byte for byte in range(256) if byte not in table)}
    made = Tokenizer(models.BPE(vocab={table[byte]: byte for byte in range(256)}, merges=[]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), decoders.ByteLevel()
    made.add_special_tokens([AddedToken("<eos>", special=True)])
    return made


def save(directory: Path) -> Path:
    tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def _number(ids: list[int]) -> int:
    return zlib.crc32(array("I", ids).tobytes())


def next_id(ids: list[int], may_end: bool = True) -> int:
    """Bytes of whole characters, now and then the end."""
    for length in (3, 2, 1):
        if len(ids) >= length and all(one < 256 for one in ids[-length:]) and ids[-length] >= 0xC0:
            begun = bytes(ids[-length:])
            candidates = [one for one in CHARACTERS if one.startswith(begun) and len(one) > length]
            if candidates:
                return candidates[_number(ids[:-length]) % len(candidates)][length]
    number = _number(ids)
    if may_end and number % 211 == 0:
        return EOS
    return CHARACTERS[number // 211 % len(CHARACTERS)][0]


def answer(prompt: list[int], max_tokens: int, may_end: bool = True) -> list[int]:
    """What the undisturbed model says, with its end."""
    ids = list(prompt)
    while len(ids) - len(prompt) < max_tokens:
        ids.append(next_id(ids, may_end))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


def text_of(ids: list[int]) -> str:
    """Without the half character at its end."""
    return bytes(one for one in ids if one < 256).decode(errors="ignore")
