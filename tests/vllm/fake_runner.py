"""A model runner without a model under vLLM's real scheduler: KV of a position is a digest of all ids up to it, so that every byte can be checked anywhere.

Knows: what vLLM's V1 runner does with a SchedulerOutput and in which order it calls a connector. Must not know: how the connector keeps its rows.

The "model": the digest of position p is blake2b(digest of p - 1, id of p); the next id is a function of it. Drafts are guessed, some right, some wrong; what they
write stays in the pool until it is overwritten, as on a device. With several workers each has a pool of its own, and other bytes of the same positions.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import random

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.v1.outputs import DraftTokenIds, KVConnectorOutput, ModelRunnerOutput


from kvguard.engine import Layout, Rank, allocate, attach
from kvguard.engine.look import TableReader
from kvguard.engine.vllm import KvguardConnector
from kvguard.engine.vllm_loads import Loads
from kvguard.engine.vllm_rows import Rows

VOCABULARY = 40
BYTES = 32


def digests_of(ids: list[int], stage: int = 0) -> list[bytes]:
    """KV of `ids` on a stage; the first one's decides what the model says."""
    found, last = [], b"" if not stage else bytes([stage])
    for token in ids:
        last = hashlib.blake2b(last + token.to_bytes(4, "little"), digest_size=BYTES).digest()
        found.append(last)
    return found


def next_id(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "little") % VOCABULARY


def continuation(ids: list[int], count: int) -> list[int]:
    """What the model says after `ids`."""
    ids = list(ids)
    digest = digests_of(ids)[-1]
    for _ in range(count):
        ids.append(next_id(digest))
        digest = hashlib.blake2b(digest + ids[-1].to_bytes(4, "little"), digest_size=BYTES).digest()
    return ids[len(ids) - count :]


def layout(blocks: int, tokens: int) -> Layout:
    return Layout.paged("fake", "float32", 1, blocks, tokens, 1, BYTES // 8)


class Worker(KvguardConnector):
    """The connector's worker role over the fake runner's pool."""

    def __init__(self, vllm_config, kv_cache_config, pool, fetch, rows: int, stage: int = 0) -> None:
        self._given, self.stage = (pool, fetch, rows), stage
        super().__init__(vllm_config, KVConnectorRole.WORKER, kv_cache_config)

    def _begin_worker(self) -> None:
        pool, fetch, rows = self._given
        guard = attach(self.settings.instance, Rank(0, self.stage, 0), pool, socket=self.settings.socket, rows=rows, positions_max=512)
        self.rows, self.loads, self._ends = Rows(guard), Loads(fetch, 5.0), []


class _Cached:
    """A request as the runner knows it. `ids`: prompt and what it has sampled, whether or not the scheduler has heard of it."""

    def __init__(self, ids: list[int], blocks: list[int]) -> None:
        self.ids, self.blocks, self.drafts = list(ids), list(blocks), []


class Observer:
    """Another process's view of the table: at any moment every committed byte is what the ids of its row say."""

    def __init__(self, worker: Worker, pool) -> None:
        guard, self.stage = worker.rows.guard, worker.stage
        self.table, self.pool, self.tokens = TableReader(os.dup(guard.table.fd)), pool, pool.layout.block_tokens
        self._blocks: dict[int, list[int]] = {}
        self.committed: dict[int, int] = {}
        self.ids: dict[int, list[int]] = {}
        self.names: dict[int, str] = {}
        self.checked = 0
        self._seen: dict[tuple, int] = {}

    def look(self) -> None:
        look = self.table.look()
        for row in look.released:
            for kept in (self._blocks, self.committed, self.names, self.ids):
                kept.pop(row, None)
        for cut in look.cut:
            self._blocks[cut.row] = self._blocks[cut.row][: cut.blocks]
            self.committed[cut.row] = min(self.committed.get(cut.row, 0), cut.kept)
        for opened in look.opened:
            self._blocks[opened.row], self.committed[opened.row], self.names[opened.row] = [], 0, opened.sequence
        for grown in look.grown:
            self._blocks[grown.row] = self._blocks[grown.row][: grown.first] + list(grown.blocks)
        for row, committed, count in zip(look.rows, look.committed, look.ids, strict=True):
            self.committed[row] = committed
            self.ids[row] = np.frombuffer(self.table.read_ids(row, 0, count), "<u4").tolist()

    def check(self, whole: bool = False) -> None:
        """What has been committed and not yet checked, or everything."""
        self.look()
        for row, committed in self.committed.items():
            ids, blocks = self.ids.get(row, []), self._blocks[row]
            assert committed <= len(ids) and committed <= len(blocks) * self.tokens, (self.names[row], committed, len(ids), len(blocks))
            key = (row, int(self.table.views.row_generations[row]))
            first = 0 if whole else max(0, self._seen.get(key, 0) - self.tokens)
            if committed <= first:
                continue
            wanted = digests_of(ids[:committed], self.stage)
            places = range(first, committed)
            out = bytearray(BYTES * len(places))
            here, slots = [blocks[position // self.tokens] for position in places], [position % self.tokens for position in places]
            self.pool.capture(here, slots, [1] * len(places), memoryview(out))
            wrong = [position for n, position in enumerate(places) if out[BYTES * n : BYTES * (n + 1)] != wanted[position]]
            assert not wrong, f"{self.names[row]}: positions {wrong} of {committed} in blocks {blocks} aren't what the row's ids say"
            self.checked += len(places)
            self._seen[key] = committed


class Runner:
    """`execute` a SchedulerOutput as an engine's workers do, connectors included, one behind the other as stages of a pipeline are."""

    def __init__(self, workers: list[Worker], pools: list, seed: int, drafts: int = 0) -> None:
        self.workers, self.pools, self.drafts = workers, pools, drafts
        self.observers = [Observer(worker, pool) for worker, pool in zip(workers, pools, strict=True)]
        self.worker, self.observer = workers[0], self.observers[0]
        self._random = random.Random(seed)
        self._requests: dict[str, _Cached] = {}
        self._last_drafts: dict[str, list[int]] = {}
        self.rejected = self.accepted = 0
        self._aggregator = KVOutputAggregator(len(workers))  # vLLM's own word on when something is true of all workers

    def execute(self, output) -> ModelRunnerOutput:
        metas = [pickle.loads(pickle.dumps(output.kv_connector_metadata)) for _ in self.workers]  # as it travels to their processes
        for worker, meta in zip(self.workers, metas, strict=True):
            worker.handle_preemptions(meta)
            assert not worker.broken, worker.broken
            worker.bind_connector_metadata(meta)
        self._take(output)
        sampled = self._forward(output) if output.total_num_scheduled_tokens else {}
        names = list(sampled)
        outputs = []
        for worker, observer in zip(self.workers, self.observers, strict=True):
            found = self._after(worker, output)
            assert not worker.broken, worker.broken
            observer.check()
            outputs.append(ModelRunnerOutput(names, {name: n for n, name in enumerate(names)}, [sampled[name] for name in names], kv_connector_output=found))
        return self._aggregator.aggregate(outputs, output_rank=len(outputs) - 1)

    @staticmethod
    def _after(worker: Worker, output) -> KVConnectorOutput:
        worker.start_load_kv(None)
        worker.wait_for_save()
        found = KVConnectorOutput()
        results = worker.get_transfer_results(output.finished_req_ids)
        found.finished_sending, found.finished_recving, found.failed_recving = results.finished_sending, results.finished_recving, results.failed_recving
        found.kv_connector_worker_meta = worker.build_connector_worker_meta()
        worker.clear_connector_metadata()
        return found

    def take_drafts(self) -> DraftTokenIds:
        """What the drafter proposes for the next step (not with async scheduling, where they stay with the runner)."""
        names = [name for name in self._last_drafts if name in self._requests]
        return DraftTokenIds(names, [self._last_drafts[name] for name in names])

    def _take(self, output) -> None:
        for name in output.finished_req_ids:
            self._requests.pop(name, None)
        for new in output.scheduled_new_reqs:
            self._requests[new.req_id] = _Cached(new.prompt_token_ids, new.block_ids[0])
        cached = output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            request = self._requests[name]
            if name in cached.resumed_req_ids:
                request.blocks, request.ids, request.drafts = list(blocks[0]), list(cached.all_token_ids[name]), []
            elif blocks:
                request.blocks += blocks[0]

    def _forward(self, output) -> dict[str, list[int]]:
        sampled = {}
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True))
        self._last_drafts = {}
        for name, count in output.num_scheduled_tokens.items():
            request = self._requests[name]
            start = min(computed[name], len(request.ids) - 1)  # async scheduling counts drafts as accepted; the runner knows better
            inputs = request.ids[start : start + count]
            drafts = self._drafts_of(name, request, output.scheduled_spec_decode_tokens.get(name, []))[: count - len(inputs)]
            self._write(request, start, inputs + drafts)
            if start + len(inputs) < len(request.ids):
                sampled[name] = []  # a chunk of a prompt
                continue
            right = continuation(request.ids, len(drafts) + 1)
            agreed = next((n for n, draft in enumerate(drafts) if draft != right[n]), len(drafts))
            self.accepted, self.rejected = self.accepted + agreed, self.rejected + len(drafts) - agreed
            sampled[name] = right[: agreed + 1]
            request.ids += sampled[name]
            if self.drafts:
                guess = continuation(request.ids, self.drafts)
                request.drafts = [token if self._random.random() < 0.6 else (token + 1) % VOCABULARY for token in guess]
                self._last_drafts[name] = request.drafts
            if self._random.random() < 0.1:
                self._random.choice(self.observers).check()
        return sampled

    def _drafts_of(self, name: str, request: _Cached, scheduled: list[int]) -> list[int]:
        """The scheduled drafts; placeholders stand for the runner's own, or for nothing that could be right."""
        own = request.drafts + [VOCABULARY] * len(scheduled)
        return [own[n] if token < 0 else token for n, token in enumerate(scheduled)]

    def _write(self, request: _Cached, start: int, inputs: list[int]) -> None:
        tokens = self.pools[0].layout.block_tokens
        places = [position for position in range(start, start + len(inputs)) if position // tokens < len(request.blocks)]
        here, slots = [request.blocks[position // tokens] for position in places], [position % tokens for position in places]
        for stage, pool in enumerate(self.pools):
            digests = digests_of(request.ids[:start] + inputs, stage)
            pool.scatter(here, slots, [1] * len(places), memoryview(b"".join(digests[position] for position in places)))


def make_pool(blocks: int, tokens: int):
    pool = allocate(layout(blocks, tokens))
    np.frombuffer(pool.memory, np.uint8)[:] = 0xEE  # nothing that was never written looks written
    return pool
