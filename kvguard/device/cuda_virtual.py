"""CUDA's virtual memory management on one GPU, by cuda-bindings; what they can't ask of a pointer is asked of the driver's library itself.

Knows: CUDA's calls. Must not know: pools, cards, why. Imported without CUDA: the bindings come from who makes this (cupy_driver.py).
Invariants: as cupy_driver.py's: this GPU is current in every call, errors come out explained, addresses and handles are plain ints. What has a handle of the
old kind (cudaIpcGetMemHandle) is no virtual memory here.
Nothing in this file has run on a GPU yet: tools/gpu_check.sh is what runs it.
"""

from __future__ import annotations

import ctypes
from functools import cached_property
from typing import Any

from kvguard.device.cuda_errors import asked, guarded, unhindered
from kvguard.device.driver import Chunk

LIBRARY = "libcuda.so.1"


class CudaVirtual:
    """See driver.Virtual. `driver`: cuda.bindings.driver; `runtime`: cupy's."""

    def __init__(self, runtime: Any, driver: Any, number: int, name: str) -> None:
        self._runtime, self._driver, self.number, self.name = runtime, driver, number, name

    @cached_property
    def _descriptor_type(self) -> Any:
        return self._driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR

    @cached_property
    def _properties(self) -> Any:
        """Of memory that is made here: on this GPU, to be shared by descriptor, reachable by network cards where the GPU can."""
        driver = self._driver
        made = driver.CUmemAllocationProp()
        made.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        made.requestedHandleTypes = self._descriptor_type
        made.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        made.location.id = self.number
        attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED
        made.allocFlags.gpuDirectRDMACapable = int(asked(driver.cuDeviceGetAttribute, attribute, asked(driver.cuDeviceGet, self.number)))
        return made

    @cached_property
    def granularity(self) -> int:
        """Raises Refused where the GPU has no virtual memory management."""
        return self._granularity()

    @guarded
    def _granularity(self) -> int:
        least = self._driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        return int(asked(self._driver.cuMemGetAllocationGranularity, self._properties, least))

    # ---- memory -------------------------------------------------------------------------------------------------------------------

    @unhindered
    def create(self, size: int) -> int:
        return int(asked(self._driver.cuMemCreate, size, self._properties, 0))

    @unhindered
    def retained(self, address: int) -> int:
        return int(asked(self._driver.cuMemRetainAllocationHandle, address))

    @unhindered
    def release(self, handle: int) -> None:
        asked(self._driver.cuMemRelease, handle)

    @unhindered
    def descriptor_of(self, handle: int) -> int:
        return int(asked(self._driver.cuMemExportToShareableHandle, handle, self._descriptor_type, 0))

    @unhindered
    def imported(self, descriptor: int) -> int:
        return int(asked(self._driver.cuMemImportFromShareableHandle, descriptor, self._descriptor_type))

    # ---- addresses ----------------------------------------------------------------------------------------------------------------

    @unhindered
    def reserve(self, size: int) -> int:
        return int(asked(self._driver.cuMemAddressReserve, size, 0, 0, 0))

    @unhindered
    def unreserve(self, address: int, size: int) -> None:
        asked(self._driver.cuMemAddressFree, address, size)

    @unhindered
    def map(self, address: int, size: int, handle: int) -> None:
        asked(self._driver.cuMemMap, address, size, 0, handle, 0)
        access = self._driver.CUmemAccessDesc()
        access.location = self._properties.location
        access.flags = self._driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        try:
            asked(self._driver.cuMemSetAccess, address, size, [access], 1)
        except BaseException:
            asked(self._driver.cuMemUnmap, address, size)
            raise

    @unhindered
    def unmap(self, address: int, size: int) -> None:
        asked(self._driver.cuMemUnmap, address, size)

    @guarded
    def chunk_of(self, address: int) -> Chunk | None:
        if self._of_pointer("IS_LEGACY_CUDA_IPC_CAPABLE", address) != 0 or not self._of_pointer("MAPPED", address):
            return None
        start, size = self._of_pointer("MAPPING_BASE_ADDR", address), self._of_pointer("MAPPING_SIZE", address)
        if not start or not size:
            return None
        allowed = self._of_pointer("ALLOWED_HANDLE_TYPES", address) or 0
        return Chunk(start, size, bool(allowed & int(self._descriptor_type)))

    def _of_pointer(self, name: str, address: int) -> int | None:
        """An attribute of a pointer, None where it has none (no memory of CUDA's, say). cuda-bindings refuse to ask for those of mappings."""
        value = ctypes.c_uint64(0)  # each attribute asked for is an integer of at most that size, on a machine that writes the low bytes first
        number = int(getattr(self._driver.CUpointer_attribute, f"CU_POINTER_ATTRIBUTE_{name}"))
        status = _library().cuPointerGetAttribute(ctypes.byref(value), ctypes.c_int(number), ctypes.c_uint64(address))
        return int(value.value) if status == 0 else None


def _library() -> Any:
    """The driver's, which is there where the bindings have found it."""
    return ctypes.CDLL(LIBRARY)
