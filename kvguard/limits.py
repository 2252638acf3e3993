"""Every bound, in one place, and assertions that relate them. Values that an operator may set live in config.py; these may not be set.

Invariant: whatever a peer, an engine or a file claims is checked against these before anything is reserved for it.
"""

KIB = 1024
MIB = 1024 * KIB

# Names and opaque values
NAME_BYTES_MAX = 64  # instance, node and sequence names, UTF-8
REQUEST_BYTES_MAX = 4096  # a request's parameters as the engine packs them
SAMPLER_BYTES_MAX = 32
FORKS_MAX = 16  # a lineage that would grow longer starts anew: conservative, never wrong

# The commit table
ROWS_MAX = 4096
BLOCKS_PER_ROW_MAX = 8192
IDS_PER_ROW_MAX = 131072

EPOCH_MAX = 1 << 62  # raising it once a nanosecond would take a century; what claims more is garbage, and would leave no higher epoch to fence with

# Frames
HEADER_BYTES_MAX = 4 * MIB  # reports of many sequences are the largest headers
PAYLOAD_BYTES_MAX = 8 * MIB
PIECES_PER_FRAME_MAX = 4096
BULK_BYTES_MIN = 64 * KIB  # payloads below this gain nothing from the bulk channel (measured: copy=False pays from here)
HELD_FRAMES_MAX = 1024  # KV frames that wait at a receiver for an earlier ids frame

# Streams
FRAME_BYTES_TARGET = 1 * MIB  # few, large frames; small enough that decode never waits long behind prefill
WINDOW_BYTES_DEFAULT = 16 * MIB

# Local socket
SOCKET_BYTES_MAX = 128 * KIB  # one packet; larger bodies travel in a memfd beside it
SOCKET_FDS_MAX = 16

assert FRAME_BYTES_TARGET <= PAYLOAD_BYTES_MAX <= WINDOW_BYTES_DEFAULT
assert BULK_BYTES_MIN <= FRAME_BYTES_TARGET
