"""The client of drivers and gateways: where the order of tokens is decided, epochs are adopted, and answers are known to be delivered."""

from __future__ import annotations

from kvguard.emitter.client import Emitter, Resumption, connect

__all__ = ["Emitter", "Resumption", "connect"]
