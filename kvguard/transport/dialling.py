"""The dialling side: one DEALER a connection, redialled with back-off.

Knows: the DEALER and its monitor, the bulk connection to the same host. Must not know: who else is connected, what frames mean.
Invariant: one socket is one connection is one up period. ZeroMQ's own reconnecting is switched off: it would carry on under the same socket and lose what
was under way without a word. A socket that failed is closed, and the next attempt draws a new routing id.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import time

import zmq

from kvguard.errors import BadFrame
from kvguard.transport import bulk, greeting, watching
from kvguard.transport.links import DOWN, GREETING, MESSAGES_PER_TURN, UP, Link, take_rest
from kvguard.transport.returning import Returning
from kvguard.transport.shared import Shared
from kvguard.transport.unfinished import Unfinished
from kvguard.transport.wakeup import OUT

NIXL_LINKS = "peer:"  # between nodes: others have no payloads
RETRY_MIN_NS, RETRY_MAX_NS = 20_000_000, 1_000_000_000  # an attempt costs about 0.5 ms
BULK_CONNECT_NS = 1_000_000_000
WHY_MAX = 120  # characters of a reason, in a status


class Dialled:
    """A link that is kept to one address until close()."""

    def __init__(self, shared: Shared, name: str, address: str):
        self._shared, self.name, self.address = shared, name, address
        self.link: Link | None = None
        self._socket: zmq.Socket | None = None
        self._watch: watching.Watch | None = None
        self._bulk: socket.socket | None = None  # connecting
        self._ticket = b""
        self._host = ""
        self._greeted = self._offered = False
        self._bulk_deadline_ns = 0
        self._nixl = Returning()
        self._asked_nixl = False
        self._tries_beside = False  # the peer can try NIXL beside the bulk channel of a link that is up
        self._retry_ns = RETRY_MIN_NS
        self._due_ns = 0
        self._closed = False
        self._server_key = b""  # the one that this attempt expects
        self._messages = 0  # whole ones that came
        self._unfinished: Unfinished | None = None
        self._attempts = 0  # that failed: a peer whose key is being rotated has several, one of them in use
        self._start()

    def close(self) -> None:
        self._closed = True
        if self.link is not None and self.link.state != DOWN:
            self.link.go_down("hung up", silent=True)
        self._tear_down()

    def rekey(self, other_pair: bool) -> None:
        """Other keys are in force: a link that was made with old ones is made anew, at once."""
        known = self._shared.settings.keys.server_keys(self.name)
        self._attempts = known.index(self._server_key) if self._server_key in known else 0
        if not other_pair and self._server_key in known or self._closed:
            return
        self._retry_ns = RETRY_MIN_NS
        if self._socket is not None:
            self._fail(self.link, "keys were changed")
        self._due_ns = time.monotonic_ns()

    def tick(self, now_ns: int) -> int:
        """Enforces deadlines; returns the next one, 0 for none."""
        if self._closed:
            return 0
        if self._socket is None:
            if now_ns >= self._due_ns:
                self._start()
            else:
                return self._due_ns
        if self._bulk is not None and now_ns >= self._bulk_deadline_ns:
            self._without_bulk()
        if self.link is not None and 0 < self.link.deadline_ns <= now_ns:
            self._fail(self.link, f"{self.address} didn't finish the greeting in time")
        if self._unfinished is not None and self._unfinished.due_ns() <= now_ns:
            self._fail_endless(now_ns)
        if self._socket is None:
            return self._due_ns
        looks_ns = self._unfinished.due_ns() if self._unfinished is not None else 0
        times = [self.link.deadline_ns, self._bulk_deadline_ns if self._bulk is not None else 0, self._try_again_ns(now_ns), looks_ns]
        return min((at for at in times if at), default=0)

    def _fail_endless(self, now_ns: int) -> None:
        """Where no whole message waits: what it brought must not be taken for a part of one."""
        if self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._shared.wakeup.again(self._on_messages)
        elif self._unfinished.is_endless(now_ns, self._messages):
            self._shared.broken(self.name, "endless", f"{self.address}: a message that has no end")
            self._fail(self.link, "a message without an end")

    def _start(self) -> None:
        """One attempt."""
        settings, wakeup = self._shared.settings, self._shared.wakeup
        self._greeted = self._offered = False
        if settings.keys is not None:
            listed = settings.keys.server_keys(self.name)
            if not listed:  # since its keys were read again
                self._shared.broken(self.name, "no_key", f"no key is listed for {self.name!r}. Try: a line `allow` in the key file, and reload")
                self._due_ns = time.monotonic_ns() + RETRY_MAX_NS
                return
            self._server_key = listed[self._attempts % len(listed)]
        opened = self._shared.open_socket(zmq.DEALER)
        opened.routing_id = f"{settings.node}#{settings.incarnation:016x}.{os.urandom(8).hex()}".encode()
        opened.reconnect_ivl = -1
        opened.connect_timeout = settings.greeting_ms
        if settings.keys is not None:
            opened.curve_serverkey = self._server_key
        self._socket = opened
        self._watch = watching.Watch(self._shared.context, opened)
        wakeup.watch_edge(self._watch.socket.fileno(), self._on_watch)
        wakeup.watch_edge(opened.fileno(), self._on_messages)
        self.link = Link(self._shared, self.name, opened, None, self._on_messages, self._fail)
        try:
            opened.connect(self.address)
        except zmq.ZMQError as error:
            self._shared.broken(self.name, "broken", f"can't dial {self.address!r}: {error.strerror}. Try: tcp://HOST:PORT")
            self._retry_ns = RETRY_MAX_NS
            self._fail(self.link, "address can't be used")

    def _fail(self, link: Link, reason: str) -> None:
        if link is not self.link or link.state == DOWN:
            return
        if link.state == UP:
            self._shared.count("down")
            self._retry_ns = RETRY_MIN_NS
        else:
            self._shared.count("dial_failed")
            self._attempts += 1
        told = "the peer said: nixl" if link.state == GREETING else "the peer said: nixl silent"
        if link.over_nixl and (reason.startswith(told) or link.state == GREETING and 0 < link.deadline_ns <= time.monotonic_ns()):
            link.nixl_fault = reason
        if link.nixl_fault or link.trial is not None and "nixl" in reason:
            self._without_nixl(link.nixl_fault or reason)
        link.go_down(reason)
        self._tear_down()
        self._due_ns = time.monotonic_ns() + int(self._retry_ns * random.uniform(0.8, 1.2))
        self._retry_ns = min(21 * self._retry_ns // 20, RETRY_MAX_NS)  # the wait is a twentieth of how long the peer has been away
        self._shared.wakeup.again(_redial)

    def _tear_down(self) -> None:
        self._drop_bulk()
        if self._socket is None:
            return
        self._shared.wakeup.forget(self._watch.socket.fileno())
        self._shared.wakeup.forget(self._socket.fileno())
        self._watch.close()
        self._socket.close()
        self._socket = self._watch = self._unfinished = None

    # ---- what woke us ----

    def _on_watch(self, events: int) -> None:
        for event, value in self._watch.events():
            if event == zmq.EVENT_CONNECTED:
                address = watching.peer_address(value)
                self._host, self._unfinished = address[0], Unfinished(value, address, time.monotonic_ns())
            elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._greet()
            elif event in watching.HANDSHAKE_FAILED:
                self._shared.broken(self.name, "handshake_failed", f"{self.address}: {watching.HANDSHAKE_FAILED[event]}")
                self._fail(self.link, watching.HANDSHAKE_FAILED[event])
            elif event in (zmq.EVENT_DISCONNECTED, zmq.EVENT_CLOSED):
                self._on_messages(0)  # what had come before the end still counts
                if self._watch is not None:
                    self._fail(self.link, "connection lost" if event == zmq.EVENT_DISCONNECTED else "connection refused")
            if self._watch is None:
                return

    def _greet(self) -> None:
        if not self._greeted:
            self._greeted = True
            settings = self._shared.settings
            trusted = not self._nixl.why or not self._tries_beside and self._nixl.is_due(time.monotonic_ns())
            self._asked_nixl = settings.nixl is not None and self.name.startswith(NIXL_LINKS) and trusted
            self.link.say(greeting.Greet(greeting.VERSION, settings.node, settings.incarnation, self.name, settings.bulk, self._asked_nixl))

    def _on_messages(self, events: int) -> None:
        for _ in range(MESSAGES_PER_TURN):
            if self._socket is None:
                return
            try:
                head = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            self._messages += 1
            payload, reason = take_rest(self._socket, head)
            if greeting.is_control(head) and payload is None:
                self._on_control(head)
            else:
                self.link.arrived(head, payload, reason)
        if self._socket is not None and self._socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
            self._shared.wakeup.again(self._on_messages)

    def _on_control(self, part: bytes) -> None:
        link = self.link
        try:
            message = greeting.unpack(part)
        except BadFrame as error:
            self._shared.broken(self.name, "broken", str(error))
            return
        if type(message) is greeting.Offer and link.state == GREETING and not self._offered:
            self._offered = True
            link.node = message.node
            self._tries_beside = message.later and message.bulk_port > 0
            if message.nixl and self._asked_nixl:
                link.met = lambda: link.say(greeting.Ready(True))
                link.open_nixl()
                return
            if self._asked_nixl:
                link.note = "not nixl: the peer has none"
                self._loudly("the peer has none")
            elif self._nixl.why:
                link.note = self._note()
            if message.bulk_port and len(message.ticket) == bulk.TICKET_BYTES and self._host:
                self._connect_bulk(message)
            else:
                link.say(greeting.Ready(False))
        elif type(message) is greeting.Ready and link.state == GREETING and self._is_agreed(message):
            self._retry_ns = RETRY_MIN_NS
            keys = self._shared.settings.keys
            if link.over_nixl:
                self._nixl.carries(time.monotonic_ns())
            link.come_up(keys.names().get(self._server_key, "") if keys is not None else "")
        elif type(message) is greeting.Taken:
            link.peer_took(message)
        elif isinstance(message, greeting.OVER_NIXL):
            link.told_nixl(message)
        elif type(message) is greeting.Bye:
            self._fail(link, f"the peer said: {message.reason}"[:200])
        else:
            self._shared.broken(self.name, "broken", f"{type(message).__name__} out of turn")
            self._fail(link, "greeting out of turn")

    def _is_agreed(self, peer: greeting.Ready) -> bool:
        """The peer is ready for what was offered, and over NIXL bytes have gone both ways."""
        channel = self.link.channel
        return self._offered and peer.bulk == (channel is not None) and not (self.link.over_nixl and not channel.is_met())

    # ---- the bulk connection ----

    def _connect_bulk(self, offer: greeting.Offer) -> None:
        self._bulk = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_STREAM)
        bulk.prepare(self._bulk)
        self._ticket = offer.ticket
        self._bulk_deadline_ns = time.monotonic_ns() + BULK_CONNECT_NS
        self._shared.wakeup.watch(self._bulk.fileno(), self._on_bulk, OUT)
        if self._bulk.connect_ex((self._host, offer.bulk_port)) not in (0, errno.EINPROGRESS):
            self._without_bulk()

    def _on_bulk(self, events: int) -> None:
        try:
            sent = 0 if self._bulk.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) else self._bulk.send(bulk.MAGIC + self._ticket)
        except OSError:
            sent = 0
        if sent != bulk.KNOCK_BYTES:
            self._without_bulk()
            return
        connection, self._bulk = self._bulk, None
        self._shared.wakeup.forget(connection.fileno())
        self.link.adopt(connection)
        self.link.say(greeting.Ready(True))

    # ---- NIXL ----

    def _without_nixl(self, why: str) -> None:
        """It didn't carry."""
        self._nixl.failed(time.monotonic_ns(), why)
        self._loudly(f"{why}; {self._again()}")

    def _loudly(self, why: str) -> None:
        self._shared.broken(self.name, "without_nixl", f"payloads to {self.address} don't take nixl: {why}")

    def _note(self) -> str:
        return f"not nixl: {self._nixl.why[:WHY_MAX]}; {self._again()}"

    def _again(self) -> str:
        """When: as an absolute time, so that what is said of a link changes only with the link."""
        at = time.time() + max(0, self._nixl.due_ns - time.monotonic_ns()) / 1e9
        return f"tried again at {time.strftime('%H:%M:%S', time.gmtime(at))} UTC"

    def _try_again_ns(self, now_ns: int) -> int:
        """Begins a trial beside the bulk channel when it is time; returns when it is, 0 for never."""
        link = self.link
        if not self._nixl.why or link.state != UP or link.over_nixl or link.trial is not None or link.bulk is None or not self._tries_beside:
            return 0
        if not self._nixl.is_due(now_ns):
            return self._nixl.due_ns
        link.tried = self._tried
        link.try_nixl()
        return 0

    def _tried(self, why: str) -> None:
        """A trial beside the bulk channel is over."""
        if why:
            self._without_nixl(why)
            self.link.annotate(self._note())
        else:
            self._nixl.carries(time.monotonic_ns())

    def _without_bulk(self) -> None:
        """The port can't be reached: payloads take the control connection of this link."""
        self._drop_bulk()
        self._tries_beside = False
        self._shared.count("without_bulk")
        self.link.say(greeting.Ready(False))

    def _drop_bulk(self) -> None:
        if self._bulk is not None:
            self._shared.wakeup.forget(self._bulk.fileno())
            self._bulk.close()
            self._bulk = None


def _redial(events: int) -> None:
    """Wakes receive(), whose tick looks at the due times."""
