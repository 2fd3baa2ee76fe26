"""Several experts at once on CUDA: what one by one computes, in the same bits each time, and less of the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowmem_ft.adapters.inject import inject_lora, trainable_parameters
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.loader import load_weights, meta_model
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.runtime.activations import apply_activation_policy
from lowmem_ft.runtime.attend import use_attention
from lowmem_ft.runtime.experts import ExpertLayers
from tests.models import save_tiny

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
MIXTURES = ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe", "olmoe"]


def step(folder: Path, bits: Any, dtype: torch.dtype, together: int, *, recompute: bool) -> list[Tensor]:
    """Hidden states and gradients of a step on the card, which is done twice."""
    checkpoint = Checkpoint.open(str(folder))
    model = meta_model(checkpoint, dtype=dtype)
    load_weights(
        model, checkpoint, spec=QuantSpec(bits=bits), dtype=dtype, place=lambda _, t: t.to(DEVICE), device=DEVICE
    )
    use_attention(model, on_card=True)  # whose bits are the same each time, whichever way blocks go
    ExpertLayers(model).work_on(together)
    torch.manual_seed(0)
    inject_lora(model, targets="all-linear", rank=8, alpha=8, dtype=dtype)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.copy_(torch.randn(parameter.shape).mul_(0.1))
    apply_activation_policy(model, keep=0 if recompute else model.config.num_hidden_layers)
    ids_BT = torch.randint(3, 100, (4, 128), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for _ in range(2):  # the second time recomputing leaves experts out
        for parameter in model.parameters():
            parameter.grad = None
        hidden = model.train().base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        hidden.backward(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden))
    return [hidden.detach(), *(p.grad for _, p in trainable_parameters(model) if p.grad is not None)]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("name", MIXTURES)
def test_equals_one_by_one(name: str, bits: int, recompute: bool, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    alone, several = (step(folder, bits, torch.float32, together, recompute=recompute) for together in (1, 3))
    for own, right in zip(several, alone, strict=True):
        torch.testing.assert_close(own, right, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_the_same_bits_each_time(name: str, tmp_path: Path) -> None:
    folder = save_tiny(name, tmp_path)
    kept, again, other = (step(folder, 4, torch.bfloat16, 3, recompute=it) for it in (False, False, True))
    for same in (again, other):
        assert all(torch.equal(a, b) for a, b in zip(kept, same, strict=True))
