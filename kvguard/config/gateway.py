"""The settings of the gateway, `[gateway]`.

Knows: names, defaults and bounds. Must not know: where values come from, what they are used for.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvguard.config.setting import LEVELS, REQUIRED, setting
from kvguard.limits import KIB, MIB


@dataclass(frozen=True, kw_only=True)
class GatewayConfig:
    """`kvguard gateway`."""

    SECTION = "gateway"

    name: str = setting("gateway", "name", "this gateway's name among the coordinator's emitters; an instance has one emitter")
    listen: str = setting("http://127.0.0.1:8000", "url", "where clients reach the gateway; port 0 takes a free one")
    instances: tuple[str, ...] = setting(REQUIRED, "instances", 'the engine servers, each as "INSTANCE URL NODE": "llama-a http://10.0.0.1:8000 node-a"')
    tokenizer: str = setting(REQUIRED, "path", "the model's directory, or its tokenizer.json: text is made from token ids here")
    coordinator: str = setting("tcp://127.0.0.1:7400", "address", "the coordinator's address")
    chat: str = setting("followed", "word", "relayed: chats are never resumed; for servers with a reasoning parser", choices=("followed", "relayed"))
    seeded: str = setting("generator", "word", "how the engines draw seeded samples; only by position can they be resumed", choices=("generator", "position"))
    max_tokens_default: int = setting(0, "int", "max_new_tokens of the engines' generation config; 0: none, the context is the bound", 0, 1 << 24)
    in_flight_max: int = setting(256, "int", "requests at a time, counted when their bodies are whole; more are refused with 429", 1, 65536)
    body_bytes_max: int = setting(8 * MIB, "bytes", "of a request's body", 1024, 1 << 30)
    bodies_bytes_max: int = setting(64 * MIB, "bytes", "of all bodies that are arriving together; beyond it the oldest ends", 64 * KIB, 1 << 40)
    attempts: int = setting(4, "int", "how many instances in turn are asked to go on with one answer", 1, 64)
    fence_ms: int = setting(3000, "int", "how long a lost answer waits for the coordinator's fence, before it is computed again elsewhere", 0, 600_000)
    resume_ms: int = setting(10_000, "int", "how long a fenced answer waits for its resume token, and then for an active instance", 100, 600_000)
    connect_ms: int = setting(2000, "int", "to connect to an instance", 10, 600_000)
    idle_ms: int = setting(120_000, "int", "silence after which an instance has lost an answer; longer than queue and prefill take", 100, 86_400_000)
    client_ms: int = setting(60_000, "int", "how long a client may take to send its request, or not to read its answer", 100, 86_400_000)
    probe_ms: int = setting(500, "int", "between two looks at each instance's health", 10, 600_000)
    silence_ms: int = setting(5000, "int", "silence after which the coordinator takes this gateway for dead; never less than its emitter_ms", 500, 600_000)
    drain_ms: int = setting(60_000, "int", "how long SIGTERM waits for the answers that are under way", 0, 86_400_000)
    keys: str = setting("", "path", "file with this process's key and the peers that are allowed (`kvguard keys generate`); empty: no encryption")
    insecure: bool = setting(False, "bool", "true allows addresses off loopback without keys")
    log_level: str = setting("info", "word", "least severity that is logged", choices=LEVELS)
