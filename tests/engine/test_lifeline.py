"""Lifelines: what a process's death marks, before its pidfd says so, and what marks nothing. Holders are children that can die, or threads here."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from kvguard import engine
from kvguard.engine import client, lifeline
from kvguard.engine.lifeline import Lifeline, Watch, held_by_this_thread
from kvguard.errors import Refused
from kvguard.format.layout import Layout
from kvguard.types import Rank
from tests.engine.tiny_daemon import TinyDaemon

KILLS_MAX = 10
HOLDER = """
import ctypes, os, sys, threading, time
from kvguard.engine.lifeline import Lifeline
big = bytearray(int(sys.argv[1]) << 20)
big[::4096] = b"x" * len(big[::4096])
order = threading.Event()
def hold():
    print(Lifeline().fd, flush=True)
    order.wait()
    ctypes.CDLL(None).syscall(60 if os.uname().machine == "x86_64" else 93, 0)
threading.Thread(target=hold, daemon=True).start()
said = sys.stdin.readline().strip()
if said == "end the thread":
    order.set()
    time.sleep(60)
if said == "fork":
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    print("forked", flush=True)
    sys.stdin.readline()
"""


class Holder:
    """A child whose thread holds a lifeline, and a watch of it."""

    def __init__(self, memory_mib: int = 0) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", HOLDER, str(memory_mib)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        number = int(self.process.stdout.readline())
        self.pidfd = os.pidfd_open(self.process.pid)
        fd = os.open(f"/proc/{self.process.pid}/fd/{number}", os.O_RDONLY)
        self.watches = [Watch(fd)]
        self.fd = fd

    def say(self, line: str) -> None:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def close(self) -> None:
        for watch in self.watches:
            watch.close()
        self.process.kill()
        self.process.communicate()
        os.close(self.pidfd)
        os.close(self.fd)


@pytest.fixture
def holder():
    with contextlib.ExitStack() as stack:

        def made(memory_mib: int = 0) -> Holder:
            one = Holder(memory_mib)
            stack.callback(one.close)
            return one

        yield made


def ready(*descriptors: int, timeout_s: float = 20.0) -> list[int]:
    return select.select(descriptors, [], [], timeout_s)[0]


def ended(watch: Watch) -> bool:
    watch._thread.join(20.0)
    return watch.ended


@contextlib.contextmanager
def held():
    """A lifeline that a thread of this process holds until the block is left."""
    made: list[Lifeline] = []
    known, leave = threading.Event(), threading.Event()

    def hold() -> None:
        made.append(held_by_this_thread())
        known.set()
        leave.wait()
        made[0].end()

    thread = threading.Thread(target=hold)
    thread.start()
    known.wait()
    try:
        yield made[0]
    finally:
        leave.set()
        thread.join()


@pytest.mark.e2e
def test_a_sigkill_marks_it_before_the_pidfd_fires(holder) -> None:
    """Proven by what was readable when the loop woke first. A machine that is busy may show both at once; one that shows only the pidfd breaks the promise."""
    for _ in range(KILLS_MAX):
        one = holder(192)
        signal.pidfd_send_signal(one.pidfd, signal.SIGKILL)
        first = ready(one.watches[0].bell, one.pidfd)
        if first == [one.watches[0].bell]:
            assert ready(one.pidfd) == [one.pidfd]
            return
    raise AssertionError(f"in none of {KILLS_MAX} kills it was marked before the pidfd fired")


@pytest.mark.e2e
def test_the_end_of_the_thread_alone_marks_it_for_everyone_who_watches(holder) -> None:
    one = holder()
    one.watches.append(Watch(one.fd))  # of another rank of the same process
    one.say("end the thread")
    for watch in one.watches:
        assert ready(watch.bell) == [watch.bell]
    assert one.process.poll() is None and not ready(one.pidfd, timeout_s=0)
    late = Watch(one.fd)
    one.watches.append(late)
    assert ready(late.bell), "who comes late is told at once"


@pytest.mark.e2e
def test_an_end_in_order_marks_nothing_and_a_forked_child_is_somebody_else(holder) -> None:
    one = holder()
    one.say("fork")
    assert one.process.stdout.readline() == "forked\n"
    assert not one.watches[0].ended and int(one.watches[0]._words[0]) & lifeline.WAITERS, "the child's end was the child's"
    one.say("end")  # the interpreter ends, without a word to anyone
    assert one.process.wait(20) == 0
    assert ended(one.watches[0]) and not ready(one.watches[0].bell, timeout_s=0)


def test_letting_go_ends_the_watch() -> None:
    with held() as line:
        watch = Watch(line.fd)
        assert not watch.ended
    assert ended(watch) and not ready(watch.bell, timeout_s=0)
    watch.close()


def test_closing_a_watch_wakes_its_thread_and_leaves_nothing_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with held() as line:
        watch = Watch(line.fd)
        watch.close()
        watch.close()
        assert watch.ended and watch.bell == -1
        del watch
    del line
    assert len(os.listdir("/proc/self/fd")) == before


def page(word: int, size: int = lifeline.PAGE_BYTES, seals: int = lifeline.SEALS) -> int:
    fd = os.memfd_create("garbage", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    os.pwrite(fd, np.uint32(word).tobytes(), 0)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


@pytest.mark.parametrize("word", [0, 1, 77, lifeline.WAITERS, lifeline.OWNER_DIED | 5, 0xFFFFFFFF, lifeline.OWNER, lifeline.WAITERS | lifeline.OWNER_DIED | 1])
def test_garbage_in_the_word_ends_the_watch_and_says_nothing(word: int) -> None:
    fd = page(word)
    watch = Watch(fd)
    assert ended(watch) and not ready(watch.bell, timeout_s=0)
    watch.close()
    os.close(fd)


def test_a_word_that_changes_its_owner_and_one_that_rings_for_nothing_end_the_watch() -> None:
    fd = page(lifeline.WAITERS | 5)
    theirs = np.memmap(f"/proc/self/fd/{fd}", np.uint32)
    watch, other = Watch(fd), Watch(fd)
    end = time.monotonic() + 20
    while not watch.ended:  # somebody rings and rings: WAKES_MAX, and no more
        lifeline._call(lifeline._futex_call, theirs.ctypes.data, lifeline.FUTEX_WAKE, lifeline.ALL, 0, 0, 0)
        assert time.monotonic() < end
    theirs[0] = lifeline.WAITERS | 6
    lifeline._call(lifeline._futex_call, theirs.ctypes.data, lifeline.FUTEX_WAKE, lifeline.ALL, 0, 0, 0)
    assert ended(other)
    for one in (watch, other):
        assert not ready(one.bell, timeout_s=0)
        one.close()
    os.close(fd)


def test_what_is_no_page_is_refused_before_it_is_mapped() -> None:
    reader, writer = os.pipe()
    odd = [page(1, size=1), page(1, size=2 * lifeline.PAGE_BYTES), page(1, seals=0), reader, writer]
    for fd in odd:
        with pytest.raises(Refused, match="not a sealed page"):
            Watch(fd)
        os.close(fd)


def test_where_there_can_be_none_it_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setattr(lifeline, "_futex_call", 0)
    monkeypatch.setattr(lifeline, "_told_of_none", threading.Event())
    assert held_by_this_thread() is None and held_by_this_thread() is None
    assert [record.getMessage() for record in caplog.records if "early sign" in record.getMessage()] != []
    assert sum("early sign" in record.getMessage() for record in caplog.records) == 1


def test_a_refused_call_leaves_nothing_open(monkeypatch) -> None:
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(lifeline, "HEAD_BYTES", 23)  # what a kernel without robust futexes answers: EINVAL here, ENOSYS there
    assert held_by_this_thread() is None
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_rank_brings_its_clients_lifeline_and_lets_go_with_a_clean_detach(tmp_path, monkeypatch) -> None:
    brought: list[Watch] = []

    class Watching(TinyDaemon):
        def _attach(self, incoming) -> None:
            if incoming.message.lifeline:
                brought.append(Watch(incoming.descriptors[-1]))
            super()._attach(incoming)

    monkeypatch.setattr(client, "_client", None)  # its thread ends with the last session: no other test's may be among them
    layout = Layout.paged("model", "float32", 1, 8, 4, 1, 4)
    daemon = Watching(str(tmp_path / "node.sock"))
    for life in range(2):  # the client's thread ends with the last session; the next one's is another
        pool = engine.allocate(layout)
        guard = engine.attach("llama", Rank(0, 0, 0), pool, layout, socket=daemon.server.path)
        daemon.until(lambda life=life: len(brought) > life)
        assert not brought[life].ended
        guard.detach()
        assert ended(brought[life]) and not ready(brought[life].bell, timeout_s=0)
        daemon.until(lambda: not daemon.server.connections())
        pool.close()
    standby = engine.attach_standby("llama", {Rank(0, 0, 0): layout}, socket=daemon.server.path)
    daemon.until(lambda: [attach for attach in daemon.attaches.values() if attach.role == "standby"])
    standby.detach()
    assert len(brought) == 2, "a spare has no rank to lose"
    for watch in brought:
        watch.close()
    daemon.close()


def test_the_kernel_agrees_with_the_constants() -> None:
    assert ctypes.sizeof(ctypes.c_void_p) * 3 == lifeline.HEAD_BYTES
    assert lifeline.WAITERS | lifeline.OWNER_DIED | lifeline.OWNER == 0xFFFFFFFF
