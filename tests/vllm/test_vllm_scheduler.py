"""vLLM's real scheduler and KV cache manager over a fake runner: tokens that come late, rejected drafts, preemption, shared prefixes, aborts, loads that fail.

Every committed byte is checked against an oracle, at any moment at which a daemon might read it.
"""

from __future__ import annotations

import functools
import random
import threading
import time
from collections import deque

import pytest
import torch
from fake_runner import VOCABULARY, Runner, Worker, continuation, digests_of, make_pool
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, KVCacheTensor
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager
from world import model_directory

from kvguard.engine.fetch import Fetched
from kvguard.engine.vllm import LOADS_WAIT_S
from kvguard.errors import Refused, TimedOut
from kvguard.format.moves import encode
from kvguard.types import Epoch, MovedToken

pytestmark = pytest.mark.vllm
TOKENS = 32


@functools.cache
def engine_config():
    transfer = {
        "kv_connector": "KvguardConnector", "kv_connector_module_path": "kvguard.engine.vllm", "kv_role": "kv_both",
        "kv_connector_extra_config": {"instance": "fake", "socket": "/nonexistent/kvguard.sock", "rows": 64},
    }  # fmt: skip
    arguments = EngineArgs(
        model=model_directory(), max_model_len=512, max_num_seqs=6, max_num_batched_tokens=96, block_size=TOKENS, enforce_eager=True, dtype="bfloat16",
        kv_transfer_config=transfer, speculative_config={"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    )  # fmt: skip
    return arguments.create_engine_config()


class Bench:
    """A scheduler with its connector, a fake runner with its own, and the loop that an engine core runs. `fetch`: one for each stage."""

    def __init__(self, seed: int, blocks: int, drafts: int, depth: int, *fetch) -> None:
        config = engine_config()
        config.cache_config.num_gpu_blocks = blocks
        config.scheduler_config.async_scheduling = depth > 1
        self.speculative, config.speculative_config = config.speculative_config, config.speculative_config if drafts else None
        try:
            spec = FullAttentionSpec(block_size=TOKENS, num_kv_heads=1, head_size=4, dtype=torch.float32)
            page = spec.page_size_bytes
            tensors = [KVCacheTensor(size=blocks * page, layers=["fake"], layer_stride=blocks * page, block_stride=page)]
            cache = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=tensors, kv_cache_groups=[KVCacheGroupSpec(["fake"], spec)])
            kind = AsyncScheduler if depth > 1 else Scheduler
            self.scheduler = kind(config, cache, StructuredOutputManager(config), block_size=TOKENS)
            self.pools = [make_pool(blocks, TOKENS) for _ in fetch or (None,)]
            self.workers = [Worker(config, cache, pool, one, 64, stage) for stage, (pool, one) in enumerate(zip(self.pools, fetch or (None,), strict=True))]
        finally:
            config.speculative_config = self.speculative
        for one, pool in zip(fetch, self.pools, strict=False):
            if one is not None:
                one.pool = pool
        self.worker, self.pool = self.workers[0], self.pools[0]
        self.guards, self.scheduler_guard = [worker.rows.guard for worker in self.workers], self.scheduler.connector.rows.guard
        self.runner = Runner(self.workers, self.pools, seed, drafts)
        self.depth, self.drafts = depth, drafts
        self.flying: deque = deque()
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, dict | None] = {}
        self.preemptions = 0
        hash_fn = get_hash_fn_by_name(config.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_fn)
        self.hasher = get_request_block_hasher(TOKENS, hash_fn)

    def add(self, name: str, prompt: list[int], tokens: int, token: dict | None = None, share: bool = False, **sampling) -> Request:
        extra = {"extra_args": {"kv_transfer_params": {"kvguard": token, "kvguard_share": share}}} if token else {}
        parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, **extra, **sampling)
        request = Request(request_id=name, prompt_token_ids=list(prompt), sampling_params=parameters, pooling_params=None, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        self.outputs[name] = []
        return request

    def turn(self) -> bool:
        """One turn of an engine core's loop; False where nothing was to be done."""
        busy = False
        while len(self.flying) < self.depth and self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.preemptions += len(output.preempted_req_ids or ())
            result = self.runner.execute(output)
            drafts = self.runner.take_drafts() if self.drafts and self.depth == 1 else None
            self.flying.append((output, result, drafts))
            busy = True
            if not output.total_num_scheduled_tokens:
                break
        if self.flying:
            output, result, drafts = self.flying.popleft()
            for outputs in self.scheduler.update_from_output(output, result).values():
                for one in outputs.outputs:
                    self.outputs[one.request_id] += one.new_token_ids
                    if one.finish_reason is not None:
                        self.finished[one.request_id] = one.kv_transfer_params
            if drafts is not None:
                self.scheduler.update_draft_token_ids(drafts)
            busy = True
        return busy

    def drain(self) -> None:
        deadline = time.monotonic() + 120
        while self.scheduler.has_unfinished_requests() or self.flying:
            assert self.turn() and time.monotonic() < deadline
        self.turn()

    def close(self) -> None:
        self.scheduler.shutdown()
        for worker, guard in zip(self.workers, self.guards, strict=True):
            worker.shutdown()
            guard.detach()  # also where sequences are left, for whose sake the connector doesn't
        self.scheduler_guard.detach()


@pytest.fixture
def bench():
    made = []

    def make(*arguments, **named) -> Bench:
        made.append(Bench(*arguments, **named))
        return made[-1]

    yield make
    for one in made:
        one.close()


def prompts(draw: random.Random) -> list[int]:
    """Half of them begin alike, so that blocks are shared."""
    shared = [n % VOCABULARY for n in range(3 * TOKENS)]
    head = shared[: draw.choice((TOKENS, 2 * TOKENS, 3 * TOKENS))] if draw.random() < 0.5 else []
    return head + [draw.randrange(VOCABULARY) for _ in range(draw.randrange(1, 60))]


CASES = [(seed, drafts, depth, 1) for seed in range(2) for drafts in (0, 3) for depth in (1, 2)] + [(2, 0, 1, 2), (3, 0, 2, 3), (4, 3, 2, 2)]


@pytest.mark.parametrize(("seed", "drafts", "depth", "stages"), CASES)
def test_every_committed_byte_is_right(bench, seed, drafts, depth, stages):
    """`depth` 2: with async scheduling. `drafts`: with speculation. `stages`: workers, each with KV of its own."""
    draw = random.Random(f"{seed} {drafts} {depth}")
    world = bench(seed, 15, drafts, depth, *[None] * stages)  # far fewer blocks than six long sequences need: preemption
    wanted, live = {}, {}
    for number in range(16):
        prompt, tokens = prompts(draw), draw.randrange(1, 150)
        name = f"cmpl-s{number}-0-{number:08x}"
        world.add(name, prompt, tokens)
        wanted[name], live[name] = continuation(prompt, tokens), True
        for _ in range(draw.randrange(0, 25)):
            world.turn()
        if draw.random() < 0.15:
            victim = draw.choice(sorted(live))
            world.scheduler.finish_requests(victim, RequestStatus.FINISHED_ABORTED)
            live[victim] = False
    world.drain()
    for name, tokens in wanted.items():
        got = world.outputs[name]
        assert got == (tokens if live[name] else tokens[: len(got)]), name
    for observer, worker in zip(world.runner.observers, world.workers, strict=True):
        observer.check()
        assert not observer.committed, "rows were left behind"
        assert observer.checked > 500 and world.preemptions > 0
        assert not worker.rows.counts, worker.rows.counts
    assert (world.runner.accepted > 20 and world.runner.rejected > 20) or not drafts


def test_what_is_running_is_committed_up_to_the_last_input(bench):
    world = bench(1, 64, 0, 1)
    request = world.add("cmpl-one-0-00000001", [1, 2, 3, 4, 5], 40)
    for _ in range(20):
        world.turn()
    [(row, committed)] = world.runner.observer.committed.items()
    assert world.runner.observer.names[row] == "one"
    assert committed == request.num_tokens - 1 and world.runner.observer.ids[row][:5] == [1, 2, 3, 4, 5]


def test_shared_blocks_live_as_long_as_their_last_sequence(bench):
    world = bench(1, 64, 0, 1)
    prompt = [n % VOCABULARY for n in range(2 * TOKENS + 3)]
    world.add("cmpl-first-0-00000001", prompt, 100)
    world.turn(), world.turn()
    world.add("cmpl-second-0-00000002", [*prompt[: 2 * TOKENS], 9, 9], 60)
    world.turn(), world.turn()
    blocks = dict(zip(world.runner.observer.names.values(), world.runner.observer._blocks.values(), strict=True))
    assert blocks["first"][:2] == blocks["second"][:2]
    generations = world.runner.observer.table.views.block_generations
    before = generations[blocks["first"][:2]].tolist()
    world.scheduler.finish_requests("cmpl-first-0-00000001", RequestStatus.FINISHED_ABORTED)
    world.turn()
    assert list(world.runner.observer.names.values()) == ["second"] and generations[blocks["second"][:2]].tolist() == before
    world.runner.observer.check(whole=True)
    world.drain()
    assert all(now > then for now, then in zip(generations[blocks["second"][:2]].tolist(), before, strict=True))


# ---- loads ----------------------------------------------------------------------------------------------------------------------


def token_of(name: str, position: int) -> dict:
    return encode(MovedToken("dead", name, Epoch(1, "test"), position, b"\1" * 32))


class Fetching:
    """guard.fetch with an oracle's KV; `fate`: what becomes of a sequence."""

    def __init__(self, known: dict[str, list[int]], fate: dict[str, str], stage: int = 0) -> None:
        self.known, self.fate, self.stage, self.asked = known, fate, stage, []
        self.released = threading.Event()
        self.pool = None

    def __call__(self, moved: MovedToken, blocks, timeout_s: float, ids: tuple[int, int]) -> Fetched:
        fate = self.fate.get(moved.sequence, "")
        self.asked.append(moved.sequence)
        if fate == "late":
            assert self.released.wait(20)
        if fate == "refused":
            raise Refused("the daemon is gone")
        digests = digests_of(self.known[moved.sequence][: moved.position], self.stage)
        for position, digest in enumerate(digests):
            data = b"\xaa" * len(digest) if fate == "torn" else digest
            self.pool.scatter([blocks[position // TOKENS]], [position % TOKENS], [1], memoryview(data))
        if fate == "torn":
            raise TimedOut("half of it came")
        if fate == "short":
            return Fetched(moved.position - 1, 1, 1.0)
        if fate == "bug":
            raise ZeroDivisionError("a bug of ours")
        return Fetched(moved.position, 32 * moved.position, 1.0)


@pytest.mark.parametrize("depth", [1, 2], ids=["sync", "async"])
def test_moved_sequences_go_on_whatever_becomes_of_their_load(bench, depth):
    fates = ["", "late", "refused", "torn", "short", "bug", "", ""]
    draw = random.Random(depth)
    known = {f"s{n}": [draw.randrange(VOCABULARY) for _ in range(draw.randrange(50, 200))] for n in range(len(fates))}
    fetching = Fetching(known, {f"s{n}": fate for n, fate in enumerate(fates)})
    world = bench(3, 80, 0, depth, fetching)
    for n, name in enumerate(known):
        position = len(known[name]) + 5 if n == 6 else len(known[name]) - 1  # one token knows more than the prompt has
        known[name] = known[name] + continuation(known[name], 10)
        prompt = known[name][:-10]
        world.add(f"cmpl-{name}-0-{n:08x}", prompt, 30, token_of(name, min(position, len(prompt) + 5)))
    for _ in range(30):
        world.turn()
    fetching.released.set()
    world.drain()
    for n, name in enumerate(known):
        request = f"cmpl-{name}-0-{n:08x}"
        assert world.outputs[request] == continuation(known[name][:-10], 30), (name, fates[n])
        outcome = world.finished[request]["kvguard"]
        if fates[n] in ("", "late"):
            assert outcome["restored"] == len(known[name]) - 11, (name, outcome)
        else:
            assert outcome["restored"] == 0 and outcome["why"], (name, outcome)
    assert sorted(fetching.asked) == sorted(known)


def test_a_moved_sequence_is_restored_on_every_stage_or_computed_on_all(bench):
    """The second of two workers is late with one load, refuses another and has a bug in a third; the first one has everything at once."""
    fates = ["", "late", "refused", "torn", "bug"]
    draw = random.Random(7)
    known = {f"s{n}": [draw.randrange(VOCABULARY) for _ in range(draw.randrange(50, 200))] for n in range(len(fates))}
    first, second = Fetching(known, {}), Fetching(known, {f"s{n}": fate for n, fate in enumerate(fates)}, 1)
    world = bench(5, 80, 0, 1, first, second)
    for n, name in enumerate(known):
        known[name] = known[name] + continuation(known[name], 10)
        world.add(f"cmpl-{name}-0-{n:08x}", known[name][:-10], 30, token_of(name, len(known[name]) - 11))
    for _ in range(30):
        world.turn()
    assert not world.outputs["cmpl-s1-0-00000001"], "one of its two parts is still missing"
    second.released.set()
    world.drain()
    for n, name in enumerate(known):
        request, outcome = f"cmpl-{name}-0-{n:08x}", world.finished[f"cmpl-{name}-0-{n:08x}"]["kvguard"]
        assert world.outputs[request] == continuation(known[name][:-10], 30), (name, fates[n])
        assert outcome["restored"] == (len(known[name]) - 11 if fates[n] in ("", "late") else 0), (name, outcome)
        assert outcome.get("bytes", 0) == 2 * 32 * outcome["restored"], "of both"
    assert sorted(first.asked) == sorted(second.asked) == sorted(known)
    assert world.scheduler.connector.moves.counts == {"restored": 2, "computed": 3, "refused": 0}


def test_a_request_aborted_while_it_loads_gives_its_blocks_back(bench):
    fetching = Fetching({"s": list(range(30)) * 3}, {"s": "late"})
    world = bench(3, 80, 0, 1, fetching)
    free = world.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
    world.add("cmpl-s-0-00000001", list(range(30)) * 3, 30, token_of("s", 80))
    world.turn(), world.turn()
    world.scheduler.finish_requests("cmpl-s-0-00000001", RequestStatus.FINISHED_ABORTED)
    world.turn()
    assert world.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < free  # the load still writes them
    fetching.released.set()
    world.drain()
    deadline = time.monotonic() + 20
    while world.scheduler.kv_cache_manager.block_pool.get_num_free_blocks() < free:
        assert time.monotonic() < deadline
        world.turn()


def test_only_an_engine_that_has_nothing_else_to_do_waits_for_loads(bench, monkeypatch):
    fetching = Fetching({"s": list(range(30)) * 3}, {"s": "late"})
    world = bench(3, 80, 0, 1, fetching)
    waits, ended = [], world.worker.loads.ended
    monkeypatch.setattr(world.worker.loads, "ended", lambda wait_s=0.0: waits.append(wait_s) or ended(wait_s))
    world.add("cmpl-s-0-00000001", list(range(30)) * 3, 3, token_of("s", 80))
    world.turn(), world.turn()
    assert waits == [LOADS_WAIT_S] * 2
    world.add("cmpl-other-0-00000002", [1, 2, 3], 3)
    world.turn(), world.turn(), world.turn()
    assert waits[2:] == [0.0] * 3
    world.turn()
    assert waits[5:] == [LOADS_WAIT_S], "the other one is over"
    fetching.released.set()
    world.drain()
    assert world.finished["cmpl-s-0-00000001"]["kvguard"]["restored"] == 80


@pytest.mark.parametrize("bad", [{"instance": "x"}, "text", 7, {**token_of("s", 5), "epoch": [-1, ""]}], ids=["fields", "text", "number", "epoch"])
def test_a_token_that_is_none_is_computed_and_said(bench, bad):
    world = bench(3, 80, 0, 1, Fetching({}, {}))
    world.add("cmpl-s-0-00000001", [1, 2, 3], 5, bad)
    world.drain()
    assert world.outputs["cmpl-s-0-00000001"] == continuation([1, 2, 3], 5)
    assert world.finished["cmpl-s-0-00000001"]["kvguard"]["why"].startswith("refused: a moved token")


def test_what_would_mean_something_else_is_not_restored(bench):
    fetching = Fetching({"s": list(range(30)) * 3}, {})
    world = bench(3, 80, 0, 1, fetching)
    world.add("cmpl-s-0-00000001", list(range(30)) * 3, 5, token_of("s", 80), presence_penalty=0.5)
    world.drain()
    assert "presence_penalty" in world.finished["cmpl-s-0-00000001"]["kvguard"]["why"] and not fetching.asked


def test_restored_blocks_are_nobody_elses(bench):
    ids = [n % VOCABULARY for n in range(100)]
    fetching = Fetching({"s": ids}, {})
    world = bench(3, 80, 0, 1, fetching)
    world.add("cmpl-before-0-00000001", ids, 3)
    world.drain()
    request = world.add("cmpl-s-0-00000002", ids, 3, token_of("s", 99))
    world.drain()
    assert fetching.asked == ["s"] and request.cache_salt  # not the local prefix, which was there


@pytest.mark.parametrize("share", [False, True])
def test_restored_blocks_serve_other_requests_only_where_that_was_asked_for(bench, share):
    ids = [n % VOCABULARY for n in range(100)]
    world = bench(3, 80, 0, 1, Fetching({"s": ids}, {}))
    world.add("cmpl-s-0-00000001", ids, 3, token_of("s", 99), share)
    world.drain()
    assert world.finished["cmpl-s-0-00000001"]["kvguard"]["restored"] == 99
    world.add("cmpl-after-0-00000002", ids, 3)
    output = world.scheduler.schedule()
    assert output.scheduled_new_reqs[0].num_computed_tokens == (3 * TOKENS if share else 0)
    world.scheduler.update_from_output(output, world.runner.execute(output))
    world.drain()


# ---- faults of our own ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["scheduler", "worker"])
def test_a_bug_of_ours_costs_protection_and_no_answer(bench, side, monkeypatch):
    world = bench(1, 64, 0, 1)
    world.add("cmpl-one-0-00000001", [1, 2, 3, 4, 5], 40)
    for _ in range(5):
        world.turn()
    broken = world.scheduler.connector.ledger if side == "scheduler" else world.worker.rows
    method = "step" if side == "scheduler" else "after"

    def bug(*_, **__):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(broken, method, bug)
    rows = world.worker.rows
    monkeypatch.setattr(world.runner, "execute", lambda output: execute_with_faults(world.runner, output))
    world.drain()
    assert world.outputs["cmpl-one-0-00000001"] == continuation([1, 2, 3, 4, 5], 40)
    assert world.worker.broken and world.worker.rows is None and rows.guard._detached


def test_a_bug_in_one_worker_ends_the_protection_of_all(bench, monkeypatch):
    """What the others have can't be resumed, and must not look as if it could."""
    world = bench(1, 64, 0, 1, None, None)
    world.add("cmpl-one-0-00000001", [1, 2, 3, 4, 5], 40)
    for _ in range(5):
        world.turn()
    guards = [worker.rows.guard for worker in world.workers]

    def bug(*_, **__):
        raise ZeroDivisionError("a bug of ours")

    monkeypatch.setattr(world.workers[1].rows, "after", bug)
    monkeypatch.setattr(world.runner, "execute", lambda output: execute_with_faults(world.runner, output))
    world.turn(), world.turn()
    assert all(guard._detached for guard in guards) and "a bug of ours" in world.worker.broken and world.scheduler.connector.broken
    world.drain()
    assert world.outputs["cmpl-one-0-00000001"] == continuation([1, 2, 3, 4, 5], 40)


def test_an_engine_that_ends_with_requests_under_way_leaves_them_to_be_recovered(bench):
    """When one worker is killed vLLM ends the others in order: were they to detach, there would be nothing to go on with."""
    world = bench(1, 64, 0, 1, None, None)
    world.add("cmpl-one-0-00000001", [1, 2, 3, 4, 5], 40)
    for _ in range(5):
        world.turn()
    guards = [*world.guards, world.scheduler_guard]
    for role in (*world.workers, world.scheduler.connector):
        role.shutdown()
    assert not any(guard._detached for guard in guards)
    assert all(list(guard.table.sequences()) == ["one"] for guard in guards)


def test_an_idle_engine_that_ends_detaches(bench):
    world = bench(1, 64, 0, 1, None, None)
    world.add("cmpl-one-0-00000001", [1, 2, 3, 4, 5], 10)
    world.drain()
    for role in (*world.workers, world.scheduler.connector):
        role.shutdown()
    assert all(guard._detached for guard in (*world.guards, world.scheduler_guard))


def execute_with_faults(runner: Runner, output):
    """Runner.execute for connectors that may give up."""
    meta = output.kv_connector_metadata
    for worker, observer in zip(runner.workers, runner.observers, strict=True):
        worker.handle_preemptions(meta)
        worker.bind_connector_metadata(meta)
        observer.check = lambda whole=False: None
    runner._take(output)
    sampled = runner._forward(output) if output.total_num_scheduled_tokens else {}
    names, rows = list(sampled), list(sampled.values())
    places = {name: n for n, name in enumerate(names)}
    outputs = [ModelRunnerOutput(names, places, rows, kv_connector_output=runner._after(worker, output)) for worker in runner.workers]
    return runner._aggregator.aggregate(outputs)


def test_a_request_that_is_not_understood_is_served_and_the_others_stay_protected(bench, monkeypatch):
    world = bench(1, 64, 0, 1)
    ledger = world.scheduler.connector.ledger
    arrived = ledger.arrived
    monkeypatch.setattr(ledger, "arrived", lambda request: arrived(request) if "odd" not in request.request_id else 1 / 0)
    world.add("cmpl-odd-0-00000001", [1, 2, 3], 10)
    world.add("cmpl-even-0-00000002", [4, 5, 6], 10)
    world.turn(), world.turn()
    assert list(world.runner.observer.names.values()) == ["even"]
    world.drain()
    assert world.outputs["cmpl-odd-0-00000001"] == continuation([1, 2, 3], 10) and ledger.counts["unprotected requests"] == 1
