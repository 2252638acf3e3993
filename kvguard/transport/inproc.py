"""A network inside one thread, for simulation: virtual time, faults per direction, randomness given from outside.

Knows: links, frames, faults. Must not know: real clocks, threads, what a frame means.
Invariants: the same random source and the same calls give the same deliveries; frames of one channel of a direction keep their order (each link has
two channels, as a real link has its control connection and its bulk connection); a frame is lost only together with its link, which both sides then
see go down.

A side that crashed (`leave`) is seen by its peers after the direction's delay, or after `silence_ns` through a cut. A direction that is cut is noticed
by both sides after `silence_ns`; frames that were sent into a cut that heals sooner arrive late. That is what TCP and heartbeats do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from random import Random

from kvguard.errors import BadConfig
from kvguard.format.wire import may_carry_payload
from kvguard.transport import admit
from kvguard.transport.base import Broken, Down, Frame, Incoming, Up

SILENCE_NS = 600_000_000
RECEIVED_MAX = 512
PREFIX = "inproc://"


@dataclass
class Direction:
    """Faults of what travels one way between two nodes. Chances are per frame, in [0, 1]; a fault that fired is counted in `fired`."""

    delay_ns: int = 100_000
    jitter_ns: int = 0
    reset: float = 0.0  # the frame is lost, and the link with it
    duplicate: float = 0.0
    corrupt_head: float = 0.0
    corrupt_payload: float = 0.0
    cut: bool = False
    fired: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        self.fired[what] = self.fired.get(what, 0) + 1


@dataclass
class _Lane:
    """One channel of one direction of a link: what is under way, oldest first, as (due_ns, order, head, payload)."""

    under_way: deque = field(default_factory=deque)
    due_ns: int = 0


class _Side:
    """One end of a connection."""

    def __init__(self, transport: InprocTransport, link: str):
        self.transport, self.link = transport, link
        self.other: _Side = self
        self.lanes = (_Lane(), _Lane())  # frames on their way to this side: control, payload
        self.bytes = 0  # sum of those
        self.up = False


class Network:
    """All transports of one simulated world. The world sets the time with `advance` and asks `next_ns` when something falls due."""

    def __init__(self, random: Random, silence_ns: int = SILENCE_NS, queue_bytes_max: int = 32 << 20):
        self.random, self.silence_ns, self.queue_bytes_max = random, silence_ns, queue_bytes_max
        self.now_ns = 0
        self._order = 0
        self._nodes: dict[str, InprocTransport] = {}
        self._directions: dict[tuple[str, str], Direction] = {}
        self._cut_since: dict[tuple[str, str], int] = {}

    def join(self, node: str) -> InprocTransport:
        """The transport of a new life of `node`; a former life that still runs crashes."""
        if node in self._nodes:
            self.leave(node)
        self._nodes[node] = InprocTransport(self, node)
        return self._nodes[node]

    def leave(self, node: str) -> None:
        """The node's process is gone: its peers' kernels notice."""
        self._nodes[node].close()

    def between(self, source: str, target: str) -> Direction:
        """The faults of source -> target, to be read and written."""
        return self._directions.setdefault((source, target), Direction())

    def partition(self, source: str, target: str, cut: bool = True, both: bool = True) -> None:
        for pair in ((source, target), (target, source)) if both else ((source, target),):
            self.between(*pair).cut = cut

    def reset_link(self, node: str, link: str, reason: str = "reset by the simulation") -> bool:
        """Cut one connection now; both sides see it. False when it wasn't up."""
        side = self._nodes[node]._sides.get(link) if node in self._nodes else None
        if side is None:
            return False
        self._break(side, reason)
        return True

    def advance(self, now_ns: int) -> None:
        """Time goes on: redials, silence, noticed crashes. Frames themselves fall due in receive()."""
        assert now_ns >= self.now_ns, "time went backwards"
        self.now_ns = now_ns
        for pair in sorted(self._directions):
            if self._directions[pair].cut:
                since = self._cut_since.setdefault(pair, now_ns)
                if now_ns - since >= self.silence_ns:
                    self._fall_silent(*pair)
            else:
                self._cut_since.pop(pair, None)
        for node in sorted(self._nodes):
            self._nodes[node]._redial()

    def next_ns(self) -> int | None:
        """When something may next be received or change, None for never. A time that has come already is `now_ns`."""
        times = [since + self.silence_ns for pair, since in self._cut_since.items() if since + self.silence_ns > self.now_ns]
        for transport in self._nodes.values():
            times += transport._times()
        return max(self.now_ns, min(times)) if times else None

    # ---- used by the transports ----

    def _number(self) -> int:
        self._order += 1
        return self._order

    def _reaches(self, source: str, target: str) -> bool:
        direction = self._directions.get((source, target))
        return direction is None or not direction.cut

    def _break(self, side: _Side, reason: str) -> None:
        for end in (side, side.other):
            source, target = end.other.transport.node, end.transport.node
            late_ns = self.between(source, target).delay_ns if self._reaches(source, target) else self.silence_ns
            end.transport._lose(end, reason, 0 if end is side else late_ns)

    def _fall_silent(self, source: str, target: str) -> None:
        transport = self._nodes.get(source)
        for side in list(transport._sides.values()) if transport else ():
            if side.other.transport.node == target:
                direction = self.between(source, target)
                direction.count("cut")
                self._break(side, f"silent for {self.silence_ns // 1_000_000} ms")

    def _connect(self, dialling: InprocTransport, link: str, address: str) -> bool:
        target = self._nodes.get(address.removeprefix(PREFIX))
        if target is None or not target.listening or not self._reaches(dialling.node, target.node) or not self._reaches(target.node, dialling.node):
            return False
        near, far = _Side(dialling, link), _Side(target, f"in:{dialling.node}#{self._number()}")
        near.other, far.other = far, near
        trip_ns = self.between(dialling.node, target.node).delay_ns + self.between(target.node, dialling.node).delay_ns
        for side in (near, far):
            side.transport._sides[side.link] = side
            side.transport._tell(self.now_ns + trip_ns, Up(side.link, side.other.transport.node))
        return True

    def _carry(self, side: _Side, head: bytes, payload: memoryview | None) -> bool:
        """Put a frame on its way from `side` to the other."""
        source, target = side.transport.node, side.other.transport.node
        direction, far, size = self.between(source, target), side.other, len(head) + (len(payload) if payload is not None else 0)
        if far.bytes and far.bytes + size > self.queue_bytes_max:
            return False
        if direction.reset and self.random.random() < direction.reset:
            direction.count("reset")
            self._break(side, "connection reset")
            return False
        copies = 1
        if direction.duplicate and self.random.random() < direction.duplicate:
            direction.count("duplicate")
            copies = 2
        lane = far.lanes[1 if may_carry_payload(head) else 0]
        for _ in range(copies):
            late_ns = direction.delay_ns + (self.random.randrange(direction.jitter_ns + 1) if direction.jitter_ns else 0)
            lane.due_ns = max(lane.due_ns, self.now_ns + late_ns)
            damaged = self._damaged(direction, "corrupt_head", head), self._damaged(direction, "corrupt_payload", payload)
            lane.under_way.append((lane.due_ns, self._number(), *damaged))
            far.bytes += size
        return True

    def _damaged(self, direction: Direction, what: str, data):
        """A copy of `data`, the receiver's own, with one bit flipped when the fault strikes."""
        if data is None or len(data) == 0:
            return b"" if data is not None and what == "corrupt_head" else None
        copy = bytearray(data)
        chance = getattr(direction, what)
        if chance and self.random.random() < chance:
            direction.count(what)
            copy[self.random.randrange(len(copy))] ^= 1 << self.random.randrange(8)
        return bytes(copy) if what == "corrupt_head" else memoryview(copy)


class InprocTransport:
    """base.Transport over a Network. Addresses are inproc://NODE."""

    def __init__(self, network: Network, node: str):
        self.node, self.listening = node, False
        self._network = network
        self._sides: dict[str, _Side] = {}
        self._dialled: dict[str, str] = {}
        self._next_dial_ns: dict[str, int] = {}
        self._told: list[tuple[int, int, Incoming]] = []  # link events on their way to us: (due_ns, order, event), kept sorted by the order of receive()
        self._closed = False

    def listen(self, address: str) -> str:
        if address.removeprefix(PREFIX) != self.node:
            raise BadConfig(f"address {address!r} is not this node's. Try: {PREFIX}{self.node}")
        self.listening = True
        return address

    def dial(self, link: str, address: str) -> None:
        if self._dialled.get(link) == address:
            return
        if link in self._dialled:
            was_up = link in self._sides and self._sides[link].up
            self.hang_up(link)
            if was_up:
                self._tell(self._network.now_ns, Down(link, "dialled at another address"))
        self._dialled[link] = address
        self._next_dial_ns[link] = self._network.now_ns
        self._redial()

    def hang_up(self, link: str) -> None:
        """No Down follows here; the peer sees one."""
        self._dialled.pop(link, None)
        self._next_dial_ns.pop(link, None)
        side = self._sides.get(link)
        if side is not None:
            self._network._break(side, "the peer hung up")
        self._told = [told for told in self._told if told[2].link != link]

    def send(self, link: str, head: bytes, payload: memoryview | None = None) -> bool:
        side = self._sides.get(link)
        return side is not None and side.up and self._network._carry(side, head, payload)

    def receive(self) -> list[Incoming]:
        now_ns, out = self._network.now_ns, []
        while len(out) < RECEIVED_MAX and (due := self._next_due()) is not None and due[0] <= now_ns:
            out.append(self._take(*due[2:]))
        return out

    def fileno(self) -> int:
        """There is none: the world calls receive() when next_ns() says so."""
        return -1

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self.listening = False
        for side in list(self._sides.values()):
            self._network._break(side, "the peer is gone")
        self._told.clear()
        self._dialled.clear()
        if self._network._nodes.get(self.node) is self:
            del self._network._nodes[self.node]

    # ---- used by the network ----

    def _tell(self, due_ns: int, event: Incoming) -> None:
        self._told.append((due_ns, self._network._number(), event))

    def _lose(self, side: _Side, reason: str, late_ns: int) -> None:
        """The link of `side` is over; nothing that was on its way arrives. We are told `late_ns` from now."""
        if self._sides.get(side.link) is not side:
            return
        del self._sides[side.link]
        self._told = [told for told in self._told if not (told[2].link == side.link and isinstance(told[2], Up))]
        if side.up and not self._closed:
            self._tell(self._network.now_ns + late_ns, Down(side.link, reason))
        if side.link in self._dialled:
            self._next_dial_ns[side.link] = self._network.now_ns + 20_000_000

    def _redial(self) -> None:
        for link, due_ns in list(self._next_dial_ns.items()):
            if due_ns > self._network.now_ns or self._occupied(link):
                continue
            if self._network._connect(self, link, self._dialled[link]):
                del self._next_dial_ns[link]
            else:
                self._next_dial_ns[link] = self._network.now_ns + 20_000_000

    def _occupied(self, link: str) -> bool:
        """A Down that is still on its way comes before the next Up."""
        return link in self._sides or any(told[2].link == link for told in self._told)

    def _times(self) -> list[int]:
        due = self._next_due()
        return [*(at for link, at in self._next_dial_ns.items() if not self._occupied(link)), *([due[0]] if due else [])]

    def _next_due(self):
        """(due_ns, order, side, lane or event) of what comes next, None for nothing. Frames of a link wait for its Up; a cut direction holds them."""
        best = None
        for due_ns, order, event in self._told:
            if best is None or (due_ns, order) < best[:2]:
                best = (due_ns, order, None, event)
        for side in self._sides.values():
            if not side.up or not self._network._reaches(side.other.transport.node, self.node):
                continue
            for lane in side.lanes:
                if lane.under_way and (best is None or lane.under_way[0][:2] < best[:2]):
                    best = (*lane.under_way[0][:2], side, lane)
        return best

    def _take(self, side: _Side | None, what) -> Incoming:
        if side is None:
            self._told = [told for told in self._told if told[2] is not what]
            if isinstance(what, Up):
                self._sides[what.link].up = True
            return what
        _, _, head, payload = what.under_way.popleft()
        size = len(payload) if payload is not None else 0
        side.bytes -= len(head) + size
        reason = admit.misfit(head, size)
        return Broken(side.link, reason) if reason else Frame(side.link, head, payload)
