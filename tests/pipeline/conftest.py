"""A whole pipeline in one process, for tests: stages of a model, their pools, sequences that are stepped by hand."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch

from kvguard.errors import KvguardError
from kvguard.pipeline.batch import Batch, Need, Share, plan_step, resume_position
from kvguard.pipeline.model import StageModel
from kvguard.pipeline.pool import BlockPool
from kvguard.pipeline.sampling import logits_checksum
from kvguard.pipeline.weights import FAMILIES, ModelFiles, make_random, open_model


@dataclass
class Running:
    ids: list[int]
    prompt: int
    position: int = 0


class Pipeline:
    """All stages of `files` with pools full of NaN, so that a read of a slot that nobody wrote shows."""

    def __init__(self, files: ModelFiles, stages: int = 1, blocks: int = 64, invariant: bool = True, taken: int = 0):
        cuts = [files.shape.layers * i // stages for i in range(stages + 1)]
        self.stages = [StageModel(files, range(a, b), a == 0, b == files.shape.layers, invariant=invariant) for a, b in zip(cuts, cuts[1:])]
        self.kv = [torch.full(stage.pool_shape(blocks, 16), float("nan")) for stage in self.stages]
        self.pool = BlockPool(blocks)
        if taken:  # so that the same sequence lies elsewhere than in another pipeline
            self.pool.allocate("taken", taken * 16)
        self.running: dict[str, Running] = {}
        self.checksums: dict[tuple[str, int], int] = {}  # (sequence, position of the logits' input)
        self.logits: dict[tuple[str, int], torch.Tensor] = {}

    def add(self, name: str, ids: list[int], prompt: int | None = None, position: int = 0) -> None:
        self.running[name] = Running(list(ids), len(ids) if prompt is None else prompt, position)

    def forward(self, shares: list[Share], ids: list[int]) -> torch.Tensor:
        x, batch = torch.tensor(ids), Batch(tuple(shares))
        for stage, kv in zip(self.stages, self.kv):
            x = stage.forward(x, batch, kv)
        return x

    def step(self, names: list[str] | None = None, generate: bool = True, positions_max: int = 128, replay: int = 8) -> bool:
        """One planned step over `names` in that order; new ids are greedy. False if there was nothing to do."""
        order = names or list(self.running)
        needs = [Need(name, run.position, len(run.ids), run.prompt) for name, run in ((name, self.running[name]) for name in order)]
        shares, ids = [], []
        for planned in plan_step(needs, positions_max=positions_max, replay=replay):
            self.pool.allocate(planned.sequence, planned.span.end)
            count = planned.span.end - planned.span.start
            shares.append(planned._replace(logits=count).with_blocks(self.pool.table(planned.sequence)))
            ids += self.running[planned.sequence].ids[planned.span.start:planned.span.end]
        if not shares:
            return False
        logits, row = self.forward(shares, ids), 0
        for share in shares:
            run = self.running[share.sequence]
            run.position = share.span.end
            for position in range(*share.span):
                self.logits[share.sequence, position] = logits[row]
                self.checksums[share.sequence, position] = logits_checksum(logits[row].numpy())
                row += 1
            if generate and run.position == len(run.ids):
                run.ids.append(int(logits[row - 1].argmax()))
        return True

    def generate(self, tokens: int, **how) -> None:
        """Steps until every sequence has `tokens` ids beyond its prompt; the last of them is known, not computed."""
        while unfinished := [name for name, run in self.running.items() if len(run.ids) < run.prompt + tokens]:
            assert self.step(unfinished, **how)

    def kv_of(self, name: str, positions: int) -> torch.Tensor:
        """[layers, 2, positions, kv_heads, head_dim], a copy."""
        table = list(self.pool.table(name))
        return torch.cat([kv[:, :, table].flatten(2, 3)[:, :, :positions] for kv in self.kv])

    def restore(self, name: str, ids: list[int], prompt: int, source: torch.Tensor, position: int) -> int:
        """Continues `name` from the first `position` positions of `source`; returns where it really resumes."""
        position = resume_position(position, prompt)
        self.add(name, ids, prompt, position)
        self.pool.allocate(name, position)
        for p in range(position):
            layer = 0
            for kv in self.kv:
                kv[:, :, self.pool.table(name)[p // 16], p % 16] = source[layer:layer + kv.shape[0], :, p]
                layer += kv.shape[0]
        return position


@pytest.fixture(scope="session", autouse=True)
def one_compute_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", params=FAMILIES)
def files(request, tmp_path_factory) -> ModelFiles:
    """A tiny random model of each family."""
    return open_model(make_random(tmp_path_factory.mktemp(request.param), request.param, seed=7))


@pytest.fixture(scope="session")
def smollm2() -> ModelFiles:
    from kvguard.pipeline.smollm2 import fetch_smollm2

    try:
        return open_model(fetch_smollm2())
    except KvguardError as error:
        if os.environ.get("KVGUARD_REQUIRE_ALL") == "1":
            raise
        pytest.skip(f"no SmolLM2 weights: {error}")


def prompt_ids(length: int, seed: int, vocab: int = 320) -> list[int]:
    return torch.randint(3, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="session")
def prompts():
    return prompt_ids


@pytest.fixture(scope="session")
def pipeline():
    return Pipeline
