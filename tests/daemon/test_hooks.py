"""Programs of an operator: told in order, never waited for, killed when they stay."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from kvguard.daemon import hooks as hooking
from kvguard.daemon.hooks import SAID_BYTES_MAX, WAITING_MAX, Hooks


def until(condition, timeout_s: float = 30.0):
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)  # between two looks at a condition with a deadline
    return found


@pytest.fixture
def program(tmp_path):
    """Writes a shell script; returns its path."""

    def write(body: str) -> str:
        path = tmp_path / f"hook-{len(list(tmp_path.glob('hook-*')))}"
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o700)
        return str(path)

    return write


@pytest.fixture
def hooks_of():
    made = []

    def make(programs: dict[str, str], **more) -> Hooks:
        made.append(Hooks(programs, **more))
        return made[-1]

    yield make
    for hooks in made:
        hooks.close()


def test_each_event_is_one_document_in_order(program, hooks_of, tmp_path):
    heard = tmp_path / "heard"
    hooks = hooks_of({"on_failover": program(f"cat >> {heard}; echo >> {heard}"), "on_recovered": ""})
    for number in range(3):
        hooks.tell("on_failover", instance="llama", number=number)
        hooks.tell("on_recovered", instance="llama")  # nobody's
    until(lambda: hooks.counters["run"] == 3 and heard.exists() and heard.read_text().count("\n") == 3)
    documents = [json.loads(line) for line in heard.read_text().splitlines()]
    assert [document["number"] for document in documents] == [0, 1, 2]
    assert {document["event"] for document in documents} == {"on_failover"} and all(document["schema"] == "kvguard.hook/1" for document in documents)
    assert set(hooks.counters) == {"run"}


def test_a_program_that_stays_is_killed_with_its_children_and_the_next_one_runs(program, hooks_of, tmp_path):
    pids, heard = tmp_path / "pids", tmp_path / "heard"
    hooks = hooks_of({"on_failover": program(f"sleep 600 & echo $! > {pids}; wait"), "on_recovered": program(f"cat > {heard}")}, timeout_s=0.5)
    hooks.tell("on_failover")
    hooks.tell("on_recovered", instance="llama")
    until(lambda: heard.exists() and heard.read_text())
    assert hooks.counters["timed_out"] == 1
    child = Path(f"/proc/{int(pids.read_text())}")
    until(lambda: not child.exists() or "(sleep)" not in (child / "stat").read_text() or " Z " in (child / "stat").read_text())


def test_what_a_program_leaves_behind_in_another_group_holds_nobody_up(program, hooks_of, tmp_path):
    """It keeps the pipe that the program spoke through: the next program, and the daemon's end, waited for it."""
    pid, heard = tmp_path / "pid", tmp_path / "heard"
    left = program(f"setsid sh -c 'echo $$ > {pid}; exec sleep 600' & while [ ! -s {pid} ]; do :; done")
    hooks = hooks_of({"on_failover": left, "on_recovered": program(f"cat > {heard}")}, timeout_s=5.0)
    try:
        hooks.tell("on_failover")
        hooks.tell("on_recovered", instance="llama")
        until(lambda: heard.exists() and heard.read_text())
        assert Path(f"/proc/{int(pid.read_text())}").exists(), "it still lives, and nobody waited for it"
        hooks.close()
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_of_a_program_that_says_too_much_the_beginning_is_kept_and_no_more(program, hooks_of, caplog, monkeypatch):
    kept = []
    monkeypatch.setattr("kvguard.daemon.hooks.text_of", lambda said: kept.append(len(said)) or "")
    hooks = hooks_of({"on_failover": program("exec head -c 30000000 /dev/zero")}, timeout_s=60.0)
    hooks.tell("on_failover")
    until(lambda: kept)
    assert kept == [SAID_BYTES_MAX + 1] and hooks.counters["timed_out"] == 0


def test_a_storm_is_dropped_beyond_its_bound_and_telling_goes_on(program, hooks_of, tmp_path):
    begun = tmp_path / "begun"
    hooks = hooks_of({"on_unprotected": program(f"touch {begun}; sleep 600")})
    hooks.tell("on_unprotected")
    until(begun.exists)
    for _ in range(WAITING_MAX + 5):
        hooks.tell("on_unprotected")
    assert hooks.counters["dropped"] == 5
    hooks.close()  # ends at once, though one runs and others wait
    assert hooks.counters["run"] == 1


def test_what_cannot_be_run_is_counted_and_logged(program, hooks_of, caplog):
    hooks = hooks_of({"on_failover": "/nowhere/at/all", "on_recovered": program("echo no; exit 3")})
    hooks.tell("on_failover")
    hooks.tell("on_recovered")
    until(lambda: hooks.counters["failed"] == 2 and "ended with 3: no" in caplog.text)
    assert "/nowhere/at/all can't be run" in caplog.text


def test_nobody_s_hooks_cost_no_thread():
    hooks = Hooks({"on_failover": ""})
    hooks.tell("on_failover")
    hooks.close()
    assert not hooks.counters and "kvguard-hooks" not in {thread.name for thread in threading.enumerate()}


def test_a_program_that_the_kernel_does_not_let_die_is_not_waited_for(program, monkeypatch, caplog):
    """One whose file system doesn't answer: the coordinator never ended."""
    monkeypatch.setattr(hooking, "JOIN_S", 0.01)
    begun, dies = threading.Event(), threading.Event()

    def stays(hooks, event, path, document):
        begun.set()
        assert dies.wait(30)

    monkeypatch.setattr(Hooks, "_carry_out", stays)
    hooks = Hooks({"on_failover": program("true")})
    hooks.tell("on_failover")
    assert begun.wait(30)
    hooks.close()
    assert "nobody waits for it" in caplog.text and hooks._thread.is_alive()
    dies.set()
    hooks._thread.join(30)
    assert not hooks._thread.is_alive()
