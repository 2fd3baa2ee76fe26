from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, initialization

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import get_base_weight, set_base_weight
from lowmem_ft.quant.ops import QuantSpec, quantize
from tests.models import MOE_ARCHITECTURES, SMALL, tiny_model
from tests.unit.quant import quantized_and_plain, random_matrix

SPECS = [QuantSpec(), QuantSpec(type="fp4", double_quant=False), QuantSpec(bits=8)]
E, R, C = 3, 33, 50
# Architectures beside those of tests/models.py, for other ways of using the stack.
OTHERS: dict[str, dict[str, Any]] = {
    "llama4_text": {  # torch.bmm with the whole stack
        "num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 80, "head_dim": 12,
        "interleave_moe_layer_step": 1, "moe_layers": [0, 1],
    },
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 12},  # F.linear(x, stack[i]), i an int
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


def make(spec: QuantSpec = SPECS[0], dtype: torch.dtype = torch.float32) -> QuantStack:
    stack = QuantStack(E, R, C, spec=spec, dtype=dtype)
    for e in range(E):
        stack.load_slice(e, quantize(random_matrix(R, C, seed=e), spec))
    return stack


def moe_model(name: str, dtype: torch.dtype) -> nn.Module:
    if name in MOE_ARCHITECTURES:
        model = tiny_model(name, dtype=dtype)
    else:
        torch.manual_seed(0)
        config = AutoConfig.for_model(name, **{**SMALL, **OTHERS[name]})
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [*sorted(MOE_ARCHITECTURES), *OTHERS])
def test_every_architecture_computes_as_with_the_dequantized_parameters(name: str, dtype: torch.dtype) -> None:
    model = moe_model(name, dtype)
    quantized, plain, swapped = quantized_and_plain(model, QuantSpec(), {"lm_head"})
    stacks = [path for path in swapped if isinstance(quantized.get_submodule(path), QuantStack)]
    assert stacks
    assert not any(p.ndim == 3 for p in quantized.parameters())
    ids = torch.arange(32).view(2, 16) + 3
    results = []
    for variant in (quantized, plain):
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        logits = variant(inputs_embeds=embeddings, use_cache=False).logits
        logits.float().square().mean().backward()
        results.append((logits, embeddings.grad))
    # Measured: bit-equal for all of them in both dtypes (torch 2.13, AVX-512); room for another order of summation.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(results[0][0], results[1][0], rtol=4 * eps, atol=4 * eps)
    scale = results[1][1].abs().max().item()
    torch.testing.assert_close(results[0][1], results[1][1], rtol=8 * eps, atol=8 * eps * scale)


PRODUCTS = {
    "F.linear": (lambda x, w: F.linear(x, w), C),
    "F.linear bias": (lambda x, w: F.linear(x, w, torch.ones(R)), C),
    "F.linear keyword": (lambda x, w: F.linear(x, w, bias=torch.ones(R)), C),
    "@": (lambda x, w: x @ w, R),
    "matmul": (lambda x, w: torch.matmul(x, w), R),
    "mm": (lambda x, w: x.mm(w), R),
}


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("index", [1, -1, torch.tensor(2)], ids=repr)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_a_slice(name: str, index: int | torch.Tensor, spec: QuantSpec) -> None:
    product, inputs = PRODUCTS[name]
    stack = make(spec)
    x = random_matrix(5, inputs).requires_grad_()
    x_plain = x.detach().clone().requires_grad_()
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: pytest.fail("nothing to unpack")):
        y = product(x, stack[index])
    assert saved == []
    y_plain = product(x_plain, stack.base_slice(int(index) % E))
    torch.testing.assert_close(y, y_plain, rtol=1e-6, atol=1e-6)
    dy = random_matrix(*y.shape, seed=7)
    y.backward(dy)
    y_plain.backward(dy)
    torch.testing.assert_close(x.grad, x_plain.grad, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("product", [torch.bmm, torch.Tensor.bmm, torch.matmul])
def test_products_with_the_whole_stack(product: Any) -> None:
    stack = make()
    x = torch.randn(E, 4, R, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = product(x, stack)
    assert not any(t.shape[-2:] == (R, C) for t in saved)
    w_ERC = torch.stack([stack.base_slice(e) for e in range(E)])
    torch.testing.assert_close(y, torch.bmm(x, w_ERC), rtol=1e-6, atol=1e-5)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    torch.testing.assert_close(dx, torch.ones_like(y) @ w_ERC.mT, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("cols", [50, 64, 1024])  # with 50 a slice's last block is not full
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", [*SPECS, QuantSpec(double_quant=False)])
def test_several_slices_at_once(spec: QuantSpec, dtype: torch.dtype, cols: int) -> None:
    """In any order, and whether or not a slice's scales fill their own blocks."""
    stack = QuantStack(E, R, cols, spec=spec, dtype=dtype)
    for e in range(E):
        stack.load_slice(e, quantize((1 + e) * random_matrix(R, cols, seed=e), spec))
    several = stack.base_slice((2, 0))
    assert several.shape == (2, R, cols)
    assert several.dtype == dtype
    assert torch.equal(several, torch.stack([stack.base_slice(2), stack.base_slice(0)]))


def test_other_uses_of_a_slice_see_the_dequantized_tensor() -> None:
    piece, dense = make()[1], make().base_slice(1)
    assert (piece.shape, piece.dtype, piece.ndim) == (dense.shape, dense.dtype, 2)
    assert torch.equal(piece.T, dense.T)
    assert torch.equal(piece.chunk(2, dim=0)[1], dense.chunk(2, dim=0)[1])
    assert torch.equal(piece.float(), dense.float())
    assert torch.equal(torch.add(piece, piece), dense + dense)
    assert torch.equal(torch.addmm(torch.zeros(2, C), torch.ones(2, R), piece), torch.ones(2, R) @ dense)
    assert torch.equal(torch.matmul(piece, torch.ones(C, 2)), dense @ torch.ones(C, 2))


def test_other_uses_of_the_stack_are_errors() -> None:
    stack = make()
    assert stack.shape == (E, R, C)
    assert stack.shape[0] == len(stack) == E
    with pytest.raises(UnsupportedError, match="eager"):
        torch.sum(stack)
    for wrong in (E, -E - 1):
        with pytest.raises(IndexError):
            stack[wrong]


def test_the_adapter_takes_over_the_products() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[tuple[int, bool]] = []

        def forward(self, x: torch.Tensor, e: int, transposed: bool, bias: torch.Tensor | None) -> torch.Tensor:
            self.calls.append((e, transposed))
            product = 2 * stack.matmul(x, e, transposed)
            return product if bias is None else product + bias

    stack, plain = make(), make()
    stack.adapter = Adapter()
    x_C, x_R = torch.randn(5, C), torch.randn(E, 5, R)
    one = torch.ones(R)
    torch.testing.assert_close(F.linear(x_C, stack[1], one), 2 * F.linear(x_C, plain[1]) + one)
    torch.testing.assert_close(x_R[0] @ stack[2], 2 * (x_R[0] @ plain[2]))
    torch.testing.assert_close(torch.bmm(x_R, stack), 2 * torch.bmm(x_R, plain))
    assert stack.adapter.calls == [(1, False), (2, True), (0, True), (1, True), (2, True)]
    stack.adapter = None
    assert torch.equal(F.linear(x_C, stack[1]), F.linear(x_C, plain[1]))


def test_backward_finds_storage_that_was_replaced_after_forward() -> None:
    stack = make()
    x = torch.randn(4, C, requires_grad=True)
    y = F.linear(x, stack[1])
    for name, tensor in stack.storage().items():
        setattr(stack, name, tensor.clone())
    set_base_weight(stack, random_matrix(R, C, seed=9), index=1)
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.ones(4, R) @ stack.base_slice(1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_is_a_well_behaved_module(spec: QuantSpec) -> None:
    stack = make(spec)
    assert "(3, 33, 50)" in repr(stack)
    assert not list(stack.parameters())
    twin = copy.deepcopy(stack)
    set_base_weight(twin, random_matrix(R, C, seed=9), index=0)
    assert not torch.equal(twin.base_slice(0), stack.base_slice(0))
    twin.load_state_dict(stack.state_dict())
    assert torch.equal(twin.base_slice(0), stack.base_slice(0))
    exact = stack.base_slice(2)
    assert initialization.normal_(stack) is stack  # what transformers would do to the parameter
    stack.adapter = nn.Linear(2, 2)
    stack.half()
    assert stack.adapter.weight.dtype == stack.dtype == stack[2].dtype == torch.float16
    assert torch.equal(stack.base_slice(2, torch.float32), exact)


def test_slices_load_one_by_one_from_meta() -> None:
    stack = QuantStack(E, R, C, spec=QuantSpec(), device="meta")
    assert F.linear(torch.empty(2, C, device="meta"), stack[0]).shape == (2, R)
    for e in range(E):
        stack.load_slice(e, quantize(random_matrix(R, C, seed=e), QuantSpec()))
    expected = make()
    assert all(torch.equal(tensor, expected.storage()[name]) for name, tensor in stack.storage().items())
    with pytest.raises(CheckpointError, match="do not fit"):
        stack.load_slice(0, quantize(random_matrix(R, C + 2), QuantSpec()))


def test_base_weight_of_a_slice() -> None:
    stack = make()
    weight = random_matrix(R, C, seed=9)
    set_base_weight(stack, weight, index=2)
    layer_like = make()
    layer_like.load_slice(2, quantize(weight, QuantSpec()))
    assert torch.equal(get_base_weight(stack, index=2), layer_like.base_slice(2))
    assert get_base_weight(stack, index=2, dtype=torch.float16).dtype == torch.float16
    assert torch.equal(get_base_weight(stack, index=1), make().base_slice(1))
    with pytest.raises(UnsupportedError, match="one by one"):
        get_base_weight(stack)
    with pytest.raises(CheckpointError, match="does not fit"):
        set_base_weight(stack, weight.t(), index=0)
