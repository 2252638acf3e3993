"""One seed's world: virtual time, a network, nodes, a coordinator, a driver, engine processes; faults until a moment, then everything must drain.

Knows: who lives, when what is due. Must not know: what messages mean.
Invariants: all randomness comes from `random`, all time from `now`; the same seed gives the same digest under any hash seed.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter, deque
from random import Random

from simulation.checks import Checks
from simulation.driver import Driver
from simulation.engines import RankProcess
from simulation.faults import Faults
from simulation.going_back import GoingBack
from simulation.lives import MS, CoordinatorLife, Crashed, Disk, NodeLife
from simulation.moving import Moving
from simulation.operator import Operator
from simulation.redialling import Redialling
from simulation.shelf import Shelf
from simulation.two_lives import TwoLives
from simulation.two_targets import NODES, TwoTargets

from kvguard.core.events import Looked
from kvguard.core.known import Settings
from kvguard.core.membership import Patience
from kvguard.transport.inproc import Network
from kvguard.types import Rank

COORDINATOR, DRIVER = "coordinator", "driver"
SETTINGS = Settings(
    Patience(50 * MS, 150 * MS, 300 * MS, 500 * MS, 500 * MS, 400 * MS), exclude_ns=600 * MS, seal_ns=3000 * MS, standby_ns=6000 * MS, restore_ns=3000 * MS,
    settle_ns=1500 * MS, moved_ns=3000 * MS,
    replace_ns=1000 * MS, backoff_ns=50 * MS, backoff_free=6, failovers_max=1000, window_ns=5000 * MS, attempts_max=30,
)  # fmt: skip
DRAIN_NS = 25_000 * MS


class Host:
    """A name under which lives follow each other."""

    def __init__(self, name: str, disk: Disk | None, shelf: Shelf | None = None) -> None:
        self.name, self.disk, self.shelf = name, disk, shelf
        self.life = None
        self.paused = False
        self.wake_ns: int | None = None
        self.known: tuple = ()  # what `ways_ns` and `own_ns` were computed from
        self.ways_ns: int | None = None  # when its transport has something
        self.own_ns: int | None = None  # when its core or loop wants to be woken


class World:
    """`run` plays the seed; raises AssertionError at the first invariant that doesn't hold."""

    def __init__(self, seed: int, verbose: bool = False) -> None:
        self.seed, self.verbose = seed, verbose
        self.random = random = Random(seed)
        self.random_checks = Random(seed)  # apart, so that looking more often changes nothing
        self.random_deaths = Random(f"deaths {seed}")  # apart, so that worlds without deaths stay what they were
        self.random_slow = Random(f"slow {seed}")  # likewise
        self.slow_deaths = self.random_slow.choice((0.0, 0.3, 0.7))
        self.settings = SETTINGS._replace(pool_lag_tokens=self.random_slow.choice((0, 3)))
        self.now = 0
        self.network = Network(random, silence_ns=200 * MS)
        self.counts: Counter[str] = Counter()
        self.log: deque[str] = deque(maxlen=400)
        self._digest = hashlib.blake2b(digest_size=8)
        self._heap: list = []
        self._number = 0
        self.instance = "sim"
        self.stages = random.choice((1, 2, 2, 3))
        self.two_targets = TwoTargets(self)
        self.mates = Random(f"mates {seed}").choice((1, 1, 1, 1, 1, 1, 1, 1, 2, 3))  # tensor-parallel ranks of a stage, whose bytes are equal
        self.mates = max(self.mates, 2 if self.two_targets.on else 1)
        self.ranks = tuple(Rank(0, stage, tp) for stage in range(self.stages) for tp in range(self.mates))
        self.addressable = random.random() < 0.8
        self.sampled = random.random() < 0.4
        self.late_words = random.random() < 0.3
        self.torn = random.choice((0.0, 0.2, 0.5))
        self.split_steps = random.choice((0.0, 0.3))
        self.width = random.randrange(1, 7)
        self.cancels, self.preempts = random.choice((0.0, 0.02)), random.choice((0.0, 0.03, 0.08))
        self.reuses = random.choice((0.0, 0.5))
        self.window_bytes = random.choice((256, 2048, 1 << 20))
        self.quiet = self.draining = False
        self.names = 0
        self.finished: dict[int, bool] = {}  # by life
        self.births: dict[int, int] = {}  # which life a birth is of
        self.prompts: dict[int, tuple[int, ...]] = {}  # by life
        self.rolled_back: list[int] = []
        self.processes: dict[str, RankProcess] = {}
        self._graveyard: list[RankProcess] = []
        self.checks = Checks(self)
        self.moving = Moving(self)
        self.faults = Faults(self)
        self.operator = Operator(self)
        self.redialling = Redialling(self)
        self.two_lives = TwoLives(self)
        self.going_back = GoingBack(self)
        count = max(2, self.stages) if random.random() < 0.7 else 3
        count = max(count, NODES if self.two_targets.on else 0)
        keeps = Random(f"shelves {seed}").random() < 0.5  # replicas outlive their daemons in every other world
        self.nodes = {f"n{number}": Host(f"n{number}", Disk(self), Shelf(keeps)) for number in range(count)}
        self.coordinator = Host(COORDINATOR, Disk(self))
        self.driver_host = Host(DRIVER, None)
        self._hosts = self.hosts()
        self.barren = tuple(random.sample(list(self.nodes), random.randrange(1, count))) if random.random() < 0.25 else ()  # nodes without spares
        self.barren = () if self.two_targets.on else self.barren
        self.ways = 0  # rises with every cut and heal
        self.budgets = {name: random.choice((1 << 20, 1 << 20, 1 << 20, 4_000)) for name in self.nodes}
        self._start_all()

    # ---- lives ----

    def _start_all(self) -> None:
        self.start(self.coordinator)
        for host in self.nodes.values():
            self.start(host)
        for rank in self.ranks:
            self.process(list(self.nodes)[rank.pp % len(self.nodes)]).start_as_rank(rank)
        for name in self.nodes:
            if name not in self.barren and not self.moving.on:
                for _ in range(self.mates):
                    self.spare(name)
        self.start(self.driver_host)
        self.moving.start()

    def start(self, host: Host) -> None:
        if host.life is not None:
            return
        self.note(f"{host.name} starts")
        if host.name == COORDINATOR:
            host.life = CoordinatorLife(self, host.name, host.disk, self.settings)
        elif host.name == DRIVER:
            host.life = Driver(self)
        else:
            host.life = NodeLife(self, host.name, host.disk, self.budgets[host.name], host.shelf)
        host.known, host.own_ns = (), self.now
        self.wake(host.name)

    def stop(self, host: Host, reason: str) -> None:
        """SIGKILL: what is not on its disk is gone."""
        if host.life is None:
            return
        self.note(f"{host.name} dies: {reason}")
        life, host.life, host.paused = host.life, None, False
        life.end()

    def hosts(self) -> list[Host]:
        return [self.coordinator, *self.nodes.values(), self.driver_host]

    def host(self, name: str) -> Host:
        return self.nodes.get(name) or (self.coordinator if name == COORDINATOR else self.driver_host)

    @property
    def driver(self) -> Driver:
        return self.driver_host.life or _NOBODY

    def process(self, node: str, instance: str = "") -> RankProcess:
        self._number += 1
        process = RankProcess(self, node, f"{node}-p{self._number}")
        process.instance = instance or self.instance
        self._graveyard.append(process)
        return process

    def spare(self, node: str) -> None:
        self.process(node).start_as_spare()

    def process_died(self, process: RankProcess) -> None:
        """The node's supervisor starts another spare after a while; a barren node's on another one, else ranks of barren nodes would use the spares up."""
        if self.moving.on:
            return
        node = process.node if process.node not in self.barren else next(name for name in self.nodes if name not in self.barren)
        self.after(self.random.randrange(50, 400) * MS, lambda: self._supervise(node))

    def _supervise(self, node: str) -> None:
        if self.moving.on:  # no spare anywhere: what is lost goes on elsewhere
            return
        if self.nodes[node].life is None:
            self.after(100 * MS, lambda: self._supervise(node))
        elif sum(1 for process in self.processes.values() if process.node == node and process.alive and process.guard is None) < max(2, len(self.ranks)):
            self.spare(node)

    def to_rank(self, endpoint: str, order) -> None:
        """The driver's message to one rank; later where the way is cut, never where the process is gone."""
        process = self.processes.get(endpoint)
        if process is None:
            return
        sender = self.driver

        def deliver() -> None:
            if self.driver is not sender:
                return
            if self.network.between(DRIVER, process.node).cut or self.network.between(process.node, DRIVER).cut:
                self.after(20 * MS, deliver)
            else:
                process.run(lambda: process.receive(order))

        self.after(self.random.randrange(20_000, 2 * MS), deliver)

    # ---- time ----

    def after(self, delay_ns: int, act) -> None:
        self._number += 1
        heapq.heappush(self._heap, (self.now + delay_ns, self._number, act))

    def wake(self, name: str) -> None:
        """This process has something to look at: soon, not at once."""
        host = self.host(name)
        at = self.now + self.random.randrange(1_000, 300_000 if self.random.random() < 0.8 else 12 * MS)
        host.wake_ns = at if host.wake_ns is None else min(host.wake_ns, at)

    def mail(self, life) -> list:
        transport = life.transport if life is self.driver_host.life else life.shell.transport
        return self.faults.spoil(life, transport.receive())

    def _due(self, host: Host) -> int | None:
        if host.life is None or host.paused:
            return None
        key = (host.life, self.network._order, self.ways, self.now // (20 * MS))
        if host.known != key:
            host.known, host.ways_ns = key, min(host.life.ways(), default=None)
        best = host.own_ns
        for at in (host.wake_ns, host.ways_ns):
            if at is not None and (best is None or at < best):
                best = at
        return best

    def advance(self, until_ns: int) -> bool:
        """To the next moment at which anything is due. False when that lies beyond `until_ns`."""
        times = [self._heap[0][0]] if self._heap else []
        times += [at for host in self._hosts if (at := self._due(host)) is not None]
        at = max(self.now + 50_000, min(times)) if times else until_ns
        if at >= until_ns:
            self.now = until_ns
            self.network.advance(self.now)
            return False
        self.now = at
        self.network.advance(at)
        while self._heap and self._heap[0][0] <= at:
            heapq.heappop(self._heap)[2]()
        for host in self._hosts:
            due = self._due(host)
            if due is not None and due <= at:
                host.wake_ns = None
                self._turn(host)
        return True

    def _turn(self, host: Host) -> None:
        host.known = ()
        try:
            host.life.turn()
            host.own_ns = host.life.due()
        except Crashed as crash:
            self.count("crashed_between_effects")
            self.stop(host, f"in the middle of its effects: {crash}")
            self.faults.restart_later(host)

    # ---- the run ----

    def run(self) -> str:
        """Faults, then calm. Returns the digest."""
        try:
            self.faults.plan()
            self.operator.plan(self.faults.end_ns)
            self.redialling.plan(self.faults.end_ns)
            self.two_lives.plan(self.faults.end_ns)
            self.two_targets.plan(self.faults.end_ns)
            while self.advance(self.faults.end_ns):
                pass
            self.faults.calm()
            self.operator.calm()
            calm_ns = self.now
            while self.advance(calm_ns + 300 * MS):
                pass
            self.quiet = True
            self.checks.wait_for(self.checks.undrained, DRAIN_NS)
            quiet_ns = self.now
            while self.advance(quiet_ns + 60 * MS):
                pass
            self.checks.wait_for(self.checks.undrained, DRAIN_NS)
            self.checks.drained()
            self.quiet, self.draining = False, True
            self.checks.wait_for(self.checks.unfinished, DRAIN_NS)
            self.checks.finished()
            self._digest.update(repr(sorted(self.counts.items())).encode())
            return self._digest.hexdigest()
        finally:
            self.close()

    def close(self) -> None:
        for host in self.hosts():
            self.stop(host, "the world ends")
        for host in self.nodes.values():
            host.shelf.burn()
        for process in self._graveyard:
            process.close()
        self._heap.clear()

    # ---- what happened ----

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] += number

    def note(self, text: str) -> None:
        line = f"{self.now / 1e6:10.3f} {text}"
        self.log.append(line)
        if self.verbose:
            print(line)

    def noted(self, name: str, note) -> None:
        self.counts[f"note_{note.what}"] += 1
        self.note(f"{name}: {note.what}: {note.subject}: {note.reason}")

    def trace(self, name: str, event, effects) -> None:
        if type(event) is Looked and event.released and event.opened:
            opened = {row.row: None for row in event.opened}
            self.count("reused_between_looks", sum(1 for row in event.released if row in opened))
        words = [type(effect).__name__ for effect in effects]
        self._digest.update(f"{self.now} {name} {type(event).__name__} {words}".encode())


class _Nobody:
    """No driver lives."""

    def result(self, rank, epoch, number) -> None:
        """Nobody hears it."""


_NOBODY = _Nobody()
