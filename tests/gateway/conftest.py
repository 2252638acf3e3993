"""A gateway on loopback in a thread of the test, with backends as processes of their own, so that they can be killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from kvguard.config import GatewayConfig
from kvguard.errors import KvguardError, TimedOut
from kvguard.gateway import process
from kvguard.types import Epoch, Rank, ResumeToken
from tests.gateway import toy_model

BACKEND = Path(__file__).with_name("fake_backend.py")
ROOT = Path(__file__).resolve().parents[2]


class Backend:
    """A fake vLLM. `node`: (instance, socket) of the kvguard node beside it. `port`: of a former one that is started again."""

    def __init__(self, directory: Path, node: tuple[str, str] = (), port: int = 0) -> None:
        self.node = node
        with socket.create_server(("127.0.0.1", port)) as bound:
            self.port = bound.getsockname()[1]
            self.url = f"http://127.0.0.1:{self.port}"
            with open(directory / "backends.log", "ab") as log:
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                command = [sys.executable, str(BACKEND), str(bound.fileno()), *node]
                self.popen = subprocess.Popen(command, pass_fds=[bound.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)

    def wait(self) -> None:
        until("a backend to answer", self._answers)

    def _answers(self) -> bool:
        assert self.popen.poll() is None, "the backend ended"
        try:
            return httpx.get(f"{self.url}/health", timeout=1, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def set(self, **settings) -> None:
        httpx.post(f"{self.url}/control", json=settings, timeout=5, trust_env=False)

    @property
    def seen(self) -> dict:
        return httpx.get(f"{self.url}/control", timeout=5, trust_env=False).json()

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        assert self.popen.wait() == -signal.SIGKILL


def until(what: str, condition, timeout_s: float = 20.0):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.01)  # between two looks at a condition with a deadline
    raise AssertionError(f"waited in vain for {what}")


class Pool:
    """Backends that outlived their test serve the next one: starting them takes longer than the tests."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._idle = directory, []

    def take(self, count: int) -> list[Backend]:
        while len(self._idle) < count:
            self._idle.append(Backend(self._directory))
        taken, self._idle = self._idle[:count], self._idle[count:]
        for backend in taken:
            backend.wait()
        return taken

    def give(self, backend: Backend) -> None:
        if backend.popen.poll() is None:
            backend.set(reset=True)
            until("its streams to end", lambda: backend.seen["open"] == 0)
            backend.set(reset=True)
            self._idle.append(backend)

    def close(self) -> None:
        for backend in self._idle:
            backend.kill()


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    made = Pool(tmp_path_factory.mktemp("backends"))
    yield made
    made.close()


class Resumption:
    """As the emitter's, from a test's hand."""

    def __init__(self, epoch: Epoch, tokens) -> None:
        self.epoch, self.tokens, self.moved, self.timing_ms = epoch, tuple(tokens), True, {"detect": 1.0}

    def __iter__(self):
        return iter(self.tokens)


class FakeEmitter:
    """The emitter's face, moved by a test: fence(), then recover() or fail()."""

    def __init__(self, instance: str) -> None:
        self.instance, self.members = instance, ()
        self.deliveries: list[str] = []
        self.adopted = Epoch(1, "c")
        self._bell = os.eventfd(0, os.EFD_NONBLOCK)
        self._changed = threading.Condition()
        self._announced = self.adopted
        self._ended: Resumption | str | None = None
        self.closed = False
        self.in_flight = 0

    def fileno(self) -> int:
        return self._bell

    @property
    def fenced(self):
        return self._announced if self._announced > self.adopted else None

    @property
    def epoch(self) -> Epoch:
        return self.adopted

    def scheduled(self, count: int) -> None:
        self.in_flight = count

    def progress(self, count: int) -> None:
        self.progressed = count

    def delivered(self, sequences) -> None:
        self.deliveries += [sequences] if isinstance(sequences, str) else list(sequences)

    def fence(self) -> None:
        with self._changed:
            self._announced = Epoch(self._announced.counter + 1, "c")
            os.eventfd_write(self._bell, 1)

    def recover(self, tokens=()) -> None:
        with self._changed:
            self._ended = Resumption(self._announced, tokens)
            self._changed.notify_all()

    def fail(self, why: str) -> None:
        with self._changed:
            self._ended = why
            self._changed.notify_all()

    def resume(self, timeout: float) -> Resumption:
        with self._changed:
            self._changed.wait_for(lambda: self._ended is not None or self.closed, timeout)
            if self.closed:
                raise KvguardError("closed")
            if self._ended is None:
                raise TimedOut("not yet")
            if isinstance(self._ended, str):
                raise KvguardError(self._ended)
            return self._ended

    def adopt(self, resumption: Resumption) -> None:
        with self._changed:
            os.eventfd_read(self._bell)
            self.adopted, self._ended = resumption.epoch, None

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()
        os.close(self._bell)


class World:
    """Backends by name, their fake emitters, and the gateway in front of them."""

    def __init__(self, directory: Path, pool: Pool) -> None:
        self.directory, self._pool = directory, pool
        self.backends: dict[str, Backend] = {}
        self.emitters: dict[str, FakeEmitter] = {}
        self.url = ""
        self._serving = None
        self._thread: threading.Thread | None = None

    def start(self, *names: str, dial=None, send_buffer: int = 0, sockets: dict[str, str] | None = None, **settings) -> World:
        """`sockets`: of the nodes beside the instances; without, the backends know nothing of kvguard."""
        self._own = bool(sockets)
        if sockets:
            self.backends = {name: Backend(self.directory, (name, sockets[name])) for name in names}
            for backend in self.backends.values():
                backend.wait()
        else:
            self.backends = dict(zip(names, self._pool.take(len(names)), strict=True))
        toy_model.save(self.directory)
        lines = tuple(f"{name} {backend.url} {'' if sockets else 'node-'}{name.removeprefix('toy-')}" for name, backend in self.backends.items())
        values = {"listen": "http://127.0.0.1:0", "probe_ms": 50, "fence_ms": 1000, "resume_ms": 20_000, "idle_ms": 20_000, "drain_ms": 5000, **settings}
        self.settings = GatewayConfig(instances=lines, tokenizer=str(self.directory), **values)
        self._serve(dial or self._dial, send_buffer)
        self.until_active(len(names))
        return self

    def start_gateway_again(self, dial) -> None:
        """Another gateway, when the former one has ended; its port may be another one. Returns before any instance is active."""
        self._end_gateway()
        self._serve(dial)

    def _serve(self, dial, send_buffer: int = 0) -> None:
        self._serving = process.server(self.settings, dial)
        bound = process.listening(self.settings)
        if send_buffer:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # its connections inherit it
        self.url = f"http://127.0.0.1:{bound.getsockname()[1]}"

        def serve() -> None:
            with bound:
                asyncio.run(self._serving.serve(sockets=[bound]))

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()
        until("the gateway", lambda: self._serving.started or not self._thread.is_alive())

    def _end_gateway(self) -> None:
        self._serving.should_exit = True
        self._thread.join(20)
        assert not self._thread.is_alive(), "the gateway doesn't end"

    def _dial(self, instance: str) -> FakeEmitter:
        return self.emitters.setdefault(instance, FakeEmitter(instance))

    def start_again(self, name: str) -> None:
        """A dead backend, at the same address and beside the same node."""
        dead = self.backends[name]
        assert dead.popen.poll() is not None, "it lives"
        self.backends[name] = Backend(self.directory, dead.node, dead.port)
        self.backends[name].wait()

    def until_active(self, count: int) -> None:
        until(f"{count} active instances", lambda: self.get("/ready").json()["active_instances"] == count)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=10, trust_env=False)

    def post(self, path: str, body=None, **arguments) -> httpx.Response:
        return httpx.post(self.url + path, **({"json": body} if body is not None else {}), **arguments, timeout=30, trust_env=False)

    def metric(self, name: str, **labels) -> float:
        """A sample of /metrics, 0 where it isn't there."""
        wanted = name + ("{" + ",".join(f'{key}="{value}"' for key, value in sorted(labels.items())) + "}" if labels else "") + " "
        lines = self.get("/metrics").text.splitlines()
        return next((float(line.removeprefix(wanted)) for line in lines if line.startswith(wanted)), 0.0)

    def in_flight(self, name: str) -> list[dict]:
        return [one for one in self.backends[name].seen["requests"] if one["path"] == "/v1/completions"]

    def token(self, name: str, request: dict, places=("b",), rung: str = "replica", ids=None) -> ResumeToken:
        """What a recovery of `name` would say of a request that its backend saw: `ids` are what the dead engine had emitted."""
        body, key = request["body"], request["headers"]["x-request-id"]
        known = [*body["prompt"], *(ids or [])]
        position = max(len(known) - 1, 0)
        where = tuple((Rank(0, 0, 0), f"node-{place}") for place in places)
        return ResumeToken(name, f"{key}-1234abcd", Epoch(2, "c"), position, tuple(known[position:]), tuple(known[:position]), b"", b"", rung, where, b"p" * 32)

    def stop(self) -> None:
        if self._serving is not None:
            self._end_gateway()
        for backend in self.backends.values():
            if self._own:
                if backend.popen.poll() is None:
                    backend.kill()
            else:
                self._pool.give(backend)


@pytest.fixture
def world(tmp_path, pool):
    made = World(tmp_path, pool)
    yield made
    made.stop()


def events_of(response: httpx.Response) -> list[dict | str]:
    """The events of a stream, [DONE] as a text."""
    found = []
    for line in response.iter_lines():
        if line.startswith("data: "):
            found.append("[DONE]" if line == "data: [DONE]" else json.loads(line[6:]))
    return found
