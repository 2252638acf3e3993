"""A user's script: a tiny model, generate_batch(), and what came of it as JSON lines. Killed and started again, it goes on.

    python continuous_script.py CALL SOCKET COORDINATOR

Knows: the adapter's public calls. Must not know: daemons. Says {"step": n} ahead of the forward pass that follows n others; with `hold_at` n it stands still there.
"""

from __future__ import annotations

import json
import sys

import torch
import xxhash
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers_script import VOCABULARY, say, tiny


def prompts(lengths: list[int]) -> list[list[int]]:
    made = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCABULARY, (length,), generator=made).tolist() for length in lengths]


def sum_of(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().view(torch.uint8).cpu().numpy().data)


class Watched:
    """Every forward pass: its logits, and all KV that its requests have by then, layer by layer."""

    def __init__(self, model, hold_at: int = -1, says: bool = False) -> None:
        self.logits, self.kv = [], []
        self.hold_at, self.says = hold_at, says
        self.hooks = [model.register_forward_pre_hook(self.before), model.register_forward_hook(self.after, with_kwargs=True)]

    def before(self, model, positional) -> None:
        if self.says:
            say({"step": len(self.logits)})
        if len(self.logits) == self.hold_at:
            sys.stdin.readline()

    def after(self, model, positional, named, output) -> None:
        cache, read, written = named["cache"], named["read_index"][0], named["write_index"][0]
        index = read if read.numel() else written
        halves = [half[index] for allocator in cache.cache_allocators.values() for pair in allocator._kv_token_views.values() for half in pair]
        self.logits.append(sum_of(output.logits))
        self.kv.append(sum_of(torch.stack(halves)))

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


def answers(outputs: dict) -> dict:
    return {name: [output.prompt_ids, output.generated_tokens, output.error] for name, output in outputs.items()}


def plain(call: dict) -> dict:
    """The same call by transformers alone."""
    model = tiny(call["family"])
    watched = Watched(model)
    settings = ContinuousBatchingConfig(page_size=16, num_blocks=200, max_batch_tokens=call["batch"], allow_block_sharing=False, safety_margin=0.0)
    config = GenerationConfig(max_new_tokens=call["new"], do_sample=False, eos_token_id=call.get("ends", 2))
    outputs = model.generate_batch(prompts(call["prompts"]), generation_config=config, continuous_batching_config=settings)
    return {"answers": answers(outputs), "logits": watched.logits, "kv": watched.kv}


def protected(call: dict, socket: str, coordinator: str) -> None:
    from kvguard.engine.continuous import protect

    model = tiny(call["family"])
    sizes = {"requests": 4, "positions": 160, **call.get("sizes", {})}
    guarded = protect(model, "digests", coordinator, socket=socket, wait_s=60.0, **sizes)
    say({"joined": bool(guarded.earlier), "unprotected": guarded.unprotected, "positions": [token.position for token in guarded.earlier]})
    watched = Watched(model, call["hold_at"], says=True)
    outputs = guarded.resume()
    if outputs is None:
        config = GenerationConfig(max_new_tokens=call["new"], eos_token_id=call.get("ends", 2))
        outputs = guarded.generate_batch(prompts(call["prompts"]), config, max_batch_tokens=call["batch"])
    rungs = sorted({token.rung for token in guarded.joined.earlier})
    counts = {"resumed_at": guarded.resumed_at, "recomputed": guarded.recomputed, "rungs": rungs, "unprotected": guarded.unprotected}
    say({"answers": answers(outputs), "logits": watched.logits, "kv": watched.kv, **counts})
    guarded.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    protected(json.loads(sys.argv[1]), *sys.argv[2:])
