"""RMS normalization in tiles against the models' own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lowmem_ft.runtime import norms
from lowmem_ft.runtime.norms import RMSNorm, use_norms
from tests.models import tiny_model

FEATURES = 48


def pair(kind: str, dtype: torch.dtype, weight_dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """A model's norm, and ours with the same weight."""
    theirs = LlamaRMSNorm(FEATURES, eps=1e-5) if kind == "llama" else GemmaRMSNorm(FEATURES, eps=1e-5)
    nn.init.normal_(theirs.weight)
    theirs.to(weight_dtype)
    whole = nn.ModuleDict({"norm": theirs})
    use_norms(whole)
    assert isinstance(whole["norm"], RMSNorm)
    assert whole["norm"].weight is theirs.weight
    return theirs, whole["norm"]


def gradients(norm: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = norm(x)
    return [y.detach(), *torch.autograd.grad(y, [x, norm.weight], dy.to(y.dtype))]


PAIRS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
PAIRS += [(torch.float16, torch.float16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("kind", ["llama", "gemma"])
@pytest.mark.parametrize("shape", [(2, 9, FEATURES), (1, FEATURES), (2, 3, 4, FEATURES)])
@pytest.mark.parametrize(("dtype", "weight_dtype"), PAIRS)
def test_as_the_models_do_it(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, weight_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(norms.TILE_BYTES, "cpu", 4 * FEATURES * 5)  # five tokens at a time
    torch.manual_seed(0)
    theirs, ours = pair(kind, dtype, weight_dtype)
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    found, expected = gradients(ours, x, dy), gradients(theirs, x, dy)
    assert torch.equal(found[0], expected[0]), "rounded at the same places"
    assert [it.dtype for it in found] == [it.dtype for it in expected]
    close = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    for a, b in zip(found[1:], expected[1:], strict=True):
        assert (a.double() - b.double()).norm() <= close * b.double().norm()


def test_tokens_that_do_not_lie_one_after_the_other() -> None:
    torch.manual_seed(0)
    theirs, ours = pair("llama", torch.float32, torch.float32)
    x, dy = (torch.randn(2, FEATURES, 7).transpose(1, 2) for _ in range(2))
    for a, b in zip(gradients(ours, x, dy), gradients(theirs, x, dy), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "mixtral", "deepseek_v3"])
def test_every_norm_of_a_model_is_replaced_and_nothing_changes(name: str) -> None:
    model = tiny_model(name).eval()
    ids = torch.arange(3, 19)[None]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        keys = model.state_dict().keys()
        use_norms(model)
        assert model.state_dict().keys() == keys
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
    left = [type(it).__name__ for it in model.modules() if type(it).__name__.endswith("RMSNorm")]
    assert set(left) == {"RMSNorm"}
    assert len(left) >= 2 * model.config.num_hidden_layers + 1


def test_other_norms_stay(tmp_path: Path) -> None:
    model = tiny_model("gpt_neox")
    use_norms(model)
    assert not any(isinstance(it, RMSNorm) for it in model.modules())


@pytest.mark.parametrize("offset", [False, True])
def test_operator_contract(offset: bool) -> None:
    x, weight = torch.randn(6, FEATURES, dtype=torch.bfloat16), torch.randn(FEATURES)
    ops = torch.ops.lowmem_ft
    torch.library.opcheck(ops.rms_norm.default, (x, weight, 1e-5, offset))
    y, rstd = ops.rms_norm.default(x, weight, 1e-5, offset)
    for backward in (ops.rms_norm_backward.default, ops.rms_norm_weight_backward.default):
        torch.library.opcheck(backward, (torch.ones_like(y), x, weight, rstd, offset))
