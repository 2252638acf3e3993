"""The connector's parts that need no vLLM: policy, names, settings, rows under fences. Part of the default suite."""

from __future__ import annotations

from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from tests.engine.tiny_daemon import TinyDaemon

from kvguard import engine
from kvguard.engine.vllm_facts import Begun, Grown, StepFacts
from kvguard.engine.vllm_ids import IdRows
from kvguard.engine.vllm_ledger import Ledger, sequence_name
from kvguard.engine.vllm_place import heads_of, place_of
from kvguard.engine.vllm_policy import refusal_of_parameters, refusal_of_request
from kvguard.engine.vllm_rows import Rows
from kvguard.engine.vllm_settings import Settings, faults_of, version_warning
from kvguard.errors import BadConfig
from kvguard.format import local
from kvguard.format.layout import Layout, Region, Shard, whole
from kvguard.format.lineage import birth_of
from kvguard.format.messages import PlanOrder
from kvguard.types import Epoch, Fork, Rank, StreamId

LAYOUT = Layout.paged("model", "float32", 2, 32, 4, 1, 4)


# ---- policy, names, settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "refused"),
    [
        ({}, ""),
        ({"temperature": 0, "max_tokens": 50, "stop": ["x"], "logprobs": 3, "repetition_penalty": 1.2, "presence_penalty": 0.0, "n": 1}, ""),
        ({"temperature": 0.7, "top_p": 0.9}, ""),
        ({"response_format": {"type": "text"}}, ""),
        ({"seed": 7, "temperature": 0}, ""),
        ({"seed": 7, "temperature": 0.5}, "seed"),
        ({"seed": 7}, "seed"),
        ({"frequency_penalty": 0.1}, "frequency_penalty"),
        ({"bad_words": ["x"]}, "bad_words"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"n": 2}, "n"),
        ({"echo": True}, "echo"),
        ({"seed": 0, "temperature": 0.5}, "seed"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"thinking_token_budget": 0}, "thinking_token_budget"),
    ],
)
def test_policy(parameters, refused):
    assert refusal_of_parameters(parameters).split(":")[0] == refused


def test_an_engine_that_draws_by_position_may_go_on_with_a_seed():
    assert refusal_of_parameters({"seed": 7, "temperature": 0.5}, samples_by_position=True) == ""


@pytest.mark.parametrize(
    ("sampling", "refused"),
    [({}, ""), ({"seed": 7}, ""), ({"seed": 7, "temperature": 0.5}, "seed: "), ({"seed": 0, "temperature": 0.5}, "seed: "),
     ({"prompt_logprobs": 0}, "prompt_logprobs: "), ({"thinking_token_budget": 0}, "thinking_token_budget: "), ({"novelty": 0.5}, "novelty: not known"),
     ({"extra_args": {"kv_transfer_params": {}}}, ""), ({"extra_args": {"own": 1}}, "extra_args: own")],
)
def test_a_parameter_that_is_not_known_is_refused(sampling, refused):
    request = request_of("a", [1, 2, 3])
    vars(request.sampling_params).update(sampling, novelty=sampling.get("novelty", 0.0))
    assert refusal_of_request(request).startswith(refused) and bool(refusal_of_request(request)) == bool(refused)


def test_one_of_several_answers_is_refused_although_vllm_gives_it_a_request_of_its_own_with_n_1():
    assert refusal_of_request(request_of("3_cmpl-gw-17-0-0a1b2c3d", [1, 2, 3])).startswith("n: ")
    assert not refusal_of_request(request_of("cmpl-3_4-0-0a1b2c3d", [1, 2, 3]))


def test_names():
    assert sequence_name("cmpl-gw-17-0-0a1b2c3d") == "gw-17"
    assert sequence_name("cmpl-gw-17-1-0a1b2c3d") == "gw-17-1"
    assert sequence_name("chatcmpl-gw-17-0a1b2c3d") == "gw-17"
    assert sequence_name("chatcmpl-gw-0-0a1b2c3d") == "gw-0"
    assert sequence_name("cmpl-gw-17-0-0a1b2c3d", {"gw-17"}) == "cmpl-gw-17-0-0a1b2c3d"
    long = sequence_name(f"cmpl-{'ä' * 60}-0-0a1b2c3d")
    assert len(long.encode()) <= 64 and long != sequence_name(f"cmpl-{'ä' * 60}-1-0a1b2c3d")


@pytest.mark.parametrize("bad", [{"fetch_timeout_s": 0}, {"fetch_timeout_s": float("inf")}, {"fetch_timeout_s": float("nan")}, {"rows": -1}, {"rows": True}])
def test_numbers_that_mean_nothing_are_refused(bad):
    """A load without an end would keep its request, and its blocks, for ever."""
    with pytest.raises(BadConfig, match=f"'{next(iter(bad))}' is"):
        Settings.of({"instance": "a", **bad})


def test_settings():
    assert Settings.of({"instance": "a", "fetch_timeout_s": 2}) == Settings(instance="a", fetch_timeout_s=2)
    with pytest.raises(BadConfig, match="'instance' is missing") as caught:
        Settings.of({"sockett": "x", "scheduler": "yes"})
    assert "'sockett' is not known" in str(caught.value) and "'scheduler' is a str" in str(caught.value)
    assert version_warning("0.32.0") == version_warning("0.33.1") == "" and "0.31.9" in version_warning("0.31.9")


class FullAttentionSpec(SimpleNamespace):
    """As vLLM's, by name."""


class SlidingWindowSpec(SimpleNamespace):
    """As vLLM's, by name."""


class MLAAttentionSpec(SimpleNamespace):
    """As vLLM's, by name."""


def configured(spec, groups: int = 1, engine_id: str = "a1b2", **parallel):
    vllm = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(engine_id=engine_id), parallel_config=SimpleNamespace(**parallel), speculative_config=None,
        cache_config=SimpleNamespace(block_size=32),
        model_config=SimpleNamespace(is_encoder_decoder=False, runner_type="generate", use_mla=isinstance(spec, MLAAttentionSpec)),
    )  # fmt: skip
    return vllm, SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec)] * groups)


@pytest.mark.parametrize(
    ("spec", "groups", "parallel", "device", "fault"),
    [
        (FullAttentionSpec(block_size=32), 1, {}, "cpu", ""),
        (FullAttentionSpec(block_size=32), 1, {}, "cuda", ""),
        (FullAttentionSpec(block_size=32), 1, {}, "xpu", "host memory and on NVIDIA GPUs"),
        (FullAttentionSpec(block_size=32), 2, {}, "cpu", "2 KV cache groups"),
        (FullAttentionSpec(block_size=32, sliding_window=128), 1, {}, "cpu", "sliding_window=128"),
        (SlidingWindowSpec(block_size=32), 1, {}, "cpu", "SlidingWindowSpec"),
        (MLAAttentionSpec(block_size=32), 1, {"tensor_parallel_size": 2}, "cuda", ""),
        (MLAAttentionSpec(block_size=32), 1, {}, "cpu", "latent attention on a CPU"),
        (MLAAttentionSpec(block_size=32, model_version="deepseek_v4"), 1, {}, "cuda", "MLAAttentionSpec"),
        (FullAttentionSpec(block_size=32), 1, {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "cpu", ""),
        (FullAttentionSpec(block_size=32), 1, {"data_parallel_size": 2}, "cpu", "data_parallel_size=2"),
        (FullAttentionSpec(block_size=32), 1, {"engine_id": "a1b2_dp0"}, "cpu", "engine 0 of several"),
        (FullAttentionSpec(block_size=32), 1, {"data_parallel_index": 1}, "cpu", "engine 1 of several"),
        (FullAttentionSpec(block_size=32), 1, {"decode_context_parallel_size": 2}, "cpu", "different positions"),
        (FullAttentionSpec(block_size=32), 1, {"prefill_context_parallel_size": 2}, "cpu", "different positions"),
        (FullAttentionSpec(block_size=16), 1, {}, "cpu", "blocks of 16"),
    ],
)
def test_what_cant_be_protected_is_refused_with_its_reason(spec, groups, parallel, device, fault):
    faults = faults_of(*configured(spec, groups, **parallel), device)
    assert len(faults) == bool(fault) and all(fault in one for one in faults)


# ---- ranks and shards -----------------------------------------------------------------------------------------------------------


def placed(pp: int = 0, tp: int = 0, stages: int = 1, ranks: int = 1, heads: int = 8, names=("layers.0.attn",), layers: int = 4, mla: bool = False):
    model = SimpleNamespace(get_total_num_hidden_layers=lambda: layers, get_total_num_kv_heads=lambda: heads, use_mla=mla)
    config = SimpleNamespace(model_config=model, parallel_config=SimpleNamespace(pipeline_parallel_size=stages, tensor_parallel_size=ranks))
    return place_of(config, list(names), pp, tp)


def test_a_worker_is_a_rank_with_its_shard():
    stage = [f"model.layers.{n}.self_attn.attn" for n in (2, 3)]
    assert placed() == (Rank(0, 0, 0), whole(1, 8))
    assert placed(names=["whatever", "else"]).shard == whole(2, 8), "one stage's layers may have any name"
    assert placed(1, 1, 2, 2, names=stage) == (Rank(0, 1, 1), Shard((2, 4, 4), (4, 8, 8)))


def test_heads_that_ranks_hold_alike_are_one_shard():
    assert [heads_of(3, 3, tp) for tp in range(3)] == [(0, 1, 3), (1, 2, 3), (2, 3, 3)]
    assert [heads_of(2, 4, tp) for tp in range(4)] == [(0, 1, 2), (0, 1, 2), (1, 2, 2), (1, 2, 2)]
    assert placed(tp=0, ranks=4, heads=1).shard == placed(tp=3, ranks=4, heads=1).shard == Shard((0, 1, 1), (0, 1, 1), shared=True)
    assert placed(tp=0, ranks=4, mla=True).shard == placed(tp=3, ranks=4, mla=True).shard == Shard((0, 1, 1), (0, 1, 1), shared=True)
    assert not placed(tp=1, ranks=4, heads=4).shard.shared and not placed(tp=1, ranks=4, heads=8).shard.shared, "parts that differ"
    with pytest.raises(BadConfig, match="3 KV heads can't be shared evenly by 2"):
        heads_of(3, 2, 0)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.layers.0.attn", "model.layers.2.attn"], r"\[0, 2\] of 4, not one run"),
        (["model.layers.3.attn", "model.layers.4.attn"], "of 4, not one run"),
        (["model.layers.0.attn.1"], "doesn't say which layer"),
    ],
)
def test_a_stage_that_is_no_run_of_layers_is_refused(names, said):
    with pytest.raises(BadConfig, match=said):
        placed(stages=2, names=names)


# ---- rows -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(path):
    pool = engine.allocate(LAYOUT)
    rows = Rows(engine.attach("llama", Rank(0, 0, 0), pool, LAYOUT, socket=path, rows=2))
    yield rows
    rows.guard.detach()
    pool.close()


def run(rows: Rows, facts: StepFacts) -> None:
    rows.before(facts)
    rows.after()


def held(rows: Rows) -> dict[str, tuple]:
    table = rows.guard.table
    return {name: (table.accepted(row), table.ids(row).tolist(), table.blocks(row)) for name, row in table.sequences().items()}


def begin(rows: Rows) -> None:
    run(rows, StepFacts(size=5, begun=[Begun(1, "one", b"{}", [1, 2, 3, 4, 5], [7, 8], 5)]))


def test_steps_become_rows(rows):
    begin(rows)
    run(rows, StepFacts(size=1, nos=[1], lengths=[6], ids=[6]))
    run(rows, StepFacts(size=2, nos=[1], lengths=[7], ids=[7], begun=[Begun(2, "two", b"", [9, 9], [9], 1)]))
    run(rows, StepFacts(size=2, nos=[1, 2], lengths=[8, 3], ids=[8, 10]))
    run(rows, StepFacts(size=2, nos=[1, 2], lengths=[9, 4], ids=[9, 11], blocks={0: [10]}))
    assert held(rows) == {"one": (9, list(range(1, 10)), [7, 8, 10]), "two": (4, [9, 9, 10, 11], [9])}
    run(rows, StepFacts(size=3, over=[1], grown=[Grown(2, [12, 13], [11], 6)]))
    assert held(rows) == {"two": (6, [9, 9, 10, 11, 12, 13], [9, 11])}
    assert not rows.counts


def test_a_preempted_sequence_keeps_its_ids_and_comes_back_with_other_blocks(rows):
    begin(rows)
    generations = rows.guard.table.views.block_generations
    before = generations[[7, 8]].tolist()
    rows.before(StepFacts(size=0, cut=[1]))
    assert held(rows) == {"one": (0, [1, 2, 3, 4, 5], [])}
    assert all(now > then for now, then in zip(generations[[7, 8]].tolist(), before, strict=True))
    rows.after()
    run(rows, StepFacts(size=3, grown=[Grown(1, [6], [20, 21], 3)]))
    run(rows, StepFacts(size=3, grown=[Grown(1, [], [], 6)]))
    assert held(rows) == {"one": (6, [1, 2, 3, 4, 5, 6], [20, 21])}


def test_a_step_that_failed_is_not_committed_and_the_next_one_says_it_all(rows):
    begin(rows)
    rows.before(StepFacts(size=1, nos=[1], lengths=[6], ids=[6]))
    rows.after(failed=True)
    assert held(rows)["one"][:2] == (5, [1, 2, 3, 4, 5])
    run(rows, StepFacts(size=1, nos=[1], lengths=[7], ids=[7]))
    assert held(rows)["one"][:2] == (7, [1, 2, 3, 4, 5, 6, 7])


def test_a_table_without_room_costs_protection_of_what_does_not_fit(rows):
    for no in range(3):
        run(rows, StepFacts(size=2, begun=[Begun(no, f"s{no}", b"", [1, 2], [no], 2)]))
    assert sorted(held(rows)) == ["s0", "s1"] and rows.counts["commits refused"] == 1
    run(rows, StepFacts(size=1, over=[0], nos=[2], lengths=[3], ids=[3]))
    assert held(rows)["s2"] == (3, [1, 2, 3], [2])


def test_a_pool_that_packs_its_own_steps_is_told_what_they_write(path, monkeypatch):
    pool = engine.allocate(LAYOUT, "rehearsal")
    rows = Rows(engine.attach("llama", Rank(0, 0, 0), pool, LAYOUT, socket=path, rows=2))
    told = []
    monkeypatch.setattr(pool, "wrote", lambda *columns: told.append(columns))
    try:
        run(rows, StepFacts(size=5, begun=[Begun(1, "one", b"{}", [1, 2, 3, 4, 5], [7, 8], 5)], spans=[(1, 0, 5)]))
        run(rows, StepFacts(size=5, nos=[1], lengths=[6], ids=[6], blocks={0: [9]}, spans=[(1, 5, 10), (4, 0, 3)]))
        run(rows, StepFacts(size=0))
        assert told == [([7, 8], [0, 0], [4, 1]), ([8, 9], [1, 0], [3, 2])]
    finally:
        rows.guard.detach()
        pool.close()


PLAN = PlanOrder(
    "llama", Epoch(5, "c"), ("one",), (4,), ("replica",), ((Fork(0, 0), Fork(5, 4)),), (5,), ("n",), (StreamId("llama", Rank(0, 0, 0), 7),), (), (), ("",)
)


@pytest.mark.parametrize("within", [False, True])
def test_an_idle_engine_joins_the_new_epoch(rows, daemon, within):
    """A new emitter is a new epoch for engines that have no request, and so no step: after the coordinator's patience they were killed, all of them.
    `within`: the order comes in the last step before it is idle."""
    begin(rows)
    connection = daemon.until(lambda: list(daemon.readers))[0]
    if within:
        rows.before(StepFacts(size=1, nos=[1], lengths=[6], ids=[6]))
    daemon.readers[connection].set_epoch(5)
    daemon.server.send(connection, local.RestoreOrder(PLAN))
    if within:
        daemon.until(lambda: rows.guard._order)
        rows.after()
    daemon.until(lambda: daemon.messages)
    assert daemon.messages[0].epoch == Epoch(5, "c") and not daemon.messages[0].error and not rows.guard.fenced
    assert held(rows) == {"one": (4, [1, 2, 3, 4, 5], [7])}
    run(rows, StepFacts(size=1, nos=[1], lengths=[7 if within else 6], ids=[7 if within else 6]))
    assert held(rows)["one"][0] == 6 + within


def test_a_fault_of_its_own_between_two_steps_ends_the_attachment(rows, daemon, caplog, monkeypatch):
    """The line to the daemon failed of it, was made anew, brought the order again: a trace for each, for ever, and an engine that looked protected."""
    begin(rows)
    connection = daemon.until(lambda: list(daemon.readers))[0]
    orders = []
    monkeypatch.setattr(rows.guard, "restore", lambda timeout_s: orders.append(1) or 1 // 0)
    daemon.readers[connection].set_epoch(5)
    for _ in range(2):
        daemon.server.send(connection, local.RestoreOrder(PLAN))
    daemon.until(lambda: daemon.lost)
    assert [type(message) for message in daemon.messages] == [local.Detach] and not daemon.attaches and len(orders) == 1
    assert ["UNPROTECTED" in record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [True]
    with pytest.raises(ZeroDivisionError):  # whoever calls this ends its own part, as with any fault: see vllm.py, harmless
        rows.before(StepFacts(size=1, nos=[1], lengths=[6], ids=[6]))
    rows.after()


def test_such_an_end_is_said_though_the_attachment_was_to_be_said_again(rows, daemon, monkeypatch):
    """With descriptors that were closed by then: the line failed, and the daemon never heard that nobody steps there any more."""
    begin(rows)
    connection = daemon.until(lambda: list(daemon.readers))[0]
    monkeypatch.setattr(rows.guard, "restore", lambda timeout_s: 1 // 0)
    with rows.guard._changed:  # both are read in one go
        daemon.server.send(connection, local.Attached(Epoch(5, "c")))
        daemon.server.send(connection, local.RestoreOrder(msgspec.structs.replace(PLAN, epoch=Epoch(6, "c"))))
    daemon.until(lambda: daemon.lost)
    assert [type(message) for message in daemon.messages] == [local.Detach]


def test_a_fenced_engine_serves_on_and_joins_the_new_epoch(rows, daemon):
    begin(rows)
    run(rows, StepFacts(size=2, begun=[Begun(2, "two", b"", [9, 9], [9], 2)]))
    connection = daemon.until(lambda: list(daemon.readers))[0]
    reader = daemon.readers[connection]
    rows.before(StepFacts(size=1, nos=[1], lengths=[6], ids=[6]))
    reader.set_epoch(5)
    rows.after()
    assert held(rows)["one"][0] == 5 and rows.counts["steps fenced"] == 1
    run(rows, StepFacts(size=2, nos=[1, 2], lengths=[7, 3], ids=[7, 10]))  # no plan yet: serves, commits nothing
    assert held(rows)["one"][0] == 5
    daemon.server.send(connection, local.RestoreOrder(PLAN))
    daemon.until(lambda: not rows.guard.fenced)
    run(rows, StepFacts(size=2, nos=[1, 2], lengths=[8, 4], ids=[8, 11]))
    assert held(rows) == {"one": (8, list(range(1, 9)), [7, 8]), "two": (4, [9, 9, 10, 11], [9])}
    daemon.until(lambda: daemon.messages)
    assert daemon.messages[0].epoch == Epoch(5, "c")


def test_an_engine_without_a_daemon_serves_and_says_so_once(rows, path, caplog):
    caplog.set_level("INFO", "kvguard.engine")
    begin(rows)
    for length in (6, 7):
        run(rows, StepFacts(size=1, nos=[1], lengths=[length], ids=[length]))
    said = [record.getMessage() for record in caplog.records if "UNPROTECTED" in record.getMessage()]
    assert len(said) == 1 and f"no daemon at {path}" in said[0] and "Try: kvguard node" in said[0]
    assert held(rows)["one"][0] == 7, "what was committed meanwhile is there for the daemon that comes"
    late = TinyDaemon(path)
    try:
        late.until(lambda: late.committed and 7 in next(iter(late.committed.values())).values() and rows.guard.connected)
        run(rows, StepFacts(size=1, nos=[1], lengths=[8], ids=[8]))
        assert "is attached to the daemon" in caplog.records[-1].getMessage()
    finally:
        late.close()


def test_the_schedulers_ids_are_those_that_it_accepted(path, daemon):
    ids = IdRows(engine.attach_scheduler("llama", 32, 4, socket=path, rows=4))
    one, two = SimpleNamespace(all_token_ids=[1, 2, 3]), SimpleNamespace(all_token_ids=[7])
    try:
        ids.tell([("one", one, b"{}")])
        one.all_token_ids += [4]
        ids.tell([("one", one, b"{}"), ("two", two, b"")])
        one.all_token_ids += [5, 6]
        two.all_token_ids += [8]
        ids.tell([("one", one, b"{}"), ("two", two, b"")])
        table = ids.guard.table
        assert {name: table.ids(row).tolist() for name, row in table.sequences().items()} == {"one": [1, 2, 3, 4, 5, 6], "two": [7, 8]}
        ids.tell([("two", two, b"")])
        assert list(table.sequences()) == ["two"] and not ids.counts
    finally:
        ids.guard.detach()


# ---- the ledger -----------------------------------------------------------------------------------------------------------------


def request_of(name: str, ids: list[int]):
    sampling = SimpleNamespace(temperature=0.0, n=1)
    return SimpleNamespace(
        request_id=name, resumable=False, prompt_token_ids=ids, sampling_params=sampling, all_token_ids=list(ids), num_prompt_tokens=len(ids), lora_request=None,
        mm_features=[], prompt_embeds=None,
    )  # fmt: skip


def output(new=(), cached=(), resumed=(), finished=(), preempted=(), **scheduled):
    """`new`, `cached`: (name, blocks or None, computed)."""
    return SimpleNamespace(
        total_num_scheduled_tokens=sum(scheduled.values()), finished_req_ids=set(finished), preempted_req_ids=set(preempted), num_scheduled_tokens=scheduled,
        scheduled_new_reqs=[SimpleNamespace(req_id=name, block_ids=(blocks,), num_computed_tokens=computed) for name, blocks, computed in new],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=[name for name, *_ in cached], new_block_ids=[blocks and (blocks,) for _, blocks, _ in cached],
            num_computed_tokens=[computed for *_, computed in cached], resumed_req_ids=set(resumed),
        ),
    )  # fmt: skip


def test_drafts_and_placeholders_are_never_said():
    ledger, request = Ledger(), request_of("a", [1, 2, 3])
    ledger.arrived(request)
    facts = ledger.step(output(new=[("a", [5], 0)], a=3))
    assert (facts.begun[0].ids, facts.begun[0].length) == ([1, 2, 3], 3)
    facts = ledger.step(output(cached=[("a", None, 3)], a=4))  # async: nothing is known yet of what the last step drew, three drafts are scheduled
    assert (facts.grown[0].ids, facts.grown[0].length) == ([], 3)
    request.all_token_ids += [4, 5]  # one draft of three was accepted
    facts = ledger.step(output(cached=[("a", [6], 5)], a=4))
    assert (facts.grown[0].ids, facts.grown[0].blocks, facts.grown[0].length) == ([4, 5], [6], 5)
    request.all_token_ids += [6]
    facts = ledger.step(output(cached=[("a", None, 6)], a=1))
    assert (facts.nos, facts.ids, facts.lengths) == ([0], [6], [6])


def test_positions_that_a_step_may_write_are_said_where_they_are_wanted():
    """Drafts that async scheduling counts as computed may be rejected: the step then begins where what is known ends."""
    ledger, request = Ledger(spans=True), request_of("a", [1, 2, 3])
    ledger.arrived(request)
    assert ledger.step(output(new=[("a", [5], 0)], a=3)).spans == [(0, 0, 3)]
    assert ledger.step(output(cached=[("a", None, 3)], a=4)).spans == [(0, 2, 7)]
    request.all_token_ids += [4]
    assert ledger.step(output(cached=[("a", [6], 7)], a=4)).spans == [(0, 3, 11)]
    assert Ledger().step(output(new=[("a", [5], 0)], a=3)).spans == []


def test_an_engine_is_idle_where_nothing_is_under_way():
    """A step without tokens behind one that has some (of another stage's turn) must not wait for anything: the next one waits behind it."""
    ledger = Ledger()
    ledger.arrived(request_of("a", [1, 2, 3]))
    assert ledger.step(output()).idle, "all that is here waits to be scheduled"
    assert not ledger.step(output(new=[("a", [5], 0)], a=3)).idle
    assert not ledger.step(output()).idle, "its tokens are under way"
    assert ledger.step(output(preempted=["a"])).idle
    assert not ledger.step(output(cached=[("a", [6], 0)], resumed=["a"], a=3)).idle and not ledger.step(output()).idle
    assert ledger.step(output(finished=["a"])).idle


def test_a_name_that_comes_again_is_another_sequence():
    packed = []
    for _ in range(2):
        ledger = Ledger()
        ledger.arrived(request_of("a", [1, 2, 3]))
        packed.append(ledger.step(output(new=[("a", [5], 0)], a=3)).begun[0].request)
    assert birth_of(packed[0]) != birth_of(packed[1])


def test_what_cant_be_followed_is_counted_and_said_once(caplog):
    ledger, request = Ledger(), request_of("a", [1, 2, 3])
    request.resumable = True
    ledger.arrived(request)
    ledger.arrived(request)
    assert len(ledger) == 0 and ledger.counts["unprotected requests"] == 2
    assert ["UNPROTECTED" in record.getMessage() for record in caplog.records] == [True]
    assert ledger.step(output(new=[("a", [5], 0)], a=3)).begun == []


# ---- the pool -------------------------------------------------------------------------------------------------------------------


def test_keys_in_columns_are_copied_by_runs_of_slots():
    """vLLM's layout on a CPU, against the layout's own arithmetic."""
    layers, heads, tokens, dim, blocks = 2, 3, 8, 4, 5
    page, half = 2 * heads * tokens * dim * 2, tokens * dim * 2
    outer = (("layer", layers, blocks * page), ("head", heads, 2 * half))
    regions = Region("kv0", 0, page, 2, (*outer, ("dim", dim, 2 * tokens))), Region("kv1", half, page, 2 * dim, (*outer, ("dim", dim, 2)))
    layout = Layout("m", "bfloat16", 2, blocks, tokens, regions, whole(layers, heads), True, layers * blocks * page)
    pool = engine.allocate(layout)
    memory = np.frombuffer(pool.memory, np.uint8)
    memory[:] = np.random.default_rng(3).integers(0, 256, memory.size, dtype=np.uint8)
    pieces = [(4, 0, 8), (1, 2, 3), (1, 6, 1), (2, 7, 1), (3, 0, 1)]
    wanted = b"".join(
        memory[at : at + size].tobytes() for block, start, count in pieces for slot in range(start, start + count) for at, size in layout.ranges(block, slot)
    )
    out = bytearray(len(wanted))
    assert pool.capture(*zip(*pieces, strict=True), memoryview(out)) == len(wanted) and bytes(out) == wanted
    before = memory.copy()
    memory[:] = 0
    pool.scatter(*zip(*pieces, strict=True), memoryview(out))
    named = [at + n for block, start, count in pieces for slot in range(start, start + count) for at, size in layout.ranges(block, slot) for n in range(size)]
    assert np.array_equal(memory[named], before[named]) and not np.delete(memory, named).any()
    pool.close()
