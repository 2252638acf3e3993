"""Model directories: what is in one, which tensors a family needs, and how a stage maps only its own.

Knows: config.json of the Llama, GPT-2 and OPT families, safetensors files (single or sharded), and how to write random ones for tests.
Must not know: how a forward pass uses the tensors (model.py), where SmolLM2 comes from (smollm2.py), blocks, sequences.
Invariants: open_model either returns a directory in which every tensor of every stage is there in the right shape, or raises BadConfig that
names all faults; reading never writes to the files; torch is imported only where a tensor is read or written.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from kvguard.errors import BadConfig

FAMILIES = ("llama", "gpt2", "opt")
ALIGNMENT = 64  # a cache line: matrix products read unaligned weights with split loads
_PREFIXES = {"llama": ("model.", ""), "gpt2": ("transformer.", ""), "opt": ("model.decoder.", "decoder.", "")}
_EMBEDDING = {"llama": "embed_tokens.weight", "gpt2": "wte.weight", "opt": "embed_tokens.weight"}
_ACTIVATIONS = ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")
_SAFETENSORS_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True)
class ModelShape:
    """What one config.json says, in one vocabulary for all families. `raw` is the document itself, for what only one family has."""

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the feed-forward part
    vocab: int
    context: int  # positions the model was made for
    norm_eps: float
    activation: str
    tied: bool  # the output projection is the embedding
    eos: tuple[int, ...]
    raw: dict = field(repr=False, hash=False, compare=False)


@dataclass(frozen=True)
class ModelFiles:
    """An opened model directory: its shape and the file of every tensor. Holds no tensor, no open file."""

    directory: Path
    shape: ModelShape
    prefix: str  # what the checkpoint puts before every name but the output projection's
    where: dict[str, Path] = field(repr=False, hash=False)

    def read(self, names, dtype=None) -> dict:
        """{name without prefix: torch tensor} of `names`, mapped from the files; a tensor already of `dtype` (default float32) shares the
        page cache with every other process that maps it, others are converted into private memory. Raises BadConfig for a missing name.
        """
        import torch
        from safetensors import SafetensorError, safe_open

        dtype = dtype or torch.float32
        by_file: dict[Path, list[str]] = {}
        for name in names:
            full = self._full(name)
            if full not in self.where:
                raise BadConfig(f"{self.directory}: tensor {full} is missing: the file lacks a part of the model. Try: copy the model anew")
            by_file.setdefault(self.where[full], []).append(name)
        tensors = {}
        for path, wanted in by_file.items():
            try:
                with safe_open(path, framework="pt") as opened:
                    tensors |= {name: opened.get_tensor(self._full(name)).to(dtype) for name in wanted}
            except (OSError, SafetensorError) as error:
                raise BadConfig(f"{path} can't be read any more: {error}. Try: start again with a directory that nobody writes to") from error
        return tensors

    def _full(self, name: str) -> str:
        return name if name == "lm_head.weight" else self.prefix + name


def open_model(directory: str | Path) -> ModelFiles:
    """Opens a local transformers directory (config.json and safetensors). Raises BadConfig, which lists every fault, for a directory that is
    not a model, a family other than FAMILIES, options that the forward pass has no code for, and missing or misshapen tensors.
    """
    directory = Path(directory)
    config = _read_json(directory / "config.json", f"{directory} is not a model directory")
    shape = parse_config(config, str(directory))
    where, shapes = _index_tensors(directory)
    embedding = _EMBEDDING[shape.family]
    prefix = next((p for p in _PREFIXES[shape.family] if p + embedding in where), None)
    if prefix is None:
        raise BadConfig(f"{directory}: no tensor named like {embedding}: not the weights of a {shape.family} language model. Try: a directory "
                        "that transformers' save_pretrained wrote")
    files = ModelFiles(directory, shape, prefix, where)
    wanted = tensor_shapes(shape, range(shape.layers), first=True, last=True)
    faults = [_fault(files._full(name), dims, shapes) for name, dims in wanted.items()]
    faults = [fault for fault in faults if fault]
    if faults:
        more = f" (and {len(faults) - 8} more)" if len(faults) > 8 else ""
        raise BadConfig(f"{directory}: " + "; ".join(faults[:8]) + f"{more}: the weights do not fit config.json. Try: copy the model anew")
    return files


def _fault(name: str, dims: tuple[int, ...], found: dict[str, tuple[int, ...]]) -> str | None:
    if name not in found:
        return f"tensor {name} is missing"
    if found[name] != dims:
        return f"tensor {name} is {list(found[name])}, expected {list(dims)}"
    return None


def parse_config(config: dict, source: str) -> ModelShape:
    """The ModelShape of a config.json document. Raises BadConfig naming `source` for what is missing or has no code here."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise BadConfig(f"{source}: model_type {family!r} is not supported: the reference engine knows {', '.join(FAMILIES)}. "
                        "Try: a Llama, GPT-2 or OPT model")
    values, faults = {}, []

    def number(word: str, name: str, default: int | None) -> int:
        value = config.get(name)
        value = default if value is None else value
        if type(value) is not int or value <= 0:
            faults.append(f"{name} is {value!r}, not a positive number")
            value = 1
        values[word] = value
        return value

    for word, (name, default) in _CONFIG_NAMES[family].items():
        number(word, name, default)
    if family == "gpt2":
        number("inner", "n_inner", 4 * values["hidden"])
    number("kv_heads", "num_key_value_heads" if family == "llama" else "", values["heads"])
    number("head_dim", "head_dim" if family == "llama" else "", max(1, values["hidden"] // values["heads"]))
    epsilon = config.get("rms_norm_eps", 1e-6) if family == "llama" else config.get("layer_norm_epsilon", 1e-5)
    if not isinstance(epsilon, (int, float)) or not 0 <= epsilon < 1:
        faults.append(f"the norms' epsilon is {epsilon!r}, not a small number")
    eos = config.get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(token) is int for token in eos):
        faults.append(f"eos_token_id is {config.get('eos_token_id')!r}, not a number or a list of numbers")
    activation = config.get({"llama": "hidden_act"}.get(family, "activation_function")) or {"llama": "silu", "gpt2": "gelu_new"}.get(family, "relu")
    faults += _unsupported(config, family, activation, values)
    if faults:
        raise BadConfig(f"{source}/config.json: " + "; ".join(faults) + ". Try: another model of this family")
    return ModelShape(family=family, **values, norm_eps=float(epsilon), activation=activation,
                      tied=bool(config.get("tie_word_embeddings", family != "llama")), eos=tuple(eos), raw=config)


_CONFIG_NAMES = {
    "llama": {"layers": ("num_hidden_layers", None), "hidden": ("hidden_size", None), "heads": ("num_attention_heads", None),
              "inner": ("intermediate_size", None), "vocab": ("vocab_size", None), "context": ("max_position_embeddings", 2048)},
    "gpt2": {"layers": ("n_layer", 12), "hidden": ("n_embd", 768), "heads": ("n_head", 12), "vocab": ("vocab_size", 50257),
             "context": ("n_positions", 1024)},
    "opt": {"layers": ("num_hidden_layers", None), "hidden": ("hidden_size", None), "heads": ("num_attention_heads", None),
            "inner": ("ffn_dim", None), "vocab": ("vocab_size", None), "context": ("max_position_embeddings", 2048)},
}


def _unsupported(config: dict, family: str, activation: str, values: dict) -> list[str]:
    faults = []
    if activation not in _ACTIVATIONS:
        faults.append(f"activation {activation!r} is not one of {', '.join(_ACTIVATIONS)}")
    if values["heads"] % values["kv_heads"]:
        faults.append(f"{values['heads']} heads do not divide over {values['kv_heads']} KV heads")
    if family != "llama" and values["heads"] * values["head_dim"] != values["hidden"]:
        faults.append(f"hidden size {values['hidden']} does not divide over {values['heads']} heads")
    if family == "llama":
        faults += _rope_faults(config)
    if family == "opt" and not config.get("do_layer_norm_before", True):
        faults.append("do_layer_norm_before = false (opt-350m) has no code here")
    if family == "opt" and config.get("word_embed_proj_dim", values["hidden"]) != values["hidden"]:
        faults.append("word_embed_proj_dim differs from hidden_size: projected embeddings have no code here")
    if family == "opt" and not config.get("layer_norm_elementwise_affine", True):
        faults.append("layer_norm_elementwise_affine = false has no code here")
    if config.get("quantization_config"):
        faults.append("quantization_config is set: quantised weights have no code here")
    return faults


_ROPE_NEEDS = {"default": (), "linear": ("factor",),
               "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


def _rope_faults(config: dict) -> list[str]:
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(config.get(name) or {}, dict):
            return [f"{name} is {config[name]!r}, not an object"]
    rope = rope_parameters(config)
    if rope["rope_type"] not in _ROPE_NEEDS:
        return [f"rope_type {rope['rope_type']!r} has no code here"]
    return [f"rope parameter {name} is {rope.get(name)!r}, not a number" for name in ("rope_theta", *_ROPE_NEEDS[rope["rope_type"]])
            if type(rope.get(name)) not in (int, float) or rope[name] <= 0]


def rope_parameters(config: dict) -> dict:
    """Rotary parameters of a Llama config, whichever of transformers' two spellings it uses: always has rope_theta and rope_type."""
    given = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    given.setdefault("rope_type", given.pop("type", "default"))
    given.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    return given


def tensor_shapes(shape: ModelShape, layers: range, first: bool, last: bool) -> dict[str, tuple[int, ...]]:
    """{tensor name without prefix: shape} of what a stage with `layers` reads. A `first` stage embeds, a `last` one has the output projection
    (which is the embedding itself where shape.tied).
    """
    wanted: dict[str, tuple[int, ...]] = {}
    hidden, vocab = shape.hidden, shape.vocab
    positions = {"gpt2": ("wpe.weight", shape.context), "opt": ("embed_positions.weight", shape.context + 2)}.get(shape.family)
    if first or (last and shape.tied):
        wanted[_EMBEDDING[shape.family]] = (vocab, hidden)
    if first and positions:
        wanted[positions[0]] = (positions[1], hidden)
    for layer in layers:
        of_layer = {"llama": _llama_layer, "gpt2": _gpt2_layer, "opt": _opt_layer}[shape.family](shape)
        stem = "h" if shape.family == "gpt2" else "layers"
        wanted |= {f"{stem}.{layer}.{name}": dims for name, dims in of_layer.items()}
    if last:
        if shape.family == "llama":
            wanted["norm.weight"] = (hidden,)
        elif shape.family == "gpt2" or not shape.raw.get("_remove_final_layer_norm"):
            norm = "ln_f" if shape.family == "gpt2" else "final_layer_norm"
            wanted |= {f"{norm}.weight": (hidden,), f"{norm}.bias": (hidden,)}
        if not shape.tied:
            wanted["lm_head.weight"] = (vocab, hidden)
    return wanted


def _linear(name: str, inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def _llama_layer(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention_bias, mlp_bias = bool(shape.raw.get("attention_bias")), bool(shape.raw.get("mlp_bias"))
    return {
        "input_layernorm.weight": (shape.hidden,), "post_attention_layernorm.weight": (shape.hidden,),
        **_linear("self_attn.q_proj", shape.hidden, q, attention_bias), **_linear("self_attn.k_proj", shape.hidden, kv, attention_bias),
        **_linear("self_attn.v_proj", shape.hidden, kv, attention_bias), **_linear("self_attn.o_proj", q, shape.hidden, attention_bias),
        **_linear("mlp.gate_proj", shape.hidden, shape.inner, mlp_bias), **_linear("mlp.up_proj", shape.hidden, shape.inner, mlp_bias),
        **_linear("mlp.down_proj", shape.inner, shape.hidden, mlp_bias),
    }


def _gpt2_layer(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden, shape.inner
    products = {"attn.c_attn": (hidden, 3 * hidden), "attn.c_proj": (hidden, hidden), "mlp.c_fc": (hidden, inner), "mlp.c_proj": (inner, hidden)}
    wanted = {f"{norm}.{part}": (hidden,) for norm in ("ln_1", "ln_2") for part in ("weight", "bias")}
    for name, dims in products.items():  # GPT-2 stores its products inputs first
        wanted |= {f"{name}.weight": dims, f"{name}.bias": (dims[1],)}
    return wanted


def _opt_layer(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    bias = bool(shape.raw.get("enable_bias", True))
    wanted = {f"{norm}.{part}": (shape.hidden,) for norm in ("self_attn_layer_norm", "final_layer_norm") for part in ("weight", "bias")}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        wanted |= _linear(f"self_attn.{name}", shape.hidden, shape.hidden, bias)
    return wanted | _linear("fc1", shape.hidden, shape.inner, bias) | _linear("fc2", shape.inner, shape.hidden, bias)


def _read_json(path: Path, what: str) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadConfig(f"{what}: {path.name} can't be read ({error}). Try: a directory with config.json and model.safetensors") from error
    if not isinstance(document, dict):
        raise BadConfig(f"{what}: {path.name} is not a JSON object. Try: a directory with config.json and model.safetensors")
    return document


def _index_tensors(directory: Path) -> tuple[dict[str, Path], dict[str, tuple[int, ...]]]:
    """File and shape of every tensor, from the files' own headers (an index only says which files there are)."""
    from safetensors import SafetensorError, safe_open

    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        paths = [single]
    elif index.is_file():
        named = _read_json(index, f"{directory} is not a model directory").get("weight_map")
        if not isinstance(named, dict):
            raise BadConfig(f"{index} has no weight_map: it does not say which files there are. Try: copy the model anew")
        paths = [directory / name for name in sorted({Path(str(file)).name for file in named.values()})]  # names only: no way out of the directory
    else:
        raise BadConfig(f"{directory}: no model.safetensors and no index of shards: weights in other formats are not read. "
                        "Try: save_pretrained(..., safe_serialization=True)")
    where, shapes = {}, {}
    for path in paths:
        try:
            with safe_open(path, framework="np") as opened:
                for name in opened.keys():
                    where[name], shapes[name] = path, tuple(opened.get_slice(name).get_shape())
        except (OSError, SafetensorError) as error:
            raise BadConfig(f"{path} can't be read: {error}. Try: copy the model anew") from error
    return where, shapes


def write_safetensors(path: Path, tensors: dict) -> None:
    """Writes torch tensors (float32, float16 or bfloat16) in the given order, each at a multiple of ALIGNMENT from the file's start, fsynced."""
    import torch

    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _SAFETENSORS_DTYPES[str(tensor.dtype).removeprefix("torch.")], "shape": list(tensor.shape),
                        "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)  # the format allows trailing spaces; it allows no holes between tensors
    with open(path, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(tensor.detach().contiguous().view(torch.uint8).numpy())
        out.flush()
        os.fsync(out.fileno())


def make_random(directory: str | Path, family: str, seed: int, *, layers: int = 3, heads: int = 4, kv_heads: int = 2, head_dim: int = 16,
                inner: int = 96, vocab: int = 320, context: int = 512) -> Path:
    """Writes a tiny float32 model of `family` with random weights, the same for the same arguments; no tokenizer: prompts are lists of ids.
    `kv_heads` counts for llama only. Returns the directory, which transformers reads too.
    """
    import torch

    hidden = heads * head_dim
    config = {
        "llama": {"architectures": ["LlamaForCausalLM"], "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
                  "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim, "max_position_embeddings": context,
                  "rms_norm_eps": 1e-5, "hidden_act": "silu", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        "gpt2": {"architectures": ["GPT2LMHeadModel"], "n_embd": hidden, "n_inner": inner, "n_layer": layers, "n_head": heads,
                 "n_positions": context, "activation_function": "gelu_new"},
        "opt": {"architectures": ["OPTForCausalLM"], "hidden_size": hidden, "ffn_dim": inner, "num_hidden_layers": layers,
                "num_attention_heads": heads, "max_position_embeddings": context, "word_embed_proj_dim": hidden, "activation_function": "relu"},
    }[family] | {"model_type": family, "vocab_size": vocab, "tie_word_embeddings": family != "llama", "torch_dtype": "float32",
                 "bos_token_id": 1, "eos_token_id": 2}
    shape = parse_config(config, family)
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, dims in tensor_shapes(shape, range(layers), first=True, last=True).items():
        full = name if name == "lm_head.weight" else _PREFIXES[family][0] + name
        # Large enough that attention is far from uniform: a lost position must show in the logits.
        noise = torch.randn(dims, generator=draw) * (0.1 if len(dims) == 1 else 0.3)
        tensors[full] = noise + 1.0 if len(dims) == 1 and name.endswith("weight") else noise
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    return directory
