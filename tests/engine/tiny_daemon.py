"""A daemon with nothing but its socket and its eyes: enough to test an engine against. In process, or as `python -m tests.engine.tiny_daemon SOCKET`.

As a process it prints one line per thing seen: "attached ROLE", "committed SUM", "message NAME", "lost".
"""

from __future__ import annotations

import os
import select
import sys
import time

from kvguard.daemon.control import ControlServer, LocalIncoming
from kvguard.engine.look import TableReader
from kvguard.format import local
from kvguard.types import NO_EPOCH, Epoch


class TinyDaemon:
    """`readers`, `attaches`: by connection. `messages`: all others. `epoch`: what Attached says."""

    def __init__(self, path: str, epoch: Epoch = NO_EPOCH) -> None:
        self.server = ControlServer(path)
        self.epoch = epoch
        self.readers: dict[int, TableReader] = {}
        self.attaches: dict[int, local.Attach] = {}
        self.bells: dict[int, int] = {}
        self.messages: list[local.Local] = []
        self.lost: list[int] = []
        self.committed: dict[int, dict[int, int]] = {}

    def turn(self, timeout_s: float = 0.0) -> None:
        select.select([self.server.fileno()], [], [], timeout_s)
        for incoming in self.server.receive():
            if not isinstance(incoming, LocalIncoming):
                self.lost.append(incoming.connection)
                self._forget(incoming.connection)
            elif isinstance(incoming.message, local.Attach):
                self._attach(incoming)
            else:
                self.messages.append(incoming.message)
        for connection, reader in self.readers.items():
            look = reader.look()
            seen = self.committed.setdefault(connection, {})
            for row in look.released:
                seen.pop(row, None)
            seen.update(zip(look.rows, look.committed, strict=True))

    def until(self, condition, limit_s: float = 20.0):
        """Turn until `condition()` is true; returns what it said."""
        end = time.monotonic() + limit_s
        while not (found := condition()):
            assert time.monotonic() < end, "the condition never came true"
            self.turn(0.02)
        return found

    def _attach(self, incoming: LocalIncoming) -> None:
        message, descriptors = incoming.message, incoming.descriptors
        self.attaches[incoming.connection] = message
        self._forget_bell(incoming.connection)
        if message.role != "standby":
            self.bells[incoming.connection] = descriptors[1]
            self.readers[incoming.connection] = TableReader(descriptors[2])
            descriptors = [descriptors[0], *descriptors[3:]]
        for descriptor in descriptors:
            os.close(descriptor)
        self.server.send(incoming.connection, local.Attached(self.epoch))

    def _forget_bell(self, connection: int) -> None:
        if connection in self.bells:
            os.close(self.bells.pop(connection))

    def _forget(self, connection: int) -> None:
        self._forget_bell(connection)
        for by_connection in (self.readers, self.attaches, self.committed):
            by_connection.pop(connection, None)

    def close(self) -> None:
        for connection in list(self.attaches):
            self._forget(connection)
        self.server.close()


def main(path: str) -> None:
    daemon = TinyDaemon(path)
    said: list[str] = []
    print("listening", flush=True)
    while True:
        daemon.turn(0.01)
        state = [f"attached {attach.role}" for attach in daemon.attaches.values()]
        state += [f"committed {sum(rows.values())}" for rows in daemon.committed.values()]
        state += [f"message {type(message).__name__}" for message in daemon.messages]
        if state != said:
            print("\n".join(state), flush=True)
            said = state


if __name__ == "__main__":
    main(sys.argv[1])
