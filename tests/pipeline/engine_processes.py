"""Stages and a driver as real processes over loopback, for tests: started from settings files, ended by pid, whatever happens.

Knows: settings, the driver's commands and events. Must not know: what a test asserts.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

from kvguard.pipeline import settings as settings_
from kvguard.pipeline.settings import DriverSettings, StageSettings
from kvguard.pipeline.ports import free_ports

WAIT_S = 90


def free_endpoints(count: int) -> list[str]:
    """Loopback endpoints whose ports were free just now."""
    return [f"tcp://127.0.0.1:{port}" for port in free_ports(count)]


class DriverProcess:
    """A driver: commands in, events out."""

    def __init__(self, directory: Path, settings: DriverSettings, name: str = "driver"):
        path = directory / f"{name}.toml"
        settings_.write(path, settings)
        self._log = (directory / f"{name}.log").open("w")
        command = [sys.executable, "-m", "kvguard.pipeline.driver", str(path)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True)
        self.events: list[dict] = []
        self._queue: queue.Queue[dict | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self._queue.put(json.loads(line))
        self._queue.put(None)

    def do(self, **command) -> None:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()

    def wait_for(self, kind: str, **fields) -> dict:
        """The next event of that kind with those fields; everything read on the way is kept in `events`."""
        deadline = time.monotonic() + WAIT_S
        while True:
            event = self._queue.get(timeout=max(0.01, deadline - time.monotonic()))
            assert event is not None, f"the driver ended while {kind} {fields} was waited for: {self.events[-3:]}"
            self.events.append(event)
            if event["event"] == kind and all(event.get(key) == value for key, value in fields.items()):
                return event

    def of(self, kind: str, **fields) -> list[dict]:
        return [event for event in self.events if event["event"] == kind and all(event.get(key) == value for key, value in fields.items())]

    def run(self, run: str, prompts: list, max_tokens: int, **more) -> dict:
        self.do(do="run", run=run, prompts=prompts, max_tokens=max_tokens, ignore_eos=True, **more)
        return self.wait_for("finished", run=run)

    def digest(self, run: str) -> dict:
        self.do(do="digest", run=run)
        return self.wait_for("digest", run=run)["digests"]

    def close(self) -> int:
        if self.process.poll() is None:
            self.do(do="quit")
            self.process.stdin.close()
        code = end(self.process)
        self._log.close()
        return code


class Unguarded:
    """A whole engine without a coordinator. `guarded`: its ranks attach all the same, to a daemon that isn't there."""

    def __init__(self, directory: Path, model: Path, stages: int, guarded: bool = False, **more):
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.endpoints = free_endpoints(stages + 1)
        pools = {key: more[key] for key in ("blocks", "block_tokens", "chunk") if key in more}
        self.stages: list[subprocess.Popen] = []
        self._logs = []
        self.driver: DriverProcess | None = None
        try:
            for pp in range(stages):
                settings = StageSettings("test", str(model), stages, pp, self.endpoints[pp], str(directory / "nobody.sock"), guarded=guarded, **pools)
                self.stages.append(self._stage(settings, f"stage{pp}"))
            more.setdefault("blocks", 1024)
            settings = DriverSettings("test", str(model), stages, self.endpoints[-1], "", tuple(self.endpoints[:-1]), **more)
            self.driver = DriverProcess(directory, settings)
            self.driver.wait_for("ready")
        except BaseException:
            self.close()
            raise

    def _stage(self, settings: StageSettings, name: str) -> subprocess.Popen:
        path = self.directory / f"{name}.toml"
        settings_.write(path, settings)
        log = (self.directory / f"{name}.log").open("w")
        self._logs.append(log)
        return subprocess.Popen([sys.executable, "-m", "kvguard.pipeline.stage", str(path)], stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def close(self) -> list[int]:
        codes = [self.driver.close()] if self.driver else []
        codes += [end(stage) for stage in self.stages]
        for log in self._logs:
            log.close()
        return codes

    def __enter__(self) -> Unguarded:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def end(process: subprocess.Popen) -> int:
    """SIGTERM, and SIGKILL for what doesn't go; its exit status."""
    if process.poll() is None and process.stdin is None:
        process.terminate()
    try:
        return process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
