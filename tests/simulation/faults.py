"""What goes wrong: drawn from the seed before the run begins, carried out at its times, counted when it struck.

Knows: the world's processes and network. Must not know: what should come of it (checks.py).
Invariant: after calm() nothing is broken any more and everything that died is (being) started again.
"""

from __future__ import annotations

from simulation.engines import MS

from kvguard.errors import BadFrame
from kvguard.format import messages, wire
from kvguard.transport.base import Frame

STREAM = (messages.Hello, messages.Held, messages.IdsFrame, messages.KvFrame, messages.Ack)
KINDS = (
    "kill_rank", "kill_rank", "kill_rank", "kill_node", "kill_node", "kill_daemon", "kill_coordinator", "kill_coordinator_midway", "kill_node_midway", "kill_driver",
    "partition", "partition_one_way", "partition_one_way", "cut_off_and_fence", "reset", "pause_daemon", "pause_rank", "pause_coordinator", "pause_node", "hang_rank",
    "journal", "lose_disk", "noise", "rude",
)  # fmt: skip


class Faults:
    def __init__(self, world) -> None:
        self.world = world
        self.end_ns = 0
        self.calmed = False
        self.rude = 0.0
        self._old_frames: list = []

    def plan(self) -> None:
        world, random = self.world, self.world.random
        number = random.choice((1, 1, 2, 2, 3, 5))
        at = 300 * MS
        for _ in range(number):
            at += random.randrange(20, 600) * MS
            kind = random.choice(KINDS)
            world.after(at, lambda kind=kind: self.strike(kind))
        if random.random() < 0.3:
            world.after(200 * MS, lambda: self.strike("noise"))
        self.end_ns = at + random.randrange(100, 900) * MS

    def strike(self, kind: str) -> None:
        """What is drawn goes wrong now, unless it is calm."""
        if self.calmed:
            return
        if getattr(self, f"_{kind}")() is not False:
            self.world.count(f"fault_{kind}")
            self.world.note(f"FAULT {kind}")

    def calm(self) -> None:
        """Nothing breaks from now on."""
        world = self.world
        self.calmed, self.rude = True, 0.0
        world.ways += 1
        world.note("CALM")
        for direction in world.network._directions.values():
            direction.cut = False
            direction.reset = direction.duplicate = direction.corrupt_head = direction.corrupt_payload = 0.0
        for host in world.hosts():
            if host.paused:
                self._unpause(host)
            if host.disk is not None:
                host.disk.fail = 0
            if host.life is not None and hasattr(host.life, "crash_in"):
                host.life.crash_in = None
            if host.life is None:
                world.start(host)
        for process in list(world.processes.values()):
            if process.paused:
                process.go_on()
        for name in world.nodes:
            world.after(50 * MS, lambda name=name: world._supervise(name))
            world.after(400 * MS, lambda name=name: world._supervise(name))

    # ---- choosing ----

    def _pick(self, of: list):
        return self.world.random.choice(of) if of else None

    def _rank(self):
        return self._pick([process for process in self.world.processes.values() if process.alive and process.guard is not None])

    def _node(self):
        return self._pick([host for host in self.world.nodes.values() if host.life is not None])

    def restart_later(self, host) -> None:
        self.world.after(self.world.random.randrange(20, 900) * MS, lambda: self.world.start(host))

    # ---- deaths ----

    def _kill_rank(self):
        process = self._rank()
        if process is None:
            return False
        if self.world.random_deaths.random() >= 0.4 or not process.suspected():  # else a thread of it alone ends: its daemon makes that a death
            process.kill("SIGKILL")

    def _kill_node(self):
        """The group dies: daemon, ranks, spares; memory gone. Its disk stays, or not."""
        host = self._node()
        if host is None:
            return False
        world = self.world
        world.stop(host, "SIGKILL to its group")
        host.shelf.burn()
        for process in list(world.processes.values()):
            if process.node == host.name:
                process.kill("with its node")
        world.after(world.random.randrange(100, 1500) * MS, lambda: world.start(host))

    def _lose_disk(self):
        """As kill_node, and it comes back as an empty machine of the same name."""
        host = self._node()
        if host is None:
            return False
        host.disk.values.clear()
        host.disk.incarnation = self.world.random.getrandbits(40)
        self.world.stop(host, "its machine is replaced")
        host.shelf.burn()
        for process in list(self.world.processes.values()):
            if process.node == host.name:
                process.kill("with its machine")
        self.restart_later(host)

    def _kill_daemon(self):
        host = self._node()
        if host is None:
            return False
        self.world.stop(host, "SIGKILL")
        self.restart_later(host)

    def _kill_coordinator(self):
        self.world.stop(self.world.coordinator, "SIGKILL")
        self.restart_later(self.world.coordinator)

    def _kill_coordinator_midway(self):
        """It dies between two effects of a recovery, several times in a row."""
        life = self.world.coordinator.life
        if life is None:
            return False
        life.crash_in = self.world.random.randrange(0, 12)
        process = self._rank()
        if process is not None:
            process.kill("SIGKILL, for a recovery")
        for delay in (700, 1400):
            self.world.after(delay * MS, lambda: self._crash_soon(self.world.coordinator))

    def _crash_soon(self, host) -> None:
        if host.life is not None and not self.calmed:
            host.life.crash_in = self.world.random.randrange(0, 30)

    def _kill_node_midway(self):
        host = self._node()
        if host is None:
            return False
        host.life.crash_in = self.world.random.randrange(0, 60)

    def _kill_driver(self):
        if self.world.driver_host.life is None:
            return False
        self.world.stop(self.world.driver_host, "SIGKILL")
        self.restart_later(self.world.driver_host)

    # ---- ways ----

    def _names(self) -> list[str]:
        return [host.name for host in self.world.hosts()]

    def _cut(self, pairs, low: int = 50, high: int = 1500) -> None:
        world = self.world
        for source, target in pairs:
            world.network.between(source, target).cut = True
            world.ways += 1
            world.note(f"cut {source} -> {target}")

        def heal() -> None:
            for source, target in pairs:
                world.network.between(source, target).cut = False
            world.ways += 1
            world.note(f"healed {pairs}")

        world.after(world.random.randrange(low, high) * MS, heal)

    def _partition(self):
        one = self._pick(self._names())
        self._cut([pair for other in self._names() if other != one for pair in ((one, other), (other, one))])

    def _partition_one_way(self):
        one, other = self.world.random.sample(self._names(), 2)
        self._cut([(one, other)])

    def _cut_off_and_fence(self):
        """A holder is cut off from the coordinator while a rank dies: it comes back with more positions than the plan kept."""
        names = list(self.world.nodes)
        one = self._pick(names)
        self._cut([(one, "coordinator"), ("coordinator", one)], 700, 2500)
        process = self._pick([p for p in self.world.processes.values() if p.alive and p.guard is not None and p.node != one])
        if process is not None:
            self.world.after(self.world.random.randrange(1, 400) * MS, lambda: process.kill("SIGKILL, with a holder cut off"))

    def _reset(self):
        host = self._node()
        if host is None or not host.life.shell.up:
            return False
        self.world.network.reset_link(host.name, self._pick(list(host.life.shell.up)))

    def _noise(self):
        """For a while every link duplicates, damages and resets."""
        world, random = self.world, self.world.random
        rates = random.choice((0.0, 0.05)), random.choice((0.0, 0.02)), random.choice((0.0, 0.03)), random.choice((0.0, 0.01))
        for one in world.nodes:
            for other in world.nodes:
                if one != other:
                    way = world.network.between(one, other)
                    way.duplicate, way.corrupt_head, way.corrupt_payload, way.reset = rates
                    way.jitter_ns = random.choice((0, 2 * MS))

        def over() -> None:
            for way in world.network._directions.values():
                way.duplicate = way.corrupt_head = way.corrupt_payload = way.reset = 0.0

        world.after(random.randrange(200, 900) * MS, over)

    def _rude(self):
        self.rude = 0.04
        self.world.after(self.world.random.randrange(200, 900) * MS, lambda: setattr(self, "rude", 0.0))

    def spoil(self, life, incoming: list) -> list:
        """A way without order: frames of streams are lost, overtaken, repeated late. Everything else keeps the transport's promise."""
        if not self.rude:
            return incoming
        world, random, out = self.world, self.world.random, []
        for one in incoming:
            if type(one) is not Frame or random.random() >= self.rude:
                out.append(one)
                continue
            try:
                message = wire.decode(one.head)[0]
            except BadFrame:
                message = None
            if type(message) not in STREAM:
                out.append(one)
                continue
            choice = random.randrange(4)
            copy = Frame(one.link, one.head, None if one.payload is None else memoryview(bytearray(one.payload)))
            if choice == 0:
                world.count("frames_lost")
            elif choice == 1 and out:
                world.count("frames_overtaken")
                out.insert(random.randrange(len(out)), one)
            elif choice == 2:
                world.count("frames_kept_for_later")
                self._old_frames.append((life.name if hasattr(life, "name") else "driver", copy))
                out.append(one)
            else:
                out.append(one)
                mine = [old for name, old in self._old_frames if name == getattr(life, "name", "driver")]
                if mine:
                    world.count("frames_replayed")
                    old = random.choice(mine)
                    out.append(Frame(one.link, old.head, None if old.payload is None else memoryview(bytearray(old.payload))))
        return out

    # ---- pauses ----

    def _unpause(self, host) -> None:
        if host.paused:
            host.paused = False
            self.world.note(f"{host.name} goes on")
            self.world.wake(host.name)

    def pause(self, host, ms: int) -> bool:
        """SIGSTOP, and SIGCONT `ms` later."""
        if host is None or host.life is None:
            return False
        host.paused = True
        self.world.note(f"{host.name} stops")
        self.world.after(ms * MS, lambda: self._unpause(host))
        return True

    def _pause_daemon(self):
        return self._pause_long(self._node())

    def _pause_coordinator(self):
        return self._pause_long(self.world.coordinator)

    def _pause_long(self, host) -> bool:
        return host is not None and host.life is not None and self.pause(host, self.world.random.randrange(20, 1500))

    def _pause_rank(self):
        process = self._rank()
        if process is None:
            return False
        process.paused = True
        self.world.after(self.world.random.randrange(20, 1500) * MS, process.go_on)

    def _pause_node(self):
        """SIGSTOP to the group, SIGCONT later: it comes back and believes that nothing happened."""
        host = self._node()
        if host is None:
            return False
        self._pause_long(host)
        mine = [process for process in self.world.processes.values() if process.node == host.name and process.alive]
        for process in mine:
            process.paused = True
        delay = self.world.random.randrange(20, 2000) * MS
        self.world.after(delay, lambda: [process.go_on() for process in mine])

    def _hang_rank(self):
        """It enters its next step and never leaves it."""
        process = self._rank()
        if process is None:
            return False
        process.hanging = True

    def _journal(self):
        host = self._pick([*self.world.nodes.values(), self.world.coordinator])
        host.disk.fail = 1
