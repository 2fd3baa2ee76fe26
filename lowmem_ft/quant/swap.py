"""Put quantized modules in the place of linear layers and stacked experts, before any weight is read."""

from __future__ import annotations

import sys
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import QuantSpec


def swap_quantized(model: nn.Module, *, spec: QuantSpec, skip: Collection[str]) -> list[str]:
    """Replace each linear layer by a QuantLinear and each stacked expert parameter by a QuantStack, in place.

    Linear layers are nn.Linear, its subclasses that compute the same (Falcon's), and Conv1D, whose replacement has the
    logical (O, I) orientation. Biases stay the same parameters, frozen. Routers that are no nn.Linear, norms and
    embeddings are left alone. The new storage is uninitialised, on the device of what it replaces (meta).

    Args:
        model: usually on meta.
        spec: with 16 bits nothing is replaced.
        skip: paths of modules to leave alone, with all that is below them (the head).

    Returns:
        The paths of the new modules, in the order of `model.named_modules()`.

    Raises:
        UnsupportedError: two layers share one weight.
    """
    swapped: list[str] = []
    replacements: dict[nn.Module, QuantLinear] = {}
    owners: dict[nn.Parameter, str] = {}
    if spec.kind == "none":
        return swapped
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if any(path == name or path.startswith(f"{name}.") for name in skip):
            continue
        for name, parameter in list(module.named_parameters(recurse=False)):
            if is_expert_stack(module, parameter):
                delattr(module, name)
                stack = QuantStack(*parameter.shape, spec=spec, dtype=parameter.dtype, device=parameter.device)
                setattr(module, name, stack)
                swapped.append(f"{path}.{name}" if path else name)
        if is_plain_linear(module):
            if module not in replacements:  # a layer that several parents share stays shared
                first = owners.setdefault(module.get_parameter("weight"), path)
                if first != path:
                    raise UnsupportedError(
                        "Layers of this architecture share one weight, which would be quantized for each of them.",
                        given=f"{first} and {path}",
                        fix="set quant.bits: 16",
                    )
                replacements[module] = _quant_linear(module, spec)
                swapped.append(path)
            model.set_submodule(path, replacements[module])
    return swapped


def _quant_linear(module: nn.Module, spec: QuantSpec) -> QuantLinear:
    weight, bias = module.get_parameter("weight"), module._parameters["bias"]
    out_features, in_features = reversed(weight.shape) if isinstance(module, Conv1D) else weight.shape
    new = QuantLinear(
        in_features, out_features, bias=bias is not None, spec=spec, dtype=weight.dtype, device=weight.device
    )
    if bias is not None:
        new.register_parameter("bias", bias)
        bias.requires_grad_(False)
    new.train(module.training)
    return new


def is_expert_stack(module: nn.Module, parameter: Tensor) -> bool:
    """Experts as transformers 5 stores them; the attributes are those that its `use_experts_implementation` sets."""
    marked = hasattr(module, "is_transposed") and hasattr(module, "has_gate")
    counted = getattr(module, "num_experts", None) == parameter.shape[0] if parameter.ndim else False
    return parameter.ndim == 3 and (marked or counted)


def has_conv1d(model: nn.Module) -> bool:
    """Whether a model's layers are Conv1D, which store (I, O), or quantized ones in their place: GPT-2 and its kin."""
    return hasattr(sys.modules[type(model).__module__], "Conv1D")


def is_linear(target: object) -> bool:
    """Whether it is a linear layer, quantized or not, without an adapter."""
    return isinstance(target, QuantLinear) or (isinstance(target, nn.Module) and is_plain_linear(target))


def is_plain_linear(module: nn.Module) -> bool:
    if isinstance(module, QuantLinear) or not isinstance(module, nn.Linear | Conv1D):
        return False
    return isinstance(module, Conv1D) or type(module).forward is nn.Linear.forward or _computes_linear(type(module))


def _computes_linear(cls: type[nn.Linear]) -> bool:
    """Whether the subclass's own forward, run on a small nn.Linear, does what nn.Linear does."""
    return all(_computes(cls, bias=bias) for bias in (True, False))


def _computes(cls: type[nn.Linear], *, bias: bool) -> bool:
    # Values that nobody draws: asking about a layer must not move the random state that the adapters start from.
    probe = nn.utils.skip_init(nn.Linear, 3, 2, bias=bias, dtype=torch.float64, device="cpu")  # type: ignore[no-untyped-call]
    for parameter in probe.parameters():
        torch.linspace(-2, 1, parameter.numel(), dtype=torch.float64, out=parameter.data.view(-1))
    x = torch.linspace(-1, 1, 12, dtype=torch.float64, device="cpu").view(4, 3)
    try:
        return torch.allclose(cls.forward(probe, x), F.linear(x, probe.weight, probe.bias))
    except Exception:  # it needs what an nn.Linear does not have, or returns something else: not plain
        return False
