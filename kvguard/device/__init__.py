"""Devices: memory of KV pools, and copies out of and into it. `open_device` is the only place that knows which kinds there are."""

from __future__ import annotations

from kvguard.device.base import Device
from kvguard.errors import BadConfig


def open_device(kind: str) -> Device:
    """The device of that kind ("host"). Raises BadConfig for a kind that this build doesn't have. Imports only what the kind needs."""
    if kind == "host":
        from kvguard.device.host import HostDevice

        return HostDevice()
    raise BadConfig(f"device kind {kind!r} is not known here. Try: host")
