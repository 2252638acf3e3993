"""From the durable store back to what the coordinator knew: a restart goes on with the same recovery and the same epoch.

Knows: the store's keys and records. Must not know: what is decided from them.
Invariants: loading says nothing and raises nothing; nodes known from the store alone get extra time to be heard; a planned round keeps its plan.
"""

from __future__ import annotations

from kvguard.core.known import Known, Round
from kvguard.core.membership import Member, Node
from kvguard.format import ledger
from kvguard.format.ledger import PLANNED
from kvguard.types import Rank


def load(known: Known, values: dict[str, bytes]) -> None:
    records = {key: ledger.unpack(key, data) for key, data in sorted(values.items())}
    start_ns = known.fair_ns + known.settings.patience.start_ns
    for key, record in records.items():
        kind, _, name = key.partition("/")
        if kind == "epoch":
            known.floor(name, record)
        elif kind == "holders":
            instance, _, rank = name.rpartition("/")
            _load_member(known, instance, Rank.parse(rank), record, start_ns)
        elif kind == "forks":
            known.forks[name] = record
        elif kind == "births":
            known.births[name] = record
        elif kind == "resume":
            known.resumes[name] = record
        elif kind == "emitter":
            known.emitters[name] = record
        elif kind == "history":
            known.history.append(record)
        elif kind == "secret":
            known.secret = record
        elif kind == "paused":
            known.paused = record
        elif kind == "drained":
            known.drained[name] = "the coordinator was restarted"
    known.history.sort(key=lambda record: (record.instance, record.epoch))
    for key, record in records.items():
        if key.startswith("recovery/"):
            _load_round(known, record, start_ns)


def _load_member(known: Known, instance: str, rank: Rank, record: ledger.MemberRecord, start_ns: int) -> Member:
    member = Member(record.node, record.stream, record.incarnation, record.endpoint)
    member.holders, member.former, member.fingerprint = record.holders, record.former, record.fingerprint
    known.membership.members.setdefault(instance, {})[rank] = member
    for node in (record.node, *record.holders):
        if node not in known.membership.nodes:
            known.membership.nodes[node] = Node(node, start_ns, known.now_ns)
    return member


def _load_round(known: Known, record: ledger.RecoveryRecord, start_ns: int) -> None:
    """The same recovery goes on with the same epoch; its deadlines start anew, its orders are said when nodes say hello."""
    instance = record.instance
    known.floor(instance, record.epoch)
    known.rounds[instance] = Round(record, known.fair_ns, known.now_ns)
    if record.phase == ledger.RESUMED:
        return
    known.resumes.pop(instance, None)
    known.membership.recovering[instance] = start_ns
    places = known.membership.members.setdefault(instance, {})
    for text, member in record.members.items():
        rank = Rank.parse(text)
        if rank not in places:
            _load_member(known, instance, rank, member, start_ns)
        places[rank].lost = rank in record.lost
    if record.phase == PLANNED:
        known.forks[instance] = dict(zip(record.order.sequences, record.order.lineages, strict=True))
        known.births[instance] = record.order.births_by_name()
        known.rounds[instance].ordered = {rebuild.rank: False for rebuild in record.order.rebuilds}  # the former life may have
