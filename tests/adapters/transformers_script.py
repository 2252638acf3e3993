"""A user's script: a tiny model with random weights, generate(), and what came of it as JSON lines. Killed and started again, it goes on.

    python transformers_script.py CALL SOCKET COORDINATOR

Knows: the adapter's public calls. Must not know: daemons. Says {"token": n} for every token that it has been shown; with `hold_at` n it stands still there.
"""

from __future__ import annotations

import json
import sys

import torch
import xxhash
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.generation.streamers import BaseStreamer

VOCABULARY = 311


def tiny(family: str, seed: int = 7):
    torch.manual_seed(seed)
    if family == "llama":
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=256, eos_token_id=2, **sizes)).eval()
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=256, n_embd=48, n_layer=3, n_head=3, bos_token_id=1, eos_token_id=2)).eval()


def device_of(call: dict) -> str:
    """Where the model is; the pool of a rehearsed one is by a GPU's code, too."""
    return "cuda" if call.get("device") == "cuda" else "cpu"


def inputs(rows: int, columns: int, padded: bool) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(100 * rows + columns)
    ids = torch.randint(3, VOCABULARY, (rows, columns), generator=made)
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        mask[row, : 2 * row] = 0
        ids[row, : 2 * row] = 0
    return {"input_ids": ids, "attention_mask": mask}


def after(call: dict) -> dict:
    """A criterion of the script's own: it stops behind an id."""
    return {"stopping_criteria": [lambda ids, scores, **_: ids[:, -1] == call["after"]]} if "after" in call else {}


def say(document: dict) -> None:
    print(json.dumps(document), flush=True)


class Shown(BaseStreamer):
    """Says how many tokens a reader of the answer has seen."""

    def __init__(self, hold_at: int) -> None:
        self.hold_at, self.count = hold_at, -1  # the first put is the prompt

    def put(self, value) -> None:
        self.count += 1
        if self.count:
            say({"token": self.count, "ids": value.flatten().tolist()})
        if self.count == self.hold_at:
            sys.stdin.readline()

    def end(self) -> None:
        say({"end": self.count})


def sums_of(cache) -> list[str]:
    """By column, xxh3 of all layers' keys and values of all rows."""
    whole = torch.stack([torch.stack((layer.keys, layer.values)) for layer in cache.layers])  # [layers, 2, rows, heads, columns, dim]
    columns = whole.movedim(4, 0).contiguous().flatten(1).view(torch.uint8).cpu().numpy()
    return [xxhash.xxh3_64_hexdigest(column.data) for column in columns]


def result(output, cache, **more) -> dict:
    logits = [xxhash.xxh3_64_hexdigest(step.contiguous().view(torch.uint8).cpu().numpy().data) for step in output.logits]
    return {"sequences": output.sequences.tolist(), "logits": logits, "kv": sums_of(cache), **more}


def on(device: str, given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in given.items()}


def plain(call: dict) -> dict:
    """The same call with the stock cache."""
    model, cache = tiny(call["family"]).to(device_of(call)), DynamicCache()
    given = on(device_of(call), inputs(call["rows"], call["columns"], call["padded"]))
    torch.manual_seed(11)
    return result(model.generate(**given, past_key_values=cache, **call["options"], **after(call)), cache)


def protected(call: dict, socket: str, coordinator: str) -> None:
    from kvguard.engine.transformers import protect

    sizes = {"sequences": 4, "positions": 200, "device": call.get("device", ""), **call.get("sizes", {})}
    model, instance = tiny(call["family"]).to(device_of(call)), call.get("instance", "essay")
    guarded = protect(model, instance, coordinator, socket=socket, wait_s=call.get("wait_s", 60.0), **sizes)
    say({"joined": bool(guarded.earlier), "unprotected": guarded.unprotected})
    streamer = Shown(call["hold_at"])
    output = guarded.resume(streamer=streamer, **after(call))
    if output is None:
        given = on(device_of(call), inputs(call["rows"], call["columns"], call["padded"]))
        torch.manual_seed(11)
        output = guarded.generate(**given, streamer=streamer, **call["options"], **after(call))
    recovered = {"resumed_at": guarded.resumed_at, "recomputed": guarded.recomputed, "timing_ms": guarded.joined.timing_ms}
    rungs = sorted({token.rung for token in guarded.joined.earlier})
    say(result(output, guarded.cache, unprotected=guarded.unprotected, rungs=rungs, **recovered))
    guarded.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    protected(json.loads(sys.argv[1]), *sys.argv[2:])
