"""Merges on a card, against the same merges on the CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowmem_ft.export.exports import export_gguf
from lowmem_ft.export.merge import merge, write_merged
from lowmem_ft.export.models import TrainedRun
from lowmem_ft.export.weights import MergedWeights
from lowmem_ft.report.progress import Reporter
from tests.unit.adapters.helpers import error
from tests.unit.export.runs import logits, plain, trained
from tests.unit.export.test_gguf import run_of

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
# Sums of fp32 products in another order, and quantization of values that lie on the border between two codes
CLOSE = 1e-3


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_merged_on_a_card(name: str, bits: int, tmp_path: Path) -> None:
    made = trained(name, tmp_path, bits=bits)
    found = []
    for device in ("cpu", "cuda"):
        weights = MergedWeights(
            made.config, made.policy, made.adapter, dtype=torch.float32, device=torch.device(device)
        )
        (tmp_path / device).mkdir()
        write_merged(weights, tmp_path / device)
        found.append(logits(plain(tmp_path / device, dtype=torch.float32, experts_implementation="eager")))
    assert error(found[1], found[0]) < CLOSE


def test_the_check_on_a_card(tmp_path: Path) -> None:
    made = trained("llama", tmp_path, dtype="bfloat16")
    run = TrainedRun(config=made.config, policy=made.policy, adapter=made.adapter, device=CUDA, scratch=tmp_path)
    done = merge(run, tmp_path / "out", reporter=Reporter(quiet=True))
    assert done.check.kl < done.bound.kl
    assert done.other is not None


def test_gguf_on_a_card(tmp_path: Path) -> None:
    _, run = run_of(tmp_path, dtype="bfloat16")
    on_card = replace(run, device=CUDA)
    done = export_gguf(
        on_card, tmp_path / "out", kind="f16", base="dequantized", text=None, reporter=Reporter(quiet=True)
    )
    assert done.check.kl < done.bound.kl
