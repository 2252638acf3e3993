"""Model directories: what opens, what is refused and how, and that stages share the mapped file."""

from __future__ import annotations

import json

import pytest
import torch

from kvguard.errors import BadConfig
from kvguard.pipeline.weights import FAMILIES, make_random, open_model, tensor_shapes, write_safetensors


@pytest.fixture(params=FAMILIES)
def directory(request, tmp_path):
    return make_random(tmp_path / request.param, request.param, seed=1)


def rewrite(directory, change):
    """Writes the tensors of `directory` again after `change(dict)`."""
    files = open_model(directory)
    tensors = {files._full(name): tensor.clone() for name, tensor in files.read(all_names(files)).items()}
    change(tensors)
    write_safetensors(directory / "model.safetensors", tensors)


def all_names(files):
    return tensor_shapes(files.shape, range(files.shape.layers), True, True)


def change_config(directory, **change):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_random_models_are_reproducible(tmp_path, directory):
    family = directory.name
    again = make_random(tmp_path / "again", family, seed=1)
    assert (again / "model.safetensors").read_bytes() == (directory / "model.safetensors").read_bytes()
    other = make_random(tmp_path / "other", family, seed=2)
    assert (other / "model.safetensors").read_bytes() != (directory / "model.safetensors").read_bytes()


def test_shape_says_what_the_kv_is_made_of(tmp_path):
    shape = open_model(make_random(tmp_path, "llama", seed=1)).shape
    assert (shape.layers, shape.heads, shape.kv_heads, shape.head_dim, shape.eos) == (3, 4, 2, 16, (2,))


def test_a_stage_reads_only_its_layers(directory):
    files = open_model(directory)
    middle = set(tensor_shapes(files.shape, range(1, 2), False, False))
    assert middle and all(".1." in name for name in middle)
    whole = set(all_names(files))
    parts = [set(tensor_shapes(files.shape, range(i, i + 1), i == 0, i == 2)) for i in range(3)]
    assert set().union(*parts) == whole


def test_float32_is_mapped_not_copied(directory):
    files = open_model(directory)
    name = next(iter(tensor_shapes(files.shape, range(1), False, False)))
    one, two = files.read([name])[name], files.read([name])[name]
    path = str(directory / "model.safetensors")
    with open("/proc/self/maps", encoding="ascii") as maps:
        ranges = [line.split()[0].split("-") for line in maps if line.rstrip().endswith(path)]
    for tensor in (one, two):
        assert any(int(low, 16) <= tensor.data_ptr() < int(high, 16) for low, high in ranges)
    assert torch.equal(one, two)


def test_tensors_lie_at_cache_lines(tmp_path):
    files = open_model(make_random(tmp_path, "llama", seed=1))
    assert all(tensor.data_ptr() % 64 == 0 for tensor in files.read(all_names(files)).values())


def test_sharded_and_half_precision_directories_open(directory):
    files = open_model(directory)
    tensors = {files._full(name): tensor for name, tensor in files.read(all_names(files)).items()}
    names = sorted(tensors)
    (directory / "model.safetensors").rename(directory / "whole")
    parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for part, held in parts.items():
        write_safetensors(directory / part, {name: tensors[name].to(torch.bfloat16) for name in held})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {n: part for part, held in parts.items() for n in held}}))
    sharded = open_model(directory)
    for name, tensor in sharded.read(all_names(sharded)).items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[sharded._full(name)].to(torch.bfloat16).float())


def test_checkpoints_without_prefix_open(tmp_path):
    """The first GPT-2 checkpoints name their tensors without `transformer.`."""
    directory = make_random(tmp_path, "gpt2", seed=1)

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    rewrite(directory, strip)
    assert open_model(directory).prefix == ""


def test_what_is_not_a_model_is_refused(tmp_path, directory):
    with pytest.raises(BadConfig, match=r"not a model directory.*config\.json.*Try:"):
        open_model(tmp_path / "nothing")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(BadConfig, match="no model.safetensors.*Try:"):
        open_model(directory)
    (directory / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header at all")
    with pytest.raises(BadConfig, match="can't be read.*Try:"):
        open_model(directory)
    (directory / "config.json").write_text("[1]")
    with pytest.raises(BadConfig, match="not a JSON object.*Try:"):
        open_model(directory)


def test_an_index_without_a_map_is_refused(directory):
    (directory / "model.safetensors").unlink()
    (directory / "model.safetensors.index.json").write_text('{"weight_map": ["../../etc/passwd"]}')
    with pytest.raises(BadConfig, match="weight_map.*Try:"):
        open_model(directory)


def test_files_that_vanish_after_opening_are_named(directory):
    files = open_model(directory)
    (directory / "model.safetensors").unlink()
    with pytest.raises(BadConfig, match="any more.*Try:"):
        files.read(all_names(files))


def test_a_truncated_file_is_refused(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadConfig, match="can't be read.*Try:"):
        open_model(directory)


def test_missing_and_misshapen_tensors_are_all_named(directory):
    files = open_model(directory)
    first, second = [files._full(name) for name in list(tensor_shapes(files.shape, range(2, 3), False, False))[:2]]

    def damage(tensors):
        del tensors[first]
        tensors[second] = tensors[second][:-1].contiguous()

    rewrite(directory, damage)
    with pytest.raises(BadConfig) as caught:
        open_model(directory)
    assert f"tensor {first} is missing" in str(caught.value) and second in str(caught.value) and "Try:" in str(caught.value)


@pytest.mark.parametrize(("family", "change", "says"), [
    ("llama", {"model_type": "mamba"}, "'mamba' is not supported"),
    ("llama", {"num_hidden_layers": None}, "num_hidden_layers"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
    ("llama", {"hidden_act": "xielu"}, "xielu"),
    ("llama", {"num_key_value_heads": 3}, "3 KV heads"),
    ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("llama", {"rope_parameters": 3}, "rope_parameters is 3"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_parameters": None}, "dynamic"),
    ("llama", {"hidden_size": True, "eos_token_id": "end", "rms_norm_eps": "small"}, "hidden_size is True.*epsilon is 'small'.*eos_token_id"),
    ("llama", {"model_type": ["llama"]}, "not supported"),
    ("gpt2", {"n_inner": -4}, "n_inner is -4"),
    ("gpt2", {"n_head": 5}, "5 heads"),
    ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
    ("opt", {"word_embed_proj_dim": 32, "activation_function": "swish"}, "word_embed_proj_dim"),
])
def test_configs_without_code_are_refused(tmp_path, family, change, says):
    directory = make_random(tmp_path, family, seed=1)
    change_config(directory, **change)
    with pytest.raises(BadConfig, match=f"{says}.*Try:"):
        open_model(directory)
