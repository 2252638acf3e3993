"""Ports on loopback for daemons that must know their address before they start.

Knows: which ports this process has given away. Must not know: who listens there.
Invariants: a port is given away once in a process's life, so two that are asked for separately differ and one whose daemon is down stays its own; all lie below
those that the kernel takes for outgoing connections: one of these could be gone before its daemon starts.
"""

from __future__ import annotations

import random
import socket

PORTS = range(12_000, 32_000)
_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now, each for the first time."""
    found: list[int] = []
    while len(found) < count:
        port = random.choice(PORTS)
        if port not in _given and _nobody_listens(port):
            _given.add(port)
            found.append(port)
    return found


def _nobody_listens(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:  # somebody's, or one that is still closing
            return False
        return True
