"""The only place where LoRA adapters enter a model, and leave it again."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import peft
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from lowmem_ft.adapters.lora import LoraLinear
from lowmem_ft.adapters.peft_methods import peft_remaps
from lowmem_ft.adapters.stack import DenseStack, LoraStack
from lowmem_ft.adapters.targets import (
    adaptable,
    by_pattern,
    find_trained_modules,
    in_layers,
    is_inside,
    select_targets,
)
from lowmem_ft.core.config import Init
from lowmem_ft.core.errors import ConfigError
from lowmem_ft.core.host import Trimmer
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.swap import is_linear

Bias = Literal["none", "all", "lora_only"]
_ATTRIBUTE = "_lowmem_injection"


@dataclass(kw_only=True)
class Injection:
    """What `inject_lora` did to a model, kept on it for saving and for undoing.

    Attributes:
        paths: of the adapted linear layers and expert stacks, in the model's order.
        trained_modules: paths of the fully trained modules.
        requires_grad: of each parameter before.
        parameter_order: names of the parameters of each module that had some of them put behind a DenseStack.
    """

    paths: list[str]
    trained_modules: list[str]
    bias: Bias
    dora: bool
    rslora: bool
    dropout: float
    init: Init
    requires_grad: dict[str, bool]
    hooks: list[RemovableHandle] = field(default_factory=list)
    parameter_order: dict[str, list[str]] = field(default_factory=dict)


def inject_lora(
    model: nn.Module,
    *,
    targets: str | Sequence[str] = "all-linear",
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
    init: Init = "default",
    bias: Bias = "none",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    layers: Collection[int] | None = None,
    train_modules: Sequence[str] = (),
    dtype: torch.dtype = torch.bfloat16,
) -> list[str]:
    """Put LoRA adapters into `model` and freeze everything else, in place.

    Args:
        model: a causal language model, quantized or not, on any device (meta included).
        targets: "all-linear" (every linear layer and expert stack but the output head); or names, each the end of a
            path at a dot, as peft matches them; or a regular expression that matches whole paths. An expert stack has
            the path of its parameter (`model.layers.0.mlp.experts.gate_up_proj`).
        init: of A, "default" (Kaiming uniform) or "gaussian" (std 1 / rank); B starts at zero.
        bias: which of the base model's own biases are trained too: none, all, or those of adapted layers.
        rank_pattern, alpha_pattern: regular expression for the end of a path -> value, as in peft: first match wins.
        layers: indices of the decoder layers to adapt, by default all.
        train_modules: names of modules that are trained whole and in place, in their own dtype (embeddings, head,
            norms). Training one of two tied modules trains both. `eject_lora` does not take this training back.
        dtype: of A and B.

    Returns:
        The adapted paths, in the model's order.

    Raises:
        ConfigError: a name or pattern matches nothing, a value is out of range, or options exclude each other.
    """
    _check_values(rank, alpha, init, bias)
    candidates = adaptable(model)
    trained = find_trained_modules(model, train_modules)
    paths = [
        p for p in select_targets(model, candidates, targets) if not (targets == "all-linear" and is_inside(p, trained))
    ]
    paths = in_layers(paths, layers)
    inject_resolved(
        model,
        ranks=by_pattern(paths, rank_pattern or {}, rank, "rank_pattern"),
        alphas=by_pattern(paths, alpha_pattern or {}, alpha, "alpha_pattern"),
        trained_modules=trained,
        dropout=dropout,
        rslora=rslora,
        dora=dora,
        init=init,
        bias=bias,
        dtype=dtype,
    )
    return paths


def inject_resolved(
    model: nn.Module,
    *,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    trained_modules: Sequence[str],
    dropout: float,
    rslora: bool,
    dora: bool,
    init: Init,
    bias: Bias,
    dtype: torch.dtype,
) -> None:
    """`inject_lora` with everything found out: `ranks` and `alphas` by path, `trained_modules` as paths."""
    if is_injected(model):
        raise ConfigError("the model already has adapters", fix="call eject_lora(model) first")
    if not 0 <= dropout < 1:
        raise ConfigError("dropout is a probability", given=dropout, allowed="0 <= dropout < 1")
    both = [path for path in ranks if is_inside(path, trained_modules)]
    if both:
        raise ConfigError("a module cannot be both adapted and trained whole", given=both[0], fix="drop one of the two")
    candidates = adaptable(model)
    stacks = [path for path in ranks if not is_linear(candidates[path])]
    if dora and stacks:
        raise ConfigError(
            "DoRA does not work on stacked experts (nor does it in peft)",
            given=f"dora: true with target {stacks[0]}",
            fix="set dora: false, or name targets without the experts",
        )
    remapped = [path for path in ranks if dora and peft_remaps(path.rpartition(".")[2], model)]
    if remapped:
        raise ConfigError(
            "peft could not load DoRA here: it takes layers of this name for experts",
            given=f"dora: true with target {remapped[0]}",
            fix="set dora: false, or leave these layers out of the targets",
        )
    injection = Injection(
        paths=list(ranks),
        trained_modules=list(trained_modules),
        bias=bias,
        dora=dora,
        rslora=rslora,
        dropout=dropout,
        init=init,
        requires_grad={name: parameter.requires_grad for name, parameter in model.named_parameters()},
    )
    model.requires_grad_(False)
    trimmer = Trimmer()
    for path, rank in ranks.items():
        target = candidates[path]
        common: dict[str, Any] = {"rank": rank, "alpha": alphas[path], "dropout": dropout, "rslora": rslora}
        common |= {"init": init, "dtype": dtype}
        if isinstance(target, nn.Module) and is_linear(target):
            layer = LoraLinear(target, dora=dora, **common)
            if bias == "lora_only" and layer.bias is not None:
                layer.bias.requires_grad_(True)
            if layer.magnitude is not None and layer.magnitude.device.type == "cpu":
                trimmer.worked(layer.in_features * layer.out_features * dtype.itemsize)  # the dequantized W
            model.set_submodule(path, layer)
        else:
            parent_path, _, name = path.rpartition(".")
            parent = model.get_submodule(parent_path)
            injection.parameter_order.setdefault(parent_path, list(parent._parameters))
            stack = _as_stack(parent, name)
            stack.adapter = LoraStack(stack, is_transposed=getattr(parent, "is_transposed", False), **common)
            injection.hooks += stack.adapter.attach(parent)
    for path in trained_modules:
        model.get_submodule(path).requires_grad_(True)
    if bias == "all":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name.endswith(".bias"))
    setattr(model, _ATTRIBUTE, injection)


def eject_lora(model: nn.Module) -> None:
    """Take the adapters out again: the model holds the very modules and parameters it held before.

    What was trained in place (`train_modules`, `bias`) keeps its trained values.

    Raises:
        ConfigError: there are no adapters.
    """
    injection = injection_of(model)
    for hook in injection.hooks:
        hook.remove()
    for path in injection.paths:
        parent_path, _, name = path.rpartition(".")
        parent, module = model.get_submodule(parent_path), model.get_submodule(path)
        if isinstance(module, LoraLinear):
            model.set_submodule(path, module.base_layer)
        elif isinstance(module, DenseStack):
            del parent._modules[name]
            parent._parameters[name] = module.weight
        else:
            del module.adapter
            module.adapter = None  # type: ignore[assignment]
    for path, names in injection.parameter_order.items():
        parameters = model.get_submodule(path)._parameters
        in_order = {name: parameters[name] for name in names}
        parameters.clear()
        parameters.update(in_order)
    delattr(model, _ATTRIBUTE)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(injection.requires_grad[name])


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes without its adapters. What was trained in place stays trained."""
    if isinstance(model, peft.PeftModel):
        with model.disable_adapter():
            yield
        return
    layers = [module for module in model.modules() if isinstance(module, LoraLinear | LoraStack)]
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def trainable_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(name, parameter) of all that requires a gradient, in the model's order, tied parameters once."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def parameter_groups(
    model: nn.Module, *, lr: float, lora_plus_ratio: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Optimizer groups: `params`, `lr`, `weight_decay`.

    Args:
        lora_plus_ratio: the learning rate of every B is `lr` times this (LoRA+, arXiv:2402.12354; about 16).
        weight_decay: of matrices; vectors (magnitudes, norms, biases) are not decayed.

    Raises:
        ConfigError: nothing is trainable, or a ratio that is not positive.
    """
    if lora_plus_ratio is not None and lora_plus_ratio <= 0:
        raise ConfigError("lora_plus_ratio must be positive", given=lora_plus_ratio, allowed="> 0")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in trainable_parameters(model):
        rate = lr * (lora_plus_ratio or 1.0) if "lora_B" in name.split(".") else lr
        decay = weight_decay if parameter.ndim > 1 else 0.0
        group = groups.setdefault((rate, decay), {"params": [], "lr": rate, "weight_decay": decay})
        group["params"].append(parameter)
    if not groups:
        raise ConfigError("nothing in the model is trainable", fix="inject an adapter first")
    return list(groups.values())


def is_injected(model: nn.Module) -> bool:
    """Whether `inject_lora` was here."""
    return hasattr(model, _ATTRIBUTE)


def injection_of(model: nn.Module) -> Injection:
    """The record of the adapters in `model`.

    Raises:
        ConfigError: there are none.
    """
    injection = getattr(model, _ATTRIBUTE, None)
    if not isinstance(injection, Injection):
        raise ConfigError("the model has no LoRA adapters", fix="call inject_lora first")
    return injection


def adapter_at(model: nn.Module, path: str) -> LoraLinear | LoraStack:
    """The adapter of one of `Injection.paths`."""
    module = model.get_submodule(path)
    adapter = module if isinstance(module, LoraLinear) else module.adapter
    assert isinstance(adapter, LoraLinear | LoraStack)
    return adapter


def _check_values(rank: int, alpha: float, init: str, bias: str) -> None:
    if rank < 1:
        raise ConfigError("the rank must be at least 1", given=rank)
    if alpha <= 0:
        raise ConfigError("alpha must be positive", given=alpha)
    if init not in get_args(Init):
        raise ConfigError("unknown adapter initialisation", given=init, allowed=", ".join(get_args(Init)))
    if bias not in get_args(Bias):
        raise ConfigError("unknown bias option", given=bias, allowed=", ".join(get_args(Bias)))


def _as_stack(parent: nn.Module, name: str) -> QuantStack | DenseStack:
    """The stack called `name`; a 3-D parameter is put behind a DenseStack first."""
    member = getattr(parent, name)
    if isinstance(member, QuantStack):
        return member
    stack = DenseStack(member).train(parent.training)
    del parent._parameters[name]
    parent._modules[name] = stack
    return stack
