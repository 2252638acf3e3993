"""One generate() call as bytes: what a process that never saw it needs to go on with it, and what can't be gone on with.

Knows: transformers' generation options by name and meaning. Must not know: tensors, pools, guards.
Invariants: an option whose meaning changes when "prompt + generated so far" is the input is recast (lengths) or refused with its name; what can't be
packed must be said again, by name; the packed request is at most limits.REQUEST_BYTES_MAX bytes.
"""

from __future__ import annotations

import copy
import struct
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from kvguard.errors import BadFrame, Refused
from kvguard.limits import REQUEST_BYTES_MAX

DEFAULT_NEW_TOKENS = 20  # transformers' own, where nobody says a length
LENGTHS = ("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_return_sequences")
# Counted from where the input ends, or from another cache: a resumed call would answer differently.
RELATIVE = (
    "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty", "begin_suppress_tokens", "guidance_scale",
    "watermarking_config", "token_healing", "penalty_alpha", "dola_layers",
)  # fmt: skip
OBJECTS = ("logits_processor", "stopping_criteria", "tokenizer", "streamer")  # objects of the script: not packed
NEUTRAL = (None, False, 0, 1)
_SAMPLER = struct.Struct("<IQQ?")  # ids known, draws made, draws of the last token, whether every token made as many


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One row of a batch. `prompt`: its columns, `pads` of them padding on the left; `limit`, `floor`: max_length and min_length in columns.

    `chunk`: prefill_chunk_size, 0 for none. `start`: random_state.RandomStart.packed, of row 0 of a sampled call. `again`: objects to be said again.
    """

    call: str
    row: int
    rows: int
    prompt: int
    pads: int
    limit: int
    floor: int
    sampled: bool
    chunk: int
    options: dict
    start: bytes
    again: tuple[str, ...]
    version: int = 1

    @property
    def name(self) -> str:
        return f"{self.call}-{self.row}"


class Drawn(NamedTuple):
    """A commit's sampler state: `draws` made when `ids` ids were known; `each` by the last token, and by every one where `even`."""

    ids: int
    draws: int
    each: int
    even: bool

    def pack(self) -> bytes:
        return _SAMPLER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Drawn:
        if len(data) != _SAMPLER.size:
            raise BadFrame(f"{len(data)} bytes are not a sampler state of this adapter")
        return cls(*_SAMPLER.unpack(data))

    def at(self, ids: int) -> int:
        """Draws made when `ids` ids were known. Raises Refused where that can't be told."""
        if ids != self.ids and not (self.even and self.each):
            raise Refused(f"the random state is known for {self.ids} ids, {ids} are held, and tokens drew unevenly. Try: generate() anew")
        return self.draws + (ids - self.ids) * self.each


class Terms(NamedTuple):
    """What of a call holds for all its rows."""

    limit: int
    floor: int
    sampled: bool
    chunk: int
    copies: int  # num_return_sequences
    pad: int | None
    ends: tuple[int, ...]
    options: dict
    again: tuple[str, ...]


def terms(defaults, given, arguments: dict, columns: int, rows: int, context: int | None) -> Terms:
    """The resolved call of `columns` prompt columns. `defaults`: model.generation_config, `given`: the caller's or None. Raises Refused with every fault."""
    config = resolved(defaults, given, {name: value for name, value in arguments.items() if name not in OBJECTS})
    faults = list(_faults(config, arguments, rows))
    if faults:
        raise Refused("this call can't be protected:\n  " + "\n  ".join(faults) + "\nTry: model.generate() for it, without protection")
    limit, floor = _lengths(config, defaults, given, arguments, columns, context)
    options = {name: value for name, value in config.to_diff_dict().items() if name not in LENGTHS and value is not None}
    ends = config.eos_token_id
    ends = () if ends is None else tuple(ends) if isinstance(ends, list | tuple) else (int(ends),)
    pad = config.pad_token_id if config.pad_token_id is not None else (ends[0] if ends else None)
    again = tuple(name for name in OBJECTS if arguments.get(name) is not None and name != "streamer")
    return Terms(limit, floor, bool(config.do_sample), config.prefill_chunk_size or 0, config.num_return_sequences or 1, pad, ends, options, again)


def resolved(defaults, given, arguments: dict):
    """As generate() resolves it: what the caller says, then his configuration, then the model's."""
    config = copy.deepcopy(given) if given is not None else type(defaults)()
    config.update(**defaults.to_dict(), defaults_only=True, allow_custom_entries=True)
    strange = config.update(**arguments)
    if strange:
        raise Refused(f"generate() arguments that are not part of what is protected: {', '.join(sorted(strange))}. Try: model.generate(), without protection")
    return config


def _faults(config, arguments: dict, rows: int):
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        yield f"{mode.replace('_', ' ')}: several hypotheses share a cache that is rearranged as they go; greedy and sampled calls are supported"
    if config.cache_implementation is not None:
        yield f"cache_implementation={config.cache_implementation!r}: the pool is the cache"
    if config.use_cache is False:
        yield "use_cache=False: without a cache there is nothing to protect"
    for name in RELATIVE:
        if (value := getattr(config, name, None)) not in NEUTRAL:
            yield f"{name}={value!r}: it is counted from the end of the input, so a resumed call would answer differently"
    copies = config.num_return_sequences or 1
    if rows * copies > 1 and (config.stop_strings is not None or arguments.get("stopping_criteria")):
        yield "stop_strings or stopping_criteria with more than one row: which rows had stopped can't be seen afterwards"


def _lengths(config, defaults, given, arguments: dict, columns: int, context: int | None) -> tuple[int, int]:
    if config.max_new_tokens is not None:
        limit = columns + config.max_new_tokens
    elif arguments.get("max_length") is not None or (given is not None and given.max_length is not None):
        limit = config.max_length
    else:
        limit = columns + (defaults.max_length or DEFAULT_NEW_TOKENS)
        limit = min(limit, context) if context is not None else limit
    floor = columns + config.min_new_tokens if config.min_new_tokens is not None else config.min_length or 0
    return limit, floor


def check_all(rows: list[Row]) -> None:
    """Raises Refused unless these are all rows of one call, in order."""
    first = rows[0]
    if [(row.call, row.row, row.rows) for row in rows] != [(first.call, n, first.rows) for n in range(first.rows)]:
        raise Refused(f"{len(rows)} of {first.rows} rows of the batch are left: the others' answers can't be told. Try: kvguard history, and the call anew")


def check_whole(rows: list[Row], again: dict) -> None:
    """Raises Refused unless these are all rows of one call, in order, and what it can't do without is said again."""
    check_all(rows)
    first = rows[0]
    missing = [name for name in first.again if again.get(name) is None]
    strange = [name for name in again if name not in OBJECTS]
    if missing or strange:
        said = f"needs {', '.join(missing)} again, as the first call had" if missing else f"takes no {', '.join(strange)}: options stay as they were"
        raise Refused(f"resume() {said}. Try: the same objects as before")


def undecided(columns: int, first: Row) -> int:
    """How many of the ids that are known to go on from: where criteria could have stopped the call at the last one it is chosen again, and they see it again.

    An end mark or a length can be seen in the ids, a criterion's word can't, and it is asked about new ids alone.
    """
    asked = "stopping_criteria" in first.again or first.options.get("stop_strings") is not None
    return columns - 1 if asked and first.prompt < columns < first.limit else columns


def replayable(position: int, prompt: int, columns: int, chunk: int) -> int:
    """The highest column <= `position` from which the shapes of the first time can be repeated, where `columns` ids are known.

    Inside the prompt, or with nothing generated yet, that is where a chunk of the prompt began: its start, without chunks.
    """
    if position >= prompt and columns > prompt:
        return position
    position = min(position, prompt - 1)
    return position - position % chunk if chunk else 0


def pack(row: Row) -> bytes:
    """Raises Refused for options that can't be packed, or not within the bound."""
    try:
        packed = msgspec.msgpack.encode(row)
    except TypeError as error:
        raise Refused(f"generation options that can't be kept: {error}. Try: plain numbers, texts and lists") from error
    if len(packed) > REQUEST_BYTES_MAX:
        raise Refused(f"generation options of {len(packed)} bytes, at most {REQUEST_BYTES_MAX}. Try: fewer bad words or biases, or model.generate()")
    return packed


def unpack(data: bytes) -> Row:
    try:
        row = msgspec.msgpack.decode(data, type=Row)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"not a request of this adapter: {error}") from error
    if row.version != 1 or not (0 <= row.row < row.rows and 0 <= row.pads <= row.prompt <= row.limit):
        raise BadFrame(f"a request of version {row.version} for row {row.row} of {row.rows} that can't be")
    return row


def remap(here: Sequence[Sequence[int]], replicas):
    """Blocks of a replica -> this pool's, which has blocks here[row] for each row: the former life's pool may have had other sizes. Raises Refused."""
    found = {}
    for pages in replicas:
        for request, blocks in zip(pages.requests, pages.blocks, strict=True):
            row = unpack(request).row
            if row >= len(here) or len(blocks) > len(here[row]):
                raise Refused(f"row {row} with {len(blocks)} blocks doesn't fit here. Try: as many rows, of as many positions, as before")
            found.update(zip(blocks, here[row], strict=False))
    return found.__getitem__
