"""A script that is the rank and its own emitter: its protection, which a fault of ours may end, and the call never.

Knows: what joining gave, when protection is over, whose answers were handed out. Must not know: tensors, caches, what a call computes.
Invariants: no fault of kvguard reaches the call, which goes on, UNPROTECTED, and says so once per reason; a clean end leaves nothing to resume.
"""

from __future__ import annotations

import atexit
import logging
import os

from kvguard.engine import joining, telling
from kvguard.engine.telling import Telling
from kvguard.errors import KvguardError, Refused

log = logging.getLogger("kvguard.engine")


class Script:
    """Ends itself at the interpreter's exit. `unprotected`: why the present or last call isn't, or wasn't; else "". `earlier`: the ResumeTokens that a former
    life left."""

    def __init__(self, joined: joining.Joined) -> None:
        self.joined = joined
        self.guard, self.emitter, self.earlier = joined.guard, joined.emitter, joined.earlier
        self.unprotected = ""
        self._active, self._telling, self._results = False, None, 0
        self._names: list[str] = []
        self._said: set[str] = set()
        self._pid = os.getpid()
        if joined.reason:
            self._say(joined.reason)
        atexit.register(self.close)

    def close(self) -> None:
        """A clean end: nothing is left to resume. Idempotent; called at the interpreter's exit."""
        if os.getpid() != self._pid:
            return  # a fork's exit is not ours
        atexit.unregister(self.close)
        guard, self.guard, self._telling = self.guard, None, None
        if guard is not None:
            guard.detach()
        emitter, self.emitter = self.emitter, None
        if emitter is not None:
            emitter.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()

    # ---- a call's life ------------------------------------------------------------------------------------------------------------

    def _refuse_second(self) -> None:
        if self._active:
            raise Refused("a call is under way: rows of the pool belong to one at a time. Try: a batch, or another instance with a model of its own")

    def _give_up_earlier(self) -> None:
        """Before another call than the one that a former life left."""
        if self.earlier:
            log.warning("kvguard: what a former life left (%d rows) is given up: resume() would have gone on with it", len(self.earlier))
            left, self.earlier = [token.sequence for token in self.earlier], ()
            self._attempt(self._give_up, left)

    def _begin_rows(self, names: list[str]) -> bool:
        """Whether the call can be protected: then the caller tells of its rows."""
        self._active, self._names = True, names
        self.unprotected = "" if self.guard is not None else self.joined.reason
        if self.emitter is not None:
            self.emitter.scheduled(len(names))
        if self.guard is None:
            return False
        if not self.guard.connected:
            self._say(self.guard.refused or f"no daemon at {self.guard.session.path}. Try: kvguard node on this host; it is connected to when it comes")
        return True

    def _tell(self, made: list[telling.Row]) -> None:
        """Of these rows from here on; what the table has of other ones is over."""
        for name, at in self.guard.table.sequences().items():  # of a call whose protection was lost, and whose blocks are written now
            if name not in self._names:
                self.guard.table.release(at)
        self._telling = Telling(self.guard, self.emitter, made)
        self._telling.read()

    def _end(self) -> None:
        """Release the rows: the answer is the caller's now. Idempotent."""
        if not self._active:
            return
        told, self._telling = self._telling, None
        if told is not None:
            self._attempt(told.release)
        self._settle(self._names)
        self._active = False

    def _settle(self, names: list[str]) -> None:
        if self.emitter is not None:
            self.emitter.delivered(names)
            self.emitter.scheduled(0)

    def _give_up(self, names: list[str]) -> None:
        if self.guard is not None:
            live = self.guard.table.sequences()
            Telling(self.guard, self.emitter, [telling.Row(name, 0, b"") for name in names if name in live]).release()
        self._settle(names)

    def _progressed(self) -> None:
        self._results += 1
        if self.emitter is not None:
            self.emitter.progress(self._results)

    def _attempt(self, what, *arguments) -> None:
        """A fault of ours ends the call's protection, never the call."""
        try:
            what(*arguments)
        except Exception as error:  # whatever it is: the model's own work goes on
            told, self._telling = self._telling, None
            self._say(str(error) if isinstance(error, KvguardError) else f"{type(error).__name__}: {error}")
            try:
                if told is not None:
                    told.leave_failed()
            except Exception as second:  # the step's own memory is gone, say
                log.warning("kvguard: the step could not be left either: %s", second)

    def _say(self, reason: str) -> None:
        self.unprotected = reason
        if reason not in self._said:
            self._said.add(reason)
            log.warning("kvguard: UNPROTECTED: %s", reason)
