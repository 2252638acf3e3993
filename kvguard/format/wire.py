"""Framing. This docstring is the specification of what crosses a link.

A frame is a prefix, a header and a payload; all integers little-endian:

    offset size  field
    0      4     magic b"KVG1"
    4      2     protocol version (VERSION)
    6      2     reserved, 0
    8      4     header_bytes  <= limits.HEADER_BYTES_MAX
    12     4     payload_bytes <= limits.PAYLOAD_BYTES_MAX
    16     8     xxh3_64 of bytes 0..15 and the header
    24     ..    header: one message (messages.py), MessagePack
    ..     ..    payload: raw bytes; only KvFrame has one. Its checksums are in the header, one per token (messages.KvFrame.sums)

Over ZeroMQ a frame is two parts, (prefix + header) and payload, the second absent when empty. On a bulk channel the three follow each other.
Nothing is reserved for a frame before magic, version, bounds and the header's checksum hold; the payload is used only after its own.

Knows: bytes. Must not know: sockets, what messages mean.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import xxhash

from kvguard.errors import BadFrame
from kvguard.format import messages
from kvguard.limits import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX

MAGIC = b"KVG1"
VERSION = 1
PREFIX = struct.Struct("<4sHHIIQ")
_bounds = struct.Struct("<4sHHII")
_payload_tag = messages.pack_tag(messages.KvFrame)


class Sizes(NamedTuple):
    header_bytes: int
    payload_bytes: int
    checksum: int


def encode(message: messages.Message, payload_bytes: int = 0) -> bytes:
    """Prefix and header of a frame whose payload has `payload_bytes` bytes."""
    header = messages.pack(message)
    if len(header) > HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise BadFrame(f"{type(message).__name__} of {len(header)} + {payload_bytes} bytes is over the frame's bounds. Try: fewer sequences per frame")
    bounds = _bounds.pack(MAGIC, VERSION, 0, len(header), payload_bytes)
    return b"".join((bounds, struct.pack("<Q", xxhash.xxh3_64_intdigest(bounds + header)), header))


def read_prefix(data) -> Sizes:
    """Bounds of the frame that starts in `data`. Raises BadFrame; the header's checksum is not yet known to hold."""
    if len(data) < PREFIX.size:
        raise BadFrame(f"a frame of {len(data)} bytes is shorter than its prefix")
    magic, version, reserved, header_bytes, payload_bytes, checksum = PREFIX.unpack_from(data)
    if magic != MAGIC:
        raise BadFrame(f"magic {bytes(magic)!r} is not {MAGIC!r}: the peer doesn't speak this protocol")
    if version != VERSION or reserved:
        raise BadFrame(f"protocol version {version} is not {VERSION}. Try: upgrade the older side")
    if header_bytes > HEADER_BYTES_MAX or payload_bytes > PAYLOAD_BYTES_MAX:
        raise BadFrame(f"a frame that claims {header_bytes} + {payload_bytes} bytes is over the bounds")
    return Sizes(header_bytes, payload_bytes, checksum)


def check(data) -> Sizes:
    """Bounds of the frame whose prefix and header `data` is, nothing more; the header's checksum holds, its message is not looked at. Raises BadFrame."""
    sizes = read_prefix(data)
    if len(data) != PREFIX.size + sizes.header_bytes:
        raise BadFrame(f"header of {len(data) - PREFIX.size} bytes, prefix says {sizes.header_bytes}")
    view = memoryview(data)
    digest = xxhash.xxh3_64(view[: _bounds.size])
    digest.update(view[PREFIX.size :])
    if digest.intdigest() != sizes.checksum:
        raise BadFrame("header checksum doesn't match: damaged on the way")
    return sizes


def may_carry_payload(head) -> bool:
    """True for the message type that has payloads, whether or not this one has: frames of one type stay in order only if they share a channel.

    Reads the type's name alone. False for anything that is not a frame.
    """
    return _payload_tag in bytes(head[PREFIX.size : PREFIX.size + 16])


def decode(data) -> tuple[messages.Message, int]:
    """The message in `data` (prefix + header, nothing more) and the length of the payload that belongs to it. Raises BadFrame."""
    sizes = check(data)
    return messages.unpack(memoryview(data)[PREFIX.size :]), sizes.payload_bytes
