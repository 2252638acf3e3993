"""The connector against the interface of the vLLM that is installed: what vLLM calls is what we take, and what it can configure is known or refused.

Run with 0.32 and, by KVGUARD_VLLM=0.33 tools/test_vllm.sh, with 0.33's own code.
"""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import vllm.v1.kv_cache_interface as kinds
from test_vllm_scheduler import engine_config
from vllm import SamplingParams
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.request import Request

from kvguard.engine.vllm import KvguardConnector
from kvguard.engine.vllm_policy import refusal_of_request
from kvguard.engine.vllm_settings import faults_of
from kvguard.errors import BadConfig

pytestmark = pytest.mark.vllm

# Hooks of vLLM that are left as they are, each because what it is for does not arise here. One that is on no list is new: it has to be thought about.
LEFT_ALONE = frozenset(
    """bind_connector_metadata clear_connector_metadata has_connector_metadata role
    bind_gpu_block_pool bind_kv_cache_manager get_loaded_kv_cache_group_ids supports_divergent_local_hybrid_hits register_finished_partial_tail
    build_kv_connector_stats build_prom_metrics get_kv_connector_stats get_kv_connector_kv_cache_events take_events get_external_cache_hit_sources
    finish_forward get_block_ids_with_load_errors get_finished get_finished_count has_pending_block_frees has_pending_push_work
    get_handshake_metadata set_xfer_handshake_metadata set_xfer_handshake_metadata_pp_aware set_host_xfer_buffer_ops
    get_required_kvcache_layout requires_piecewise_for_cudagraph reset_capture_state reset_cache restore_kv_caches unregister_kv_caches""".split()
)
OURS_ALONE = {"give_up", "supports_sleep_mode"}  # the second one is 0.33's


def hooks_of(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_every_hook_is_vllms_and_every_hook_of_vllm_is_known():
    theirs, ours = hooks_of(KVConnectorBase_V1) | hooks_of(SupportsHMA), hooks_of(KvguardConnector)
    assert ours - theirs <= OURS_ALONE and not KvguardConnector.__abstractmethods__
    assert theirs - ours <= LEFT_ALONE


def test_hooks_take_what_vllm_gives_them():
    for name in sorted(hooks_of(KvguardConnector) - OURS_ALONE):
        ours, theirs = (inspect.getattr_static(kind, name, None) for kind in (KvguardConnector, KVConnectorBase_V1))
        if theirs is None or isinstance(theirs, property):
            assert theirs is None or isinstance(ours, property), name
            continue
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        ours, theirs = inspect.signature(getattr(KvguardConnector, name)), inspect.signature(getattr(KVConnectorBase_V1, name))
        given = [one.name for one in theirs.parameters.values() if one.kind is kind]
        taken = [one.name for one in ours.parameters.values() if one.kind is kind]
        assert taken == given, f"{name}: by position and by name"
        assert all(one in {two.kind for two in ours.parameters.values()} for one in {two.kind for two in theirs.parameters.values()}), name


def test_of_all_kinds_of_kv_but_plain_full_and_latent_attention_is_refused():
    config = engine_config()
    every = {name: kind for name, kind in vars(kinds).items() if inspect.isclass(kind) and issubclass(kind, kinds.KVCacheSpec)}
    others = every.keys() - {"FullAttentionSpec", "MLAAttentionSpec"}
    assert len(every) - len(others) == 2 and {"MambaSpec", "SlidingWindowSpec", "CrossAttentionSpec", "ChunkedLocalAttentionSpec"} < others
    for name in others:
        cache = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=every[name].__new__(every[name]))])
        assert any(fault.startswith(f"{name}: only plain") for fault in faults_of(config, cache, "cpu")), name


def test_an_engine_of_several_is_refused_although_vllm_tells_it_that_it_is_alone():
    """As v1/engine/core.py prepares the engines of a dense model under --data-parallel-size."""
    for index in (0, 1):
        config = copy.deepcopy(engine_config())
        config.speculative_config = None
        config.kv_transfer_config.engine_id += f"_dp{index}"
        config.parallel_config.data_parallel_size = 2
        config.parallel_config.data_parallel_index = index
        config.parallel_config.reconfigure_for_independent_dp_rank()
        assert config.parallel_config.data_parallel_size == 1
        spec = SimpleNamespace(kv_cache_groups=[], kv_cache_tensors=[])
        with pytest.raises(BadConfig, match=f"engine {index} of several"):
            KvguardConnector(config, KVConnectorRole.SCHEDULER, spec)


def refusal(**sampling) -> str:
    parameters = SamplingParams(max_tokens=20, **sampling)
    return refusal_of_request(Request(request_id="a", prompt_token_ids=[1, 2, 3], sampling_params=parameters, pooling_params=None))


@pytest.mark.parametrize(
    ("sampling", "refused"),
    [
        ({}, ""),
        ({"temperature": 0, "stop": ["a", "bc"], "logprobs": 2, "min_tokens": 3, "repetition_penalty": 1.1, "logit_bias": {5: 1.0}}, ""),
        ({"temperature": 0, "skip_clone": True, "detokenize": True, "include_stop_str_in_output": True, "stop_token_ids": [7]}, ""),
        ({"extra_args": {"kv_transfer_params": {"kvguard": {}}}}, ""),
        ({"extra_args": {"my_processor": 1}}, "extra_args: my_processor"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"n": 2}, "n: several"),
        ({"seed": 3, "temperature": 1.0}, "seed"),
        ({"seed": 0, "temperature": 1.0}, "seed"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"trace_decode_token_ids": [1, 2]}, "trace_decode_token_ids: not known here"),
    ],
)
def test_of_a_real_request_what_is_not_known_is_refused(sampling, refused):
    found = refusal(**sampling)
    assert found.startswith(refused) and bool(found) == bool(refused)


def test_one_of_several_answers_is_known_by_the_id_that_vllm_gives_it():
    """Its own parameters say n = 1."""
    parameters = SamplingParams(max_tokens=20, n=3)
    parent = ParentRequest(SimpleNamespace(request_id="cmpl-gw-17-0-0a1b2c3d", external_req_id="cmpl-gw-17-0", params=parameters))
    for index in range(3):
        name, child = parent.get_child_info(index)
        request = Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling_params=child, pooling_params=None)
        assert child.n == 1 and refusal_of_request(request).startswith("n: several")
