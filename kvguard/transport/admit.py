"""What may pass: the checks that every transport makes on a frame before anything is reserved or reported.

Knows: framing (format/wire.py) and bounds. Must not know: sockets, messages.
Invariant: a reason is returned, never raised: whatever a peer sends is data.
"""

from __future__ import annotations

from kvguard.errors import BadFrame
from kvguard.format import wire
from kvguard.limits import HEADER_BYTES_MAX, PAYLOAD_BYTES_MAX

HEAD_BYTES_MAX = wire.PREFIX.size + HEADER_BYTES_MAX
FRAME_BYTES_MAX = HEAD_BYTES_MAX + PAYLOAD_BYTES_MAX


def misfit(head, payload_bytes: int) -> str:
    """Why `head` and a payload of `payload_bytes` bytes are not one frame; "" when they are. The header's checksum is left to whoever decodes it."""
    try:
        sizes = wire.read_prefix(head)
    except BadFrame as error:
        return str(error)
    if len(head) != wire.PREFIX.size + sizes.header_bytes:
        return f"header of {len(head) - wire.PREFIX.size} bytes, prefix says {sizes.header_bytes}"
    if payload_bytes != sizes.payload_bytes:
        return f"payload of {payload_bytes} bytes, prefix says {sizes.payload_bytes}"
    return ""
