"""A pool whose memory the node's daemon made, so that it outlives this process: asked for before the engine serves, the one thing here that waits.

Knows: the daemon's socket, devices. Must not know: ranks, steps, plans.
Invariants: it ends within its time, with a pool or with a reason; what came and can't be used is closed.
"""

from __future__ import annotations

import os
import select
import socket as sockets
import time

from kvguard.device import open_device
from kvguard.engine.client import socket_path
from kvguard.engine.packets import Ended, close_all, receive_packet, send_packet
from kvguard.errors import BadFrame, Refused, TimedOut
from kvguard.format import local
from kvguard.format.layout import Layout

RETRY_S = 0.05


def borrow(layout: Layout, device: str = "host", *, gpu: int = 0, socket: str | os.PathLike | None = None, timeout_s: float = 10.0):
    """A zeroed pool (device.base.Pool) for attach(): when this process dies, whoever is given its rank goes on in the same memory, without a copy.

    `gpu`: as CUDA counts them here. Raises BadConfig (layout), Refused (the daemon can't, with its reason), TimedOut (no daemon): take allocate() then.
    """
    layout.check(layout.pool_bytes)
    made = open_device(device)
    uuid = "" if device == "host" else made.driver(gpu).uuid
    answer, descriptors = _asked(socket_path(socket), local.PoolWanted(layout, device, uuid), time.monotonic() + timeout_s)
    if not isinstance(answer, local.PoolLent):
        close_all(descriptors)
        raise Refused(f"the daemon lends no memory: {getattr(answer, 'reason', 'it said something else')}. Try: kvguard.engine.allocate")
    pool = made.open(layout, descriptors)
    if device != "host":
        try:
            pool.clear()
        except BaseException:
            pool.close()
            raise
    return pool


def _asked(path: str, message: local.Local, deadline: float) -> tuple[local.Local, list[int]]:
    """The daemon's answer; it is tried again until `deadline` (of the monotonic clock) where nobody listens yet."""
    why = "it doesn't answer"
    while (left_s := deadline - time.monotonic()) > 0:
        with sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET | sockets.SOCK_NONBLOCK | sockets.SOCK_CLOEXEC) as line:
            try:
                line.connect(path)
                send_packet(line, message)
                if select.select([line], [], [], left_s)[0]:
                    return receive_packet(line)
            except (Ended, BadFrame) as error:
                raise Refused(f"the daemon at {path} doesn't lend memory: {error}. Try: the same kvguard version in engine and daemon") from error
            except OSError as error:
                why = str(error)
                time.sleep(min(RETRY_S, left_s))
    raise TimedOut(f"no memory from the daemon at {path} in time: {why}. Try: is it running? or kvguard.engine.allocate")
