"""Daemons and coordinator as lives of a process: the real core in the real loop with the real deeds; clock, network, journal and engines' sockets are simulated.

Knows: how daemon/node.py and daemon/coordinator.py wire their parts. Must not know: faults, judgement beyond calling checks.
Invariants: what a life has not persisted is gone with it; a life that crashed does nothing more, not even the rest of its effects.
"""

from __future__ import annotations

import os
from collections import deque
from itertools import count
from random import Random

from simulation import checks

from kvguard.core import effects, events
from kvguard.core.coordinator import Coordinator
from kvguard.core.node import COORDINATOR, Node, NodeSettings
from kvguard.core.promises import decode_epoch
from kvguard.daemon import perform, perform_node
from kvguard.daemon.copies import Copies
from kvguard.daemon.fetching import Fetching
from kvguard.daemon.checking import Checking
from kvguard.daemon.journal import NotDurable
from kvguard.daemon.loop import Loop
from kvguard.daemon.perform_node import PROMISE, NodeShell, promised
from kvguard.daemon.ranks import Ranks
from kvguard.device.host import HostDevice
from kvguard.errors import KvguardError
from kvguard.format import ledger, local, messages
from kvguard.store.store import ReplicaStore

MS = 1_000_000
HEARTBEAT_NS = 50 * MS
POLL_NS = 20 * MS
LATE_SHARE = 0.3  # of daemons' lives, in which
LATE_BYTES = (1, 200)  # captures of so many bytes and more end
LATE_NS = 30 * MS  # up to so long after they were asked for


class Crashed(Exception):
    """This life ends here."""


class Disk:
    """A process's durable values. `fail`: how many of the next writes fail; `torn` of them reached the disk all the same."""

    def __init__(self, world) -> None:
        self.values: dict[str, bytes] = {}
        self.incarnation = world.random.getrandbits(40)
        self.fail = 0
        self._world = world

    def persist(self, key: str, value: bytes | None) -> None:
        failing = self.fail > 0
        if failing:
            self.fail -= 1
            self._world.count("journal_failures")
        if not failing or self._world.random.random() < 0.5:
            if value is None:
                self.values.pop(key, None)
            else:
                self.values[key] = value
        if failing:
            raise NotDurable(f"{key}: the disk is full")


class Life:
    """One life of one process: transport, core, loop. `crash_in`: effects until it dies, for deaths between any two of them."""

    def __init__(self, world, name: str, core, shell, deeds, failures) -> None:
        self.world, self.name, self.core, self.shell = world, name, core, shell
        self.dead = False
        self.crash_in: int | None = None
        self._deeds, self._failures = deeds, failures
        self.loop = Loop(self, self._perform, clock=lambda: world.now)

    # ---- the loop's core: the real one, checked and traced ----

    def step(self, now_ns: int, event):
        out = self.core.step(now_ns, event)
        if self.world.random_checks.random() < 0.25:
            self.core.check()
        self.world.trace(self.name, event, out)
        return out

    def next_deadline(self):
        return self.core.next_deadline()

    def check(self) -> None:
        self.core.check()

    def _perform(self, effect):
        if self.crash_in is not None:
            self.crash_in -= 1
            if self.crash_in < 0:
                raise Crashed(type(effect).__name__)
        self.world.checks.before(self, effect)
        try:
            told = tuple(self._deeds[type(effect)](self.shell, effect))
        except NotDurable:
            raise Crashed("a value could not be made durable") from None
        except KvguardError as error:
            self.world.count(f"failed_{type(effect).__name__}")
            self.world.note(f"{self.name}: {type(effect).__name__}: {error}")
            complete = self._failures.get(type(effect))
            told = tuple(complete(effect, str(error))) if complete else ()
        self.world.checks.after(self, effect, told)
        return told

    def turn(self) -> None:
        for incoming in self.world.mail(self):
            event = perform.arrived(self.shell, incoming)
            if type(event) is not events.Arrived or not self.intercept(event):
                self.loop.feed(event)
        self.loop.turn(0.0)
        self.core.check()

    def intercept(self, event) -> bool:
        return False

    def due(self) -> int | None:
        times = [self.core.next_deadline(), self.loop._timers[0][0] if self.loop._timers else None]
        return min((at for at in times if at is not None), default=None)

    def ways(self) -> list[int]:
        """When this life's transport has something to say."""
        return self.shell.transport._times()

    def end(self) -> None:
        self.dead = True
        self.world.network.leave(self.name)
        self.release()
        self.loop.close()

    def release(self) -> None:
        """What the process had open."""


# ---- nodes ----------------------------------------------------------------------------------------------------------------------


class SimulatedRanks(Ranks):
    """The real one; only the kill goes to a simulated process."""

    def __init__(self, world, *arguments) -> None:
        super().__init__(*arguments)
        self._world = world

    def process_of(self, stream):
        """The living engine process behind a stream."""
        for process in self._world.processes.values():
            if process.alive and process.guard is not None and process.guard.stream == stream:
                return process
        return None

    def kill(self, incarnation: int) -> None:
        for process in list(self._world.processes.values()):
            if incarnation in (process.incarnation, process.guard.incarnation if process.guard is not None else None):
                for one in [*self.ranks.values(), *self.spares.values()]:
                    if (one.stream.incarnation if hasattr(one, "stream") else one.incarnation) == incarnation:
                        one.killed = "killed by its node's daemon"
                self._world.count("killed_by_the_daemon")
                process.kill("by its daemon")


class RacingPool:
    """A pool whose engine takes up its next step in the middle of a copy: before a byte is read, or before the generations are read again."""

    def __init__(self, pool, process, early: bool) -> None:
        self._pool, self._process, self._early = pool, process, early

    def _race(self, copy, *arguments) -> int:
        self._process.world.count("reused_during_capture")
        if self._early:
            self._process.take_up()
        size = copy(*arguments)
        if not self._early:
            self._process.take_up()
        return size

    def capture(self, *arguments) -> int:
        return self._race(self._pool.capture, *arguments)

    def capture_blocks(self, *arguments) -> int:
        return self._race(self._pool.capture_blocks, *arguments)


def capture_racing(shell, effect):
    """perform_node.capture, and the engine doesn't wait for it."""
    stream = shell.streams.get(effect.stream)
    process = shell.engines.process_of(effect.stream)
    if stream is None or process is None or process.at_hand is None or process.paused:
        return perform_node.capture(shell, effect)
    pool, stream.pool = stream.pool, RacingPool(stream.pool, process, process.world.random.random() < 0.5)
    try:
        return perform_node.capture(shell, effect)
    finally:
        stream.pool = pool


class NodeLife(Life):
    """daemon/node.NodeDaemon, wired for simulation."""

    def __init__(self, world, name: str, disk: Disk, budget_bytes: int, shelf) -> None:
        disk.incarnation += 1
        transport = world.network.join(name)
        address = transport.listen(f"inproc://{name}")
        promises = {key.removeprefix(PROMISE): decode_epoch(value) for key, value in disk.values.items() if key.startswith(PROMISE)}
        settings = NodeSettings(
            name, disk.incarnation, address, "sim", HEARTBEAT_NS, world.window_bytes, hang_min_ns=400 * MS, hang_factor=10, retry_ns=300 * MS, answer_ns=250 * MS
        )
        store = ReplicaStore(shelf, budget_bytes, 200 * MS, clock=lambda: world.now)
        assert store.read_back() == (), "I11: what a life of this daemon left can't be read"
        world.count("sequences_read_back", store.unchecked())
        shell = NodeShell(
            transport=transport, journal=disk, clock=lambda: world.now, noted=lambda note: world.noted(name, note), node=name, store=store, engines=None,
            slice_bytes=30_000,
        )  # fmt: skip
        deeds = {**perform_node.DEEDS, effects.Capture: capture_racing}
        super().__init__(world, name, Node(settings, promises), shell, deeds, perform_node.FAILURES)
        self._late = Random(f"{world.seed} {name} {disk.incarnation}")  # its own, so that worlds without late captures are as they were
        if self._late.random() < LATE_SHARE:
            shell.copies = Copies(None, self._in_a_while, self._late.choice(LATE_BYTES))
        self.ranks = SimulatedRanks(world, HostDevice(), store, self.loop, self._tell, shell.streams, shell.local, shell.epochs)
        shell.engines = self.ranks
        self.fetching = Fetching(shell, self.ranks, self._tell)
        for instance, epoch in promises.items():
            promised(shell, instance, epoch)
        Checking(shell, self.loop.after, pause_ns=MS)
        self._lines: dict[int, object] = {}
        self._ways: dict[object, int] = {}
        self._unheard: deque = deque()  # said while this process was stopped
        self._numbers = count(1)
        self._every(HEARTBEAT_NS, lambda: (events.ReplicasSeen(store.beat(), store.budget.used, store.budget.bytes_max),))
        self._every(POLL_NS, lambda: self.ranks.look_at_all())
        self._every(500 * MS, self._expire)
        transport.dial(COORDINATOR, f"inproc://{COORDINATOR}")

    def _every(self, period_ns: int, ready) -> None:
        def again():
            self.loop.after(period_ns, again)
            return ready()

        self.loop.after(0, again)

    def _expire(self):
        self.world.count("ids_expired", self.shell.store.expire())
        return ()

    def intercept(self, event) -> bool:
        if type(event.message) is messages.Delivered and event.link == COORDINATOR:
            self.shell.store.delivered(event.message.instance, event.message.lives())
            self.world.checks.delivered(self)
            return True
        return event.link == COORDINATOR and not self.world.two_lives.hears(event.message)

    def _in_a_while(self, _delay_ns: int, ready) -> None:
        """What isn't captured at once ends at any time: after fences, detaches and deaths, too."""
        self.world.count("captured_later")
        self.loop.after(self._late.randrange(10_000, LATE_NS), ready)

    # ---- lines of engines ----

    def accept(self, line) -> int:
        number = next(self._numbers)
        self._lines[number] = line
        return number

    def said(self, line, message, descriptors: list[int]) -> None:
        """An engine's message, handled in a turn of its own a little later, as from a socket."""
        connection = line.connection
        self._in_order(connection, lambda: self._hear(connection, message, descriptors))

    def _in_order(self, way, act) -> None:
        """A little later, and never before what went the same way earlier."""
        at = max(self._ways.get(way, 0), self.world.now + self.world.random.randrange(5_000, 100_000))
        self._ways[way] = at
        self.world.after(at - self.world.now, act)

    def _hear(self, connection: int, message, descriptors: list[int]) -> None:
        if self.dead:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        self._unheard.append((connection, message, descriptors))
        self.world.wake(self.name)

    def turn(self) -> None:
        while self._unheard:
            said = self._unheard.popleft()
            self.loop.after(0, lambda said=said: self._engine_said(*said))
        super().turn()
        self.world.checks.node_turn(self)

    def _engine_said(self, connection: int, message, descriptors: list[int]):
        if type(message) is local.Attach:
            return self.ranks.attach(connection, 0, message, descriptors)
        if type(message) is local.Restored:
            return self.ranks.restored(connection, message)
        if type(message) is local.Fetch:
            self.fetching.fetch(connection, message)
            return ()
        if type(message) is local.Detach:
            return self.ranks.detach(connection)
        raise AssertionError(message)

    def _tell(self, connection: int, message, descriptors=()) -> bool:
        line = self._lines.get(connection)
        if line is None or not line.process.alive or line.connection != connection:
            return False
        held = [os.dup(descriptor) for descriptor in descriptors]

        def deliver() -> None:
            if not line.process.alive:
                for descriptor in held:
                    os.close(descriptor)
            elif line.process.paused:
                line.process.backlog.append(lambda: line.deliver(connection, message, held))
            else:
                line.deliver(connection, message, held)

        self._in_order((connection, "back"), deliver)
        return True

    def release(self) -> None:
        for connection, line in self._lines.items():
            if line.connection == connection:
                line.lost()
        for _, _, descriptors in self._unheard:
            for descriptor in descriptors:
                os.close(descriptor)
        self.world.count("captures_late", self.shell.counters["captures_late"])
        self.world.count("torn_reads", sum(rank.reader.torn for rank in self.ranks.ranks.values()))
        self.ranks.close()
        self.shell.store.close()


# ---- the coordinator ------------------------------------------------------------------------------------------------------------


class CoordinatorLife(Life):
    """daemon/coordinator.CoordinatorDaemon, wired for simulation."""

    def __init__(self, world, name: str, disk: Disk, settings) -> None:
        disk.incarnation += 1
        transport = world.network.join(name)
        transport.listen(f"inproc://{name}")
        shell = perform.Shell(transport, disk, lambda: world.now, lambda note: world.noted(name, note))
        deeds = {**perform.SHARED, effects.AnswerAsked: lambda shell_, effect: ()}
        super().__init__(world, name, Coordinator("sim", settings), shell, deeds, {})
        disk.values.setdefault("secret", ledger.pack(b"the secret of this simulated one"))
        self.loop.feed(events.Loaded(dict(disk.values)))

    def turn(self) -> None:
        super().turn()
        self.world.checks.coordinator_turn(self)

    def due(self) -> int | None:
        return self.world.now if self.loop._queue else super().due()


__all__ = ["CoordinatorLife", "Crashed", "Disk", "NodeLife", "checks"]
