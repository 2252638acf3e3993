"""What a stage and a driver of the reference engine are started with: one TOML file each, written by the supervisor or by hand.

Knows: the fields and how they are read and written. Must not know: how they are used.
Invariants: an unknown, missing or wrongly typed key is refused with all faults named at once.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from kvguard.errors import BadConfig


@dataclass(frozen=True)
class StageSettings:
    """One process of the engine: a rank of the instance, or a standby (`pp` -1) that can become any."""

    instance: str
    model: str  # a model directory
    stages: int
    pp: int
    listen: str  # "tcp://127.0.0.1:PORT", where steps arrive; advertised as the rank's endpoint. Any address of this host: the links carry no keys
    socket: str  # the node daemon's Unix socket
    blocks: int = 1024
    block_tokens: int = 16
    chunk: int = 64  # positions of a prompt that are computed together, at absolute multiples
    threads: int = 1
    invariant: bool = True
    guarded: bool = True  # false: the same engine without kvguard, for measuring its cost
    restore_timeout_s: float = 30.0
    device: str = "host"  # where the pool is, as in a node's configuration; with "cuda" the model computes there, too


@dataclass(frozen=True)
class DriverSettings:
    """The emitter: tokenizer, scheduling, sampling, streaming text."""

    instance: str
    model: str
    stages: int
    listen: str  # where the last stage's results arrive
    coordinator: str  # the coordinator's address; empty without kvguard
    endpoints: tuple[str, ...] = ()  # of the stages, without kvguard; else the members that the coordinator names
    blocks: int = 1024
    block_tokens: int = 16
    chunk: int = 64
    sequences_max: int = 16
    resume_timeout_s: float = 60.0
    keys: str = ""  # the emitter's key file (`kvguard keys generate`), for its session with the coordinator; off loopback there must be one
    silence_ms: int = 0  # a driver that the coordinator hears nothing of for so long is dead; 0: the coordinator's emitter_ms


def read(path: str | Path, kind: type):
    """A settings file. Raises BadConfig that names every fault."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise BadConfig(f"{path}: {error}. Try: write it with pipeline.settings.write") from error
    fields = {field.name: field for field in dataclasses.fields(kind)}
    faults = [f"unknown key {key}" for key in values if key not in fields]
    for name, field in fields.items():
        wanted = {"str": str, "int": int, "float": (int, float), "bool": bool}.get(field.type, list)
        if name not in values:
            if field.default is dataclasses.MISSING:
                faults.append(f"missing key {name}")
        elif not isinstance(values[name], wanted) or (wanted is int and isinstance(values[name], bool)):
            faults.append(f"{name} is {values[name]!r}, not a {field.type}")
    if faults:
        raise BadConfig(f"{path}: {'; '.join(faults)}. Try: the keys of {kind.__name__} (kvguard/pipeline/settings.py)")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def write(path: str | Path, settings) -> None:
    """The reverse of read. JSON's spelling of strings, numbers, booleans and lists of strings is TOML's too."""
    lines = [f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in dataclasses.asdict(settings).items()]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
