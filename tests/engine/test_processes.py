"""Real processes: writers that are killed in mid commit, daemons that are absent, stopped, killed and started again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvguard import engine
from kvguard.engine import memory
from kvguard.engine.look import TableReader
from kvguard.format import rows as fmt
from kvguard.format.tape import split_word
from kvguard.format.layout import Layout
from kvguard.types import Rank
from tests.engine import fast_writer

ROOT = Path(__file__).resolve().parent.parent.parent
LAYOUT = Layout.paged("model", "float32", 2, 64, 4, 1, 4)
KILLS = 24
KILLS_MAX = 240  # where a kill strikes is chance; how many must have struck inside a commit is not
MID_COMMIT_MIN = 4


def start(module: str, *arguments: str, fds=()) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-m", module, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True, pass_fds=fds)


def end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.fixture
def processes():
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        end(process)


def await_line(process: subprocess.Popen, wanted: str) -> None:
    for line in process.stdout:
        if line.strip() == wanted:
            return
    raise AssertionError(f"{wanted!r} was never said; the process ended with {process.wait()}")


@pytest.mark.e2e
def test_adoption_after_kills_in_mid_commit(processes) -> None:
    """Each process adopts what the last one left, checks it and goes on; the kills must have struck inside commits, shown by stores that nobody published."""
    fd = memory.create(fast_writer.GEOMETRY)
    os.set_inheritable(fd, True)
    reader = TableReader(os.dup(fd))
    views, seed = memory.Views(fd, writable=False), random.Random(7)
    in_mid_commit = 0
    kills = 0
    while kills < KILLS or (in_mid_commit < MID_COMMIT_MIN and kills < KILLS_MAX):
        kills += 1
        process = start("tests.engine.fast_writer", str(fd), fds=(fd,))
        processes.append(process)
        await_line(process, "ready")
        before = reader.written_step()
        deadline = time.monotonic() + 10
        while reader.written_step() < before + 3:
            assert time.monotonic() < deadline and process.poll() is None
        time.sleep(seed.random() * 0.002)  # chooses the point of the kill, waits for nothing
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.look()
        in_mid_commit += struck_inside(views, reader)
    assert in_mid_commit >= MID_COMMIT_MIN, f"only {in_mid_commit} of {kills} kills struck inside a commit"
    assert reader.torn < kills * fast_writer.ROWS
    from kvguard.engine.table import TableWriter

    table = TableWriter.adopt(fd)
    assert len(table.sequences()) == fast_writer.ROWS
    fast_writer.check(table)
    table.close()


def struck_inside(views: memory.Views, reader: TableReader) -> bool:
    """Ids or records stored but not counted, heads stored but not selected, or rows of one batch at different versions."""
    number, count = split_word(int(views.words[fmt.TAPE_AT // 8]))
    if count < fast_writer.GEOMETRY.tape_steps and views.tape_words[count * fmt.slot_words(fast_writer.ROWS) + 1] == number:
        return True
    for row in range(fast_writer.ROWS):
        version = int(views.selectors[row])
        seen = views.heads[row, version & 1]
        known = int(seen[fmt.H_IDS])
        if int(views.heads[row, (version + 1) & 1, fmt.H_VERSION]) > version or (known < 16384 and views.ids[row, known] != 0):
            return True
    return bool(np.ptp(views.heads[:, :, fmt.H_IDS].max(axis=1)) > 0)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def live_a_while(guard: engine.Guard, steps: int) -> int:
    """Sequences come and go; returns the positions that are committed at the end."""
    for n in range(steps):
        name = f"s{n % 8}"
        with guard.step(1) as step:
            if name in guard.table.sequences():
                step.release(name)
            step.commit(name, 4, blocks=[n % 8], tokens=[n % 100] * 5, request=b"{}")
    return sum(guard.table.accepted(row) for row in guard.table.sequences().values())


@pytest.mark.e2e
def test_no_daemon_then_a_stopped_one_then_a_dead_one_change_nothing(processes, tmp_path) -> None:
    path = str(tmp_path / "node.sock")
    pool = engine.allocate(LAYOUT)
    guard = engine.attach("llama", Rank(0, 0, 0), pool, LAYOUT, socket=path)
    live_a_while(guard, 500)
    descriptors, resident = len(os.listdir("/proc/self/fd")), resident_bytes()
    live_a_while(guard, 3000)  # absent
    daemon = start("tests.engine.tiny_daemon", path)
    processes.append(daemon)
    await_line(daemon, "attached rank")
    await_line(daemon, "committed 32")
    daemon.send_signal(signal.SIGSTOP)
    live_a_while(guard, 3000)  # stopped
    with guard.step(1) as step:
        step.release("s0")
    daemon.send_signal(signal.SIGCONT)
    await_line(daemon, "committed 28")
    end(daemon)
    live_a_while(guard, 3000)  # dead
    second = start("tests.engine.tiny_daemon", path)
    processes.append(second)
    await_line(second, "attached rank")
    await_line(second, "committed 32")
    assert len(guard.session.outgoing) == 0 and guard.connected
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 3  # the line itself, and the two ends of what is being read from the daemons
    assert resident_bytes() - resident < 16 * 2**20
    guard.detach()
    pool.close()


@pytest.mark.e2e
def test_a_daemon_that_is_stopped_before_it_ever_answers(processes, tmp_path) -> None:
    path = str(tmp_path / "node.sock")
    daemon = start("tests.engine.tiny_daemon", path)
    processes.append(daemon)
    await_line(daemon, "listening")
    daemon.send_signal(signal.SIGSTOP)
    pool = engine.allocate(LAYOUT)
    guard = engine.attach("llama", Rank(0, 0, 0), pool, LAYOUT, socket=path)
    live_a_while(guard, 1000)
    daemon.send_signal(signal.SIGCONT)
    await_line(daemon, "committed 32")
    guard.detach()
    await_line(daemon, "message Detach")
    pool.close()
