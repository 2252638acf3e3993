"""kvguard status and kvguard check as monitors and scripts call them, every few seconds: without the library that parses the rest of the command line.

Knows: the options of the two verbs (looks.py has them for everything that isn't plain). Must not know: what the verbs show.
Invariant: both ways mean the same.
"""

from __future__ import annotations

import gc
import os

from kvguard.cli import plain

TIMEOUT_S = 5.0
REACHING = {"--config": str, "--coordinator": str, "--keys": str, "--timeout": plain.between(float, 0.1, 3600.0)}
VALUED = {
    "status": {**REACHING, "-o": plain.one_of("table", "wide", "json")},
    "check": {
        **REACHING, "-o": plain.one_of("table", "json"), "--lag-tokens": plain.between(int, 0, float("inf")), "--arena-percent": plain.between(float, 1, 100),
    },
}  # fmt: skip
FLAGS = {"status": ("--insecure", "--watch"), "check": ("--insecure",)}


def asked(arguments: list[str]) -> dict[str, object] | None:
    """What a plain command line gives, by option; None where the command line has to look at it itself."""
    verb = arguments[0]
    return plain.parsed(arguments[1:], VALUED[verb], FLAGS[verb])


def run(verb: str, given: dict[str, object]) -> int:
    """The exit code. Raises KvguardError."""
    gc.disable()  # a blink: what is imported is all in use, and looking through it costs a tenth of everything
    try:
        return _run(verb, given)
    finally:
        gc.freeze()  # nor does the interpreter have to look through it at its end


def _run(verb: str, given: dict[str, object]) -> int:
    from kvguard.cli.asking import Reach, found

    def said(option: str, variable: str) -> str | None:
        return given[option] if option in given else os.environ.get(variable) or None

    places = (said("--config", "KVGUARD_CONFIG"), said("--coordinator", "KVGUARD_COORDINATOR"), said("--keys", "KVGUARD_KEYS"))
    reach = Reach(*found(*places, "--insecure" in given), given.get("--timeout", TIMEOUT_S))
    output = given.get("-o", "table")
    if verb == "status":
        from kvguard.cli import status

        status.run(reach, output, "--watch" in given)
        return 0
    from kvguard.cli import check

    return check.run(reach, check.Limits(given.get("--lag-tokens", check.LAG_TOKENS), given.get("--arena-percent", check.ARENA_PERCENT)), output)
