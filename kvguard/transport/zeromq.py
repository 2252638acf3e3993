"""Links over ZeroMQ: a ROUTER for those who call, a DEALER for each link that is dialled, CURVE where keys are configured, TCP beside it for payloads.

Knows: how the parts are put together (accepting.py, dialling.py, links.py, bulk.py). Must not know: what frames mean.
Invariants: base.py's. One thread owns the transport; nothing runs but in its calls, apart from ZeroMQ's own two threads. send() starts what it can,
receive() goes on with it: call receive() whenever fileno() is readable. Off loopback keys are required, unless `insecure` is written out.
"""

from __future__ import annotations

import dataclasses
import os
import time

import zmq

from kvguard.errors import BadConfig
from kvguard.limits import KIB, NAME_BYTES_MAX
from kvguard.transport.accepting import Acceptor
from kvguard.transport.base import Incoming
from kvguard.transport.dialling import Dialled
from kvguard.transport.keys import Keys
from kvguard.transport.links import QUEUE_BYTES_MAX, RETRY_NS, Link
from kvguard.transport.nixl_agent import NixlSettings, Registered, load, rehearse
from kvguard.transport.shared import Settings, Shared
from kvguard.transport.wakeup import Wakeup

RECEIVED_MAX = 1024
QUEUE_BYTES_MIN = 256 * KIB  # less than what a peer takes before it says so would stall


class ZeromqTransport:
    """base.Transport over real sockets.

    `node_name`: what this process is called; with keys its peers must list it under this name. `bulk`: offer and want bulk channels; `bulk_port`: where, 0
    for any. `queue_bytes_max`: per link and channel. A connection is lost after `silence_ms` without a sign of life. `counters`: what was dropped or
    refused, by word; `refusals`: callers that were turned away, by host. `nixl`: payloads between nodes take NIXL where both have it. Raises BadConfig.
    """

    def __init__(
        self,
        node_name: str,
        keys: Keys | None = None,
        insecure: bool = False,
        bulk: bool = True,
        *,
        incarnation: int | None = None,
        bulk_port: int = 0,
        queue_bytes_max: int = QUEUE_BYTES_MAX,
        heartbeat_ms: int = 200,
        silence_ms: int = 800,
        greeting_ms: int = 3000,
        nixl: NixlSettings | None = None,
    ):
        if not node_name or len(node_name.encode()) > NAME_BYTES_MAX or not node_name.isprintable():
            raise BadConfig(f"node name {node_name!r} isn't 1 to {NAME_BYTES_MAX} printable bytes. Try: the host's name")
        if queue_bytes_max < QUEUE_BYTES_MIN:
            raise BadConfig(f"a queue of {queue_bytes_max} bytes is too short to keep a link busy. Try: {QUEUE_BYTES_MIN} or more")
        if nixl is not None:
            nixl.check(insecure)
            load()
        incarnation = int.from_bytes(os.urandom(8), "little") if incarnation is None else incarnation
        settings = Settings(node_name, incarnation, keys, insecure, bulk, bulk_port, queue_bytes_max, heartbeat_ms, silence_ms, greeting_ms, nixl)
        self._shared = Shared(zmq.Context(), Wakeup(), settings)
        if nixl is not None:
            from kvguard.transport.nixl_zone import Lending  # with numpy

            self._shared.lending = Lending(nixl.lent_bytes)
            wrong = rehearse(nixl)
            if wrong:  # the adapter may come back: each link tries again
                self._shared.broken("", "nixl_unfit", wrong)
        self.counters, self.refusals = self._shared.counters, self._shared.refusals
        self._acceptor: Acceptor | None = None
        self._dialled: dict[str, Dialled] = {}
        self._closed = False

    def listen(self, address: str) -> str:
        self._check_keys(address, "listen at")
        if self._acceptor is None:
            self._acceptor = Acceptor(self._shared)
        return self._acceptor.bind(address)

    def dial(self, link: str, address: str) -> None:
        """Raises BadConfig where keys are required and this process has none. An address that is merely wrong is reported as Broken; so is a peer whose key
        is not listed, which is dialled once it is (`rekey`)."""
        former = self._dialled.get(link)
        if former is not None and former.address == address:
            return
        self._check_keys(address, "dial")
        if former is not None:
            was_up = former.link is not None and former.link.state == "up"
            if was_up:
                former.link.fail("dialled at another address")
            former.close()
        self._dialled[link] = Dialled(self._shared, link, address)
        self._arm()

    def expect(self, link: str) -> None:
        """Raises BadConfig where nobody could ever answer on `link` because no key is listed for it: for callers that can't do without it."""
        keys = self._shared.settings.keys
        if keys is not None and not keys.server_keys(link):
            raise BadConfig(f"no key is listed for {link!r}. Try: a line `allow {link.removeprefix('peer:')} KEY` in the key file")

    def hang_up(self, link: str) -> None:
        """No Down follows here; the peer sees one."""
        dialled = self._dialled.pop(link, None)
        if dialled is not None:
            dialled.close()
        elif self._acceptor is not None:
            self._acceptor.hang_up(link)
        kept = [event for event in self._shared.out if event.link != link]
        self._shared.out.clear()
        self._shared.out.extend(kept)

    def send(self, link: str, head: bytes, payload: memoryview | None = None) -> bool:
        found = self._find(link)
        return found is not None and found.send(head, payload)

    def receive(self) -> list[Incoming]:
        out = self._shared.out
        if len(out) < RECEIVED_MAX:  # else the caller is behind: the rest waits where it is
            for call, events in self._shared.wakeup.ready():
                call(events)
            self._arm()
        taken = [out.popleft() for _ in range(min(len(out), RECEIVED_MAX))]
        if out:
            self._shared.wakeup.again(_more)
        return taken

    def rekey(self, keys: Keys) -> bool:
        """Other keys from now on; False where they are the same. Links whose key is not listed any more end here; where this process has another pair all of
        them do, and those that were dialled from either side are dialled again at once. Raises BadConfig where this transport has no keys.
        """
        former = self._shared.settings.keys
        if former is None:
            raise BadConfig("a process that runs without keys can't have some before its next start. Try: restart it")
        if keys == former:
            return False
        self._shared.settings = dataclasses.replace(self._shared.settings, keys=keys)
        other_pair = (keys.secret, keys.public) != (former.secret, former.public)
        if self._acceptor is not None:
            self._acceptor.rekey(other_pair)
        for dialled in self._dialled.values():
            dialled.rekey(other_pair)
        self._arm()
        return True

    def fileno(self) -> int:
        return self._shared.wakeup.fileno()

    def wait(self, timeout_s: float) -> bool:
        """Block until receive() may return something: for callers without a loop of their own."""
        return self._shared.wakeup.wait(timeout_s)

    def queued_bytes(self, link: str) -> int:
        """What waits in this process for the bulk channel of `link`."""
        found = self._find(link)
        return found.channel.queued_bytes if found is not None and found.channel is not None else 0

    def has_bulk(self, link: str) -> bool:
        found = self._find(link)
        return found is not None and found.channel is not None

    def register(self, address: int, size: int, device: int | None = None) -> None:
        """Memory, of GPU `device` or the host's, that payloads may be sent from as nixl_agent.Registered while this transport lives: over NIXL alone, send()
        says False on any other link. It is read until the frame has left: its owner goes by the peer's acknowledgement.
        """
        memory = Registered(address, size, device)
        self._shared.registered.append(memory)
        for link in self._links():
            link.register(memory)

    def lend(self, size: int) -> memoryview:
        """`size` writable bytes of any content to make a payload in: over NIXL it is then sent from where it is. Dropped views give it back."""
        lent = self._shared.lending.take(size) if self._shared.lending is not None else None
        return lent if lent is not None else memoryview(bytearray(size))

    def carriers(self) -> dict[str, str]:
        """What the payloads of each link that is up travel over: "nixl" and the UCX transport that was chosen, "tcp" or "control"."""
        return {link.name: link.carrier() for link in self._links() if link.state == "up"}

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for dialled in self._dialled.values():
            dialled.close()
        self._dialled.clear()
        if self._acceptor is not None:
            self._acceptor.close()
        self._shared.out.clear()
        if self._shared.lending is not None:
            self._shared.lending.close()
        self._shared.wakeup.close()
        self._shared.context.term()

    def _find(self, link: str) -> Link | None:
        dialled = self._dialled.get(link)
        if dialled is not None:
            return dialled.link
        return self._acceptor.links.get(link) if self._acceptor is not None else None

    def _links(self) -> list[Link]:
        accepted = list(self._acceptor.links.values()) if self._acceptor is not None else []
        return [dialled.link for dialled in self._dialled.values() if dialled.link is not None] + accepted

    def _arm(self) -> None:
        """Deadlines, and control messages that found no room."""
        now_ns = time.monotonic_ns()
        times = [dialled.tick(now_ns) for dialled in self._dialled.values()]
        if self._acceptor is not None:
            times.append(self._acceptor.tick(now_ns))
        for link in self._links():
            if link.waiting():
                link.flush()
                times.append(now_ns + RETRY_NS)
            times.append(link.look_again_ns(now_ns))
        self._shared.wakeup.arm(min((at for at in times if at), default=0))

    def _check_keys(self, address: str, doing: str) -> None:
        settings = self._shared.settings
        if settings.keys is None and not settings.insecure and not is_local(address):
            raise BadConfig(
                f"can't {doing} {address!r} without keys: whoever reaches this network could read and change the cache. "
                "Try: kvguard keys generate, or insecure = true if that is meant"
            )


def is_local(address: str) -> bool:
    """True when nobody on another machine can be at this address."""
    scheme, _, rest = address.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    return host in ("localhost", "::1") or (host.startswith("127.") and host.replace(".", "").isdigit())


def _more(events: int) -> None:
    """There is more than one call of receive() returns."""
