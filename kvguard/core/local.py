"""One stream that this node sends: a local rank's pool, living or dead, or a replica that is pushed on for a plan.

Knows: its ledger, its senders by holder, its steps. Must not know: links beyond their names, the coordinator's plans.
Invariants: `beat` is truthful: protected means acknowledged in the current epoch by a holder that answers, at most the newest step excepted; a holder that is
replaced is ended only when every new one has acknowledged what it had; where another stream's holders hold it too (`as_rank`), what they have counts as its
own (covering.py).
"""

from __future__ import annotations

from kvguard.core import covering
from kvguard.core.effects import Effect, KillProcess
from kvguard.core.events import Event, Looked, StreamAttached
from kvguard.core.ledger import Ledger
from kvguard.core.pieces import Copy
from kvguard.core.progress import Progress
from kvguard.core.sender import Sender
from kvguard.format.lineage import birth_of, is_other
from kvguard.format.messages import RankBeat
from kvguard.types import Epoch, Life, NodeId, Rank


class LocalStream:
    """`progress` is None for a stream that is pushed on."""

    def __init__(self, event: StreamAttached, progress: Progress | None) -> None:
        self.stream, self.shape = event.stream, event.shape
        self.incarnation, self.epoch, self.endpoint = event.incarnation, event.epoch, event.endpoint
        self.ledger = Ledger(event.shape)
        self.progress = progress
        self.senders: dict[NodeId, Sender] = {}
        self.ending: dict[NodeId, str] = {}  # holders that others replace, and why
        self.alive, self.salvageable, self.death = True, False, ""
        self.condemned: tuple[str, str, int] | None = None  # once it was told to die: what its death is called, why, since when
        self.unreadable = ""  # why nothing more of its pool can be read
        self.told = False  # to the coordinator, in this daemon's life: that it is attached
        self.looks = 0
        self.ids_before: dict[int, int] = {}  # of a scheduler's rows, at the last beat (core/schedulers.py)
        self.fenced = False
        self.unheld_reason = "no other node"
        self.as_rank: Rank | None = None  # whose stream on this node is copied for this one, too
        self.mate: LocalStream | None = None  # that stream, as far as it is here
        self._unheld_ns: int | None = None

    def look(self, now: int, event: Looked) -> tuple[Effect, ...]:
        self.looks += 1
        self.ledger.look(event)
        if len(self.senders) == 1:
            for sender in self.senders.values():
                return sender.step(now, event)
        return self.tell(now, event)

    def tell(self, now: int, event: Event) -> tuple[Effect, ...]:
        return tuple(effect for sender in self.senders.values() for effect in sender.step(now, event))

    def fence(self) -> None:
        self.fenced = True
        for sender in self.senders.values():
            sender.fence()

    def adopt(self, now: int, epoch: Epoch) -> tuple[Effect, ...]:
        self.epoch, self.fenced = epoch, False
        return tuple(effect for sender in self.senders.values() for effect in sender.adopt(now, epoch))

    @property
    def dying(self) -> bool:
        """It was told to die, and isn't known to be dead."""
        return self.alive and self.condemned is not None

    @property
    def watched(self) -> bool:
        """Its process shall live, as far as is known here."""
        return self.alive and self.condemned is None

    def condemn(self, kind: str, reason: str, since_ns: int) -> Effect:
        """Its process is told to die. The first verdict is what its death will be called."""
        self.condemned = self.condemned or (kind, reason, since_ns)
        return KillProcess(self.incarnation, self.stream, reason)

    @property
    def cover(self) -> LocalStream | None:
        """The stream whose holders count as this one's."""
        return self.mate if covering.able(self, self.mate) else None

    def replaced(self) -> list[NodeId]:
        """Holders that may be ended now."""
        if self.cover is not None:
            return [node for node in self.ending if covering.covers(self, self.cover, self.senders[node])]
        new = [sender for node, sender in self.senders.items() if node not in self.ending]
        if not self.ending or not new or any(sender.state != "stream" for sender in new):
            return []
        return [node for node in self.ending if all(_covers(sender, self.senders[node]) for sender in new)]

    def transferred(self, node: NodeId) -> bool:
        """Everything that was found in the replica has been acknowledged by the target."""
        return self.looks > 0 and node in self.senders and self.senders[node].caught_up()

    def releasable(self, life: Life) -> int:
        """How many ids of it every holder has acknowledged; 0 where another life bears the name here."""
        holders = [sender for node, sender in self.senders.items() if node not in self.ending]
        rows = [number for number, row in self.ledger.rows.items() if row.sequence == life.sequence and not is_other(birth_of(row.request), life.birth)]
        if self.cover is not None:
            return min((covering.releasable(self.cover, self.ledger.rows[number], life) for number in rows), default=0)
        return min((sender.flow.copies[number].acked_ids for sender in holders for number in rows), default=0)

    def best(self, number: int) -> int:
        """The furthest position of a row that a holder that answers has acknowledged."""
        return self._best(number, self.cover)

    def _best(self, number: int, cover: LocalStream | None) -> int:
        return self.held(number) if cover is None else max(self.held(number), covering.best(cover, self.ledger.rows[number]))

    def held(self, number: int) -> int:
        """The furthest position of a row that a holder of its own that answers has acknowledged."""
        return max((sender.flow.copies[number].acked for sender in self.senders.values() if sender.state == "stream"), default=0)

    def tell_beat(self, now: int, promised: Epoch) -> RankBeat:
        """The beat that goes to the coordinator."""
        self.told = True
        return self.beat(now, promised)

    def beat(self, now: int, promised: Epoch) -> RankBeat:
        committed = acked = lag = unprotected = 0
        cover = self.cover  # once: a beat looks at hundreds of rows
        for number, row in self.ledger.rows.items():
            best = self._best(number, cover)
            committed += row.committed
            acked += best
            if row.committed and (not best or best < row.previous):
                unprotected += 1
            if best < row.previous and self._caught(number):
                lag = max(lag, row.previous - best)
        answering = [sender for _, sender in self._holding() if sender.state == "stream"]
        if answering:
            self._unheld_ns, lag_ms = None, min(sender.lag_ms(now) for sender in answering)
        else:
            self._unheld_ns = now if self._unheld_ns is None else self._unheld_ns
            lag_ms = (now - self._unheld_ns) / 1e6
        state, reason = self.judged(promised, bool(answering), unprotected)
        steps = self.progress.progress if self.progress is not None else 0
        return RankBeat(
            self.stream, self.epoch, self.incarnation, self.endpoint, state, reason, tuple(dict.fromkeys(node for node, _ in self._holding())),
            len(self.ledger.rows), unprotected, committed, acked, lag, (committed - acked) * self.shape.token_bytes, lag_ms, steps + self.looks,
            self.shape.fingerprint, self.whole(), self.as_rank if not self.senders else None,
        )  # fmt: skip

    def _holding(self) -> list[tuple[NodeId, Sender]]:
        """Senders whose holders keep what this stream has: its own, and those of the stream that is copied for it."""
        return [*self.senders.items(), *(self.cover.senders.items() if self.cover is not None else ())]

    def whole(self) -> tuple[NodeId, ...]:
        """Holders that have everything but, of each sequence, the newest position at most."""
        own = [node for node, sender in self.senders.items() if sender.state == "stream" and all(_follows(copy) for copy in sender.flow.copies.values())]
        return tuple(dict.fromkeys((*own, *(covering.whole(self, self.cover) if self.cover is not None else ()))))

    def judged(self, promised: Epoch, answering: bool, unprotected: int) -> tuple[str, str]:
        """State and reason, as a beat says them."""
        if not self.alive:
            return "lost", self.death
        if self.epoch != promised:
            return "recovering", f"epoch {self.epoch.counter} is over, {promised.counter} is promised"
        if self.unreadable:
            return "unprotected", f"its pool can't be read: {self.unreadable}"
        holding = self._holding()
        if not holding:
            return "unprotected", self._unheld()
        if not answering:
            return "unprotected", "; ".join(f"{node}: {sender.reason}" for node, sender in holding)
        if unprotected:
            for node, sender in holding:
                for copy in sender.flow.refused.values():
                    return "unprotected", f"store full at {node}: {copy.shed}"
            return "unprotected", f"catching up: {unprotected} of {len(self.ledger.rows)} sequences"
        return "protected", ""

    def _unheld(self) -> str:
        if self.as_rank is None:
            return self.unheld_reason
        return self.cover.unheld_reason if self.cover is not None else f"rank {self.as_rank}, whose copy is this one's too, is not attached here in this epoch"

    def _caught(self, number: int) -> bool:
        """Whether a holder has had all of it once, a mate's also where it doesn't count any more: what is lacking then is lag."""
        own = any(sender.flow.copies[number].caught for sender in self.senders.values())
        return own or (self.mate is not None and covering.caught(self.mate, self.ledger.rows[number]))

    def check(self) -> None:
        self.ledger.check()
        for node, sender in self.senders.items():
            assert set(sender.flow.copies) == set(self.ledger.rows), f"{node} knows other rows than the table"
            assert sender.epoch == self.epoch or sender.state == "fenced", (sender.epoch, self.epoch)
            sender.check()
        if self.progress is not None:
            self.progress.check()


def _follows(copy: Copy) -> bool:
    row = copy.row
    return not copy.shed and (copy.acked > 0 or not row.committed) and copy.acked >= row.committed - 1 and copy.acked_ids >= row.committed


def _covers(new: Sender, old: Sender) -> bool:
    def at_least(mine: Copy, other: Copy) -> bool:
        return not mine.shed and mine.acked >= other.acked and mine.acked_ids >= other.acked_ids

    return all(at_least(new.flow.copies[number], copy) for number, copy in old.flow.copies.items())
