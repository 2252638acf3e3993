"""Every message that crosses a link between daemons, coordinator, emitters and the command line: the one place to import them from.

Knows: all of them (shapes.py, frames.py, orders.py, sessions.py) and their bytes; msgspec refuses anything else before it reaches the core.
Must not know: framing (wire.py), what is done with a message (core/).
Invariants: fields are only ever added at the end with a default (a peer one version older ignores them); columns of one message have equal length
(`check_columns`); what a Done says of clashes is of the stage that it is about (`check_clashes`). Messages are values: two that say the same are equal.

Conversations
- stream, sender -> holder: Hello, IdsFrame, KvFrame, StreamEnd; holder -> sender: Held, Ack.
- node -> coordinator: NodeHello, Beat, Fault, Report, Done; coordinator -> node: NodeWelcome, Assign, Fence, PlanOrder, RebuildOrder, Resumed.
- emitter -> coordinator: EmitterHello, EmitterBeat, Adopted, Delivered; coordinator -> emitter: Welcome, Fenced, Resume.
- anyone with a key: Query -> Answer.
"""

from __future__ import annotations

import msgspec

from kvguard.errors import BadFrame
from kvguard.format.frames import (
    PIECE_BLOCK, PIECE_REFERENCE, PIECE_TOKENS, Ack, CutOp, Held, Hello, IdsFrame, KvFrame, Op, OpenOp, ReleaseOp, StreamEnd,
)  # fmt: skip
from kvguard.format.orders import (
    Assign, Beat, Done, Fault, Fence, KnownIds, NodeHello, NodeWelcome, PlanOrder, RankBeat, Rebuild, RebuildOrder, Report, Resumed, SchedulerBeat, Source,
    StandbyBeat,
)  # fmt: skip
from kvguard.format.sessions import (
    Adopted, Answer, Delivered, EmitterBeat, EmitterHello, Fenced, Member, Query, Resume, ResumeSequence, Welcome,
)  # fmt: skip
from kvguard.format.shapes import (
    IDS_ONLY, VERSION, Holding, Ints, Message, StreamShape,
)  # fmt: skip
from kvguard.limits import EPOCH_MAX
from kvguard.types import NO_EPOCH

__all__ = [
    "ALL", "Ack", "Adopted", "Answer", "Assign", "Beat", "CutOp", "Delivered", "Done", "EmitterBeat", "EmitterHello", "Fault", "Fence", "Fenced", "Held",
    "Hello", "Holding", "IDS_ONLY", "IdsFrame", "Ints", "KnownIds", "KvFrame", "Member", "Message", "NodeHello", "NodeWelcome", "Op", "OpenOp",
    "PIECE_BLOCK", "PIECE_REFERENCE", "PIECE_TOKENS", "PlanOrder", "Query", "RankBeat", "Rebuild", "RebuildOrder", "ReleaseOp", "Report", "Resume",
    "ResumeSequence", "Resumed", "SchedulerBeat", "Source", "StandbyBeat", "StreamEnd", "StreamShape", "VERSION", "Welcome", "check_columns", "check_epochs",
    "pack", "pack_tag", "unpack",
]  # fmt: skip

ALL = (
    Hello | Held | IdsFrame | KvFrame | Ack | StreamEnd | NodeHello | NodeWelcome | Beat | Fault | Assign | Fence | Report | PlanOrder | RebuildOrder | Done
    | Resumed | EmitterHello | Welcome | EmitterBeat | Fenced | Resume | Adopted | Delivered | Query | Answer
)  # fmt: skip

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ALL)


def pack(message: Message) -> bytes:
    """The message's bytes, without framing."""
    return _encoder.encode(message)


def pack_tag(kind: type[Message]) -> bytes:
    """The type's name as it stands at the head of every message of this type."""
    return _encoder.encode(kind.__struct_config__.tag)


def unpack(data) -> Message:
    """Raises BadFrame for anything that is not exactly one well-typed message."""
    try:
        message = _decoder.decode(data)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise BadFrame(f"not a message of this protocol: {error}") from error
    check_epochs(message)
    check_columns(message)
    if type(message) is Done and message.clashes:
        check_clashes(message)
    return message


def check_epochs(message: Message) -> None:
    """Raises BadFrame where an epoch is beyond limits.EPOCH_MAX: one such promise would fence an instance for ever."""
    epoch = getattr(message, "epoch", NO_EPOCH)
    promises = message.promises if type(message) is NodeHello else ()
    if max(epoch.counter, *(promised.counter for _, promised in promises), 0) > EPOCH_MAX or epoch.counter < 0:
        raise BadFrame(f"{type(message).__name__}: an epoch that no coordinator ever issued")


def check_clashes(message: Done) -> None:
    """Raises BadFrame where a clash is of another dp or stage than the rank that `part` names, or at no position: plans cut copies there, in every later
    round."""
    for stream, _, position in message.clashes:
        if position < 0 or stream.instance != message.instance or not message.part.startswith(f"rank {stream.rank.dp}.{stream.rank.pp}."):
            raise BadFrame(f"Done of {message.part!r}: a clash of {stream} at {position}")


def check_columns(message: Message) -> None:
    """Raises BadFrame where columns that belong together differ in length."""
    if type(message) is KvFrame:
        lengths = {len(message.nos), len(message.starts), len(message.counts), len(message.blocks), len(message.generations), len(message.flags)}
    elif type(message) is IdsFrame:
        lengths = {len(message.nos), len(message.starts), len(message.counts), len(message.sampler_bytes)}
    elif type(message) is PlanOrder:
        lengths = {len(message.sequences), len(message.births) or len(message.sequences)}
    elif type(message) is Delivered:
        lengths = {len(message.sequences), len(message.births) or len(message.sequences)}
    elif type(message) is Report:
        lengths = next((found for found in map(_lengths, message.holdings) if len(found) > 1), set())
    else:
        return
    if len(lengths) > 1:
        raise BadFrame(f"{type(message).__name__}: columns of unequal length {sorted(lengths)}")


def _lengths(holding: Holding) -> set[int]:
    columns = (holding.generations, holding.lineages, holding.positions, holding.ids, holding.births or holding.ids)
    return {len(holding.sequences), *map(len, columns)}
