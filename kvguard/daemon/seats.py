"""Who sits at this node's table: one record per attached rank, scheduler or standby.

Knows: what belongs to one attachment. Must not know: how it came, what is done with it (ranks.py), decisions.
Invariant: descriptors in a record are the daemon's own; they are closed where the record is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvguard.daemon.capture import Facts, Stream
from kvguard.device.base import Pool
from kvguard.format.layout import Layout
from kvguard.format.messages import PlanOrder
from kvguard.types import StreamId

if TYPE_CHECKING:
    from kvguard.engine.look import Steps, TableReader


@dataclass
class LocalRank:
    """One attached rank, or scheduler (`layout` None). `table_descriptor`: kept for whoever adopts the table. `order`: said again until it is carried out."""

    stream: Stream
    pool: Pool
    reader: TableReader
    layout: Layout | None
    table_descriptor: int
    pidfd: int
    bell: int
    connection: int  # 0 while the line is down
    facts: Facts = field(default_factory=Facts)
    steps: Steps | None = None
    watched: bool = False
    stopped: bool = False
    killed: str = ""
    order: PlanOrder | None = None


@dataclass
class Spare:
    """One standby."""

    instance: str
    incarnation: int
    pidfd: int
    connection: int
    killed: str = ""
    sources: tuple[StreamId, ...] = ()  # replicas that it was told to pull
    adopts: StreamId | None = None  # whose memory it was handed, to go on in
