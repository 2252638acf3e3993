"""The scheduler's side of restoring: which request comes with a moved sequence's token, how much of it is loaded, and how that ended.

Knows: vLLM's Request by attribute, moved tokens. Must not know: torch, tables, how KV travels.

Invariants
- KV is loaded for the ids that the request has, whatever its token says: who gives it knows them, too.
- A token is tried once: whatever fails, and whatever is preempted later, is computed.
- At least one position is left to compute; nothing is loaded where a local prefix exists (its blocks may be others', too).
- How a load ended is known when every worker's part of it has: restored where all parts are, else computed.
- A restored request shares its blocks with nobody unless that was asked for: it gets a cache salt of its own before its first lookup.
"""

from __future__ import annotations

import logging
import os
import struct
from typing import Any

from kvguard.engine.vllm_facts import Load, LoadEnd
from kvguard.engine.vllm_policy import refusal_of_request
from kvguard.errors import BadFrame
from kvguard.format import moves

PARAMETER, SHARE_PARAMETER = "kvguard", "kvguard_share"  # keys of kv_transfer_params
_NEW, _LOADING, _DONE = range(3)
_log = logging.getLogger("kvguard.engine")


class _Moved:
    """`outcome`: what the answer's kv_transfer_params say in the end."""

    __slots__ = ("token", "position", "state", "outcome", "ends")

    def __init__(self, token: dict, position: int) -> None:
        self.token, self.position, self.state = token, position, _NEW
        self.ends: list[LoadEnd] = []
        self.outcome: dict[str, Any] = {"restored": 0, "why": "it did not come to loading"}

    def computed(self, why: str) -> None:
        self.state, self.outcome = _DONE, {"restored": 0, "why": why}


class Moves:
    """`counts`: requests with a token, by what became of them."""

    def __init__(self, share: bool, samples_by_position: bool) -> None:
        self._share, self._samples_by_position = share, samples_by_position
        self._moved: dict[str, _Moved] = {}
        self._loads: list[Load] = []
        self.counts = {"restored": 0, "computed": 0, "refused": 0}

    def arrived(self, request: Any) -> None:
        """A request that brings a token is remembered, and gets its salt."""
        parameters = request.kv_transfer_params
        token = parameters.get(PARAMETER) if isinstance(parameters, dict) else None
        if token is None:
            return
        try:
            position = moves.decode(token).position
            refusal = refusal_of_request(request, self._samples_by_position)
        except BadFrame as error:
            position, refusal = 0, str(error)
        moved = self._moved[request.request_id] = _Moved(token, min(position, request.num_tokens - 1))
        if refusal:
            self._computed(moved, request, f"refused: {refusal}", "refused")
        elif not (self._share or parameters.get(SHARE_PARAMETER) is True):
            request.cache_salt = os.urandom(16).hex()
            request.block_hashes.clear()
            request.update_block_hashes()

    def matched(self, request: Any, local: int) -> tuple[int, bool]:
        """How many positions beyond `local` ones will be loaded, and that vLLM need not wait for them. Changes nothing but what is over."""
        moved = self._moved.get(request.request_id)
        if moved is None or moved.state != _NEW:
            return 0, False
        if local:
            self._computed(moved, request, f"{local} positions are here already")
        elif moved.position <= 0:
            self._computed(moved, request, "the token is of position 0")
        else:
            return moved.position, True
        return 0, False

    def _computed(self, moved: _Moved, request: Any, why: str, counted: str = "computed") -> None:
        """It does not come to a load, whose end a worker would say."""
        self.counts[counted] += 1
        moved.computed(why)
        _log.warning("kvguard: %s is computed instead of restored: %s", request.request_id, why)

    def allocated(self, request: Any, blocks: list[int], external: int) -> None:
        """The request's blocks are there: load into them."""
        moved = self._moved.get(request.request_id)
        if moved is not None and moved.state == _NEW and external > 0:
            moved.state = _LOADING
            ids = struct.pack(f"<{external}I", *request.all_token_ids[:external])
            self._loads.append(Load(request.request_id, moved.token, list(blocks), external, moves.ids_sum(ids)))

    def taken(self) -> list[Load]:
        """Loads to be begun with this step."""
        loads, self._loads = self._loads, []
        return loads

    def ended(self, end: LoadEnd) -> None:
        """One worker's part of a load."""
        moved = self._moved.get(end.request_id)
        if moved is not None:
            moved.ends.append(end)

    def ended_everywhere(self, request_id: str) -> None:
        """Every worker's part has ended."""
        moved = self._moved.get(request_id)
        if moved is None or moved.state != _LOADING or not moved.ends:
            return
        errors = [end.error for end in moved.ends if end.error]
        if errors:
            self.counts["computed"] += 1
            moved.computed(errors[0])
            return
        self.counts["restored"] += 1
        moved.state = _DONE
        position, size = min(end.position for end in moved.ends), sum(end.moved_bytes for end in moved.ends)
        moved.outcome = {"restored": position, "bytes": size, "restore_ms": round(max(end.load_ms for end in moved.ends), 3)}

    def finished(self, request: Any) -> dict[str, Any] | None:
        """What the router is told with the answer, in its kv_transfer_params."""
        moved = self._moved.pop(request.request_id, None)
        return None if moved is None else {PARAMETER: moved.outcome}
