"""What the coordinator ordered for one instance's recovery, and how far this node has come with it.

Knows: the plan, the parts of it that are this node's, which are done. Must not know: how parts are carried out, other nodes' parts.
Invariants: a deed is ordered once per (instance, epoch); the same order again repeats the answer; what belongs to another epoch is refused; no engine hears
the plan's secret.
"""

from __future__ import annotations

from msgspec.structs import replace

from kvguard.core import moving
from kvguard.core.effects import CarryPlan, Claim, Effect, Note, OrderRestore, PushReplica, Send
from kvguard.core.events import EngineRestored, PlanCarried
from kvguard.core.local import LocalStream
from kvguard.format.messages import Done, PlanOrder, RebuildOrder, StandbyBeat
from kvguard.types import NodeId, Rank, StreamId


class Orders:
    """One plan at this node. `coordinator`: the link that answers go to."""

    def __init__(self, plan: PlanOrder, node: NodeId, coordinator: str) -> None:
        self.plan = plan
        self.finished = False  # the instance runs again
        self._for_engines = replace(plan, secret=b"")
        self._kept = dict.fromkeys(rank for rank in plan.moved if moving.stays(plan.places, rank, node))
        self._node, self._coordinator = node, coordinator
        self._done: dict[str, Done] = {}
        self._claimed: dict[Rank, RebuildOrder] = {}
        self._taken: dict[Rank, StandbyBeat] = {}  # standbys that may yet turn out not to have been told of their rank
        self._going_on: dict[StreamId, bool] = {}  # those that were asked
        self._carried = False

    def start(self, survivors: list[LocalStream]) -> tuple[Effect, ...]:
        """Replicas are cut, living ranks truncate. Pushing waits until the replicas are cut."""
        return (CarryPlan(self.plan, self._node), *(effect for local in survivors for effect in self.go_on(local)))

    def go_on(self, local: LocalStream) -> tuple[Effect, ...]:
        """A rank that lives here is to truncate, once; one that began in the plan's epoch, or is back in it, has nothing to do, which is said for it."""
        part = f"rank {local.stream.rank}"
        if self.finished or part in self._done:
            return ()
        if not local.fenced and not local.ledger.rows:
            return self._answer(part, endpoint=local.endpoint, stream=local.stream)
        if local.stream in self._going_on:
            return ()
        self._going_on[local.stream] = True
        return (OrderRestore(local.stream, self._for_engines),)

    def keeps(self, rank: Rank) -> bool:
        """Whether the dead pool of a rank stays mapped here after the recovery: sequences that moved may be fetched from it until they are delivered."""
        return rank in self._kept

    def again(self) -> tuple[Effect, ...]:
        """All answers so far, for a coordinator that may have missed them."""
        return tuple(Send(self._coordinator, done) for done in self._done.values())

    def transfers(self) -> list[tuple[NodeId, str, StreamId]]:
        """What this node pushes: target, its address, stream."""
        return [(target, address, stream) for holder, target, address, stream in self.plan.transfers if holder == self._node and target != self._node]

    def targets(self, stream: StreamId) -> list[NodeId]:
        """Where this node pushes a stream: to several nodes where it is the source of several ranks."""
        return [target for target, _, pushed in self.transfers() if pushed == stream]

    def carried(self, event: PlanCarried) -> tuple[Effect, ...]:
        if self._carried:
            return ()
        self._carried = True
        first = {stream: self.targets(stream)[0] for _, _, stream in self.transfers()}  # it is opened once, for all of them
        pushes = tuple(PushReplica(stream, target, f"peer:{target}") for stream, target in first.items())
        return (*self._answer("holders", known=tuple(event.known)), *pushes)

    def transferred(self, stream: StreamId) -> tuple[Effect, ...]:
        part = f"transfer {stream}"
        return () if part in self._done else self._answer(part, stream=stream)

    def rebuild(self, order: RebuildOrder, standby: StandbyBeat | None = None) -> tuple[Effect, ...]:
        """Give a rank to a standby. Another standby for the same rank is a new deed: the first one failed."""
        rank, part = order.rebuild.rank, f"rank {order.rebuild.rank}"
        former = self._claimed.get(rank)
        if former is not None and former.rebuild.standby == order.rebuild.standby:
            return (Send(self._coordinator, self._done[part]),) if part in self._done else ()
        if order.rebuild.node != self._node:
            return (Note("refused", f"{order.instance}/{rank}", f"the rank is to be rebuilt on {order.rebuild.node}, not here"),)
        self._claimed[rank] = order
        self._taken.pop(rank, None)
        if standby is not None:
            self._taken[rank] = standby
        self._done.pop(part, None)
        return (Claim(self._for_engines, order.rebuild),)

    def left(self, order: RebuildOrder) -> bool:
        """Whether this is said again of a standby that was told of nothing: it takes no part in this plan any more, and may in the next."""
        done, former = self._done.get(f"rank {order.rebuild.rank}"), self._claimed.get(order.rebuild.rank)
        return done is not None and bool(done.clashes) and former is not None and former.rebuild.standby == order.rebuild.standby

    def died(self, standby: int, reason: str) -> tuple[Effect, ...]:
        """A standby that died before it had its rank: the coordinator takes another."""
        for rank, order in self._claimed.items():
            if order.rebuild.standby == standby and f"rank {rank}" not in self._done:
                self._taken.pop(rank, None)
                return self._answer(f"rank {rank}", error=f"the standby died: {reason}")
        return ()

    def restored(self, event: EngineRestored) -> tuple[Effect, ...]:
        moved = dict(event.bytes_by_rung)
        return self._answer(
            f"rank {event.rank}", error=event.error, endpoint=event.endpoint, stream=event.stream, bytes_by_rung=moved, restore_ms=event.restore_ms,
            clashes=event.clashes, behind=event.behind,
        )  # fmt: skip

    def untold(self, event: EngineRestored) -> StandbyBeat | None:
        """The standby that was to take the rank, where it was told of nothing and still lives."""
        return self._taken.pop(event.rank, None) if event.clashes else None

    def _answer(self, part: str, **fields) -> tuple[Effect, ...]:
        done = self._done[part] = Done(self.plan.instance, self.plan.epoch, self._node, part, **fields)
        return (Send(self._coordinator, done),)
