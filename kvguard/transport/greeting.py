"""What two transports say to each other beside frames: who they are, which channel carries payloads, how much was taken, farewell.

Knows: the fields. Must not know: sockets, frames.
Invariant: a control message is one part that starts with MAGIC, so that it can never be taken for a frame (format/wire.py) or the reverse.

A link comes up in four messages: dialler Greet, acceptor Offer, dialler Ready (after its bulk connection, if any), acceptor Ready. Each side is up when it has
got the other's Ready. Taken is cumulative since the Greet; it bounds what may be under way. Bye ends a link that its receiver can't close itself.

Where both sides have NIXL the dialler's Zone follows the Offer, then the acceptor's Zone, then a first write each way over NIXL, then the two Readys. After a
fault the link comes up without; the same messages follow when NIXL is tried again (changing.py), and Changed each way once it carries. Fields and messages
of NIXL are told to nobody who hasn't said that he has it, and a Greet or Offer may be longer than its reader knows: versions stay compatible.
"""

from __future__ import annotations

import msgspec

from kvguard.errors import BadFrame
from kvguard.limits import NAME_BYTES_MAX

MAGIC = b"KVGT"
VERSION = 1
BYTES_MAX = 16 * 1024  # metadata of a host with many adapters is the longest


class Control(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of control messages."""


class Greet(Control, frozen=True):
    """`link`: the dialler's name for it; a newer link of the same node and name replaces an older one. `bulk`: it would like a bulk channel; `nixl`: one
    over NIXL."""

    version: int
    node: str
    incarnation: int
    link: str
    bulk: bool
    nixl: bool = False


class Offer(Control, frozen=True):
    """`bulk_port`: 0 for none; else connect there (same host) within BULK_WAIT_NS and present `ticket`, once. `nixl`: say your Zone instead. `later`: a Zone is
    welcome while the link is up over the bulk channel: NIXL is tried beside it, and then Changed to."""

    node: str
    incarnation: int
    bulk_port: int
    ticket: bytes
    nixl: bool = False
    later: bool = False


class Ready(Control, frozen=True):
    """`bulk`: payload frames use the bulk channel on this link, from the first to the last."""

    bulk: bool


class Taken(Control, frozen=True):
    """Bytes and frames that this side has taken from the control connection."""

    bytes: int
    frames: int


class Zone(Control, frozen=True):
    """Where this side's peer may write: NIXL's agent and its metadata, the address of `pages` pages, and the life that every note has to name. `frames`: as
    many may be named by one note."""

    agent: str
    metadata: bytes
    address: int
    pages: int
    life: bytes
    frames: int = 1


class Returned(Control, frozen=True):
    """Frames that came over NIXL whose pages are free again."""

    numbers: tuple[int, ...]


class Knock(Control, frozen=True):
    """Something is being written over NIXL, which wakes nobody."""


class Changed(Control, frozen=True):
    """This side's payloads take NIXL from now on; `frames` took the bulk channel before, and come first."""

    frames: int


class Bye(Control, frozen=True):
    reason: str


OVER_NIXL = (Zone, Returned, Knock, Changed)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Greet | Offer | Ready | Taken | Zone | Returned | Knock | Changed | Bye)


def pack(message: Control) -> bytes:
    return MAGIC + _encoder.encode(message)


def is_control(part) -> bool:
    return bytes(part[:4]) == MAGIC


def unpack(part) -> Control:
    """Raises BadFrame for anything that is not exactly one control message of bounded size."""
    if len(part) > BYTES_MAX:
        raise BadFrame(f"control message of {len(part)} bytes is over {BYTES_MAX}")
    try:
        message = _decoder.decode(memoryview(part)[4:])
    except (msgspec.DecodeError, ValueError) as error:
        raise BadFrame(f"not a control message: {error}") from error
    if type(message) is Greet:
        if message.version != VERSION:
            raise BadFrame(f"transport version {message.version} is not {VERSION}. Try: upgrade the older side")
        if len(message.node.encode()) > NAME_BYTES_MAX or len(message.link.encode()) > 2 * NAME_BYTES_MAX:
            raise BadFrame("a greeting with an endless name")
    return message
