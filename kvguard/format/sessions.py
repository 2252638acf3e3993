"""What emitters and the coordinator say to each other, and what anyone with a key may ask.

Knows: fields and their types. Must not know: framing (wire.py), what is done with a message (core/).
Invariants: as of all messages (messages.py).
"""

from __future__ import annotations

import msgspec

from kvguard.format.orders import KnownIds
from kvguard.format.shapes import Ints, Message
from kvguard.types import Epoch, Life, NodeId, Places, Rank, SequenceId


class Member(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank lives now: its node, the engine's endpoint, the daemon's address (for `releasable`)."""

    rank: Rank
    node: NodeId
    endpoint: str
    address: str


class EmitterHello(Message, frozen=True):
    """A session of the one emitter of an instance; a new incarnation ends the old one. `moves`: it can go on with sequences in other instances.

    `silence_ms`: what it promises: longer than that it is silent only when it is dead. 0: it promises nothing, and is borne with as the coordinator is set.
    """

    instance: str
    incarnation: int
    epoch: Epoch
    moves: bool = False
    silence_ms: int = 0


class Welcome(Message, frozen=True):
    """`recovering`: wait for Resume before the first step."""

    instance: str
    epoch: Epoch
    members: tuple[Member, ...]
    recovering: bool
    sequences: int = 0


class EmitterBeat(Message, frozen=True):
    """`scheduled`: sequences with work in flight; `progress`: rises with every result that reached the emitter. Also says that the emitter lives.

    `fenced`: the counter of the newest epoch announced to it: nothing of an older one reaches a client any more. Said at once after Fenced, because a round
    may wait for it (house rule: "or the emitter has adopted the new epoch").
    """

    instance: str
    incarnation: int
    epoch: Epoch
    scheduled: int
    progress: int
    fenced: int = 0


class Fenced(Message, frozen=True):
    """Stop: adopt nothing more of older epochs, wait for Resume."""

    instance: str
    epoch: Epoch
    reason: str


class ResumeSequence(msgspec.Struct, frozen=True, array_like=True):
    """A resume token without what all tokens of one recovery share. `places`, `proof`: of a sequence that moves (types.ResumeToken)."""

    sequence: SequenceId
    position: int
    rung: str
    known: KnownIds
    places: Places = ()
    proof: bytes = b""


class Resume(Message, frozen=True):
    """The end of a recovery; or, with `error`, its explicit failure. `timing_ms`: detect, fence, plan, restore.

    `moved`: sequences with `proof` go on in other instances: their ranks are not rebuilt.
    """

    instance: str
    epoch: Epoch
    members: tuple[Member, ...]
    sequences: tuple[ResumeSequence, ...]
    timing_ms: dict[str, float]
    bytes_by_rung: dict[str, int]
    error: str = ""
    moved: bool = False


class Adopted(Message, frozen=True):
    """The emitter goes on in `epoch`. Answered by nothing; said again with every beat's epoch."""

    instance: str
    incarnation: int
    epoch: Epoch


class Delivered(Message, frozen=True):
    """These sequences' answers have reached their clients: their ids may go after ids_retention_s. Passed on by the coordinator to all nodes.

    `births`: of which life of each name (lineage.birth_of, 0 unknown): it is said again with every session, and the name may be another sequence's by then.
    Empty: all unknown.
    """

    instance: str
    sequences: tuple[SequenceId, ...]
    births: Ints = ()

    @classmethod
    def of(cls, instance: str, lives: tuple[Life, ...]) -> Delivered:
        names, births = zip(*lives, strict=True) if lives else ((), ())
        return cls(instance, names, births if any(births) else ())

    def lives(self) -> tuple[Life, ...]:
        return tuple(map(Life, self.sequences, self.births or (0,) * len(self.sequences)))


class Query(Message, frozen=True):
    """A question of the command line or an emitter: `verb` with JSON arguments."""

    id: int
    verb: str
    arguments: bytes = b"{}"


class Answer(Message, frozen=True):
    """`body`: JSON. `error`: not empty when there is none; `code` is the exit code it stands for."""

    id: int
    body: bytes
    error: str = ""
    code: int = 0
