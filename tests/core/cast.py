"""Nodes, a store and an emitter that answer a coordinator as real ones would, with time in hand: what the coordinator's scenarios play against.

Knows: the contract of messages. Must not know: how the coordinator decides.
"""

from __future__ import annotations

from kvguard.core.coordinator import Coordinator
from kvguard.core.effects import AnswerAsked, Note, Persist, Send
from kvguard.core.events import Arrived, Asked, LinkDown, LinkUp, Loaded, Tick
from kvguard.core.known import Settings
from kvguard.format import messages as m
from kvguard.types import NO_EPOCH, Epoch, Fork, Rank, StreamId

MS = 1_000_000
INSTANCE = "i"


class Daemon:
    """A node's daemon with its ranks, replicas and standbys, as far as the coordinator can tell."""

    def __init__(self, name: str, standbys: int = 1):
        self.name, self.link, self.incarnation, self.alive = name, f"in:{name}:1", 1, True
        self.promise = NO_EPOCH
        self.ranks: dict[Rank, dict] = {}
        self.replicas: dict[StreamId, dict] = {}  # stream -> {sequence: (position, ids)}
        self.standbys = [1000 * (ord(name) - 96) + no for no in range(standbys)]
        self.plan: m.PlanOrder | None = None
        self.dropped: list[StreamId] = []
        self.lineages: dict[str, tuple] = {}
        self.births: dict[StreamId, int] = {}  # of all that a stream's copies here hold
        self.errors: dict[str, str] = {}  # part -> why it fails
        self.silent_parts: list[str] = []

    def host(self, rank: Rank, rows: dict, life: int = 1) -> StreamId:
        stream = StreamId(INSTANCE, rank, life)
        self.ranks[rank] = {"stream": stream, "rows": rows, "alive": True, "incarnation": 10 * rank.pp + life, "progress": 1, "epoch": NO_EPOCH, "state": "protected", "looked": True}
        return stream

    def hello(self) -> m.NodeHello:
        promises = ((INSTANCE, self.promise),) if self.promise != NO_EPOCH else ()
        return m.NodeHello(self.name, self.incarnation, f"tcp://{self.name}", promises, "1")

    def beat(self) -> m.Beat:
        ranks = tuple(self._rank_beat(has) for has in self.ranks.values())
        standbys = tuple(m.StandbyBeat(INSTANCE, no, f"spare {no}", {f"0.{pp}.0": 0 for pp in range(4)}) for no in self.standbys)
        return m.Beat(self.name, self.incarnation, 1, ranks, standbys, (), 0, 0)

    def _rank_beat(self, has: dict) -> m.RankBeat:
        state = has["state"] if has["alive"] else "lost"
        committed = sum(position for position, _ in has["rows"].values())
        numbers = (len(has["rows"]), 0, committed, committed if has["looked"] else 0, 0, 0, 0.0)
        return m.RankBeat(has["stream"], has["epoch"], has["incarnation"], f"engine of {has['stream'].rank}", state, "", tuple(has.get("holders", ())), *numbers, has["progress"], 0, tuple(has.get("whole", ())))

    def kill_rank(self, rank: Rank) -> m.Fault:
        has = self.ranks[rank]
        has["alive"] = False
        return m.Fault(self.name, has["stream"], has["incarnation"], "died", "signal 9", True, 3.0)

    def hears(self, message) -> list:
        """The answers, in order."""
        if isinstance(message, m.Fence):
            if message.epoch.counter < self.promise.counter:
                return []
            self.promise = message.epoch
            return [m.Report(INSTANCE, message.epoch, self.name, self._holdings())]
        if isinstance(message, m.PlanOrder):
            assert message.epoch == self.promise, f"{self.name}: a plan of {message.epoch} after a promise of {self.promise}"
            assert self.plan is None or self.plan.epoch != message.epoch or self.plan == message, "two plans of one epoch"
            self.plan = message
            return self._carry(message)
        if isinstance(message, m.RebuildOrder):
            return self._rebuild(message)
        if isinstance(message, m.Resumed):
            for has in self.ranks.values():
                has["epoch"] = message.epoch if not has.get("fenced") else has["epoch"]
            self.dropped += message.unpinned
        return []

    def _holdings(self) -> tuple[m.Holding, ...]:
        pools = [(has["stream"], "pool", has["alive"], has["rows"]) for has in self.ranks.values()]
        held = [*pools, *((stream, "replica", True, rows) for stream, rows in self.replicas.items())]
        return tuple(
            m.Holding(stream, kind, alive, tuple(rows), (1,) * len(rows), tuple(self.lineages.get(name, (Fork(0, 0),)) for name in rows), tuple(r[0] for r in rows.values()), tuple(r[1] for r in rows.values()), 0, (self.births.get(stream, 0),) * len(rows))
            for stream, kind, alive, rows in held
        )  # fmt: skip

    def _done(self, epoch: Epoch, part: str, **more) -> list:
        if part in self.silent_parts:
            return []
        return [m.Done(INSTANCE, epoch, self.name, part, self.errors.pop(part, ""), **more)]

    def _carry(self, plan: m.PlanOrder) -> list:
        tables = {**self.replicas, **{has["stream"]: has["rows"] for has in self.ranks.values()}}
        columns = zip(plan.sequences, plan.ids, plan.ids_node, plan.ids_stream, strict=True)
        asked = [(name, ids, tables[stream]) for name, ids, node, stream in columns if node == self.name]
        known = tuple(m.KnownIds(name, bytes(4 * min(ids, rows[name][1])), b"", b"") for name, ids, rows in asked if name in rows)
        said = self._done(plan.epoch, "holders", known=known)
        lost = [rebuild.rank for rebuild in plan.rebuilds]
        for sequence, position, ids, lineage in zip(plan.sequences, plan.positions, plan.ids, plan.lineages, strict=True):
            self.lineages[sequence] = lineage
            for rows in (*(has["rows"] for has in self.ranks.values()), *self.replicas.values()):
                if sequence in rows:
                    rows[sequence] = (min(position, rows[sequence][0]), min(ids, rows[sequence][1]))
        for rank, has in self.ranks.items():
            has["fenced"] = has.get("fenced", False) or rank in plan.moved  # it ends: no newer epoch is its own
            if has["alive"] and rank not in lost:
                said += self._done(plan.epoch, f"rank {rank}", endpoint=f"engine of {rank}", stream=has["stream"])
        for holder, _, _, stream in plan.transfers:
            if holder == self.name:
                said += self._done(plan.epoch, f"transfer {stream}")
        return said

    def _rebuild(self, order: m.RebuildOrder) -> list:
        rebuild, part = order.rebuild, f"rank {order.rebuild.rank}"
        if rebuild.standby in self.standbys:
            if part in self.errors or part in self.silent_parts:
                return self._done(order.epoch, part)
            self.standbys.remove(rebuild.standby)
            adopts = [source.stream for source in rebuild.sources if source.kind == "pool"]
            rows = dict(zip(self.plan.sequences, zip(self.plan.positions, self.plan.ids, strict=True), strict=True))
            stream = self.host(rebuild.rank, rows, life=rebuild.standby)
            self.ranks[rebuild.rank]["incarnation"] = rebuild.standby
            if adopts:
                self.ranks[rebuild.rank]["stream"] = stream = adopts[0]
        stream = self.ranks[rebuild.rank]["stream"]
        return self._done(order.epoch, part, endpoint=f"spare {rebuild.standby}", stream=stream, bytes_by_rung={"replica": 5})


class Emitter:
    def __init__(self, incarnation: int):
        self.link, self.incarnation, self.alive, self.epoch, self.fenced = f"in:emitter:{incarnation}", incarnation, True, NO_EPOCH, NO_EPOCH
        self.scheduled, self.progress = 1, 1
        self.welcomes: list[m.Welcome] = []
        self.resumes: list[m.Resume] = []

    def hello(self) -> m.EmitterHello:
        return m.EmitterHello(INSTANCE, self.incarnation, self.epoch)

    def beat(self) -> m.EmitterBeat:
        return m.EmitterBeat(INSTANCE, self.incarnation, self.epoch, self.scheduled, self.progress, self.fenced.counter)

    def hears(self, message) -> list:
        if isinstance(message, m.Welcome):
            self.welcomes.append(message)
        elif isinstance(message, m.Fenced):
            self.fenced = max(self.fenced, message.epoch)
            return [self.beat()]
        elif isinstance(message, m.Resume):
            self.resumes.append(message)
            if not message.error and message.epoch > self.epoch:
                self.epoch = message.epoch
            return [m.Adopted(INSTANCE, self.incarnation, message.epoch)]
        return []


class Cast:
    """A world in one thread. `kill_after`: the coordinator dies after so many effects of its life and comes back from its store."""

    def __init__(self, settings: Settings = Settings(), kill_after: int | None = None):  # noqa: B008 - a frozen value
        self.settings, self.kill_after = settings, kill_after
        self.now = 1_000_000_000
        self.store: dict[str, bytes] = {}
        self.daemons: dict[str, Daemon] = {}
        self.emitter: Emitter | None = None
        self.performed: list = []
        self.notes: list[Note] = []
        self.answers: list[AnswerAsked] = []
        self.queue: list = []
        self.deaths = 0
        self.lives = 0
        self._begin()

    def _begin(self) -> None:
        self.lives += 1
        self.coordinator = Coordinator("c", self.settings)
        self.queue = []
        self.take(Loaded(dict(self.store)))
        for daemon in self.daemons.values():
            if daemon.alive:
                self.join(daemon)
        if self.emitter is not None and self.emitter.alive:
            self.connect(self.emitter)

    def join(self, daemon: Daemon) -> None:
        self.daemons[daemon.name] = daemon
        daemon.link = f"in:{daemon.name}:{self.lives}:{daemon.incarnation}"
        self.queue += [LinkUp(daemon.link), Arrived(daemon.link, daemon.hello()), Arrived(daemon.link, daemon.beat())]

    def connect(self, emitter: Emitter) -> None:
        self.emitter = emitter
        emitter.link = f"in:emitter:{emitter.incarnation}:{self.lives}"
        self.queue += [LinkUp(emitter.link), Arrived(emitter.link, emitter.hello()), Arrived(emitter.link, emitter.beat())]

    def say(self, daemon: Daemon, message) -> None:
        self.queue.append(Arrived(daemon.link, message))

    def take(self, event) -> None:
        """One event through the core; its effects performed in order, or cut short by the coordinator's death."""
        effects = self.coordinator.step(self.now, event)
        self.coordinator.check()
        for effect in effects:
            if self.kill_after is not None and len(self.performed) == self.kill_after:
                self.kill_after = None
                self.deaths += 1
                self._begin()
                return
            self.perform(effect)

    def perform(self, effect) -> None:
        self.performed.append(effect)
        if isinstance(effect, Persist):
            self.store.pop(effect.key, None) if effect.value is None else self.store.__setitem__(effect.key, effect.value)
        elif isinstance(effect, Send):
            hearers = [*self.daemons.values(), *([self.emitter] if self.emitter is not None else [])]
            hearer = next((one for one in hearers if one.link == effect.link and one.alive), None)
            if hearer is not None:
                self.queue += [Arrived(hearer.link, answer) for answer in hearer.hears(effect.message)]
        elif isinstance(effect, Note):
            self.notes.append(effect)
        elif isinstance(effect, AnswerAsked):
            self.answers.append(effect)

    def drain(self) -> None:
        while self.queue:
            event = self.queue.pop(0)
            self.now += MS // 10
            self.take(event)

    def run(self, ms: int) -> None:
        """Time passes: heartbeats every 100 ms, ticks when they are due."""
        self.drain()
        for _ in range(ms // 50):
            self.now += 50 * MS
            if (self.now // (50 * MS)) % 2:
                for daemon in self.daemons.values():
                    if daemon.alive:
                        self.say(daemon, daemon.beat())
                if self.emitter is not None and self.emitter.alive:
                    self.queue.append(Arrived(self.emitter.link, self.emitter.beat()))
            self.queue.append(Tick(0))
            self.drain()

    def kill(self, one, torn: bool = True) -> None:
        one.alive = False
        if torn:
            self.queue.append(LinkDown(one.link, "reset"))

    def ask(self, verb: str, **arguments) -> AnswerAsked:
        self.take(Asked(len(self.answers) + 1, verb, arguments))
        return self.answers[-1]

    def sent(self, kind) -> list:
        return [effect.message for effect in self.performed if isinstance(effect, Send) and isinstance(effect.message, kind)]

    def noted(self, what: str) -> list[Note]:
        return [note for note in self.notes if note.what == what]

    def epoch(self) -> int:
        return next((entry["epoch"] for entry in self.coordinator.status()["instances"]), 0)


def three_stages(emitter: bool = True, **more) -> Cast:
    """Stages 0, 1, 2 on a, b, c; each one's replica on the next; a standby everywhere; two sequences."""
    cast = Cast(**more)
    rows = {"s": (9, 11), "t": (5, 7)}
    streams = {}
    for pp, name in enumerate("abc"):
        daemon = cast.daemons[name] = Daemon(name)
        streams[pp] = daemon.host(Rank(0, pp, 0), dict(rows) if emitter else dict(rows))
    for pp, name in enumerate("bca"):
        cast.daemons[name].replicas[streams[pp]] = {"s": (8, 11), "t": (5, 7)}
    for daemon in list(cast.daemons.values()):
        held = [has["rows"] for has in daemon.ranks.values()]
        full = [dict(had) for had in held]
        for had in held:
            had.clear()  # the emitter connects before the first sequence
        cast.join(daemon)
        for had, was in zip(held, full, strict=True):
            had.update(was)
    cast.drain()
    if emitter:
        cast.connect(Emitter(1))
    cast.run(300)
    return cast
