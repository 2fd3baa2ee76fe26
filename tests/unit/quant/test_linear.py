from __future__ import annotations

import copy
import gc
import weakref

import peft
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.linear import QuantLinear, get_base_weight, set_base_weight
from lowmem_ft.quant.ops import QuantSpec, quantize
from tests.models import tiny_model
from tests.unit.quant import quantized_and_plain, random_matrix

SPECS = [QuantSpec(), QuantSpec(type="fp4", double_quant=False), QuantSpec(bits=8)]
I, O = 50, 33  # noqa: E741 - no multiples of anything


def make(spec: QuantSpec = SPECS[0], *, dtype: torch.dtype = torch.float32, bias: bool = True) -> QuantLinear:
    layer = QuantLinear(I, O, bias=bias, spec=spec, dtype=dtype)
    layer.load_storage(quantize(random_matrix(O, I), spec))
    if layer.bias is not None:
        layer.bias.data = random_matrix(1, O, dtype=dtype, seed=1)[0]
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_matches_plain_autograd_on_the_dequantized_weight(
    spec: QuantSpec, leading: tuple[int, ...], dtype: torch.dtype
) -> None:
    layer = make(spec, dtype=dtype)
    assert layer.bias is not None
    layer.bias.requires_grad_()  # LoRA's `bias: all` trains it
    weight, bias = layer.weight.requires_grad_(False), layer.bias.detach().clone().requires_grad_()
    x = torch.randn(*leading, I).to(dtype).requires_grad_()
    x_plain = x.detach().clone().requires_grad_()
    y, y_plain = layer(x), F.linear(x_plain, weight, bias)
    dy = torch.randn_like(y)
    y.backward(dy)
    y_plain.backward(dy)
    # the same products in the same dtype; a row vector and a batch may sum in another order: 2 roundings
    tolerance = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 8 * torch.finfo(dtype).eps}
    torch.testing.assert_close(y, y_plain, **tolerance)
    torch.testing.assert_close(x.grad, x_plain.grad, **tolerance)
    torch.testing.assert_close(layer.bias.grad, bias.grad, **tolerance)


def test_nothing_is_kept_for_backward() -> None:
    layer = make()
    x = torch.randn(4, I, requires_grad=True)
    inner = x * 2
    gone = weakref.ref(inner)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: pytest.fail("nothing to unpack")):
        y = layer(inner)
    assert saved == []
    assert not any(isinstance(value, torch.Tensor) for value in vars(y.grad_fn).values())
    del inner
    gc.collect()
    assert gone() is None


def test_no_work_where_no_gradient_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    assert not layer(torch.randn(4, I)).requires_grad
    assert layer.bias is not None
    layer.bias.requires_grad_()
    y = layer(torch.randn(4, I))
    monkeypatch.setattr(layer, "dequantize", lambda dtype: pytest.fail("the input needs no gradient"))
    y.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((O,), 4.0))


def test_backward_finds_storage_that_was_replaced_after_forward() -> None:
    layer = make(bias=False)
    x = torch.randn(4, I, requires_grad=True)
    y = layer(x)
    layer.load_storage(quantize(random_matrix(O, I, seed=9), layer.spec))
    y.backward(torch.ones_like(y))
    torch.testing.assert_close(x.grad, torch.ones(4, O) @ layer.weight)


def test_autocast_decides_the_dtype() -> None:
    layer = make(dtype=torch.float32)
    x = torch.randn(4, I, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert layer.bias is not None
    weight = layer.dequantize(torch.bfloat16)
    assert torch.equal(y, F.linear(x.bfloat16(), weight, layer.bias.bfloat16()))
    y.sum().backward()
    assert torch.equal(x.grad, (torch.ones_like(y) @ weight).float())


def test_is_a_well_behaved_module() -> None:
    layer = make(dtype=torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features, layer.shape) == (I, O, (O, I))
    assert (layer.weight.shape, layer.weight.dtype, layer.weight.requires_grad) == ((O, I), torch.bfloat16, False)
    assert repr(layer) == "QuantLinear(in_features=50, out_features=33, bias=True, kind=nf4, dtype=torch.bfloat16)"
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    other = make(dtype=torch.bfloat16)
    set_base_weight(other, random_matrix(O, I, seed=5))
    assert not torch.equal(other.weight, layer.weight)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, layer.weight)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin.weight, layer.weight)
    assert twin.qweight.data_ptr() != layer.qweight.data_ptr()


def test_weight_cannot_be_assigned() -> None:
    layer = make()
    with pytest.raises(KeyError, match="already exists"):
        layer.weight = nn.Parameter(torch.zeros(O, I))
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(O, I)
    layer.reset_parameters()
    assert torch.equal(layer.weight, make().weight)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_casts_change_dtype_and_keep_storage(spec: QuantSpec) -> None:
    layer, expected = make(spec), make(spec).storage()
    exact = layer.dequantize(torch.float32)
    layer.half().to("meta").to(torch.bfloat16)
    assert layer.dtype == torch.bfloat16
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    assert all(t.is_meta and t.dtype == expected[name].dtype for name, t in layer.storage().items())
    layer = make(spec).to(torch.float16)
    assert torch.equal(layer.dequantize(torch.float32), exact)
    assert torch.equal(layer.weight, exact.half())


def test_runs_on_meta_and_fake_tensors() -> None:
    layer = QuantLinear(I, O, bias=True, spec=QuantSpec(), device="meta")
    assert layer(torch.empty(2, I, device="meta", dtype=torch.bfloat16)).shape == (2, O)
    with FakeTensorMode():
        layer = QuantLinear(I, O, bias=True, spec=QuantSpec())
        x = torch.empty(2, I, dtype=torch.bfloat16, requires_grad=True)
        layer(x).sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (2, I)


def test_storage_that_does_not_fit_is_refused() -> None:
    layer = make()
    with pytest.raises(CheckpointError, match="do not fit"):
        layer.load_storage(quantize(random_matrix(O, I + 1), QuantSpec()))
    with pytest.raises(CheckpointError, match="do not fit"):
        layer.load_storage(quantize(random_matrix(O, I), QuantSpec(double_quant=False)))
    with pytest.raises(CheckpointError, match="does not fit"):
        set_base_weight(layer, torch.zeros(I, O))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "qwen2"])
def test_transformers_does_not_initialise_it(name: str) -> None:
    quantized, _, swapped = quantized_and_plain(tiny_model(name), QuantSpec(), {"lm_head"})
    prefixes = tuple(f"{path}." for path in swapped)
    before = {name: t.clone() for name, t in quantized.state_dict().items() if name.startswith(prefixes)}
    for module in quantized.modules():
        vars(module).pop("_is_hf_initialized", None)  # as if nothing had been initialised yet
    quantized.initialize_weights()
    after = quantized.state_dict()
    assert len(before) > len(swapped)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_peft_lora_trains_on_it_as_on_a_plain_linear() -> None:
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    gradients, logits = [], []
    models = quantized_and_plain(tiny_model("llama", dtype=torch.float32), QuantSpec(), {"lm_head"})[:2]
    for model in models:
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, config)
        adapted.train()
        out = adapted(torch.arange(24).view(2, 12), use_cache=False).logits
        out.square().mean().backward()
        logits.append(out)
        gradients.append({name: p.grad for name, p in adapted.named_parameters() if p.requires_grad})
    assert len(gradients[0]) == 28  # A and B of the 7 matrices of 2 layers
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-7)


def test_base_weight_of_every_kind_of_layer() -> None:
    weight = random_matrix(O, I)
    linear, conv, quantized = nn.Linear(I, O), Conv1D(O, I), make()
    for layer in (linear, conv, quantized):
        set_base_weight(layer, weight)
    assert torch.equal(get_base_weight(linear), weight)
    assert torch.equal(get_base_weight(conv), weight)
    assert torch.equal(conv.weight, weight.t())
    assert torch.equal(get_base_weight(quantized), make().weight)
    for layer in (linear, conv, quantized):
        half = get_base_weight(layer, dtype=torch.float16)
        assert (half.shape, half.dtype, half.requires_grad) == ((O, I), torch.float16, False)


def test_set_base_weight_writes_in_place() -> None:
    layer = make()
    places = {name: tensor.data_ptr() for name, tensor in layer.storage().items()}
    set_base_weight(layer, random_matrix(O, I, seed=3))
    assert {name: tensor.data_ptr() for name, tensor in layer.storage().items()} == places
    fresh = make()
    fresh.load_storage(quantize(random_matrix(O, I, seed=3), fresh.spec))
    assert torch.equal(layer.weight, fresh.weight)


def test_base_weight_looks_through_wrappers() -> None:
    class Adapter(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

    wrapped = Adapter(Adapter(make()))
    assert torch.equal(get_base_weight(wrapped), make().weight)
    set_base_weight(wrapped, random_matrix(O, I, seed=3))
    assert not torch.equal(get_base_weight(wrapped), make().weight)
    for act in (get_base_weight, lambda module: set_base_weight(module, random_matrix(O, I))):
        with pytest.raises(UnsupportedError, match="no base weight"):
            act(nn.LayerNorm(3))


def test_the_output_can_be_changed_in_place() -> None:
    layer = QuantLinear(64, 64, bias=True, spec=QuantSpec())
    layer.load_storage(quantize(random_matrix(64, 64), QuantSpec()))
    nn.init.zeros_(layer.bias)
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    y += x
    y.sum().backward()
    assert x.grad is not None
    expected = layer.weight.sum(0, dtype=torch.float32) + 1
    torch.testing.assert_close(x.grad, expected.bfloat16().expand_as(x), rtol=2**-7, atol=1e-2)  # two bf16 roundings
