"""The coordinator: every event in, decisions of its parts put in order, effects out.

Knows: which part an event belongs to. Must not know: sockets, databases, clocks.
Invariants (house section 4): I3, epochs only rise and are durable before they are said; I7, whatever point it is killed at, a restart from its store goes on
with the same recovery and the same epoch; starting raises nothing. Only links that said hello speak for a node; the first live holder of a rank keeps it.
"""

from __future__ import annotations

from kvguard.core import assigning, draining, handing, loading, operator, overview, resuming, rounds, sessions
from kvguard.core.effects import Effect
from kvguard.core.events import Arrived, Asked, Event, LinkDown, Loaded, Tick
from kvguard.core.known import Failure, Known, Round, Settings
from kvguard.core.membership import DEAD, MS, FairClock, Verdict
from kvguard.format import ledger, messages
from kvguard.format.ledger import FENCING, PLANNED
from kvguard.format.messages import Beat, Fault, Fence, NodeHello, NodeWelcome, RankBeat
from kvguard.types import NodeId, Rank


class Coordinator:
    """`issuer`: names this coordinator in every epoch it raises; two must never share it."""

    def __init__(self, issuer: str, settings: Settings = Settings()):  # noqa: B008 - a frozen value
        self.known = Known(issuer, settings)
        self._clock = FairClock(settings.patience.heartbeat_ns)
        self._loaded = False

    def step(self, now_ns: int, event: Event) -> tuple[Effect, ...]:
        known = self.known
        known.fair_ns = self._clock.read(now_ns, event.late_ns if type(event) is Tick else 0)
        known.now_ns, known.out = now_ns, []
        for current in known.rounds.values():
            if current.plan_open:
                self._close_plan(current)
        self._take(event)
        for verdict in known.membership.judge(known.fair_ns) if self._loaded else ():
            self._verdict(verdict)
        for instance in list(known.rounds):
            rounds.advance(known, instance)
        if self._loaded:
            handing.advance(known)
            draining.advance(known)
        assigning.assign(known)
        for instance, current in known.rounds.items():
            if current.changed:
                current.changed = False
                sessions.welcome(known, instance)
        due = self._due()
        self._clock.due_ns = None if due is None else due + self._clock.lost_ns
        return tuple(known.out)

    def next_deadline(self) -> int | None:
        return self._clock.due_ns

    def status(self, now_ns: int | None = None) -> dict:
        """kvguard.status/1."""
        self.known.now_ns = now_ns or self.known.now_ns
        return overview.status(self.known)

    def history(self) -> list[dict]:
        return overview.history(self.known)

    def held(self) -> list[dict]:
        """What would have been done if recoveries weren't paused."""
        return overview.held(self.known)

    def check(self) -> None:
        known = self.known
        known.membership.check()
        for instance, current in known.rounds.items():
            record = current.record
            assert record.epoch <= known.epoch(instance) or record.epoch.counter < known.epoch(instance).counter, f"{instance}: a round ahead of its epoch"
            assert record.phase != PLANNED or record.order is not None, f"{instance}: planned without a plan"
            assert (instance in known.membership.recovering) == (record.phase != ledger.RESUMED), f"{instance}: quiesced without a recovery"
            if record.phase != ledger.RESUMED:
                places = known.membership.members.get(instance, {})
                assert all(places[rank].lost for rank in record.lost if rank in places), f"{instance}: a lost rank counts as living"
        for instance, resume in known.resumes.items():
            assert resume.epoch.counter <= known.epoch(instance).counter, f"{instance}: a resumption ahead of its epoch"

    # ---- events

    def _take(self, event: Event) -> None:
        known = self.known
        if isinstance(event, Loaded):
            assert not self._loaded, "Loaded comes once, first"
            loading.load(known, event.values)
            self._loaded = True
            return
        assert self._loaded, "Loaded comes first"
        if isinstance(event, Arrived):
            self._message(event.link, event.message)
        elif isinstance(event, LinkDown):
            for verdict in known.membership.link_down(event.link, event.reason, known.fair_ns):
                self._verdict(verdict)
        elif isinstance(event, Asked):
            operator.asked(known, event)

    def _message(self, link: str, message: messages.Message) -> None:
        known = self.known
        if isinstance(message, NodeHello):
            self._hello(link, message)
        elif isinstance(message, messages.EmitterHello):
            sessions.on_hello(known, link, message, rounds.start)
        elif isinstance(message, messages.EmitterBeat):
            sessions.on_beat(known, link, message, rounds.start)
        elif isinstance(message, messages.Adopted):
            sessions.on_adopted(known, link, message)
        elif isinstance(message, messages.Delivered):
            sessions.on_delivered(known, message)
        elif isinstance(message, (Beat, Fault, messages.Report, messages.Done)):
            node = self._speaker(link, message)
            if node is not None:
                self._from_node(node, message)
        else:
            known.note_once("refused", link, f"{type(message).__name__} is not for a coordinator", type(message).__name__)

    def _speaker(self, link: str, message) -> NodeId | None:
        """The node that this link is of; nobody speaks for another."""
        node = next((node for node in self.known.membership.nodes.values() if node.link == link), None)
        if node is None or node.node != message.node:
            owner = node.node if node is not None else "nobody who said hello"
            self.known.note_once("refused", message.node, f"{type(message).__name__} of {message.node} on the link of {owner}", link)
            return None
        return node.node

    def _from_node(self, node: NodeId, message) -> None:
        if isinstance(message, Beat):
            self._beat(node, message)
        elif isinstance(message, Fault):
            self._fault(node, message)
        elif isinstance(message, messages.Report):
            rounds.on_report(self.known, node, message)
        else:
            resuming.on_done(self.known, node, message, rounds.start)

    def _hello(self, link: str, message: NodeHello) -> None:
        known = self.known
        before = known.membership.nodes.get(message.node)
        was = before.state if before is not None else "new"
        reborn = known.membership.hello(known.fair_ns, known.now_ns, link, message)
        life = "another life" if reborn else "the same life"
        known.note("node", message.node, f"{life} of its daemon is linked; it was {was}", incarnation=message.incarnation)
        known.tell_node(message.node, NodeWelcome(known.issuer))
        for key in [key for key, value in known.assigned.items() if value[0] == message.node]:
            del known.assigned[key]
        for instance, epoch in message.promises:
            self._floor(instance, epoch)
        promised = dict(message.promises)
        for current in known.rounds.values():
            current.asked.pop(message.node, None)  # whatever was said before this hello may not have arrived
        for instance in list(known.epochs):
            self._bring_up_to_date(message.node, instance, promised.get(instance))

    def _bring_up_to_date(self, node: NodeId, instance: str, promised) -> None:
        """What a node that was away missed. Nothing here raises an epoch."""
        known, current = self.known, self.known.rounds.get(instance)
        if current is not None and current.record.phase == FENCING:
            rounds.say_fence(known, instance)
        elif current is not None and current.record.phase == PLANNED:
            resuming.say_plan(known, instance)
        else:
            epoch = known.epoch(instance)
            if not epoch.counter:
                return
            if promised is None or promised.counter < epoch.counter:
                known.tell_node(node, Fence(instance, epoch, (), "this epoch began while the node was away"))
            if current is not None:
                resuming.say_resumed(known, instance, again=True)
            elif instance not in known.failed:
                known.tell_node(node, resuming.word(known, instance))

    def _floor(self, instance: str, epoch) -> None:
        """A higher epoch than ours lives out there (a restored store): what is under way begins again above it."""
        known = self.known
        if known.floor(instance, epoch) and known.phase(instance):
            rounds.start(known, instance, (), f"a node has promised epoch {epoch.counter} of {epoch.issuer}")

    def _beat(self, node: NodeId, message: Beat) -> None:
        known = self.known
        slept = known.membership.nodes[node].state == DEAD
        new, strange = known.membership.beat(known.fair_ns, known.now_ns, message)
        for rank_beat in message.ranks:
            self._floor(rank_beat.stream.instance, rank_beat.epoch)
        if slept:
            known.note("node", node, "called dead, and heard again")
            promised = dict(known.membership.nodes[node].promises)
            for instance in list(known.epochs):
                self._bring_up_to_date(node, instance, promised.get(instance))
        replaced = [rank_beat.stream for rank_beat in new if not self._is_over(node, rank_beat) and self._is_another(node, rank_beat)]
        replaced += [rank_beat.stream for rank_beat in strange if self._strange(node, rank_beat)]
        for stream in replaced:
            sessions.on_replaced(known, stream.instance, stream.rank, node, rounds.start)
        for rank_beat in message.ranks:
            member = known.membership.members.get(rank_beat.stream.instance, {}).get(rank_beat.stream.rank)
            if member is None or member.stream != rank_beat.stream or member.node != node or member.lost:
                continue
            if rank_beat.state == "lost":
                self._lose(node, rank_beat.stream, f"lost: {rank_beat.reason}", 0.0, True)
            elif member.former and rank_beat.state == "protected" and all(holder in member.holders for holder in rank_beat.holders):
                member.former = ()
                known.keep_member(rank_beat.stream.instance, rank_beat.stream.rank)
        resuming.sweep(known, node, tuple(stream for stream, _, _ in message.replicas))

    def _is_over(self, node: NodeId, rank_beat: RankBeat) -> bool:
        """A life whose sequences moved elsewhere, and that slept through it or is not dead yet; or what is left of one that died in an epoch that is over."""
        known, stream = self.known, rank_beat.stream
        over = resuming.is_ended(known, stream, rank_beat.epoch)
        if rank_beat.state == "lost" and rank_beat.epoch.counter < known.epoch(stream.instance).counter and not known.phase(stream.instance):
            known.note_once("stale_rank", f"{stream.instance}/{stream.rank}", f"a dead life on {node} of epoch {rank_beat.epoch.counter}", node, stream)
            return True
        if over:
            known.note_once("stale_rank", f"{stream.instance}/{stream.rank}", f"a former life on {node}: its sequences moved elsewhere", node, stream)
            known.tell_node(node, resuming.word(known, stream.instance, ended=(stream,)))
        return over

    def _adopt(self, node: NodeId, rank_beat: RankBeat) -> None:
        known, instance, rank = self.known, rank_beat.stream.instance, rank_beat.stream.rank
        known.membership.adopt(known.fair_ns, node, rank_beat)
        known.assigned.pop((instance, rank), None)
        known.keep_member(instance, rank)
        known.note("attached", f"{instance}/{rank}", f"on {node}")
        if not known.phase(instance):
            sessions.welcome(known, instance)

    def _is_another(self, node: NodeId, rank_beat: RankBeat) -> bool:
        """A rank that isn't known is from now on; also one that died before it was heard of, which is then lost like any other. True: the emitter may wait for
        a process that was this rank and left."""
        key = rank_beat.stream.instance, rank_beat.stream.rank
        self._adopt(node, rank_beat)
        left_ns = self.known.left.pop(key, None)
        return left_ns is not None and sessions.may_await(self.known, key[0], left_ns)

    def _strange(self, node: NodeId, rank_beat: RankBeat) -> bool:
        """A rank under another stream or on another node than the one known. True: it is the rank from now on; nobody worked with the former one."""
        known, instance, rank = self.known, rank_beat.stream.instance, rank_beat.stream.rank
        member = known.membership.members[instance][rank]
        if rank_beat.state == "lost" and not member.lost and rank_beat.epoch == known.epoch(instance) and not known.phase(instance):
            known.tell_node(node, resuming.word(known, instance, ended=(rank_beat.stream,)))  # it began and ended in this epoch, and nobody had heard of it
        if member.lost or rank_beat.state == "lost":
            return False  # a recovery has it: its replacement counts when Done says so
        if rank_beat.epoch.counter < known.epoch(instance).counter:
            known.note_once("stale_rank", f"{instance}/{rank}", f"a former life on {node} still is in epoch {rank_beat.epoch.counter}", node, rank_beat.stream)
            if not known.phase(instance) and instance not in known.failed:  # it slept through the plan that would have ended it, and holds memory for nobody
                known.tell_node(node, resuming.word(known, instance, ended=(rank_beat.stream,)))
            return False
        home = known.membership.nodes.get(member.node)
        idle = not known.membership.is_working(instance, rank)
        if member.node == node or (idle and (home is None or home.state == DEAD or member.absent_ns is not None)):
            if idle:
                self._adopt(node, rank_beat)
            else:
                self._lose(node, member.stream, "its process was replaced by another with an empty pool", 0.0, True)
            return idle
        known.duplicates[instance, rank, node] = known.now_ns
        known.note_once("duplicate_rank", f"{instance}/{rank}", f"alive on {member.node}, and claimed by {node}: the first keeps it", node, rank_beat.stream)
        return False

    def _fault(self, node: NodeId, message: Fault) -> None:
        known, instance, rank = self.known, message.stream.instance, message.stream.rank
        member = known.membership.members.get(instance, {}).get(rank)
        if message.kind == "detached":
            if member is not None and member.stream == message.stream and member.node == node and not member.lost:
                self._leave(instance, rank, f"detached cleanly from {node}")
            return
        self._lose(node, message.stream, f"{message.kind}: {message.reason}", message.since_ms, message.kind != "suspected", message.incarnation)

    def _lose(self, node: NodeId, stream, reason: str, detect_ms: float, dead: bool, incarnation: int = 0) -> None:
        """The process behind a rank is gone. Only the one that is known to be the rank counts, or the replacement that a plan chose."""
        known, instance, rank = self.known, stream.instance, stream.rank
        member, current = known.membership.members.get(instance, {}).get(rank), known.rounds.get(instance)
        subject = f"rank {rank} on {node} {reason}"
        if current is not None and current.record.phase == PLANNED and incarnation:
            for rebuild in current.record.order.rebuilds:
                if rebuild.rank == rank and rebuild.node == node and rebuild.standby == incarnation:
                    current.dones.pop((node, f"rank {rank}"), None)
                    rounds.go_round(known, instance, Failure((rank,), subject, detect_ms, (rank,) if dead else (), refused=((node, incarnation),)))
                    return
        if current is not None and current.record.phase == FENCING and member is not None and member.lost and member.stream == stream:
            if (member.node, member.incarnation) == (node, incarnation) and rank in current.record.lost:
                rounds.on_death(current, node, rank, dead, known.fair_ns)
                return
        if member is None or member.stream != stream or member.node != node or member.lost or (incarnation and member.incarnation != incarnation):
            known.note_once("stale_fault", f"{instance}/{rank}", f"{subject}: not the one that is known", node, stream, incarnation)
            return
        rounds.go_round(known, instance, Failure((rank,), subject, detect_ms, (rank,) if dead else ()))

    def _leave(self, instance: str, rank: Rank, reason: str) -> None:
        known = self.known
        del known.membership.members[instance][rank]
        known.left[instance, rank] = known.fair_ns
        known.assigned.pop((instance, rank), None)
        known.keep_member(instance, rank)
        known.note("left", f"{instance}/{rank}", reason)
        if not known.phase(instance):
            sessions.welcome(known, instance)

    def _verdict(self, verdict: Verdict) -> None:
        known = self.known
        known.note(verdict.what if verdict.what != "state" else "suspect", verdict.subject, verdict.reason)
        age_ms = (known.now_ns - verdict.since_ns) / MS
        if verdict.what == "emitter":
            sessions.on_silence(known, verdict.subject, verdict.reason, age_ms, rounds.start)
        elif verdict.what == "gone":
            for instance, rank in verdict.ranks:
                self._leave(instance, rank, verdict.reason)
        elif verdict.what in ("node", "ranks"):
            by_instance: dict[str, list[Rank]] = {}
            for instance, rank in verdict.ranks:
                by_instance.setdefault(instance, []).append(rank)
            for instance, ranks in by_instance.items():
                rounds.go_round(known, instance, Failure(tuple(ranks), f"{verdict.subject}: {verdict.reason}", age_ms))

    # ---- time

    def _close_plan(self, current: Round) -> None:
        """The plan phase ends with the first event after it: until then the loop computed, wrote and sent."""
        current.plan_open = False
        record = current.record
        record.timing_ms["plan"] = (self.known.now_ns - current.mark_ns) / MS
        current.mark_ns = self.known.now_ns

    def _due(self) -> int | None:
        known, settings = self.known, self.known.settings
        due = [at for at in (known.membership.next_deadline(known.fair_ns),) if at is not None]
        for current in known.rounds.values():
            if current.record.phase == FENCING:
                due += [current.since_ns + wait for wait in (settings.exclude_ns, settings.seal_ns, settings.standby_ns, settings.pool_ns)]
                due += [rounds.answer_due(known, current, node) for node in current.asked_ns]
                due += [current.not_before_ns, current.since_ns + settings.move_ns]
            elif current.record.phase == PLANNED:
                due.append(current.since_ns + settings.restore_ns)
                due += [current.settling.since_ns + settings.settle_ns] if current.settling is not None else []
            elif current.record.order is not None:
                due.append(current.since_ns + settings.moved_ns)
        later = [at for at in due if at > known.fair_ns]
        return min(later) if later else None
