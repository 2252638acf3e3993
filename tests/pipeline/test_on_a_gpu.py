"""The forward pass with everything on a GPU: no two devices meet in it, and its numbers are those of the CPU. The GPU is pretended where there is none."""

from __future__ import annotations

import pytest
import torch

from kvguard.engine.tensors import proof_memory, tensor_of
from kvguard.device import open_device
from kvguard.errors import Refused
from kvguard.format.layout import Layout
from kvguard.pipeline.batch import Batch, Share
from kvguard.pipeline.model import StageModel
from kvguard.pipeline.stage import prove, view_of
from kvguard.types import Span
from tests.pretended_gpu import GPU, pretended

PROMPT = [5, 9, 14, 3, 77, 20, 31, 8, 2]


def steps(files, device: torch.device) -> list[torch.Tensor]:
    """Two stages: a prompt's chunk, two sequences of which one decodes, a replay of several positions; logits of each, on the CPU."""
    layers = files.shape.layers
    stages = [StageModel(files, span, first, not first, device=device) for span, first in ((range(1), True), (range(1, layers), False))]
    pools = [torch.zeros(stage.pool_shape(8, 16), device=device) for stage in stages]
    plans = [
        ([Share("one", Span(0, 9), True, (3,), 1)], PROMPT),
        ([Share("one", Span(9, 10), False, (3,), 1), Share("two", Span(0, 4), True, (0,), 0)], [41, 6, 7, 8, 9]),
        ([Share("two", Span(4, 7), False, (0,), 3)], [1, 2, 3]),
    ]
    found = []
    for shares, ids in plans:
        x = torch.tensor(ids)
        for stage, kv in zip(stages, pools, strict=True):
            x = forward(stage, x, Batch(tuple(shares)), kv).cpu()  # as between processes
        found.append(x)
    return found


@torch.no_grad()
def forward(stage: StageModel, x: torch.Tensor, batch: Batch, kv: torch.Tensor) -> torch.Tensor:
    """Without inference_mode, in which torch can't make views of tensors that are only pretended."""
    return StageModel.forward.__wrapped__(stage, x, batch, kv)


def test_no_two_devices_meet(files):
    wanted = steps(files, torch.device("cpu"))
    with pretended():
        found = steps(files, GPU)
    assert [one.shape for one in found] == [one.shape for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_two_devices_that_meet_would_be_seen(files):
    stage = StageModel(files, range(files.shape.layers), True, True)
    with pretended(), pytest.raises(AssertionError, match="meet tensors of the GPU"):
        forward(stage, torch.tensor(PROMPT), Batch((Share("one", Span(0, 9), True, (3,), 1),)), torch.zeros(stage.pool_shape(8, 16), device=GPU))


def test_what_a_layout_says_is_proved_there():
    layout = Layout.paged("m", "float32", 2, 2, 4, 2, 8)
    with pretended():
        prove(layout, GPU)
        memory, whole, exchange = proof_memory(layout, GPU)
        assert whole.device == GPU
        memory[:4] = b"\x01\x02\x03\x04"
        exchange(lambda: whole[4:8].fill_(9))
        assert bytes(memory[:9]) == b"\x01\x02\x03\x04\x09\x09\x09\x09\x00"
        wrong = Layout.paged("m", "float32", 2, 2, 4, 2, 8, order="layer,kv,block,head,slot,dim")
        with pytest.raises(Refused, match="strides"):
            prove(wrong, GPU)


@pytest.mark.parametrize("kind", ["host", "rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_torch_writes_is_what_the_pool_has(kind):
    layout = Layout.paged("m", "float32", 2, 3, 4, 2, 8)
    pool = open_device(kind).allocate(layout)
    kv = view_of(tensor_of(pool), layout)
    assert kv.shape == (2, 2, 3, 4, 2, 8) and kv.device.type == ("cuda" if kind == "cuda" else "cpu")
    kv[:, :, 1, 2].copy_(torch.arange(64.0).view(2, 2, 2, 8))
    out = memoryview(bytearray(layout.token_bytes))
    pool.capture([1], [2], [1], out)
    assert torch.frombuffer(out, dtype=torch.float32).tolist() == list(range(64))
    pool.scatter([0], [0], [1], out)
    assert torch.equal(kv[:, :, 0, 0].cpu(), torch.arange(64.0).view(2, 2, 2, 8))
    del kv
    pool.close()
