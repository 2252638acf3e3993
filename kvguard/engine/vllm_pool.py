"""vLLM's KV cache in memory that the daemon can map, and the proof of what its bytes mean.

Knows: torch tensors, where vLLM makes its KV cache, what its attention layers are. Must not know: schedulers, sequences, daemons.

Invariants
- A layout is proved before it is used: one token is written by the backend's own code into a scratch copy of a few blocks, and exactly the bytes that the
  layout names may change; then into block 0 of the real pool, which vLLM never gives to anyone, and the same bytes must be found there.
- A cache in host memory is made in a sealed memfd; one on a GPU is torch's own, of which the daemon is given a handle.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from kvguard.device import open_device
from kvguard.device.host import Copies, HostDevice
from kvguard.device.proof import prove
from kvguard.engine.vllm_layouts import Attention, layout_of
from kvguard.errors import BadConfig, Refused
from kvguard.format.layout import Layout, Shard

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

    def pool(self, layout: Layout):
        """A pool over the same bytes. Raises Refused."""
        return HostDevice().open(layout, [os.dup(self.fd)])

    def close(self) -> None:
        os.close(self.fd)


class TorchSlab:
    """A KV cache that torch has allocated on a GPU, as an int8 tensor. `device`: what shares it (device.cuda.CudaDevice)."""

    def __init__(self, tensor: torch.Tensor, device: Any = None) -> None:
        self.tensor, self.size = tensor, tensor.numel()
        self._device = device or open_device("cuda")

    def pool(self, layout: Layout):
        """A pool over torch's memory, which is told on which stream torch launches. Raises BadConfig, Refused: no GPU, memory that can't be shared."""
        if self.tensor.device.type == "cpu":
            return self._device.share(layout, self.tensor.data_ptr())
        gpu = self.tensor.device
        pool = self._device.share(layout, self.tensor.data_ptr(), gpu.index or 0)
        pool.current = lambda: torch.cuda.current_stream(gpu).cuda_stream
        return pool

    def close(self) -> None:
        """The memory is torch's."""


class SlabContext(TorchFunctionMode):
    """While entered, the one torch.zeros of `size` int8 that vLLM makes its KV cache with: in host memory it comes from a Slab, on a GPU it stays torch's.
    `slab`: None until then."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.slab: Slab | TorchSlab | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = args[0] if args else kwargs.get("size")
        wanted = wanted[0] if isinstance(wanted, tuple | list | torch.Size) and len(wanted) == 1 else wanted
        if function is torch.zeros and self.slab is None and wanted == self.size and kwargs.get("dtype") is torch.int8:
            kind = torch.device(kwargs.get("device") or "cpu").type
            if kind == "cpu":
                self.slab = Slab(self.size)
            elif kind == "cuda":
                self.slab = TorchSlab(function(*args, **kwargs))
            if self.slab is not None:
                return self.slab.tensor
        return function(*args, **kwargs)


# ---- the proof --------------------------------------------------------------------------------------------------------------------


def proved_pool(caches: list[torch.Tensor], slab: Slab | TorchSlab, attention: Attention, model: str, shard: Shard):
    """The pool over vLLM's caches, its layout proved. Raises BadConfig, or Refused with what differed."""
    layout = layout_of(caches, slab.tensor.data_ptr(), slab.size, attention, model, shard)
    layout.check(slab.size)
    size, shape, strides, step = _scratch_of(caches, layout.blocks)
    scratch = _Scratch(size, caches[0].device)
    copies = [scratch.tensor.view(caches[0].dtype).as_strided(shape, strides, layer * step) for layer in range(len(caches))]
    small = layout_of(copies, scratch.tensor.data_ptr(), size, attention, model, shard)
    if small.fingerprint != layout.fingerprint:
        raise Refused("the scratch blocks are of another layout than the pool")
    token = _Token(attention, caches[0])
    prove(small, scratch.memory, lambda block, slot: scratch.exchange(lambda: token.write(copies, block, slot)), block=1)
    pool = slab.pool(layout)
    try:
        _compare(token, copies, Copies(small, scratch.memory), scratch, caches, pool)
    except BaseException:
        pool.close()
        raise
    return pool


def _scratch_of(caches: list[torch.Tensor], blocks: int) -> tuple[int, tuple[int, ...], tuple[int, ...], int]:
    """(bytes, shape, strides, distance of layers in elements) of SCRATCH_BLOCKS blocks that lie as the caches do. Raises BadConfig."""
    first = caches[0]
    itemsize, block_step, kernel_blocks = first.element_size(), first.stride(0), first.shape[0]
    step = (caches[1].data_ptr() - first.data_ptr()) // itemsize if len(caches) > 1 else 0
    few = SCRATCH_BLOCKS * kernel_blocks // blocks

    def shrunk(stride: int) -> int:
        if stride <= block_step:
            return stride
        if stride % kernel_blocks:
            raise BadConfig(f"a stride of {stride} over {kernel_blocks} KV blocks is no multiple of them. Try: report the vLLM version and the backend")
        return stride // kernel_blocks * few

    shape, strides = (few, *first.shape[1:]), tuple(shrunk(stride) for stride in first.stride())
    end = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + (len(caches) - 1) * shrunk(step)
    return end * itemsize, shape, strides, shrunk(step)


class _Scratch:
    """`size` bytes that a backend writes on its own device (`tensor`, uint8) and a proof sees in host memory (`memory`): the same ones on a CPU."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = memoryview(bytearray(size))
        self._seen = torch.frombuffer(self.memory, dtype=torch.uint8)
        self.tensor = self._seen if device.type == "cpu" else torch.zeros(size, dtype=torch.uint8, device=device)

    def exchange(self, write: Callable[[], None]) -> None:
        """What the proof made of the memory is there when `write` runs; what `write` made of it is seen afterwards."""
        self.tensor.copy_(self._seen)
        write()
        self._seen.copy_(self.tensor)


class _Token:
    """One token's keys and values in every layer, always the same; bytes in all their variety."""

    def __init__(self, attention: Attention, cache: torch.Tensor) -> None:
        self._attention, self._heads = attention, cache.shape[1]
        self._device = cache.device

    def write(self, caches: list[torch.Tensor], block: int, slot: int) -> None:
        generator = torch.Generator().manual_seed(20)
        slots = torch.tensor([block * self._attention.block_tokens + slot], dtype=torch.int64, device=self._device)
        for layer, cache in enumerate(caches):
            values = torch.randn((1, self._heads, self._attention.row), generator=generator, dtype=torch.float32)
            self._attention.write(layer, cache, values.to(self._device, self._attention.compute_dtype), slots)


def _compare(token: _Token, copies: list[torch.Tensor], small: Copies, scratch: _Scratch, caches: list[torch.Tensor], pool: Any) -> None:
    """The same tokens in scratch and in block 0 of the real pool are the same canonical bytes. Block 0 is left as it was: zero."""
    layout = pool.layout

    def write(into: list[torch.Tensor]) -> None:
        for cache in copies if into is copies else ():
            cache.zero_()
        for slot in (0, layout.block_tokens - 1):
            token.write(into, 0, slot)

    try:
        scratch.exchange(lambda: write(copies))
        write(caches)
        found = []
        for opened in (small, pool):
            out = memoryview(bytearray(layout.block_bytes))
            opened.capture_blocks([0], out)
            found.append(np.frombuffer(out, np.uint8))
        if not found[0].any() or not np.array_equal(*found):
            raise Refused("a token written to block 0 isn't where the layout says. Try: report the vLLM version and the backend")
    finally:
        for cache in caches:
            cache[: caches[0].shape[0] // layout.blocks].zero_()


def attention_of(vllm_config: Any, layer_names: list[str]) -> Attention:
    """What vLLM really uses for these layers. Raises BadConfig where they differ, share KV, or are no plain attention layers."""
    layers = [vllm_config.compilation_config.static_forward_context[name] for name in layer_names]
    faults = {f"{name} shares the KV of {layer.impl.kv_sharing_target_layer_name}" for name, layer in zip(layer_names, layers, strict=True)
              if getattr(layer.impl, "kv_sharing_target_layer_name", None)}  # fmt: skip
    kinds = {
        (layer.attn_backend.get_name(), getattr(layer, "isa", ""), layer.kv_cache_dtype, layer.head_size, getattr(layer, "kv_lora_rank", 0)) for layer in layers
    }
    if len(kinds) != 1:
        faults.add(f"{len(kinds)} kinds of attention layers")
    if faults:
        raise BadConfig(f"kvguard can't protect this model: {'; '.join(sorted(faults))}")
    [(backend, isa, kv_dtype, head_dim, latent)] = kinds
    scales = tuple((*_scales_of(layer, "_k_scale"), *_scales_of(layer, "_v_scale")) for layer in layers)

    def write(layer: int, cache: torch.Tensor, rows: torch.Tensor, slots: torch.Tensor) -> None:
        module = layers[layer]
        if latent:
            vectors, rotary = rows[:, 0, :latent].contiguous(), rows[:, :, latent:].contiguous()
            module.impl.do_kv_cache_update(vectors, rotary, cache, slots, str(kv_dtype), getattr(module, "_k_scale", None))
        else:
            key, value = rows.split(head_dim, dim=-1)
            module.impl.do_kv_cache_update(module, key.contiguous(), value.contiguous(), cache, slots)

    tokens, row = vllm_config.cache_config.block_size, head_dim if latent else 2 * head_dim
    return Attention(backend, isa, str(kv_dtype), row, vllm_config.model_config.dtype, scales, tokens, write)


def _scales_of(layer: Any, name: str) -> tuple[float, ...]:
    """One for the tensor, or one for each head, of which vLLM's own number is the largest alone."""
    tensor = getattr(layer, name, None)
    return (float(getattr(layer, f"{name}_float", 1.0)),) if tensor is None or tensor.numel() < 2 else tuple(tensor.flatten().tolist())
