"""LoRA on stacked experts, against peft's ParamWrapper and against the same computation on whole tensors."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from lowmem_ft.adapters.inject import adapters_disabled, inject_lora, trainable_parameters
from lowmem_ft.adapters.peft_format import adapter_tensors
from lowmem_ft.adapters.stack import DenseStack, LoraStack
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import get_base_weight
from lowmem_ft.quant.ops import QuantSpec
from tests.unit.adapters.helpers import dequantized_model, error, plain_model, quantized_model, shake, tokens

E, R, C, K, T = 4, 12, 20, 3, 7  # experts, rows, columns, rank, tokens


def dense_stack(*, is_transposed: bool, dtype: torch.dtype = torch.float32, **options: Any) -> DenseStack:
    torch.manual_seed(0)
    stack = DenseStack(nn.Parameter(torch.randn(E, R, C, dtype=dtype) * 0.3, requires_grad=False))
    stack.adapter = LoraStack(stack, rank=K, alpha=5, is_transposed=is_transposed, dtype=dtype, **options)
    nn.init.normal_(stack.adapter.lora_B, std=0.3)
    return stack


def merged(stack: DenseStack) -> Tensor:
    """W + s B A of every expert, by peft's formula for stacked parameters."""
    adapter = stack.adapter
    assert isinstance(adapter, LoraStack)
    A_EKI = adapter.lora_A.reshape(E, K, -1)
    B_OKE = adapter.lora_B.reshape(-1, K, E)
    equation = "oke,eki->eio" if adapter.is_transposed else "oke,eki->eoi"
    return stack.weight + adapter.scaling * torch.einsum(equation, B_OKE, A_EKI)


@pytest.mark.parametrize("is_transposed", [True, False])
@pytest.mark.parametrize("product", ["linear", "matmul", "bmm"])
def test_products_and_gradients_are_those_of_the_merged_stack(product: str, is_transposed: bool) -> None:
    stack = dense_stack(is_transposed=is_transposed)
    adapter = stack.adapter
    assert isinstance(adapter, LoraStack)
    x = torch.randn(E, T, C if product == "linear" else R, requires_grad=True)

    def compute(weight: Any) -> Tensor:
        if product == "bmm":
            return torch.bmm(x, weight)
        if product == "matmul":
            return torch.stack([x[e] @ weight[torch.tensor(e)] for e in range(E)])
        return torch.stack([nn.functional.linear(x[e], weight[e]) for e in range(E)])

    y, expected = compute(stack), compute(merged(stack))
    dy = torch.randn_like(y)
    leaves = [x, adapter.lora_A, adapter.lora_B]
    assert error(y, expected) < 1e-5  # float32, as in test_lora; measured 2e-7
    for got, want in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        assert error(got, want) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_models_agree_with_peft_on_logits_and_gradients(name: str) -> None:
    ours, theirs = plain_model(name), plain_model(name)
    paths = inject_lora(
        ours, targets=["experts.gate_up_proj", "experts.down_proj"], rank=K, alpha=5, dtype=torch.float32
    )
    shake(ours)
    config = peft.LoraConfig(target_modules=[], target_parameters=paths, r=K, lora_alpha=5)
    theirs = peft.get_peft_model(theirs, config)
    other = {n.replace(".default", ""): p for n, p in theirs.named_parameters() if p.requires_grad}
    own = adapter_tensors(ours)
    assert own.keys() == other.keys()
    for key, parameter in other.items():
        parameter.data.copy_(own[key].detach())
    y1, y2 = ours(tokens()).logits, theirs(tokens()).logits
    y1.square().mean().backward()
    y2.square().mean().backward()
    assert error(y1, y2) < 1e-5  # float32; measured, gradients included, at most 7e-7
    for key, parameter in other.items():
        assert own[key].grad is not None
        assert error(own[key].grad, parameter.grad) < 1e-5


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_quantized_experts_give_what_their_dequantized_weights_give(name: str) -> None:
    quantized = quantized_model(name)
    models = [quantized, dequantized_model(name, quantized)]
    for model in models:
        torch.manual_seed(0)
        inject_lora(model, rank=K, alpha=5, dtype=torch.float32)
        shake(model)
        model(tokens()).logits.square().mean().backward()
    assert any(isinstance(module, QuantStack) for module in models[0].modules())
    assert any(isinstance(module, DenseStack) for module in models[1].modules())
    for (name_1, one), (_, other) in zip(*(trainable_parameters(model) for model in models), strict=True):
        assert one.grad is not None, name_1
        assert error(one.grad, other.grad) < 1e-5  # the same numbers, so measured 0 here; kernels may differ


def test_an_expert_without_tokens_gets_a_zero_gradient() -> None:
    experts = nn.Module()
    stack = experts.stack = dense_stack(is_transposed=False)
    adapter = stack.adapter
    assert isinstance(adapter, LoraStack)
    experts.forward = lambda x: nn.functional.linear(x, stack[1]) + nn.functional.linear(x, stack[2])
    x = torch.randn(T, C)
    experts(x).sum().backward()
    without = adapter.lora_A.grad, adapter.lora_B.grad
    handles = adapter.attach(experts)
    adapter.zero_grad()
    experts(x).sum().backward()
    assert adapter.lora_A.grad is not None
    assert adapter.lora_B.grad is not None
    assert adapter.lora_A.grad.view(E, K, C)[[0, 3]].count_nonzero() == 0
    assert adapter.lora_B.grad.view(R, K, E)[:, :, [0, 3]].count_nonzero() == 0
    assert torch.equal(adapter.lora_A.grad, without[0])  # split once for all, or for each expert: the same
    assert torch.equal(adapter.lora_B.grad, without[1])
    assert adapter.lora_A.grad.view(E, K, C)[1:3].count_nonzero() > 0
    assert len(handles) == 2


def test_the_factors_are_split_once_for_each_forward() -> None:
    model = plain_model("mixtral")
    inject_lora(model, targets=["gate_up_proj"], rank=K, dtype=torch.float32)
    y = model(tokens()).logits
    adapters = [module for module in model.modules() if isinstance(module, LoraStack)]
    assert all(adapter._factors is None for adapter in adapters)
    nodes, splits, seen = [y.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            splits |= {node} if node.name() == "UnbindBackward0" else set()
            nodes += [following for following, _ in node.next_functions]
    assert len(splits) == 2 * len(adapters)  # A and B of each stack, however many experts were hit
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 10_000))
    assert all(adapter._factors is None for adapter in adapters)


def test_a_failed_forward_leaves_no_factors_behind() -> None:
    experts = nn.Module()
    stack = dense_stack(is_transposed=False)
    adapter = stack.adapter
    assert isinstance(adapter, LoraStack)
    adapter.attach(experts)

    def fail(x: Tensor) -> Tensor:
        assert adapter.factors() is adapter.factors()
        raise RuntimeError("out of memory")

    experts.forward = fail
    with pytest.raises(RuntimeError, match="out of memory"):
        experts(torch.zeros(1))
    assert adapter._factors is None
    assert adapter.factors() is not adapter.factors()


def test_nothing_is_saved_but_the_input_and_the_factors() -> None:
    model = quantized_model("mixtral")
    inject_lora(model, targets=["experts.gate_up_proj"], rank=K, dtype=torch.float32)
    stack = model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert isinstance(stack, QuantStack)
    adapter = stack.adapter
    assert isinstance(adapter, LoraStack)
    x = torch.randn(T, stack.shape[2], requires_grad=True)
    saved: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = nn.functional.linear(x, stack[0]) + nn.functional.linear(x, stack[1])
    expected = {t.untyped_storage().data_ptr() for t in (x, adapter.lora_A, adapter.lora_B)}
    assert saved == expected
    assert y.requires_grad


def test_dropout_acts_in_training_only() -> None:
    stack, x = dense_stack(is_transposed=False, dropout=0.5), torch.randn(T, C)
    assert stack.adapter is not None
    assert not torch.equal(nn.functional.linear(x, stack[0]), nn.functional.linear(x, stack[0]))
    stack.adapter.eval()
    assert torch.equal(nn.functional.linear(x, stack[0]), nn.functional.linear(x, stack[0]))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_disabled_adapters_leave_the_experts_alone(name: str) -> None:
    for model in (plain_model(name), quantized_model(name)):
        with torch.no_grad():
            before = model(tokens()).logits
            inject_lora(model, targets=["experts.down_proj"], rank=K, dtype=torch.float32)
            shake(model)
            assert error(model(tokens()).logits, before) > 1e-3
            with adapters_disabled(model):
                assert torch.equal(model(tokens()).logits, before)


def test_what_a_stack_cannot_do_is_refused() -> None:
    stack = dense_stack(is_transposed=False)
    with pytest.raises(UnsupportedError, match="does not support"):
        torch.add(stack, 1)  # type: ignore[call-overload]
    with pytest.raises(UnsupportedError, match="one by one"):
        get_base_weight(stack)
    assert torch.equal(get_base_weight(stack, index=2), stack.weight[2])
    assert len(stack) == E
    assert stack[0].shape == (R, C)


def test_a_quantized_stack_may_be_on_meta() -> None:
    stack = QuantStack(E, R, C, spec=QuantSpec(), device="meta")
    adapter = LoraStack(stack, rank=K, alpha=5, is_transposed=True)
    assert adapter.lora_A.is_meta
    assert adapter.lora_A.shape == (K * E, R)
    assert adapter.lora_B.shape == (C, K * E)
