"""The client of drivers and gateways: where the order of tokens is decided, epochs are adopted, and answers are known to be delivered."""

from __future__ import annotations

from kvguard.emitter.client import Emitter, Resumption, connect
from kvguard.format.lineage import life_of
from kvguard.types import Life

__all__ = ["Emitter", "Life", "Resumption", "connect", "life_of"]
