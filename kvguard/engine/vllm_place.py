"""Which rank of its instance a vLLM worker is, and which shard of the model's KV it holds.

Knows: vLLM's configuration objects by attribute, names of attention layers. Must not know: torch, pools, guards, process groups.

Invariants
- Ranks that hold equal bytes, and no others, name equal shards, and say that they are shared: every tensor-parallel rank of a model with latent attention, and
  groups of them where a model has fewer KV heads than ranks, in the order in which vLLM gives heads out.
- The shards of all ranks cover the model; a stage whose layers aren't one run of it is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from kvguard.errors import BadConfig
from kvguard.format.layout import Part, Shard
from kvguard.types import Rank


class Place(NamedTuple):
    rank: Rank
    shard: Shard


def place_of(vllm_config: Any, layer_names: list[str], pp: int, tp: int) -> Place:
    """Of the worker `tp` of stage `pp`, whose KV belongs to `layer_names`. Raises BadConfig: layers or heads that are no plain part of the model."""
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    layers = _layers(layer_names, model.get_total_num_hidden_layers() if parallel.pipeline_parallel_size > 1 else 0)
    if getattr(model, "use_mla", False):
        return Place(Rank(0, pp, tp), Shard(layers, (0, 1, 1), shared=True))
    total, ranks = model.get_total_num_kv_heads(), parallel.tensor_parallel_size
    return Place(Rank(0, pp, tp), Shard(layers, heads_of(total, ranks, tp), shared=total < ranks))


def heads_of(total: int, ranks: int, tp: int) -> Part:
    """KV heads of rank `tp` of `ranks`: an equal share, or one that ranks / total neighbours hold alike. Raises BadConfig where neither comes out even."""
    if total >= ranks and total % ranks == 0:
        share = total // ranks
        return (tp * share, (tp + 1) * share, total)
    if total < ranks and ranks % total == 0:
        head = tp // (ranks // total)
        return (head, head + 1, total)
    raise BadConfig(f"{total} KV heads can't be shared evenly by {ranks} tensor-parallel ranks. Try: another tensor_parallel_size")


def _layers(names: list[str], total: int) -> Part:
    """`total` 0: of an engine whose only stage holds them all, whatever they are called."""
    if not total:
        return (0, len(names), len(names))
    numbers = [_number(name) for name in names]
    if not numbers or numbers != list(range(numbers[0], numbers[0] + len(numbers))) or numbers[-1] >= total:
        raise BadConfig(f"a stage's layers are {numbers} of {total}, not one run of them. Try: pipeline_parallel_size 1")
    return (numbers[0], numbers[-1] + 1, total)


def _number(name: str) -> int:
    found = [int(part) for part in name.split(".") if part.isdigit()]
    if len(found) != 1:
        raise BadConfig(f"attention layer {name!r} doesn't say which layer of the model it is. Try: pipeline_parallel_size 1")
    return found[0]
