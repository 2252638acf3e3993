"""What `kv_connector_extra_config` may say to the vLLM connector, and whether this vLLM, this model and this parallelism can be protected at all.

Knows: names and shapes of vLLM's configuration objects, by attribute. Must not know: torch, guards, how KV is copied.
Invariants: an unknown key, or one of another type, is refused with the known ones named; what isn't proved to work is refused at start with its reason, never
served silently unprotected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from kvguard.errors import BadConfig
from kvguard.limits import ROWS_MAX

VERSIONS_TESTED = ("0.32", "0.33")
_SAMPLE_BYTES = 64 * 1024
_BOUNDS = {"fetch_timeout_s": (0.001, 600.0), "rows": (0, ROWS_MAX)}
_OF_SEVERAL = re.compile(r"_dp\d+$")  # what vLLM adds to the engine_id of one of several data-parallel engines
_REFUSED_PARALLELISM = {
    "data_parallel_size": "engines of one server that choose among themselves who resumes what. Try: a server, and an instance, of its own for each",
    "decode_context_parallel_size": "ranks would hold different positions of one sequence, and its position would not be theirs",
    "prefill_context_parallel_size": "ranks would hold different positions of one sequence, and its position would not be theirs",
}


@dataclass(frozen=True)
class Settings:
    """`instance`: this engine's name among all that kvguard knows (required). `socket`: the daemon's; empty: $KVGUARD_SOCKET or the default. `endpoint`: how a
    router reaches this server, told to it by the coordinator. `scheduler`: the scheduler attaches too, so that ids are held sooner. `fetch_timeout_s`: after
    which a moved request is computed instead. `share_restored`: restored blocks may serve other requests' prefixes. `model`: replaces the fingerprint of the
    weights' files, where those of equal models differ. `rows`: sequences at once, 0: from max_num_seqs.
    """

    instance: str = ""
    socket: str = ""
    endpoint: str = ""
    scheduler: bool = True
    fetch_timeout_s: float = 5.0
    share_restored: bool = False
    model: str = ""
    rows: int = 0

    @classmethod
    def of(cls, extra: dict[str, Any]) -> Settings:
        """Raises BadConfig that lists every fault."""
        known = {field.name: type(field.default) for field in fields(cls)}
        faults = [f"{name!r} is not known" for name in extra if name not in known]
        for name, kind in known.items():
            value = extra.get(name)
            if value is None:
                continue
            low, high = _BOUNDS.get(name, (None, None))
            if not (type(value) is kind or (kind is float and type(value) is int)):
                faults.append(f"{name!r} is a {type(value).__name__}, not a {kind.__name__}")
            elif name in _BOUNDS and not low <= value <= high:
                faults.append(f"{name!r} is {value}, not from {low} to {high}")
        if not extra.get("instance"):
            faults.append("'instance' is missing: this engine's name")
        if faults:
            raise BadConfig(f"kv_connector_extra_config: {'; '.join(faults)}. Try: {', '.join(known)}")
        return cls(**{name: value for name, value in extra.items() if value is not None})


def version_warning(version: str) -> str:
    """What to say about a vLLM outside the tested range; "" within it."""
    if any(version == tested or version.startswith(f"{tested}.") for tested in VERSIONS_TESTED):
        return ""
    tested = f"{VERSIONS_TESTED[0]} to {VERSIONS_TESTED[-1]}"
    return f"kvguard: vLLM {version} is outside the range that this adapter was tested with ({tested}): watch `kvguard status`"


def faults_of(vllm_config: Any, kv_cache_config: Any, device: str) -> list[str]:
    """Why this engine can't be protected; empty where it can. `device`: the torch device type of its KV."""
    faults = []
    if device not in ("cpu", "cuda"):
        faults.append(f"KV on {device!r}: this adapter knows pools in host memory and on NVIDIA GPUs only")
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    for name, reason in _REFUSED_PARALLELISM.items():
        if (getattr(parallel, name, 1) or 1) != 1:
            faults.append(f"{name}={getattr(parallel, name)}: {reason}")
    # vLLM tells an engine of a dense model that it is alone; what it was made of stands in its index, and in the name it has for transfers.
    index = getattr(parallel, "data_parallel_index", 0) or 0
    if not faults and (index or _OF_SEVERAL.search(str(getattr(vllm_config.kv_transfer_config, "engine_id", "")))):
        faults.append(f"data_parallel_size, engine {index} of several: {_REFUSED_PARALLELISM['data_parallel_size']}")
    if getattr(model, "is_encoder_decoder", False):
        faults.append("an encoder-decoder model: cross-attention KV isn't a function of the ids")
    if getattr(model, "runner_type", "generate") != "generate":
        faults.append(f"runner {model.runner_type!r}: nothing is generated")
    speculative = vllm_config.speculative_config
    if speculative is not None and getattr(speculative, "method", None) not in ("ngram", "suffix"):
        faults.append(f"speculative method {speculative.method!r}: the drafter's own KV would be missing after a restore")
    if device == "cpu" and getattr(model, "use_mla", False):
        faults.append("latent attention on a CPU: vLLM can't compute several positions behind restored ones there, and switches chunked prefill off")
    faults += _group_faults(kv_cache_config, vllm_config.cache_config.block_size)
    return faults


def _group_faults(kv_cache_config: Any, block_size: int) -> list[str]:
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1:
        return [f"{len(groups)} KV cache groups: a hybrid of attention kinds. Try: a model with full attention in all layers"]
    spec = groups[0].kv_cache_spec
    kind = type(spec).__name__
    if kind not in ("FullAttentionSpec", "MLAAttentionSpec") or getattr(spec, "model_version", None):
        return [f"{kind}: only plain full and latent attention are proved (no Mamba state, sliding windows, cross-attention, sparse attention)"]
    faults = []
    for name in ("sliding_window", "attention_chunk_size"):
        if getattr(spec, name, None):
            faults.append(f"{name}={getattr(spec, name)}: blocks outside it go while the sequence lives")
    if getattr(spec, "non_causal", False):
        faults.append("non-causal attention: earlier KV changes with later tokens")
    if getattr(spec, "tokens_per_state", 1) != 1 or getattr(spec, "page_size_padded", None):
        faults.append("compressed or padded pages")
    if spec.block_size != block_size:
        faults.append(f"blocks of {spec.block_size} tokens under a manager of {block_size}")
    return faults


def fingerprint_of_model(model_config: Any, given: str = "") -> str:
    """Text that equal weights and configurations share, whatever their directory is called: of the configuration, and of samples of every weights file (start,
    middle, end, size). `given` replaces the files' share. Raises BadConfig where there are no files and nothing is given."""
    configuration = model_config.hf_config.to_dict()
    for transient in ("_name_or_path", "transformers_version", "torch_dtype", "dtype"):
        configuration.pop(transient, None)
    digest = hashlib.blake2b(json.dumps(configuration, sort_keys=True, default=str).encode(), digest_size=16)
    if given:
        digest.update(given.encode())
        return digest.hexdigest()
    place = Path(model_config.model)
    files = sorted(path for pattern in ("*.safetensors", "*.bin", "*.gguf", "*.pt") for path in place.glob(pattern)) if place.is_dir() else []
    if not files:
        raise BadConfig(f"{model_config.model!r} has no weights files to tell it by. Try: 'model' in kv_connector_extra_config, an exact name and revision")
    for path in files:
        _digest_samples(digest, path)
    return digest.hexdigest()


def _digest_samples(digest: Any, path: Path) -> None:
    with open(path, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        digest.update(f"{path.name} {size}".encode())
        for start in sorted({0, max(0, size // 2 - _SAMPLE_BYTES // 2), max(0, size - _SAMPLE_BYTES)}):
            opened.seek(start)
            digest.update(opened.read(_SAMPLE_BYTES))
