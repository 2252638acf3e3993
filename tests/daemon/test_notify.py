"""What systemd hears, and what is taken from it at the start."""

from __future__ import annotations

import array
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from kvguard.config import NodeConfig
from kvguard.daemon.journal import Journal
from kvguard.daemon.keeping import ServiceShelf, owner_of, shelf_of
from kvguard.daemon.notify import FEEDS_PER_TIMEOUT, Notifier, Watchdog
from kvguard.daemon.process import reread
from kvguard.errors import BadConfig
from kvguard.store.shelf import Files, Memfds


class ServiceSocket:
    """The other end of a notification socket."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.socket.bind(address)

    def heard(self) -> list[tuple[str, list[int]]]:
        found = []
        while True:
            try:
                text, ancillary, _, _ = self.socket.recvmsg(4096, 256)
            except BlockingIOError:
                return found
            descriptors = array.array("i")
            for _, _, data in ancillary:
                descriptors.frombytes(data)
            found.append((text.decode(), list(descriptors)))


@pytest.fixture(params=["path", "abstract"])
def service(request, tmp_path):
    address = str(tmp_path / "notify") if request.param == "path" else f"\0kvguard-test-{os.getpid()}"
    made = ServiceSocket(address)
    made.word = address.replace("\0", "@")
    yield made
    made.socket.close()


def told(service, **more) -> tuple[Notifier, dict]:
    environ = {"NOTIFY_SOCKET": service.word, "HOME": "/", **more}
    return Notifier(environ), environ


def test_a_life_as_the_manager_hears_it(service):
    notifier, environ = told(service)
    assert environ == {"HOME": "/"}  # no child speaks for this process
    notifier.ready("all is\nwell")
    notifier.status("all is\nwell")
    notifier.status("other")
    notifier.reloading()
    notifier.stopping()
    notifier.close()
    heard = [text for text, _ in service.heard()]
    assert heard[:2] == ["READY=1\nSTATUS=all is well", "STATUS=other"] and heard[3] == "STOPPING=1"
    word, moment = heard[2].splitlines()
    assert word == "RELOADING=1" and int(moment.removeprefix("MONOTONIC_USEC=")) > 0


def test_descriptors_are_kept_and_forgotten(service):
    notifier, _ = told(service)
    shelf = ServiceShelf(notifier)
    descriptor = shelf.create("x.arena")
    os.write(descriptor, b"page")
    shelf.remove("x.arena")
    shelf.remove("never")
    (kept, [duplicate]), (forgotten, none) = service.heard()
    assert kept == "FDSTORE=1\nFDPOLL=0\nFDNAME=x.arena" and os.pread(duplicate, 4, 0) == b"page"
    assert (forgotten, none) == ("FDSTOREREMOVE=1\nFDNAME=x.arena", [])
    os.close(descriptor)
    os.close(duplicate)
    notifier.close()


def test_a_manager_that_is_gone_or_full_changes_nothing(service):
    notifier, _ = told(service)
    while notifier.dropped < 2:  # nobody reads
        notifier.alive()
    service.socket.close()
    notifier.status("said to nobody")
    assert notifier.dropped == 3
    shelf = ServiceShelf(notifier)
    os.close(shelf.create("x.arena"))
    assert shelf.refused == 1
    notifier.close()
    assert not Notifier({}).present and not Notifier({"NOTIFY_SOCKET": "vsock:2:1234"}).present


INHERITING = """
import os, sys
from kvguard.daemon.notify import Notifier
os.environ["LISTEN_PID"] = str(os.getpid()) if sys.argv[1] == "mine" else "1"
notifier = Notifier(os.environ)
found = notifier.inherited()
print({name: os.pread(descriptor, 9, 0).decode() for name, descriptor in sorted(found.items())}, any(map(os.get_inheritable, found.values())), notifier.inherited())
"""


@pytest.mark.parametrize(("whose", "expected"), [("mine", "{'a.arena': 'first', 'a.index': 'second'} False {}"), ("another's", "{} False {}")])
def test_descriptors_of_a_former_life(whose, expected):
    files = [os.memfd_create("test", 0) for _ in range(2)]
    for file, text in zip(files, (b"first", b"second"), strict=True):
        os.write(file, text)
    first, second = (os.dup(file) for file in files)

    def place() -> None:
        os.dup2(first, 3)
        os.dup2(second, 4)

    environ = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "a.arena:a.index"}
    done = subprocess.run(
        [sys.executable, "-c", INHERITING, whose], env=environ, pass_fds=(3, 4, first, second), preexec_fn=place, capture_output=True, text=True, timeout=30, check=False
    )  # fmt: skip
    for file in (*files, first, second):
        os.close(file)
    assert done.stdout.strip() == expected, done.stderr


class Timers:
    """A loop's `after`, run by hand."""

    def __init__(self) -> None:
        self.due: list = []

    def after(self, delay_ns: int, ready) -> None:
        self.due.append((delay_ns, ready))

    def turn(self) -> None:
        due, self.due = self.due, []
        for _, ready in due:
            ready()


def test_one_loop_that_is_stuck_starves_the_watchdog(service):
    notifier, _ = told(service, WATCHDOG_USEC="3000000", WATCHDOG_PID=str(os.getpid()))
    loops = [Timers(), Timers()]
    Watchdog(notifier, loops)
    assert {delay for loop in loops for delay, _ in loop.due} == {3_000_000_000 // FEEDS_PER_TIMEOUT}
    service.heard()
    for loop in loops:
        loop.turn()
    assert service.heard() == [("WATCHDOG=1", [])]
    for _ in range(5):
        loops[0].turn()
    assert service.heard() == []
    loops[1].turn()
    assert service.heard() == [("WATCHDOG=1", [])]
    notifier.close()
    other, _ = told(service, WATCHDOG_USEC="3000000", WATCHDOG_PID="1")
    Watchdog(other, loops := [Timers()])
    assert loops[0].due == []
    other.close()


def test_where_replicas_stay(tmp_path, service):
    notifier, nobody = told(service)[0], Notifier({})
    memory, disk = Path("/dev/shm"), Path("/proc")
    assert isinstance(shelf_of("auto", disk, notifier)[0], ServiceShelf) and isinstance(shelf_of("no", memory, notifier)[0], Memfds)
    assert isinstance(shelf_of("auto", memory, nobody)[0], Files) and isinstance(shelf_of("auto", disk, nobody)[0], Memfds)
    assert isinstance(shelf_of("files", memory, notifier)[0], Files)
    for where, directory in (("service", memory), ("files", disk)):
        with pytest.raises(BadConfig, match="Try: "):
            shelf_of(where, directory, nobody)
    notifier.close()


def test_replicas_belong_to_a_journal_in_a_boot(tmp_path):
    (tmp_path / "boot").write_text("one\n")
    journal = Journal(tmp_path / "journal.db")
    mark = owner_of(journal, str(tmp_path / "boot"))
    assert owner_of(journal, str(tmp_path / "boot")) == mark
    (tmp_path / "boot").write_text("two\n")
    assert owner_of(journal, str(tmp_path / "boot")) != mark
    journal.close()
    (tmp_path / "boot").write_text("one\n")
    other = Journal(tmp_path / "other.db")
    assert owner_of(other, str(tmp_path / "boot")) != mark
    other.close()


class Reloaded:
    """A daemon as far as a reload goes."""

    RELOADED = ("arena_bytes",)

    def __init__(self) -> None:
        self.config = NodeConfig(name="a")
        self.taken: list[int] = []

    def take_over(self, config) -> None:
        self.taken.append(config.arena_bytes)

    def summary(self) -> str:
        return "fine"


def test_a_reload_takes_over_what_it_can(service, caplog):
    notifier, daemon = told(service)[0], Reloaded()
    reread(daemon, notifier, lambda: NodeConfig(name="a", arena_bytes=1 << 21, window_bytes=1 << 25))
    assert daemon.taken == [1 << 21] and daemon.config.arena_bytes == 1 << 21 and daemon.config.window_bytes == NodeConfig(name="a").window_bytes
    assert "only a restart takes over window_bytes" in caplog.text
    heard = [text.splitlines()[0] for text, _ in service.heard()]
    assert heard == ["RELOADING=1", "READY=1"]

    def broken():
        raise BadConfig("node.toml:3: poll_ms: 0 is outside 1..10000. Try: poll_ms = 1")

    reread(daemon, notifier, broken)
    assert daemon.taken == [1 << 21] and "the configuration stays as it was: node.toml:3" in service.heard()[-1][0]
    notifier.close()


