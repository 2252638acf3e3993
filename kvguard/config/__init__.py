"""The settings of each process: defaults < TOML file < conf.d/*.toml beside it < environment < flags.

Knows: where values come from, how values of one section must relate. Must not know: what the settings are used for, one by one (daemons.py, gateway.py).
Invariants: a value that leaves this room has passed every check; one load reports *all* faults, each with file, line and key (exit code 78).

A file has one section per process, `[node]`, `[coordinator]` and `[gateway]`; a file may hold several, and conf.d is shared, so a section that a process
doesn't use is left alone. Environment: KVGUARD_NODE_NAME for `name` in `[node]`, KVGUARD_COORDINATOR_DEAD_MS for `dead_ms` in `[coordinator]`, lists
joined by commas.
Sizes are integers in bytes or texts such as "512MiB". The same form serves nodes on loopback and on three hosts.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, TypeVar

from kvguard.config.daemons import CoordinatorConfig, NodeConfig
from kvguard.config.gateway import GatewayConfig
from kvguard.config.setting import ADDRESS, REQUIRED, converted, example, literal, on_loopback
from kvguard.errors import BadConfig

__all__ = [
    "ADDRESS", "CoordinatorConfig", "Fault", "GatewayConfig", "KINDS", "NodeConfig", "converted", "example", "layers", "literal", "load", "load_with_origins",
    "parse", "template",
]  # fmt: skip

KINDS: dict[str, type] = {cls.SECTION: cls for cls in (NodeConfig, CoordinatorConfig, GatewayConfig)}
Config = TypeVar("Config", NodeConfig, CoordinatorConfig, GatewayConfig)


class Fault(NamedTuple):
    """One thing that is wrong, and where it was said."""

    where: str
    key: str
    what: str
    attempt: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.what}. Try: {self.attempt}"


class Given(NamedTuple):
    """A value as found, not yet checked. `text`: it comes from the environment or a flag and may need parsing."""

    value: object
    where: str
    text: bool


def load(cls: type[Config], file: str | Path | None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None) -> Config:
    """The checked settings of one process. Raises BadConfig that lists every fault found."""
    return load_with_origins(cls, file, flags, environ)[0]


def load_with_origins(
    cls: type[Config], file: str | Path | None, flags: dict[str, object] | None = None, environ: dict[str, str] | None = None
) -> tuple[Config, dict[str, str]]:
    """As load; also where each value came from ("default", "FILE:LINE", a variable's or a flag's name), by key."""
    faults: list[Fault] = []
    given: dict[str, Given] = {}
    for path in layers(file, faults, cls.SECTION):
        given.update(read_section(cls, path, faults))
    unread = any(fault.key == "-" for fault in faults)  # what it would have set is not missing
    given.update(read_environment(cls, os.environ if environ is None else environ, faults))
    for key, value in (flags or {}).items():
        if value is not None:
            given[key] = Given(value, f"flag --{key.replace('_', '-')}", True)
    values, origins = checked_values(cls, given, faults, unread)
    faults += relations(cls, values, lambda key: given[key].where if key in given else "default")
    if faults:
        raise BadConfig("\n".join(map(str, faults)))
    return cls(**values), origins


def layers(file: str | Path | None, faults: list[Fault], section: str = "node") -> list[Path]:
    """The file, then conf.d/*.toml beside it in order of their names."""
    if file is None:
        return []
    path = Path(file)
    try:
        there = path.exists()
        if not path.is_file():
            what, attempt = ("isn't a file", "the file itself") if there else ("there is no such file", f"kvguard config init {section} > {path}")
            faults.append(Fault(str(path), "-", what, attempt))
            return []
    except OSError as error:  # in a directory that this user may not enter, say
        faults.append(unreadable(path, error))
        return []
    return [path, *sorted((path.parent / "conf.d").glob("*.toml"))]


def parse(path: Path, faults: list[Fault]) -> tuple[dict, list[str]]:
    """Tables and lines of a TOML file; empty, with a fault, where it isn't one."""
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), text.splitlines()
    except OSError as error:
        faults.append(unreadable(path, error))
    except RecursionError:
        faults.append(Fault(str(path), "-", "isn't TOML for people: it is nested too deeply", 'key = "value", one a line'))
    except UnicodeDecodeError:
        faults.append(Fault(str(path), "-", "isn't UTF-8 text", "save it as UTF-8"))
    except tomllib.TOMLDecodeError as error:
        found = re.search(r"line (\d+)", str(error))
        faults.append(Fault(f"{path}:{found[1] if found else 1}", "-", f"isn't TOML: {error}", 'key = "value", one a line'))
    return {}, []


def unreadable(path: Path, error: OSError) -> Fault:
    attempt = "give this user read permission" if isinstance(error, PermissionError) else "a file of settings, or none of this name"
    return Fault(str(path), "-", f"can't be read: {error.strerror}", attempt)


def line_of(lines: list[str], section: str, key: str | None) -> int:
    """The line (from 1) that sets `key` in `section`, or that opens the section: tomllib keeps no positions. 1 where it can't be told."""
    inside, opened = False, 1
    for number, line in enumerate(lines, 1):
        header = re.match(r"\s*\[\s*\"?([^\]\"]+?)\"?\s*\]", line)
        if header:
            inside = header[1] == section
            opened = number if inside else opened
            if inside and key is None:
                return number
        elif key is not None and re.match(rf"\s*{'' if inside else re.escape(section) + r'[.]'}\"?{re.escape(key)}\"?\s*=", line):
            return number
    return opened


def read_section(cls: type[Config], path: Path, faults: list[Fault]) -> dict[str, Given]:
    """What one file says in this process's section."""
    tables, lines = parse(path, faults)
    names = [field.name for field in dataclasses.fields(cls)]
    for section in tables:
        if section not in KINDS:
            near = nearest(section, KINDS, cls.SECTION)
            faults.append(Fault(f"{path}:{top_line(lines, section)}", section, "is not a section of kvguard", f"[{near}]"))
    table = tables.get(cls.SECTION, {})
    if not isinstance(table, dict):
        faults.append(Fault(f"{path}:{top_line(lines, cls.SECTION)}", cls.SECTION, "is not a section", f"[{cls.SECTION}]"))
        return {}
    found = {}
    for key, value in table.items():
        where = f"{path}:{line_of(lines, cls.SECTION, key)}"
        if key in names:
            found[key] = Given(value, where, False)
        else:
            faults.append(Fault(where, key, f"is not a setting of [{cls.SECTION}]", nearest(key, names, f"one of {', '.join(names)}")))
    return found


def nearest(word: str, known: Iterable[str], otherwise: str) -> str:
    """What somebody may have meant."""
    import difflib  # for who has misspelt something: a start of a daemon shouldn't wait for it

    return next(iter(difflib.get_close_matches(word, known, 1)), otherwise)


def top_line(lines: list[str], name: str) -> int:
    """The line of a section's header or of a top-level key."""
    pattern = re.compile(rf"\s*(\[\s*)?\"?{re.escape(name)}\b")
    return next((number for number, line in enumerate(lines, 1) if pattern.match(line)), 1)


def read_environment(cls: type[Config], environ, faults: list[Fault]) -> dict[str, Given]:
    """KVGUARD_<SECTION>_<KEY>. A variable of the section that names no setting is a fault: a misspelt one would be lost silently."""
    prefix = f"KVGUARD_{cls.SECTION.upper()}_"
    names = {field.name for field in dataclasses.fields(cls)}
    found = {}
    for variable in sorted(environ):
        if variable.startswith(prefix):
            key = variable[len(prefix) :].lower()
            if key in names:
                found[key] = Given(environ[variable], f"environment {variable}", True)
            else:
                near = nearest(key, sorted(names), f"unset {variable}")
                faults.append(Fault(f"environment {variable}", key, f"is not a setting of [{cls.SECTION}]", near))
    return found


def checked_values(cls: type[Config], given: dict[str, Given], faults: list[Fault], unread: bool) -> tuple[dict[str, object], dict[str, str]]:
    """Values that passed their own check, and the origin of each setting. `unread`: a file could not be read, which may have said what isn't given."""
    values: dict[str, object] = {}
    origins: dict[str, str] = {}
    for field in dataclasses.fields(cls):
        origins[field.name] = "default"
        if field.name not in given:
            if field.default is REQUIRED and unread:
                continue
            if field.default is REQUIRED:
                faults.append(Fault(f"[{cls.SECTION}]", field.name, f"is missing: {field.metadata['doc']}", f'{field.name} = "..."'))
            else:
                values[field.name] = field.default
            continue
        one = given[field.name]
        origins[field.name] = one.where
        try:
            values[field.name] = converted(field, one.value, one.text)
        except ValueError as error:
            what, _, attempt = str(error).partition("|")
            faults.append(Fault(one.where, field.name, what, attempt or example(field)))
    return values, origins


def relations(cls: type[Config], values: dict[str, object], where) -> list[Fault]:
    """Faults between values that are each good alone; a relation is judged only where all its values are."""
    faults = []

    def judge(keys: tuple[str, ...], broken, what: str, attempt) -> None:
        if all(key in values for key in keys) and broken(*(values[key] for key in keys)):
            origin = next((where(key) for key in keys if where(key) != "default"), f"[{cls.SECTION}]")
            faults.append(Fault(origin, keys[0], what, attempt(*(values[key] for key in keys))))

    secured = ("keys", "insecure")
    for key in ("listen", "advertise", "coordinator"):
        if values.get(key) and ADDRESS.fullmatch(values[key]):  # a gateway's clients come by HTTP, and bring no keys
            judge(
                (key, *secured), lambda a, k, i: not on_loopback(a) and not k and not i, "leaves this machine without keys",
                lambda *_: 'keys = "/etc/kvguard/key" (`kvguard keys generate`), or insecure = true on a network that you trust',
            )  # fmt: skip
    judge(
        ("transport", "nixl_devices"), lambda t, d: t == "nixl" and not d, "needs nixl_devices: UCX would listen at every interface",
        lambda *_: 'nixl_devices = "mlx5_0:1"',
    )  # fmt: skip
    judge(
        ("nixl_quarantine_s", "nixl_stuck_ms"), lambda q, s: 0 < q * 1000 < s, "is less than nixl_stuck_ms: a stuck write could still be under way",
        lambda _, s: f"nixl_quarantine_s = {-(-s // 1000)}, or 0",
    )  # fmt: skip
    anywhere = ("tcp://0.0.0.0:", "tcp://[::]:")
    judge(
        ("advertise", "listen"), lambda a, b: (a or b).startswith(anywhere), "others can't reach this node at a wildcard address",
        lambda *_: 'advertise = "tcp://THIS_HOST:PORT"',
    )  # fmt: skip
    judge(
        ("suspect_ms", "heartbeat_ms"), lambda s, h: h * 3 > s, "is less than three heartbeats: one that is late would raise suspicion",
        lambda s, h: f"suspect_ms = {h * 3}",
    )  # fmt: skip
    judge(("dead_ms", "suspect_ms"), lambda d, s: d < s, "is less than suspect_ms", lambda d, s: f"dead_ms = {s * 2}")
    judge(("seal_ms", "exclude_ms"), lambda s, e: s < e, "is less than exclude_ms", lambda s, e: f"seal_ms = {e * 2}")
    return faults


def template(cls: type[Config], values: dict[str, object] | None = None) -> str:
    """A commented section: given values are set, the others stand as comments with their defaults."""
    values = values or {}
    lines = [f"[{cls.SECTION}]"]
    for field in dataclasses.fields(cls):
        known = values.get(field.name)
        lines.append(f"# {field.metadata['doc']}")
        if known is not None:
            lines.append(f"{field.name} = {literal(known)}")
        elif field.default is REQUIRED:
            lines.append(f'{field.name} = ""  # required')
        else:
            lines.append(f"# {field.name} = {literal(field.default)}")
    return "\n".join(lines) + "\n"
