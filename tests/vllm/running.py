"""How a program that starts servers runs and ends: SIGTERM and SIGINT leave through everything that stops what was started, and what was found so far is kept.

    with ending_in_order(), Report(output, seed=7) as report: ...

Knows: signals, exit codes, a JSON document. Must not know: servers, what is measured.
Invariants: a signal raises Ended once in the main thread, and never within whole(); the exit code is then 128 + its number, whatever else goes wrong on the way
out; the document's file is whole JSON at every moment, and `complete` only where the program came to its end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

# `timeout` sends two SIGTERMs, to the program and to its group, and whoever waits presses Ctrl-C again: that must not cut short what the first one began. Later
# ones count again, because Python drops what a signal raises inside a finalizer.
DEAF_S = 5.0


class Ended(BaseException):
    """SIGTERM or SIGINT."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _Signals:
    """`came`: the first one's number, 0 without. `depth`: of whole()."""

    def __init__(self) -> None:
        self.came = self.depth = 0
        self.at = 0.0
        self.told = False

    def on(self, number: int, frame: object) -> None:
        if self.came and time.monotonic() < self.at + DEAF_S:
            return
        self.came, self.at, self.told = self.came or number, time.monotonic(), False
        self.tell()

    def tell(self) -> None:
        if self.came and not self.told and not self.depth:
            self.told = True
            raise Ended(self.came)


_signals = _Signals()


@contextlib.contextmanager
def whole() -> Iterator[None]:
    """What can't be left in the middle: a process between its start and being known, an end. A signal that comes meanwhile counts when it is over."""
    _signals.depth += 1
    try:
        yield
    finally:
        _signals.depth -= 1
    _signals.tell()


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """For a program's outermost block. Exits with 143 after SIGTERM, 130 after SIGINT."""
    former = {number: signal.signal(number, _signals.on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
        _signals.tell()
    except BaseException as error:
        if not _signals.came:
            raise
        if not isinstance(error, Ended):  # it happened on the way out
            traceback.print_exception(error)
        sys.exit(128 + _signals.came)
    finally:
        _signals.__init__()
        for number, handler in former.items():
            signal.signal(number, handler)


class Report:
    """A document that grows. `output`: its file. As a context: printed at the end, however that comes about; `complete` where nothing was raised."""

    def __init__(self, output: str | None, **first) -> None:
        self.found = {**first, "complete": False}
        self._output, self._began = Path(output) if output else None, time.monotonic()

    @property
    def seconds(self) -> float:
        """Since the beginning."""
        return time.monotonic() - self._began

    def say(self, line: str) -> None:
        """A line on stderr, with the time since the beginning."""
        print(f"{self.seconds:5.0f} s  {line}", file=sys.stderr, flush=True)

    def keep(self, **parts) -> None:
        """Parts of the document, found or found anew."""
        self.found |= parts
        if self._output is not None:
            half = self._output.with_name(f".{self._output.name}.{os.getpid()}")
            half.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
            half.replace(self._output)

    @contextlib.contextmanager
    def part(self, what: str) -> Iterator[None]:
        """How long a part took, said, and kept under `took_s`."""
        began = time.monotonic()
        self.say(f"{what} ...")
        yield
        took = round(time.monotonic() - began)
        self.keep(took_s={**self.found.get("took_s", {}), what: took})
        self.say(f"{what}: {took} s")

    def __enter__(self) -> Report:
        self.keep()
        return self

    def __exit__(self, kind, error, trace) -> None:
        with whole():
            if error is None:
                self.keep(complete=True)
            else:
                self.keep(ended_by=str(error) if isinstance(error, Ended) else kind.__name__)
            print(json.dumps(self.found, indent=1), flush=True)
