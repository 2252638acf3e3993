"""A transformers Cache whose layers live in a shareable pool: what generate() reads and writes is what the node's daemon captures.

Knows: torch, transformers' layer interface, a model's KV shape, the pool's layout. Must not know: guards, steps, ids, how a generation is resumed.
Invariants: a layer hands attention the same shapes, and the same order of elements within a sequence and head, as the stock DynamicLayer; row r of a batch has
blocks [r * per_sequence, (r + 1) * per_sequence) and no others; what doesn't fit goes on in ordinary memory, and `placed` says so; a model with any other
kind of layer is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import xxhash
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from kvguard.device import open_device, proof
from kvguard.engine.tensors import computed_on, tensor_of
from kvguard.errors import Refused
from kvguard.format.layout import ITEMSIZE, Layout

BLOCK_TOKENS = 16
ORDER = "layer,kv,head,block,slot,dim"  # a head's positions lie one behind the other, as in the stock cache


class Shape(NamedTuple):
    """KV of one model, and room for `sequences` rows of `positions` each (a multiple of BLOCK_TOKENS)."""

    layers: int
    heads: int
    dim: int
    dtype: torch.dtype
    sequences: int
    positions: int

    @property
    def per_sequence(self) -> int:
        return self.positions // BLOCK_TOKENS


class ArenaLayer(DynamicLayer):
    """One layer. `home`: its (keys, values), each [sequences, heads, positions, dim] over the pool, or None once it has left the pool."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self._room = (keys, values)
        self.home: tuple[torch.Tensor, torch.Tensor] | None = self._room

    def begin(self, rows: int, length: int) -> None:
        """Back into the pool, whose first `rows` hold `length` positions already."""
        self.home = self._room
        self.dtype, self.device, self.is_initialized = self._room[0].dtype, self._room[0].device, True
        self.keys, self.values = (half[:rows, :, :length] for half in self._room)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Appends [rows, heads, count, dim] and returns all [rows, heads, length, dim]."""
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self._fits(key_states, end):
            self.home = None
            self.is_initialized = start > 0  # nothing is there yet: ordinary memory is of the type that comes, not of the pool's
            return super().update(key_states, value_states, *args, **kwargs)
        self.is_initialized, rows = True, key_states.shape[0]
        keys, values = self.home
        keys[:rows, :, start:end].copy_(key_states)
        values[:rows, :, start:end].copy_(value_states)
        self.keys, self.values = keys[:rows, :, :end], values[:rows, :, :end]
        return self.keys, self.values

    def _fits(self, states: torch.Tensor, end: int) -> bool:
        if self.home is None:
            return False
        room, rows = self.home[0], states.shape[0]
        alike = states.dtype == room.dtype and states.device == room.device and not states.requires_grad
        same_rows = not self.is_initialized or self.keys is None or not self.keys.numel() or self.keys.shape[0] == rows
        return alike and same_rows and rows <= room.shape[0] and end <= room.shape[2]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.home = None
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.home = None
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.home = None
        super().batch_select_indices(indices)


class ArenaCache(Cache):
    """All layers over one pool. `written(cache)` is called when the last layer of a forward pass has its keys and values, `pulse()` for those before.

    `memory`: the pool's, from engine.tensors.tensor_of.
    """

    def __init__(self, shape: Shape, memory: torch.Tensor, written: Callable[[ArenaCache], None], pulse: Callable[[], None]) -> None:
        super().__init__(layers=[ArenaLayer(keys, values) for keys, values in halves(shape, memory)])
        self._written, self._pulse = written, pulse

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        found = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == len(self.layers) - 1:
            self._written(self)
        else:
            self._pulse()
        return found

    def begin(self, rows: int, length: int = 0) -> None:
        """Rows [0, rows) of the pool, with `length` positions that are already there."""
        for layer in self.layers:
            layer.begin(rows, length)

    @property
    def placed(self) -> bool:
        """Whether everything is in the pool."""
        return all(layer.home is not None for layer in self.layers)


def halves(shape: Shape, memory: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """By layer, keys and values as [sequences, heads, positions, dim] over the pool's memory, uint8 [pool_bytes]."""
    parts = memory.view(shape.dtype).view(shape.layers, 2, shape.heads, shape.sequences, shape.positions, shape.dim)
    return [(layer[0].transpose(0, 1), layer[1].transpose(0, 1)) for layer in parts]


def layout_of(shape: Shape, identity: str) -> Layout:
    blocks = shape.sequences * shape.per_sequence
    return Layout.paged(identity, _name(shape.dtype), shape.layers, blocks, BLOCK_TOKENS, shape.heads, shape.dim, order=ORDER)


def shape_of(model, sequences: int, positions: int) -> Shape:
    """From the cache that transformers itself would make, and one token through the model. Raises Refused, naming what isn't supported."""
    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise Refused(f"{type(model).__name__} is an encoder-decoder: cross-attention has no place in the pool. Try: a decoder-only model")
    if model.training:
        raise Refused("the model is in training mode: dropout would draw from the random state. Try: model.eval()")
    devices = sorted({str(part.device) for part in model.state_dict().values()})
    if len(devices) > 1 or model.device.type not in ("cpu", "cuda") or model.device.index:
        raise Refused(f"the model is on {', '.join(devices)}: one pool is on a CPU or a process's first GPU. Try: model.to('cuda:0'), CUDA_VISIBLE_DEVICES")
    stock = DynamicCache(config=config)
    odd = sorted({type(layer).__name__ for layer in stock.layers if type(layer) is not DynamicLayer})
    if odd:
        raise Refused(f"{type(model).__name__} has layers of type {', '.join(odd)}: only full attention is supported. Try: it without protection")
    with torch.no_grad():
        model(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=model.device), past_key_values=stock, use_cache=True)
    found = {(tuple(part.shape), part.dtype) for layer in stock.layers for part in (layer.keys, layer.values)}
    if len(found) != 1:
        raise Refused(f"keys and values are of several shapes ({sorted(map(str, found))}): one is supported. Try: it without protection")
    ((_, heads, _, dim), dtype) = found.pop()
    if _name(dtype) not in ITEMSIZE:
        raise Refused(f"KV of type {_name(dtype)} is not supported. Try: float32, bfloat16 or float16")
    return Shape(len(stock.layers), heads, dim, dtype, sequences, -(-positions // BLOCK_TOKENS) * BLOCK_TOKENS)


def prove(shape: Shape, kind: str) -> None:
    """Raises Refused where the layout doesn't say what a layer writes. On a small pool of the same make, on a device of that kind: every byte is looked at."""
    small = shape._replace(sequences=2, positions=2 * BLOCK_TOKENS)
    layout = layout_of(small, "proof")
    pool = open_device(kind).allocate(layout)
    layers = [ArenaLayer(keys, values) for keys, values in halves(small, tensor_of(pool))]
    token = torch.full((2, small.heads, 1, small.dim), 1.0 / 3.0, dtype=small.dtype, device=computed_on(kind))

    def write_token(block: int, slot: int) -> None:
        row, index = divmod(block, small.per_sequence)
        for layer in layers:
            keys, values = (half[row : row + 1] for half in layer.home)
            alone = ArenaLayer(keys, values)
            alone.begin(1, index * BLOCK_TOKENS + slot)
            alone.update(token[:1], token[1:])

    for block in (0, small.per_sequence + 1):
        proof.prove(layout, getattr(pool, "memory", pool), write_token, block)
    del layers
    pool.close()


def identity_of(model) -> str:
    """Names configuration and weights, byte by byte: whoever restores this model's KV must have the same."""
    digest = xxhash.xxh3_64(model.config.to_json_string(use_diff=False).encode())
    for name, part in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
        digest.update(part.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().data)
    return f"{model.config.model_type}-{digest.hexdigest()}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
