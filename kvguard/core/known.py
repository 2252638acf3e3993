"""What the coordinator knows, and the few ways in which its parts speak: persist, send, note.

Knows: durable records in memory, who is linked, the effects of the event in hand. Must not know: when any of it is said (rounds.py, resuming.py, sessions.py).
Invariants: whatever is Persisted is also here, so that a restart from the store finds the same; an epoch is never stated below the highest ever heard of.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from kvguard.core.effects import Effect, Note, Persist, Send
from kvguard.core.membership import MS, Membership, Patience
from kvguard.core.membership import Member as Place
from kvguard.format import ledger
from kvguard.format.ledger import HistoryRecord, MemberRecord, RecoveryRecord
from kvguard.format.lineage import is_one_of
from kvguard.format.messages import Done, Member, Message, Report, Resume
from kvguard.types import NO_EPOCH, Clash, Epoch, Life, Lineage, NodeId, Rank, SequenceId, StreamId

HISTORY_MAX = 1000  # recoveries kept; older ones are deleted from the store too
DELIVERED_MAX = 100_000  # names of answered sequences remembered, so that a plan doesn't bring them back
BIRTHS_MAX = 8  # and how many lives of one name, the newest
STRAYS_MAX = 1000  # oddities told once each
HANDED_MAX = 32  # ended handoffs that the status still tells of


class Settings(NamedTuple):
    """What an operator may set, ns. `exclude_ns`: a fence waits so long for reports; `seal_ns`: for proof that an old writer can't be acknowledged any more."""

    patience: Patience = Patience()
    exclude_ns: int = 2000 * MS
    seal_ns: int = 10_000 * MS
    standby_ns: int = 60_000 * MS
    restore_ns: int = 60_000 * MS
    settle_ns: int = 10_000 * MS  # a plan that failed in part waits so long for the standbys that are taking their ranks meanwhile
    replace_ns: int = 5000 * MS  # a silent holder's replicas are placed elsewhere
    backoff_ns: int = 500 * MS
    backoff_free: int = 3  # failovers in a window before the first wait
    failovers_max: int = 10
    window_ns: int = 60_000 * MS
    attempts_max: int = 8
    replicas: int = 1
    move_ns: int = 0  # so long a standby is waited for where the emitter could go on elsewhere
    moved_ns: int = 600_000 * MS  # what moved stays so long where it is, undelivered
    handoff_ns: int = 60_000 * MS  # so long a handoff's target may take to get everything
    redrain_ns: int = 10_000 * MS  # before a handoff that failed is tried again for a drained node
    pool_ns: int = 50 * MS  # so long after the fence a plan waits for a dying process's pool that would spare copies or a few tokens
    pool_lag_tokens: int = 64  # one without which a sequence would fall behind by more is waited for up to standby_ns


class Failure(NamedTuple):
    """Why a plan can't be carried out whole: what the next round begins with (rounds.start)."""

    ranks: tuple[Rank, ...]
    reason: str
    detect_ms: float = 0.0
    dead_writers: tuple[Rank, ...] = ()
    excluded: tuple[NodeId, ...] = ()
    refused: tuple[tuple[NodeId, int], ...] = ()
    clashes: tuple[Clash, ...] = ()

    def and_also(self, other: Failure) -> Failure:
        """Both; the reason and its age are the first one's."""
        ranks, dead_writers = _once(self.ranks, other.ranks), _once(self.dead_writers, other.dead_writers)
        refused, clashes = _once(self.refused, other.refused), _once(self.clashes, other.clashes)
        return Failure(ranks, self.reason, self.detect_ms, dead_writers, _once(self.excluded, other.excluded), refused, clashes)


class Settling(NamedTuple):
    """A plan that failed in part, until the next round begins. `waits`: ranks that standbys were taking when it failed. `since_ns`: fair."""

    failure: Failure
    waits: tuple[Rank, ...]
    since_ns: int


class Round:
    """One round of a recovery: the durable record and what may be learnt again. Times are fair, except `mark_ns` (real: phases are measured from it)."""

    __slots__ = (
        "asked", "asked_ns", "changed", "dones", "heard", "mark_ns", "not_before_ns", "ordered", "plan_open", "record", "reports", "settling", "since_ns",
        "tried", "undelivered", "waiting",
    )  # fmt: skip

    def __init__(self, record: RecoveryRecord, fair_ns: int, now_ns: int):
        self.record, self.since_ns, self.mark_ns, self.not_before_ns = record, fair_ns, now_ns, fair_ns
        self.reports: dict[NodeId, Report] = {}
        self.dones: dict[tuple[NodeId, str], Done] = {}
        self.ordered: dict[Rank, bool] = {}  # ranks that were given to a standby (or may have been); whether that was said on its node's present link
        self.asked: dict[NodeId, str] = {}  # the link on which this phase was last said
        self.asked_ns: dict[NodeId, int] = {}  # and when its Fence was
        self.waiting, self.tried, self.heard = "", None, 0  # `heard`: how many reports have come, so that one that is said anew is planned with
        self.plan_open = self.changed = False
        self.settling: Settling | None = None
        self.undelivered: dict[SequenceId, int] | None = None  # births of those that moved, once they are waited for


class Handoff:
    """A rank on its way to the node that an operator named. `number`: its name in the status. `epoch`: 0 until fenced. `drain`: the node it is for, or ""."""

    __slots__ = ("drain", "epoch", "instance", "number", "rank", "since_ns", "source", "stream", "target", "why")

    def __init__(
        self, number: int, instance: str, rank: Rank, stream: StreamId, source: NodeId, target: NodeId, why: str, since_ns: int, drain: NodeId = ""
    ) -> None:
        self.number, self.instance, self.rank, self.stream, self.source, self.target = number, instance, rank, stream, source, target
        self.why, self.since_ns, self.drain, self.epoch = why, since_ns, drain, 0


class Known:
    """The coordinator's memory. `out` collects the effects of the event in hand."""

    def __init__(self, issuer: str, settings: Settings):
        self.issuer, self.settings = issuer, settings
        self.membership = Membership(settings.patience)
        self.now_ns = self.fair_ns = 0
        self.out: list[Effect] = []
        self.epochs: dict[str, Epoch] = {}
        self.forks: dict[str, dict[SequenceId, Lineage]] = {}
        self.births: dict[str, dict[SequenceId, int]] = {}  # of what `forks` names
        self.rounds: dict[str, Round] = {}
        self.resumes: dict[str, Resume] = {}
        self.unheard: dict[str, bool] = {}  # instances whose pending Resume certainly reached nobody
        self.history: list[HistoryRecord] = []
        self.emitters: dict[str, int] = {}
        self.duplicates: dict[tuple[str, Rank, NodeId], int] = {}  # when a rank that lives elsewhere was last claimed by that node
        self.replaced: dict[str, deque[int]] = {}  # incarnations of emitters that another one ended: they don't come back by dialling again
        self.delivered: dict[str, dict[SequenceId, tuple[int, ...]]] = {}  # births by name
        self.left: dict[tuple[str, Rank], int] = {}  # ranks that left: fair ns; the emitter may not have heard of it
        self.untold: dict[str, str] = {}  # what an emitter that was called silent has to hear by an epoch, should it be back
        self.starts: dict[str, list[int]] = {}
        self.held: dict[str, Failure] = {}  # while paused: what would have been started
        self.failed: dict[str, str] = {}
        self.assigned: dict[tuple[str, Rank], tuple] = {}
        self.reasons: dict[tuple[str, Rank], str] = {}  # of placement
        self.copiers: dict[str, dict[Rank, Rank]] = {}  # by living rank, who copies its bytes (core/shards.py), as assigned last
        self.strays: dict[tuple, bool] = {}
        self.unlisted: dict[tuple[NodeId, StreamId], int] = {}  # schedulers' replicas by holder: fair ns since when no node lists the scheduler
        self.paused = False
        self.handoffs: dict[tuple[str, Rank], Handoff] = {}  # under way
        self.handed: deque[dict] = deque(maxlen=HANDED_MAX)  # ended, as the status says them
        self.drained: dict[NodeId, str] = {}  # and what is still waited for; "": it is empty
        self.redrains: dict[tuple[str, Rank], tuple[int, str]] = {}  # ranks of drained nodes whose handoff failed: fair ns of the next, why
        self.movers: dict[str, bool] = {}  # whose emitter can submit sequences to other instances
        self.secret = b""

    # ---- durable facts

    def persist(self, key: str, record) -> None:
        self.out.append(Persist(key, None if record is None else ledger.pack(record)))

    def keep_member(self, instance: str, rank: Rank) -> None:
        place = self.membership.members.get(instance, {}).get(rank)
        record = None if place is None else member_record(place)
        self.persist(f"holders/{instance}/{rank}", record)

    def keep_round(self, instance: str, record: RecoveryRecord | None) -> None:
        """A record replaces the round's; None ends the round."""
        if record is None:
            self.rounds.pop(instance, None)
        else:
            self.rounds[instance].record = record
        self.persist(f"recovery/{instance}", record)

    def keep_history(self, record: HistoryRecord) -> None:
        self.history = [old for old in self.history if (old.instance, old.epoch) != (record.instance, record.epoch)] + [record]
        self.persist(f"history/{record.instance}/{record.epoch.counter}", record)
        if len(self.history) > HISTORY_MAX:
            oldest = self.history.pop(0)
            self.persist(f"history/{oldest.instance}/{oldest.epoch.counter}", None)

    # ---- speaking

    def note(self, what: str, subject: str, reason: str, **fields: object) -> None:
        self.out.append(Note(what, subject, reason, tuple(fields.items())))

    def note_once(self, what: str, subject: str, reason: str, *about: object) -> None:
        key = (what, subject, *about)
        if key not in self.strays:
            if len(self.strays) >= STRAYS_MAX:
                self.strays.clear()
            self.strays[key] = True
            self.note(what, subject, reason)

    def tell_node(self, node: NodeId, message: Message) -> bool:
        known = self.membership.nodes.get(node)
        if known is None or not known.link:
            return False
        self.out.append(Send(known.link, message))
        return True

    def emitter_lives(self, instance: str) -> bool:
        """Whether the emitter's session is up: what it has handed out, it knows."""
        session = self.membership.sessions.get(instance)
        return session is not None and not session.ended and bool(session.link)

    def moves(self, instance: str) -> bool:
        """Whether its sequences may go on elsewhere now: their emitter says so, and there is a secret to prove their tokens with."""
        return bool(self.secret) and self.movers.get(instance, False) and self.emitter_lives(instance)

    def tell_emitter(self, instance: str, message: Message) -> bool:
        session = self.membership.sessions.get(instance)
        if session is None or not session.link:
            return False
        self.out.append(Send(session.link, message))
        return True

    # ---- questions

    def epoch(self, instance: str) -> Epoch:
        return self.epochs.get(instance, NO_EPOCH)

    def floor(self, instance: str, epoch: Epoch) -> bool:
        """True when `epoch` is higher than any known so far; then it is the floor of the next raise."""
        higher = epoch.counter > self.epoch(instance).counter
        if higher:
            self.epochs[instance] = epoch
        return higher

    def is_delivered(self, instance: str, life: Life) -> bool:
        return is_one_of(life.birth, self.delivered.get(instance, {}).get(life.sequence, ()))

    def linked(self) -> list[NodeId]:
        """Also nodes called dead whose link stands: what is sent waits for them if they only sleep."""
        return [node.node for node in self.membership.nodes.values() if node.link]

    def phase(self, instance: str) -> str:
        """fencing | planned while a recovery is under way, else ""."""
        current = self.rounds.get(instance)
        return "" if current is None or current.record.phase == ledger.RESUMED else current.record.phase

    def sequences(self, instance: str) -> int:
        return max((place.beat.sequences for place in self.membership.members.get(instance, {}).values() if place.beat is not None), default=0)

    def addresses(self) -> dict[NodeId, str]:
        return {node.node: node.address for node in self.membership.nodes.values()}

    def directory(self, instance: str) -> tuple[Member, ...]:
        """Where each rank lives, for the emitter."""
        addresses = self.addresses()
        places = self.membership.members.get(instance, {})
        return tuple(Member(rank, place.node, place.endpoint, addresses.get(place.node, "")) for rank, place in sorted(places.items()) if not place.lost)


def _once(one: tuple, other: tuple) -> tuple:
    return tuple(dict.fromkeys((*one, *other)))


def member_record(place: Place) -> MemberRecord:
    return MemberRecord(place.node, place.stream, place.incarnation, place.endpoint, place.holders, place.former, place.fingerprint)
