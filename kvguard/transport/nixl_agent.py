"""NIXL, loaded when it is asked for: agents without threads of its own that move anything, errors as OSError, and which transport UCX really chose.

Knows: the bindings of nixl-cu12 or nixl-cu13, the environment that UCX reads, UCX's own log. Must not know: links, frames, who may be met.
Invariants: nothing is imported before load(); every failure of the library leaves here as ChannelLost; an agent's name is used once; close() frees its sockets.

UCX takes its settings from environment variables, when a context is made, and tells what it chose in its log alone. So the variables are set around each
agent's making, and the log goes to a memfd, which is emptied when it is read. NIXL's Python layer would send its log to stdout: it is turned off.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvguard.errors import BadConfig

PACKAGES = ("nixl_cu12", "nixl_cu13")
BACKEND = "UCX"
LOG_BYTES_MAX = 1 << 20
LOOPBACK_DEVICES = {"lo"}
UCX = {"UCX_PROTO_INFO": "y", "UCX_HANDLE_ERRORS": "none"}  # what it chose is logged; this process's signals are its own
WRITES = "remote memory write by ucp_put"
TITLE = re.compile(r"\| (?P<agent>\S+) (?P<where>\S+) cfg#")
ROW = re.compile(r"\|\s*\S+\s*\|[^|]*\|\s*(?P<config>[^|]*?)\s*\|")


class ChannelLost(OSError):
    """The data path can't go on. `silent`: nothing was heard, or nothing got through, in time, although the peer's control connection lives."""

    def __init__(self, reason: str, silent: bool = False):
        super().__init__(reason)
        self.silent = silent


@dataclass(frozen=True)
class NixlSettings:
    """`devices`: UCX_NET_DEVICES, always said: UCX listens at every interface else. `tls`: UCX_TLS. `zone_bytes`: what one peer may have landed here.

    `lent_bytes`: memory to make payloads in, of the whole process. `stuck_ms`: a write that nobody takes for so long ends its link. `quarantine_s`: how long
    the addresses of a zone whose link is over are given to nobody else; 0 for as long as the process lives.
    """

    devices: str
    tls: str = "rc,dc,ud"
    zone_bytes: int = 32 << 20
    lent_bytes: int = 32 << 20
    stuck_ms: int = 10_000
    beat_ms: int = 1_000
    quarantine_s: int = 0

    def check(self, insecure: bool) -> None:
        """Raises BadConfig. UCX's TCP writes wherever in a process whoever can connect says, and asks nobody for a key."""
        if not self.devices:
            raise BadConfig('nixl needs its network devices written out, because it has no authentication of its own. Try: nixl_devices = "mlx5_0:1"')
        if "tcp" in self.tls.split(",") and not insecure and not set(self.devices.split(",")) <= LOOPBACK_DEVICES:
            raise BadConfig(
                f"nixl over TCP on {self.devices!r} lets whoever reaches this network write into this process. "
                'Try: nixl_tls = "rc,dc,ud", transport = "zeromq", or insecure = true if that is meant'
            )


@dataclass(frozen=True)
class Registered:
    """A payload in memory that the transport was told of (ZeromqTransport.register): `device` is a GPU's number, None for host memory."""

    address: int
    size: int
    device: int | None

    def __len__(self) -> int:
        return self.size


class Library:
    """The bindings, once a process."""

    def __init__(self, bindings, package: str, version: str, log_fd: int):
        self.bindings, self.package, self.version, self._log_fd = bindings, package, version, log_fd
        found = (getattr(bindings, name) for name in dir(bindings) if name.endswith("Error"))
        self.chosen: dict[str, str] = {}  # by agent
        self.errors = tuple(error for error in found if isinstance(error, type) and issubclass(error, Exception))

    def log_path(self) -> str:
        """UCX opens it with its first context."""
        return f"/proc/self/fd/{self._log_fd}"

    def said(self) -> str:
        """What UCX has logged since the last call; the log is empty afterwards, and `chosen` up to date."""
        ctypes.CDLL(None).fflush(None)  # it writes through stdio
        size = os.fstat(self._log_fd).st_size
        text = os.pread(self._log_fd, LOG_BYTES_MAX, max(0, size - LOG_BYTES_MAX)).lstrip(b"\0").decode(errors="replace")
        os.ftruncate(self._log_fd, 0)
        text = text.replace("\0", "")
        self.chosen.update(chosen(text))
        return text


_loaded: Library | None = None


def load() -> Library:
    """Raises BadConfig where neither package is installed, or the one that is can't be used."""
    global _loaded
    if _loaded is None:
        log_fd = os.memfd_create("kvguard-ucx-log")
        with environment({"NIXL_LOG_LEVEL": os.environ.get("NIXL_LOG_LEVEL", "FATAL")}):
            try:
                _loaded = _import(log_fd)
            except BadConfig:
                os.close(log_fd)
                raise
    return _loaded


def _import(log_fd: int) -> Library:
    reasons = []
    for package in PACKAGES:
        try:
            bindings = importlib.import_module(f"{package}._bindings")
        except ImportError as error:
            reasons.append(str(error))
            continue
        quiet = logging.getLogger("nixl")
        quiet.handlers.clear()
        quiet.setLevel(logging.ERROR)
        from importlib.metadata import version

        return Library(bindings, package, version(package.replace("_", "-")), log_fd)
    raise BadConfig(f"nixl can't be imported ({'; '.join(reasons)}). Try: pip install --no-deps nixl-cu12 (or nixl-cu13), or transport = \"zeromq\"")


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def event_descriptors() -> set[int]:
    """This process's epoll descriptors."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}") == "anon_inode:[eventpoll]":
                found.add(int(name))
        except FileNotFoundError:
            continue  # the listing's own
    return found


def rehearse(settings: NixlSettings) -> str:
    """The first agent of a process loads plugins for half a second: not in the loop, please. Returns what is wrong with these settings, "" for nothing."""
    try:
        Agent(life_name(), settings).close()
    except BadConfig as error:
        return str(error)
    return ""


def life_name() -> str:
    """For one agent: of one channel of one incarnation, never used again. UCX cuts longer names."""
    return f"kvg-{os.urandom(8).hex()}"


class Agent:
    """One life of one end of one channel. Raises BadConfig where UCX can't be opened with these settings, ChannelLost elsewhere.

    `bells`: epoll descriptors that UCX has opened for itself, readable when a socket of its has something. They are a hint that saves polling over TCP;
    nothing relies on them, and adapters that complete without the kernel ring none.
    """

    def __init__(self, name: str, settings: NixlSettings):
        self._library = load()
        self.name, bindings = name, self._library.bindings
        config = bindings.nixlAgentConfig()
        config.useProgThread = config.useListenThread = config.captureTelemetry = False  # its progress thread would burn a core
        config.syncMode = bindings.NIXL_THREAD_SYNC_NONE
        before = event_descriptors()
        with environment({**UCX, "UCX_NET_DEVICES": settings.devices, "UCX_TLS": settings.tls, "UCX_LOG_FILE": self._library.log_path()}):
            try:
                self._agent = bindings.nixlAgent(name, config)
                self._backend = [self._agent.createBackend(BACKEND, {})]
            except self._library.errors as error:
                reason = last_line(self._library.said()) or str(error)
                raise BadConfig(f"UCX opens no {settings.tls!r} on {settings.devices!r}: {reason}. Try: another nixl_tls or nixl_devices") from error
        self.bells = event_descriptors() - before
        self.peer = ""
        self._success = bindings.NIXL_SUCCESS
        self._starting, self._asking = self._lost("a write can't be started"), self._lost("a write failed")
        self._telling, self._reading = self._lost("a note can't be sent"), self._lost("notes can't be read")

    def close(self) -> None:
        """Ends every connection and what is under way, with peers that are stopped as well; waits for nobody."""
        self._agent = _Closed()
        self._library.chosen.pop(self.name, None)

    def register(self, address: int, size: int, device: int | None = None) -> None:
        """Memory that may be written from and to until close(); `device`: a GPU's number where it is VRAM."""
        bindings = self._library.bindings
        kind = bindings.DRAM_SEG if device is None else bindings.VRAM_SEG
        with self._lost("memory can't be registered"):
            self._agent.registerMem(bindings.nixlRegDList(kind, [(address, size, device or 0, "")]), self._backend)

    def metadata(self, address: int, size: int) -> bytes:
        """What a peer needs to reach this agent and to write to these registered bytes: the keys of nothing else that is registered, before or after."""
        lent = self._library.bindings.nixlRegDList(self._library.bindings.DRAM_SEG, [(address, size, 0, "")])
        with self._lost("no metadata"):
            return self._agent.getLocalPartialMD(lent, True, self._backend)

    def meet(self, name: str, metadata: bytes) -> None:
        """Load the peer's metadata, which came over an authenticated connection."""
        with self._lost("the peer's metadata can't be used"):
            told = self._agent.loadRemoteMD(metadata)
            self.peer = told.decode() if isinstance(told, bytes) else told
            if self.peer != name:
                raise ChannelLost(f"metadata of {self.peer!r} where {name!r} was to be met")
            self._agent.makeConnection(self.peer, self._backend)

    def write(self, parts: list[tuple[int, int, int]], note: bytes, device: int | None = None) -> int:
        """Start writing `parts`, each (registered address here, address in the peer's, bytes), as one; `note` is told to it behind the last byte of all.

        `device`: a GPU's number where the sources are VRAM. Returns the write, for is_done().
        """
        bindings = self._library.bindings
        kind = bindings.DRAM_SEG if device is None else bindings.VRAM_SEG
        here = bindings.nixlXferDList(kind, [(source, size, device or 0) for source, _, size in parts])
        there = bindings.nixlXferDList(bindings.DRAM_SEG, [(target, size, 0) for _, target, size in parts])
        with self._starting:
            write = self._agent.createXferReq(bindings.NIXL_WRITE, here, there, self.peer, note, self._backend)
            self._agent.postXferReq(write)
        return write

    def is_done(self, write: int) -> bool:
        """The note leaves in this call: it has to be asked."""
        with self._asking:
            return self._agent.getXferStatus(write) == self._success

    def release(self, write: int) -> None:
        with self._asking:
            self._agent.releaseXferReq(write)

    def tell(self, note: bytes) -> None:
        with self._telling:
            self._agent.genNotif(self.peer, note, self._backend)

    def told(self) -> dict[str, list[bytes]]:
        """Notes by agent; this call is what makes UCX work on what has come in."""
        with self._reading:
            return self._agent.getNotifs({}, self._backend)

    def carrier(self) -> str:
        """What UCX writes large payloads over, as it logged when this agent first did: "rc_mlx5/mlx5_0:1", "cma/memory", "tcp/lo"; "?" if it didn't."""
        self._library.said()
        return self._library.chosen.get(self.name, "?")

    def _lost(self, what: str) -> _Lost:
        return _Lost(what, self._library.errors)


class _Lost:
    """The library's errors leave as ChannelLost. Made once and entered for every frame: a generator's frame would cost as much as the call inside."""

    __slots__ = ("_what", "_errors")

    def __init__(self, what: str, errors: tuple[type[Exception], ...]):
        self._what, self._errors = what, errors

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, trace) -> None:
        if kind is not None and issubclass(kind, self._errors):
            raise ChannelLost(f"{self._what}: {error}") from error


class _Closed:
    """In the place of an agent that has ended: whatever is asked of it."""

    def __getattr__(self, name: str):
        raise ChannelLost("closed")


def chosen(logged: str) -> dict[str, str]:
    """By agent the last row, for the largest sizes, of the table that UCX logs for writes from host memory to another process."""
    lines, found = logged.splitlines(), {}
    for index, line in enumerate(lines):
        title = TITLE.search(lines[index - 1]) if index and WRITES in line else None
        if title is None or title["where"] == "self":
            continue
        for row in lines[index + 4 :]:
            cells = ROW.search(row)
            if cells is None:
                break
            found[title["agent"]] = cells["config"]
    return found


def last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if "ERROR" in line]
    return lines[-1].split("ERROR", 1)[1].strip()[:200] if lines else ""
