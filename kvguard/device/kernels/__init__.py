"""The few kernels that run on a GPU: their source (pool.cu), what they are launched with (plan.py), and their arithmetic in Python (twin.py)."""

from __future__ import annotations

from importlib.resources import files


def source() -> str:
    """pool.cu, for NVRTC. It includes nothing."""
    return files(__name__).joinpath("pool.cu").read_text(encoding="utf-8")
