"""Layouts of vLLM's CPU attention, proved by its own code on this machine's instruction set: what is right is accepted, what is wrong is not."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheTensor, compute_layout_strides, create_kv_cache_views
from vllm.v1.kv_cache_layout import KVCacheLayout

from kvguard.device import open_device
from kvguard.engine import vllm_layouts
from kvguard.engine.tensors import tensor_of
from kvguard.engine.vllm_layouts import Attention
from kvguard.engine.vllm_pool import Slab, SlabContext, TorchSlab, attention_of, proved_pool
from kvguard.errors import BadConfig, Refused
from kvguard.format.layout import Layout, Shard, whole

pytestmark = pytest.mark.vllm
LAYERS, BLOCKS, HEADS, DIM = 3, 5, 2, 64
SHARD = whole(LAYERS, HEADS)


def attention(tokens: int, dtype: torch.dtype, kv_dtype: str = "auto", scale: float = 1.0, isa: str = "") -> Attention:
    isa = isa or _get_attn_isa(dtype, tokens, DIM, kv_dtype)

    def write(layer, cache, rows, slots):
        key, value = (part.contiguous() for part in rows.split(DIM, dim=-1))
        blocks, heads, size, _ = cache.shape
        keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, keys, values, slots, isa, k_scale=scale, v_scale=scale, kv_cache_dtype=kv_dtype)

    return Attention("CPU_ATTN", isa, kv_dtype, 2 * DIM, dtype, ((scale, scale),) * LAYERS, tokens, write)


def layout_of(caches: list[torch.Tensor], slab: Slab, attention: Attention, model: str) -> Layout:
    return vllm_layouts.layout_of(caches, slab.tensor.data_ptr(), slab.size, attention, model, SHARD)


def rowed(tokens: int, backend: str = "FLASH_ATTN", kv_dtype: str = "auto", scale: float = 1.0, mangled: bool = False) -> Attention:
    """As FLASH_ATTN, FLASHINFER and TRITON_ATTN write in vLLM 0.32: kv_cache.transpose(1, 2).split(head_size, dim=-1), then [block, slot]."""

    def write(layer, cache, rows, slots):
        keys, values = cache.transpose(1, 2).split(DIM, dim=-1)
        kernel_tokens = cache.shape[2]
        for slot in slots.tolist():
            block, place = divmod(slot, kernel_tokens)
            row = rows[0].to(cache.dtype) if cache.dtype != torch.uint8 else quantised(rows[0])
            keys[block, place], values[block, place] = row.split(DIM, dim=-1)
            if mangled:
                keys[block, (place + 1) % kernel_tokens] = keys[block, place]

    return Attention(backend, "", kv_dtype, 2 * DIM, torch.bfloat16, ((scale, scale),) * LAYERS, tokens, write)


@pytest.fixture
def caches():
    slabs = []

    def make(tokens: int, dtype: torch.dtype) -> tuple[list[torch.Tensor], Slab]:
        page = HEADS * tokens * 2 * DIM * dtype.itemsize
        with SlabContext(LAYERS * BLOCKS * page) as context:
            made = torch.zeros(LAYERS * BLOCKS * page, dtype=torch.int8, device="cpu")
        slabs.append(context.slab)
        return [part.view(dtype).view(BLOCKS, HEADS, tokens, 2 * DIM) for part in made.view(LAYERS, BLOCKS * page)], context.slab

    yield make
    for slab in slabs:
        slab.close()


@pytest.mark.parametrize("tokens", [16, 32, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_plain_kv_is_proved(caches, tokens, dtype):
    made, slab = caches(tokens, dtype)
    pool = proved_pool(made, slab, attention(tokens, dtype), "m", SHARD)
    assert pool.layout.blocks == BLOCKS and pool.layout.token_bytes == LAYERS * 2 * HEADS * DIM * dtype.itemsize
    assert not slab.tensor.any(), "the proof leaves nothing behind"


@pytest.mark.parametrize("kv_dtype", ["fp8_e4m3", "fp8_e5m2"])
def test_scales_of_quantised_kv_are_part_of_the_fingerprint(caches, kv_dtype):
    if not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        pytest.skip("vLLM has quantised KV on a CPU with AVX-512 or AMX alone")
    made, slab = caches(32, torch.uint8)
    first, second = (proved_pool(made, slab, attention(32, torch.bfloat16, kv_dtype, scale), "m", SHARD).layout for scale in (1.0, 0.5))
    assert not first.addressable and first.fingerprint != second.fingerprint


@pytest.mark.parametrize("made_by", [functools.partial(attention, dtype=torch.bfloat16, isa="vec"), rowed], ids=["cpu", "gpu"])
def test_quantised_pools_with_other_scales_have_another_fingerprint(caches, made_by):
    """Also where this machine's processor has no quantised KV."""
    made, slab = caches(32, torch.uint8)
    kinds = [(kv_dtype, scale) for kv_dtype in ("fp8_e4m3", "fp8_e5m2") for scale in (1.0, 0.5)]
    assert len({layout_of(made, slab, made_by(32, kv_dtype=kv_dtype, scale=scale), "m").fingerprint for kv_dtype, scale in kinds}) == 4


def test_every_heads_own_scale_counts():
    """Of several vLLM keeps the largest as the layer's number: quantised KV of other scales would have been taken for its own."""

    def scales(*of_k: float) -> tuple:
        layer = SimpleNamespace(
            impl=None, attn_backend=SimpleNamespace(get_name=lambda: "FLASH_ATTN"), kv_cache_dtype="fp8", head_size=DIM, _k_scale=torch.tensor(of_k),
            _k_scale_float=max(of_k), _v_scale=torch.tensor(0.25), _v_scale_float=0.25,
        )  # fmt: skip
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={"a": layer}), model_config=SimpleNamespace(dtype=torch.bfloat16),
                                 cache_config=SimpleNamespace(block_size=32))  # fmt: skip
        return attention_of(config, ["a"]).scales

    assert scales(0.5) == ((0.5, 0.25),) and scales(0.5, 2.0) == ((0.5, 2.0, 0.25),) != scales(1.0, 2.0)


def test_what_decides_how_bytes_lie_is_in_the_fingerprint(caches):
    found = set()
    for tokens, dtype in ((32, torch.bfloat16), (64, torch.bfloat16), (32, torch.float16)):
        made, slab = caches(tokens, dtype)
        found |= {layout_of(made, slab, attention(tokens, dtype), model).fingerprint for model in ("m", "n")}
    assert len(found) == 6


def test_the_shard_is_in_the_fingerprint_and_must_be_what_the_tensors_hold(caches):
    made, slab = caches(32, torch.bfloat16)
    parts = [SHARD, Shard((3, 6, 6), (0, 2, 2)), Shard((0, 3, 3), (2, 4, 4)), Shard((0, 3, 6), (0, 2, 2))]
    assert len({proved_pool(made, slab, attention(32, torch.bfloat16), "m", shard).layout.fingerprint for shard in parts}) == 4
    with pytest.raises(BadConfig, match="1 heads, but the regions hold"):
        proved_pool(made, slab, attention(32, torch.bfloat16), "m", Shard((0, 3, 3), (1, 2, 4)))


def test_latent_vectors_are_proved_by_the_backends_own_code():
    """vLLM's latent attention on a CPU: one row a token, without heads."""
    rank, rotary, tokens = 512, 64, 16
    size = LAYERS * BLOCKS * tokens * (rank + rotary) * 2
    with SlabContext(size) as context:
        made = torch.zeros(size, dtype=torch.int8, device="cpu")
    caches = [part.view(torch.bfloat16).view(BLOCKS, 1, tokens, rank + rotary) for part in made.view(LAYERS, -1)]
    module = SimpleNamespace(
        impl=SimpleNamespace(do_kv_cache_update=functools.partial(CPUMLAImpl.do_kv_cache_update, None)), attn_backend=CPUMLABackend, kv_cache_dtype="auto",
        head_size=rank + rotary, kv_lora_rank=rank,
    )  # fmt: skip
    config = SimpleNamespace(
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys("abc", module)), model_config=SimpleNamespace(dtype=torch.bfloat16),
        cache_config=SimpleNamespace(block_size=tokens),
    )  # fmt: skip
    pool = proved_pool(caches, context.slab, attention_of(config, ["a", "b", "c"]), "m", whole(LAYERS, 1))
    assert pool.layout.addressable and pool.layout.token_bytes == LAYERS * (rank + rotary) * 2 and not made.any()
    pool.close()
    context.slab.close()


def test_an_unknown_backend_is_refused(caches):
    made, slab = caches(32, torch.bfloat16)
    with pytest.raises(BadConfig, match="CPU_ATTN/abacus/auto is not in the registry"):
        layout_of(made, slab, attention(32, torch.bfloat16, isa="abacus"), "m")


def test_a_layout_that_is_not_what_the_backend_writes_is_refused(caches, monkeypatch):
    made, slab = caches(32, torch.bfloat16)
    right = attention(32, torch.bfloat16)
    if right.isa not in ("vec", "vec16"):
        pytest.skip("tokens aren't addressable with this instruction set")

    def rows_for_keys(pages):
        keys, values = vllm_layouts.column_keys(pages)
        outer = keys.inner[:2]
        wrong = keys.__class__("kv0", keys.offset, keys.block_stride, DIM * pages.itemsize, (*outer, ("dim", DIM, pages.itemsize)))
        return wrong, values

    monkeypatch.setitem(vllm_layouts.REGISTRY, ("CPU_ATTN", right.isa, "auto"), rows_for_keys)
    with pytest.raises(Refused, match="which the layout doesn't name there|left .* bytes as they were"):
        proved_pool(made, slab, right, "m", SHARD)


def test_layers_that_share_kv_or_differ_are_refused():
    def layer(**more):
        shared = SimpleNamespace(kv_sharing_target_layer_name=more.pop("shares", None))
        backend = SimpleNamespace(get_name=lambda: "CPU_ATTN")
        return SimpleNamespace(**{"impl": shared, "attn_backend": backend, "isa": "vec", "kv_cache_dtype": "auto", "head_size": 64, **more})

    for odd in ({"shares": "a"}, {"head_size": 128}):
        context = {"a": layer(), "b": layer(**odd)}
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=context), model_config=SimpleNamespace(dtype=torch.bfloat16),
                                 cache_config=SimpleNamespace(block_size=32))  # fmt: skip
        with pytest.raises(BadConfig, match="shares the KV of a|2 kinds of attention"):
            attention_of(config, ["a", "b"])


# ---- layouts of GPUs' backends, rehearsed: the write is vLLM's own choice of places, carried out by torch on a CPU ------------------------------------------


def quantised(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.float8_e4m3fn).view(torch.uint8)


def viewed(layout: KVCacheLayout, raw: torch.Tensor, dtype: torch.dtype, tokens: int, kernel_tokens: int | None = None) -> list[torch.Tensor]:
    """What vLLM itself makes of its one allocation."""
    spec = FullAttentionSpec(block_size=tokens, num_kv_heads=HEADS, head_size=DIM, dtype=dtype)
    page = HEADS * tokens * 2 * DIM * dtype.itemsize
    strides = compute_layout_strides(spec, BLOCKS, LAYERS, layout)
    placed = KVCacheTensor(size=LAYERS * BLOCKS * page, layers=[str(n) for n in range(LAYERS)], layer_stride=strides[0], block_stride=strides[1])
    return create_kv_cache_views(raw, spec, BLOCKS, layout, placed, kernel_block_size=kernel_tokens)


@pytest.fixture
def rehearsed():
    """Memory of a rehearsed GPU that torch sees, and how it is shared."""
    opened = []

    def make(size: int) -> TorchSlab:
        device = open_device("rehearsal")
        pool = device.allocate(Layout.opaque("raw", "uint8", 1, 1, 1, size))
        opened.append(pool)
        return TorchSlab(tensor_of(pool).view(torch.int8), device)

    yield make
    for pool in opened:
        pool.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8], ids=str)
def test_every_order_of_a_gpus_cache_is_proved_and_holds_the_same_canonical_bytes(rehearsed, dtype):
    found = set()
    for order in KVCacheLayout:
        slab = rehearsed(LAYERS * BLOCKS * HEADS * 16 * 2 * DIM * dtype.itemsize)
        caches = viewed(order, slab.tensor, dtype, 16)
        pool = proved_pool(caches, slab, rowed(16, kv_dtype="fp8" if dtype == torch.uint8 else "auto"), "m", SHARD)
        assert not slab.tensor.any() and pool.layout.addressable and pool.layout.blocks == BLOCKS
        assert pool.layout.token_bytes == LAYERS * 2 * HEADS * DIM * dtype.itemsize
        wanted = torch.arange(pool.layout.token_bytes, dtype=torch.int64).to(torch.uint8)
        pool.scatter([3], [7], [1], memoryview(wanted.numpy()))
        for cache, part in zip(caches, wanted.view(LAYERS, HEADS, -1), strict=True):
            assert torch.equal(cache[3, :, 7].contiguous().view(torch.uint8), part), order
        found.add(pool.layout.fingerprint)
        pool.close()
    assert len(found) == 1, "engines whose backends prefer other strides exchange bytes"


def test_blocks_that_a_kernel_divides_are_the_schedulers(rehearsed):
    slab = rehearsed(LAYERS * BLOCKS * HEADS * 64 * 2 * DIM * 2)
    caches = viewed(KVCacheLayout.LBNHC, slab.tensor, torch.bfloat16, 64, 16)
    pool = proved_pool(caches, slab, rowed(64), "m", SHARD)
    assert caches[0].shape[0] == 4 * BLOCKS and (pool.layout.blocks, pool.layout.block_tokens) == (BLOCKS, 64)
    assert not slab.tensor.any()
    pool.close()
    with pytest.raises(BadConfig, match="blocks of 64 tokens are divided into 16 each in a way that is no run. Try: --block-size 16"):
        proved_pool(viewed(KVCacheLayout.LBHNC, slab.tensor, torch.bfloat16, 64, 16), slab, rowed(64), "m", SHARD)


def test_a_gpus_backend_that_writes_elsewhere_is_refused(rehearsed):
    slab = rehearsed(LAYERS * BLOCKS * HEADS * 16 * 2 * DIM * 2)
    caches = viewed(KVCacheLayout.LBNHC, slab.tensor, torch.bfloat16, 16)
    with pytest.raises(Refused, match="which the layout doesn't name there"):
        proved_pool(caches, slab, rowed(16, mangled=True), "m", SHARD)
    with pytest.raises(BadConfig, match="FLASH_ATTN//nvfp4 is not in the registry"):
        proved_pool(caches, slab, rowed(16, kv_dtype="nvfp4"), "m", SHARD)
