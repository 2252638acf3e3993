"""Devices: memory of KV pools, and copies out of and into it. `open_device` is the only place that knows which kinds there are."""

from __future__ import annotations

from kvguard.device.base import Device
from kvguard.errors import BadConfig

KINDS = ("host", "cuda", "rehearsal")


def open_device(kind: str, **capturing) -> Device:
    """The device of that kind. Raises BadConfig for a kind that this build doesn't have. Imports only what the kind needs, cupy not before it is used.

    host: shared memory. cuda: NVIDIA GPUs. rehearsal: the CUDA device's own code over host memory, where there is no GPU. `capturing`: cuda.Capturing's fields.
    """
    if kind == "host":
        from kvguard.device.host import HostDevice

        return HostDevice()
    if kind == "cuda":
        from kvguard.device.cuda import Capturing, CudaDevice
        from kvguard.device.cupy_driver import every_gpu

        return CudaDevice(every_gpu, Capturing(**capturing))
    if kind == "rehearsal":
        from kvguard.device.cuda import Capturing, CudaDevice
        from kvguard.device.rehearsal import Rehearsal

        return CudaDevice(lambda: (Rehearsal(),), Capturing(**capturing), kind)
    raise BadConfig(f"device kind {kind!r} is not known here. Try: {', '.join(KINDS)}")
