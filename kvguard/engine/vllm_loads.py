"""Moved sequences' KV on its way into vLLM's blocks, beside the steps.

Knows: moved tokens, a guard's fetch, threads. Must not know: vLLM, torch, who decided to move.

Invariants
- Every load that was begun ends exactly once, with or without an error, whatever happens to the daemon: vLLM has no timeout of its own for it, and gives the
  blocks back only then.
- The deadline counts from when the load was asked for, waiting for its turn included; a fetch that comes after it isn't begun.
- A load that ends without an error has all positions below `position`, each with its checksum checked by the fetch; one that brought fewer has failed.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import Any

from kvguard.engine.vllm_facts import Load, LoadEnd
from kvguard.errors import KvguardError
from kvguard.format import moves

AT_ONCE_MAX = 4  # fetches copy memory: more would only slow each other, and the forward pass, down
_log = logging.getLogger("kvguard.engine")


class Loads:
    """`begin` and `ended` from the engine's thread. `fetch(moved, blocks, timeout_s, ids)`: how KV gets here; its answer has position, bytes and ms."""

    def __init__(self, fetch: Any, timeout_s: float) -> None:
        self._fetch, self._timeout_s = fetch, timeout_s
        self._waiting: deque[tuple[Load, float]] = deque()
        self._ended: deque[LoadEnd] = deque()
        self._changed = threading.Condition()
        self._threads: list[threading.Thread] = []
        self._under_way = 0
        self._idle = 0
        self._closing = False

    def begin(self, load: Load) -> None:
        """Ends in `ended`, within the timeout."""
        with self._changed:
            self._waiting.append((load, time.monotonic() + self._timeout_s))
            self._under_way += 1
            if len(self._waiting) > self._idle and len(self._threads) < AT_ONCE_MAX:  # who was woken a moment ago is still idle, and its load still waits
                self._start()
            self._changed.notify()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"kvguard-load-{len(self._threads)}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no room for a thread: those that are there take it, or nobody does
            if not self._threads:
                self._say(LoadEnd(self._waiting.pop()[0].request_id, 0, 0, 0.0, str(error)))
        else:
            self._threads.append(thread)

    def ended(self, wait_s: float = 0.0) -> list[LoadEnd]:
        """What has ended since the last call. With nothing to say, but a load under way, it waits so long for one."""
        with self._changed:
            if self._under_way:
                self._changed.wait_for(lambda: self._ended or self._closing, wait_s)
            found = list(self._ended)
            self._ended.clear()
        return found

    def close(self, timeout_s: float = 1.0) -> None:
        """No further load begins; those under way end by their own deadline."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._idle += 1
                self._changed.wait_for(lambda: self._waiting or self._closing)
                self._idle -= 1
                if self._closing:
                    return
                load, deadline = self._waiting.popleft()
            self._say(self._load(load, deadline))

    def _say(self, end: LoadEnd) -> None:
        if end.error:
            _log.warning("kvguard: %s is computed instead of restored: %s", end.request_id, end.error)
        else:
            _log.info("kvguard: %s goes on from position %d: %d bytes in %.1f ms", end.request_id, end.position, end.moved_bytes, end.load_ms)
        with self._changed:
            self._ended.append(end)
            self._under_way -= 1
            self._changed.notify_all()

    def _load(self, load: Load, deadline: float) -> LoadEnd:
        began = time.monotonic()
        try:
            left = deadline - began
            if left <= 0:
                return LoadEnd(load.request_id, 0, 0, 0.0, f"its turn came after {self._timeout_s} s")
            found = self._fetch(moves.decode(load.token), load.blocks, left, (load.position, load.ids_sum))
            if found.position < load.position:
                return LoadEnd(load.request_id, 0, found.bytes, found.ms, f"{found.position} of {load.position} positions came")
        except KvguardError as error:
            return LoadEnd(load.request_id, 0, 0, 1e3 * (time.monotonic() - began), str(error))
        except Exception as error:  # whatever it is: a load without an end would hold its request, and its blocks, for ever
            _log.exception("kvguard: the load of %s failed", load.request_id)
            return LoadEnd(load.request_id, 0, 0, 1e3 * (time.monotonic() - began), f"{type(error).__name__}: {error}")
        return LoadEnd(load.request_id, load.position, found.bytes, found.ms)
