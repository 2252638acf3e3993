"""The demo's document (`kvguard.demo/1`), put together from what was seen, and its table for people.

Knows: the document's fields and what each is computed from. Must not know: processes, how anything was obtained.
Invariants: nothing in the document is assumed: a comparison that could not be made is null, one that failed is false; a fault that did not fire is said.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kvguard.types import Rung

SCHEMA = "kvguard.demo/1"


@dataclass
class Transcript:
    """All tokens of one run as the client saw them, whatever driver they came from: by (sequence, index)."""

    sequences: int
    ids: list[dict[int, int]] = field(init=False)
    logits: list[dict[int, str]] = field(init=False)
    text: list[str] = field(init=False)
    conflicts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ids = [{} for _ in range(self.sequences)]
        self.logits = [{} for _ in range(self.sequences)]
        self.text = ["" for _ in range(self.sequences)]

    def add(self, event: dict) -> bool:
        """One token event. True if the client had not seen this index; what is told twice must be equal."""
        sequence, index = event["sequence"], event["index"]
        if event["logits"]:
            known = self.logits[sequence].setdefault(index, event["logits"])
            if known != event["logits"]:
                self.conflicts.append(f"logits of sequence {sequence}, index {index} were {known}, now {event['logits']}")
        if index in self.ids[sequence]:
            if self.ids[sequence][index] != event["id"]:
                self.conflicts.append(f"sequence {sequence}, index {index} was {self.ids[sequence][index]}, now {event['id']}")
            return False
        self.ids[sequence][index] = event["id"]
        self.text[sequence] += event["text"]
        return True

    def emitted(self) -> list[int]:
        return [len(ids) for ids in self.ids]

    def tokens(self) -> list[list[int]]:
        return [[ids[index] for index in sorted(ids)] for ids in self.ids]

    def whole(self, max_tokens: int) -> bool:
        """Every index once, none missing."""
        return all(sorted(ids) == list(range(max_tokens)) for ids in self.ids)


def identical(before: Transcript, after: Transcript, max_tokens: int) -> bool:
    return before.whole(max_tokens) and after.whole(max_tokens) and not after.conflicts and before.tokens() == after.tokens()


def logits_identical(before: Transcript, after: Transcript) -> bool | None:
    """Equal checksums at every index that both runs computed; null when they share none."""
    if after.conflicts:
        return False
    pairs = [(one[index], two[index]) for one, two in zip(before.logits, after.logits, strict=True) for index in one.keys() & two.keys()]
    return all(a == b for a, b in pairs) if pairs else None


def kv_identical(before: dict, after: dict, below: list[int]) -> bool | None:
    """Sums by rank, sequence and position: equal below each sequence's limit, on every rank. Null when nothing lies below any limit."""
    compared = 0
    for rank, sequences in before.items():
        for sequence, sums in sequences.items():
            limit = below[int(sequence)]
            mine, other = sums[:limit], after.get(rank, {}).get(sequence, [])[:limit]
            if mine != other:
                return False
            compared += len(mine)
    return True if compared else None


def recovery(resumed: dict, timing_ms: dict, epoch: int, lost: int) -> dict:
    """The recovery part, from the driver's `resumed` event and the measured phases."""
    sequences = resumed["sequences"]
    return {
        "epoch": epoch,
        "rung": Rung.worst(one["rung"] for one in sequences),
        "resume_position": min((one["resume_position"] for one in sequences), default=0),
        "rolled_back": max((one["rolled_back"] for one in sequences), default=0),
        "recomputed": sum(one["recomputed"] for one in sequences),
        "lost_sequences": lost,
        "bytes": sum(resumed["bytes_by_rung"].values()),
        "bytes_by_rung": {"pool": resumed["bytes_by_rung"].get("pool", 0), "replica": resumed["bytes_by_rung"].get("replica", 0)},
        "ms": timing_ms,
        "sequences": [
            {key: one[key] for key in ("sequence", "rung", "resume_position", "rolled_back", "recomputed")} | {"sequence": str(one["sequence"])}
            for one in sequences
        ],
    }


def replication(stats: list[dict]) -> dict:
    """Over all nodes: the worst lag and wait, the sums of what was sent."""

    def worst(key: str):
        return max((one[key] for one in stats if one.get(key) is not None), default=None)

    return {
        "lag_tokens_p50": worst("lag_tokens_p50"), "lag_tokens_p99": worst("lag_tokens_p99"), "time_to_protected_ms": worst("time_to_protected_ms"),
        "bytes": sum(one["replicated_bytes"] for one in stats), "frames": sum(one["frames_sent"] for one in stats),
    }  # fmt: skip


def passed(document: dict) -> bool:
    """Exit code 0: every comparison true or null, every fault fired, a damaged frame detected, nothing lost."""
    if False in (document["identical"], document["logits_identical"], document["kv_identical"]):
        return False
    for part in (document["fault"], document["corruption"]):
        if part is not None and not part["fired"]:
            return False
    if document["corruption"] and document["corruption"]["kind"] == "frame" and not document["corruption"]["detected"]:
        return False
    return not (document["recovery"] and document["recovery"]["lost_sequences"])


def render(document: dict, console) -> None:
    """For people: what happened, in which order, and what is equal."""
    from rich.table import Table
    from rich.text import Text

    fault, recovered, outage = document["fault"], document["recovery"], document["outage"]
    if fault:
        state = "fired" if fault["fired"] else "DID NOT FIRE"
        console.print(f"fault       {fault['kind']} {fault['target']}, {state} at token {fault['at_token']} (position {fault['at_position']})")
    if recovered:
        table = Table(title=f"recovery in epoch {recovered['epoch']}, rung {recovered['rung']}", title_justify="left")
        for name in recovered["ms"]:
            table.add_column(f"{name} ms", justify="right")
        table.add_row(*(f"{value:.1f}" if value is not None else "-" for value in recovered["ms"].values()))
        console.print(table)
        console.print(
            f"resumed at position {recovered['resume_position']}, rolled back {recovered['rolled_back']}, recomputed {recovered['recomputed']}, "
            f"{recovered['bytes']} bytes, lost sequences {recovered['lost_sequences']}"
        )
    if outage:
        console.print(
            f"outage      {outage['kind']} away for {outage['down_ms']:.0f} ms, {outage['tokens_meanwhile']} tokens meanwhile, epoch "
            f"{outage['epoch_before']} -> {outage['epoch_after']}, acknowledged {outage['acked_before']} -> {outage['acked_after']}"
        )
    if document["corruption"]:
        found = document["corruption"]
        console.print(f"corruption  {found['kind']}: {'fired' if found['fired'] else 'DID NOT FIRE'}, {'detected' if found['detected'] else 'not detected'}")
    words = {True: Text("identical", style="green"), False: Text("DIFFERENT", style="bold red"), None: Text("not compared", style="dim")}
    table = Table(title="against the undisturbed run", title_justify="left", show_header=False, min_width=29)
    for name, key in (("tokens", "identical"), ("logits", "logits_identical"), ("KV bytes", "kv_identical")):
        table.add_row(name, words[document[key]])
    console.print(table)
    numbers = document["replication"]
    protected_ms = "-" if numbers["time_to_protected_ms"] is None else f"{numbers['time_to_protected_ms']:.1f}"
    console.print(
        f"replication lag p50 {numbers['lag_tokens_p50']} p99 {numbers['lag_tokens_p99']} tokens, prompts protected after "
        f"{protected_ms} ms, {numbers['bytes']} bytes in {numbers['frames']} frames"
    )
