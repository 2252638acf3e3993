"""What CUDA's errors become, with a cupy that raises what cupy raises: no packages, no driver, no GPU, a GPU that is lost."""

from __future__ import annotations

import subprocess
import sys
import types

import numpy as np
import pytest

from kvguard.device import cupy_driver, open_device
from kvguard.device.cuda import CudaDevice
from kvguard.errors import BadConfig, DeviceLost, Refused
from kvguard.format.layout import Layout

LAYOUT = Layout.paged("m", "float16", 1, 2, 4, 1, 8)


class CUDARuntimeError(RuntimeError):
    """As cupy's: a number, and a text that begins with its name."""

    def __init__(self, status) -> None:
        super().__init__(status if isinstance(status, str) else {700: "cudaErrorIllegalAddress: an illegal memory access was encountered"}[status])


class Status(int):
    name = "CUDA_SUCCESS"


class FakeRuntime:
    """cupy.cuda.runtime, as far as it is called. `fails`: by name of a call, the text that it raises; `query`: what cudaEventQuery answers."""

    CUDARuntimeError = CUDARuntimeError

    def __init__(self, gpus: int = 1, **fails: str) -> None:
        self.gpus, self.fails, self.query, self.calls = gpus, fails, 0, []

    def __getattr__(self, name: str):
        def call(*arguments):
            self.calls.append((name, *arguments))
            if name in self.fails:
                raise CUDARuntimeError(self.fails[name])
            return {"getDeviceCount": self.gpus, "getDeviceProperties": {"name": b"H200"}, "eventQuery": self.query, "malloc": 1 << 20}.get(name, 7)

        return call


def installed(monkeypatch, runtime: FakeRuntime, writes_words: int = 1) -> None:
    ok = Status(0)
    uuid = types.SimpleNamespace(bytes=bytes(range(16)))
    driver = types.SimpleNamespace(
        cuDeviceGet=lambda number: (ok, number), cuDeviceGetUuid=lambda device: (ok, uuid), cuDeviceGetAttribute=lambda *_: (ok, writes_words),
        CUdevice_attribute=types.SimpleNamespace(CU_DEVICE_ATTRIBUTE_CAN_USE_64_BIT_STREAM_MEM_OPS=1), cuCtxGetStreamPriorityRange=lambda: (ok, 0, -5),
        CUdeviceptr=int, cuStreamWriteValue64=lambda *_: (ok,),
    )  # fmt: skip
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
    assert driver.allocate(4096) == 1 << 20 and ("memset", 1 << 20, 0, 4096) in runtime.calls
    runtime.fails["malloc"] = "cudaErrorMemoryAllocation: out of memory"
    with pytest.raises(Refused, match="smaller pool"):
        driver.allocate(4096)
    with pytest.raises(Refused, match="smaller pool"):
        CudaDevice(lambda: (driver,)).allocate(LAYOUT)


def test_nothing_of_cuda_is_imported_before_it_is_used():
    code = (
        "import sys; from kvguard.device import open_device; from kvguard.daemon import node, ranks, salvage; open_device('cuda'); "
        "print([name for name in ('cupy', 'cuda', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


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
