"""The CUDA device: which GPU a pool is on, and what stands behind its descriptors.

Knows: drivers by GPU, cards, configuration of captures. Must not know: cupy (cupy_driver.py does), what is in a ring, sequences.

Invariants
- Nothing of CUDA is imported or opened before `prepare`, `allocate`, `share` or the first `open`.
- A GPU that can't be used is said once and remembered: attaching to it is refused with the reason, and nothing else of the process suffers.
- Descriptors are closed here whatever happens.
- A host pool (what a dead GPU pool was salvaged into) opens as GPU memory of the same layout, with the bytes that the host pool has; for reading as what it is.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvguard.device import card, exports
from kvguard.device.driver import Driver
from kvguard.device.gpu_pool import GpuPool
from kvguard.device.host import HostDevice, HostPool
from kvguard.device.kept import KeptMemory, KeptPool
from kvguard.device.mappings import Mappings
from kvguard.device.opened import RING_BYTES, STAGED_BYTES, OpenedPool
from kvguard.device.owned import OwnedPool
from kvguard.device.virtual import chunks_of
from kvguard.errors import BadConfig, DeviceLost, KvguardError, Refused, TimedOut
from kvguard.format.layout import Layout

log = logging.getLogger(__name__)
UPLOAD_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Capturing:
    """How a daemon reads pools. `capture`: engine (it packs steps into our ring) or daemon (we launch the gather). `bytes_per_s`: 0 for as fast as it goes."""

    capture: str = "engine"
    bytes_per_s: int = 0
    ring_bytes: int = RING_BYTES
    staged_bytes: int = STAGED_BYTES


class CudaDevice:
    """See device/base.py. `drivers`: makes one driver for each GPU; the first is the one that allocate() and share() take, unless a number is given."""

    def __init__(self, drivers: Callable[[], Sequence[Driver]], capturing: Capturing = Capturing(), kind: str = "cuda") -> None:  # noqa: B008
        self.kind = kind
        self.capturing = capturing
        self._make = drivers
        self._drivers: tuple[Driver, ...] = ()
        self._mappings: dict[str, Mappings] = {}
        self.fault = ""  # why there is no GPU to be had

    def prepare(self) -> str:
        """Open a context on every GPU now, before engines measure what is free. Returns why that can't be; empty where it could. Never raises."""
        try:
            for driver in self._all():
                driver.ready()
        except KvguardError as error:
            self.fault = self.fault or str(error)
        return self.fault

    def _all(self) -> tuple[Driver, ...]:
        if self.fault:
            raise Refused(self.fault)
        if not self._drivers:
            try:
                self._drivers = tuple(self._make())
            except KvguardError as error:
                self.fault = str(error)
                raise
            self._mappings = {driver.uuid: Mappings(driver) for driver in self._drivers}
            log.info("GPUs: %s", ", ".join(f"{driver.name} {driver.uuid}" for driver in self._drivers))
        return self._drivers

    def driver(self, number: int = 0) -> Driver:
        """Raises Refused, BadConfig where there is no such GPU."""
        drivers = self._all()
        if not 0 <= number < len(drivers):
            raise BadConfig(f"GPU {number} isn't one of the {len(drivers)} that this process sees. Try: CUDA_VISIBLE_DEVICES")
        return drivers[number]

    # ---- an engine's --------------------------------------------------------------------------------------------------------------

    def allocate(self, layout: Layout, gpu: int = 0) -> OwnedPool:
        """A zeroed pool of its own allocation. Raises BadConfig for a layout with faults, Refused without a GPU or memory."""
        layout.check(layout.pool_bytes)
        driver = self.driver(gpu)
        address = driver.allocate(layout.pool_bytes)
        try:
            return OwnedPool(driver, layout, address, allocation=address)
        except BaseException:
            driver.free(address)
            raise

    def share(self, layout: Layout, address: int, gpu: int = 0) -> OwnedPool:
        """A pool in memory that the engine has allocated itself, at device `address` (a tensor's data_ptr()). Raises BadConfig, Refused.

        The engine says on which stream it launches: `pool.current = lambda: torch.cuda.current_stream().cuda_stream`.
        """
        driver = self.driver(gpu)
        if chunks_of(driver.virtual, address, layout.pool_bytes) is None:
            found = driver.allocation_of(address)
            layout.check(found.address + found.size - address)
        else:
            layout.check(layout.pool_bytes)
        return OwnedPool(driver, layout, address)

    def lend(self, layout: Layout, gpu: str = "") -> list[int]:
        """See device/base.py: memory of virtual memory management, on the GPU of that UUID (the only one where it isn't said). Raises BadConfig, Refused."""
        layout.check(layout.pool_bytes)
        return exports.lent(self._of_uuid(gpu) if gpu else self.driver(), layout.pool_bytes)

    def lends_on(self, gpu: str = "") -> str:
        """See device/base.py."""
        return (self._of_uuid(gpu) if gpu else self.driver()).uuid

    # ---- another process's ----------------------------------------------------------------------------------------------------------

    def open(self, layout: Layout, descriptors: list[int], writable: bool = True) -> OpenedPool | OwnedPool | HostPool:
        """See device/base.py: a card's pool for reading (only kept memory is offered `writable`); a host pool for reading, or its bytes in our own memory."""
        held = list(descriptors)
        try:
            if not held:
                raise Refused("a GPU's pool comes as a descriptor with its card. Try: Pool.export()")
            terms = card.read(held[0])
            if terms is None and not writable:  # a daemon's view of an engine in host memory: a copy would never hear of a step
                return HostDevice().open(layout, [os.dup(descriptor) for descriptor in held], writable=False)
            if terms is None:
                return self._adopt(layout, held)
            return self._open(layout, terms, held, writable)
        except (DeviceLost, TimedOut, BadConfig) as error:  # whoever attaches is refused; the process lives
            raise Refused(str(error)) from error
        finally:
            exports.close_all(held)

    def where(self, descriptors: Sequence[int]) -> str:
        """See device/base.py."""
        terms = card.read(descriptors[0]) if descriptors else None
        return self._of_uuid(terms.uuid).uuid if terms is not None else ""

    def _open(self, layout: Layout, terms: card.Card, descriptors: list[int], writable: bool) -> OpenedPool | OwnedPool:
        try:
            layout.check(terms.size)
        except BadConfig as error:
            raise Refused(f"the pool of {terms.size} bytes doesn't fit its layout: {error}") from error
        if terms.kind != "pool":
            raise Refused(f"a {terms.kind} is no pool. Try: Pool.export()")
        driver = self._of_uuid(terms.uuid)
        if terms.kept and writable:
            return _own(driver, layout, KeptMemory(driver, terms, descriptors))
        how = self.capturing
        said = {"capture": how.capture, "bytes_per_s": how.bytes_per_s, "ring_bytes": how.ring_bytes, "staged_bytes": how.staged_bytes}
        if terms.kept:
            return KeptPool(driver, layout, self._mappings[driver.uuid], terms, descriptors, **said)
        behind = [os.dup(descriptor) for descriptor in descriptors[1:]]
        return OpenedPool(driver, layout, self._mappings[driver.uuid], terms, behind, **said)

    def _of_uuid(self, uuid: str) -> Driver:
        driver = next((one for one in self._all() if one.uuid == uuid), None)
        if driver is None:
            seen = ", ".join(one.uuid for one in self._drivers)
            raise Refused(f"the pool is on {uuid}, this process sees {seen}. Try: the same CUDA_VISIBLE_DEVICES for engine and daemon")
        return driver

    def _adopt(self, layout: Layout, descriptors: list[int]) -> OwnedPool:
        """What was salvaged, in a pool of our own: only what the file has is carried. `descriptors`: the caller's."""
        source = HostDevice().open(layout, [os.dup(descriptor) for descriptor in descriptors], writable=False)
        found = descriptors[0]
        try:
            pool = self.allocate(layout)
            try:
                _upload(pool, source.memory, found)
            except BaseException:
                pool.close()
                raise
            return pool
        finally:
            source.close()


def _own(driver: Driver, layout: Layout, kept: KeptMemory) -> OwnedPool:
    try:
        return OwnedPool(driver, layout, kept.address, kept=kept)
    except BaseException:
        kept.close()
        raise


def _upload(pool: GpuPool, memory: memoryview, descriptor: int) -> None:
    """The file's data, not its holes, into the pool."""
    stream = pool.driver.stream(urgent=False)
    staging, pinned = pool.driver.pinned(UPLOAD_BYTES)
    at, size = 0, pool.layout.pool_bytes
    while at < size:
        try:
            at = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # a hole up to the end
            return
        end = min(size, os.lseek(descriptor, at, os.SEEK_HOLE))
        while at < end:
            count = min(UPLOAD_BYTES, end - at)
            staging[:count] = memory[at : at + count]
            pool.driver.copy(pool.address + at, pinned, count, stream)
            pool.driver.synchronise(stream)
            at += count
