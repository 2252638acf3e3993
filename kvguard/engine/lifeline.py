"""A word of shared memory that the kernel marks when the thread that holds it ends without letting go: the earliest sign of a process's death.

A killed process's pidfd becomes readable when its memory has been torn down (25 to 100 ms for a process with weights); its robust futexes are walked before.

Knows: robust futexes (set_robust_list(2), futex(2)), mappings. Must not know: who holds, who watches, what follows from it. Used by both ends of the socket.

Invariants
- Who ends in order lets go first: the end of a thread or of an interpreter is no sign of death. A forked child's end is not its parent's.
- The watcher maps the page for reading alone and takes no lock: whatever an engine writes there costs it a bounded number of wake-ups and its early sign.
- Nobody needs a lifeline: where the kernel, the CPU or the memory for it isn't there, a death is seen through the pidfd alone.
"""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import logging
import mmap
import os
import platform
import threading

import numpy as np

from kvguard.errors import Refused

PAGE_BYTES = mmap.PAGESIZE
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
WAITERS, OWNER_DIED, OWNER = 0x80000000, 0x40000000, 0x3FFFFFFF  # of a futex word, as the kernel reads them
WORD_AT, NODE_AT = 0, 8  # in the shared page: the word, and its link in the holder's robust list
HEAD_BYTES = 24  # struct robust_list_head: the first link, the distance from a link to its word, the pending link
WAKES_MAX = 64  # without a change: interrupted calls, or an engine that rings for nothing
JOINS_MAX = 1000
FUTEX_WAIT, FUTEX_WAKE = 0, 1
ALL = 0x7FFFFFFF
CALLS = {"x86_64": (202, 273), "aarch64": (98, 99)}  # futex, set_robust_list
_futex_call, _set_list_call = CALLS.get(platform.machine(), (0, 0)) if ctypes.sizeof(ctypes.c_void_p) == 8 else (0, 0)
_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger("kvguard.engine")


class Lifeline:
    """The word, held by the thread that made this, until it calls `end`, or the process dies. `fd`: the page, for whoever shall watch it."""

    def __init__(self) -> None:
        """Raises OSError where there can be none."""
        if not _futex_call:
            raise OSError(f"robust futexes of {platform.machine()} are not known here")
        self._pid = os.getpid()
        self.fd = os.memfd_create("kvguard-lifeline", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, PAGE_BYTES)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            self._words = np.frombuffer(mmap.mmap(self.fd, PAGE_BYTES), np.uint32)
            self._head = np.frombuffer(mmap.mmap(-1, PAGE_BYTES), np.int64)  # the kernel reads it at the thread's end: pages of its own, not of a heap
            node = self._words.ctypes.data + NODE_AT
            self._head[:3] = node, WORD_AT - NODE_AT, 0
            self._words[NODE_AT // 4 : NODE_AT // 4 + 2].view(np.uint64)[0] = self._head.ctypes.data
            self._words[0] = threading.get_native_id() | WAITERS
            _call(_set_list_call, self._head.ctypes.data, HEAD_BYTES)
        except BaseException:
            os.close(self.fd)
            raise
        atexit.register(self.let_go)

    def let_go(self) -> None:
        """From now on the holder's end is no sign of anything. Any thread."""
        if os.getpid() == self._pid:
            self._words[0] = 0
            _call(_futex_call, self._words.ctypes.data, FUTEX_WAKE, ALL, 0, 0, 0)

    def end(self) -> None:
        """Let go, and take everything down. The holding thread, once."""
        atexit.unregister(self.let_go)
        self.let_go()
        _call(_set_list_call, 0, HEAD_BYTES)
        os.close(self.fd)


_told_of_none = threading.Event()


def held_by_this_thread() -> Lifeline | None:
    """A lifeline for the rest of this thread's life; None where there can be none, which is said once."""
    try:
        return Lifeline()
    except OSError as error:
        if not _told_of_none.is_set():
            _told_of_none.set()
            _log.warning("kvguard: no early sign of this process's death (%s): its daemon sees it when its memory is gone", str(error))
        return None


class Watch:
    """The other end. `bell`: an eventfd, readable (and never emptied) once the holder has ended without letting go."""

    def __init__(self, fd: int) -> None:
        """`fd` stays the caller's. Raises Refused for anything but a page that can't shrink."""
        refuse_other(fd)
        self._words = np.frombuffer(mmap.mmap(fd, PAGE_BYTES, prot=mmap.PROT_READ), np.uint32)
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closing = False
        self._thread = threading.Thread(target=self._wait, name="kvguard-lifeline", daemon=True)
        try:
            self._thread.start()
        except BaseException:
            os.close(self.bell)
            raise

    def _wait(self) -> None:
        address = self._words.ctypes.data
        value = int(self._words[0])
        for _ in range(WAKES_MAX):
            if self._closing or not value & OWNER or not value & WAITERS or value & OWNER_DIED:
                break  # `value & OWNER_DIED` with an owner is nothing that a kernel writes
            _call(_futex_call, address, FUTEX_WAIT, value, 0, 0, 0)
            value, before = int(self._words[0]), value
            if value != before:
                break
        if not self._closing and value & OWNER_DIED and not value & OWNER:
            os.eventfd_write(self.bell, 1)
            _call(_futex_call, address, FUTEX_WAKE, ALL, 0, 0, 0)  # the kernel wakes one; another attachment of the same process may have its own

    @property
    def ended(self) -> bool:
        """Whether nothing more can come of it."""
        return not self._thread.is_alive()

    def close(self) -> None:
        """Idempotent. The waiting thread is woken; one that doesn't come (JOINS_MAX) keeps its memory and its bell, and nobody waits for it."""
        self._closing = True
        for _ in range(JOINS_MAX):
            if not self._thread.is_alive():
                break
            _call(_futex_call, self._words.ctypes.data, FUTEX_WAKE, ALL, 0, 0, 0)
            self._thread.join(0.001)
        else:
            return
        if self.bell >= 0:
            os.close(self.bell)
            self.bell = -1


def refuse_other(fd: int) -> None:
    """Raises Refused where the descriptor is no page of shared memory, or one that could shrink under a reader."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    except OSError:
        sealed = False
    if not sealed or os.fstat(fd).st_size != PAGE_BYTES:
        raise Refused("the lifeline is not a sealed page of shared memory. Try: kvguard.engine.attach")


def _call(number: int, *arguments: int) -> int:
    """A system call; the interpreter's lock is given up meanwhile. Raises OSError, but for what a futex call says in its daily work."""
    done = _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(argument) for argument in arguments))
    if done == -1 and number == _set_list_call:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return done
