"""What the gateway counts, as Prometheus metrics in a registry of its own.

Knows: names and labels. Must not know: who asks. Invariant: no label holds what a client chose, but for the names of request fields that the policy lists.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

STALL_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Counters:
    """One set per gateway."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own = {"registry": self.registry}
        self.requests = Counter("kvguard_gateway_requests", "Requests that ended, by how they were served and how they ended.", ["route", "outcome"], **own)
        self.refused = Counter("kvguard_gateway_refused", "Requests refused before they began.", ["reason"], **own)
        self.resumed = Counter("kvguard_gateway_resumed", "Answers that went on elsewhere, by where the engine says that their KV came from.", ["rung"], **own)
        self.unresumed = Counter("kvguard_gateway_unresumed", "Answers that ended in an error although they had begun, by why.", ["reason"], **own)
        self.unplaced = Counter("kvguard_gateway_unplaced", "Resume tokens that were not used, by why.", ["reason"], **own)
        self.lost = Counter("kvguard_gateway_lost", "Answers that an instance didn't go on with.", ["kind"], **own)
        self.stall = Histogram("kvguard_gateway_stall_seconds", "From a loss to the next token.", buckets=STALL_BUCKETS, **own)
        part = "What the stall was made of: fence, recovery, placing, first_token."
        self.stall_part = Histogram("kvguard_gateway_stall_part_seconds", part, ["part"], buckets=STALL_BUCKETS, **own)
        self.in_flight = Gauge("kvguard_gateway_in_flight", "Requests that are being served.", **own)
        self.bodies = Gauge("kvguard_gateway_bodies", "Requests whose bodies are arriving.", **own)
        self.bodies_bytes = Gauge("kvguard_gateway_bodies_bytes", "What they are counted with, of bodies_bytes_max.", **own)
        self.active = Gauge("kvguard_gateway_instance_active", "1 where an instance takes requests.", ["instance"], **own)

    def text(self) -> bytes:
        return generate_latest(self.registry)
