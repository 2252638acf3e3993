"""Everything at once under vLLM's real scheduler: loads that end well, late, badly or not before their request is gone, among drafts, late ids, preemption,
aborts and resets of the prefix cache. Every committed byte and every answer is checked against an oracle, and nothing may be left behind.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time

import pytest
from fake_runner import VOCABULARY, continuation, digests_of
from test_vllm_scheduler import TOKENS, bench, prompts, token_of  # noqa: F401 (a fixture)
from vllm.v1.request import RequestStatus

from kvguard.engine.fetch import Fetched
from kvguard.errors import Refused, TimedOut
from kvguard.types import MovedToken

pytestmark = pytest.mark.vllm
FATES = ("", "", "late", "late", "torn", "refused", "short", "late and torn")


class Weather:
    """guard.fetch of one stage with an oracle's KV. `fate` decides how a sequence's load ends; a late one does when its `gate` is opened."""

    def __init__(self, known: dict[str, list[int]], fate: dict[str, str], gates: dict[str, threading.Event], stage: int) -> None:
        self.known, self.fate, self.gates, self.stage = known, fate, gates, stage
        self.pool = None

    def __call__(self, moved: MovedToken, blocks, timeout_s: float, ids: tuple[int, int]) -> Fetched:
        fate = self.fate[moved.sequence]
        if "late" in fate:
            assert self.gates[moved.sequence].wait(60)
        if fate == "refused" or len(blocks) * TOKENS < moved.position:
            raise Refused("not here")
        for position, digest in enumerate(digests_of(self.known[moved.sequence][: moved.position], self.stage)):
            data = b"\xaa" * len(digest) if "torn" in fate else digest
            self.pool.scatter([blocks[position // TOKENS]], [position % TOKENS], [1], memoryview(data))
        if "torn" in fate:
            raise TimedOut("half of it came")
        return Fetched(moved.position - (fate == "short"), 1, 1.0)


CASES = [(0, 0, 1, 1), (1, 3, 1, 1), (2, 0, 2, 1), (3, 3, 2, 2)]
if os.environ.get("KVGUARD_STORMS"):
    CASES = [(seed, drafts, depth, 1 + seed % 2) for seed in range(100, 100 + int(os.environ["KVGUARD_STORMS"])) for drafts in (0, 3) for depth in (1, 2)]


@pytest.mark.parametrize(("seed", "drafts", "depth", "stages"), CASES)
def test_loads_among_all_that_may_happen_to_them(bench, seed, drafts, depth, stages):  # noqa: F811
    draw = random.Random(f"storm {seed} {drafts} {depth}")
    known, fate, gates = {}, {}, {}
    world = bench(seed, 17, drafts, depth, *(Weather(known, fate, gates, stage) for stage in range(stages)))
    free = world.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    wanted, aborted = {}, set()
    for number in range(24):
        prompt, tokens, name = prompts(draw), draw.randrange(1, 120), f"s{number}"
        request, token = f"cmpl-{name}-0-{number:08x}", None
        if draw.random() < 0.5:
            ahead = draw.choice((-40, -1, -1, -1, 0, 2))  # a token may know less than the prompt, or more
            known[name], fate[name], gates[name] = prompt + continuation(prompt, 5), draw.choice(FATES), threading.Event()
            token = token_of(name, max(1, len(prompt) + ahead))
        world.add(request, prompt, tokens, token)
        wanted[request] = continuation(prompt, tokens)
        for _ in range(draw.randrange(0, 20)):
            world.turn()
            if draw.random() < 0.1 and gates:
                draw.choice(sorted(gates.items()))[1].set()
        if draw.random() < 0.3:
            aborted.add(draw.choice(sorted(wanted)))
            world.scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
        if draw.random() < 0.1:
            with contextlib.suppress(RuntimeError):  # vLLM says that blocks are held for loads, or by steps under way, and has preempted all the same
                world.scheduler.reset_prefix_cache(reset_running_requests=True)
    for gate in gates.values():
        gate.set()
    world.drain()
    deadline = time.monotonic() + 60
    while world.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < free:
        assert time.monotonic() < deadline, "blocks were kept"
        world.turn()
    for request, tokens in wanted.items():
        got = world.outputs[request]
        assert got == (tokens[: len(got)] if request in aborted else tokens), request
    for observer, worker in zip(world.runner.observers, world.workers, strict=True):
        observer.check()
        assert not observer.committed, "rows were left behind"
        assert not worker.rows.counts and not worker.loads.ended(), worker.rows.counts
    connector = world.scheduler.connector
    assert world.preemptions and all(connector.moves.counts[outcome] for outcome in ("restored", "computed"))
    assert not connector.broken and not len(connector.ledger) and not connector.moves._moved and not connector.rows.guard.table.sequences()
