"""A pool's memory as torch sees it, on whichever device it is: what a model writes into the tensor is what the node's daemon captures.

Knows: torch, pools. Must not know: what the bytes mean, steps.
Invariants: nothing is copied; a pool on a GPU is told on which stream torch launches, before anything is launched; the pool is closed after the last use of
the tensor, by whoever made both.
"""

from __future__ import annotations

import ctypes

import torch

from kvguard.device.rehearsal import Rehearsal

HOST, CUDA = "host", "cuda"


class _Area:
    """Device memory in the words that torch takes it by. Holds on to the pool."""

    def __init__(self, pool, size: int) -> None:
        self.pool = pool
        self.__cuda_array_interface__ = {"shape": (size,), "typestr": "|u1", "data": (pool.address, False), "strides": None, "version": 3}


def tensor_of(pool) -> torch.Tensor:
    """uint8 [pool_bytes] over the pool's own memory: a host pool's and a rehearsed one's on the CPU, any other on its GPU, whose current stream is followed."""
    if hasattr(pool, "memory"):
        return torch.frombuffer(pool.memory, dtype=torch.uint8)
    size = pool.layout.pool_bytes
    if isinstance(pool.driver, Rehearsal):
        return torch.frombuffer((ctypes.c_ubyte * size).from_address(pool.address), dtype=torch.uint8)
    gpu = torch.device(CUDA, pool.driver.number)
    pool.current = lambda: torch.cuda.current_stream(gpu).cuda_stream
    return torch.as_tensor(_Area(pool, size), device=gpu)


def computed_on(kind: str) -> torch.device:
    """Where a model computes whose pool is of device `kind` (device.KINDS)."""
    return torch.device(CUDA if kind == CUDA else "cpu")
