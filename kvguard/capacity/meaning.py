"""From measured rates to what they protect: tokens a second, and how long a prompt takes.

Knows: rows of machine.py and link.py. Must not know: how they were measured, clocks.
Invariants: pure. A side's rate is that of its deeds one after the other, because one thread of a daemon does them all; the slower side decides. It is a bound
from above: a daemon also looks at tables, answers, and shares its cores with an engine.
"""

from __future__ import annotations

PROMPT_TOKENS = 4096
FRAME_BYTES = 1 << 20
# Bytes a token over all layers: 2 (K, V) x layers x KV heads x head size x bytes an element; MLA one latent vector a layer.
SHAPES = (
    ("8B, 32 layers, 8 KV heads, 16 bit", 131072), ("32B, 64 layers, 8 KV heads, 16 bit", 262144), ("70B, 80 layers, 8 KV heads, 16 bit", 327680),
    ("671B, MLA, 61 layers, 16 bit", 70272),
)  # fmt: skip


def in_turn(*rates: float) -> float:
    """GB/s of bytes that go through all of these, one after the other."""
    return 1.0 / sum(1.0 / rate for rate in rates)


def means(machine: dict, link: dict, bytes_per_token: int | None) -> dict:
    """`bytes_per_token`: of the operator's model over all ranks that share a daemon; None: a few usual ones."""
    deeds = {row["what"]: row["gb_s"] for row in machine["rows"]}
    carried = next(row for row in link["rows"] if row["frame_bytes"] == FRAME_BYTES)["bulk_gb_s"]
    sides = {
        "sender": in_turn(deeds["capture, decode"], deeds["checksum"], carried), "holder": in_turn(carried, deeds["arena append"]),
    }  # fmt: skip
    slower = min(sides, key=lambda side: sides[side])
    rate = sides[slower] * 1e9
    rows = [
        {"model": name, "bytes_per_token": size, "tokens_per_s": rate / size, "prompt_tokens": PROMPT_TOKENS, "prompt_ms": PROMPT_TOKENS * size / rate * 1e3}
        for name, size in ([("yours", bytes_per_token)] if bytes_per_token else SHAPES)
    ]
    return {"sender_gb_s": sides["sender"], "holder_gb_s": sides["holder"], "gb_s": sides[slower], "bound_by": slower, "rows": rows}
