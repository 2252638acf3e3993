"""Our forward pass against transformers' own, and against itself: split over stages, with other batch mates, in plain mode."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from kvguard.pipeline.batch import Batch, Share
from kvguard.pipeline.model import DECODE_ROWS, Rows, StageModel
from kvguard.pipeline.weights import make_random, open_model
from kvguard.types import Span


def reference_logits(directory, ids):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def own_logits(pipeline, ids, prompt):
    pipeline.add("a", ids, prompt)
    while pipeline.step(generate=False):
        pass
    return torch.stack([pipeline.logits["a", p] for p in range(len(ids))])


def test_equals_transformers(files, pipeline, prompts):
    ids = prompts(150, seed=1)
    assert torch.allclose(own_logits(pipeline(files), ids, 140), reference_logits(files.directory, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "change"), [
    ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 64}}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0}}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("opt", {"activation_function": "gelu"}),
])
def test_equals_transformers_with_options(tmp_path, pipeline, prompts, family, change):
    directory = make_random(tmp_path, family, seed=3)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    ids = prompts(100, seed=2)
    assert torch.allclose(own_logits(pipeline(open_model(directory)), ids, 100), reference_logits(directory, ids), atol=1e-4, rtol=1e-4)


def test_stages_compute_the_same_bits(files, pipeline, prompts):
    runs = []
    for stages in (1, 2, 3):
        run = pipeline(files, stages=stages)
        run.add("a", prompts(70, seed=1))
        run.add("b", prompts(9, seed=2))
        run.generate(6)
        runs.append((run.checksums, run.kv_of("a", 75).numpy().tobytes(), run.kv_of("b", 14).numpy().tobytes()))
    assert runs[0] == runs[1] == runs[2]


def test_bits_do_not_depend_on_batch_mates(files, pipeline, prompts):
    names = [f"s{i}" for i in range(18)]
    lengths = [1, 2, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 66, 80, 100, 127, 128, 130]

    def run(order, **how):
        made = pipeline(files, blocks=192)
        for name in order:
            i = names.index(name)
            made.add(name, prompts(lengths[i], seed=i))
        made.generate(5, **how)
        return made

    together, backwards = run(names), run(names[::-1], positions_max=64)
    assert together.checksums == backwards.checksums
    assert len({together.running[name].position for name in names}) > 10
    for name in names[::4]:
        alone = run([name])
        assert alone.checksums.items() <= together.checksums.items()
        end = alone.running[name].position
        assert alone.kv_of(name, end).numpy().tobytes() == together.kv_of(name, end).numpy().tobytes()


def test_plain_mode_is_close(files, pipeline, prompts):
    ids = prompts(90, seed=5)
    exact, plain = own_logits(pipeline(files), ids, 80), own_logits(pipeline(files, invariant=False), ids, 80)
    assert torch.allclose(exact, plain, atol=1e-4, rtol=1e-4)


def test_products_are_independent_of_rows_here(files):
    assert StageModel(files, range(files.shape.layers), True, True).rows_are_independent()


def test_a_part_of_a_warm_model_computes_the_same_bits(files, pipeline, prompts):
    whole, made = pipeline(files, stages=1), pipeline(files, stages=3)
    warm = StageModel(files, range(files.shape.layers), True, True)
    warm.warm()
    made.stages = [warm.part(stage.layers, stage.first, stage.last) for stage in made.stages]
    made.stages[1].warm()
    for run in (whole, made):
        run.add("a", prompts(70, seed=1))
        run.generate(4)
    assert whole.checksums == made.checksums
    for wrong in ((range(0, 9), True, True), (range(2, 2), False, False)):
        with pytest.raises(ValueError, match="Try:"):
            warm.part(*wrong)
    with pytest.raises(ValueError, match="Try:"):
        made.stages[1].part(range(1, 2), True, False)


def test_pulse_after_every_layer_of_the_stage(files):
    stage, pulses = StageModel(files, range(1, 3), False, False), []
    share = Share("a", Span(0, 3), True, (0,), 0)
    out = stage.forward(torch.zeros(3, files.shape.hidden), Batch((share,)), torch.zeros(stage.pool_shape(1, 16)), pulses.append)
    assert pulses == [1, 2] and out.shape == (3, files.shape.hidden)


def test_logits_only_where_asked(files):
    stage = StageModel(files, range(files.shape.layers), True, True)
    kv = torch.zeros(stage.pool_shape(4, 16))
    shares = (Share("a", Span(0, 5), True, (0,), 0), Share("b", Span(0, 5), True, (1,), 2), Share("c", Span(0, 1), False, (2,), 1))
    logits = stage.forward(torch.arange(11), Batch(shares), kv)
    assert logits.shape == (3, files.shape.vocab)
    assert stage.forward(torch.arange(5), Batch(shares[:1]), kv).shape == (0, files.shape.vocab)
    assert stage.forward(torch.arange(0), Batch(()), kv).shape == (0, files.shape.vocab)


def test_a_pool_or_batch_that_does_not_fit_is_a_bug(files):
    stage = StageModel(files, range(files.shape.layers), True, True)
    kv = torch.zeros(stage.pool_shape(4, 16))
    ids = torch.arange(5)
    for share in (Share("a", Span(0, 5), True, (), 1), Share("a", Span(0, 5), True, (4,), 1), Share("a", Span(15, 20), True, (1,), 1)):
        with pytest.raises(AssertionError):
            stage.forward(ids, Batch((share,)), kv)
    good = Share("a", Span(0, 5), True, (0,), 1)
    for batch, pool in ((Batch((good, good)), kv), (Batch((good,)), kv[:2]), (Batch((good,)), kv.to(torch.bfloat16))):
        with pytest.raises(AssertionError):
            stage.forward(ids, batch, pool)


def test_layers_beyond_the_model_are_refused(files):
    with pytest.raises(ValueError, match="Try:"):
        StageModel(files, range(2, files.shape.layers + 1), False, True)


def test_tiles_hold_every_row_once():
    rows = Rows([(1, False), (70, True), (12, False), (8, True)], invariant=True)
    assert rows.padded[rows.place].tolist() == list(range(91))
    sizes = [end - start for start, end in rows.tiles]
    assert sizes == [DECODE_ROWS, DECODE_ROWS, 72, 8] and rows.tiles[-1][1] == len(rows.padded)
    assert rows.place[1:71].tolist() == list(range(16, 86))  # a chunk's rows lie in order from its tile's start


def test_half_precision_runs(tmp_path, prompts):
    files = open_model(make_random(tmp_path, "llama", seed=1))
    stage = StageModel(files, range(3), True, True, dtype=torch.bfloat16)
    kv = torch.zeros(stage.pool_shape(4, 16), dtype=torch.bfloat16)
    logits = stage.forward(torch.tensor(prompts(20, 1)), Batch((Share("a", Span(0, 20), True, (0, 1), 1),)), kv)
    assert logits.dtype == torch.bfloat16 and torch.isfinite(logits).all()


def test_the_serving_path_is_light():
    """Stages must start fast and the driver must be small: no transformers in either, no torch in the driver's part."""
    script = ("import sys; import kvguard.pipeline.batch, kvguard.pipeline.pool, kvguard.pipeline.sampling, kvguard.pipeline.tokenizer, "
              "kvguard.pipeline.weights; assert 'torch' not in sys.modules; import kvguard.pipeline.model; "
              "assert 'transformers' not in sys.modules and 'torch' in sys.modules")
    subprocess.run([sys.executable, "-c", script], check=True)
