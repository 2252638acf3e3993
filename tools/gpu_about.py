"""What a GPU check ran on: the GPU, its driver, libraries, and what the driver says it can do. Whatever can't be asked says why instead of failing.

Knows: versions and attributes. Must not know: steps.
"""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "kvguard", "numpy", "torch", "triton", "cupy-cuda12x", "cupy-cuda13x", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "transformers",
    "safetensors", "pyzmq", "msgspec", "xxhash", "pytest", "hypothesis",
)  # fmt: skip
QUERY = "name,uuid,driver_version,memory.total,pcie.link.gen.current,pcie.link.gen.max,pcie.link.width.current,compute_mode,mig.mode.current,persistence_mode"
# What the pools stand on, by the driver's own names without their common beginning.
ATTRIBUTES = (
    "CAN_USE_64_BIT_STREAM_MEM_OPS", "CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM", "HOST_REGISTER_SUPPORTED", "READ_ONLY_HOST_REGISTER_SUPPORTED",
    "PAGEABLE_MEMORY_ACCESS", "UNIFIED_ADDRESSING", "VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED", "HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED",
    "HANDLE_TYPE_FABRIC_SUPPORTED", "IPC_EVENT_SUPPORTED", "ASYNC_ENGINE_COUNT", "MULTIPROCESSOR_COUNT", "COMPUTE_CAPABILITY_MAJOR", "COMPUTE_CAPABILITY_MINOR",
)  # fmt: skip


def machine(dry: bool) -> dict:
    """Everything, as far as it can be asked. `gpu` is empty where no GPU works, `reason` says why."""
    commit = asked(["git", "-C", str(ROOT), "rev-parse", "HEAD"])
    packages = {name: version for name in PACKAGES if (version := version_of(name))}
    found = {
        "gpu": "", "uuid": "", "dry_run": dry, "at": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit if len(commit) == 40 else "unknown",
        "python": platform.python_version(), "kernel": platform.release(), "memlock": limit(), "packages": packages,
        "nvidia_smi": "" if dry else asked(["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]),
    }  # fmt: skip
    try:
        from gpu_steps import Bench

        bench = Bench(dry)
        found |= {"gpu": bench.name, "uuid": bench.uuid}
    except Exception as error:  # the one thing that the check can't do without: it is said, and the check ends there
        return {**found, "reason": f"{error}"}
    return found if dry else {**found, "cuda": tried(versions), "can": tried(attributes)}


def versions() -> dict:
    import cupy

    runtime = cupy.cuda.runtime
    found = {"driver": runtime.driverGetVersion(), "runtime": runtime.runtimeGetVersion(), "free_total": runtime.memGetInfo()}
    return {**found, "nvrtc": tried(lambda: {"version": cupy.cuda.nvrtc.getVersion()}), "torch": tried(torch_version)}


def torch_version() -> dict:
    import torch

    return {"cuda": torch.version.cuda, "available": torch.cuda.is_available(), "arch": torch.cuda.get_arch_list()}


def attributes() -> dict:
    from cuda.bindings import driver

    names = {name: getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}", None) for name in ATTRIBUTES}
    return {name: int(driver.cuDeviceGetAttribute(number, 0)[1]) for name, number in names.items() if number is not None}


def tried(what: Callable[[], dict]) -> dict:
    try:
        return what()
    except Exception as error:  # whatever a library of another version raises: the check goes on
        return {"error": f"{type(error).__name__}: {error}"}


def limit() -> str:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return "unlimited" if soft == resource.RLIM_INFINITY else str(soft)


def version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def asked(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
