"""What Prometheus reads: the figures of a node or of the coordinator, as metric families.

Knows: the names of interfaces.md, counters and documents that exist anyway. Must not know: HTTP (scrape.py), decisions.
Invariants: reading changes nothing; no sequence id and no other unbounded word becomes a label; a counter never falls while its process lives; what can't be
known is left out, never guessed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from kvguard import __version__
from kvguard.core.coordinator import Coordinator
from kvguard.core.node import Node
from kvguard.daemon.drilled import Drilled
from kvguard.daemon.measure import Histogram, Measures
from kvguard.daemon.perform import Shell
from kvguard.daemon.perform_node import NodeShell
from kvguard.types import Rung

RANK = ["serving_instance", "rank"]  # `instance` is Prometheus' own name of what it scrapes
PHASES = ("detect", "fence", "plan", "restore", "total")
FRAMES = {  # result -> the counter of the shell that it is
    "sent": "frames_out", "received": "frames_in", "broken": "frames_broken", "dropped": "sends_dropped", "corrupted_on_purpose": "frames_corrupted",
    "duplicate": "note_duplicate", "resync": "note_resync",
}  # fmt: skip


class NodeFigures:
    """A node's. `transport_counters`: what the transport dropped or refused, by word."""

    def __init__(self, core: Node, shell: NodeShell, measures: Measures, transport_counters: Callable[[], dict[str, int]]) -> None:
        self._core, self._shell, self._measures, self._transport_counters = core, shell, measures, transport_counters

    def families(self) -> Iterable[Metric]:
        """Called in the loop's thread."""
        yield from self._ranks()
        waits = HistogramMetricFamily("kvguard_time_to_protected_seconds", "From a sequence's first row to its first whole replica")
        waits.add_metric([], self._measures.waits.buckets(), self._measures.waits.sum_s)
        yield waits
        yield from self._traffic()
        yield from self._store()
        yield from shared(self._shell, self._transport_counters())

    def _ranks(self) -> Iterable[Metric]:
        lag_tokens = GaugeMetricFamily("kvguard_lag_tokens", "Committed positions that no holder has acknowledged; the most of any sequence", labels=RANK)
        lag_bytes = GaugeMetricFamily("kvguard_lag_bytes", "The same in bytes of KV", labels=RANK)
        lag_seconds = GaugeMetricFamily("kvguard_lag_seconds", "How long the oldest of them has waited", labels=RANK)
        sequences = GaugeMetricFamily("kvguard_sequences", "Sequences of the rank, by state", labels=[*RANK, "state"])
        epoch = GaugeMetricFamily("kvguard_epoch", "The epoch that the node has promised", labels=["serving_instance"])
        window = GaugeMetricFamily("kvguard_window_bytes", "KV that is sent and not acknowledged", labels=[*RANK, "holder"])
        now = self._shell.clock()
        for stream, local in self._core.outbound.streams.items():
            beat = local.beat(now, self._core.promises.of(stream.instance))
            labels = [stream.instance, str(stream.rank)]
            lag_tokens.add_metric(labels, beat.lag_tokens)
            lag_bytes.add_metric(labels, beat.lag_bytes)
            lag_seconds.add_metric(labels, beat.lag_ms / 1000)
            sequences.add_metric([*labels, "unprotected"], beat.unprotected_sequences)
            sequences.add_metric([*labels, "protected"], max(0, beat.sequences - beat.unprotected_sequences))
            for holder, sender in local.senders.items():
                window.add_metric([*labels, holder], sender.flow.flight_bytes)
        for instance, known in self._shell.epochs.items():
            epoch.add_metric([instance], known.counter)
        return lag_tokens, lag_bytes, lag_seconds, sequences, epoch, window

    def _traffic(self) -> Iterable[Metric]:
        counters = self._shell.counters
        yield CounterMetricFamily("kvguard_replicated_bytes", "Payload bytes of KV sent to holders", counters["payload_bytes_out"])
        captures = CounterMetricFamily("kvguard_captures", "Captures of pools; stale: pieces whose block was reused; late: thrown away", labels=["result"])
        captures.add_metric(["done"], counters["captures"])
        captures.add_metric(["stale"], counters["pieces_stale"])
        captures.add_metric(["failed"], counters["deeds_failed_Capture"])
        captures.add_metric(["late"], counters["captures_late"])
        yield captures
        devices = GaugeMetricFamily("kvguard_device_faults", "1 for each device of this node that can't be used (kvguard status: why)", labels=["device"])
        for device in sorted(self._shell.copies.workers.faults):
            devices.add_metric([device], 1)
        yield devices

    def _store(self) -> Iterable[Metric]:
        budget, failures = self._shell.store.budget, self._shell.store.counters["checksum_failures"]
        yield CounterMetricFamily("kvguard_checksum_failures", "Frames and pages whose sum was wrong", failures)
        arena = GaugeMetricFamily("kvguard_arena_bytes", "The arena of replicas held here for others", labels=["state"])
        for state, value in (("used", budget.used), ("promised", budget.promised), ("limit", budget.bytes_max)):
            arena.add_metric([state], value)
        yield arena


class CoordinatorFigures:
    """The coordinator's. Recoveries are counted from its durable history, so that they survive its restart."""

    def __init__(self, core: Coordinator, shell: Shell, drilled: Drilled, transport_counters: Callable[[], dict[str, int]]) -> None:
        self._core, self._shell, self._drilled, self._transport_counters = core, shell, drilled, transport_counters
        self._counted: dict[tuple[str, int], bool] = {}
        self._recoveries: Counter[tuple[str, str]] = Counter()
        self._recomputed = 0
        self._phases = {phase: Histogram() for phase in PHASES}

    def families(self) -> Iterable[Metric]:
        """Called in the loop's thread."""
        self._count()
        status = self._core.status(self._shell.clock())
        epoch = GaugeMetricFamily("kvguard_epoch", "The instance's epoch", labels=["serving_instance"])
        for instance in status["instances"]:
            epoch.add_metric([instance["instance"]], instance["epoch"])
        yield epoch
        for name, field, doc in (("ranks", "ranks", "Ranks and standbys, by state"), ("nodes", "nodes", "Nodes, by state")):
            family = GaugeMetricFamily(f"kvguard_{name}", doc, labels=["state"])
            for state, count in sorted(Counter(entry["state"] for entry in status[field]).items()):
                family.add_metric([state], count)
            yield family
        yield from self._ended()
        yield from self._drills()
        yield from shared(self._shell, self._transport_counters())

    def _count(self) -> None:
        for record in self._core.history():
            key = record["instance"], record["epoch"]
            if key in self._counted:
                continue
            self._counted[key] = True
            self._recoveries[Rung.worst(record["rungs"].values()), "failed" if record["error"] else "done"] += 1
            self._recomputed += record["recomputed"]
            for phase, ms in record["timing_ms"].items():
                if phase in self._phases:
                    self._phases[phase].add(ms / 1000)

    def _ended(self) -> Iterable[Metric]:
        family = CounterMetricFamily("kvguard_recoveries", "Recoveries that ended, by the worst rung of any sequence", labels=["rung", "result"])
        for (rung, result), count in sorted(self._recoveries.items()):
            family.add_metric([rung, result], count)
        yield family
        yield CounterMetricFamily("kvguard_tokens_recomputed", "Known positions whose KV had to be computed again", self._recomputed)
        seconds = HistogramMetricFamily("kvguard_recovery_seconds", "How long each phase of a recovery took", labels=["phase"])
        for phase, histogram in self._phases.items():
            seconds.add_metric([phase], histogram.buckets(), histogram.sum_s)
        yield seconds


    def _drills(self) -> Iterable[Metric]:
        success = GaugeMetricFamily("kvguard_last_drill_success", "1 where the drill's last run passed", labels=["drill"])
        timestamp = GaugeMetricFamily("kvguard_last_drill_timestamp_seconds", "When it was, seconds since 1970", labels=["drill"])
        for name, outcome in sorted(self._drilled.outcomes.items()):
            success.add_metric([name], float(outcome.passed))
            timestamp.add_metric([name], outcome.at_s)
        return success, timestamp


def shared(shell: Shell, transport: dict[str, int]) -> Iterable[Metric]:
    """What every daemon has."""
    counters = shell.counters
    frames = CounterMetricFamily("kvguard_frames", "Frames, by what became of them", labels=["result"])
    for result, counter in FRAMES.items():
        frames.add_metric([result], counters[counter])
    yield frames
    yield CounterMetricFamily("kvguard_stale_epoch_rejections", "What came from an epoch that is over, and was refused", counters["note_stale_epoch"])
    handshakes = CounterMetricFamily("kvguard_handshake_failures", "Connections that were refused or not understood", labels=["reason"])
    for reason in ("handshake_failed", "dial_failed", *(word for word in sorted(transport) if word.startswith("socket_"))):
        handshakes.add_metric([reason], transport.get(reason, 0))
    yield handshakes
    events = CounterMetricFamily("kvguard_notes", "Transitions that were noted in the log, by word", labels=["what"])
    for name in sorted(counters):
        if name.startswith("note_"):
            events.add_metric([name.removeprefix("note_")], counters[name])
    yield events
    build = GaugeMetricFamily("kvguard_build_info", "Always 1; the labels say what runs", labels=["version", "python"])
    build.add_metric([__version__, ".".join(map(str, sys.version_info[:3]))], 1)
    yield build
