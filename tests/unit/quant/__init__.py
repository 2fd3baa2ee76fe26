"""What the tests of quantized modules share."""

from __future__ import annotations

import copy

import torch
from torch import nn

from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import get_base_weight, set_base_weight
from lowmem_ft.quant.ops import QuantSpec
from lowmem_ft.quant.swap import swap_quantized


def quantized_and_plain(model: nn.Module, spec: QuantSpec, skip: set[str]) -> tuple[nn.Module, nn.Module, list[str]]:
    """(a quantized copy of `model`, an unquantized copy that holds the dequantized weights, the swapped paths)."""
    quantized, plain = copy.deepcopy(model).requires_grad_(False), copy.deepcopy(model).requires_grad_(False)
    swapped = swap_quantized(quantized, spec=spec, skip=skip)
    for path in swapped:
        new = quantized.get_submodule(path)
        if isinstance(new, QuantStack):
            w_ERC = plain.get_parameter(path)
            for e in range(len(new)):
                set_base_weight(new, w_ERC[e], index=e)
                w_ERC[e] = get_base_weight(new, index=e)
        else:
            old = plain.get_submodule(path)
            set_base_weight(new, get_base_weight(old))
            set_base_weight(old, get_base_weight(new))
    return quantized, plain, swapped


def random_matrix(rows: int, cols: int, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """A (rows, cols) matrix of normal values, the same for the same seed."""
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype)
