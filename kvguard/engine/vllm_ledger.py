"""The scheduler's side of the vLLM connector: what became true of which sequence since the workers were last told.

Knows: attributes of vLLM's Request and SchedulerOutput, facts' columns. Must not know: torch, tables, sockets, what a worker does with it.

Invariants
- A sequence's accepted length is min(computed + scheduled, ids known): drafts and placeholders of async scheduling are no ids, so what is rejected later was
  never said, and a position whose id is known has been the input of this step at the latest.
- What is over or preempted is said with the first step after vLLM has given its blocks back, which is the first that could hand them to others.
- Requests are kept by reference only while vLLM knows them; what can't be followed (streamed inputs, prompt embeddings) is counted, never guessed.
"""

from __future__ import annotations

import logging
import re
import secrets
from collections import Counter
from typing import Any

import msgspec
import xxhash

from kvguard.engine.vllm_facts import Begun, Grown, StepFacts
from kvguard.engine.vllm_policy import parameters_of, refusal_of_request
from kvguard.limits import NAME_BYTES_MAX, REQUEST_BYTES_MAX

_log = logging.getLogger("kvguard.engine")
_RANDOM = re.compile(r"-[0-9a-f]{8}$")  # what vLLM adds to a request id that was chosen outside


def sequence_name(request_id: str, live: Any = ()) -> str:
    """The name under which kvguard knows a request: the X-Request-Id that a router chose, with "-N" for the N-th prompt of a request with several.

    vLLM makes "cmpl-ID-0-xxxxxxxx" or "chatcmpl-ID-xxxxxxxx" of it. Where that name is in `live`, or longer than a name may be, the whole id, or a hash of it.
    """
    name = _RANDOM.sub("", request_id)
    if name.startswith("cmpl-"):
        name = name.removeprefix("cmpl-").removesuffix("-0")
    else:
        name = name.removeprefix("chatcmpl-")
    if not name or name in live:
        name = request_id
    if len(name.encode(errors="replace")) > NAME_BYTES_MAX:
        name = f"{name.encode(errors='replace')[:40].decode(errors='ignore')}-{xxhash.xxh3_64_hexdigest(request_id.encode(errors='replace'))}"
    return name


def packed_request(request: Any, samples_by_position: bool) -> bytes:
    """What whoever resumes must know of a request, as JSON: prompt length, sampling parameters that aren't unset, and why it can't be resumed, if so.

    `born`: random, so that a router that gives a name away again for the same parameters makes another sequence (format.lineage.birth_of).
    """
    said = {"prompt_tokens": request.num_prompt_tokens, "refused": refusal_of_request(request, samples_by_position), "born": secrets.token_hex(8)}
    sampling = parameters_of(request.sampling_params) if request.sampling_params is not None else {}
    sampling.pop("extra_args", None)  # the server's own, a moved request's whole token among them
    packed = msgspec.json.encode({**said, "sampling": sampling}, enc_hook=str)
    return packed if len(packed) <= REQUEST_BYTES_MAX else msgspec.json.encode({**said, "refused": said["refused"] or "its parameters are too long to keep"})


class _Entry:
    """One live request. `ids`, `blocks`: how many of each the workers have been told. `begun`: whether they know it at all."""

    __slots__ = ("no", "name", "request", "packed", "ids", "blocks", "begun")

    def __init__(self, no: int, name: str, request: Any, packed: bytes) -> None:
        self.no, self.name, self.request, self.packed = no, name, request, packed
        self.ids = self.blocks = 0
        self.begun = False


class Ledger:
    """`step` once per scheduled step, in order. `spans`: whether workers are told which positions a step may write. `counts`: what was left out, by reason."""

    def __init__(self, samples_by_position: bool = False, spans: bool = False) -> None:
        self._samples_by_position, self._spans = samples_by_position, spans
        self._entries: dict[str, _Entry] = {}
        self._names: set[str] = set()
        self._next = 0
        self.counts: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._entries)

    def arrived(self, request: Any) -> None:
        """vLLM knows this request from now on. One that can't be followed is counted."""
        if request.resumable or request.prompt_token_ids is None or request.sampling_params is None:
            self.counts["unprotected requests"] += 1
            if self.counts["unprotected requests"] == 1:
                why = "its ids are streamed, embeddings, or none are generated"
                _log.warning("kvguard: %s is served UNPROTECTED: %s; others like it are only counted", request.request_id, why)
            return
        name = sequence_name(request.request_id, self._names)
        packed = packed_request(request, self._samples_by_position)
        self._entries[request.request_id] = _Entry(self._next, name, request, packed)
        self._names.add(name)
        self._next += 1

    def requests(self) -> list[tuple[str, Any, bytes]]:
        """(sequence, request, packed parameters) of all that have been scheduled and are not over."""
        return [(entry.name, entry.request, entry.packed) for entry in self._entries.values() if entry.begun]

    def step(self, output: Any) -> StepFacts:
        """What a SchedulerOutput means for the workers, before vLLM advances its own counters."""
        facts = StepFacts(size=output.total_num_scheduled_tokens)
        for request_id in sorted(output.finished_req_ids):
            self._over(request_id, facts)
        for request_id in sorted(output.preempted_req_ids or ()):
            entry = self._entries.get(request_id)
            if entry is not None and entry.begun:
                facts.cut.append(entry.no)
                entry.blocks = 0
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            self._scheduled(new.req_id, new.block_ids, True, new.num_computed_tokens, scheduled[new.req_id], facts)
        cached = output.scheduled_cached_reqs
        for request_id, blocks, computed in zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True):
            self._scheduled(request_id, blocks, request_id in cached.resumed_req_ids, computed, scheduled[request_id], facts)
        facts.idle = not facts.size and not any(entry.begun and entry.blocks for entry in self._entries.values())
        return facts

    def _over(self, request_id: str, facts: StepFacts) -> None:
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        self._names.discard(entry.name)
        if entry.begun:
            facts.over.append(entry.no)

    def _scheduled(self, request_id: str, blocks: Any, whole: bool, computed: int, count: int, facts: StepFacts) -> None:
        """`blocks`: by KV group, the whole list (`whole`) or what was appended; None for nothing. `count` positions from `computed` on are this step's."""
        entry = self._entries.get(request_id)
        if entry is None:
            return
        appended = list(blocks[0]) if blocks else []
        if whole and entry.begun and entry.blocks:  # new blocks for one that was not said to be preempted: the old ones are void all the same
            facts.cut.append(entry.no)
            entry.blocks = 0
        ids = entry.request.all_token_ids
        known = len(ids)
        new = list(ids[entry.ids : known])
        length = min(computed + count, known)
        if self._spans:  # async scheduling counts drafts as computed that may be rejected yet: the step then begins earlier
            facts.spans.append((entry.no, min(computed, known - 1), computed + count))
        entry.ids, entry.blocks = known, entry.blocks + len(appended)
        if not entry.begun:
            entry.begun = True
            facts.begun.append(Begun(entry.no, entry.name, entry.packed, new, appended, length))
        elif len(new) == 1 and not whole:
            if appended:
                facts.blocks[len(facts.nos)] = appended
            facts.nos.append(entry.no)
            facts.lengths.append(length)
            facts.ids.append(new[0])
        else:
            facts.grown.append(Grown(entry.no, new, appended, length))
