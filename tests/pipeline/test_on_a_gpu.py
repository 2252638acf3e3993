"""The forward pass with everything on a GPU: no two devices meet in it, and its numbers are those of the CPU. The GPU is pretended where there is none."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch

from kvguard.device import open_device
from kvguard.engine.tensors import tensor_of
from kvguard.errors import Refused
from kvguard.format.layout import Layout
from kvguard.pipeline.batch import Batch, Share
from kvguard.pipeline.model import StageModel
from kvguard.pipeline.rank import NoStep, RankLoad
from kvguard.pipeline.stage import prove, view_of
from kvguard.pipeline.steps import STEP, Facts, Message
from kvguard.types import Span
from tests.pipeline.toy_ranks import ToyModel
from tests.pretended_gpu import GPU, pretended

KINDS = ["host", "rehearsal", pytest.param("cuda", marks=pytest.mark.gpu)]
PROMPT = [5, 9, 14, 3, 77, 20, 31, 8, 2]


def steps(files, device: torch.device) -> list[torch.Tensor]:
    """Two stages: a prompt, two sequences of which one decodes, a replay, a prompt beside one that decodes; logits of each, on the CPU."""
    layers = files.shape.layers
    stages = [StageModel(files, span, first, not first, device=device) for span, first in ((range(1), True), (range(1, layers), False))]
    pools = [torch.zeros(stage.pool_shape(8, 16), device=device) for stage in stages]
    plans = [
        ([Share("one", Span(0, 9), True, (3,), 1)], PROMPT),
        ([Share("one", Span(9, 10), False, (3,), 1), Share("two", Span(0, 4), True, (0,), 0)], [41, 6, 7, 8, 9]),
        ([Share("two", Span(4, 7), False, (0,), 3)], [1, 2, 3]),
        ([Share("one", Span(10, 11), False, (3,), 1), Share("three", Span(0, 9), True, (5,), 1)], [17, *PROMPT]),
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
    summed: list[int] = []
    real = type(StageModel(files, range(1), True, False)._family).norm
    with pretended(), mock.patch(f"{real.__module__}.{real.__qualname__}", lambda self, name, x: summed.append(x.shape[0]) or real(self, name, x)):
        found = steps(files, GPU)
    assert set(summed) == {8, 16}, "how many rows are summed beside each other must not depend on who else is in the step"
    assert [one.shape for one in found] == [one.shape for one in wanted]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def test_two_devices_that_meet_would_be_seen(files):
    stage = StageModel(files, range(files.shape.layers), True, True)
    with pretended(), pytest.raises(AssertionError, match="meet tensors of the GPU"):
        forward(stage, torch.tensor(PROMPT), Batch((Share("one", Span(0, 9), True, (3,), 1),)), torch.zeros(stage.pool_shape(8, 16), device=GPU))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_layout_says_is_proved_there(kind):
    """Every byte by which the engine's own indexing and the layout differ is seen, in memory that torch reaches over the pool."""
    layout, wrong = (Layout.paged("m", "float32", 2, 2, 4, 2, 8, order=f"layer,kv,block,{order},dim") for order in ("slot,head", "head,slot"))
    for named in (layout, wrong):
        pool = open_device(kind).allocate(named)
        with nullcontext() if named == layout else pytest.raises(Refused, match="strides"):
            prove(pool, named, view_of(tensor_of(pool), layout))
        pool.close()


@pytest.mark.parametrize("kind", KINDS)
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


class Packing:
    """A guard whose pool packs: what its steps said that they wrote."""

    def __init__(self) -> None:
        self.pool, self.said = self, []

    def wrote(self, blocks, starts, counts) -> None:
        self.said.append(list(zip(blocks, starts, counts, strict=True)))

    @contextmanager
    def step(self, size: int):
        step = NoStep()
        step.wrote = self.wrote
        yield step

    def pulse(self) -> None:
        """Nobody watches."""

    def row(self, sequence: str) -> int:
        return 0


def test_a_step_says_every_slot_that_it_writes():
    guard = Packing()
    rank = RankLoad(ToyModel(), torch.zeros(1, 2, 8, 4, 1, 1), guard)
    prompt = Facts("one", 0, 5, True, 1, (6, 1), 0, (1, 2, 3, 4, 5, 6), b"r")
    token = Facts("one", 5, 6, False, 1, (), 6, (7,))
    for number, facts in enumerate([(prompt,), (token,), ()]):
        message = Message(STEP, 1, number, (), 0, facts, ("one",) if not facts else ())
        assert rank.fault(message, memoryview(b"")) == ""
        rank.run(message, memoryview(b""))
    assert guard.said == [[(6, 0, 4), (1, 0, 1)], [(1, 1, 1)]]
