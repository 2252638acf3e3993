"""The one thread of an engine process that talks to the node's daemon.

Knows: the socket, back-off, which attachments there are. Must not know: tables, steps, plans.

Invariants
- The engine's own threads never touch the socket: they leave a message in a bounded list and go on.
- A daemon that is slow, stopped, dead or restarted costs one connection attempt per back-off, and no memory that grows.
- Whenever a connection is made anew, the attachment is said again with its descriptors, before anything else.
- The thread holds a lifeline for as long as it serves anyone, and lets go before it ends: if it ends without, its process is dying. A rank brings it along.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from kvguard.engine import packets
from kvguard.engine.lifeline import Lifeline, held_by_this_thread
from kvguard.errors import BadFrame, KvguardError
from kvguard.format import local
from kvguard.limits import SOCKET_FDS_MAX

RETRY_S_MIN, RETRY_S_MAX, RETRY_GROWTH = 0.02, 2.0, 1.05  # the wait is a twentieth of how long the daemon has been away: a connect costs 20 us
OUTGOING_MAX = 8
DEFAULT_SOCKET = "/run/kvguard/kvguard.sock"
_log = logging.getLogger("kvguard.engine")


def socket_path(given: str | os.PathLike | None) -> str:
    """`given`, else $KVGUARD_SOCKET, else the socket of a daemon with the default runtime_dir."""
    return os.fspath(given) if given else os.environ.get("KVGUARD_SOCKET") or DEFAULT_SOCKET


class Session:
    """One attachment's line to the daemon. `attachment` gives the Attach and its descriptors (some to be closed after sending) whenever a connection is made;
    `received` is called in the client thread with each message and its descriptors, which it owns; it must not block."""

    def __init__(self, path: str, attachment: Callable[[], tuple[local.Local, list[int], list[int]]], received: Callable) -> None:
        self.path, self.attachment, self.received = path, attachment, received
        self.refused = ""
        self.line: socket.socket | None = None
        self.outgoing: deque[local.Local] = deque(maxlen=OUTGOING_MAX)
        self.attach_wanted, self.attach_said = 0, 0  # counted, so that a wish made while the last one is being said isn't lost
        self.ending = False
        self.ended = threading.Event()
        self.due = 0.0
        self.retry_s = RETRY_S_MIN

    @property
    def attached_anew(self) -> bool:
        """Whether the attachment is to be said (again)."""
        return self.attach_wanted != self.attach_said

    @property
    def connected(self) -> bool:
        return self.line is not None

    def waits(self) -> bool:
        """Whether something is to be tried at `due`: connecting, or saying what the daemon didn't take."""
        return not self.refused if self.line is None else bool(self.outgoing or self.attached_anew)

    def say(self, message: local.Local) -> None:
        """Leave a message for the client thread. Over OUTGOING_MAX unsent ones the oldest goes: the daemon asks again for what it misses."""
        self.outgoing.append(message)
        client().wake()

    def attach_again(self, attachment, received) -> None:
        """From now on this line speaks for another attachment (a standby that took a rank); the new Attach goes out on the same connection."""
        self.attachment, self.received = attachment, received
        self.attach_wanted += 1
        client().wake()

    def end(self, timeout_s: float = 1.0) -> None:
        """Say what is still unsaid if the daemon takes it at once, and close the line."""
        self.ending = True
        client().wake()
        self.ended.wait(timeout_s)


class Client:
    """The thread and its sessions."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._bell, selectors.EVENT_READ)
        self._lock = threading.Lock()
        self._sessions: list[Session] = []
        self._thread: threading.Thread | None = None
        self._lifeline: Lifeline | None = None  # of the thread that runs

    def wake(self) -> None:
        os.eventfd_write(self._bell, 1)

    def add(self, session: Session) -> None:
        with self._lock:
            self._sessions.append(session)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kvguard-client", daemon=True)
                self._thread.start()
        self.wake()

    def _run(self) -> None:
        lifeline = self._lifeline = held_by_this_thread()
        try:
            self._serve_all()
        finally:
            if lifeline is not None:
                lifeline.end()

    def _serve_all(self) -> None:
        """Until the last session has ended."""
        while True:
            with self._lock:
                sessions = list(self._sessions)
                if not sessions:
                    self._thread = None
                    return
            now = time.monotonic()
            for session in sessions:
                try:
                    self._serve(session, now)
                except Exception:  # one attachment's fault must not silence the others, nor reach the engine
                    _log.exception("kvguard: the line to the daemon failed; connecting again")
                    session.outgoing.clear()  # what could not be said would fail again on every line; the daemon asks again for what it misses
                    self._hang_up(session, now)
            waits = [session.due - now for session in sessions if session.waits()]
            for key, _ in self._selector.select(max(0.0, min(waits, default=60.0))):
                if key.fd == self._bell:
                    with contextlib.suppress(BlockingIOError):
                        os.eventfd_read(self._bell)

    def _serve(self, session: Session, now: float) -> None:
        if session.line is None and not session.refused and now >= session.due:
            self._connect(session, now)
        if session.line is not None:
            self._exchange(session, now)
        if session.ending:
            self._hang_up(session, now)
            with self._lock:
                self._sessions.remove(session)
            session.ended.set()

    def _connect(self, session: Session, now: float) -> None:
        line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            line.connect(session.path)
        except OSError:  # nobody there, or a backlog that is full
            line.close()
            self._later(session, now)
            return
        session.line = line
        session.attach_said = -1
        self._selector.register(line, selectors.EVENT_READ)

    def _exchange(self, session: Session, now: float) -> None:
        """Read what is there, then say what is to be said, without waiting for either."""
        try:
            if session.attached_anew:
                self._say_attachment(session)
            for _ in range(64):
                try:
                    message, descriptors = packets.receive_packet(session.line)
                except BlockingIOError:
                    break
                self._take(session, message, descriptors)
            if session.attached_anew and not session.ending:  # who has just ended, by what was read, has nothing left to attach with
                self._say_attachment(session)
            while session.outgoing:
                packets.send_packet(session.line, session.outgoing[0])
                session.outgoing.popleft()
        except BlockingIOError:  # it doesn't read: what is left waits for it (and for the next turn), bounded
            self._later(session, now)
        except (packets.Ended, BadFrame, OSError) as error:
            _log.info("kvguard: line to the daemon at %s lost (%s); connecting again", session.path, error)
            self._hang_up(session, now)

    def _say_attachment(self, session: Session) -> None:
        wanted = session.attach_wanted
        try:
            message, descriptors, temporary = session.attachment()
        except KvguardError as error:  # memory that can't be shared, a GPU that is lost: the next line would end as this one
            session.refused = str(error)
            _log.error("kvguard: this process can't be protected: %s", error)
            raise packets.Ended("there is nothing to attach with") from error
        if isinstance(message, local.Attach) and message.role == "rank" and self._lifeline is not None and len(descriptors) < SOCKET_FDS_MAX:
            message, descriptors = msgspec.structs.replace(message, lifeline=True), [*descriptors, self._lifeline.fd]
        try:
            packets.send_packet(session.line, message, descriptors)
            session.attach_said = wanted
        finally:
            packets.close_all(temporary)

    def _take(self, session: Session, message: local.Local, descriptors: list[int]) -> None:
        if isinstance(message, local.Attached):
            session.retry_s = RETRY_S_MIN
        elif isinstance(message, local.AttachRefused):
            _log.warning("kvguard: the daemon at %s refused the attachment: %s", session.path, message.reason)
            if message.final:
                session.refused = message.reason
        session.received(message, descriptors)
        if isinstance(message, local.AttachRefused) and not message.final:
            raise packets.Ended("refused for now")  # on this line nobody would ask again

    def _later(self, session: Session, now: float) -> None:
        session.due = now + session.retry_s
        session.retry_s = min(RETRY_GROWTH * session.retry_s, RETRY_S_MAX)

    def _hang_up(self, session: Session, now: float) -> None:
        if session.line is not None:
            line, session.line = session.line, None  # whoever learns of the end from the other side finds this one disconnected
            self._selector.unregister(line)
            line.close()
        self._later(session, now)  # also where there was no line yet: no descriptor is left, say


_client: Client | None = None
_client_lock = threading.Lock()


def client() -> Client:
    """This process's client; a forked child makes its own."""
    global _client
    with _client_lock:
        if _client is None or _client.pid != os.getpid():
            _client = Client()
        return _client
