"""What errors of CUDA mean, whoever of cupy and cuda-bindings raised them, and how calls are made so that nothing else comes out.

Knows: names of CUDA's errors. Must not know: what is called. Nothing of CUDA is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

from kvguard.errors import DeviceLost, KvguardError, Refused

# What CUDA calls it -> (is the GPU lost, what it is, what to do).
EXPLAINED: dict[str, tuple[bool, str, str]] = {
    "InsufficientDriver": (False, "there is no NVIDIA driver, or one older than cupy's CUDA", "nvidia-smi; install a driver, or the extra that fits it"),
    "StubLibrary": (False, "the driver's library is a stub for linking", "the host's libcuda.so.1 first in the library path"),
    "NoDevice": (False, "the driver shows no GPU", "nvidia-smi; CUDA_VISIBLE_DEVICES; PrivateDevices=no and DeviceAllow= in the unit"),
    "SystemDriverMismatch": (False, "the kernel's driver and its library are of different versions", "reboot, or reload the nvidia modules"),
    "CompatNotSupportedOnDevice": (False, "the compatibility library is not for this GPU", "remove cuda-compat from the library path"),
    "SystemNotReady": (False, "the GPU's fabric isn't ready", "systemctl status nvidia-fabricmanager"),
    "DevicesUnavailable": (False, "the GPU is taken exclusively, or MIG is on without an instance", "nvidia-smi -q; compute mode Default, or a MIG instance"),
    "MemoryAllocation": (False, "not enough device memory is free", "a smaller pool, or end what holds the GPU's memory"),
    "OutOfMemory": (False, "not enough memory is free", "a smaller pool, or LimitMEMLOCK=infinity for pinned memory"),
    "MapBufferObjectFailed": (False, "another process's memory can't be mapped", "engine and daemon on one GPU of one host, in one IPC namespace"),
    "DeviceUninitialized": (False, "a handle of this very process, or of memory that is gone", "open it in another process, while the exporter lives"),
    "InvalidDevicePointer": (False, "no allocation of this device holds the address", "a pointer of this device"),
    "NotSupported": (False, "the GPU or its virtualisation doesn't offer it", "MIG and some virtual GPUs can't share memory between processes: device = host"),
    "InvalidValue": (False, "a stale handle or descriptor, or memory that can't be shared so", "memory of cudaMalloc, exported while its process lives"),
    "NotPermitted": (False, "the driver doesn't permit it to this process", "the device nodes of the GPU in this container, or device = host"),
    "OperatingSystem": (False, "the operating system refused: descriptors or locked memory, mostly", "a higher LimitNOFILE and LimitMEMLOCK"),
    "libnvrtc": (False, "the kernels' compiler isn't there", "pip install nvidia-cuda-nvrtc (nvidia-cuda-nvrtc-cu12 for CUDA 12)"),
    "HostMemoryAlreadyRegistered": (False, "that host memory is registered already", "one registration of a page in a process"),
    "ContextIsDestroyed": (True, "the GPU's context is gone", "restart this process"),
    "ECCUncorrectable": (True, "an uncorrectable memory fault (Xid 48 and its like)", "nvidia-smi -q -d ECC; drain the node"),
    "Unknown": (True, "the GPU fell off, or its driver failed (dmesg: Xid)", "dmesg | grep -i xid; drain the node"),
}
LOST = (
    "IllegalAddress", "LaunchFailure", "LaunchFailed", "IllegalInstruction", "MisalignedAddress", "InvalidAddressSpace", "InvalidPc", "HardwareStackError",
    "Assert", "NvlinkUncorrectable", "MpsClientTerminated", "MpsConnectionFailed", "LaunchTimeout", "ExternalDevice", "TensorMemoryLeak", "Contained",
    "DeviceUnavailable",
)  # fmt: skip


def explained(error: BaseException, doing: str) -> KvguardError:
    """What an error of cupy or cuda-bindings means. By name: numbers differ between the two APIs."""
    said = str(error) or type(error).__name__
    plain = said.replace("_", "").lower()
    for name, (lost, what, attempt) in EXPLAINED.items():
        if name.lower() in plain:
            return (DeviceLost if lost else Refused)(f"{doing}: {what} ({said[:200]}). Try: {attempt}")
    if any(name.lower() in plain for name in LOST):
        return DeviceLost(f"{doing}: the GPU had a fault, its memory can't be believed ({said[:200]}). Try: dmesg | grep -i xid; restart this process")
    return Refused(f"{doing}: {said[:300]}. Try: nvidia-smi; tools/gpu_check.sh")


def guarded(method: Callable) -> Callable:
    """A method of something that has `_runtime`, `number` and `name` of a GPU: with the GPU current, errors explained."""

    @wraps(method)
    def call(self, *args, **kwargs):
        try:
            self._runtime.setDevice(self.number)
            return method(self, *args, **kwargs)
        except KvguardError:
            raise
        except Exception as error:
            raise explained(error, f"{method.__name__} on {self.name}") from error

    return call


def unhindered(method: Callable) -> Callable:
    """As `guarded`, and for calls that CUDA forbids in every thread while one of them captures a graph: there they would fail, and end the engine's capture."""

    @guarded
    @wraps(method)
    def call(self, *args, **kwargs):
        exchange = self._driver.cuThreadExchangeStreamCaptureMode
        before = asked(exchange, self._driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED)
        try:
            return method(self, *args, **kwargs)
        finally:
            asked(exchange, before)

    return call


def asked(call: Callable, *args):
    """A call of cuda-bindings: its result, or an error with the name that the driver gives it."""
    return answer(call.__name__, *call(*args))


def answer(call: str, status, *values):
    """What a call of that name has answered."""
    if int(status):
        raise RuntimeError(f"{call}: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values)
