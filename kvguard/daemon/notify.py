"""What a service manager is told, and what it hands over at the start: systemd's notification protocol, the parts that daemons here need.

Knows: the environment's words (NOTIFY_SOCKET, WATCHDOG_USEC, LISTEN_FDS, FDSTORE), datagrams with descriptors. Must not know: what runs, what is kept.
Invariants: no call blocks or raises because of a manager that doesn't listen: what it didn't take is counted; the words leave the environment, so that no child
speaks for this process; the watchdog is fed by a turn of every loop of the process and by nothing else, and only while the other threads move or are known not
to.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Callable, Iterable, MutableMapping

from kvguard.daemon.loop import Loop

log = logging.getLogger(__name__)

FIRST_DESCRIPTOR = 3
WORDS = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID", "FDSTORE")
FEEDS_PER_TIMEOUT = 3
TAKE_S = 0.2  # how long a descriptor may wait for room in the manager's queue; everything else is dropped at once


class Notifier:
    """`present`: a manager listens. `watchdog_ns`: it wants to hear of progress within this time, 0: it doesn't. `inherited`: descriptors by name, once."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Takes the manager's words out of `environ`."""
        words = {word: environ.pop(word) for word in WORDS if word in environ}
        address = words.get("NOTIFY_SOCKET", "")
        self.dropped = 0
        self.watchdog_ns = 0
        self._last_status = ""
        self._socket = None
        if address.startswith(("/", "@")):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            self._address = "\0" + address[1:] if address.startswith("@") else address
        mine = str(os.getpid())
        if self.present and words.get("WATCHDOG_USEC", "").isdigit() and words.get("WATCHDOG_PID", mine) == mine:
            self.watchdog_ns = int(words["WATCHDOG_USEC"]) * 1000
        self._inherited = _inherited(words) if words.get("LISTEN_PID") == mine else {}

    @property
    def present(self) -> bool:
        return self._socket is not None

    def inherited(self) -> dict[str, int]:
        """Descriptors that the manager kept for this unit, by name; the caller's from now on."""
        found, self._inherited = self._inherited, {}
        return found

    # ---- said -------------------------------------------------------------------------------------------------------------------

    def ready(self, status: str) -> None:
        self._last_status = status
        self._say(f"READY=1\nSTATUS={_line(status)}")

    def status(self, status: str) -> None:
        """One line for people, said when it changes."""
        if status != self._last_status:
            self._last_status = status
            self._say(f"STATUS={_line(status)}")

    def reloading(self) -> None:
        """Followed by `ready`."""
        self._say(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        self._say("STOPPING=1")

    def alive(self) -> None:
        self._say("WATCHDOG=1")

    # ---- kept -------------------------------------------------------------------------------------------------------------------

    def keep(self, name: str, descriptor: int) -> bool:
        """The manager holds a duplicate under `name` until `forget`, across lives of this process. False where it didn't take it."""
        return self._say(f"FDSTORE=1\nFDPOLL=0\nFDNAME={name}", descriptor)

    def forget(self, name: str) -> None:
        """All that is held under `name` goes."""
        self._say(f"FDSTOREREMOVE=1\nFDNAME={name}", wait_s=TAKE_S)

    def _say(self, text: str, descriptor: int | None = None, wait_s: float = 0.0) -> bool:
        if self._socket is None:
            return False
        rights = [] if descriptor is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", descriptor))]
        try:
            self._socket.settimeout(wait_s if descriptor is None else TAKE_S)
            self._socket.sendmsg([text.encode()], rights, 0, self._address)
        except OSError as error:
            self.dropped += 1
            quiet = isinstance(error, TimeoutError | BlockingIOError) or error.errno == errno.ENOBUFS
            log.log(logging.DEBUG if quiet else logging.WARNING, "the service manager didn't take %s: %s", text.partition("=")[0], error)
            return False
        return True

    def close(self) -> None:
        for descriptor in self.inherited().values():
            os.close(descriptor)
        if self._socket is not None:
            self._socket.close()


class Watchdog:
    """Feeds the manager's watchdog while every loop of the process takes its turns and `progressing` says that so do all other threads: one that is stuck,
    and isn't known to be, starves it."""

    def __init__(self, notifier: Notifier, loops: Iterable[Loop], progressing: Callable[[], bool] = lambda: True) -> None:
        self._notifier = notifier
        self._progressing = progressing
        self._loops = tuple(loops)
        self._turned: set[int] = set()
        self._period_ns = notifier.watchdog_ns // FEEDS_PER_TIMEOUT
        for number in range(len(self._loops) if self._period_ns else 0):
            self._turn(number)

    def _turn(self, number: int) -> tuple:
        self._turned.add(number)
        if len(self._turned) == len(self._loops) and self._progressing():
            self._turned.clear()
            self._notifier.alive()
        self._loops[number].after(self._period_ns, lambda: self._turn(number))
        return ()


def _line(text: str) -> str:
    return " ".join(text.split())


def _inherited(words: dict[str, str]) -> dict[str, int]:
    """What the manager passed, closed on exec; of one name the last counts."""
    count = int(words["LISTEN_FDS"]) if words.get("LISTEN_FDS", "").isdigit() else 0
    names = words.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for number in range(count):
        descriptor = FIRST_DESCRIPTOR + number
        with contextlib.suppress(OSError):
            os.set_inheritable(descriptor, False)
            name = names[number] if number < len(names) else "unknown"
            if name in found:
                os.close(found[name])
            found[name] = descriptor
    return found
