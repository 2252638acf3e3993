"""Attention over a paged KV pool: where a step's positions are written, what each of them reads, and the product itself.

Knows: block tables, slots, the pool's shape [layers, 2 (K, V), blocks, block_tokens, kv_heads, head_dim]. Must not know: families, weights,
rows of padding, other stages.
Invariants: every sequence is computed by itself, and outside a prompt every position by itself, with shapes that depend on its own position
alone: no other sequence and no other split of the same work can change a bit. All of a step's KV of a layer is written before any is read.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from kvguard.pipeline.batch import Batch, Share


def pool_shape(layers: int, blocks: int, block_tokens: int, kv_heads: int, head_dim: int) -> tuple[int, ...]:
    """The shape of a stage's pool: contiguous, so one position of one layer is two runs (K and V) of kv_heads * head_dim elements."""
    return (layers, 2, blocks, block_tokens, kv_heads, head_dim)


class Paging:
    """One step's addresses, made once and used by every layer.

    `slots`: int64 [rows], the slot (block * block_tokens + offset) that each row's KV goes to. `blocks`: int64, all shares' tables one after
    the other, cut to what the share reads. `group`: query heads per KV head; `dtype`, `device`: of queries. `by_position`: outside a prompt's chunk every
    position reads by itself, whatever the share's length.
    """

    def __init__(self, batch: Batch, group: int, dtype: torch.dtype, by_position: bool, device: torch.device):
        self.block_tokens = batch.block_tokens
        self.slots = torch.cat([_slots(share, batch.block_tokens) for share in batch.shares]).to(device)
        read = [share.blocks[: -(-share.span.end // batch.block_tokens)] for share in batch.shares]
        self.blocks = torch.tensor([block for table in read for block in table], dtype=torch.int64, device=device)
        self.reads: list[_Read] = []
        row = block = 0
        for share, table in zip(batch.shares, read):
            tokens = slice(block * batch.block_tokens, (block + len(table)) * batch.block_tokens)
            if share.prefill or not by_position:
                self.reads.append(_Read(row, share.count, tokens.start, share.span.end, _causal(share, group, dtype, device)))
            else:
                self.reads += [_Read(row + i, 1, tokens.start, share.span.start + i + 1, None) for i in range(share.count)]
            row += share.count
            block += len(table)


class _Read:
    """Rows [row, row + count) attend to gathered tokens [first, first + length)."""

    __slots__ = ("count", "first", "length", "mask", "row")

    def __init__(self, row: int, count: int, first: int, length: int, mask: torch.Tensor | None):
        self.row, self.count, self.first, self.length, self.mask = row, count, first, length, mask


def attend(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, layer_kv: torch.Tensor, paging: Paging, scale: float) -> torch.Tensor:
    """Writes `keys` and `values` [rows, kv_heads, head_dim] to their slots of `layer_kv` [2, blocks, block_tokens, kv_heads, head_dim], then
    returns what `queries` [rows, heads, head_dim] read, [rows, heads * head_dim]. Rows in the batch's order, without padding.
    """
    rows, heads, dim = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    layer_kv[0].view(-1, kv_heads, dim).index_copy_(0, paging.slots, keys)
    layer_kv[1].view(-1, kv_heads, dim).index_copy_(0, paging.slots, values)
    # One gather for all sequences: [2, kv_heads, tokens, head_dim] seen through strides.
    past = layer_kv.index_select(1, paging.blocks).view(2, -1, kv_heads, dim).transpose(1, 2)
    grouped = queries.view(rows, kv_heads, group, dim)
    out = torch.empty_like(grouped)
    for read in paging.reads:
        window = past[:, :, read.first:read.first + read.length].unsqueeze(1)
        if read.count == 1:
            # The heads of a group stand where query positions would: they read the same keys.
            out[read.row] = scaled_dot_product_attention(grouped[read.row].unsqueeze(0), window[0], window[1], scale=scale)[0]
            continue
        asked = grouped[read.row:read.row + read.count].permute(1, 2, 0, 3).reshape(1, kv_heads, group * read.count, dim)
        found = scaled_dot_product_attention(asked, window[0], window[1], attn_mask=read.mask, scale=scale)
        out[read.row:read.row + read.count] = found.view(kv_heads, group, read.count, dim).permute(2, 0, 1, 3)
    return out.view(rows, heads * dim)


def _slots(share: Share, block_tokens: int) -> torch.Tensor:
    positions = torch.arange(share.span.start, share.span.end)
    table = torch.tensor(share.blocks, dtype=torch.int64)
    return table[positions // block_tokens] * block_tokens + positions % block_tokens


def _causal(share: Share, group: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """What is added to scores, [group * count, end]: 0 where position p reads [0, p], else minus infinity. None where one position reads all."""
    if share.count == 1:
        return None
    positions = torch.arange(share.span.start, share.span.end)
    beyond = torch.arange(share.span.end)[None, :] > positions[:, None]
    return torch.zeros(beyond.shape, dtype=dtype).masked_fill_(beyond, float("-inf")).repeat(group, 1).to(device)
