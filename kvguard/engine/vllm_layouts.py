"""What the bytes of vLLM's KV cache mean: a registry by attention backend, instruction set and KV dtype, and the strides of the backend's tensors.

Knows: caches by shape, strides and address; what backends do inside a block. Must not know: torch, memory, how a layout is proved, sequences.

Invariants
- A layout comes from the registry, with the tensors' own strides; what isn't there, or doesn't lie as its entry needs it, is refused.
- Scales of quantised KV, the instruction set and the dtype are part of the fingerprint: pools that differ in them don't exchange bytes.
- A block is what vLLM's scheduler calls one, also where a kernel divides it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from kvguard.errors import BadConfig
from kvguard.format.layout import Layout, Region, Shard


class Attention(NamedTuple):
    """What decides how a block's bytes lie. `scales`: of each layer, those of K and then those of V. `row`: elements of one head and token, K and V side by
    side or one latent vector. `block_tokens`: the scheduler's. `write(layer index, cache tensor, rows [tokens, heads, row], slots)`: the backend's own code.
    """

    backend: str
    isa: str
    kv_dtype: str
    row: int
    compute_dtype: Any
    scales: tuple[tuple[float, ...], ...]
    block_tokens: int
    write: Callable[[int, Any, Any, Any], None]


class Pages(NamedTuple):
    """Where the pages of all layers lie, in bytes: head h, slot s of block b in layer n begins at first + n * layer_step + b * block_step + h * head_step +
    s * slot_step, and is `row` elements. `divided`: into how many of the kernel's blocks.
    """

    first: int
    layer_step: int
    block_step: int
    head_step: int
    slot_step: int
    layers: int
    blocks: int
    heads: int
    tokens: int
    row: int
    itemsize: int
    divided: int = 1

    @property
    def page_bytes(self) -> int:
        """Of one layer's block, where nothing lies between."""
        return self.heads * self.tokens * self.row * self.itemsize


def column_keys(pages: Pages) -> tuple[Region, ...]:
    """[head][K: dim, slot | V: slot, dim]: keys stand in columns, so a token is one element of every row; values stand in rows."""
    _dense(pages)
    size, dim = pages.itemsize, pages.row // 2
    half = pages.tokens * dim * size
    outer = (("layer", pages.layers, pages.layer_step), ("head", pages.heads, 2 * half))
    keys = Region("kv0", pages.first, pages.page_bytes, size, (*outer, ("dim", dim, pages.tokens * size)))
    values = Region("kv1", pages.first + half, pages.page_bytes, dim * size, (*outer, ("dim", dim, size)))
    return keys, values


def whole_pages(pages: Pages) -> tuple[Region, ...]:
    """Packed in a way of the backend's own, within the page: a block travels whole."""
    _dense(pages)
    return (Region("", pages.first, pages.page_bytes, 0, (("layer", pages.layers, pages.layer_step), ("byte", pages.page_bytes, 1))),)


def rows(pages: Pages) -> tuple[Region, ...]:
    """One head's K and V of a token in a row, or its latent vector, wherever heads, slots, layers stand (vLLM's LBHNC, LBNHC, LHBNC, BLHNC, BLNHC, BHLNC)."""
    inner = (("layer", pages.layers, pages.layer_step), ("head", pages.heads, pages.head_step), ("dim", pages.row, pages.itemsize))
    return (Region("", pages.first, pages.block_step, pages.slot_step, inner),)


def _dense(pages: Pages) -> None:
    """Raises BadConfig unless a block is one run of bytes, heads outside, slots inside."""
    row = pages.row * pages.itemsize
    if (pages.head_step, pages.slot_step, pages.block_step, pages.divided) != (pages.tokens * row, row, pages.page_bytes, 1):
        raise BadConfig(f"KV pages of {pages.heads} heads, {pages.tokens} slots aren't dense [heads, slots, {pages.row}]. Try: another --block-size")


_PLAIN, FP8 = ("auto", "bfloat16", "float16"), ("fp8", "fp8_e4m3", "fp8_e5m2")
_ON_GPU = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN")
_LATENT = ("CPU_MLA", "TRITON_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "CUTLASS_MLA", "FLASHINFER_MLA")
REGISTRY: dict[tuple[str, str, str], Callable[[Pages], tuple[Region, ...]]] = {
    **{("CPU_ATTN", isa, dtype): column_keys for isa in ("vec", "vec16") for dtype in _PLAIN},
    **{("CPU_ATTN", isa, dtype): whole_pages for isa in ("amx", "neon", "vxe", "vsx", "rvv") for dtype in _PLAIN},
    **{("CPU_ATTN", isa, dtype): whole_pages for isa in ("vec", "amx") for dtype in FP8},
    **{(backend, "", dtype): rows for backend in _ON_GPU for dtype in (*_PLAIN, *FP8)},
    **{(backend, "", dtype): rows for backend in _LATENT for dtype in _PLAIN},
}


def layout_of(caches: list[Any], address: int, size: int, attention: Attention, model: str, shard: Shard) -> Layout:
    """The layout of layers' caches, each [blocks, heads, slots, row], in `size` bytes at `address`, which are `shard` of the model. Raises BadConfig."""
    make = REGISTRY.get((attention.backend, attention.isa, attention.kv_dtype))
    if make is None:
        known = ", ".join(sorted({"/".join(filter(None, key)) for key in REGISTRY}))
        raise BadConfig(f"KV of {attention.backend}/{attention.isa}/{attention.kv_dtype} is not in the registry of layouts. Try: one of {known}")
    pages = pages_of(caches, address, size, attention)
    regions = make(pages)
    addressable = regions[0].slot_stride > 0
    said = f"vllm {model} {attention.backend} {attention.isa} {attention.kv_dtype} {attention.compute_dtype}"
    if attention.kv_dtype in FP8:
        said += f" {attention.scales}"
    dtype = str(caches[0].dtype).removeprefix("torch.")
    return Layout(said, dtype, pages.itemsize if addressable else 1, pages.blocks, pages.tokens, regions, shard, addressable, size)


def pages_of(caches: list[Any], address: int, size: int, attention: Attention) -> Pages:
    """Raises BadConfig unless all layers are pages of one shape, at equal distances, and blocks can be told apart."""
    first, itemsize = caches[0], caches[0].element_size()
    places = [cache.data_ptr() - address for cache in caches]
    step = places[1] - places[0] if len(places) > 1 else size
    alike = all(cache.shape == first.shape and cache.stride() == first.stride() and cache.dtype == first.dtype for cache in caches)
    if not alike or first.dim() != 4 or any(place != places[0] + n * step for n, place in enumerate(places)) or step <= 0 or places[0] < 0:
        raise BadConfig("the layers' KV caches are not equal pages at equal distances. Try: a model whose layers are all alike")
    blocks, heads, tokens, content = first.shape
    block_step, head_step, slot_step, element = (stride * itemsize for stride in first.stride())
    if content != attention.row or element != itemsize:
        raise BadConfig(f"KV pages of shape {tuple(first.shape)} with strides {first.stride()} don't hold rows of {attention.row}. Try: another backend")
    divided = attention.block_tokens // tokens
    if divided * tokens != attention.block_tokens or blocks % divided or (divided > 1 and block_step != tokens * slot_step):
        raise BadConfig(f"blocks of {attention.block_tokens} tokens are divided into {tokens} each in a way that is no run. Try: --block-size {tokens}")
    sizes = (len(caches), blocks // divided, heads, attention.block_tokens, attention.row, itemsize, divided)
    return Pages(places[0], step, block_step * divided, head_step, slot_step, *sizes)
