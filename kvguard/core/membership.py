"""Which nodes, ranks and emitters live: alive, suspect or dead, each with a reason. Nobody is declared dead because this loop slept.

Knows: when each was last heard, in time during which this loop ran; whose progress rises. Must not know: epochs, plans, links' transport.
Invariants: `dead` needs silence for the whole threshold *and* no progress of anyone who depends on the node for as long, while work is scheduled
(house rule "daemon gone is not node gone"); where nobody could see progress, a daemon whose connection its node's kernel closed has a restart's time; a node
without ranks is dead by silence alone, because nothing is lost with it; a rank that its living node doesn't list any more has a grace period to re-attach; one
emitter session per instance.
"""

from __future__ import annotations

from typing import NamedTuple

from kvguard.format.messages import Beat, EmitterBeat, NodeHello, RankBeat, SchedulerBeat, StandbyBeat
from kvguard.types import NodeId, Rank, StreamId

MS = 1_000_000
ALIVE, SUSPECT, DEAD = "alive", "suspect", "dead"
BEATS_MISSED = 3  # fewer are no silence


class Patience(NamedTuple):
    """How long silence is borne, ns."""

    heartbeat_ns: int = 100 * MS
    suspect_ns: int = 500 * MS  # of a node: said, nothing is done
    silence_ns: int = 1000 * MS  # of a node; with the heartbeat before and the beat that reports the last progress: verdict within 1.5 s
    reattach_ns: int = 2000 * MS  # of a rank whose daemon restarted
    start_ns: int = 2000 * MS  # extra, for those known from the store alone after this coordinator started
    emitter_ns: int = 1000 * MS  # of an emitter that doesn't promise to be silent for longer
    emitter_most_ns: int = 60_000 * MS  # the longest promise that counts

    def of_emitter(self, promised_ms: int) -> int:
        """ns of silence after which an emitter that promised this is dead."""
        return max(self.emitter_ns, min(promised_ms * MS, self.emitter_most_ns))


class FairClock:
    """Time that passes only while this loop runs: what a late wake-up adds is taken out, so that silence is never the listener's own sleep."""

    __slots__ = ("_slack_ns", "due_ns", "lost_ns")

    def __init__(self, slack_ns: int):
        self._slack_ns, self.lost_ns = slack_ns, 0
        self.due_ns: int | None = None  # when the loop was asked to wake, in real time

    def read(self, now_ns: int, late_ns: int = 0) -> int:
        if self.due_ns is not None:
            late_ns = max(late_ns, now_ns - self.due_ns)
        if late_ns > self._slack_ns:
            self.lost_ns += late_ns
        self.due_ns = None
        return now_ns - self.lost_ns


class Node:
    """One node as heard. Times `_ns` are fair, except `beat_ns` (real: what a verdict's age is counted from), `told_ns` and `figures_ns` (real: of which
    moment its last heartbeat is, and what that said of its arena; None before the first)."""

    __slots__ = (
        "address", "arena_bytes", "arena_bytes_max", "beat_ns", "carriers", "device_faults", "ended", "figures_ns", "incarnation", "link", "node", "promises",
        "reason", "replicas", "schedulers", "seen_ns", "standbys", "state", "told_ns", "version",
    )  # fmt: skip

    def __init__(self, node: NodeId, seen_ns: int, now_ns: int):
        self.node, self.seen_ns, self.beat_ns = node, seen_ns, now_ns
        self.link, self.address, self.version, self.incarnation = "", "", "", 0
        self.state, self.reason = SUSPECT, "known from the store, not heard yet"
        self.promises: tuple = ()
        self.standbys: tuple[StandbyBeat, ...] = ()
        self.replicas: tuple = ()
        self.schedulers: tuple[SchedulerBeat, ...] = ()
        self.carriers: tuple[tuple[NodeId, str], ...] = ()
        self.device_faults: tuple[tuple[str, str], ...] = ()
        self.arena_bytes = self.arena_bytes_max = 0
        self.told_ns: int | None = None
        self.figures_ns: int | None = None
        self.ended = False  # its link went down without a silence before: its daemon's process ended, on a node that lived


class Member:
    """A rank where it lives. `absent_ns`: since when its living node doesn't list it; `lost`: the verdict is spoken, a recovery has it.

    `worked`: it has (or may have) had sequences, so that its holders have something to keep. `beat_ns`: real, when the last heartbeat with it came.
    """

    __slots__ = (
        "absent_ns", "beat", "beat_ns", "endpoint", "fingerprint", "former", "holders", "incarnation", "lost", "node", "progress", "rose_ns", "stream",
        "worked",
    )  # fmt: skip

    def __init__(self, node: NodeId, stream: StreamId, incarnation: int, endpoint: str):
        self.node, self.stream, self.incarnation, self.endpoint = node, stream, incarnation, endpoint
        self.holders: tuple[NodeId, ...] = ()
        self.former: tuple[NodeId, ...] = ()
        self.beat: RankBeat | None = None
        self.beat_ns: int | None = None
        self.progress, self.rose_ns = -1, -1
        self.absent_ns: int | None = None
        self.lost, self.worked = False, True
        self.fingerprint = 0  # of its shape; 0: not said yet


class Session:
    """The emitter of an instance. `fenced`: the highest epoch counter that it is known to have adopted or been stopped in.

    `silence_ns`: so long it may be silent.
    """

    __slots__ = ("busy_ns", "ended", "fenced", "incarnation", "link", "progress", "rose_ns", "scheduled", "seen_ns", "silence_ns")

    def __init__(self, incarnation: int, link: str, seen_ns: int, silence_ns: int):
        self.incarnation, self.link, self.seen_ns, self.silence_ns = incarnation, link, seen_ns, silence_ns
        self.scheduled, self.progress, self.rose_ns, self.busy_ns = 0, -1, -1, seen_ns
        self.ended, self.fenced = False, 0


class Verdict(NamedTuple):
    """`what`: node | ranks | gone (a rank that left without work) | emitter | state (nothing but a reason changed). `since_ns`: real time last heard."""

    what: str
    subject: str
    reason: str
    since_ns: int
    ranks: tuple[tuple[str, Rank], ...] = ()


class Membership:
    """All of them. `recovering`: instances whose ranks are quiesced, so that nobody's progress can be asked for."""

    def __init__(self, patience: Patience):
        self.patience = patience
        self.nodes: dict[NodeId, Node] = {}
        self.members: dict[str, dict[Rank, Member]] = {}
        self.sessions: dict[str, Session] = {}
        self.recovering: dict[str, int] = {}  # instance -> fair ns since when

    # ---- what was heard

    def hello(self, fair_ns: int, now_ns: int, link: str, message: NodeHello) -> bool:
        """True when the node's daemon is another life than the one known."""
        node = self.nodes.get(message.node)
        reborn = node is None or node.incarnation != message.incarnation
        if node is None:
            node = self.nodes[message.node] = Node(message.node, fair_ns, now_ns)
        if reborn:
            node.standbys, node.replicas, node.schedulers, node.carriers, node.device_faults = (), (), (), (), ()
            for _, _, member in self._on(message.node):
                member.absent_ns = fair_ns
        node.link, node.address, node.version, node.incarnation, node.promises = link, message.address, message.version, message.incarnation, message.promises
        self._heard(node, fair_ns, now_ns, "said hello")
        return reborn

    def beat(self, fair_ns: int, now_ns: int, message: Beat) -> tuple[list[RankBeat], list[RankBeat]]:
        """Ranks never seen, and ranks known elsewhere or under another stream. Beats of an incarnation that didn't say hello are ignored."""
        node = self.nodes.get(message.node)
        if node is None or node.incarnation != message.incarnation:
            return [], []
        self._heard(node, fair_ns, now_ns, "heartbeats")
        node.standbys, node.replicas, node.arena_bytes, node.arena_bytes_max = message.standbys, message.replicas, message.arena_bytes, message.arena_bytes_max
        node.schedulers, node.carriers, node.device_faults = message.schedulers, message.carriers, message.device_faults
        node.told_ns, node.figures_ns = now_ns, now_ns - round(message.figures_age_ms * MS)
        new, strange, listed = [], [], {}
        for rank_beat in message.ranks:
            if rank_beat.state == "standby":
                continue
            instance, rank = rank_beat.stream.instance, rank_beat.stream.rank
            listed[instance, rank] = True
            member = self.members.get(instance, {}).get(rank)
            if member is None:
                new.append(rank_beat)
            elif member.stream != rank_beat.stream or member.node != message.node:
                strange.append(rank_beat)
            else:
                self._sighted(member, rank_beat, fair_ns)
        for instance, rank, member in self._on(message.node):
            if (instance, rank) not in listed and member.absent_ns is None:
                member.absent_ns = fair_ns
        return new, strange

    def adopt(self, fair_ns: int, node: NodeId, rank_beat: RankBeat) -> Member:
        """The rank lives there from now on."""
        member = Member(node, rank_beat.stream, rank_beat.incarnation, rank_beat.endpoint)
        self.members.setdefault(rank_beat.stream.instance, {})[rank_beat.stream.rank] = member
        member.worked = False
        self._sighted(member, rank_beat, fair_ns)
        return member

    def emitter_beat(self, fair_ns: int, session: Session, message: EmitterBeat) -> None:
        session.seen_ns = fair_ns
        if message.scheduled and not session.scheduled:
            session.busy_ns = fair_ns
        session.scheduled = message.scheduled
        if message.progress > session.progress:
            session.progress, session.rose_ns = message.progress, fair_ns

    def link_down(self, link: str, reason: str, fair_ns: int) -> list[Verdict]:
        """A torn link is a hint, not a verdict."""
        told = []
        for node in self.nodes.values():
            if node.link == link:
                node.link = ""
                node.ended = fair_ns - node.seen_ns < min(self.patience.suspect_ns, BEATS_MISSED * self.patience.heartbeat_ns)
                if node.state == ALIVE:
                    node.state, node.reason = SUSPECT, f"its link went down: {reason}"
                    told.append(Verdict("state", node.node, node.reason, node.beat_ns))
        for session in self.sessions.values():
            if session.link == link:
                session.link = ""
        return told

    def _heard(self, node: Node, fair_ns: int, now_ns: int, reason: str) -> None:
        node.seen_ns, node.beat_ns, node.state, node.reason, node.ended = fair_ns, now_ns, ALIVE, reason, False

    def _sighted(self, member: Member, rank_beat: RankBeat, fair_ns: int) -> None:
        if member.progress >= 0 and rank_beat.progress > member.progress:
            member.rose_ns = fair_ns
        member.progress = max(member.progress, rank_beat.progress)
        member.worked = member.worked or rank_beat.sequences > 0
        member.fingerprint = rank_beat.fingerprint or member.fingerprint
        node = self.nodes.get(member.node)
        member.beat_ns = node.told_ns if node is not None else None
        member.beat, member.absent_ns, member.endpoint, member.incarnation = rank_beat, None, rank_beat.endpoint, rank_beat.incarnation

    def _on(self, node: NodeId):
        for instance, members in self.members.items():
            for rank, member in members.items():
                if member.node == node and not member.lost:
                    yield instance, rank, member

    def is_working(self, instance: str, rank: Rank) -> bool:
        """Whether anyone may count on the process behind this rank: it or another of its dp has sequences, or the emitter has scheduled some."""
        session = self.sessions.get(instance)
        if session is not None and not session.ended and session.scheduled:
            return True
        others = (member for other, member in self.members[instance].items() if other.dp == rank.dp and not member.lost)
        return any(member.beat is not None and member.beat.sequences for member in others)

    # ---- judgement

    def judge(self, fair_ns: int) -> list[Verdict]:
        """What silence says by now. Each verdict is spoken once: who hears it marks members lost, sessions ended."""
        told = []
        for node in self.nodes.values():
            quiet_ns = fair_ns - node.seen_ns
            if node.state == DEAD:
                continue
            if quiet_ns >= self.patience.silence_ns:
                told += self._judge_silent(node, fair_ns)
                continue
            if quiet_ns >= self.patience.suspect_ns and node.state == ALIVE:
                node.state, node.reason = SUSPECT, f"silent for {quiet_ns // MS} ms"
                told.append(Verdict("state", node.node, node.reason, node.beat_ns))
            told += self._judge_absent(node, fair_ns)
        for instance, session in self.sessions.items():
            if not session.ended and fair_ns - session.seen_ns >= session.silence_ns:
                session.ended = True
                told.append(Verdict("emitter", instance, f"the emitter has been silent for {(fair_ns - session.seen_ns) // MS} ms", session.seen_ns))
        return told

    def _judge_silent(self, node: Node, fair_ns: int) -> list[Verdict]:
        silent = f"silent for {(fair_ns - node.seen_ns) // MS} ms"
        ranks = tuple((instance, rank) for instance, rank, _ in self._on(node.node))
        if not ranks:
            node.state, node.reason = DEAD, f"{silent}, and no rank is lost with it"
            return [Verdict("node", node.node, node.reason, node.beat_ns)]
        state, reason = SUSPECT, f"{silent}, and idle: nothing is scheduled that could tell a dead node from a daemon that is gone"
        for instance, rank in ranks:
            rose, busy = self._evidence(instance, rank, node.node)
            if node.ended and not self._has_witness(instance, rank, node.node, fair_ns) and fair_ns - node.seen_ns < self.patience.reattach_ns:
                state, reason = SUSPECT, f"{silent}: its daemon ended, and nobody else could tell whether {instance} goes on"
                break
            if rose > node.seen_ns and fair_ns - rose < self.patience.silence_ns:
                state, reason = SUSPECT, f"{silent}, but progress of {instance} still rises: its daemon is gone, not the node"
                break
            if busy is not None and fair_ns - max(node.seen_ns, busy) >= self.patience.silence_ns:
                state, reason = DEAD, f"{silent}, work is scheduled, and {self._what_is_seen(instance, rank, node.node, fair_ns)}"
        changed = state != node.state or reason.partition(",")[2] != node.reason.partition(",")[2]
        node.state, node.reason = state, reason
        if state == DEAD:
            return [Verdict("node", node.node, reason, node.beat_ns, ranks)]
        return [Verdict("state", node.node, reason, node.beat_ns)] if changed else []

    def _judge_absent(self, node: Node, fair_ns: int) -> list[Verdict]:
        told = []
        for instance, rank, member in list(self._on(node.node)):
            if member.absent_ns is None or fair_ns - member.absent_ns < self.patience.reattach_ns or instance in self.recovering:
                continue
            rose, busy = self._evidence(instance, rank, node.node)
            if rose > member.absent_ns and fair_ns - rose < self.patience.reattach_ns:
                continue
            work = member.beat is None or busy is not None or self.is_working(instance, rank)  # a fence may have fallen between what two ranks of a dp let go
            reason = f"rank {rank} of {instance} did not re-attach to {node.node} within {self.patience.reattach_ns // MS} ms"
            told.append(Verdict("ranks" if work else "gone", node.node, reason, node.beat_ns, ((instance, rank),)))
        return told

    def _has_witness(self, instance: str, rank: Rank, node: NodeId, fair_ns: int) -> bool:
        """Whether anyone elsewhere would see its progress and tell, or nobody makes any: the emitter, a rank of the same dp, a recovery.

        Who is silent too tells nothing: an emitter within its promise, a daemon that is restarted at the same time.
        """
        if instance in self.recovering:
            return True
        others = (other.node for other_rank, other in self.members[instance].items() if other_rank.dp == rank.dp and other.node != node and not other.lost)
        heard = [self.nodes[other].seen_ns for other in others if other in self.nodes]
        session = self.sessions.get(instance)
        heard += [session.seen_ns] if session is not None and not session.ended else []
        return any(fair_ns - seen_ns < self.patience.suspect_ns for seen_ns in heard)

    def _what_is_seen(self, instance: str, rank: Rank, node: NodeId, fair_ns: int) -> str:
        return f"nothing of {instance} rises" if self._has_witness(instance, rank, node, fair_ns) else f"nobody else could see {instance} rise"

    def _evidence(self, instance: str, rank: Rank, node: NodeId) -> tuple[int, int | None]:
        """When anyone who depends on this rank last progressed (-1: never), and since when work has been scheduled (None: it isn't).

        Ranks of the same dp depend on each other; the emitter's progress proves them only where there is one dp.
        """
        members = self.members[instance]
        rose = max((other.rose_ns for other_rank, other in members.items() if other_rank.dp == rank.dp and other.node != node), default=-1)
        since = self.recovering.get(instance)
        session = self.sessions.get(instance)
        if session is not None and not session.ended:
            if all(other.dp == rank.dp for other in members):
                rose = max(rose, session.rose_ns)
            return rose, since if since is not None else session.busy_ns if session.scheduled else None
        busy = any(member.beat is not None and member.beat.sequences for member in members.values())
        return rose, since if since is not None else 0 if busy else None

    def next_deadline(self, fair_ns: int) -> int | None:
        """Fair ns of the next judgement that could change something; at least a heartbeat's pace while there is anyone to listen to."""
        if not self.nodes and not self.sessions:
            return None
        due = [fair_ns + self.patience.heartbeat_ns]
        due += [node.seen_ns + self.patience.silence_ns for node in self.nodes.values() if node.state != DEAD]
        due += [session.seen_ns + session.silence_ns for session in self.sessions.values() if not session.ended]
        return max(fair_ns + MS, min(due))

    def check(self) -> None:
        for node in self.nodes.values():
            assert node.state in (ALIVE, SUSPECT, DEAD) and node.reason, f"{node.node}: every state has a reason"
            assert node.state != ALIVE or node.link, f"{node.node}: alive without a link"
        for instance, members in self.members.items():
            for rank, member in members.items():
                assert member.stream.instance == instance and member.stream.rank == rank, f"{member.stream} is filed under {instance}/{rank}"
                assert member.node not in member.holders, f"{instance}/{rank}: a replica on its own node protects nothing"
