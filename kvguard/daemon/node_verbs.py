"""What a node answers: replicas, read, verify, resync, releasable, sums, status, stats; and, where drills may damage it, two kinds of damage.

Knows: the store, the core (read only), counters. Must not know: links, how answers travel.
Invariant: reading changes nothing; verify reads a sequence a slice; resync changes nothing but what is damaged.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator

from kvguard import __version__
from kvguard.config import NodeConfig
from kvguard.core.events import Event, ResyncAsked
from kvguard.core.node import Node
from kvguard.daemon.measure import Measures
from kvguard.daemon.moments import Moments
from kvguard.daemon.perform_node import NodeShell
from kvguard.daemon.questions import Verb
from kvguard.daemon.whereabouts import processes
from kvguard.errors import Refused
from kvguard.types import Life, Rank, Span, StreamId, is_scheduler

READ_BYTES_MAX = 2 << 20  # of one answer, which is one frame


class NodeVerbs:
    """`transport_counters`: what the transport dropped or refused, by word. `feed`: one more event for the core.
    `moments`: of this process's start."""

    def __init__(
        self, config: NodeConfig, core: Node, shell: NodeShell, measures: Measures, transport_counters: Callable[[], dict[str, int]],
        feed: Callable[[Event], None], moments: Moments,
    ) -> None:  # fmt: skip
        self._config, self._core, self._shell, self._measures, self._transport_counters = config, core, shell, measures, transport_counters
        self._feed, self._moments = feed, moments

    def verbs(self) -> dict[str, Verb]:
        answered: dict[str, Verb] = {
            "replicas": self.replicas, "verify": self.verify, "releasable": self.releasable, "sums": self.sums, "status": self.status, "stats": self.stats,
            "read": self.read, "resync": self.resync,
        }  # fmt: skip
        if self._config.fault_injection:
            answered |= {"corrupt_replica": self.corrupt_replica, "corrupt_frame": self.corrupt_frame}
        return answered

    # ---- replicas -----------------------------------------------------------------------------------------------------------------

    def _entries(self, arguments: dict) -> list[tuple[StreamId, dict]]:
        found = []
        for kept in self._shell.store.list():
            if arguments.get("instance") not in (None, kept.stream.instance) or arguments.get("sequence") not in (None, kept.sequence):
                continue
            if arguments.get("rank") not in (None, str(kept.stream.rank)):
                continue
            entry = {
                "instance": kept.stream.instance, "rank": str(kept.stream.rank), "sequence": kept.sequence, "holder": self._config.name, "epoch": kept.epoch,
                "positions": kept.positions, "bytes": kept.bytes, "tier": "memory", "verified": None, "ids": kept.ids, "released": kept.released,
                "stream": str(kept.stream),
            }  # fmt: skip
            found.append((kept.stream, entry))
        return found

    def replicas(self, arguments: dict) -> dict:
        entries = self._entries(arguments)
        if arguments.get("detail"):
            for stream, entry in entries:
                sequence = self._shell.store.replica(stream).sequences[entry["sequence"]]
                entry["lineage"] = [list(fork) for fork in sequence.lineage]
                entry["blocks"] = list(sequence.blocks)
                entry["generation"] = sequence.generation
        return {"schema": "kvguard.replicas/1", "replicas": [entry for _, entry in entries]}

    def read(self, arguments: dict) -> dict:
        """Bytes and ids of one replica: positions [start, end) of `sequence` in `stream` (as `replicas` names it), READ_BYTES_MAX of KV at most.

        Where tokens aren't addressable the bytes are those of whole blocks. Raises Refused for what isn't held here.
        """
        store, name = self._shell.store, arguments["sequence"]
        stream = next((stream for stream in store.streams() if str(stream) == arguments["stream"]), None)
        if stream is None or name not in store.replica(stream).sequences:
            raise Refused(f"no replica of {name!r} in stream {arguments['stream']!r} is here. Try: kvguard replicas list")
        replica = store.replica(stream)
        sequence, shape = replica.sequences[name], replica.shape
        start, end = int(arguments["start"]), min(int(arguments["end"]), sequence.position)
        if not 0 <= start <= end or (end - start) * shape.token_bytes > READ_BYTES_MAX:
            raise Refused(f"positions {start} to {end} are not a span of at most {READ_BYTES_MAX} bytes. Try: fewer at a time")
        kv = store.read(stream, name, Span(start, end)) if end > start else b""
        return {
            "start": start, "end": end, "kv": base64.b64encode(kv).decode(), "ids": base64.b64encode(bytes(sequence.ids)).decode(),
            "request": base64.b64encode(sequence.request).decode(), "token_bytes": shape.token_bytes, "block_bytes": shape.block_bytes,
            "block_tokens": shape.block_tokens, "addressable": shape.addressable, "fingerprint": f"{shape.fingerprint:016x}",
        }  # fmt: skip

    def verify(self, arguments: dict) -> Iterator[dict | None]:
        done = []
        for stream, entry in self._entries(arguments):
            if entry["released"]:
                continue
            try:
                held = self._shell.store.verify(stream, entry["sequence"])[entry["sequence"]]
            except Refused:
                continue  # it was dropped between two slices
            now = self._shell.store.replica(stream).sequences[entry["sequence"]].position
            done.append({**entry, "positions": now, "verified": None if is_scheduler(stream.rank) else held >= now})
            yield None
        yield {"schema": "kvguard.replicas/1", "replicas": done}

    def resync(self, arguments: dict) -> Iterator[dict | None]:
        """Both halves of the streams of `instance` (None: all), `rank` (None: all) begin anew; answered when what is held here is verified.

        `dropped`: positions that did not match their sums, which their senders now send again.
        """
        store, wanted = self._shell.store, arguments.get("instance")
        rank = None if arguments.get("rank") is None else Rank.parse(arguments["rank"])
        held = [stream for stream in store.streams() if wanted in (None, stream.instance) and rank in (None, stream.rank)]
        before = {stream: sum(sequence.position for sequence in store.replica(stream).live()) for stream in held}
        instances = (stream.instance for stream in (*held, *self._core.outbound.streams))
        for instance in dict.fromkeys(instance for instance in instances if wanted in (None, instance)):
            self._feed(ResyncAsked(instance, rank))
        yield None
        while any(store.unchecked(stream) for stream in held):
            yield None
        done = [
            {"instance": stream.instance, "rank": str(stream.rank), "holder": self._config.name, "stream": str(stream), "positions": before[stream],
             "sequences": len(store.replica(stream).live()), "dropped": store.replica(stream).unsound}
            for stream in held if stream in store.streams()
        ]  # fmt: skip
        yield {"schema": "kvguard.resync/1", "replicas": done}

    def sums(self, arguments: dict) -> dict:
        """By sequence, the xxh3_64 of each held position's canonical bytes, as kept beside them (of each block where tokens aren't addressable)."""
        wanted, store = arguments.get("sequences"), self._shell.store
        found: dict[str, list[int]] = {}
        for stream, entry in self._entries({key: arguments.get(key) for key in ("instance", "rank")}):
            if entry["released"] or wanted is not None and entry["sequence"] not in wanted:
                continue
            replica = store.replica(stream)
            sequence, tokens = replica.sequences[entry["sequence"]], replica.shape.block_tokens
            sums: list[int] = []
            for index, block in enumerate(sequence.blocks):
                count = min(tokens, sequence.position - index * tokens) if replica.shape.addressable else 1
                sums += replica.arena.sums(block, 0, count)
            if len(sums) >= len(found.get(entry["sequence"], ())):  # of two lives of a rank the longer one
                found[entry["sequence"]] = sums
        return {"sums": found}

    # ---- streams ------------------------------------------------------------------------------------------------------------------

    def releasable(self, arguments: dict) -> dict:
        rank = Rank.parse(arguments["rank"])
        position = self._core.outbound.releasable(arguments["instance"], rank, Life(arguments["sequence"], arguments.get("birth", 0)))
        if position is None:
            raise Refused(f"rank {rank} of {arguments['instance']!r} doesn't live here. Try: kvguard status")
        return {"position": position}

    def status(self, arguments: dict) -> dict:
        shell, budget = self._shell, self._shell.store.budget
        now = shell.clock()
        ranks = []
        for stream, local in self._core.outbound.streams.items():
            beat = local.beat(now, self._core.promises.of(stream.instance))
            ranks.append({
                "instance": stream.instance, "rank": str(stream.rank), "stream": str(stream), "state": beat.state, "reason": beat.reason,
                "holders": list(beat.holders), "sequences": beat.sequences, "committed": beat.committed, "acked": beat.acked, "lag_tokens": beat.lag_tokens,
                "window_bytes": sum(sender.flow.flight_bytes for sender in local.senders.values()),
            })  # fmt: skip
        return {
            "schema": "kvguard.node/1", "node": self._config.name, "version": __version__, "ranks": ranks, "links": sorted(shell.up),
            "arena_bytes": budget.used, "arena_bytes_promised": budget.promised, "arena_bytes_max": budget.bytes_max,
            "epochs": {instance: epoch.counter for instance, epoch in shell.epochs.items()},
            "processes": processes(shell.engines), "hang_ms": self._config.hang_ms,
        }  # fmt: skip

    def stats(self, arguments: dict) -> dict:
        shell = self._shell
        document = {
            **self._measures.document(), "replicated_bytes": shell.counters["payload_bytes_out"], "frames_sent": shell.counters["frames_out"],
            "frames_corrupted": shell.counters["frames_corrupted"], "checksum_failures": shell.store.counters["checksum_failures"],
            "buffers": len(shell.buffers), "counters": dict(sorted(shell.counters.items())), "store": dict(sorted(shell.store.counters.items())),
            "transport": self._transport_counters(), "start": self._moments.document(),
        }  # fmt: skip
        if arguments.get("reset"):
            self._measures.reset()
        return document

    # ---- damage -------------------------------------------------------------------------------------------------------------------

    def corrupt_replica(self, arguments: dict) -> dict:
        changed = []
        for stream, entry in self._entries({key: arguments[key] for key in ("instance", "rank", "sequence")}):
            if not entry["released"] and entry["positions"] > arguments["position"]:
                self._shell.store.damage(stream, entry["sequence"], arguments["position"], bool(arguments.get("bytes_only")))
                changed.append(entry["stream"])
        return {"changed": bool(changed), "streams": changed}

    def corrupt_frame(self, arguments: dict) -> dict:
        self._shell.corrupt_frames += 1
        return {"armed": self._shell.corrupt_frames}
