"""An engine's process for the tests of shared GPU memory: does what it is told over a socket, one JSON message a packet, descriptors beside it.

Order and answer: {"do": NAME, ...} -> {"ok": ...} or {"refused": text}. Bytes that it writes are a function of (seed, slot).
"""

from __future__ import annotations

import json
import mmap
import os
import socket
import sys

import msgspec
import numpy as np

from kvguard.device import open_device
from kvguard.errors import KvguardError
from kvguard.format.layout import Layout


def values_of(seed: int, slot: int, size: int) -> bytes:
    """What a slot holds after it was written with `seed`."""
    return np.random.default_rng([seed, slot]).integers(0, 256, size, np.uint8).tobytes()


def in_chunks(driver, count: int) -> int:
    """Address of `count` granules of memory side by side, each a piece of its own."""
    virtual = driver.virtual
    address = virtual.reserve(count * virtual.granularity)
    for n in range(count):
        handle = virtual.create(virtual.granularity)
        virtual.map(address + n * virtual.granularity, virtual.granularity, handle)
        virtual.release(handle)
    driver.clear(address, count * virtual.granularity)
    return address


class Engine:
    """The orders, one method each."""

    def __init__(self, line: socket.socket) -> None:
        self.line, self.pool, self.word = line, None, None

    def allocate(self, kind: str, layout: str, shared: bool = False, offset: int = 0, chunks: int = 0):
        self.device = open_device(kind)
        self.layout = msgspec.json.decode(layout, type=Layout)
        if chunks:  # virtual memory of so many pieces, in which the pool begins `offset` bytes before the end of the first
            self.pool = self.device.share(self.layout, in_chunks(self.device.driver(), chunks) + self.device.driver().virtual.granularity - offset)
        elif shared:  # memory of the engine's own, in which the pool lies somewhere
            address = self.device.driver().allocate(self.layout.pool_bytes + offset + 64)
            self.pool = self.device.share(self.layout, address + offset)
        else:
            self.pool = self.device.allocate(self.layout)
        return {"fds": self.pool.export()}

    def take(self, kind: str, layout: str, fds, fresh: bool = False):
        """Memory that is kept, as an engine gets it."""
        self.device = open_device(kind)
        self.layout = msgspec.json.decode(layout, type=Layout)
        self.pool = self.device.open(self.layout, fds)
        if fresh:
            self.pool.clear()
        return {"fds": self.pool.export()}

    def read(self, slots: list[int]):
        """The sum of what is there, by slot."""
        unit, tokens = self.pool.plan.unit_bytes, self.pool.plan.block_tokens
        out = memoryview(bytearray(len(slots) * unit))
        self.pool.capture([slot // tokens for slot in slots], [slot % tokens for slot in slots], [1] * len(slots), out)
        return {"bytes": [out[n * unit : (n + 1) * unit].hex() for n in range(len(slots))]}

    def join(self, fds):
        if self.word is None:
            self.memory = mmap.mmap(os.dup(fds.pop()), 4096)
            self.word = memoryview(self.memory)[64:72].cast("Q")
        else:
            os.close(fds.pop())
        self.pool.join(fds)
        return {}

    def write(self, seed: int, slots: list[int], said: bool = True, value: int = 0):
        tokens, unit = self.pool.plan.block_tokens, self.pool.plan.unit_bytes
        data = memoryview(b"".join(values_of(seed, slot, unit) for slot in slots))
        blocks, within = [slot // tokens for slot in slots], [slot % tokens for slot in slots]
        if self.layout.addressable:
            self.pool.scatter(blocks, within, [1] * len(slots), data)
            if said:
                self.pool.wrote(blocks, within, [1] * len(slots))
        else:
            self.pool.scatter_blocks(blocks, data)
            if said:
                self.pool.wrote(blocks)
        if value:
            self.pool.publish(self.word, value)
        return {"packed": self.pool.packed, "skipped": self.pool.skipped, "lost": self.pool.lost}

    def close(self):
        self.pool.close()
        return {}

    def serve(self) -> None:
        while True:
            packet, fds, _, _ = socket.recv_fds(self.line, 1 << 20, 4)
            if not packet:
                return
            order = json.loads(packet)
            try:
                answer = getattr(self, order.pop("do"))(**order, **({"fds": list(fds)} if fds else {}))
            except KvguardError as error:
                answer = {"refused": str(error)}
            out = answer.pop("fds", [])
            socket.send_fds(self.line, [json.dumps(answer).encode()], out)
            for fd in out:
                os.close(fd)


if __name__ == "__main__":
    Engine(socket.socket(fileno=int(sys.argv[1]))).serve()
