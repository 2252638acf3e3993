"""vLLM's KV cache in memory that the daemon can map, and what its bytes mean.

Knows: torch tensors, how vLLM places layers in one slab, what its attention backends do inside a block. Must not know: schedulers, sequences, daemons.

Invariants
- A layout comes from the registry (backend, instruction set, KV dtype), with the strides of the tensors that the backend writes; an unknown one is refused.
- It is proved before it is used: one token is written by the backend's own code into a scratch copy of a few blocks, and exactly the bytes that the layout
  names may change; then into block 0 of the real pool, which vLLM never gives to anyone, and the same bytes must be found there.
- Scales of quantised KV, the instruction set and the dtype are part of the fingerprint: pools that differ in them don't exchange bytes.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from kvguard.device.host import HostDevice, HostPool
from kvguard.device.proof import prove
from kvguard.errors import BadConfig, Refused
from kvguard.format.layout import Layout, Region, Shard

SCRATCH_BLOCKS = 3


class Slab:
    """A sealed memfd of `size` bytes and its mapping as an int8 tensor."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.fd = os.memfd_create("kvguard-vllm-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self.memory = mmap.mmap(self.fd, size)
        self.tensor = torch.frombuffer(self.memory, dtype=torch.int8)

    def pool(self, layout: Layout) -> HostPool:
        """A pool over the same bytes. Raises Refused."""
        return HostDevice().open(layout, [os.dup(self.fd)])

    def close(self) -> None:
        os.close(self.fd)


class SlabContext(TorchFunctionMode):
    """While entered, the one torch.zeros of `size` int8 that vLLM makes its KV cache with is taken from a Slab. `slab`: None until then."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.slab: Slab | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = args[0] if args else kwargs.get("size")
        wanted = wanted[0] if isinstance(wanted, tuple | list | torch.Size) and len(wanted) == 1 else wanted
        if function is torch.zeros and self.slab is None and wanted == self.size and kwargs.get("dtype") is torch.int8:
            if torch.device(kwargs.get("device") or "cpu").type == "cpu":
                self.slab = Slab(self.size)
                return self.slab.tensor
        return function(*args, **kwargs)


class Attention(NamedTuple):
    """What decides how a block's bytes lie. `write(layer index, cache tensor, key, value, slots)`: the backend's own code."""

    backend: str
    isa: str
    kv_dtype: str
    head_dim: int
    compute_dtype: torch.dtype
    scales: tuple[tuple[float, float], ...]
    write: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], None]


# ---- the registry -----------------------------------------------------------------------------------------------------------------


class _Pages(NamedTuple):
    """Where the pages of all layers lie in a slab, in bytes: layer n's page of block b starts at first + n * layer_step + b * page_bytes."""

    first: int
    layer_step: int
    page_bytes: int
    layers: int
    heads: int
    tokens: int
    head_dim: int
    itemsize: int


def _column_keys(pages: _Pages) -> tuple[Region, ...]:
    """[head][K: dim, slot | V: slot, dim]: keys stand in columns, so a token is one element of every row; values stand in rows."""
    size, half = pages.itemsize, pages.tokens * pages.head_dim * pages.itemsize
    outer = (("layer", pages.layers, pages.layer_step), ("head", pages.heads, 2 * half))
    keys = Region("kv0", pages.first, pages.page_bytes, size, (*outer, ("dim", pages.head_dim, pages.tokens * size)))
    values = Region("kv1", pages.first + half, pages.page_bytes, pages.head_dim * size, (*outer, ("dim", pages.head_dim, size)))
    return keys, values


def _whole_pages(pages: _Pages) -> tuple[Region, ...]:
    """Packed in a way of the backend's own, within the page: a block travels whole."""
    return (Region("", pages.first, pages.page_bytes, 0, (("layer", pages.layers, pages.layer_step), ("byte", pages.page_bytes, 1))),)


_PLAIN, _FP8 = ("auto", "bfloat16", "float16"), ("fp8", "fp8_e4m3", "fp8_e5m2")
REGISTRY: dict[tuple[str, str, str], Callable[[_Pages], tuple[Region, ...]]] = {
    **{("CPU_ATTN", isa, dtype): _column_keys for isa in ("vec", "vec16") for dtype in _PLAIN},
    **{("CPU_ATTN", isa, dtype): _whole_pages for isa in ("amx", "neon", "vxe", "vsx", "rvv") for dtype in _PLAIN},
    **{("CPU_ATTN", isa, dtype): _whole_pages for isa in ("vec", "amx") for dtype in _FP8},
}


def layout_of(caches: list[torch.Tensor], slab: Slab, attention: Attention, model: str, shard: Shard) -> Layout:
    """The layout of layers' caches, each [blocks, heads, slots, 2 * dim], views of `slab`, which are `shard` of the model. Raises BadConfig: an unknown backend,
    other shapes."""
    make = REGISTRY.get((attention.backend, attention.isa, attention.kv_dtype))
    if make is None:
        known = ", ".join(sorted({f"{backend}/{isa}/{dtype}" for backend, isa, dtype in REGISTRY}))
        raise BadConfig(f"KV of {attention.backend}/{attention.isa}/{attention.kv_dtype} is not in the registry of layouts. Try: one of {known}")
    pages = _pages_of(caches, slab, attention.head_dim)
    regions = make(pages)
    addressable = regions[0].slot_stride > 0
    said = f"vllm {model} {attention.backend} {attention.isa} {attention.kv_dtype} {attention.compute_dtype}"
    if attention.kv_dtype in _FP8:
        said += f" {attention.scales}"
    dtype = str(caches[0].dtype).removeprefix("torch.")
    return Layout(
        said, dtype, pages.itemsize if addressable else 1, caches[0].shape[0], pages.tokens, regions, shard, addressable, slab.size,
    )  # fmt: skip


def _pages_of(caches: list[torch.Tensor], slab: Slab, head_dim: int) -> _Pages:
    """Raises BadConfig unless all layers are dense pages of one shape, at equal distances in the slab."""
    first, size = caches[0], caches[0].element_size()
    base = slab.tensor.data_ptr()
    places = [cache.data_ptr() - base for cache in caches]
    step = places[1] - places[0] if len(places) > 1 else slab.size
    alike = all(cache.shape == first.shape and cache.stride() == first.stride() and cache.dtype == first.dtype for cache in caches)
    if not alike or first.dim() != 4 or any(place != places[0] + n * step for n, place in enumerate(places)) or step <= 0 or places[0] < 0:
        raise BadConfig("the layers' KV caches are not equal pages at equal distances. Try: a model whose layers are all alike")
    _, heads, tokens, content = first.shape
    page_bytes = first.stride(0) * size
    if first.stride()[1:] != (tokens * content, content, 1) or page_bytes != heads * tokens * content * size or content != 2 * head_dim:
        raise BadConfig(f"KV pages of shape {tuple(first.shape)} with strides {first.stride()} are not dense [heads, slots, 2 * {head_dim}]")
    return _Pages(places[0], step, page_bytes, len(caches), heads, tokens, head_dim, size)


# ---- the proof --------------------------------------------------------------------------------------------------------------------


def proved_pool(caches: list[torch.Tensor], slab: Slab, attention: Attention, model: str, shard: Shard) -> HostPool:
    """The pool over vLLM's caches, its layout proved. Raises BadConfig, or Refused with what differed."""
    layout = layout_of(caches, slab, attention, model, shard)
    layout.check(slab.size)
    pages = _pages_of(caches, slab, attention.head_dim)
    scratch = Slab(SCRATCH_BLOCKS * pages.page_bytes * pages.layers)
    try:
        copies = [
            layer.view(caches[0].dtype).view(SCRATCH_BLOCKS, *caches[0].shape[1:])
            for layer in scratch.tensor.view(pages.layers, SCRATCH_BLOCKS * pages.page_bytes)
        ]
        small = layout_of(copies, scratch, attention, model, shard)
        if small.fingerprint != layout.fingerprint:
            raise Refused("the scratch blocks are of another layout than the pool")
        token = _Token(attention, pages)
        opened = scratch.pool(small)
        prove(small, opened.memory, lambda block, slot: token.write(copies, block, slot), block=1)
        pool = slab.pool(layout)
        _compare(token, copies, opened, caches, pool)
        opened.close()
        return pool
    finally:
        scratch.close()


class _Token:
    """One token's keys and values in every layer, always the same; bytes in all their variety."""

    def __init__(self, attention: Attention, pages: _Pages) -> None:
        generator = torch.Generator().manual_seed(20)
        shape = (pages.layers, 2, 1, pages.heads, pages.head_dim)
        self._values = torch.randn(shape, generator=generator, dtype=torch.float32).to(attention.compute_dtype)
        self._attention, self._tokens = attention, pages.tokens

    def write(self, caches: list[torch.Tensor], block: int, slot: int) -> None:
        slots = torch.tensor([block * self._tokens + slot], dtype=torch.int64)
        for layer, cache in enumerate(caches):
            key, value = self._values[layer]
            self._attention.write(layer, cache, key.contiguous(), value.contiguous(), slots)


def _compare(token: _Token, copies: list[torch.Tensor], small: HostPool, caches: list[torch.Tensor], pool: HostPool) -> None:
    """The same tokens in scratch and in block 0 of the real pool are the same canonical bytes. Block 0 is left as it was: zero."""
    layout = pool.layout
    slots = (0, layout.block_tokens - 1)
    for cache in copies:
        cache.zero_()
    try:
        for slot in slots:
            token.write(copies, 0, slot)
            token.write(caches, 0, slot)
        found = []
        for opened in (small, pool):
            out = memoryview(bytearray(layout.block_bytes))
            opened.capture_blocks([0], out)
            found.append(np.frombuffer(out, np.uint8))
        if not found[0].any() or not np.array_equal(*found):
            raise Refused("a token written to block 0 isn't where the layout says. Try: report the vLLM version and the backend")
    finally:
        for cache in caches:
            cache[0].zero_()


def attention_of(vllm_config: Any, layer_names: list[str]) -> Attention:
    """What vLLM really uses for these layers. Raises BadConfig where they differ, share KV, or are no plain attention layers."""
    layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
    faults = {f"{name} shares the KV of {layer.impl.kv_sharing_target_layer_name}" for name, layer in zip(layer_names, layers, strict=True)
              if getattr(layer.impl, "kv_sharing_target_layer_name", None)}  # fmt: skip
    kinds = {(layer.attn_backend.get_name(), getattr(layer, "isa", ""), layer.kv_cache_dtype, layer.head_size) for layer in layers}
    if len(kinds) != 1:
        faults.add(f"{len(kinds)} kinds of attention layers")
    if faults:
        raise BadConfig(f"kvguard can't protect this model: {'; '.join(sorted(faults))}")
    [(backend, isa, kv_dtype, head_dim)] = kinds
    scales = tuple((float(getattr(layer, "_k_scale_float", 1.0)), float(getattr(layer, "_v_scale_float", 1.0))) for layer in layers)

    def write(layer: int, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        layers[layer].impl.do_kv_cache_update(layers[layer], key, value, cache, slots)

    return Attention(backend, isa, str(kv_dtype), head_dim, vllm_config.model_config.dtype, scales, write)
