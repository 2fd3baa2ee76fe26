from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.pytorch_utils import Conv1D

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.quant.swap import swap_quantized
from tests.models import ARCHITECTURES, tiny_config, tiny_model
from tests.unit.quant import quantized_and_plain


def meta_model(name: str) -> nn.Module:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(name), dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_but_the_head_and_every_expert_stack_is_swapped(name: str) -> None:
    model = meta_model(name)
    head = model.get_output_embeddings()
    linears = {
        path: (m.in_features, m.out_features) if isinstance(m, nn.Linear) else (m.nx, m.nf)
        for path, m in model.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and m is not head
    }
    stacks = {path: p.shape for path, p in model.named_parameters() if p.ndim == 3}
    rest = {path: p for path, p in model.named_parameters() if path.removesuffix(".weight") not in {*linears, *stacks}}
    assert linears
    swapped = swap_quantized(model, spec=QuantSpec(), skip={"lm_head", "embed_out"})
    assert set(swapped) == {*linears, *stacks}
    assert len(swapped) == len(set(swapped))
    for path, (in_features, out_features) in linears.items():
        layer = model.get_submodule(path)
        assert isinstance(layer, QuantLinear)
        assert layer.shape == (out_features, in_features)
        assert layer.qweight.is_meta
        assert not any(p.requires_grad for p in layer.parameters())
    for path, shape in stacks.items():
        stack = model.get_submodule(path)
        assert isinstance(stack, QuantStack)
        assert stack.shape == shape
        assert stack.qweight.is_meta
    assert dict(model.named_parameters()).keys() == rest.keys()
    assert all(rest[path] is parameter for path, parameter in model.named_parameters())  # biases, norms, embeddings
    assert type(model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon", "opt", "gemma2"])
@pytest.mark.parametrize("spec", [QuantSpec(), QuantSpec(bits=8)], ids=str)
def test_a_swapped_model_computes_as_with_the_dequantized_weights(name: str, spec: QuantSpec) -> None:
    model = tiny_model(name, dtype=torch.float32)
    quantized, plain, _ = quantized_and_plain(model, spec, {"lm_head"})
    results = []
    for variant in (quantized, plain, model):
        embeddings = model.get_input_embeddings()(torch.arange(32).view(2, 16)).detach().requires_grad_()
        logits = variant(inputs_embeds=embeddings, use_cache=False).logits
        logits.square().mean().backward()
        results.append((logits, embeddings.grad))
    for ours, expected, unquantized in zip(*results, strict=True):
        scale = expected.abs().max().item()  # measured: bit-equal; room for another order of summation
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6 * scale)
        assert not torch.allclose(ours, unquantized, rtol=1e-5, atol=1e-6 * scale)


def test_skip_covers_what_is_below() -> None:
    model = meta_model("llama")
    swapped = swap_quantized(model, spec=QuantSpec(), skip={"lm_head", "model.layers.1"})
    assert swapped == [path for path in swapped if path.startswith("model.layers.0.")]
    assert len(swapped) == 7
    assert type(model.get_submodule("model.layers.1.mlp.up_proj")) is nn.Linear


def test_16_bits_swap_nothing() -> None:
    model = meta_model("mixtral")
    before = dict(model.named_modules())
    assert swap_quantized(model, spec=QuantSpec(bits=16), skip=()) == []
    assert dict(model.named_modules()) == before


def test_swapping_again_changes_nothing() -> None:
    model = meta_model("mixtral")
    swap_quantized(model, spec=QuantSpec(), skip={"lm_head"})
    before = dict(model.named_modules())
    assert swap_quantized(model, spec=QuantSpec(), skip={"lm_head"}) == []
    assert dict(model.named_modules()) == before


def test_linear_subclasses_are_swapped_only_where_they_compute_the_same() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict(
        {
            "falcon": FalconLinear(6, 4),
            "attention": nn.MultiheadAttention(4, 2),  # its out_proj is a subclass that adds nothing
            "doubling": Doubling(6, 4),
            "grouped": DeepseekV4GroupedLinear(6, 4, 2),
        }
    )
    assert swap_quantized(model, spec=QuantSpec(), skip=()) == ["falcon", "attention.out_proj"]
    assert type(model["doubling"]) is Doubling


@pytest.mark.parametrize("router", [Llama4Router, PhimoeTopKRouter])
def test_routers_that_return_more_than_a_product_are_left_alone(router: type[nn.Linear]) -> None:
    layer = router.__new__(router)
    nn.Linear.__init__(layer, 6, 4)
    model = nn.Sequential(layer)
    assert swap_quantized(model, spec=QuantSpec(), skip=()) == []


def test_a_shared_layer_stays_shared() -> None:
    shared = nn.Linear(6, 4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
    assert swap_quantized(model, spec=QuantSpec(), skip=()) == ["a.0"]
    assert isinstance(model["a"][0], QuantLinear)
    assert model["a"][0] is model["b"][0]


def test_three_dimensional_parameters_that_are_no_experts_stay() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_heads = 4
            self.gate_weight = nn.Parameter(torch.zeros(4, 6, 6))
            self.conv = nn.Conv1d(4, 4, 3)

    model = nn.Sequential(Mixer())
    assert swap_quantized(model, spec=QuantSpec(), skip=()) == []
    assert {name for name, _ in model.named_parameters()} == {"0.gate_weight", "0.conv.weight", "0.conv.bias"}


def test_layers_that_share_one_weight_are_refused() -> None:
    """As blocks of Zamba do: each would quantize it for itself, and load only one."""
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedError, match=r"layers\.0\.mlp\.up_proj and model\.layers\.1[\s\S]*quant\.bits: 16"):
        swap_quantized(model, spec=QuantSpec(), skip={"lm_head"})
    assert swap_quantized(model, spec=QuantSpec(bits=16), skip={"lm_head"}) == []
