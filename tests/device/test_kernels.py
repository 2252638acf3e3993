"""The kernels without a GPU: compiled for the architectures that are promised, run as ordinary C++ against the host device, and against their Python twin."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvguard.device import kernels
from kvguard.device.cupy_driver import COMPILER_OPTIONS
from kvguard.device.host import HostDevice
from kvguard.device.kernels import twin
from kvguard.device.kernels.plan import ITEMS_MAX, Plan, every_launch
from kvguard.errors import Refused
from kvguard.format.layout import Layout

HERE = Path(__file__).resolve().parent
SOURCE = Path(kernels.__file__).parent
REQUIRED = os.environ.get("KVGUARD_REQUIRE_ALL") == "1"
TENSOR = ["layer", "kv", "block", "slot", "head", "dim"]


def tool(name: str) -> str:
    """A compiler's path, or this test is skipped; where everything is required it fails instead, unless the package is said not to be obtainable."""
    found = shutil.which(name)
    if found is None:
        message = f"{name} is not on the PATH: the kernels' source isn't proved here"
        if REQUIRED and name not in os.environ.get("KVGUARD_UNOBTAINABLE", ""):
            pytest.fail(message)
        pytest.skip(message)
    return found


def by_nvcc(arch: str, folder: Path) -> bytes:
    out = folder / "pool.cubin"
    subprocess.run([tool("nvcc"), f"-arch={arch}", "-cubin", "-Werror", "all-warnings", "-o", out, SOURCE / "pool.cu"], check=True, timeout=120)
    return out.read_bytes()


def by_nvrtc(arch: str, library: Path) -> bytes:
    """As cupy compiles it, with the options that the driver gives."""
    nvrtc, program, size = ctypes.CDLL(str(library)), ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), kernels.source().encode(), b"pool.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={arch}".encode(), *(option.encode() for option in COMPILER_OPTIONS)]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    assert nvrtc.nvrtcGetCUBIN(program, binary) == 0
    return binary.raw


def nvrtc_library() -> Path | None:
    """NVRTC where the package nvidia-cuda-nvrtc (or -cu12) is installed: 58 MB, which no test needs that has nvcc."""
    roots = [Path(entry) / "nvidia" for entry in sys.path]
    return next((found for root in roots for found in sorted(root.glob("*/lib/libnvrtc.so.*")) if "builtins" not in found.name), None)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_source_compiles_for_every_promised_gpu(tmp_path, arch):
    library = nvrtc_library()
    compiled = [by_nvrtc(arch, library)] if library is not None else []
    if not compiled or shutil.which("nvcc"):
        compiled.append(by_nvcc(arch, tmp_path))
    names = [*(f"kvg_{verb}_{width}" for verb in ("gather", "scatter") for width in (16, 8, 4, 2, 1)), "kvg_publish"]
    assert compiled and all(name.encode() in binary for binary in compiled for name in names)


@pytest.fixture(scope="module")
def on_cpu(tmp_path_factory) -> ctypes.CDLL:
    """The very source, as a library of this machine."""
    out = tmp_path_factory.mktemp("kernels") / "pool.so"
    subprocess.run([tool("g++"), "-std=c++17", "-O1", "-shared", "-fPIC", f"-I{SOURCE}", HERE / "on_cpu.cpp", "-o", out], check=True, timeout=120)
    return ctypes.CDLL(str(out))


@st.composite
def layouts(draw) -> Layout:
    sizes = {"layers": draw(st.integers(1, 3)), "blocks": draw(st.integers(1, 4)), "block_tokens": draw(st.integers(1, 4))}
    dtype = draw(st.sampled_from(["float32", "bfloat16", "float8_e5m2"]))
    kind = draw(st.sampled_from(["paged", "per_layer", "apart", "latent", "opaque"]))
    if kind == "latent":
        order = draw(st.sampled_from(["layer,block,slot,dim", "block,slot,dim", "block,dim,slot"]))
        return Layout.latent("m", dtype, **sizes, latent_dim=draw(st.sampled_from([1, 3, 8, 36])), order=order)
    if kind == "opaque":
        return Layout.opaque("m", dtype, **sizes, page_bytes=draw(st.sampled_from([1, 40, 5000])))
    sizes |= {"kv_heads": draw(st.integers(1, 3)), "head_dim": draw(st.sampled_from([1, 2, 5, 8, 64]))}
    if kind == "paged":
        return Layout.paged("m", dtype, **sizes, order=",".join(draw(st.permutations(TENSOR)))).with_offset(draw(st.sampled_from([0, 0, 9, 16])))
    names = TENSOR[1:] if kind == "per_layer" else TENSOR[2:]
    return Layout.per_layer("m", dtype, **sizes, order=",".join(draw(st.permutations(names))))


@st.composite
def cases(draw):
    """(layout, slots, places or None): slots distinct, some of them padding or beyond the pool; places with gaps, in any order."""
    layout = draw(layouts())
    plan = Plan.of(layout)
    every = list(range(plan.blocks * plan.block_tokens))
    slots = draw(st.lists(st.sampled_from([*every, -1, -7, every[-1] + 1, every[-1] + 100]), min_size=1, max_size=6, unique=True))
    if not draw(st.booleans()):
        return layout, slots, None
    order = draw(st.permutations(range(len(slots))))
    return layout, slots, [n * (plan.unit_bytes + 16 - plan.unit_bytes % 16) for n in order]


def aligned(count: int, value: int) -> np.ndarray:
    """uint8 [count] on an address that is a multiple of 16, as cudaMalloc gives."""
    whole = np.full(count + 16, value, np.uint8)
    start = -whole.ctypes.data % 16
    return whole[start : start + count]


class Bench:
    """A noisy pool, a poisoned canonical side, and what the oracle says of both."""

    def __init__(self, layout: Layout, slots, places, seed: int) -> None:
        self.layout, self.plan, self.slots, self.places = layout, Plan.of(layout), slots, places
        random = np.random.default_rng(seed)
        self.pool = aligned(layout.pool_bytes, 0)
        self.pool[:] = random.integers(0, 256, self.pool.size, dtype=np.uint8)
        end = (max(places) if places else (len(slots) - 1) * self.plan.unit_bytes) + self.plan.unit_bytes
        self.flat = aligned(end, 0xEE)
        self.good = [(n, slot) for n, slot in enumerate(slots) if 0 <= slot < self.plan.blocks * self.plan.block_tokens]

    def place(self, n: int) -> slice:
        start = self.places[n] if self.places else n * self.plan.unit_bytes
        return slice(start, start + self.plan.unit_bytes)

    def oracle(self):
        device = HostDevice()
        pool = device.allocate(self.layout)
        np.frombuffer(pool.memory, np.uint8)[:] = self.pool
        return pool

    def gathered(self) -> np.ndarray:
        """The canonical side as the host device would have made it."""
        pool, wanted = self.oracle(), self.flat.copy()
        for n, slot in self.good:
            out = bytearray(self.plan.unit_bytes)
            if self.layout.addressable:
                pool.capture([slot // self.plan.block_tokens], [slot % self.plan.block_tokens], [1], memoryview(out))
            else:
                pool.capture_blocks([slot], memoryview(out))
            wanted[self.place(n)] = np.frombuffer(out, np.uint8)
        pool.close()
        return wanted

    def scattered(self) -> np.ndarray:
        pool = self.oracle()
        for n, slot in self.good:
            source = memoryview(self.flat[self.place(n)].tobytes())
            if self.layout.addressable:
                pool.scatter([slot // self.plan.block_tokens], [slot % self.plan.block_tokens], [1], source)
            else:
                pool.scatter_blocks([slot], source)
        wanted = np.frombuffer(pool.memory, np.uint8).copy()
        pool.close()
        return wanted


def run_source(library: ctypes.CDLL, bench: Bench, launch) -> None:
    """One launch of the compiled source, as driver code does it: pointers moved by what the launch skips."""
    slots = np.array(bench.slots, np.int64)[launch.skip :].copy()
    places = None if bench.places is None else np.array(bench.places, np.int64)[launch.skip :].copy()
    runs = bench.plan.groups[launch.group].runs
    flat = bench.flat.ctypes.data + (0 if places is not None else launch.skip * launch.unit_bytes)
    pointer, long, unsigned = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_uint
    getattr(library, f"launch_{launch.kernel}")(
        unsigned(launch.grid), unsigned(256), pointer(bench.pool.ctypes.data), pointer(flat), pointer(slots.ctypes.data),
        pointer(places.ctypes.data if places is not None else None), pointer(runs.ctypes.data), long(launch.blocks), long(launch.block_tokens),
        long(launch.block_stride), long(launch.slot_stride), long(launch.unit_bytes), unsigned(launch.first_run), unsigned(launch.run_count),
        unsigned(launch.run_units), unsigned(launch.items), unsigned(launch.lane_bits),
    )  # fmt: skip


def run_twin(bench: Bench, launch, gather: bool) -> None:
    for at, there, size in twin.copies(launch, bench.plan.groups[launch.group].runs.tolist(), bench.slots, bench.places):
        if gather:
            bench.flat[there : there + size] = bench.pool[at : at + size]
        else:
            bench.pool[at : at + size] = bench.flat[there : there + size]


@settings(max_examples=150, deadline=None)
@given(case=cases(), how=st.sampled_from(["source", "twin"]), alignment=st.sampled_from([16, 4, 1]), seed=st.integers(0, 9))
def test_source_and_twin_gather_what_the_host_device_gathers(on_cpu, case, how, alignment, seed):
    bench = Bench(*case, seed)
    wanted, kept = bench.gathered(), bench.pool.copy()
    for launch in bench.plan.launches(True, len(bench.slots), alignment if bench.places or bench.plan.unit_bytes % 16 else 16):
        run_source(on_cpu, bench, launch) if how == "source" else run_twin(bench, launch, True)
    assert np.array_equal(bench.flat, wanted) and np.array_equal(bench.pool, kept)


@settings(max_examples=150, deadline=None)
@given(case=cases(), how=st.sampled_from(["source", "twin"]), layered=st.booleans(), seed=st.integers(0, 9))
def test_source_and_twin_scatter_what_the_host_device_scatters(on_cpu, case, how, layered, seed):
    bench = Bench(*case, seed)
    bench.flat[:] = np.random.default_rng(seed + 1).integers(0, 256, bench.flat.size, dtype=np.uint8)
    wanted, kept = bench.scattered(), bench.flat.copy()
    for launch in every_launch(bench.plan, len(bench.slots)) if layered else bench.plan.launches(False, len(bench.slots)):
        run_source(on_cpu, bench, launch) if how == "source" else run_twin(bench, launch, False)
    assert np.array_equal(bench.pool, wanted) and np.array_equal(bench.flat, kept)


def test_one_layer_is_scattered_and_no_other(on_cpu):
    layout = Layout.paged("m", "float16", 3, 2, 4, 2, 8)
    bench = Bench(layout, [5], None, 1)
    kept = bench.pool.copy()
    for launch in bench.plan.launches(False, 1, layer=1):
        run_source(on_cpu, bench, launch)
    changed = {byte // (layout.pool_bytes // 3) for byte in np.flatnonzero(bench.pool != kept).tolist()}
    assert changed == {1}


def test_a_large_launch_is_cut_and_goes_on_where_it_was_cut(on_cpu, monkeypatch):
    monkeypatch.setattr("kvguard.device.kernels.plan.ITEMS_MAX", 5)
    bench = Bench(Layout.paged("m", "float16", 2, 4, 4, 2, 8), [3, 0, 9, 14], None, 1)
    launches = list(bench.plan.launches(True, 4))
    assert [(launch.skip, launch.tokens, launch.items) for launch in launches] == [(n, 1, 4) for n in range(4)]
    wanted = bench.gathered()
    for launch in launches:
        run_source(on_cpu, bench, launch)
    assert np.array_equal(bench.flat, wanted)
    run_twin(bench, replace(launches[2], items=0), True)
    assert np.array_equal(bench.flat, wanted)


def test_an_8b_model_is_read_16_bytes_at_a_time_and_no_launch_overflows():
    layout = Layout.paged("m", "bfloat16", 32, 30000, 16, 8, 128)
    plan = Plan.of(layout)
    (launch,) = plan.launches(True, 256)
    assert (launch.kernel, launch.items, launch.run_units, launch.lane_bits) == ("kvg_gather_16", 256 * 64, 128, 7)
    assert len(every_launch(plan, 256)) == 32 and plan.unit_bytes == 128 * 1024
    assert all(launch.items <= ITEMS_MAX for launch in plan.launches(False, 480_000))


def test_a_layout_of_too_many_runs_is_refused():
    with pytest.raises(Refused, match="Try:"):
        Plan.of(Layout.paged("m", "float16", 64, 2, 1, 16, 4096, order="layer,kv,dim,head,block,slot"))


def test_a_word_is_published_by_the_kernel(on_cpu):
    words = np.zeros(3, np.uint64)
    on_cpu.launch_publish(ctypes.c_void_p(words[1:].ctypes.data), ctypes.c_ulonglong(1 << 63 | 5))
    assert words.tolist() == [0, 1 << 63 | 5, 0]
