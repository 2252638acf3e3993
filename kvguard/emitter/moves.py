"""Tokens of sequences that go on in another instance, as a router passes them to an engine.

`kv_transfer_params = {"kvguard": encode(token)}`; the engine's side decodes it and calls guard.fetch. See format/moves.py for the fields.
Knows: where encode and decode live. Must not know: engines.
"""

from __future__ import annotations

from kvguard.format.moves import decode, encode
from kvguard.types import MovedToken

__all__ = ["MovedToken", "decode", "encode"]
