"""Exported files in llama.cpp itself, where it is installed. `benchmarks/llamacpp.py` looks at far more of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed, which is llama.cpp with calls from Python")

from benchmarks.llamacpp import measured_types
from benchmarks.llamacpp_tokens import same_tokens, tokenizers
from tests.unit.export.test_gguf import LOSSY, run_of


# llama.cpp rounds activations, too, after which another expert may win: measured 2e-7 in f16, and 6e-6 with experts
@pytest.mark.parametrize(
    ("name", "method", "factor"), [("llama3", {}, 4), ("qwen3_moe", {"targets": ["q_proj", "v_proj"]}, 20)]
)
def test_logits(name: str, method: dict[str, Any], factor: float, tmp_path: Path) -> None:
    _, run = run_of(tmp_path, name, **method)
    found = measured_types(run, tmp_path)
    # measured: 4e-14 to 1.1e-13
    for exact in ("f32", "adapter on the dequantized base", "adapter on the original base"):
        assert found[exact]["kl"] < 1e-9
        assert found[exact]["top1"] == 1
    assert found["without the adapter"]["kl"] > 0.1
    assert all(found[kind]["kl"] < factor * bound for kind, bound in LOSSY.items())


def test_tokens(tmp_path: Path) -> None:
    for name, folder in tokenizers(tmp_path).items():
        found = same_tokens(folder, count=100)
        compared = [it for it in found.values() if isinstance(it, dict)]
        assert all(it["untold"] == 0 for it in compared), name
        assert found["told"] or all(it["equal"] == it["texts"] for it in compared), name
        assert "conversations" not in found or found["conversations"]["equal"] == found["conversations"]["texts"]
