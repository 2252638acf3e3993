"""Command lines that are plainly `VERB --option value ...`, understood without a library for it: its import costs more than what some verbs do.

Knows: options with values, and flags. Must not know: verbs, what options mean.
Invariant: whatever isn't plain is left to the command line, which explains itself; what is understood here means the same there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping


def parsed(arguments: list[str], valued: Mapping[str, Callable[[str], object]], flags: Collection[str] = ()) -> dict[str, object] | None:
    """Values by option's name as it is written (`--timeout`, `-o`), True for flags; only what was given.

    `valued`: turns an option's text into its value, or raises ValueError. None where `arguments` are anything else, or anything more.
    """
    found: dict[str, object] = {}
    rest = [part for argument in arguments for part in (argument.split("=", 1) if argument.startswith("--") else [argument])][::-1]
    while rest:
        option = rest.pop()
        if option in found:
            return None
        if option in flags:
            found[option] = True
        elif option in valued and rest and not rest[-1].startswith("-"):
            try:
                found[option] = valued[option](rest.pop())
            except ValueError:
                return None
        else:
            return None
    return found


def one_of(*words: str) -> Callable[[str], str]:
    def chosen(text: str) -> str:
        if text not in words:
            raise ValueError(text)
        return text

    return chosen


def between(kind: type, low: float, high: float) -> Callable[[str], float]:
    """A number of a kind; spellings that only a programmer would think of are left to others."""

    def number(text: str) -> float:
        if not text.replace(".", "", 1).isdigit() or not low <= (value := kind(text)) <= high:
            raise ValueError(text)
        return value

    return number
