"""Our attention operator against attention in double precision, and inside transformers' models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lowmem_ft.data.isolation import ATTENTION
from lowmem_ft.runtime import attention as module
from lowmem_ft.runtime.attention import attention, use_attention
from tests.models import ARCHITECTURES, tiny_config

B, H, T, E = 2, 6, 20, 16
KINDS = ["causal", "one mask", "mask per row", "mask per head"]


def inputs(groups: int, dtype: torch.dtype, kind: str) -> tuple[list[Tensor], Tensor | None]:
    torch.manual_seed(0)
    tensors = [torch.randn(B, T, heads, E).to(dtype).transpose(1, 2) for heads in (H, groups, groups)]
    if kind == "causal":
        return [t.requires_grad_() for t in tensors], None
    shape = {"one mask": (1, 1), "mask per row": (B, 1), "mask per head": (B, H)}[kind]
    mask = torch.rand(*shape, T, T) > 0.4
    mask |= torch.eye(T, dtype=torch.bool)  # every position sees one
    return [t.requires_grad_() for t in tensors], mask.tril()


@pytest.mark.parametrize("tile_bytes", [1, 8 << 20])
@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [6, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradients(
    dtype: torch.dtype, groups: int, kind: str, widen: bool, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(module, "multiplies", lambda dtype: not widen)
    tensors, mask = inputs(groups, dtype, kind)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    expected = F.scaled_dot_product_attention(
        *exact, attn_mask=mask, is_causal=mask is None, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    out = attention(*tensors, mask, 0.3)
    assert out.is_contiguous()
    assert out.dtype == dtype
    dout = torch.randn_like(out)
    ours = torch.autograd.grad(out, tensors, dout)
    theirs = torch.autograd.grad(expected, exact, dout.double())
    # bf16: inputs of the kernel's products are rounded to 2^-9 several times; measured 0.8e-2 at most
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    for a, b in zip((out, *ours), (expected, *theirs), strict=True):
        assert (a.double() - b).norm() <= limit * b.norm()


def test_a_mask_that_hides_nothing_but_the_future_is_causal() -> None:
    tensors, _ = inputs(2, torch.float32, "causal")
    mask = torch.ones(1, 1, T, T, dtype=torch.bool).tril()
    torch.testing.assert_close(attention(*tensors, mask, 0.3), attention(*tensors, None, 0.3))


@pytest.mark.parametrize("masked", [False, True])
def test_operator_contract(masked: bool) -> None:
    tensors, mask = inputs(2, torch.float32, "one mask" if masked else "causal")
    q, k, v = (t.detach() for t in tensors)
    torch.library.opcheck(torch.ops.lowmem_ft.attention.default, (q, k, v, mask, 0.3))
    out, lse = torch.ops.lowmem_ft.attention.default(q, k, v, mask, 0.3)
    backward = torch.ops.lowmem_ft.attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(out), q, k, v, mask, out, lse, 0.3))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_compute_what_they_computed(name: str) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.float32).eval()
    ids = torch.randint(3, 100, (2, 16))
    padding = torch.ones_like(ids)
    padding[0, :5] = 0
    before = model.config._attn_implementation
    expected = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits[:, 5:]]
    use_attention(model)
    served = before == "sdpa" and type(model)._supports_attention_backend
    assert model.config._attn_implementation == (ATTENTION if served else before)
    found = [model(input_ids=ids).logits, model(input_ids=ids, attention_mask=padding).logits[:, 5:]]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_generation_with_a_cache_is_unchanged() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama"), dtype=torch.float32).eval()
    ids = torch.randint(3, 100, (2, 7))
    settings = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **settings)
    use_attention(model)
    assert torch.equal(model.generate(ids, **settings), expected)
