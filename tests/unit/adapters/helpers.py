"""What the adapter tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowmem_ft.adapters.inject import trainable_parameters
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear, get_base_weight, set_base_weight
from lowmem_ft.quant.ops import QuantSpec, quantize
from lowmem_ft.quant.swap import swap_quantized
from tests.models import MOE_ARCHITECTURES, tiny_model

NF4 = QuantSpec()


def tokens(batch: int = 2, length: int = 9, *, seed: int = 0) -> Tensor:
    """(batch, length) token ids."""
    return torch.randint(3, 131, (batch, length), generator=torch.Generator().manual_seed(seed))


def plain_model(name: str, *, dtype: torch.dtype = torch.float32, **overrides: Any) -> PreTrainedModel:
    model = tiny_model(name, dtype=dtype, **overrides)
    if name in MOE_ARCHITECTURES:
        model.config._experts_implementation = "eager"
    return model


def quantized_model(name: str, *, dtype: torch.dtype = torch.float32, spec: QuantSpec = NF4) -> PreTrainedModel:
    """The tiny model with its matrices quantized, the head left alone."""
    model = plain_model(name, dtype=dtype)
    original = dict(model.named_modules())
    stacks = {path: parameter.detach() for path, parameter in model.named_parameters() if parameter.ndim == 3}
    head = [path for path, module in model.named_modules() if module is model.get_output_embeddings()]
    for path in swap_quantized(model, spec=spec, skip=head):
        module = model.get_submodule(path)
        if isinstance(module, QuantLinear):
            module.load_storage(quantize(get_base_weight(original[path]), spec))
        else:
            for e, matrix in enumerate(stacks[path]):
                set_base_weight(module, matrix, index=e)
    return model


def dequantized_model(name: str, quantized: nn.Module, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A plain model that holds the dequantized weights of `quantized`."""
    model = plain_model(name, dtype=dtype)
    for path, module in quantized.named_modules():
        if isinstance(module, QuantLinear):
            set_base_weight(model.get_submodule(path), get_base_weight(module, dtype=dtype))
        elif isinstance(module, QuantStack):
            slices = [module.base_slice(e, dtype) for e in range(len(module))]
            model.get_parameter(path).data.copy_(torch.stack(slices))
    return model


def shake(model: nn.Module, *, size: float = 0.05) -> None:
    """Add noise to all that is trained, so that nothing is zero or as it was."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in trainable_parameters(model):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def logits(model: nn.Module, ids: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=tokens() if ids is None else ids).logits
    return result


def error(value: Tensor, reference: Tensor) -> float:
    """Relative error in the Frobenius norm."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
