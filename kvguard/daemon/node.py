"""A node's daemon: the core, its loop, and everything around them, put together.

Knows: which part is made of what. Must not know: decisions (core), deeds (perform_node.py), engines (ranks.py).
Invariants: what was promised binds the store before anything is heard or taken up again; a daemon that starts on a live one's runtime directory refuses;
SIGTERM leaves nothing behind but the journal and, where something keeps them, the replicas: a restart is no reason to lose them.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvguard import __version__
from kvguard.config import NodeConfig
from kvguard.core import events
from kvguard.core.node import COORDINATOR, Node, NodeSettings
from kvguard.core.promises import decode_epoch
from kvguard.daemon.arrivals import NotYet
from kvguard.daemon.checking import Checking
from kvguard.daemon.control import ControlServer, LocalIncoming
from kvguard.daemon.copies import Copies
from kvguard.daemon.fetching import Fetching
from kvguard.daemon.journal import Journal
from kvguard.daemon.keeping import owner_of, shelf_of
from kvguard.daemon.lending import Lending
from kvguard.daemon.loop import Loop
from kvguard.daemon.mail import Mail, answering
from kvguard.daemon.measure import Measures, watched
from kvguard.daemon.moments import Moments
from kvguard.daemon.node_verbs import NodeVerbs
from kvguard.daemon.notify import Notifier
from kvguard.daemon.perform_node import PROMISE, NodeShell, node_performer, promised
from kvguard.daemon.process import begun, noted, serve
from kvguard.daemon.questions import Questions
from kvguard.daemon.ranks import Ranks
from kvguard.daemon.workers import Workers
from kvguard.device import open_device
from kvguard.device.base import Device, Pool
from kvguard.errors import BadConfig
from kvguard.format import local
from kvguard.format.layout import Layout
from kvguard.format.messages import Delivered, Held, Hello, NodeWelcome
from kvguard.store.store import ReplicaStore
from kvguard.transport import keys as keyring
from kvguard.transport.nixl_agent import NixlSettings
from kvguard.transport.zeromq import ZeromqTransport
from kvguard.types import Epoch

log = logging.getLogger(__name__)
_warming = threading.Lock()

EXPIRE_NS = 1_000_000_000
FIGURES_NS = 500_000_000  # how old the store's figures in a beat may be: waking for each beat costs half of what an idle daemon costs
PREPARE_S = 30.0  # for a context on every GPU
SILENT = f"the GPUs' driver has not opened its contexts within {PREPARE_S:g} s. Try: nvidia-smi; dmesg | grep -i xid; restart this daemon"
MS = 1_000_000
FIRSTS = {NodeWelcome: "coordinator", Hello: "hello", Held: "held"}  # moments of a start


def nixl_of(config: NodeConfig) -> NixlSettings | None:
    if config.transport != "nixl":
        return None
    sizes = config.nixl_zone_bytes, config.nixl_lent_bytes
    return NixlSettings(config.nixl_devices, config.nixl_tls, *sizes, config.nixl_stuck_ms, quarantine_s=config.nixl_quarantine_s)


class NodeDaemon:
    """Listens and dials when made; `loop.run()` works. Raises BadConfig where something can't be opened."""

    RELOADED = ("arena_bytes", "ids_retention_s", "poll_ms")

    def __init__(self, config: NodeConfig, notifier: Notifier, moments: Moments) -> None:
        self.config = config
        self.moments = moments
        directory = Path(config.runtime_dir)
        made_private(directory)
        self.journal = Journal(directory / "journal.db")
        self.incarnation = self.journal.next_incarnation()
        promises = promises_of(self.journal)
        keys = keyring.load(config.keys) if config.keys else None
        self.control = ControlServer(config.socket_path, config.uids)
        self.transport = ZeromqTransport(config.name, keys, config.insecure, incarnation=self.incarnation, bulk_port=config.bulk_port, nixl=nixl_of(config))
        listening = self.transport.listen(config.listen)
        self.transport.expect(COORDINATOR)
        self.transport.dial(COORDINATOR, config.coordinator)  # connects while replicas are read back; what arrives waits for the loop
        moments.reached("listening")
        self.address = config.advertise or listening
        self.core = Node(
            NodeSettings(
                config.name, self.incarnation, self.address, __version__, config.heartbeat_ms * MS, config.window_bytes, hang_min_ns=config.hang_ms * MS,
            ),
            promises,
        )  # fmt: skip
        store = self._store(directory, notifier)
        moments.reached("read_back")
        self.shell = NodeShell(
            transport=self.transport, journal=self.journal, clock=time.monotonic_ns, noted=noted, node=config.name, store=store, engines=None,
            lend=self.transport.lend,
        )  # fmt: skip
        self.loop = Loop(self.core, node_performer(self.shell))
        self.workers = Workers(self)
        store.let_go = lambda close: self.workers.release("", close)
        self.shell.copies = Copies(self.workers, self.loop.after)
        device = LaterDevice(config.device, capture=config.capture, ring_bytes=config.ring_bytes, bytes_per_s=config.capture_bytes_per_s)
        device.prepare()
        for event in self.workers.prepared(config.device, device.said, SILENT):
            self.loop.feed(event)
        self.ranks = Ranks(
            device, store, self, self.control.send, self.shell.streams, self.shell.local, self.shell.epochs, config.salvage_ms_max, self.workers,
            self.shell.counters,
        )  # fmt: skip
        self.shell.engines = self.ranks
        self.lending = Lending(device, self.workers, self.control.send)
        self.fetching = Fetching(self.shell, self.ranks, self.control.send)
        for instance, epoch in promises.items():
            promised(self.shell, instance, epoch)
        self.checking = Checking(self.shell, self.loop.after, ended=self._verified)
        self.measures = Measures(self.core, time.monotonic_ns)
        verbs = NodeVerbs(config, self.core, self.shell, self.measures, self._refusals, self.loop.feed, moments).verbs()
        self.questions = Questions(verbs, answering(self.shell), self.loop.after)
        self.mail = Mail(self.shell, self.questions, {Delivered: self._delivered})
        self.loop.watch(self.transport.fileno(), self._read)
        self.loop.watch(self.control.fileno(), self._engines)
        self._polling = self._warmed = False
        self._every(max(config.heartbeat_ms * MS, FIGURES_NS), self._replicas_seen)
        self._every(EXPIRE_NS, self._expire)
        self.scrapes = None
        if config.metrics:  # imported where it is asked for: a restart is quicker without
            from kvguard.daemon.metrics import NodeFigures
            from kvguard.daemon.scrape import Scrapes

            figures = NodeFigures(self.core, self.shell, self.measures, self._refusals)
            self.scrapes = Scrapes(config.metrics, self.loop, figures.families)
        if not store.unchecked():
            self._warm()

    def _refusals(self) -> dict[str, int]:
        """What the transport and the engines' socket dropped or refused, by word."""
        return {**self.transport.counters, **self.control.counters}

    def _store(self, directory: Path, notifier: Notifier) -> ReplicaStore:
        """With what a former life of this daemon left."""
        config = self.config
        shelf, where = shelf_of(config.keep_replicas, directory, notifier)
        store = ReplicaStore(shelf, config.arena_bytes, config.ids_retention_s * 1000 * MS, owner=owner_of(self.journal))
        for name, reason in store.read_back():
            log.warning("replica %s of a former life is dropped: %s", name, reason)
        log.info("replicas are kept %s; %d streams, %d sequences read back", where, len(store.streams()), store.unchecked())
        return store

    def _verified(self) -> None:
        self.moments.reached("verified")
        self._warm()

    def _warm(self) -> None:
        """What engines and pushes need is imported before they come, beside the loop, once it has nothing more urgent to do."""
        if not self._warmed:
            self._warmed = True
            threading.Thread(target=warm, name="kvguard-warm", daemon=True).start()

    # ---- a service ----------------------------------------------------------------------------------------------------------------

    def take_over(self, config: NodeConfig) -> None:
        """RELOADED's keys. An arena that holds more than its new budget shrinks as replicas go."""
        self.shell.store.resize(config.arena_bytes, config.ids_retention_s * 1000 * MS)

    def summary(self) -> str:
        store, now = self.shell.store, time.monotonic_ns()
        beats = [local.beat(now, self.core.promises.of(local.stream.instance)) for local in self.core.outbound.streams.values()]
        protected = sum(beat.state == "protected" for beat in beats)
        unchecked = store.unchecked()
        checking = f", {unchecked} sequences being verified" if unchecked else ""
        return f"{protected} of {len(beats)} ranks protected; holding {len(store.streams())} streams, {store.budget.used >> 20} MiB{checking}"

    # ---- sources ------------------------------------------------------------------------------------------------------------------

    def watch(self, descriptor: int, ready: Callable[[], Iterable[events.Event]]) -> None:
        """lifelines.Watches, workers.Turns: what engines say is measured on its way to the core, and whoever is there is looked at from time to time."""
        self.loop.watch(descriptor, lambda: watched(ready(), self.measures))
        if not self._polling:
            self._polling = True
            self.loop.after(self.config.poll_ms * MS, self._poll)

    def forget(self, descriptor: int) -> None:
        self.loop.forget(descriptor)

    def after(self, delay_ns: int, ready: Callable[[], Iterable[events.Event]]) -> None:
        self.loop.after(delay_ns, ready)

    def _every(self, period_ns: int, ready: Callable[[], Iterable[events.Event]]) -> None:
        def again() -> Iterable[events.Event]:
            self.loop.after(period_ns, again)
            return ready()

        self.loop.after(0, again)

    def _read(self) -> Iterable[events.Event]:
        for event in self.mail.read():
            if type(event) is events.Arrived and (word := FIRSTS.get(type(event.message))) is not None:
                self.moments.reached(word)
            yield event

    def _engines(self) -> Iterable[events.Event]:
        warm()
        told: list[events.Event] = []
        for incoming in self.control.receive():
            if type(incoming) is LocalIncoming:
                told += watched(self._engine_said(incoming), self.measures)
            else:
                self.ranks.disconnected(incoming.connection)
        return told

    def _engine_said(self, incoming: LocalIncoming) -> Iterable[events.Event]:
        message = incoming.message
        if type(message) is local.Attach:
            self.moments.reached("engine")
            return self.ranks.attach(incoming.connection, incoming.pid, message, incoming.descriptors)
        for descriptor in incoming.descriptors:
            os.close(descriptor)
        if type(message) is local.Detach:
            return self.ranks.detach(incoming.connection)
        if self.ranks.behind(incoming.connection, lambda: self._engine_said(incoming._replace(descriptors=[]))):
            return ()
        if type(message) is local.Restored:
            return self.ranks.restored(incoming.connection, message)
        if type(message) is local.Fetch:
            self.fetching.fetch(incoming.connection, message)
            return ()
        if type(message) is local.PoolWanted:
            return self.lending.lend(incoming.connection, message)
        self.shell.counters["local_refused"] += 1
        self.control.drop(incoming.connection)
        self.ranks.disconnected(incoming.connection)
        return ()

    def _poll(self) -> Iterable[events.Event]:
        """Completion words move without a bell; waits are settled; lines that were dropped while sending are told of."""
        self._polling = self.ranks.any_alive()
        if self._polling:
            self.loop.after(self.config.poll_ms * MS, self._poll)
        if self.measures.waiting:
            self.measures.settle()
        return [*self._engines(), *watched(self.ranks.look_at_all(), self.measures)]

    def _replicas_seen(self) -> Iterable[events.Event]:
        budget = self.shell.store.budget
        return (events.ReplicasSeen(self.shell.store.beat(), budget.used, budget.bytes_max),)

    def _expire(self) -> Iterable[events.Event]:
        self.shell.counters["ids_expired"] += self.shell.store.expire()
        return ()

    def _delivered(self, link: str, message: Delivered) -> None:
        if link == COORDINATOR:
            self.shell.store.delivered(message.instance, message.lives())

    def close(self) -> None:
        if self.scrapes is not None:
            self.scrapes.close()
        self.ranks.close()
        self.control.close()
        self.transport.close()
        self.shell.store.close()
        self.journal.close()
        self.loop.close()


class LaterDevice:
    """A device whose room is entered with the first pool: numpy alone takes as long to import as everything that a start needs.

    A GPU's is entered at the start: its context must be open before an engine asks how much memory is free. One that can't be used, or doesn't answer within
    PREPARE_S, refuses engines, no more.
    """

    def __init__(self, kind: str, **capturing) -> None:
        self.kind = kind
        self._capturing = capturing
        self._device: Device | None = None
        self._preparing: threading.Thread | None = None
        self._said: str | None = ""

    def prepare(self, wait_s: float = PREPARE_S) -> None:
        """Wait so long for its driver; `said` knows what came of it. Never raises."""
        if self.kind == "host":
            return
        device = self._opened()

        def prepare() -> None:
            self._said = device.prepare()

        self._said = None
        self._preparing = threading.Thread(target=prepare, name="kvguard-prepare", daemon=True)
        self._preparing.start()
        self._preparing.join(wait_s)
        fault = SILENT if self._said is None else self._said
        if fault:
            log.error("no engine with a pool on a GPU can be protected: %s", fault)

    def said(self) -> str | None:
        """Why it can't be used; "" where it can, None as long as its driver doesn't answer."""
        return self._said

    def _refuse_unprepared(self) -> None:
        if self._preparing is not None and self._preparing.is_alive():
            raise NotYet(SILENT)

    def open(self, layout: Layout, descriptors: list[int], writable: bool = True) -> Pool:
        """See device/base.py."""
        return self._opened().open(layout, descriptors, writable=writable)

    def where(self, descriptors: Sequence[int]) -> str:
        """See device/base.py."""
        if self.kind == "host":
            return ""
        from kvguard.device import card

        if card.read(descriptors[0]) is not None:
            self._refuse_unprepared()
        return self._opened().where(descriptors)

    def lend(self, layout: Layout, gpu: str = "") -> list[int]:
        """See device/base.py."""
        return self._opened().lend(layout, gpu)

    def lends_on(self, gpu: str = "") -> str:
        """See device/base.py."""
        self._refuse_unprepared()
        return self._opened().lends_on(gpu)

    def _opened(self) -> Device:
        if self._device is None:
            self._device = open_device(self.kind, **self._capturing)
        return self._device


def warm() -> None:
    """Import what the first engine, capture or push would wait for. One thread at a time: two that enter a package by different modules lock each other out."""
    with _warming:
        for name in ("kvguard.engine", "kvguard.engine.look", "kvguard.engine.packets", "kvguard.engine.lifeline", "kvguard.device.host"):
            importlib.import_module(name)


def made_private(directory: Path) -> None:
    """The runtime directory, of this user alone. Raises BadConfig."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(f"{directory} can't be made: {error.strerror}. Try: a directory that this user can write") from error


def promises_of(journal: Journal) -> dict[str, Epoch]:
    """What this node has promised. Raises BadConfig for values that it can't have written."""
    found = {}
    for key, value in journal.load().items():
        if key.startswith(PROMISE):
            try:
                found[key.removeprefix(PROMISE)] = decode_epoch(value)
            except ValueError as error:
                raise BadConfig(f"{journal.path}: {key!r} holds {value!r}, which is no epoch. Try: restore the file") from error
    return found


def run(config: NodeConfig, reload: Callable[[], NodeConfig], moments: Moments | None = None) -> None:
    """The process's main."""
    notifier, moments = begun(config), moments or Moments()
    daemon = NodeDaemon(config, notifier, moments)
    try:
        log.info("node %s listens at %s, engines attach at %s", config.name, daemon.address, config.socket_path)
        serve(daemon, notifier, reload, moments, daemon.workers.progressing)
    finally:
        daemon.close()
        notifier.close()
