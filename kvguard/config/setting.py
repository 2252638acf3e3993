"""What a setting is: a field of a frozen dataclass with its kind, its bounds and one line of explanation, and the check of one value.

Knows: kinds of settings, forms of texts. Must not know: which settings there are (daemons.py, gateway.py), where values come from (loading in __init__.py).
Invariant: `converted` gives a value that passed every check of its own, or raises ValueError("what|attempt").
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re

from kvguard.limits import NAME_BYTES_MAX

SIZES = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}
LEVELS = ("debug", "info", "warning", "error")
ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")
URL = re.compile(r"(?P<scheme>https?)://(?P<host>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(:(?P<port>\d{1,5}))?(/[A-Za-z0-9._~/-]*)?")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def setting(default, kind: str, doc: str, low: int | None = None, high: int | None = None, choices: tuple[str, ...] = ()):
    """A field of a configuration. `kind`: name | path | address | url | bytes | int | bool | word | ints | instances | text."""
    metadata = {"kind": kind, "doc": doc, "low": low, "high": high, "choices": choices}
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REQUIRED = dataclasses.MISSING


def example(field) -> str:
    return f"{field.name} = {literal(field.default) if field.default is not REQUIRED else literal('...')}"


def converted(field, value, text: bool):
    """The value in its type. Raises ValueError("what|attempt")."""
    kind = field.metadata["kind"]
    if kind in ("int", "bytes"):
        return bounded(field, as_int(value, kind, text))
    if kind == "ints":
        parts = [part for part in value.split(",") if part] if text and isinstance(value, str) else value
        if not isinstance(parts, list | tuple):
            raise ValueError(f"{value!r} is not a list of integers|{field.name} = [1000]")
        return tuple(bounded(field, as_int(part, "int", text)) for part in parts)
    if kind == "instances":
        return checked_instances(field, [part for part in value.split(",") if part] if text and isinstance(value, str) else value)
    if kind == "bool":
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text and isinstance(value, str) and value.lower() in words:
            return words[value.lower()]
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false|{field.name} = true")
        return value
    if not isinstance(value, str):
        raise ValueError(f"{value!r} is not a text")
    return checked_text(field, kind, value)


def checked_instances(field, values) -> tuple[str, ...]:
    """Lines of instance, URL and node, each instance once. Raises ValueError("what|attempt")."""
    attempt = f'{field.name} = ["llama-a http://10.0.0.1:8000 node-a"]'
    if not isinstance(values, list | tuple) or not values or not all(isinstance(one, str) for one in values):
        raise ValueError(f"{values!r} is not a list of texts|{attempt}")
    for one in values:
        parts = one.split()
        if len(parts) != 3 or not NAME.fullmatch(parts[0]) or not URL.fullmatch(parts[1]) or not NAME.fullmatch(parts[2]):
            raise ValueError(f'{one!r} is not "INSTANCE URL NODE"|{attempt}')
    names = [one.split()[0] for one in values]
    twice = next((name for name in names if names.count(name) > 1), "")
    if twice:
        raise ValueError(f"instance {twice!r} is listed twice|{attempt}")
    return tuple(" ".join(one.split()) for one in values)


def checked_text(field, kind: str, value: str) -> str:
    if kind == "word" and value not in field.metadata["choices"]:
        raise ValueError(f"{value!r} is none of {', '.join(field.metadata['choices'])}")
    if kind == "name" and not (NAME.fullmatch(value) and len(value.encode()) <= NAME_BYTES_MAX):
        raise ValueError(f'{value!r} is not a name (letters, digits, ".", "_", "-", at most {NAME_BYTES_MAX} bytes)|{field.name} = "node-1"')
    if kind == "address" and (value or field.default != ""):
        found = ADDRESS.fullmatch(value)
        if not found or int(found["port"]) > 65535:
            raise ValueError(f'{value!r} is not an address|{field.name} = "tcp://127.0.0.1:7420"')
    if kind == "url" and not ((found := URL.fullmatch(value)) and found["scheme"] == "http" and found["port"] and int(found["port"]) <= 65535):
        raise ValueError(f'{value!r} is not an address for clients|{field.name} = "http://127.0.0.1:8000"')
    if kind == "path" and (value or field.default != "") and not os.path.isabs(value):
        attempt = field.default if field.default not in (REQUIRED, "") else f"/path/to/{field.name}"
        raise ValueError(f'{value!r} is not an absolute path|{field.name} = "{attempt}"')
    return value


def as_int(value, kind: str, text: bool) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (text or kind == "bytes"):
        found = re.fullmatch(r"\s*(\d+)\s*([A-Za-z]*)\s*", value)
        if found and (found[2].upper() in SIZES if kind == "bytes" else not found[2]):
            return int(found[1]) * SIZES[found[2].upper()]
    raise ValueError(f"{value!r} is not {'a size' if kind == 'bytes' else 'an integer'}")


def bounded(field, value: int) -> int:
    low, high = field.metadata["low"], field.metadata["high"]
    if not low <= value <= high:
        raise ValueError(f"{value} is outside {low}..{high}|{field.name} = {min(max(value, low), high)}")
    return value


def on_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine alone. Host names other than localhost are taken to be elsewhere."""
    host = ADDRESS.fullmatch(address)["host"].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def literal(value) -> str:
    """A value as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(literal, value))}]"
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'
