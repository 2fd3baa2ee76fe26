"""MLPs that run their activation function again on a card, whose backward runs in a thread of its own."""

from __future__ import annotations

import pytest
import torch

from lowmem_ft.adapters.inject import inject_lora
from lowmem_ft.runtime.tiled_mlp import TiledMlp, find_mlps
from tests.models import without_dropout
from tests.unit.adapters.helpers import quantized_model, shake

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("settings", [{}, {"dora": True}, {"dropout": 0.3}], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2"])
def test_the_same_bits_with_less_held(name: str, settings: dict[str, object]) -> None:
    model = quantized_model(name, dtype=torch.bfloat16)
    without_dropout(model)
    inject_lora(model, rank=2, **settings)  # type: ignore[arg-type]
    shake(model)
    module = find_mlps(model.train().cuda())[0]
    trained = [it for it in module.parameters() if it.requires_grad]
    x = torch.randn(2, 1024, 48, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    mlp, found = TiledMlp(module), []
    for again in (False, True):
        mlp.work_in(0, recompute_act=again)
        torch.manual_seed(0)
        before = torch.cuda.memory_allocated()
        y = module(x)
        held = torch.cuda.memory_allocated() - before
        found.append((held, torch.autograd.grad(y.float().square().sum(), [x, *trained])))
        del y
    assert found[1][0] < found[0][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))
