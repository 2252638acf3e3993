"""The engine's own pool on a GPU: exported to its node's daemon, each step's new slots packed into the daemon's ring, words written in stream order.

Knows: side stream, ring, registered words. Must not know: steps, tables, sequences.

Invariants
- wrote() and publish() launch and return: nothing is waited for, no fault of the daemon's side is raised; a fault of ours costs the ring, never a step.
- A word is written once everything launched on the engine's stream before publish() is done, and after the gather of this step: all of them go through one
  side stream, so that words rise in order and a written step is a packed one.
- What the ring isn't told of is a gap: it makes everything void that the daemon hasn't fetched yet.
- Nothing of ours becomes part of a graph that the engine captures: a step that ends within a capture publishes nothing, wrote() there is refused.
- What is unmapped or freed is waited for on the streams that are known to touch it: our own (the side stream follows the engine's up to the last publish()),
  and the one that the engine launches on now. Not the whole GPU: that would end a capture of another thread's, and never end where a collective waits for a
  peer. An engine that reads its pool on further streams waits for those itself, as with any memory that it gives back.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque

import numpy as np

from kvguard.device import card, exports, ring
from kvguard.device.driver import Driver, Event
from kvguard.device.gpu_pool import CAPTURED, PAGE_BYTES, GpuPool, page_of
from kvguard.device.host import slots_of, slots_of_blocks
from kvguard.device.kept import KeptMemory
from kvguard.device.paced import settled, strand
from kvguard.errors import KvguardError, Refused
from kvguard.format.layout import Layout

COLUMNS = 8  # steps whose slots may be on their way
SLOTS_MAX = 1 << 14  # of a step that is packed; a longer one (a prefill) is fetched from the pool
_log = logging.getLogger("kvguard.device")


class Columns:
    """Areas that slots travel through, each used again when its gather is done. None is waited for."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        memory, self._pinned = driver.pinned(8 * SLOTS_MAX * COLUMNS)  # first: it goes by itself where what follows fails
        self._values = np.frombuffer(memory, np.int64).reshape(COLUMNS, SLOTS_MAX)
        self._device = driver.allocate(8 * SLOTS_MAX * COLUMNS)
        self._free = deque(range(COLUMNS))
        self._used: deque[tuple[int, Event]] = deque()

    def send(self, slots: np.ndarray, stream) -> tuple[int, int] | None:
        """(area, device address), or None where every area is still in use."""
        while self._used and self._driver.is_done(self._used[0][1]):
            self._free.append(self._used.popleft()[0])
        if not self._free:
            return None
        area = self._free.popleft()
        self._values[area, : slots.size] = slots
        start = 8 * SLOTS_MAX * area
        self._driver.copy(self._device + start, self._pinned + start, slots.nbytes, stream)
        return area, self._device + start

    def used_until(self, area: int, event: Event) -> None:
        self._used.append((area, event))

    def free(self) -> None:
        self._driver.free(self._device)


class Joined:
    """A daemon's ring, opened. `packer`: from `begin` on."""

    packer: ring.Packer

    def __init__(self, driver: Driver, terms: card.Card, words: ring.Words, done: int, page: int) -> None:
        self.driver, self.words, self.done, self.page, self.rows = driver, words, done, page, terms.rows
        self.memory = driver.open_handle(terms.handle)
        self.address = self.memory + terms.offset

    def begin(self) -> None:
        """Nobody else packs into it any more: from where the last one stopped."""
        self.packer = ring.Packer(self.words, self.rows)

    def close(self) -> None:
        self.driver.close_handle(self.memory)
        self.words.close()


class OwnedPool(GpuPool):
    """`allocation`: to be freed with the pool; 0 where the memory is the engine's (share), or `kept` (closed with the pool; it outlives this process).

    Counts: `packed`, `skipped` steps; `lost`: why no step is packed.
    """

    def __init__(self, driver: Driver, layout: Layout, address: int, allocation: int = 0, kept: KeptMemory | None = None) -> None:
        super().__init__(driver, layout, address)
        self._allocation, self._kept = allocation, kept
        self._name = exports.new_name()
        try:
            self._side = driver.stream(urgent=False)
            self._columns = Columns(driver)
        except BaseException:
            super().close()
            raise
        self._pages: dict[int, tuple[memoryview, int, memoryview]] = {}  # registered host pages: view, device address, what keeps them mapped
        self._joined: Joined | None = None
        self._joining = threading.Lock()
        self._said = True  # whether wrote() was called since the last publish()
        self.packed = 0

    @property
    def joined(self) -> bool:
        """Whether there is a ring to pack into: its daemon has answered, and none of it failed."""
        return self._joined is not None and not self.lost

    @property
    def skipped(self) -> int:
        joined = self._joined
        return joined.packer.skipped + joined.packer.gaps if joined else 0

    # ---- sharing ------------------------------------------------------------------------------------------------------------------

    def export(self) -> list[int]:
        """[a card, its memory's descriptors]: where another process finds the pool. Raises Refused for memory that can't be shared."""
        if self._kept is not None:
            return self._kept.export()
        return exports.exported(self.driver, self.address, self.layout.pool_bytes, self._name)

    def clear(self) -> None:
        """Zeros everywhere, as a pool begins."""
        self.driver.clear(self.address, self.layout.pool_bytes)

    def join(self, descriptors: list[int]) -> None:
        """[a card, words]: the daemon's ring, from now on; owned here. Called in any thread; never raises: without a ring the daemon reads the pool."""
        joined = words = None
        try:
            terms = card.read(descriptors[0]) if len(descriptors) == 2 else None
            if terms is None or terms.kind != "ring" or terms.uuid != self.driver.uuid or terms.size < terms.rows * self.plan.unit_bytes:
                raise Refused(f"no ring for {self.driver.uuid} in {len(descriptors)} descriptors. Try: the same kvguard version in engine and daemon")
            words = ring.Words(descriptors[1])
            descriptors.pop()  # it is the words' own now
            done = words.words[ring.AT_DONE : ring.AT_DONE + 1]
            joined = Joined(self.driver, terms, words, self._word(done), _page_start(done))
        except (KvguardError, OSError) as error:
            _log.warning("kvguard: no ring to pack steps into: %s", error)
            if words is not None:
                if (start := _page_start(words.words)) in self._pages:
                    self._unregister(start)
                words.close()
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
        with self._joining:  # the former one may be of the same ring, and packs until here
            former, self._joined = self._joined, joined
            if former is not None:
                former.packer.gap()  # what is written from now on is not said there
            if joined is not None:
                joined.begin()
        if former is not None:
            self._leave(former)

    def _leave(self, former: Joined) -> None:
        try:
            settled(self.driver, self._side)  # nothing may still write into what is unmapped now
            self._unregister(former.page)
            former.close()
        except KvguardError as error:
            strand(former)
            _log.warning("kvguard: the former ring can't be closed: %s", error)

    # ---- a step -------------------------------------------------------------------------------------------------------------------

    def wrote(self, blocks, starts=None, counts=None) -> None:
        """The slots that this step writes, all of them, after it was launched: int columns as of capture (without starts: whole blocks).

        Raises Refused for pieces outside the pool, and where the engine's stream is captured into a graph; nothing else.
        """
        if starts is None or not self.layout.addressable:
            slots = self.plan.slots(*slots_of_blocks(self.layout, np.unique(np.asarray(blocks, np.int64))))
        else:
            slots = self.plan.slots(*slots_of(self.layout, blocks, starts, counts))
        with self._joining:
            joined = self._joined
            if self.lost:
                return
            try:
                captured = self.driver.is_captured(self.current())
                if joined is not None and not captured:
                    self._pack(joined, slots)
            except KvguardError as error:
                self._give_up(joined, error)
                return
        if captured:
            raise Refused(CAPTURED)
        self._said = True

    def _pack(self, joined: Joined, slots: np.ndarray) -> None:
        if slots.size > SLOTS_MAX:
            joined.packer.gap()
            return
        driver, side = self.driver, self._side
        sent = self._columns.send(slots, side)
        if sent is None:
            joined.packer.gap()
            return
        found = joined.packer.record(slots)
        driver.wait(side, driver.record(self.current()))
        if found is not None:
            number, row = found
            self.launch(True, sent[1], slots.size, joined.address + row * self.plan.unit_bytes, side)
            driver.write_word(joined.done, number, side)
            self.packed += 1
        self._columns.used_until(sent[0], driver.record(side))

    def publish(self, word: memoryview, value: int) -> None:
        """See device/base.py: in the order of the side stream, so after this step's gather. Never raises: a word that can't be written commits nothing.

        While the engine's stream is captured into a graph none is written: the next one that is says this step's, too.
        """
        with self._joining:
            joined, said, self._said = self._joined, self._said, False
            if self.lost:
                return
            try:
                if joined is not None and not said:
                    joined.packer.gap()
                engine = self.current()
                if self.driver.is_captured(engine):
                    _log.warning("kvguard: step %d isn't published: %s", value, CAPTURED)
                    return
                self.driver.wait(self._side, self.driver.record(engine))
                self.driver.write_word(self._word(word), value, self._side)
            except KvguardError as error:
                self._give_up(joined, error)

    def _give_up(self, joined: Joined | None, error: KvguardError) -> None:
        """From here on nothing is committed: the daemon sees positions that don't rise, and says UNPROTECTED. The engine goes on as long as it can."""
        self.lost = str(error)
        if joined is not None:
            joined.packer.gap()
        _log.error("kvguard: this GPU's steps are no longer committed: %s", error)

    def _word(self, word: memoryview) -> int:
        """The device's address of a 64-bit word in host memory; its page is registered when it is first seen."""
        start = _page_start(word)
        if start not in self._pages:
            page = page_of(start)
            self._pages[start] = page, self.driver.registered(page), word
        return self._pages[start][1] + _address(word) - start

    def _unregister(self, start: int) -> None:
        """Before the page is unmapped: what is mapped there next is another one."""
        page, _, _ = self._pages.pop(start)
        self.driver.unregistered(page)

    def close(self) -> None:
        """Wait for what was launched on our streams and on the engine's current one, give back what is ours. Idempotent. What another process has mapped
        lives on there. Memory whose streams are not through in time, or are being captured into a graph, goes with this process."""
        if self._closed:
            return
        try:
            self.follow(self._side)
            settled(self.driver, self._side)
            self.settle()
            with self._joining:
                former, self._joined = self._joined, None
            for start in list(self._pages):
                self._unregister(start)
            if former is not None:
                former.close()
            self._columns.free()
            super().close()
            if self._allocation:
                self.driver.free(self._allocation)
            if self._kept is not None:
                self._kept.close()
        except KvguardError as error:
            self._closed = True
            strand(self)
            _log.warning("kvguard: the pool's memory goes with its process: %s", error)


def _address(word: memoryview) -> int:
    return np.frombuffer(word, np.uint8).ctypes.data


def _page_start(word: memoryview) -> int:
    return _address(word) & -PAGE_BYTES
