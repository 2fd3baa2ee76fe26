"""Modelfiles and GGUF files in Ollama itself, where it is. `benchmarks/serve_ollama.py` looks at far more of them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from benchmarks.serve_ollama import TALKS, as_written, rendered, serving
from lowmem_ft.assemble import load_tokenizer
from lowmem_ft.quant.checkpoint import Checkpoint
from tests.unit.export.test_gguf import exported, run_of

PROGRAM = shutil.which("ollama")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="there is no program `ollama`")


def test_ollama_reads_what_was_written(tmp_path: Path) -> None:
    assert PROGRAM is not None
    _, run = run_of(tmp_path, "llama")
    modelfile = exported(run, "f16").folder / "Modelfile"
    written = modelfile.read_text()
    tokenizer = load_tokenizer(Checkpoint.open(tmp_path / "base"))
    with serving(Path(PROGRAM).resolve(), tmp_path / "home") as server:
        read = server.create("tiny", modelfile)
        assert as_written(read, written), read
        assert read["parameters"] == {"repeat_penalty": "1"}
        found = rendered(server, "tiny", tokenizer)
    assert len(found) == len(TALKS)
    assert all(it["text"] and it["tokens"] for it in found), found
