"""The guide's example is run: killed, taken over by a standby from the pool or from the replica, and the ids are those of a run that nobody disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kvguard import emitter

pytestmark = pytest.mark.e2e
ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "toy_engine.py"
PROMPT = [5, 17, 3, 99, 240]


class Engine:
    def __init__(self, cluster, role: str, node: str) -> None:
        arguments = [sys.executable, str(EXAMPLE), role, "toy", str(cluster.directory / node / "kvguard.sock")]
        with open(cluster.directory / f"toy-{role}-{node}.log", "ab") as log:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "bufsize": 0}  # unbuffered: select() sees every line
            self.popen = subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": str(ROOT)}, **pipes)

    def tell(self, **command) -> None:
        self.popen.stdin.write(json.dumps(command).encode() + b"\n")
        self.popen.stdin.flush()

    def hear(self) -> dict:
        ready, _, _ = select.select([self.popen.stdout], [], [], 60.0)
        assert ready, "the engine says nothing"
        line = self.popen.stdout.readline()
        assert line, f"the engine ended with {self.popen.wait()}"
        return json.loads(line)

    def ids(self, count: int) -> list[int]:
        return [self.hear()["id"] for _ in range(count)]


@pytest.fixture
def engines(cluster):
    started = []

    def start(role: str, node: str) -> Engine:
        started.append(Engine(cluster, role, node))
        return started[-1]

    cluster.start()
    yield start
    for engine in started:
        if engine.popen.poll() is None:
            engine.popen.kill()
        engine.popen.wait()
        with contextlib.suppress(BrokenPipeError):
            engine.popen.stdin.close()
        engine.popen.stdout.close()


@pytest.fixture
def driver(cluster):
    """The emitter: it keeps what it has emitted."""
    with emitter.connect("toy", cluster.coordinator_address) as made:
        made.welcome(30.0)
        yield made


@pytest.mark.parametrize("lost", ["process", "node"])
def test_the_example_goes_on_where_it_was(cluster, engines, driver, lost):
    first = engines("rank", "a")
    assert first.hear() == {"rank": {}}
    standby = engines("standby", "a" if lost == "process" else "b")
    assert standby.hear() == {"standby": True}
    driver.scheduled(1)
    first.tell(generate="undisturbed", ids=PROMPT, new=60)
    wanted = first.ids(60)
    first.tell(release="undisturbed")
    first.tell(generate="one", ids=PROMPT, new=25)
    emitted = first.ids(25)
    assert emitted == wanted[:25]
    cluster.protected("0.0.0", len(PROMPT) + 24)
    cluster.until("the standby known", lambda: any(one["state"] == "standby" for one in cluster.ask("coordinator", "status")["ranks"]))
    if lost == "node":
        cluster.kill("a")
    first.popen.send_signal(signal.SIGKILL)
    assert first.popen.wait() == -signal.SIGKILL
    resumption = driver.resume(60.0)
    driver.adopt(resumption)
    [token] = resumption
    assert (token.sequence, token.position, token.rung) == ("one", len(PROMPT) + 24, "pool" if lost == "process" else "replica")
    assert standby.hear() == {"rank": {"one": token.position}}
    standby.tell(generate="one", ids=[*PROMPT, *emitted], new=35)
    assert standby.ids(35) == wanted[25:]
    standby.popen.stdin.close()
    assert standby.popen.wait(30) == 0


def test_the_example_is_as_short_as_the_guide_says():
    text = EXAMPLE.read_text()
    code = [line for line in text.split('"""', 2)[2].splitlines() if line.strip()]
    assert len(code) <= 100
    guide = (ROOT / "docs" / "adapters.md").read_text()
    for number in range(1, 11):  # the marks that the guide explains
        assert f"({number})" in text and f"\n{number}. " in guide
