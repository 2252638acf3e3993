"""The gateway as a process: emitters, connections and the server, from a configuration to SIGTERM.

Knows: uvicorn, how the parts are put together. Must not know: what they do.
Invariants: SIGTERM stops listening at once, lets the answers that are under way end (drain_ms), then ends; every emitter, thread and socket ends with it;
SIGHUP reads the keys again and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from urllib.parse import urlsplit

import httpx
import uvicorn

from kvguard.config import GatewayConfig
from kvguard.emitter import Emitter, connect
from kvguard.errors import BadConfig
from kvguard.gateway import text
from kvguard.gateway.app import Paths, build
from kvguard.gateway.connections import HEAD_BYTES_MAX, IDLE_CLIENT_S, Bounded
from kvguard.gateway.counters import Counters
from kvguard.gateway.fleet import Fleet, Member
from kvguard.gateway.journey import Surroundings
from kvguard.gateway.news import News
from kvguard.gateway.routing import Instance
from kvguard.gateway.upstream import Upstream
from kvguard.gateway.watching import Watch
from kvguard.transport import keys

log = logging.getLogger(__name__)
CONNECTIONS_SPARE = 16  # for looks and models beside the answers
KEEPALIVE_S = 2.0  # less than the 5 s after which vLLM's server closes a connection that nobody uses

Dial = Callable[[str], Emitter]  # an instance's name -> its emitter


def dialler(settings: GatewayConfig) -> Dial:
    """Emitters as configured. Raises BadConfig."""
    own = keys.load(settings.keys) if settings.keys else None

    def dial(instance: str) -> Emitter:
        # With keys the name is the listed one; without, one of its own for each instance.
        name = "" if own is not None else f"{settings.name}-{instance}"[:64]
        return connect(instance, settings.coordinator, own, insecure=settings.insecure, name=name, moves=True, silence_ms=settings.silence_ms)

    return dial


@contextlib.asynccontextmanager
async def surroundings(settings: GatewayConfig, dial: Dial) -> AsyncIterator[Surroundings]:
    """All that requests are served with. Raises BadConfig."""
    tokenizer, counters = text.load(settings.tokenizer), Counters()
    timeout = httpx.Timeout(settings.idle_ms / 1000, connect=settings.connect_ms / 1000, pool=settings.connect_ms / 1000)
    limits = httpx.Limits(
        max_connections=settings.in_flight_max + CONNECTIONS_SPARE, max_keepalive_connections=settings.in_flight_max, keepalive_expiry=KEEPALIVE_S
    )
    # trust_env: no proxy of the environment stands between gateway and engines. identity: a few compressed bytes may be more than all bounds.
    plain = {"accept-encoding": "identity"}
    async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, follow_redirects=False, headers=plain) as client:
        members, emitters, news = [], [], News()
        for line in settings.instances:
            instance = Instance(*line.split())
            upstream = Upstream(client, instance.url, settings.idle_ms / 1000)
            emitters.append(dial(instance.name))
            members.append(Member(Watch(instance, emitters[-1], lambda upstream=upstream: upstream.healthy(1.0), news), upstream))
        fleet = Fleet(members, counters, settings.probe_ms / 1000, {}, news)
        try:
            await fleet.start()
            with keys_read_again(settings, emitters):
                yield Surroundings(fleet, settings, tokenizer, counters)
        finally:
            await fleet.close()


@contextlib.contextmanager
def keys_read_again(settings: GatewayConfig, emitters: list[Emitter]) -> Iterator[None]:
    """On SIGHUP, as daemons do: the file that was named at the start; a broken one changes nothing. Elsewhere than in a process's main thread: never."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def read() -> None:
        try:
            own = keys.load(settings.keys) if settings.keys else None
        except BadConfig as error:
            log.error("the keys stay as they were: %s", error)
            return
        for emitter in emitters if own is not None else ():
            emitter.rekey(own)
        log.info("keys read again: %s", own or "none are configured")

    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGHUP, read)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGHUP)


def server(settings: GatewayConfig, dial: Dial | None = None) -> uvicorn.Server:
    """A server that is not yet running. Raises BadConfig."""
    text.load(settings.tokenizer)  # a mistake is told before anything listens
    paths = Paths()
    made = dial or dialler(settings)
    app = build(paths, lambda: surroundings(settings, made))
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, timeout_keep_alive=IDLE_CLIENT_S, lifespan="on", http=Bounded, ws="none",
        timeout_graceful_shutdown=max(1, settings.drain_ms // 1000), h11_max_incomplete_event_size=HEAD_BYTES_MAX,
    )  # fmt: skip
    serving = uvicorn.Server(config)
    paths.ending = lambda: serving.should_exit
    return serving


def listening(settings: GatewayConfig) -> socket.socket:
    """The bound socket of `listen`. Raises BadConfig."""
    parts = urlsplit(settings.listen)
    try:
        family = socket.AF_INET6 if ":" in (parts.hostname or "") else socket.AF_INET
        return socket.create_server((parts.hostname, parts.port), family=family, backlog=512)
    except OSError as error:
        raise BadConfig(f"{settings.listen}: can't listen there: {error.strerror}. Try: another port") from error


def run(settings: GatewayConfig) -> None:
    """Serve until SIGTERM or SIGINT."""
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    serving = server(settings)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection is a descriptor, and the usual 1024 are fewer than all bounds together
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)  # uvicorn puts its own in place, and raises the signal again at its end: which was in order
    with listening(settings) as bound:
        host, port = bound.getsockname()[:2]
        log.info("gateway of %s on http://%s:%d", ", ".join(line.split()[0] for line in settings.instances), host, port)
        asyncio.run(serving.serve(sockets=[bound]))
