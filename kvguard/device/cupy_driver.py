"""The driver of one NVIDIA GPU, by cupy, and by cuda-bindings for what cupy lacks. Both are imported when the first driver is made, never before.

Knows: CUDA's calls and what their errors mean. Must not know: layouts, pools, rings.
Invariants: every call is made with this driver's GPU current in the calling thread; an error comes out as cuda_errors.py says, nothing of cupy goes through;
two bindings of one result are never mixed: addresses, streams and events are plain ints here.
Nothing in this file has run on a GPU yet: tools/gpu_check.sh is what runs it; the tests play its part of cupy with one that raises what cupy raises.
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import weakref
from typing import Any

import numpy as np

from kvguard.device import kernels
from kvguard.device.cuda_errors import EXPLAINED, answer, asked, explained, guarded, unhindered
from kvguard.device.cuda_virtual import CudaVirtual
from kvguard.device.driver import HANDLE_BYTES, Allocation
from kvguard.device.kernels.plan import THREADS, Launch
from kvguard.errors import BadConfig, KvguardError, Refused

log = logging.getLogger(__name__)
HOST_PORTABLE, HOST_MAPPED, HOST_READ_ONLY = 1, 2, 8  # cudaHostRegister's and cudaHostAlloc's
NON_BLOCKING, NO_TIMING = 1, 2  # streams, events
DEFAULT_KIND = 4  # cudaMemcpyDefault: addresses say where they are
COMPILER_OPTIONS = ("--std=c++11",)
IN_MEMORY = "CUPY_CACHE_IN_MEMORY"  # cupy's: compiled code is written nowhere
IMPLICIT = "STREAM_CAPTURE_IMPLICIT"  # the default stream, while one that it would wait for is captured: whatever is launched there ends that capture
NOT_READY = 600  # CUDA_ERROR_NOT_READY


def load() -> tuple[Any, Any]:
    """(cupy, cuda.bindings.driver). Raises BadConfig that says what to install."""
    try:
        import cupy
        from cuda.bindings import driver
    except Exception as error:
        attempt = "pip install 'kvguard[cuda13]', or kvguard[cuda12] for a driver of CUDA 12"
        raise BadConfig(f"pools on a GPU need cupy and cuda-bindings: {error}. Try: {attempt}") from error
    return cupy, driver


def every_gpu() -> tuple[CupyDriver, ...]:
    """A driver for each GPU that this process sees, none of them with a context yet: an engine needs one on its own GPU alone, and each takes memory.

    Raises BadConfig without the packages, Refused without a GPU that works.
    """
    cupy, _ = load()
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:
        raise explained(error, "looking for GPUs") from error
    if not count:
        raise Refused(f"looking for GPUs: {EXPLAINED['NoDevice'][1]}. Try: {EXPLAINED['NoDevice'][2]}")
    return tuple(CupyDriver(number) for number in range(count))


class CupyDriver:
    """See driver.Driver. `number`: as CUDA counts the GPUs that this process sees. The first call that needs a context opens it: `ready` does, and no more."""

    def __init__(self, number: int = 0) -> None:
        self._cupy, self._driver = load()
        self._runtime = self._cupy.cuda.runtime
        self.number, self.name, self.uuid = number, f"GPU {number}", ""
        self.writes_words = False
        self._functions: dict[str, Any] = {}
        self._streams: dict[int, Any] = {}
        try:
            self._look()
        except Exception as error:
            raise explained(error, f"looking at GPU {number}") from error
        self.virtual = CudaVirtual(self._runtime, self._driver, self.number, self.name)

    def _look(self) -> None:
        """What can be asked of a GPU without a context."""
        driver = self._driver
        self.name = _text(self._runtime.getDeviceProperties(self.number)["name"])
        asked(driver.cuInit, 0)
        device = asked(driver.cuDeviceGet, self.number)
        # CUDA 12 has a second version, which knows MIG's instances apart; from 13 on the first one does
        self.uuid = _uuid_text(asked(getattr(driver, "cuDeviceGetUuid_v2", None) or driver.cuDeviceGetUuid, device))
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS
        self.writes_words = bool(asked(driver.cuDeviceGetAttribute, attribute, device))

    @guarded
    def ready(self) -> None:
        self._runtime.free(0)

    # ---- memory -------------------------------------------------------------------------------------------------------------------

    @unhindered
    def allocate(self, size: int) -> int:
        address = self._runtime.malloc(size)
        try:
            self.clear(address, size)
        except BaseException:
            self._runtime.free(address)
            raise
        return address

    @unhindered
    def clear(self, address: int, size: int) -> None:
        stream = self.stream(urgent=True)  # of its own: waiting for the whole GPU would end a capture of the engine's
        self._runtime.memsetAsync(address, 0, size, stream)
        self._runtime.streamSynchronize(stream)

    @unhindered
    def free(self, address: int) -> None:
        self._runtime.free(address)

    @guarded
    def allocation_of(self, address: int) -> Allocation:
        base, size = asked(self._driver.cuMemGetAddressRange, self._driver.CUdeviceptr(address))
        attribute = self._driver.CUpointer_attribute.CU_POINTER_ATTRIBUTE_IS_LEGACY_CUDA_IPC_CAPABLE
        return Allocation(int(base), int(size), bool(asked(self._driver.cuPointerGetAttribute, attribute, self._driver.CUdeviceptr(address))))

    @guarded
    def handle_of(self, address: int) -> bytes:
        return bytes(self._runtime.ipcGetMemHandle(address))[:HANDLE_BYTES]

    @unhindered
    def open_handle(self, handle: bytes) -> int:
        return self._runtime.ipcOpenMemHandle(handle)

    @unhindered
    def close_handle(self, address: int) -> None:
        self._runtime.ipcCloseMemHandle(address)

    @unhindered
    def pinned(self, size: int) -> tuple[memoryview, int]:
        address = self._runtime.hostAlloc(max(size, 1), HOST_PORTABLE | HOST_MAPPED)
        memory = (ctypes.c_ubyte * max(size, 1)).from_address(address)
        weakref.finalize(memory, self._runtime.freeHost, address).atexit = False  # the context goes first then, and takes it along
        return memoryview(memory).cast("B"), address

    @unhindered
    def registered(self, memory: memoryview) -> int:
        address = np.frombuffer(memory, np.uint8).ctypes.data
        flags = HOST_PORTABLE | HOST_MAPPED | (HOST_READ_ONLY if memory.readonly else 0)
        self._runtime.hostRegister(address, memory.nbytes, flags)
        try:
            return int(asked(self._driver.cuMemHostGetDevicePointer, address, 0))
        except BaseException:
            self._runtime.hostUnregister(address)
            raise

    @unhindered
    def unregistered(self, memory: memoryview) -> None:
        self._runtime.hostUnregister(np.frombuffer(memory, np.uint8).ctypes.data)

    # ---- order --------------------------------------------------------------------------------------------------------------------

    @unhindered
    def stream(self, urgent: bool) -> int:
        lowest, highest = asked(self._driver.cuCtxGetStreamPriorityRange)
        made = asked(self._driver.cuStreamCreateWithPriority, NON_BLOCKING, highest if urgent else lowest)  # cupy 13 has no such call
        return _Stream(int(made), self)

    @unhindered
    def end(self, stream: int) -> None:
        """What is still on it is done first; nobody waits for that."""
        known = self._streams.pop(stream, None)
        if known is not None:
            known.ptr = 0  # cupy 14 would destroy it a second time
        asked(self._driver.cuStreamDestroy, stream)

    def current(self) -> int:
        return self._cupy.cuda.get_current_stream().ptr

    @guarded
    def is_captured(self, stream: int) -> bool:
        try:
            return int(asked(self._driver.cuStreamIsCapturing, stream)) != 0  # also one that an error has ended: nothing on it runs
        except RuntimeError as error:
            if IMPLICIT in str(error):
                return True
            raise

    @guarded
    def record(self, stream: int) -> Any:
        event = _Event(self._runtime)
        self._runtime.eventRecord(event.address, stream)
        return event

    @guarded
    def wait(self, stream: int, event: Any) -> None:
        self._runtime.streamWaitEvent(stream, event.address, 0)

    @unhindered
    def is_done(self, event: Any) -> bool:
        # cudaEventQuery would leave "not ready" as the thread's last error, for torch to find after a launch where the two share a libcudart
        (status,) = self._driver.cuEventQuery(event.address)
        if int(status) == NOT_READY:
            return False
        answer("cuEventQuery", status)
        return True

    @guarded
    def synchronise(self, stream: int) -> None:
        self._runtime.streamSynchronize(stream)

    # ---- work ---------------------------------------------------------------------------------------------------------------------

    @guarded
    def copy(self, to: int, at: int, size: int, stream: int) -> None:
        self._runtime.memcpyAsync(to, at, size, DEFAULT_KIND, stream)

    @guarded
    def copy_rows(self, to: int, to_pitch: int, at: int, at_pitch: int, width: int, rows: int, stream: int) -> None:
        if rows == 1:
            self._runtime.memcpyAsync(to, at, width, DEFAULT_KIND, stream)
        else:
            self._runtime.memcpy2DAsync(to, to_pitch, at, at_pitch, width, rows, DEFAULT_KIND, stream)

    @guarded
    def launch(self, launch: Launch, pool: int, flat: int, slots: int, places: int, runs: int, stream: int) -> None:
        flat = flat if places else flat + launch.skip * launch.unit_bytes
        longs = [launch.blocks, launch.block_tokens, launch.block_stride, launch.slot_stride, launch.unit_bytes]
        unsigned = [launch.first_run, launch.run_count, launch.run_units, launch.items, launch.lane_bits]
        pointers = [pool, flat, slots + 8 * launch.skip, places + 8 * launch.skip if places else 0, runs]
        args = (*map(np.uint64, pointers), *map(np.int64, longs), *map(np.uint32, unsigned))
        with self._on(stream):
            self._function(launch.kernel)((launch.grid,), (THREADS,), args)

    @guarded
    def write_word(self, address: int, value: int, stream: int) -> None:
        if self.writes_words:
            asked(self._driver.cuStreamWriteValue64, stream, address, value, 0)
            return
        with self._on(stream):
            self._function("kvg_publish")((1,), (1,), (np.uint64(address), np.uint64(value)))

    def _on(self, stream: int) -> Any:
        """cupy's own object for a stream, made once for each: its kernels go to the stream that is entered."""
        found = self._streams.get(stream)
        if found is None:
            made = getattr(getattr(self._cupy.cuda, "Stream", None), "from_external", None)  # since cupy 14, which deprecates the other
            stream = int(stream)  # not what ends it when it is let go
            found = self._streams[stream] = self._cupy.cuda.ExternalStream(stream) if made is None else made(_Foreign(stream))
        return found

    def _function(self, name: str) -> Any:
        """A kernel, compiled for this GPU by NVRTC when the first one is asked for."""
        if not self._functions:
            try:
                self._functions = self._compiled()
            except OSError:  # cupy's cache is a folder of the user's home, which a service has none of, or can't write
                before = os.environ.get(IN_MEMORY)
                os.environ[IN_MEMORY] = "1"
                try:
                    self._functions = self._compiled()
                finally:
                    os.environ.pop(IN_MEMORY) if before is None else os.environ.update({IN_MEMORY: before})
        return self._functions[name]

    def _compiled(self) -> dict[str, Any]:
        module = self._cupy.RawModule(code=kernels.source(), options=COMPILER_OPTIONS)
        names = [f"kvg_{verb}_{width}" for verb in ("gather", "scatter") for width in (16, 8, 4, 2, 1)]
        return {one: module.get_function(one) for one in (*names, "kvg_publish")}

    @guarded
    def compile(self) -> None:
        self._function("kvg_publish")


class _Stream(int):
    """A stream of CUDA's for as long as somebody holds it."""

    def __new__(cls, address: int, driver: CupyDriver):
        made = super().__new__(cls, address)
        made.driver = driver
        return made

    def __del__(self) -> None:
        if sys.is_finalizing():
            return  # the context takes it along
        try:
            self.driver.end(int(self))
        except KvguardError as error:
            log.debug("a stream is not given back: %s", error)


class _Foreign:
    """A stream in the words of CUDA's stream protocol."""

    def __init__(self, stream: int) -> None:
        self.__cuda_stream__ = lambda: (0, stream)


class _Event:
    """A CUDA event for as long as somebody holds it."""

    def __init__(self, runtime: Any) -> None:
        self.address = runtime.eventCreateWithFlags(NO_TIMING)
        weakref.finalize(self, runtime.eventDestroy, self.address).atexit = False


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _uuid_text(value: Any) -> str:
    """GPU-... as nvidia-smi writes it; a MIG instance's own where MIG is on."""
    digits = bytes(getattr(value, "bytes", value)).hex()
    return f"GPU-{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:32]}"
