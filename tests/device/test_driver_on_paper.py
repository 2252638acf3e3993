"""What reaches the CUDA driver through cuda-bindings, byte by byte: a libcuda.so.1 that writes its arguments down (driver_on_paper.c). No GPU, no cupy.

A structure whose field doesn't arrive, a descriptor that is taken for an address, a number that is cut: the libraries' signatures say nothing of these.
Skipped where cuda-bindings or a C compiler isn't installed. What the driver does with it only a GPU can tell.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COMPILER = shutil.which("cc") or shutil.which("gcc")
try:
    there = importlib.util.find_spec("cuda.bindings") is not None
except ModuleNotFoundError:  # the package around it
    there = False
pytestmark = [
    pytest.mark.skipif(not there and not os.environ.get("KVGUARD_REQUIRE_ALL"), reason="cuda-bindings is not installed: pip install 'kvguard[cuda13]'"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler on the PATH"),
]
BEGIN = """
import types
from cuda.bindings import driver
from kvguard.device import cupy_driver

class Runtime:
    CUDARuntimeError = RuntimeError

    def __getattr__(self, name):
        return lambda *arguments: {"getDeviceProperties": {"name": b"paper"}}.get(name, 7)

cupy_driver.load = lambda: (types.SimpleNamespace(cuda=types.SimpleNamespace(runtime=Runtime())), driver)
made = cupy_driver.CupyDriver(3)
virtual = made.virtual
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    command = [COMPILER, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", folder / "libcuda.so.1", HERE / "driver_on_paper.c", "-ldl"]
    subprocess.run(command, check=True, timeout=60)
    return folder


def asked_for(library: Path, code: str) -> tuple[str, list[str]]:
    """(what the code printed, the driver's calls but those for the capture's mode and for attributes) of a process in which this is the driver."""
    paper = library / "calls"
    paper.unlink(missing_ok=True)
    found = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library), "DRIVER_ON_PAPER": str(paper), "PYTHONPATH": found}
    done = subprocess.run([sys.executable, "-c", BEGIN + code], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), [line for line in paper.read_text().splitlines() if not line.startswith(("mode", "cuDeviceGetAttribute", "cuInit"))]


def test_a_gpu_and_its_streams(library):
    code = "stream = made.stream(urgent=True); made.write_word((1 << 47) + 8, (1 << 64) - 1, stream); print(made.uuid, int(stream)); del stream"
    said, calls = asked_for(library, code)
    assert said == f"GPU-f3f4f5f6-f7f8-f9fa-fbfc-fdfeff000102 {0xABC000}" and calls == [
        "cuStreamCreateWithPriority 1 -5", "cuStreamWriteValue64 abc000 800000000008 ffffffffffffffff 0", "cuStreamDestroy abc000",
    ]  # fmt: skip


def test_a_stream_that_is_captured_is_known_and_so_is_the_default_one_beside_it(library):
    said, calls = asked_for(library, "print([made.is_captured(stream) for stream in (0xca97, 0xabc000, 0)])")
    assert said == "[True, False, True]" and calls == [f"cuStreamIsCapturing {stream}" for stream in ("ca97", "abc000", "0")]


def test_events(library):
    code = """
seen = [made.is_done(types.SimpleNamespace(address=event)) for event in (0x1a7e, 0xe7e47)]
try:
    made.is_done(types.SimpleNamespace(address=0xbad))
except Exception as error:
    print(seen, type(error).__name__)
"""
    said, calls = asked_for(library, code)
    assert said == "[False, True] DeviceLost" and calls == [f"cuEventQuery {event}" for event in ("1a7e", "e7e47", "bad")]


def test_only_calls_that_a_capture_forbids_change_its_mode(library):
    asked_for(library, "stream = made.stream(urgent=False); made.write_word(64, 1, stream); made.virtual.create(2 << 20)")
    lines = (library / "calls").read_text().splitlines()
    written = next(n for n, line in enumerate(lines) if line.startswith("cuStreamWriteValue64"))
    made = next(n for n, line in enumerate(lines) if line.startswith("cuMemCreate"))
    assert next(line for line in lines[made::-1] if line.startswith("mode")) == "mode 2" and lines[made + 1] == "mode 0" and lines[written - 1] == "mode 0"


def test_memory_by_descriptor(library):
    code = """
handle = virtual.create(4 << 20)
descriptor = virtual.descriptor_of(handle)
virtual.release(handle)
address = virtual.reserve(4 << 20)
taken = virtual.imported(29)
virtual.map(address, 4 << 20, taken)
virtual.release(taken)
print(descriptor, virtual.granularity, virtual.retained(address + 5))
virtual.unmap(address, 4 << 20)
virtual.unreserve(address, 4 << 20)
"""
    said, calls = asked_for(library, code)
    assert said == f"41 {2 << 20} {0x78}"
    assert calls == [
        "cuMemCreate 4194304 type 1 handles 1 where 1 3 rdma 1 compression 0 flags 0", "cuMemExportToShareableHandle f000000000000077 1 0",
        "cuMemRelease f000000000000077", "cuMemAddressReserve 4194304 0 0 0", "cuMemImportFromShareableHandle 29 1", "cuMemMap a000000000 4194304 0 79 0",
        "cuMemSetAccess a000000000 4194304 where 1 3 flags 3 count 1", "cuMemRelease 79", "cuMemGetAllocationGranularity 1 0",
        "cuMemRetainAllocationHandle a000000005", "cuMemUnmap a000000000 4194304", "cuMemAddressFree a000000000 4194304",
    ]  # fmt: skip


def test_pointers(library):
    """Attributes are a byte, a number of four, or one of eight bytes; none is read beyond its size."""
    said, _ = asked_for(library, "print(made.allocation_of(0x7F0000100123), virtual.chunk_of(0x7F0000100123), virtual.chunk_of(0xA000400005))")
    assert said == (
        f"Allocation(address={0x7F0000100000}, size=1048576, exportable=True) None Chunk(address={0xA000400000}, size=4194304, shareable=True)"
    )  # fmt: skip


def test_registered_memory_is_known_by_the_device_s_address(library):
    said, calls = asked_for(library, "import mmap; memory = memoryview(mmap.mmap(-1, 4096)); print(hex(made.registered(memory)))")
    assert int(said, 16) >> 48 == 1 and calls == ["cuMemHostGetDevicePointer 0"]
