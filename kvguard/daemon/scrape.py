"""The HTTP port that Prometheus reads: a thread that asks the loop for its figures and waits a bounded time.

Knows: prometheus_client's server, a loop that calls back. Must not know: which figures there are (metrics.py).
Invariants: the core is read in the loop's own thread alone; a scrape never makes the loop wait, and costs one turn; at most QUESTIONS_MAX scrapes wait, more
are answered with an error at once; who connects and says nothing is hung up on after SILENT_S, and beyond CONNECTIONS_MAX at once: this port asks for no key,
and must not cost the daemon its descriptors; close() leaves no thread and no socket.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from wsgiref.simple_server import WSGIServer

from prometheus_client import start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from kvguard.config import ADDRESS
from kvguard.core.events import Event
from kvguard.daemon.loop import Loop
from kvguard.errors import BadConfig, KvguardError

log = logging.getLogger(__name__)

WAIT_S = 2.0
QUESTIONS_MAX = 16
SILENT_S = 5.0
CONNECTIONS_MAX = 32


class Scrapes(Collector):
    """Serves `families()` at http://HOST:PORT/metrics. `address`: tcp://HOST:PORT, port 0 takes a free one. Raises BadConfig."""

    def __init__(self, address: str, loop: Loop, families: Callable[[], Iterable[Metric]]) -> None:
        self._families, self._loop = families, loop
        self._asked: deque[Future] = deque()
        registry = CollectorRegistry()
        found = ADDRESS.fullmatch(address)
        if found is None:
            raise BadConfig(f"metrics address {address!r} isn't tcp://HOST:PORT. Try: tcp://127.0.0.1:9464")
        host, port = found["host"].strip("[]"), int(found["port"])
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        try:
            self._server, self._thread = start_http_server(port, host, registry)
        except OSError as error:
            os.close(self._bell)
            raise BadConfig(f"metrics can't be served at {address}: {error.strerror or error}. Try: another port in `metrics`") from error
        bound_connections(self._server)
        self.port: int = self._server.server_port
        registry.register(self)
        loop.watch(self._bell, self._answer)
        log.info("metrics are served at http://%s:%d/metrics", host, self.port)

    def describe(self) -> Iterable[Metric]:
        return ()  # registering must not ask a loop that doesn't run yet

    def collect(self) -> Iterable[Metric]:
        """In the server's thread, for each scrape. Raises KvguardError, which makes the scrape fail: old figures would look like new ones."""
        if len(self._asked) >= QUESTIONS_MAX:
            raise KvguardError(f"{QUESTIONS_MAX} scrapes wait already. Try: a longer scrape interval")
        asked: Future = Future()
        self._asked.append(asked)
        os.eventfd_write(self._bell, 1)
        return asked.result(WAIT_S)

    def _answer(self) -> Iterable[Event]:
        os.eventfd_read(self._bell)
        while self._asked:
            asked = self._asked.popleft()
            try:
                asked.set_result(list(self._families()))
            except Exception as error:  # a figure that can't be read is the scrape's failure, not the daemon's
                log.exception("the figures can't be read")
                asked.set_exception(error)
        return ()

    def close(self) -> None:
        self._loop.forget(self._bell)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        while self._asked:
            self._asked.popleft().set_exception(KvguardError("the daemon is stopping. Try: again"))
        os.close(self._bell)


def bound_connections(server: WSGIServer) -> None:
    """The library's server has a thread for each connection, however long that says nothing, and however many there are."""
    free = threading.Semaphore(CONNECTIONS_MAX)

    class Bounded(server.RequestHandlerClass):
        timeout = SILENT_S

        def __init__(self, *arguments) -> None:
            try:
                super().__init__(*arguments)  # serves the whole connection
            except OSError as error:
                log.debug("a scrape was given up: %s", error)
            finally:
                free.release()

    server.RequestHandlerClass = Bounded
    server.verify_request = lambda _request, _address: free.acquire(blocking=False)
