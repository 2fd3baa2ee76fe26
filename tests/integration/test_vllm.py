"""Exported adapters in vLLM itself, where it is installed. `benchmarks/serve_vllm.py` looks at far more of them."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; there are builds of it for CPUs")

from benchmarks.serve_vllm import METHODS, measured, refused


def test_adapters_compute_what_was_trained(tmp_path: Path) -> None:
    found = measured("llama", tmp_path, tuple(METHODS))
    # measured: 2e-13 to 9e-13
    assert {method: figures.get("kl", 1.0) < 1e-9 for method, figures in found.items()} == dict.fromkeys(METHODS, True)
    assert all(figures["top1"] == 1 and figures["without the adapter"] > 0.01 for figures in found.values())


def test_what_vllm_does_not_take_is_not_exported(tmp_path: Path) -> None:
    for kind, said in refused(tmp_path).items():
        # vLLM finds no layer for the experts, and serves the base without a word
        assert (said["vLLM"] == "taken") == (kind == "experts"), kind
        assert said["lowmem-ft"].startswith("vLLM "), kind
