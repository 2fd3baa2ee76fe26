"""What a saved adapter does to each weight of its base model, read from its file one matrix at a time.

Letters in shapes: O outputs, I inputs, K rank, E experts, R and C rows and columns as stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn

from lowmem_ft.adapters.inject import is_injected
from lowmem_ft.adapters.lora import LoraLinear
from lowmem_ft.adapters.peft_format import adapter_tensors, is_native, load_adapter, read_adapter_config
from lowmem_ft.adapters.peft_methods import is_prompt_learning
from lowmem_ft.adapters.stack import DenseStack, LoraStack
from lowmem_ft.core.errors import UnsupportedError
from lowmem_ft.export.through_peft import TrainedThroughPeft
from lowmem_ft.quant.checkpoint import Checkpoint, read_header
from lowmem_ft.quant.experts import QuantStack
from lowmem_ft.quant.linear import QuantLinear
from lowmem_ft.quant.ops import QuantSpec

MERGE_VALUES = 1 << 20  # of a matrix that exist in fp32 at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class Update:
    """A low-rank update of one matrix, in fp32: W + s B A, with DoRA c (W + s B A), c = m / ||W + s B A||.

    Attributes:
        A_KI, B_OK: the factors.
        scaling: s.
        magnitude_O: m, or None without DoRA.
    """

    A_KI: Tensor
    B_OK: Tensor
    scaling: float
    magnitude_O: Tensor | None = None

    def apply(self, weight: Tensor, *, transposed: bool) -> None:
        """Update `weight`, (O, I) or `transposed` (I, O), in place: summed in fp32 and rounded once, rows by rows."""
        W_OI = weight.t() if transposed else weight
        step = max(1, MERGE_VALUES // W_OI.shape[1])
        for row in range(0, W_OI.shape[0], step):
            rows = slice(row, row + step)
            part = W_OI[rows].to(torch.float32, copy=True)
            part.addmm_(self.B_OK[rows], self.A_KI, alpha=self.scaling)
            if self.magnitude_O is not None:
                norm = torch.linalg.vector_norm(part, dim=1).clamp_(min=torch.finfo(torch.float32).tiny)
                part.mul_((self.magnitude_O[rows] / norm).unsqueeze(1))
            W_OI[rows] = part


class WeightUpdate(Protocol):
    """What an adapter does to one matrix or vector."""

    def apply(self, weight: Tensor, *, transposed: bool) -> None:
        """Update `weight`, (O, I) or `transposed` (I, O), in place, rounded once."""
        ...


class TrainedWeights(Protocol):
    """What a merge asks of a saved adapter, by the names of the model's tensors."""

    @property
    def source(self) -> Checkpoint:
        """Where `key` lies."""
        ...

    def is_quantized(self, name: str) -> bool:
        """Whether the tensor was quantized while it was trained."""
        ...

    def spec(self, name: str) -> QuantSpec:
        """How."""
        ...

    @property
    def untied(self) -> list[str]:
        """Names of tied tensors that are changed apart from their twins, so that merged they are no longer tied."""
        ...

    def key(self, name: str) -> str | None:
        """Under which key the file holds the whole tensor, if that was trained."""
        ...

    def is_adapted(self, name: str) -> bool:
        """Whether there is an update of it."""
        ...

    def update(self, name: str, index: int | None = None) -> WeightUpdate:
        """The update; of stacked experts that of slice `index`."""
        ...

    def is_transposed(self, name: str) -> bool:
        """Of stacked experts: whether a slice is stored as (inputs, outputs)."""
        ...

    def forget(self) -> None:
        """Drop what `update` keeps for the next slice of the same stack."""
        ...


def open_trained(model: nn.Module, folder: Path, *, device: torch.device) -> TrainedWeights:
    """A saved adapter over a model without data.

    Args:
        model: on meta, swapped as it was while training; adapters are put into it.
        folder: of the adapter, in peft's format.
        device: where updates are computed.

    Raises:
        CheckpointError: missing, damaged, or made for another model.
        UnsupportedError: a method whose adapters are no weights (prompts).
    """
    settings = read_adapter_config(folder)
    if is_prompt_learning(settings):
        raise UnsupportedError(
            "an adapter of this kind cannot be merged: it trains tokens before the text, and no weights",
            given=f"peft_type {settings['peft_type']}",
            allowed="LoRA and its kin, and methods of peft that change weights",
            fix="serve it as an adapter, with peft",
        )
    if is_native(model, folder, settings):
        return Trained(model, folder, settings, device=device)
    return TrainedThroughPeft(model, folder, settings)


class Trained:
    """A saved adapter that this package trains itself, over a model without data; see `TrainedWeights`.

    Args:
        model: on meta, swapped as it was while training; adapters are put into it.
        folder: of the adapter, in peft's format.
        settings: what its config says.
        device: where updates are computed.

    Raises:
        CheckpointError: missing, damaged, or made for another model.
    """

    def __init__(self, model: nn.Module, folder: Path, settings: Mapping[str, Any], *, device: torch.device) -> None:
        load_adapter(model, folder, settings=settings)
        assert is_injected(model), "the others are peft's"
        self.model, self.device = model, device
        file = folder / SAFETENSORS_WEIGHTS_NAME
        tensors, _ = read_header(file)
        config: Any = getattr(model, "config", None)
        self.source = Checkpoint(folder, str(folder), config, tensors, (file,))
        self._last: tuple[LoraStack, Tensor] | None = None
        self._keys = {id(tensor): key for key, tensor in adapter_tensors(model).items() if key in tensors}

    def is_quantized(self, name: str) -> bool:
        """Whether the model's tensor `name` was quantized while it was trained."""
        owner, stack = self._owner(name)
        base = getattr(owner, "base_layer", owner)
        return isinstance(stack, QuantStack) or (name.endswith(".weight") and isinstance(base, QuantLinear))

    def spec(self, name: str) -> QuantSpec:
        """How."""
        owner, stack = self._owner(name)
        base = stack if stack is not None else getattr(owner, "base_layer", owner)
        assert isinstance(base, QuantLinear | QuantStack)
        return base.spec

    def key(self, name: str) -> str | None:
        """Under which key the file holds the whole of tensor `name`, if that was trained."""
        owner, stack = self._owner(name)
        leaf = name.rpartition(".")[2]
        if stack is not None or (leaf == "weight" and self.is_quantized(name)):
            return None
        if leaf == "weight" and isinstance(owner, LoraLinear):
            return None
        return self._keys.get(id(getattr(owner, leaf)))

    @property
    def untied(self) -> list[str]:
        """None: what is tied is trained together."""
        return []

    def is_adapted(self, name: str) -> bool:
        """Whether there is an update of tensor `name`."""
        owner, stack = self._owner(name)
        if stack is not None:
            return isinstance(stack.adapter, LoraStack)
        return isinstance(owner, LoraLinear) and name.endswith(".weight")

    def update(self, name: str, index: int | None = None) -> Update:
        """The update of tensor `name`, of stacked experts that of slice `index`."""
        owner, stack = self._owner(name)
        adapter = owner if stack is None else stack.adapter
        assert isinstance(adapter, LoraLinear | LoraStack)
        if isinstance(adapter, LoraLinear):
            A_KI, B_OK = self._read(adapter.lora_A), self._read(adapter.lora_B)
            magnitude = None if adapter.magnitude is None else self._read(adapter.magnitude)
            return Update(A_KI=A_KI, B_OK=B_OK, scaling=adapter.scaling, magnitude_O=magnitude)
        assert index is not None, "stacked experts are updated one by one"
        A_KI = torch.empty(adapter.rank, adapter.in_features, device=self.device)
        key, start = self._keys[id(adapter.lora_A)], index * A_KI.numel()
        self.source.read_elements(key, A_KI, start=start)
        if self._last is None or self._last[0] is not adapter:  # all experts' factors lie woven into each other
            self._last = (adapter, self._read(adapter.lora_B))
        B_OKE = self._last[1].view(adapter.out_features, adapter.rank, adapter.experts)
        return Update(A_KI=A_KI, B_OK=B_OKE[:, :, index].contiguous(), scaling=adapter.scaling)

    def forget(self) -> None:
        """Drop what `update` keeps for the next slice of the same stack."""
        self._last = None

    def is_transposed(self, name: str) -> bool:
        """Of stacked experts: whether a slice is stored as (inputs, outputs)."""
        _, stack = self._owner(name)
        adapter = None if stack is None else stack.adapter
        return isinstance(adapter, LoraStack) and adapter.is_transposed

    def _read(self, parameter: Tensor) -> Tensor:
        out = torch.empty(parameter.shape, dtype=torch.float32, device=self.device)
        self.source.read_elements(self._keys[id(parameter)], out)
        return out

    def _owner(self, name: str) -> tuple[nn.Module, QuantStack | DenseStack | None]:
        """The module that has the tensor, and its stack if the tensor is one."""
        path, _, leaf = name.rpartition(".")
        owner: nn.Module = self.model.get_submodule(path)
        stack = owner._modules.get(leaf)
        assert stack is None or isinstance(stack, QuantStack | DenseStack)
        return owner, stack
