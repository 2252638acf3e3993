"""The listening side: one ROUTER for all who call, their greetings, their bulk connections.

Knows: the ROUTER and its monitor, ZAP, tickets. Must not know: dialling, what frames mean.
Invariants: a link exists only after a valid greeting over a connection that is alive; with keys its node is the one whose key was shown; a routing id is
one life of one connection (the dialler draws a new one each time), so a second connection under the same id is refused by ZeroMQ: there is no hand-over,
which would splice two connections into one link unseen. ROUTER_MANDATORY tells when a peer is gone; a ROUTER can't hang up, so it says Bye and ignores
what still comes. A connection that belongs to no link for NOBODY_NS is cut under ZeroMQ's hands, which lets whoever finished its handshake stay.
"""

from __future__ import annotations

import time

import zmq

from kvguard.errors import BadConfig, BadFrame
from kvguard.transport import bulk, greeting, watching
from kvguard.transport.keys import KEY_PROPERTY, Desk
from kvguard.transport.links import DOWN, GREETING, MESSAGES_PER_TURN, UP, Link, take_rest
from kvguard.transport.shared import Shared
from kvguard.transport.unfinished import Unfinished

LINKS_MAX = 4096
NIXL_LINKS_MAX = 128  # each has memory that its peer may write
NOBODY_NS = 5_000_000_000
TRIALS_NS = 1_000_000_000  # between two of one link: each has an agent and a zone made
BULK_WAIT_NS = 3_000_000_000
BIND_RETRY_NS = 2_000_000  # ZeroMQ closes a listening socket in a thread of its own


class Accepted(Link):
    """A link that was accepted here."""

    fd = -1
    routing = b""
    key = b""  # the caller's, Z85, with keys
    dialled_as = ("", "")  # node, its name for the link
    is_ready = wants_bulk = offered_nixl = False
    trial_from_ns = 0
    messages = 0  # whole ones that came
    unfinished: Unfinished


class Caller:
    """A connection that is alive."""

    __slots__ = ("address", "has_greeted")

    def __init__(self, address: tuple[str, int]):
        self.address, self.has_greeted = address, False

    def __str__(self) -> str:
        return "{}:{}".format(*self.address)


class Acceptor:
    """Everything behind the addresses that a transport listens at."""

    def __init__(self, shared: Shared):
        self._shared = shared
        self.links: dict[str, Accepted] = {}
        self._by_routing: dict[bytes, Accepted] = {}
        self._by_fd: dict[int, Accepted] = {}
        self._callers: dict[int, Caller] = {}  # by descriptor
        self._nobody: dict[int, int] = {}  # descriptors of those that no link belongs to, and until when: in order of time
        self._port: bulk.BulkPort | None = None
        self._last_failure = ""
        self._bound: list[str] = []
        self._unbound: list[str] = []  # to be bound again: the listening sockets of the former key are still being closed
        wakeup = shared.wakeup
        self._desk = Desk(shared.context, shared.settings.keys) if shared.settings.keys is not None else None
        if self._desk is not None:
            wakeup.watch_edge(self._desk.socket.fileno(), self._on_desk)
        self._socket = shared.open_socket(zmq.ROUTER)
        self._socket.router_mandatory = 1
        if shared.settings.keys is not None:
            self._socket.curve_server = 1
        self._watch = watching.Watch(shared.context, self._socket)
        wakeup.watch_edge(self._watch.socket.fileno(), self._on_watch)
        wakeup.watch_edge(self._socket.fileno(), self._on_messages)

    def bind(self, address: str) -> str:
        try:
            self._socket.bind(address)
        except zmq.ZMQError as error:
            raise BadConfig(f"can't listen at {address!r}: {error.strerror}. Try: tcp://127.0.0.1:0, or stop whoever holds the port") from error
        self._shared.wakeup.again(self._on_messages)
        real = self._socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").decode()
        self._bound.append(real)
        if self._port is None and self._shared.settings.bulk and real.startswith("tcp://"):
            host = real.removeprefix("tcp://").rpartition(":")[0].strip("[]")
            try:
                self._port = bulk.BulkPort(host, self._shared.settings.bulk_port, self._shared.wakeup, self._on_claimed, self._on_stranger)
            except OSError as error:
                raise BadConfig(f"can't open the bulk port {host}:{self._shared.settings.bulk_port}: {error.strerror}. Try: bulk_port = 0") from error
        return real

    def rekey(self, other_pair: bool) -> None:
        """Callers whose key is not listed any more are gone; with another pair of our own all are, and what listens does so with that pair."""
        keys = self._shared.settings.keys
        self._desk.rekey(keys)
        names = keys.names()
        for link in list(self.links.values()):
            if other_pair or names.get(link.key) != link.node:
                self._end(link, "keys were changed")
        if not other_pair:
            return
        self._socket.curve_publickey, self._socket.curve_secretkey = keys.public, keys.secret  # of whatever is bound from now on
        for address in self._bound:
            self._socket.unbind(address)
        self._unbound, self._bound = [*self._unbound, *self._bound], []
        self._bind_again()

    def _bind_again(self) -> None:
        for address in list(self._unbound):
            try:
                self._socket.bind(address)
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE:
                    raise
                self._shared.count("bind_again_waits")
                continue
            self._unbound.remove(address)
            self._bound.append(address)

    def close(self) -> None:
        for link in list(self.links.values()):
            link.go_down("closed", silent=True)
        if self._port is not None:
            self._port.close()
        sockets = [self._socket, self._watch.socket] + ([self._desk.socket] if self._desk else [])
        for opened in sockets:
            self._shared.wakeup.forget(opened.fileno())
        self._watch.close()
        self._socket.close()
        if self._desk is not None:
            self._desk.socket.close()

    def hang_up(self, name: str) -> None:
        link = self.links.get(name)
        if link is not None:
            self._end(link, "the peer hung up", silent=True)

    def tick(self, now_ns: int) -> int:
        """Enforces deadlines; returns the next one, 0 for none."""
        for link in [link for link in self.links.values() if 0 < link.deadline_ns <= now_ns]:
            self._end(link, "greeting not finished in time")
        if self._port is not None:
            self._port.tick(now_ns)
        while self._nobody and (first := next(iter(self._nobody.items())))[1] <= now_ns:
            self._cut(first[0])
        if self._unbound:
            self._bind_again()
        looks = [link.unfinished.due_ns() for link in self._by_fd.values()]
        if looks and min(looks) <= now_ns:
            self._cut_endless(now_ns)
        times = [link.deadline_ns for link in self.links.values() if link.deadline_ns]
        if self._unbound:
            times.append(now_ns + BIND_RETRY_NS)
        if self._port is not None and self._port.deadline_ns():
            times.append(self._port.deadline_ns())
        if self._nobody:
            times.append(next(iter(self._nobody.values())))
        times += [link.unfinished.due_ns() for link in self._by_fd.values()]
        return min(times, default=0)

    def _cut_later(self, fd: int) -> None:
        self._nobody.pop(fd, None)  # in order
        self._nobody[fd] = time.monotonic_ns() + NOBODY_NS

    def _cut(self, fd: int) -> None:
        """Its DISCONNECTED follows."""
        del self._nobody[fd]
        if fd in self._callers and watching.cut(fd, self._callers[fd].address):
            self._shared.count("cut")

    def _cut_endless(self, now_ns: int) -> None:
        """Of all links at once: what whole messages brought must not be taken for a part of one, so there may be none waiting."""
        if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._shared.wakeup.again(self._on_messages)
            return
        for fd, link in list(self._by_fd.items()):
            if link.unfinished.is_endless(now_ns, link.messages):
                caller = self._callers[fd]
                self._shared.broken(link.name, "endless", f"{caller}: a message that has no end")
                self._end(link, "a message without an end")
                watching.cut(fd, caller.address)

    # ---- what woke us ----

    def _on_desk(self, events: int) -> None:
        for reason in self._desk.answer():
            self._shared.refused(reason.partition(": ")[0], "key_refused", reason)

    def _on_watch(self, events: int) -> None:
        for event, value in self._watch.events():
            if event == zmq.EVENT_ACCEPTED:
                self._callers[value] = Caller(watching.peer_address(value))
                self._cut_later(value)
            elif event in watching.HANDSHAKE_FAILED:
                self._last_failure = watching.HANDSHAKE_FAILED[event]  # whose it was, its DISCONNECTED says, which comes next
            elif event == zmq.EVENT_DISCONNECTED:
                failure, self._last_failure = self._last_failure or "went away without a greeting", ""
                caller, link = self._callers.pop(value, None), self._by_fd.pop(value, None)
                self._nobody.pop(value, None)
                if caller is not None and not caller.has_greeted:
                    self._shared.refused(str(caller), "handshake_failed", f"{caller}: {failure}")
                if link is not None:
                    self._end(link, "connection lost")

    def _on_messages(self, events: int) -> None:
        for _ in range(MESSAGES_PER_TURN):
            try:
                routing = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if not self._socket.getsockopt(zmq.RCVMORE):
                continue
            link = self._by_routing.get(routing)
            if link is None:
                self._on_unknown(routing)
                continue
            link.messages += 1
            head = self._socket.recv(zmq.NOBLOCK)
            payload, reason = take_rest(self._socket, head)
            if greeting.is_control(head) and payload is None:
                self._on_control(link, head)
            else:
                link.arrived(head, payload, reason)
        if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._shared.wakeup.again(self._on_messages)

    def _on_unknown(self, routing: bytes) -> None:
        """Somebody who isn't a link (yet): only a greeting counts."""
        part = self._socket.recv(zmq.NOBLOCK, copy=False)
        extra = take_rest(self._socket, b"")[1]
        if extra or not greeting.is_control(part.buffer):
            self._shared.count("stray")  # often the last frames of a link that is over here: an event for each would be noise
            return
        try:
            message = greeting.unpack(part.buffer)
            if type(message) is not greeting.Greet:
                self._shared.count("stray")
                return
            self._on_greet(routing, message, part)
        except BadFrame as error:
            self._shared.broken("in:", "broken", f"{self._callers.get(part.get(zmq.SRCFD), '?')}: {error}")

    def _on_greet(self, routing: bytes, greet: greeting.Greet, part: zmq.Frame) -> None:
        self._on_watch(0)  # so that what we know of the descriptor is at least as new as the greeting
        fd = part.get(zmq.SRCFD)
        if fd not in self._callers:
            return  # gone again
        keys, node, key = self._shared.settings.keys, greet.node, b""
        if keys is not None:
            node = part.get("User-Id")  # who doesn't know under which name it is listed may call itself anything that is nobody else's
            key = part.get(KEY_PROPERTY).encode()
            if keys.names().get(key) != node:
                raise BadFrame(f"the key of {node!r} is not listed any more")
            if greet.node != node and greet.node in keys.allowed:
                raise BadFrame(f"claims to be {greet.node!r} with the key of {node!r}")
        if not routing.startswith(f"{greet.node}#{greet.incarnation:016x}.".encode()):
            raise BadFrame("routing id and greeting differ")
        if len(self.links) >= LINKS_MAX:
            raise BadFrame(f"more than {LINKS_MAX} links")
        for former in [link for link in self.links.values() if link.dialled_as == (node, greet.link)]:
            self._end(former, "replaced by a newer link of the same node")
        link = Accepted(self._shared, f"in:{routing.decode(errors='replace')}", self._socket, routing, self._on_messages, self._end)
        link.routing, link.fd, link.node, link.key, link.dialled_as = routing, fd, node, key, (node, greet.link)
        link.unfinished = Unfinished(fd, self._callers[fd].address, time.monotonic_ns())
        self.links[link.name] = self._by_routing[routing] = self._by_fd[fd] = link
        self._callers[fd].has_greeted = True
        self._nobody.pop(fd, None)
        link.offered_nixl = greet.nixl and self._has_nixl()
        if greet.bulk and self._shared.settings.nixl is not None and not link.offered_nixl:
            why = "too many links" if greet.nixl else "it has none, or had trouble"
            self._shared.broken(link.name, "without_nixl", f"payloads of {node} don't take nixl: {why}")
        wants = greet.bulk and self._port is not None and not link.offered_nixl
        ticket = self._port.offer(link, BULK_WAIT_NS) if wants else b""
        settings, port = self._shared.settings, self._port.port if wants else 0
        link.say(greeting.Offer(settings.node, settings.incarnation, port, ticket, link.offered_nixl, settings.nixl is not None))

    def _on_control(self, link: Accepted, part: bytes) -> None:
        try:
            message = greeting.unpack(part)
        except BadFrame as error:
            self._shared.broken(link.name, "broken", str(error))
            return
        if type(message) is greeting.Ready and link.state == GREETING and not link.is_ready:
            link.is_ready, link.wants_bulk = True, message.bulk
            if not message.bulk and self._port is not None:
                self._port.withdraw(link)
            self._decide(link)
        elif type(message) is greeting.Taken:
            link.peer_took(message)
        elif isinstance(message, greeting.OVER_NIXL) and self._shared.settings.nixl is not None:
            self._on_nixl(link, message)
        elif type(message) is greeting.Bye:
            self._end(link, f"the peer said: {message.reason}"[:200])
        else:
            self._shared.broken(link.name, "broken", f"{type(message).__name__} out of turn")
            self._end(link, "greeting out of turn")

    def _has_nixl(self) -> bool:
        return self._shared.settings.nixl is not None and sum(one.nixl is not None for one in self.links.values()) < NIXL_LINKS_MAX

    def _on_nixl(self, link: Accepted, message: greeting.Control) -> None:
        if type(message) is greeting.Zone and link.channel is None and link.state == GREETING and link.offered_nixl:
            link.met = lambda: self._decide(link)
            link.open_nixl()
        elif type(message) is greeting.Zone and link.state == UP and not link.over_nixl and link.bulk is not None:
            now_ns = time.monotonic_ns()
            if now_ns < link.trial_from_ns or not self._has_nixl():
                self._shared.count("nixl_trials_refused")
                return
            link.trial_from_ns, link.tried = now_ns + TRIALS_NS, lambda why: self._tried(link, why)
            link.try_nixl()
        link.told_nixl(message)

    def _tried(self, link: Accepted, why: str) -> None:
        if why:
            self._shared.broken(link.name, "without_nixl", f"payloads of {link.node} don't take nixl: {why}")

    def _on_claimed(self, link: Accepted, connection) -> None:
        if link.state != GREETING or link.channel is not None:
            connection.close()
            return
        link.adopt(connection)
        self._decide(link)

    def _on_stranger(self, address: str, reason: str) -> None:
        self._shared.refused(address, "bulk_refused", reason)

    def _decide(self, link: Accepted) -> None:
        """Up once the peer is ready and its payloads' channel is decided."""
        if not link.is_ready or (link.wants_bulk and link.channel is None) or (link.over_nixl and not link.channel.is_met()):
            return
        if not link.wants_bulk and link.channel is not None:
            self._end(link, "a bulk channel that the peer doesn't want")
            return
        link.say(greeting.Ready(link.wants_bulk))
        if link.state == GREETING:
            link.come_up(link.node if self._shared.settings.keys is not None else "")

    def _end(self, link: Accepted, reason: str, silent: bool = False) -> None:
        if link.state == DOWN:
            return
        if link.state == UP:
            self._shared.count("down")
        link.go_down(reason, silent)
        self.links.pop(link.name, None)
        self._by_routing.pop(link.routing, None)
        if self._by_fd.get(link.fd) is link:  # else the connection is gone already
            del self._by_fd[link.fd]
            self._cut_later(link.fd)
            link.last_word(reason)
        if self._port is not None:
            self._port.withdraw(link)
