"""A second device for tests where there is no GPU: tensors that say that they are there, computed on the CPU, and refused where two devices meet.

    with pretended(): model.forward(...)

Knows: torch's dispatch. Must not know: what is computed. It finds tensors made on the wrong device; about speed, bits and streams it says nothing.
It goes by the name of meta, which every build of torch can index; one without CUDA can't index what says cuda.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
CPU, GPU = torch.device("cpu"), torch.device("meta")
MEETING = {aten._to_copy.default, aten.to.device, aten.to.dtype_layout, aten.copy_.default}  # what may have tensors of two devices
BY_INDEX = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}  # indices may be on the CPU


class Pretended(torch.Tensor):
    """`kept`: the same on the CPU."""

    @staticmethod
    def __new__(cls, real: torch.Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype, device=GPU, requires_grad=False,
        )  # fmt: skip
        made.kept = real
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Here(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _run(func, args, kwargs):
    if func is aten._fused_sdp_choice.default:
        return 0  # plain products: the other ways have no code on a CPU
    tensors = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    there = [one for one in tensors if isinstance(one, Pretended)]
    checked = tensors[:1] if func in BY_INDEX else tensors
    here = [one for one in checked if not isinstance(one, Pretended) and one.dim()]
    assert not (there and here) or func in MEETING, f"{func}: {[tuple(one.shape) for one in here]} on the CPU meet tensors of the GPU"
    wanted = next((one for one in (*args, kwargs.get("device")) if isinstance(one, torch.device)), None)
    on_gpu = wanted == GPU if wanted is not None else bool(there)
    args, kwargs = tree_map(lambda one: CPU if isinstance(one, torch.device) else one, (args, kwargs))
    by_real = {id(one.kept): one for one in there}

    def wrapped(one):
        if not isinstance(one, torch.Tensor) or isinstance(one, Pretended):
            return one
        return by_real.get(id(one)) if id(one) in by_real else Pretended(one) if on_gpu else one

    real_args, real_kwargs = tree_map(lambda one: one.kept if isinstance(one, Pretended) else one, (args, kwargs))
    return tree_map(wrapped, func(*real_args, **real_kwargs))


@contextmanager
def pretended():
    """A GPU is there meanwhile."""
    made = torch.tensor

    def tensor(data, *, device=None, **how) -> torch.Tensor:  # torch's own copies behind the mode's back
        return made(data, **how) if device is None else made(data, **how).to(device)

    with mock.patch.object(torch, "tensor", tensor), _Here():
        yield GPU
