"""Adapters enter and leave a model; the options mean what they say."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from lowmem_ft.adapters.inject import (
    adapters_disabled,
    eject_lora,
    inject_lora,
    injection_of,
    parameter_groups,
    trainable_parameters,
)
from lowmem_ft.adapters.lora import LoraLinear
from lowmem_ft.adapters.stack import LoraStack
from lowmem_ft.core.errors import ConfigError, UnsupportedError
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import QuantSpec
from tests.models import ARCHITECTURES, MOE_ARCHITECTURES
from tests.unit.adapters.helpers import error, logits, plain_model, quantized_model, shake, tokens


def contents(model: nn.Module) -> list[Any]:
    """All that `eject_lora` has to restore: objects, names, order, flags."""
    return [
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()],
        [(name, tensor.data_ptr()) for name, tensor in model.state_dict().items()],
        [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        [sorted(module.__dict__) for module in model.modules()],
    ]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_adapters_come_and_go_without_a_trace(name: str) -> None:
    model = plain_model(name)
    before, base = contents(model), logits(model)
    paths = inject_lora(model, rank=3, dtype=torch.float32)
    assert torch.equal(logits(model), base)  # B is zero
    shake(model)
    assert error(logits(model), base) > 1e-2
    with adapters_disabled(model):
        assert torch.equal(logits(model), base)
    assert error(logits(model), base) > 1e-2
    model(tokens()).logits.square().mean().backward()
    adapters = [module for module in model.modules() if isinstance(module, LoraLinear | LoraStack)]
    assert len(adapters) == len(paths)
    assert all(p.grad is not None and p.grad.count_nonzero() > 0 for _, p in trainable_parameters(model))
    assert {id(p) for _, p in trainable_parameters(model)} == {id(p) for a in adapters for p in (a.lora_A, a.lora_B)}
    eject_lora(model)
    assert contents(model) == before
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_oss"])
def test_adapters_come_and_go_on_a_quantized_model(name: str) -> None:
    model = quantized_model(name).train()
    before, base = contents(model), logits(model.eval())
    model.train()
    inject_lora(model, rank=3, dropout=0.1)
    assert all(module.training for module in model.modules())
    shake(model)
    assert error(logits(model.eval()), base) > 1e-2
    model.train()
    eject_lora(model)
    assert contents(model) == before
    assert torch.equal(logits(model.eval()), base)


def test_all_linear_is_every_matrix_but_the_head() -> None:
    for name in ("llama", "opt", "mixtral"):
        model = plain_model(name)
        linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"]
        stacks = [path for path, parameter in model.named_parameters() if parameter.ndim == 3]
        assert sorted(inject_lora(model)) == sorted(linear + stacks)
        assert bool(stacks) == (name in MOE_ARCHITECTURES)


def test_paths_and_trainable_parameters_keep_the_order_of_the_model() -> None:
    model = plain_model("mixtral")
    paths = inject_lora(model, targets=["down_proj", "q_proj", "gate_up_proj"])
    layer = "model.layers.{}.{}"
    ends = ["self_attn.q_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert paths == [layer.format(i, end) for i in range(2) for end in ends]
    names = [name for name, _ in trainable_parameters(model)]
    assert names == [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert names[:2] == [f"model.layers.0.self_attn.q_proj.lora_{x}" for x in "AB"]


def test_targets_by_name_by_path_and_by_expression() -> None:
    for targets, expected in [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["layers.1.self_attn.q_proj"], ["model.layers.1.self_attn.q_proj"]),
        (r".*\.0\.mlp\.(up|down)_proj", ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
    ]:
        assert inject_lora(plain_model("llama"), targets=targets) == expected


def test_layers_restrict_the_targets() -> None:
    paths = inject_lora(plain_model("gpt_oss"), layers=[1])
    assert paths
    assert all(path.startswith("model.layers.1.") for path in paths)


def test_patterns_set_rank_and_alpha_where_the_first_one_matches() -> None:
    model = plain_model("llama")
    inject_lora(
        model,
        rank=4,
        alpha=8,
        rank_pattern={r"layers\.0\.mlp\.down_proj": 2, "down_proj": 3, "q_proj": 6},
        alpha_pattern={"q_proj": 3},
    )

    def adapter(path: str) -> LoraLinear:
        module = model.get_submodule(path)
        assert isinstance(module, LoraLinear)
        return module

    assert adapter("model.layers.0.mlp.down_proj").rank == 2
    assert adapter("model.layers.1.mlp.down_proj").rank == 3
    assert adapter("model.layers.1.mlp.down_proj").lora_A.shape == (3, 80)
    assert adapter("model.layers.1.self_attn.q_proj").scaling == 3 / 6
    assert adapter("model.layers.1.self_attn.k_proj").scaling == 8 / 4


@pytest.mark.parametrize("quantized", [False, True])
def test_bias_options(quantized: bool) -> None:
    for bias, expected in [
        ("none", set()),
        ("lora_only", {"attn.c_attn", "attn.c_proj"}),
        ("all", {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "ln_1", "ln_2", "ln_f"}),
    ]:
        model = quantized_model("gpt2") if quantized else plain_model("gpt2")
        inject_lora(model, targets=["c_attn", "attn.c_proj"], bias=bias, dtype=torch.float32)  # type: ignore[arg-type]
        found = {name for name, _ in trainable_parameters(model) if name.endswith(".bias")}
        ends = {name.removesuffix(".bias").removesuffix(".base_layer").split(".", 3)[-1] for name in found}
        assert {end.replace("transformer.", "") for end in ends} == expected
        model(tokens()).logits.square().mean().backward()
        assert all(p.grad is not None for _, p in trainable_parameters(model))


def test_modules_trained_whole() -> None:
    model = plain_model("llama", tie_word_embeddings=False)
    paths = inject_lora(model, train_modules=["embed_tokens", "model.norm", "lm_head"], dtype=torch.float32)
    whole = [name for name, _ in trainable_parameters(model) if "lora_" not in name]
    assert whole == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert injection_of(model).trained_modules == ["model.embed_tokens", "model.norm", "lm_head"]
    assert len(paths) == 14
    model(tokens()).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in trainable_parameters(model))
    weight = model.lm_head.weight
    eject_lora(model)
    assert model.lm_head.weight is weight


def test_training_one_of_two_tied_modules_trains_both_and_says_so() -> None:
    for name in ("embed_tokens", "lm_head"):
        model = plain_model("llama", tie_word_embeddings=True)
        with pytest.warns(UserWarning, match="is tied to a module in train_modules: it is trained too"):
            inject_lora(model, train_modules=[name])
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert model.lm_head.weight.requires_grad


def test_all_linear_leaves_out_what_is_trained_whole() -> None:
    model = plain_model("llama")
    paths = inject_lora(model, train_modules=["layers.0.mlp.up_proj"])
    assert "model.layers.0.mlp.up_proj" not in paths
    assert len(paths) == 13


def test_parameter_groups_follow_lora_plus_and_decay_matrices_only() -> None:
    model = plain_model("gpt2")
    inject_lora(model, targets=["c_attn"], dora=True, bias="lora_only", rank=3)
    groups = parameter_groups(model, lr=1e-3, lora_plus_ratio=16, weight_decay=0.1)
    shapes = {(group["lr"], group["weight_decay"]): sorted(tuple(p.shape) for p in group["params"]) for group in groups}
    assert shapes == {
        (1e-3, 0.1): [(3, 48), (3, 48)],
        (1e-3 * 16, 0.1): [(144, 3), (144, 3)],
        (1e-3, 0.0): [(144,)] * 4,  # magnitudes and biases
    }
    assert [group["lr"] for group in parameter_groups(model, lr=1e-3)] == [1e-3]


def test_the_seed_decides_the_start() -> None:
    starts = []
    for init in ("default", "default", "gaussian"):
        model = plain_model("llama")
        torch.manual_seed(7)
        inject_lora(model, init=init)
        starts.append(torch.cat([p.flatten() for n, p in trainable_parameters(model) if n.endswith("lora_A")]))
        assert all(p.count_nonzero() == 0 for n, p in trainable_parameters(model) if n.endswith("lora_B"))
        assert {p.dtype for _, p in trainable_parameters(model)} == {torch.bfloat16}
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_a_model_on_meta_gets_adapters_on_meta() -> None:
    model = plain_model("mixtral").to("meta")
    inject_lora(model)
    assert all(parameter.is_meta for parameter in model.parameters())


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"targets": ["q_porj"]}, "did you mean q_proj"),
    "not a matrix": ({"targets": ["input_layernorm"]}, "is a LlamaRMSNorm, which LoRA does not adapt"),
    "the head": ({"targets": ["lm_head"]}, "the output head is not adapted"),
    "a name as expression": ({"targets": "q_proj"}, r"write a list: \[q_proj\]"),
    "broken expression": ({"targets": "q_proj("}, "not a regular expression"),
    "no targets": ({"targets": []}, "empty list"),
    "layer out of range": ({"layers": [0, 7]}, "0..1"),
    "no layers": ({"layers": []}, "layers is empty"),
    "unknown rank key": ({"rank_pattern": {"qproj": 2}}, "did you mean q_proj"),
    "broken rank key": ({"rank_pattern": {"(": 2}}, "not a regular expression"),
    "rank pattern of zero": ({"rank_pattern": {"q_proj": 0}}, "positive values"),
    "unknown alpha key": ({"alpha_pattern": {"lm_head": 2}}, "matches no adapted layer"),
    "rank zero": ({"rank": 0}, "at least 1"),
    "alpha": ({"alpha": 0}, "alpha must be positive"),
    "dropout": ({"dropout": 1.0}, "0 <= dropout < 1"),
    "init": ({"init": "pissa"}, "default, gaussian"),
    "bias": ({"bias": "some"}, "none, all, lora_only"),
    "unknown module": ({"train_modules": ["lm_haed"]}, "did you mean lm_head"),
    "twice": ({"targets": ["q_proj"], "train_modules": ["self_attn"]}, "both adapted and trained whole"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options_are_named_and_change_nothing(case: str) -> None:
    options, message = BAD[case]
    model = plain_model("llama")
    before = contents(model)
    with pytest.raises(ConfigError, match=message):
        inject_lora(model, **options)
    assert contents(model) == before


def test_what_cannot_be_combined() -> None:
    with pytest.raises(ConfigError, match="DoRA does not work on stacked experts"):
        inject_lora(plain_model("mixtral"), dora=True)
    with pytest.raises(ConfigError, match="peft could not load DoRA here"):
        inject_lora(plain_model("deepseek_v3"), targets=["shared_experts.gate_proj"], dora=True)
    with pytest.raises(ConfigError, match="a quantized module cannot be trained whole"):
        inject_lora(quantized_model("llama"), train_modules=["mlp"])
    with pytest.raises(UnsupportedError, match="no linear layer"):
        inject_lora(nn.LayerNorm(3))
    model = plain_model("llama")
    with pytest.raises(ConfigError, match="no LoRA adapters"):
        eject_lora(model)
    with pytest.raises(ConfigError, match="nothing in the model is trainable"):
        parameter_groups(model.requires_grad_(False), lr=1e-3)
    inject_lora(model)
    with pytest.raises(ConfigError, match="already has adapters"):
        inject_lora(model)
    with pytest.raises(ConfigError, match="must be positive"):
        parameter_groups(model, lr=1e-3, lora_plus_ratio=0)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_copy_of_the_model_is_independent(quantized: bool) -> None:
    model = quantized_model("mixtral") if quantized else plain_model("mixtral")
    base = logits(model)
    inject_lora(model, rank=3, dtype=torch.float32)
    copied = copy.deepcopy(model)
    shake(copied)
    assert torch.equal(logits(model), base)
    assert error(logits(copied), base) > 1e-2
    copied(tokens()).logits.square().mean().backward()
    assert all(p.grad is not None for _, p in trainable_parameters(copied))
    assert all(p.grad is None for _, p in trainable_parameters(model))
    eject_lora(copied)
    assert torch.equal(logits(copied), base)


def test_an_int8_model_takes_adapters_too() -> None:
    model = quantized_model("llama", spec=QuantSpec(bits=8))
    inject_lora(model, dora=True, dtype=torch.float32)
    base = logits(model)
    shake(model)
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj.base_layer"), QuantLinear)
    assert error(logits(model), base) > 1e-2


@pytest.mark.parametrize("quantized", [False, True])
def test_an_adapter_takes_none_of_pefts_inside(quantized: bool) -> None:
    """`all-linear` means the layers below ours, too, whose matrix we read: peft's adapter would train in vain."""
    model = quantized_model("llama") if quantized else plain_model("llama")
    inject_lora(model)
    with pytest.raises(UnsupportedError, match=r"has an adapter already[\s\S]*adapter=False"):
        peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear"))
