"""Drills carried out: on a bench, which is the reference engine's cluster in a process of its own.

Knows: the bench's commands and answers (JSON lines), scenarios, documents. Must not know: torch, the pipeline's modules, what a fault does.
Invariants: one bench serves many drills; one that failed is thrown away with its logs named, and the next drill gets a new one; no wait without a deadline;
the bench ends with this process, however it ends.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from kvguard.drill import documents
from kvguard.drill.scenarios import Scenario, drawn
from kvguard.errors import KvguardError, TimedOut

START_TIMEOUT_S = 600.0  # a model may have to be made ready
STRIKE_TIMEOUT_S = 900.0
QUIT_TIMEOUT_S = 30.0
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Options:
    """`model`: a directory, or None for the default model. `max_tokens`: of each sequence in each wave of the load."""

    model: str | None = None
    stages: int = 3
    sequences: int = 6
    max_tokens: int = 40


def _end_with(parent: int) -> None:
    """In the child, before exec: SIGTERM when this process goes, so that the bench ends in order."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        os._exit(1)


class Bench:
    """The process `kvguard.pipeline.bench`, started when made. Raises KvguardError as the bench does."""

    def __init__(self, options: Options) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "kvguard.pipeline.bench"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            preexec_fn=functools.partial(_end_with, os.getpid()),
        )  # fmt: skip
        os.set_blocking(self._popen.stdout.fileno(), False)
        self._rest = b""
        try:
            self.started = self._ask({"do": "start", **asdict(options)}, "started", START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def strike(self, scenario: Scenario, seed: int, options: Options) -> dict:
        """The evidence of one drill."""
        draw = drawn(scenario, seed, options.stages, options.max_tokens)
        return self._ask({"do": "strike", "name": scenario.name, "seed": seed, **asdict(draw)}, "evidence", STRIKE_TIMEOUT_S)

    def _ask(self, command: dict, wanted: str, timeout_s: float) -> dict:
        try:
            self._popen.stdin.write(json.dumps(command).encode() + b"\n")
            self._popen.stdin.flush()
        except BrokenPipeError as error:
            raise KvguardError(f"the bench ended with {self._popen.wait()}. Try: again, and its logs") from error
        answer = self._line(timeout_s)
        if answer["event"] == "error":
            raise KvguardError(answer["message"])
        assert answer["event"] == wanted, answer
        return answer

    def _line(self, timeout_s: float) -> dict:
        deadline = time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            selector.register(self._popen.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    raise TimedOut(f"the bench gave no answer within {timeout_s:g} s. Try: --stages 2, or a smaller model")
                chunk = self._popen.stdout.read(1 << 20)
                if chunk == b"":
                    raise KvguardError(f"the bench ended with {self._popen.wait()} (see above). Try: --model DIR")
                self._rest += chunk or b""
        line, _, self._rest = self._rest.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        """Asks it to end; one that doesn't is ended, and everything that it started with it."""
        try:
            self._popen.stdin.close()
            self._popen.wait(QUIT_TIMEOUT_S)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._popen.terminate()
        try:
            self._popen.wait(QUIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._popen.stdout.close()


def run(scenarios: list[Scenario], seed: int, repeat: int, options: Options, say: Callable[[str], None] = lambda line: None) -> list[dict]:
    """A document per scenario, each with a run per seed from `seed` on. Raises KvguardError only where no bench can be started at all."""
    bench, found, about = None, [], {"target": "bench", **asdict(options)}
    about["model"] = Path(options.model).name if options.model else "default"
    try:
        for scenario in scenarios:
            runs = []
            for number in range(seed, seed + repeat):
                if bench is None:
                    say(f"starting a bench of {options.stages} stages")
                    bench = Bench(options)
                say(f"{scenario.name}, seed {number}: {scenario.does}")
                try:
                    seen = bench.strike(scenario, number, options)
                except KvguardError as error:
                    seen = {"error": str(error)}
                    bench.close()
                    bench = None
                runs.append(documents.judged(scenario, number, "bench", {key: value for key, value in seen.items() if key not in ("event", "name")}))
                say(f"{scenario.name}, seed {number}: {'passed' if runs[-1]['passed'] else 'FAILED: ' + '; '.join(runs[-1]['failures'])}")
            found.append(documents.document(scenario, seed, runs, about))
    finally:
        if bench is not None:
            bench.close()
    return found


def would(scenario: Scenario, seed: int, repeat: int, options: Options) -> list[dict]:
    """What run() would do: `--dry-run`."""
    return [
        {"name": scenario.name, "seed": number, "does": scenario.does, "hypothesis": scenario.hypothesis,
         **asdict(drawn(scenario, number, options.stages, options.max_tokens))}
        for number in range(seed, seed + repeat)
    ]  # fmt: skip
