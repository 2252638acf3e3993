"""The scheduler's own commit table: ids, samplers and requests as soon as the scheduler accepts them, before any rank's row has them.

Knows: a scheduler's guard, vLLM's Request by attribute. Must not know: blocks, KV, workers.
Invariants: only accepted ids are said; a fault, a full table or an epoch that is over costs the head start, never a step; rows are released when vLLM is done
with their sequence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from kvguard.engine.guard import Guard
from kvguard.errors import KvguardError, TimedOut


class IdRows:
    """`tell` after whatever may have brought ids. `counts`: what went wrong, by what."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.counts: Counter[str] = Counter()
        self._known: dict[str, tuple[int, int]] = {}  # sequence -> row, ids said

    def tell(self, requests: Iterable[tuple[str, Any, bytes]]) -> None:
        """(sequence, request, packed parameters) of all that are live: what is new of each; those that are gone are released."""
        live = {name: (request, packed) for name, request, packed in requests}
        table = self.guard.table
        for name in [name for name in self._known if name not in live]:
            table.release(self._known.pop(name)[0])
        fresh = [name for name in live if name not in self._known]
        changed = [name for name, (_, said) in self._known.items() if len(live[name][0].all_token_ids) > said]
        if not fresh and not changed:
            return
        try:
            step = self.guard.step(0)
        except KvguardError:
            self._restore()
            return
        self._say(step, live, changed)
        for name in fresh:
            request, packed = live[name]
            ids = list(request.all_token_ids)
            try:
                self._known[name] = (step.commit(name, 0, tokens=ids, request=packed), len(ids))
            except (ValueError, KeyError):
                self.counts["sequences without a row"] += 1
        try:
            step.__exit__(None, None, None)
        except KvguardError:  # fenced meanwhile: what was staged is gone
            self._look_again()

    def _say(self, step: Any, live: dict, changed: list[str]) -> None:
        """One new id of each of many sequences at once, which is the usual case; else one by one."""
        one = [name for name in changed if len(live[name][0].all_token_ids) == self._known[name][1] + 1]
        try:
            if one:
                rows = np.fromiter((self._known[name][0] for name in one), np.intp, len(one))
                ids = np.fromiter((live[name][0].all_token_ids[-1] for name in one), np.int64, len(one))
                step.commit_batch(rows, np.zeros(len(one), np.int64), ids)
                self._known.update((name, (self._known[name][0], self._known[name][1] + 1)) for name in one)
            for name in changed:
                row, said = self._known[name]
                ids = live[name][0].all_token_ids
                if len(ids) > said:
                    step.commit(name, 0, tokens=list(ids[said:]))
                    self._known[name] = (row, len(ids))
        except (ValueError, KeyError):
            self.counts["ids refused"] += 1

    def _restore(self) -> None:
        """Take part in the new epoch where its plan has come."""
        try:
            restored = self.guard.restore(0.0)
        except TimedOut:
            return
        except KvguardError:
            self.counts["restores refused"] += 1
            return
        restored.done()
        self._look_again()

    def _look_again(self) -> None:
        """Believe only what the table holds: begin anew with whatever differs."""
        table = self.guard.table
        rows = table.sequences()
        self._known = {name: (rows[name], len(table.ids(rows[name]))) for name in self._known if name in rows}
