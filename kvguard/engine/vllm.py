"""kvguard beside vLLM: an out-of-tree KV connector, loaded by name, with no change to vLLM.

    --kv-transfer-config '{"kv_connector": "KvguardConnector", "kv_connector_module_path": "kvguard.engine.vllm", "kv_role": "kv_both",
                           "kv_connector_extra_config": {"instance": "NAME", "socket": "PATH"}}'

Knows: vLLM's KVConnectorBase_V1 and when it calls what. Must not know: replicas, plans, who resubmits a request.

Invariants
- After start-up nothing here raises into vLLM, or makes a step wait: a fault of kvguard costs protection, loudly and counted, never an answer.
- What can't be protected is refused at start, with the reason; an engine whose daemon is away starts and serves, unprotected, and says so once.
- Generations of blocks rise (`Rows.before`) before the forward pass that may overwrite them is launched, and a step is committed behind its last KV write.
- A moved request that can't be restored by every worker is computed by all; at least its last position always is.
- An engine that ends while requests run leaves them to be recovered: only one that is idle detaches.
- A worker is one rank; one that can't be followed any more ends the attachment of all, because what some of them have can't be resumed.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import vllm

from kvguard.engine import attach, attach_scheduler
from kvguard.engine.client import socket_path
from kvguard.engine.vllm_facts import LoadEnd, StepFacts
from kvguard.engine.vllm_ids import IdRows
from kvguard.engine.vllm_ledger import Ledger
from kvguard.engine.vllm_loads import Loads
from kvguard.engine.vllm_moves import Moves
from kvguard.engine.vllm_place import place_of
from kvguard.engine.vllm_pool import SlabContext, attention_of, proved_pool
from kvguard.engine.vllm_rows import Rows
from kvguard.engine.vllm_settings import VERSIONS_TESTED, Settings, faults_of, fingerprint_of_model, version_warning
from kvguard.errors import BadConfig
from kvguard.limits import ROWS_MAX

try:
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
        KVConnectorWorkerMetadata,
        SupportsHMA,
    )
    from vllm.distributed.parallel_state import get_pp_group, get_tp_group
except ImportError as error:
    raise ImportError(f"kvguard's connector is made for vLLM {' and '.join(VERSIONS_TESTED)}; {vllm.__version__} has another interface: {error}") from error

LOADS_WAIT_S = 0.005  # what a request that arrives meanwhile waits longer, at most
_log = logging.getLogger("kvguard.engine")


class KvguardMetadata(KVConnectorMetadata):
    """A step's facts, on their way from the scheduler to every worker."""

    def __init__(self, facts: StepFacts) -> None:
        self.facts = facts


class KvguardWorkerMetadata(KVConnectorWorkerMetadata):
    """How loads ended, on their way back; `broken`: why a worker can't go on, "" where all can."""

    def __init__(self, ends: list[LoadEnd], broken: str = "") -> None:
        self.ends, self.broken = ends, broken

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        assert isinstance(other, KvguardWorkerMetadata)
        return KvguardWorkerMetadata(self.ends + other.ends, self.broken or other.broken)


def log_like_vllm() -> None:
    """kvguard's words stand among vLLM's, unless whoever runs this process has given them another place."""
    ours, theirs = logging.getLogger("kvguard"), logging.getLogger("vllm")
    if not ours.handlers and not logging.getLogger().handlers:
        ours.handlers, ours.propagate = list(theirs.handlers), False
        ours.setLevel(theirs.level)


def harmless(otherwise: Callable[[], Any]) -> Callable:
    """A hook whose fault is kvguard's own: said once with its trace, and from then on this role of the connector does nothing but `otherwise()`."""

    def decorate(hook: Callable) -> Callable:
        @wraps(hook)
        def guarded(self, *args, **kwargs):
            if self.broken:
                return otherwise()
            try:
                return hook(self, *args, **kwargs)
            except Exception as error:
                self.give_up(f"{hook.__name__}: {type(error).__name__}: {error}")
                return otherwise()

        return guarded

    return decorate


class KvguardConnector(KVConnectorBase_V1, SupportsHMA):
    """Both roles: vLLM makes one in the scheduler's process and one in every worker's (on one CPU that is the same process)."""

    def __init__(self, vllm_config, role: KVConnectorRole, kv_cache_config) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_like_vllm()
        self.broken, self._said_broken = "", False
        self.settings = Settings.of(self._kv_transfer_config.kv_connector_extra_config or {})
        faults = faults_of(vllm_config, kv_cache_config, torch.device(vllm_config.device_config.device_type).type)
        if faults:
            raise BadConfig("kvguard can't protect this engine:\n  " + "\n  ".join(faults) + "\nTry: without the connector, it is not protected")
        if role == KVConnectorRole.SCHEDULER:
            self._begin_scheduler()
        else:
            self._begin_worker()

    def give_up(self, reason: str) -> None:
        """End the attachment: what can't be followed any more must not look protected."""
        self.broken = reason
        said = "kvguard: UNPROTECTED from now on: the connector's %s failed: %s"
        _log.error(said, self.role.name.lower(), reason, exc_info=sys.exc_info()[0] is not None)
        rows, self.rows = self.rows, None
        if rows is not None:
            rows.guard.detach()

    # ---- the scheduler ------------------------------------------------------------------------------------------------------------

    def _begin_scheduler(self) -> None:
        config = self._vllm_config
        if warning := version_warning(vllm.__version__):
            _log.warning(warning)
        if self._kv_transfer_config.kv_load_failure_policy != "recompute":
            _log.info("kvguard: kv_load_failure_policy is set to 'recompute': what can't be restored is computed")
            self._kv_transfer_config.kv_load_failure_policy = "recompute"  # read by the scheduler after this
        by_position = bool(getattr(config, "use_v2_model_runner", False))
        on_gpu = torch.device(config.device_config.device_type).type == "cuda"
        self.ledger, self.moves = Ledger(by_position, on_gpu), Moves(self.settings.share_restored, by_position)
        self.rows: IdRows | None = None
        if self.settings.scheduler:
            blocks, tokens = self._kv_cache_config.num_blocks, config.cache_config.block_size
            guard = attach_scheduler(
                self.settings.instance, blocks, tokens, endpoint=self.settings.endpoint, socket=self.settings.socket or None, rows=self._rows_wanted(),
                positions_max=config.model_config.max_model_len,
            )  # fmt: skip
            self.rows = IdRows(guard)

    def _rows_wanted(self) -> int:
        """Running sequences, those preempted, and a margin: a row is free again a step after its sequence's end."""
        return min(self.settings.rows or max(64, 4 * self._vllm_config.scheduler_config.max_num_seqs), ROWS_MAX)

    def on_new_request(self, request) -> None:
        """A request that can't be understood is served unprotected; the others go on."""
        if self.broken:
            return
        try:
            self.ledger.arrived(request)
            self.moves.arrived(request)
        except Exception:
            self.ledger.counts["unprotected requests"] += 1
            _log.exception("kvguard: request %s is not understood, and served as if kvguard weren't there", request.request_id)

    @harmless(lambda: (0, False))
    def get_num_new_matched_tokens(self, request, num_computed_tokens: int) -> tuple[int | None, bool]:
        return self.moves.matched(request, num_computed_tokens)

    @harmless(lambda: None)
    def update_state_after_alloc(self, request, blocks, num_external_tokens: int) -> None:
        self.moves.allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output) -> KVConnectorMetadata:
        facts = self._facts(scheduler_output) or StepFacts(ended=self.broken)
        facts.loads = self.moves.taken()
        return KvguardMetadata(facts)

    @harmless(lambda: None)
    def _facts(self, scheduler_output) -> StepFacts:
        facts = self.ledger.step(scheduler_output)
        if self.rows is not None:
            self.rows.tell(self.ledger.requests())
        return facts

    @harmless(lambda: None)
    def update_connector_output(self, connector_output) -> None:
        """Behind the scheduler's own update: the step's ids are known, and said before the next step begins."""
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, KvguardWorkerMetadata):
            for end in meta.ends:
                self.moves.ended(end)
            if meta.broken:
                self.give_up(f"a worker: {meta.broken}")
        for request_id in connector_output.finished_recving or ():
            self.moves.ended_everywhere(request_id)
        if self.rows is not None:
            self.rows.tell(self.ledger.requests())

    def request_finished(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        return False, self._finished(request)

    def request_finished_all_groups(self, request, block_ids) -> tuple[bool, dict[str, Any] | None]:
        return False, self._finished(request)

    @harmless(lambda: None)
    def _finished(self, request) -> dict[str, Any] | None:
        return self.moves.finished(request)

    # ---- the worker ---------------------------------------------------------------------------------------------------------------

    def _begin_worker(self) -> None:
        sizes = {tensor.size for tensor in self._kv_cache_config.kv_cache_tensors}
        if len(sizes) != 1:
            raise BadConfig(f"vLLM's KV cache comes in {len(sizes)} slabs of different sizes. Try: a model with one kind of attention")
        self._context = SlabContext(sizes.pop())
        self.rows: Rows | None = None
        self.loads: Loads | None = None
        self._ends: list[LoadEnd] = []

    def get_mem_pool_context(self):
        return self._context

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The pool exists: prove its layout, and attach. Raises BadConfig or Refused: better no start than silence."""
        slab = self._context.slab
        if slab is None:
            raise BadConfig("vLLM did not make its KV cache where the connector could place it. Try: a vLLM within the tested range")
        names = self._kv_cache_config.kv_cache_groups[0].layer_names
        model = fingerprint_of_model(self._vllm_config.model_config, self.settings.model)
        place = place_of(self._vllm_config, names, get_pp_group().rank_in_group, get_tp_group().rank_in_group)
        pool = proved_pool([kv_caches[name] for name in names], slab, attention_of(self._vllm_config, names), model, place.shard)
        guard = attach(
            self.settings.instance, place.rank, pool, endpoint=self.settings.endpoint, socket=self.settings.socket or None, rows=self._rows_wanted(),
            positions_max=self._vllm_config.model_config.max_model_len,
        )  # fmt: skip
        self.rows = Rows(guard)
        self.loads = Loads(guard.fetch, self.settings.fetch_timeout_s)
        layout = pool.layout
        _log.info(
            "kvguard: rank %s of %r attached at %s: %d blocks of %d tokens, %d bytes a token, %s, fingerprint %016x",
            place.rank, self.settings.instance, socket_path(self.settings.socket or None), layout.blocks, layout.block_tokens, layout.token_bytes,
            "tokens addressable" if layout.addressable else "whole blocks", layout.fingerprint,
        )  # fmt: skip

    @harmless(lambda: None)
    def handle_preemptions(self, kv_connector_metadata) -> None:
        """Before anything of the step touches a block."""
        if kv_connector_metadata.facts.ended:
            self.give_up(f"the scheduler's side: {kv_connector_metadata.facts.ended}")
        else:
            self.rows.before(kv_connector_metadata.facts)

    def start_load_kv(self, forward_context, **kwargs) -> None:
        """Loads need the daemon, not the attachment's rows: they end whatever became of those."""
        for load in self._get_connector_metadata().facts.loads:
            self.loads.begin(load)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end before their request is scheduled: nothing to wait for."""

    def save_kv_layer(self, layer_name: str, kv_layer, attn_metadata, **kwargs) -> None:
        """The daemon reads the pool itself; but a layer is progress within a long step."""
        if self.rows is not None:
            self.rows.guard.pulse()

    @harmless(lambda: None)
    def wait_for_save(self) -> None:
        """Behind the forward pass (and the drafter's). vLLM calls this in a `finally`, so a pass that raised comes by, too."""
        self.rows.after(failed=sys.exc_info()[0] is not None)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Where the engine has nothing but loads to look after, it waits a little for them: vLLM steps on without a pause, and its processes turn idly for each
        other, on the very cores on which daemons find what is loaded. A step without tokens behind others (pipeline parallelism has them) holds up the next."""
        ends = self.loads.ended(LOADS_WAIT_S if self._get_connector_metadata().facts.idle else 0.0)
        self._ends += ends
        results = KVConnectorTransferResults()
        results.finished_recving = {end.request_id for end in ends}
        results.failed_recving = {end.request_id for end in ends if end.error}
        return results

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        ends, self._ends = self._ends, []
        broken, self._said_broken = "" if self._said_broken else self.broken, bool(self.broken)
        return KvguardWorkerMetadata(ends, broken) if ends or broken else None

    # ---- both ---------------------------------------------------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        """Replication is best effort beside the engine: a preempted request need not be computed anew for its sake."""
        return False

    @classmethod
    def supports_sleep_mode(cls, kv_transfer_config) -> bool:
        """Asked from 0.33 on. Sleep gives the KV cache's memory away and maps another: the daemon would go on reading the old one."""
        return False

    def shutdown(self) -> None:
        """Who has sequences still doesn't detach: vLLM ends all workers in order when one of them was killed, and what they had goes on elsewhere. The end of
        this process is then seen for what it is."""
        if self.role == KVConnectorRole.WORKER and self.loads is not None:
            self.loads.close()
        rows, self.rows = self.rows, None
        self._say_counts(rows)
        if rows is None:
            return
        if live := len(rows.guard.table.sequences()):
            _log.warning("kvguard: %s of %r ends with %d sequences under way, which may go on elsewhere", rows.guard.role, self.settings.instance, live)
        else:
            rows.guard.detach()

    def _say_counts(self, rows: Rows | IdRows | None) -> None:
        counts = {} if rows is None else dict(rows.counts)
        if self.role == KVConnectorRole.SCHEDULER:
            counts |= self.ledger.counts | {f"moved requests {what}": count for what, count in self.moves.counts.items() if count}
        if counts:
            said = ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
            _log.info("kvguard: %s of %r counted %s", self.role.name.lower(), self.settings.instance, said)
