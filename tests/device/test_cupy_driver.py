"""What CUDA's errors become, with a cupy that raises what cupy raises: no packages, no driver, no GPU, a GPU that is lost."""

from __future__ import annotations

import os
import subprocess
import sys
import types

import numpy as np
import pytest

from kvguard.device import cuda_virtual, cupy_driver, open_device
from kvguard.device.cuda import CudaDevice
from kvguard.device.driver import Chunk
from kvguard.device.virtual import Segment, created
from kvguard.errors import BadConfig, DeviceLost, Refused
from kvguard.format.layout import Layout

LAYOUT = Layout.paged("m", "float16", 1, 2, 4, 1, 8)


class CUDARuntimeError(RuntimeError):
    """As cupy's: a text that begins with its name."""


class Status(int):
    name = "CUDA_SUCCESS"


class FakeRuntime:
    """cupy.cuda.runtime, as far as it is called. `fails`: by name of a call, the text that it raises; `query`: what cuEventQuery answers."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, gpus: int = 1, **fails: str) -> None:
        self.gpus, self.fails, self.query, self.calls = gpus, fails, 0, []
        self.mode, self.streams, self.ended = "global", 0, []

    def exchanged(self, mode: str):
        """The thread's capture mode, as cuda-bindings change it."""
        before, self.mode = self.mode, mode
        self.calls.append(("mode", mode))
        return Status(0), before

    def queried(self, event: int):
        status = Status(self.query)
        status.name = {0: "CUDA_SUCCESS", 600: "CUDA_ERROR_NOT_READY", 700: "CUDA_ERROR_ILLEGAL_ADDRESS"}[self.query]
        return (status,)

    def created(self, flags: int, priority: int):
        self.streams += 1
        return Status(0), 1000 + self.streams

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fails:
                raise CUDARuntimeError(self.fails[name])
            return {"getDeviceCount": self.gpus, "getDeviceProperties": {"name": b"H200"}, "malloc": 1 << 20}.get(name, 7)

        return call


def installed(monkeypatch, runtime: FakeRuntime, writes_words: int = 1, **more) -> None:
    """`more`: of cuda.bindings.driver."""
    ok = Status(0)
    uuid = types.SimpleNamespace(bytes=bytes(range(16)))
    driver = types.SimpleNamespace(
        cuDeviceGet=lambda number: (ok, number), cuDeviceGetUuid=lambda device: (ok, uuid), cuDeviceGetAttribute=lambda *_: (ok, writes_words),
        CUdevice_attribute=types.SimpleNamespace(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS=1), cuCtxGetStreamPriorityRange=lambda: (ok, 0, -5),
        CUdeviceptr=int, cuStreamWriteValue64=lambda *_: (ok,), cuInit=lambda flags: (ok,), CUstreamCaptureMode=types.SimpleNamespace(
            CU_STREAM_CAPTURE_MODE_RELAXED="relaxed"), cuThreadExchangeStreamCaptureMode=runtime.exchanged, cuStreamCreateWithPriority=runtime.created,
        cuStreamDestroy=lambda stream: runtime.ended.append(stream) or (ok,), cuEventQuery=runtime.queried,
    )  # fmt: skip
    vars(driver).update(more)
    cupy = types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=runtime))
    monkeypatch.setattr(cupy_driver, "load", lambda: (cupy, driver))


@pytest.mark.parametrize(
    ("said", "kind", "attempt"),
    [
        ("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version", Refused, "install a driver"),
        ("cudaErrorNoDevice: no CUDA-capable device is detected", Refused, "CUDA_VISIBLE_DEVICES"),
        ("cudaErrorSystemDriverMismatch: system has unsupported display driver / cuda driver combination", Refused, "reboot"),
        ("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable", Refused, "MIG"),
        ("cudaErrorMemoryAllocation: out of memory", Refused, "smaller pool"),
        ("cudaErrorNotSupported: operation not supported", Refused, "MIG"),
        ("cuMemExportToShareableHandle: CUDA_ERROR_OPERATING_SYSTEM", Refused, "LimitNOFILE"),
        ("cuMemCreate: CUDA_ERROR_NOT_PERMITTED", Refused, "container"),
        ('Failure finding "libnvrtc.so.13 or libnvrtc.so.12": No such file', Refused, "nvidia-cuda-nvrtc"),
        ("cudaErrorHostMemoryAlreadyRegistered: part or all of the requested memory range is already mapped", Refused, "one registration"),
        ("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered", DeviceLost, "xid"),
        ("cudaErrorECCUncorrectable: uncorrectable ECC error encountered", DeviceLost, "drain"),
        ("cudaErrorUnknown: unknown error", DeviceLost, "dmesg"),
        ("cudaErrorLaunchFailure: unspecified launch failure", DeviceLost, "restart"),
        ("something that nobody has heard of", Refused, "gpu_check"),
    ],
)
def test_an_error_says_what_it_means_and_what_to_do(said, kind, attempt):
    error = cupy_driver.explained(CUDARuntimeError(said), "opening GPU 0")
    assert type(error) is kind and attempt.lower() in str(error).lower() and "Try:" in str(error) and str(error).startswith("opening GPU 0: ")


def test_without_the_packages_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(BadConfig, match=r"kvguard\[cuda13\]"):
        cupy_driver.every_gpu()
    device = open_device("cuda")
    assert "kvguard[cuda13]" in device.prepare() and device.prepare() == device.fault  # said again without being tried again


@pytest.mark.parametrize(
    ("runtime", "attempt"),
    [
        (FakeRuntime(getDeviceCount="cudaErrorInsufficientDriver: CUDA driver version is insufficient"), "install a driver"),
        (FakeRuntime(gpus=0), "CUDA_VISIBLE_DEVICES"),
        (FakeRuntime(free="cudaErrorDevicesUnavailable: busy or unavailable"), "MIG"),
    ],
)
def test_a_daemon_s_device_without_a_gpu_refuses_engines_and_nothing_else(monkeypatch, runtime, attempt):
    installed(monkeypatch, runtime)
    device = open_device("cuda")
    assert attempt in device.prepare()
    with pytest.raises(Refused, match="Try:"):
        device.allocate(LAYOUT)


def test_a_gpu_s_name_and_number_are_its_own(monkeypatch):
    installed(monkeypatch, FakeRuntime(gpus=2))
    drivers = cupy_driver.every_gpu()
    assert [driver.number for driver in drivers] == [0, 1] and drivers[0].name == "H200" and drivers[0].writes_words
    assert drivers[0].uuid == "GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"


def test_every_call_is_made_with_its_own_gpu(monkeypatch):
    runtime = FakeRuntime(gpus=2)
    installed(monkeypatch, runtime)
    second = cupy_driver.every_gpu()[1]
    runtime.calls.clear()
    second.copy_rows(1, 2, 3, 4, 5, 6, 7)
    second.copy_rows(1, 2, 3, 4, 5, 1, 7)
    assert runtime.calls == [("setDevice", 1), ("memcpy2DAsync", 1, 2, 3, 4, 5, 6, 4, 7), ("setDevice", 1), ("memcpyAsync", 1, 3, 5, 4, 7)]


def test_a_query_that_answers_a_fault_is_a_lost_gpu(monkeypatch):
    runtime = FakeRuntime()
    installed(monkeypatch, runtime)
    driver = cupy_driver.CupyDriver()
    event = driver.record(3)
    assert driver.is_done(event)
    runtime.query = 600
    assert not driver.is_done(event)
    runtime.query = 700
    with pytest.raises(DeviceLost, match="xid"):
        driver.is_done(event)
    runtime.query = 0


def test_memory_is_zeroed_and_out_of_memory_is_told(monkeypatch):
    runtime = FakeRuntime()
    installed(monkeypatch, runtime)
    driver = cupy_driver.CupyDriver()
    assert driver.allocate(4096) == 1 << 20
    assert [call for call in runtime.calls if "memset" in call[0] or "ynchronize" in call[0]] == [  # of the whole GPU nothing is waited for
        ("memsetAsync", 1 << 20, 0, 4096, 1001), ("streamSynchronize", 1001),
    ]  # fmt: skip
    assert runtime.mode == "global"
    runtime.calls.clear()
    assert runtime.ended == [1001]
    runtime.fails["malloc"] = "cudaErrorMemoryAllocation: out of memory"
    with pytest.raises(Refused, match="smaller pool"):
        driver.allocate(4096)
    with pytest.raises(Refused, match="smaller pool"):
        CudaDevice(lambda: (driver,)).allocate(LAYOUT)


def test_a_context_is_opened_on_the_gpu_that_is_used_and_by_a_daemon_on_all(monkeypatch):
    runtime = FakeRuntime(gpus=3)
    installed(monkeypatch, runtime)
    engine = open_device("cuda")
    assert len({engine.driver(number).uuid for number in range(3)}) == 1 and not [call for call in runtime.calls if call[0] in ("setDevice", "free")]
    engine.driver(1).allocate(4096)
    assert {call[1] for call in runtime.calls if call[0] == "setDevice"} == {1}
    assert open_device("cuda").prepare() == "" and [call[1] for call in runtime.calls if call[0] == "setDevice"][-3:] == [0, 1, 2]
    assert [call[0] for call in runtime.calls].count("free") == 3


def test_a_gpu_that_is_one_of_mig_s_has_its_own_uuid(monkeypatch):
    installed(monkeypatch, FakeRuntime(), cuDeviceGetUuid_v2=lambda device: (Status(0), types.SimpleNamespace(bytes=bytes(16))))
    assert cupy_driver.CupyDriver().uuid == "GPU-00000000-0000-0000-0000-000000000000"


def test_calls_that_a_capture_forbids_leave_the_engine_s_capture_alone(monkeypatch):
    """In relaxed mode, this thread for this call alone, also where it fails; what the step itself launches pays nothing for it."""
    runtime = FakeRuntime(hostRegister="cudaErrorNotSupported: operation not supported")
    installed(monkeypatch, runtime)
    driver = cupy_driver.CupyDriver()
    with pytest.raises(Refused, match="MIG"):
        driver.registered(memoryview(bytearray(16)))
    assert [call[:2] for call in runtime.calls if call[0] in ("mode", "hostRegister")][0] == ("mode", "relaxed")
    assert runtime.mode == "global"
    event = driver.record(0)
    runtime.calls.clear()
    driver.copy(1, 2, 3, 4)
    driver.wait(4, event)
    driver.write_word(4096, 1, 4)
    assert ("mode", "relaxed") not in runtime.calls
    assert driver.is_done(event) and ("mode", "relaxed") in runtime.calls and runtime.mode == "global"


def test_memory_whose_address_on_the_device_cannot_be_had_is_not_left_registered(monkeypatch):
    def no_address(address: int, flags: int):
        status = Status(801)
        status.name = "CUDA_ERROR_NOT_SUPPORTED"
        return status, 0

    runtime = FakeRuntime()
    installed(monkeypatch, runtime, cuMemHostGetDevicePointer=no_address)
    with pytest.raises(Refused, match="MIG"):
        cupy_driver.CupyDriver().registered(memoryview(bytearray(16)))
    registered, given_back = (call for call in runtime.calls if call[0] in ("hostRegister", "hostUnregister"))
    assert (registered[0], given_back) == ("hostRegister", ("hostUnregister", registered[1]))


def test_a_stream_ends_when_nobody_holds_it_any_more(monkeypatch):
    runtime = FakeRuntime()
    installed(monkeypatch, runtime)
    driver = cupy_driver.CupyDriver()
    kept, stream = driver.stream(urgent=True), driver.stream(urgent=False)
    made = types.SimpleNamespace(ptr=int(stream))
    driver._streams[int(stream)] = made
    assert (kept, stream) == (1001, 1002) and runtime.ended == []
    del stream
    assert runtime.ended == [1002] and made.ptr == 0 and not driver._streams  # cupy's own object would end it again
    assert kept == 1001


def test_kernels_are_compiled_where_nothing_can_be_written(monkeypatch):
    installed(monkeypatch, FakeRuntime())
    monkeypatch.delenv(cupy_driver.IN_MEMORY, raising=False)
    tried = []

    class Module:
        def __init__(self, code: str, options) -> None:
            tried.append(os.environ.get(cupy_driver.IN_MEMORY))
            if tried[-1] != "1":
                raise PermissionError("/nonexistent/.cupy")

        def get_function(self, name: str) -> str:
            return name

    driver = cupy_driver.CupyDriver()
    driver._cupy.RawModule = Module
    driver.compile()
    driver.compile()
    assert tried == [None, "1"] and cupy_driver.IN_MEMORY not in os.environ


def test_nothing_of_cuda_is_imported_before_it_is_used():
    code = (
        "import sys; from kvguard.device import open_device; from kvguard.daemon import node, ranks, salvage; open_device('cuda'); "
        "print([name for name in ('cupy', 'cuda', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_a_stream_is_made_known_to_cupy_once(monkeypatch):
    """By the protocol that cupy 14 wants, or by the class that it deprecates: a warning for every launch is no way to launch."""
    installed(monkeypatch, FakeRuntime())
    made: list[tuple[int, int]] = []

    class Stream:
        @staticmethod
        def from_external(foreign) -> Stream:
            made.append(foreign.__cuda_stream__())
            return Stream()

    driver = cupy_driver.CupyDriver()
    driver._cupy.cuda.Stream = Stream
    assert driver._on(7) is driver._on(7) is not driver._on(8) and made == [(0, 7), (0, 8)]


def test_words_without_stream_writes_are_written_by_a_kernel(monkeypatch):
    runtime = FakeRuntime()
    installed(monkeypatch, runtime, writes_words=0)
    driver = cupy_driver.CupyDriver()
    launched = []

    class Streams:
        def __init__(self, stream) -> None:
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *_) -> None:
            launched.append(self.stream)

    class Module:
        def __init__(self, code: str, options) -> None:
            assert "kvg_publish" in code

        def get_function(self, name: str):
            return lambda grid, threads, arguments: launched.append((name, grid, threads, arguments))

    driver._cupy.RawModule, driver._cupy.cuda.ExternalStream = Module, Streams
    driver.write_word(4096, 1 << 40, 9)
    assert launched == [("kvg_publish", (1,), (1,), (np.uint64(4096), np.uint64(1 << 40))), 9]


# ---- virtual memory -----------------------------------------------------------------------------------------------------------------


class Names:
    """An enumeration's names, each a number of its own."""

    def __init__(self, **values: int) -> None:
        self.__dict__.update(values)


POINTERS = {"IS_LEGACY_CUDA_IPC_CAPABLE": 10, "MAPPED": 13, "ALLOWED_HANDLE_TYPES": 14, "MAPPING_SIZE": 18, "MAPPING_BASE_ADDR": 19}


class FakeVmm:
    """The calls of cuda.bindings.driver for virtual memory, noted in order. `fails`: by name of a call, what its status is called."""

    def __init__(self, **fails: str) -> None:
        self.fails, self.calls, self.pointer = fails, [], {10: 0, 13: 1, 14: 1, 18: 2 << 20, 19: 4 << 20}
        self.CUpointer_attribute = Names(**{f"CU_POINTER_ATTRIBUTE_{name}": number for name, number in POINTERS.items()})
        self.CUmemAllocationHandleType = Names(CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR=1)
        self.CUmemAllocationType = Names(CU_MEM_ALLOCATION_TYPE_PINNED=1)
        self.CUmemLocationType = Names(CU_MEM_LOCATION_TYPE_DEVICE=1)
        self.CUmemAccess_flags = Names(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
        self.CUmemAllocationGranularity_flags = Names(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
        self.CUdevice_attribute = Names(
            CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS=1, CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WITH_CUDA_VMM_SUPPORTED=110
        )
        self.CUmemAllocationProp = lambda: types.SimpleNamespace(location=types.SimpleNamespace(), allocFlags=types.SimpleNamespace())
        self.CUmemAccessDesc = types.SimpleNamespace

    def names(self) -> dict:
        """Everything, as keywords for installed()."""
        answers = {
            "cuMemGetAllocationGranularity": 2 << 20, "cuMemCreate": 77, "cuMemRetainAllocationHandle": 78, "cuMemExportToShareableHandle": 5,
            "cuMemImportFromShareableHandle": 79, "cuMemAddressReserve": 4 << 20, "cuMemRelease": None, "cuMemAddressFree": None, "cuMemMap": None,
            "cuMemSetAccess": None, "cuMemUnmap": None,
        }  # fmt: skip
        enums = {name: value for name, value in vars(self).items() if name.startswith("CU")}
        return {**enums, **{name: self._call(name, answer) for name, answer in answers.items()}}

    def _call(self, name: str, answer):
        def call(*arguments):
            self.calls.append((name, *arguments))
            status = Status(1 if name in self.fails else 0)
            status.name = self.fails.get(name, "CUDA_SUCCESS")
            return (status,) if answer is None else (status, answer)

        call.__name__ = name
        return call

    def cuPointerGetAttribute(self, value, number, address) -> int:  # noqa: N802 - the driver's own name
        found = self.pointer.get(number.value)
        if found is None:
            return 1
        value._obj.value = found
        return 0


def virtual(monkeypatch, fake: FakeVmm, runtime: FakeRuntime | None = None):
    installed(monkeypatch, runtime or FakeRuntime(), **{name: value for name, value in fake.names().items() if name != "CUdevice_attribute"})
    monkeypatch.setattr(cuda_virtual, "_library", lambda: fake)
    driver = cupy_driver.CupyDriver()
    driver.virtual._driver.CUdevice_attribute = fake.CUdevice_attribute
    return driver.virtual


def test_memory_is_made_to_be_shared_and_goes_in_order(monkeypatch):
    fake = FakeVmm()
    made = virtual(monkeypatch, fake)
    fd, size = created(made, 100)
    assert (fd, size, made.granularity) == (5, 2 << 20, 2 << 20)
    wanted = fake.calls[1][2]
    assert (wanted.requestedHandleTypes, wanted.location.type, wanted.location.id, wanted.allocFlags.gpuDirectRDMACapable) == (1, 1, 0, 1)
    assert [call[0] for call in fake.calls[1:]] == ["cuMemCreate", "cuMemExportToShareableHandle", "cuMemRelease"]
    fake.calls.clear()
    piece = os.memfd_create("piece")
    Segment(made, [2 << 20], [[piece]]).close()
    assert [call[:3] for call in fake.calls] == [
        ("cuMemAddressReserve", 2 << 20, 0), ("cuMemImportFromShareableHandle", piece, 1), ("cuMemMap", 4 << 20, 2 << 20), ("cuMemSetAccess", 4 << 20, 2 << 20),
        ("cuMemRelease", 79), ("cuMemUnmap", 4 << 20, 2 << 20), ("cuMemAddressFree", 4 << 20, 2 << 20),
    ]  # fmt: skip
    with pytest.raises(OSError):
        os.fstat(piece)


def test_what_can_t_be_made_accessible_is_unmapped_again(monkeypatch):
    fake = FakeVmm(cuMemSetAccess="CUDA_ERROR_NOT_SUPPORTED")
    made = virtual(monkeypatch, fake)
    with pytest.raises(Refused, match="MIG"):
        Segment(made, [2 << 20], [[os.memfd_create("piece")]])
    assert [call[0] for call in fake.calls[-4:]] == ["cuMemSetAccess", "cuMemUnmap", "cuMemRelease", "cuMemAddressFree"]


def test_a_pointer_says_what_is_mapped_there(monkeypatch):
    fake = FakeVmm()
    made = virtual(monkeypatch, fake)
    assert made.chunk_of(5 << 20) == Chunk(4 << 20, 2 << 20, True)
    fake.pointer[14] = 8  # fabric handles alone
    assert made.chunk_of(5 << 20) == Chunk(4 << 20, 2 << 20, False)
    for changed in ({10: 1}, {13: 0}, {10: None, 13: None}, {18: None}):
        fake.pointer = {**FakeVmm().pointer, **changed}
        assert made.chunk_of(5 << 20) is None


def test_without_virtual_memory_nothing_is_lent_and_it_is_said_why(monkeypatch):
    made = virtual(monkeypatch, FakeVmm(cuMemGetAllocationGranularity="CUDA_ERROR_NOT_SUPPORTED"))
    with pytest.raises(Refused, match="Try:"):
        created(made, 100)
    lost = virtual(monkeypatch, FakeVmm(cuMemCreate="CUDA_ERROR_OUT_OF_MEMORY"))
    with pytest.raises(Refused, match="smaller pool"):
        created(lost, 100)
    gone = virtual(monkeypatch, FakeVmm(cuMemUnmap="CUDA_ERROR_ECC_UNCORRECTABLE"))
    with pytest.raises(DeviceLost, match="drain"):
        gone.unmap(4 << 20, 2 << 20)


@pytest.mark.parametrize(
    ("answer", "captured"), [((0, "CUDA_SUCCESS", 0), False), ((0, "CUDA_SUCCESS", 1), True), ((0, "CUDA_SUCCESS", 2), True),
                             ((906, "CUDA_ERROR_STREAM_CAPTURE_IMPLICIT", 0), True)],
)  # fmt: skip
def test_a_stream_that_is_captured_is_known(monkeypatch, answer, captured):
    status = Status(answer[0])
    status.name = answer[1]

    def cuStreamIsCapturing(stream):  # noqa: N802 - the driver's own name
        return status, answer[2]

    installed(monkeypatch, FakeRuntime(), cuStreamIsCapturing=cuStreamIsCapturing)
    assert cupy_driver.CupyDriver().is_captured(5) is captured


def test_a_stream_that_is_none_is_an_error(monkeypatch):
    status = Status(400)
    status.name = "CUDA_ERROR_INVALID_HANDLE"

    def cuStreamIsCapturing(stream):  # noqa: N802 - the driver's own name
        return status, 0

    installed(monkeypatch, FakeRuntime(), cuStreamIsCapturing=cuStreamIsCapturing)
    with pytest.raises(Refused, match="INVALID_HANDLE"):
        cupy_driver.CupyDriver().is_captured(5)
