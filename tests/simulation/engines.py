"""Engine processes: ranks and spares, over the real guard, table, restore and claim; what is simulated is time, their line to the daemon, and death.

Knows: one process's memory, its line. Must not know: what the scheduler will order next, plans beyond the real code's use of them.
Invariants: a dead process does nothing more; a paused one does what came meanwhile when it goes on; what it stores reaches other processes' eyes complete only
in the end: in between any subset of a row's stores may be seen (generations excepted, behind which the writer has a barrier).
"""

from __future__ import annotations

import os
from collections import deque

import numpy as np
from simulation.content import BLOCK_TOKENS, BLOCKS, layout_of, poison, slot_bytes, write_slots

from kvguard.core.events import DeathSuspected
from kvguard.device.host import HostDevice
from kvguard.engine import memory
from kvguard.engine.guard import Guard
from kvguard.engine.standby import Claim
from kvguard.engine.table import TableWriter
from kvguard.errors import Fenced, KvguardError, TimedOut
from kvguard.format import local
from kvguard.format import rows as fmt
from kvguard.format.rows import Geometry
from kvguard.types import NO_EPOCH, Rank, StreamId

MS = 1_000_000
GEOMETRY = Geometry(rows=8, blocks=BLOCKS, blocks_per_row=20, ids_per_row=72, block_tokens=BLOCK_TOKENS, tape_steps=6)
U64 = np.uint64


class Line:
    """What stands in for engine.client.Session: one process's line to its node's daemon, in virtual time."""

    def __init__(self, process: Process) -> None:
        self.process, self.refused, self.connection = process, "", 0
        self.attachment = self.received = None
        self.outgoing: deque = deque(maxlen=8)
        self.daemon = None

    @property
    def connected(self) -> bool:
        return bool(self.connection)

    def say(self, message) -> None:
        self.outgoing.append(message)
        self.process.later(50_000, self._flush)

    def attach_again(self, attachment, received) -> None:
        self.attachment, self.received = attachment, received
        if self.connection:
            self.daemon.said(self, *attachment())

    def end(self, timeout_s: float = 1.0) -> None:
        self.connection = 0

    def connect(self) -> None:
        """Dial the node's daemon; again after a while where there is none."""
        life = self.process.world.nodes[self.process.node].life
        if self.refused or self.connection:
            return
        if life is None or self.process.world.nodes[self.process.node].paused:
            self.process.later(40 * MS, self.connect)
            return
        self.daemon, self.connection = life, life.accept(self)
        life.said(self, *self.attachment())
        self._flush()

    def lost(self) -> None:
        self.connection = 0
        self.process.later(self.process.world.random.randrange(5, 60) * MS, self.connect)

    def _flush(self) -> None:
        while self.connection and self.outgoing:
            self.daemon.said(self, self.outgoing.popleft(), [])

    def deliver(self, connection: int, message, descriptors: list[int]) -> None:
        """One message of the daemon, unless the line is another by now."""
        if connection != self.connection or not self.process.alive:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        if type(message) is local.AttachRefused:
            self.process.world.count("attach_refused")
            self.refused = message.reason
            self.process.kill("its attachment was refused")
            return
        self.received(message, descriptors)


class Process:
    """One process of an engine on `node`. `death`: an eventfd that stands in for the pidfd."""

    def __init__(self, world, node: str, name: str) -> None:
        self.world, self.node, self.name = world, node, name
        self.incarnation = world.random.getrandbits(62) | 1
        self.alive, self.dying, self.paused = True, False, False
        self.death = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.backlog: deque = deque()
        self.line = Line(self)
        world.processes[name] = self

    def later(self, delay_ns: int, act) -> None:
        self.world.after(delay_ns, lambda: self.run(act))

    def run(self, act) -> None:
        if not self.alive:
            return
        if self.paused:
            self.backlog.append(act)
            return
        act()

    def go_on(self) -> None:
        self.paused = False
        while self.backlog and self.alive and not self.paused:
            self.backlog.popleft()()

    def kill(self, reason: str) -> None:
        """At once, or with a sign of it before its memory is gone and its pidfd fires; with a large memory on a busy machine that takes seconds."""
        if not self.alive:
            return
        self.alive, self.dying = False, True
        self.world.note(f"process {self.name} dies: {reason}")
        self.settle()
        self.line.connection = 0
        tears_down_ns = self._tears_down_ns()
        if self.world.random_deaths.random() < 0.5 and self.suspected():
            self.world.after(self.world.random_deaths.randrange(1, 120) * MS + tears_down_ns, self._gone)
        elif tears_down_ns:
            self.world.after(tears_down_ns, self._gone)
        else:
            self._gone()

    def _tears_down_ns(self) -> int:
        """0.1 to 8 s of a drawn share of all deaths, long ones seldom; 0 of the others."""
        random = self.world.random_slow
        if random.random() >= self.world.slow_deaths:
            return 0
        self.world.count("deaths_seen_late")
        return int(100 * MS * 80 ** random.random())

    def suspected(self) -> bool:
        """The node's daemon, where there is one, sees the lifeline's mark. A spare has none."""
        return False

    def _gone(self) -> None:
        self.dying = False
        os.eventfd_write(self.death, 1)
        self.world.wake(self.node)
        self.world.process_died(self)

    def settle(self) -> None:
        """Death makes every store visible that was made."""

    def close(self) -> None:
        os.close(self.death)
        self.world.processes.pop(self.name, None)


class LatePool:
    """A pool whose completion word is written a while after the call, as a device's is."""

    def __init__(self, pool, process: RankProcess) -> None:
        self._pool, self._process = pool, process
        self.layout, self.scatter, self.scatter_blocks = pool.layout, pool.scatter, pool.scatter_blocks
        self.capture, self.capture_blocks, self.export = pool.capture, pool.capture_blocks, pool.export

    def publish(self, word, value: int) -> None:
        process, random = self._process, self._process.world.random
        if process.world.late_words and random.random() < 0.5:
            process.world.count("late_words")
            process.later(random.randrange(1, 6) * MS, lambda: self._write(word, value))
        else:
            self._write(word, value)

    def _write(self, word, value: int) -> None:
        if word[0] < value:
            word[0] = value
        self._process.store()
        self._process.world.wake(self._process.node)


class Mirror:
    """The daemon's view of a table: what has reached it of the engine's stores. Both are whole tables; `full` and `part` carry words over."""

    def __init__(self, table: TableWriter) -> None:
        self.fd = memory.create(table.geometry)
        at = fmt.areas(table.geometry)
        self._views = memory.Views(self.fd, writable=True), table.views
        self._theirs = np.frombuffer(self._views[0].body, U64)
        self._ours = np.frombuffer(table.views.body, U64)
        self._generations = slice(at.row_generations // 8, at.heads // 8)
        self._epoch = fmt.EPOCH_AT // 8

    def full(self) -> None:
        self._back()
        moved = np.flatnonzero(self._ours != self._theirs)
        self._theirs[moved] = self._ours[moved]

    def part(self, random) -> None:
        """Generations have arrived (the writer orders them before what follows); of everything else a random part."""
        self._back()
        moved = np.flatnonzero(self._ours != self._theirs)
        seen = [n for n in moved.tolist() if self._generations.start <= n < self._generations.stop or n < fmt.PAGE_BYTES // 8 or random.random() < 0.6]
        self._theirs[seen] = self._ours[seen]

    def _back(self) -> None:
        """The one word that goes the other way."""
        self._ours[self._epoch] = max(self._ours[self._epoch], self._theirs[self._epoch])
        self._theirs[self._epoch] = self._ours[self._epoch]

    def close(self) -> None:
        del self._theirs, self._ours, self._views
        os.close(self.fd)


class Order:
    """One step of the schedule for one rank. `acts`: ("release", name) | ("truncate", name, position); `commits`: (name, length, blocks, (first, ids), request or None);
    `slots`: (block, slot, chain value); `poison`: blocks that nobody references after the acts."""

    __slots__ = ("acts", "commits", "epoch", "number", "poison", "slots")

    def __init__(self, epoch, number, acts, commits, slots, poison_) -> None:
        self.epoch, self.number, self.acts, self.commits, self.slots, self.poison = epoch, number, acts, commits, slots, poison_


class RankProcess(Process):
    """A process that is a rank, or a spare that may become one."""

    def __init__(self, world, node: str, name: str) -> None:
        super().__init__(world, node, name)
        self.guard: Guard | None = None
        self.instance = world.instance
        self.fetches: dict[int, tuple] = {}  # what simulation/moving.py asked for
        self.mirror: Mirror | None = None
        self.pool = None
        self.step = None
        self.hung = self.hanging = False
        self.steps = 0
        self.at_hand: Order | None = None  # arrived, and taken up at any moment: also in the middle of a daemon's copy
        self._orders: deque = deque()
        self._claim: tuple | None = None
        self._taken = NO_EPOCH
        self._poisons = 0

    # ---- becoming ----

    def start_as_rank(self, rank: Rank) -> None:
        stream = StreamId(self.instance, rank, self.world.random.getrandbits(62) | 1)
        self.pool = HostDevice().allocate(layout_of(rank.pp, self.world.stages, self.world.addressable))
        self._become(Guard("rank", self.instance, rank, TableWriter.create(GEOMETRY), None, self.pool.layout, stream, self.name, NO_EPOCH))
        self.guard.session = self.line
        self.line.attachment, self.line.received = self.attachment, self.guard_received
        self.later(MS, self.line.connect)

    def start_as_spare(self) -> None:
        self.line.attachment, self.line.received = self._spare_attachment, self._spare_received
        self.later(MS, self.line.connect)

    def _become(self, guard: Guard, mirrored: bool = True) -> None:
        self.guard = guard
        guard.pool = LatePool(self.pool, self)
        guard.incarnation = self.world.random.getrandbits(62) | 1
        self.mirror = Mirror(guard.table) if mirrored else None

    def attachment(self):
        guard = self.guard
        self.settle()
        message = local.Attach("rank", guard.instance, guard.incarnation, guard.epoch, self.name, guard.stream, {str(guard.rank): guard.layout})
        table = self.mirror.fd if self.mirror is not None else guard.table.fd
        return message, [os.dup(self.death), os.dup(guard._bell), os.dup(table), *self.pool.export()]

    def guard_received(self, message, descriptors: list[int]) -> None:
        if isinstance(message, local.FetchGiven | local.FetchRefused):
            self.world.moving.answered(self, message, descriptors)
            return
        self.guard.received(message, descriptors)
        self.later(self.world.random.randrange(20_000, 3 * MS), self._restore)

    def suspected(self) -> bool:
        life = self.world.nodes[self.node].life
        if life is None or self.guard is None:
            return False
        self.world.count("suspected_early" if not self.alive else "suspected_alive")
        life.loop.feed(DeathSuspected(self.guard.incarnation, self.guard.stream, "its lifeline is marked"))
        self.world.wake(self.node)
        return True

    # ---- a spare's life ----

    def _spare_attachment(self):
        layouts = {str(rank): layout_of(rank.pp, self.world.stages, self.world.addressable) for rank in self.world.ranks}
        return local.Attach("standby", self.world.instance, self.incarnation, NO_EPOCH, self.name, None, layouts), [os.dup(self.death)]

    def _spare_received(self, message, descriptors: list[int]) -> None:
        if type(message) is not local.ClaimOrder or message.epoch.counter <= self._taken.counter:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        self._taken = message.epoch
        self._claim = (message, descriptors)
        self.later(self.world.random.randrange(20_000, 4 * MS), self._take_claim)

    def _take_claim(self) -> None:
        if self._claim is None:
            return
        (order, descriptors), self._claim = self._claim, None
        self.world.count("claims_adopt" if order.adopt else "claims_pull")
        try:
            claim = Claim(order, descriptors, self.line, "host")
            if claim.adopt is not None:
                table, self.pool = claim.adopt
                stream, layout = order.stream, order.layout
            else:
                layout = layout_of(order.rank.pp, self.world.stages, self.world.addressable)
                table, self.pool = TableWriter.create(GEOMETRY), HostDevice().allocate(layout)
                stream = StreamId(order.instance, order.rank, self.world.random.getrandbits(62) | 1)
            self._become(Guard("rank", order.instance, order.rank, table, None, layout, stream, self.name, NO_EPOCH), mirrored=claim.adopt is None)
            self.guard.claim = claim
            claim.session = _Becoming(self)
            restored = self.guard.restore(0.0)
            restored.pull()
            restored.done()
        except KvguardError as error:
            self.world.count("claims_failed")
            self.world.note(f"claim of {order.rank} by {self.name}: {error}")
            if "plan wants more" in str(error):
                raise AssertionError(f"I1: {error}") from error
            self.later(200_000, lambda: self.kill("its claim failed"))
            return
        self.store(whole=True)

    # ---- survivors ----

    def _restore(self) -> None:
        guard = self.guard
        self.refresh()
        if guard is None or self.step is not None or not guard._has_order():
            return
        self.settle()  # what it says now comes behind all that it has stored
        try:
            restored = guard.restore(0.0)
            restored.done()
        except TimedOut:  # its last step had gone back behind what was reported: another plan follows
            assert guard.behind is not None
            self.world.count("survivors_behind")
            return
        except KvguardError as error:
            raise AssertionError(f"I1: a survivor can't do what the plan asks: {error}") from error
        self._orders.clear()
        self.store(whole=True)
        self.world.wake(self.node)

    # ---- steps ----

    def receive(self, order: Order) -> None:
        if self.at_hand is None and self.world.random.random() < 0.4:
            self.at_hand = order
            self.later(self.world.random.randrange(100_000, 5 * MS), self.take_up)
        else:
            self.take_up()
            self.order(order)

    def take_up(self) -> None:
        order, self.at_hand = self.at_hand, None
        if order is not None:
            self.order(order)

    def order(self, order: Order) -> None:
        if not self.hung:
            self._orders.append(order)
            self._next()

    def _next(self) -> None:
        if self.step is not None or not self._orders or self.hung:
            return
        order = self._orders.popleft()
        guard = self.guard
        self.refresh()
        if guard is None or order.epoch != guard.epoch:
            self.world.count("steps_of_other_epochs")
            self._next()
            return
        try:
            self.step = (order, guard.step(max(1, len(order.slots))).__enter__())
        except Fenced:
            self.world.count("steps_fenced")
            self._next()
            return
        self.world.going_back.entered(self, order, self._go_on)

    def _go_on(self) -> None:
        """What comes behind a step's entry."""
        order, step = self.step
        self.refresh()
        self.world.count("went_back_after_a_fence", self.guard.fenced and bool(order.acts))
        self._act(order, step)
        self._ring()
        if self.hanging and self.steps > 12:
            self.hung = True
            self.world.count("hung_in_a_step")
        elif self.world.random.random() < self.world.split_steps:
            self.world.count("steps_split")
            self.later(self.world.random.randrange(10_000, 3 * MS), self._leave)
        else:
            self._leave()

    def _act(self, order: Order, step) -> None:
        live = self.guard.table.sequences()
        for act in order.acts:
            if act[1] not in live:
                continue
            if act[0] == "release":
                step.release(act[1])
            else:
                step.truncate(act[1], act[2])
        self.store()
        for block in order.poison:
            self._poisons += 1
            write_slots(self.pool, [block] * BLOCK_TOKENS, list(range(BLOCK_TOKENS)), [poison(self._poisons)] * BLOCK_TOKENS)
        if order.slots:
            blocks, slots, values = zip(*order.slots, strict=True)
            write_slots(self.pool, list(blocks), list(slots), [slot_bytes(value, self.guard.rank.pp) for value in values])

    def _leave(self) -> None:
        if self.hung:
            return
        (order, step), self.step = self.step, None
        self.steps += 1
        self._commit(order, step)
        self.refresh()
        try:
            step.__exit__(None, None, None)
        except Fenced:
            self.world.count("steps_fenced_at_exit")
            self.store()
            self.later(100_000, self._restore)
            return
        self.store()
        self.world.wake(self.node)
        world, number, rank = self.world, order.number, self.guard.rank
        self.later(world.random.randrange(20_000, MS), lambda: world.driver.result(rank, order.epoch, number))
        self._next()

    def _commit(self, order: Order, step) -> None:
        """One by one; in half of the worlds a step of sequences that all go on by one goes as a batch."""
        table = self.guard.table
        live = table.sequences()
        commits = []
        for name, length, blocks, ids, request in order.commits:
            first, ids = ids
            known = table.known(live[name]) if name in live else first
            commits.append((name, length, blocks, ids[max(0, known - first) :], request))  # what a plan left in the row is not said again
        if self.world.seed & 1 and commits and all(commit[0] in live and len(commit[3]) == 1 for commit in commits):
            blocks = {index: list(commit[2]) for index, commit in enumerate(commits) if commit[2]}
            rows = np.array([live[commit[0]] for commit in commits])
            step.commit_batch(rows, np.array([commit[1] for commit in commits]), np.array([commit[3][0] for commit in commits]), blocks)
            self.world.count("steps_batched" if table.tape is None else "steps_taped")
            return
        for name, length, blocks, ids, request in commits:
            step.commit(name, length, blocks, ids, sampler=b"s%d" % length, request=None if name in live else request)

    def _ring(self) -> None:
        self.guard._ring()
        self.world.wake(self.node)

    # ---- memory ----

    def store(self, whole: bool = False) -> None:
        """Stores reach the daemon's view: all of them, or for a while a part."""
        if self.mirror is None:
            return
        random = self.world.random
        if whole or random.random() >= self.world.torn:
            self.mirror.full()
            return
        self.mirror.part(random)
        self.world.count("torn_tables")
        self.later(random.randrange(10_000, 2 * MS), self._complete)

    def _complete(self) -> None:
        self.mirror.full()
        self._ring()

    def refresh(self) -> None:
        if self.mirror is not None:
            self.mirror._back()

    def settle(self) -> None:
        if self.mirror is not None:
            self.mirror.full()

    def close(self) -> None:
        super().close()
        if self._claim is not None:
            for descriptor in self._claim[1]:
                os.close(descriptor)
        if self.guard is not None:
            if self.guard.claim is not None:
                self.guard.claim.close()
            self.guard.session = None
            if self.mirror is not None:
                self.mirror.close()
            pool, self.guard.pool = self.pool, None
            self.guard.detach()
            pool.close()


class _Becoming:
    """The session of a claim: its line becomes the rank's, and the rank's own receiver hears what follows."""

    def __init__(self, process: RankProcess) -> None:
        self._process = process

    def say(self, message) -> None:
        self._process.line.say(message)

    def attach_again(self, attachment, received) -> None:
        process = self._process
        process.guard.session = process.line
        process.line.attach_again(process.attachment, process.guard_received)
