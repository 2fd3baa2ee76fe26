"""What adapters that only the peft library knows do to weights: its own merge, on one layer at a time.

The layers' bases are never read: they are memory that nobody has written to, which takes no room, and for a merge a
plain layer with the weight in question takes the base's place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lowmem_ft.adapters.peft_format import load_through_peft
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.core.out_of_memory import is_out_of_memory
from lowmem_ft.quant.checkpoint import Checkpoint
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import QuantSpec

_PARTS_OF_BASES = frozenset({"OSF", "PSOFT"})
_OF_PEFT = BaseTunerLayer | ModulesToSaveWrapper


@dataclass(frozen=True, kw_only=True, slots=True)
class PeftUpdate:
    """What one layer's adapter does to one of its parameters."""

    layer: nn.Module
    leaf: str

    def apply(self, weight: Tensor, *, transposed: bool) -> None:
        """Update `weight` in place: (O, I), `transposed` (I, O), or a vector; merged in fp32 and rounded once."""
        if isinstance(self.layer, ModulesToSaveWrapper):
            trained = self.layer.modules_to_save[self.layer.active_adapters[0]]
            weight.copy_(trained.get_parameter(self.leaf))
            return
        layer: Any = copy.copy(self.layer)  # what peft notes down of a merge goes with it
        base = layer.base_layer
        layer._modules = {**layer._modules, "base_layer": _plain(base, self.leaf, weight, transposed=transposed)}
        layer.merged_adapters = []
        try:
            layer.merge(safe_merge=True)
            merged = getattr(layer.get_base_layer(), self.leaf).detach()
        except (NotImplementedError, ValueError, TypeError, RuntimeError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            raise UnsupportedError(
                "peft cannot merge an adapter of this kind", given=f"{type(layer).__name__}: {error}",
                fix="serve it as an adapter",
            ) from error  # fmt: skip
        turned = transposed and not isinstance(base, Conv1D)
        weight.copy_(merged.t() if turned else merged)


class TrainedThroughPeft:
    """A saved adapter that peft alone knows, over a model without data; see `trained.TrainedWeights`.

    Args:
        model: on meta, swapped as it was while training.
        folder: of the adapter.
        settings: what its config says.

    Raises:
        CheckpointError: as `load_adapter`.
        UnsupportedError: a method that reads the bases to be loaded.
    """

    def __init__(self, model: nn.Module, folder: Path, settings: Mapping[str, Any]) -> None:
        kind = settings["peft_type"]
        if kind in _PARTS_OF_BASES:
            raise UnsupportedError(
                "an adapter of this kind cannot be merged: it is made from parts of the base weights, all at once",
                given=f"peft_type {kind}",
                fix="serve it as an adapter, or merge it with peft",
            )
        model.to_empty(device="cpu")  # which unties what is tied
        load_through_peft(model, folder, settings)
        self.model = model

    @property
    def source(self) -> Checkpoint:
        """No tensor is taken from the file as it is."""
        raise AssertionError("no whole tensor is named by `key`")

    def is_quantized(self, name: str) -> bool:
        """See `TrainedWeights`."""
        return isinstance(self._stack(name), QuantStack) or (
            name.endswith(".weight") and isinstance(_base(self._owner(name)), QuantLinear)
        )

    def spec(self, name: str) -> QuantSpec:
        """See `TrainedWeights`."""
        base = self._stack(name) or _base(self._owner(name))
        assert isinstance(base, QuantLinear | QuantStack)
        return base.spec

    def key(self, name: str) -> str | None:
        """Never: what was trained whole is an update, too."""
        return None

    def is_adapted(self, name: str) -> bool:
        """See `TrainedWeights`."""
        return isinstance(self._owner(name), _OF_PEFT)

    @property
    def untied(self) -> list[str]:
        """See `TrainedWeights`."""
        return untied_by_peft(self.model)

    def update(self, name: str, index: int | None = None) -> PeftUpdate:
        """See `TrainedWeights`."""
        return PeftUpdate(layer=self._owner(name), leaf=name.rpartition(".")[2])

    def is_transposed(self, name: str) -> bool:
        """No method of peft reaches stacked experts here."""
        return False

    def forget(self) -> None:
        """Nothing is kept."""

    def _owner(self, name: str) -> nn.Module:
        return _owner(self.model, name)

    def _stack(self, name: str) -> nn.Module | None:
        owner = self._owner(name)
        return None if isinstance(owner, BaseTunerLayer) else owner._modules.get(name.rpartition(".")[2])


def untied_by_peft(model: nn.Module) -> list[str]:
    """Names of tied parameters that peft's adapters in `model` change: one of two, or each on its own.

    Args:
        model: which peft has put its adapters into, not peft's wrapper around it.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", {})
    names = dict.fromkeys([*tied, *tied.values()])
    return [name for name in names if isinstance(_owner(model, name), _OF_PEFT)]


def _owner(model: nn.Module, name: str) -> nn.Module:
    owner: nn.Module = model.get_submodule(name.rpartition(".")[0])
    return owner.token_adapter if isinstance(owner, TrainableTokensWrapper) else owner


def _base(owner: nn.Module) -> nn.Module:
    base = getattr(owner, "base_layer", owner)
    assert isinstance(base, nn.Module)
    return base


def _plain(base: nn.Module, leaf: str, value: Tensor, *, transposed: bool) -> nn.Module:
    """A layer like `base`, unquantized and in fp32, whose parameter `leaf` is a copy of `value` and the other zero."""
    values = value.detach().to(device="cpu", dtype=torch.float32, copy=True)  # where the adapter lies
    if not isinstance(base, nn.Linear | Conv1D):  # a norm, an embedding
        plain = copy.copy(base)
        plain._parameters = {**base._parameters, leaf: nn.Parameter(values, requires_grad=False)}
        return plain
    outputs, inputs = (base.nf, base.nx) if isinstance(base, Conv1D) else (base.out_features, base.in_features)
    plain = Conv1D(outputs, 0) if isinstance(base, Conv1D) else nn.Linear(0, outputs, bias=base.bias is not None)
    if isinstance(base, Conv1D):
        plain.nx = inputs
        weight = values if leaf == "weight" else torch.zeros(inputs, outputs)
    else:
        plain.in_features = inputs
        matrix = values.t().contiguous() if transposed else values
        weight = matrix if leaf == "weight" else torch.zeros(outputs, inputs)
    plain.weight = nn.Parameter(weight, requires_grad=False)
    if plain.bias is not None:
        plain.bias = nn.Parameter(values if leaf == "bias" else torch.zeros(outputs), requires_grad=False)
    return plain
