"""What a run holds from its first step to its last, counted on the model that `assemble` builds without data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from lowmem_ft.assemble import Assembled
from lowmem_ft.quant.experts import QuantStack


@dataclass(frozen=True, kw_only=True, slots=True)
class Stored:
    """Sizes in bytes.

    Attributes:
        parameters: of the base, in elements as the checkpoint counts them.
    """

    base_weights: int
    adapter: int
    gradients: int
    optimizer: int
    parameters: int

    @classmethod
    def of(cls, ready: Assembled) -> Stored:
        """Count on a model assembled on the meta device."""
        trainable = set(ready.trainable.values())
        matrices = [module for module in ready.model.modules() if isinstance(module, (nn.Linear, QuantStack))]
        own = {p for module in matrices for p in module.parameters(recurse=False)}
        others = (p for p in ready.model.parameters() if p not in own and not p.requires_grad)
        return cls(
            base_weights=_nbytes({*ready.model.parameters(), *ready.model.buffers()} - trainable),
            adapter=_nbytes(trainable),
            gradients=sum(4 * p.numel() for p in trainable),
            optimizer=_nbytes(ready.optimizer.state_tensors().values()) if ready.optimizer else 0,
            parameters=sum(map(_elements, matrices)) + sum(p.numel() for p in others),
        )

    @property
    def total(self) -> int:
        """Bytes of weights, adapter, gradients and optimizer."""
        return self.base_weights + self.adapter + self.gradients + self.optimizer


def _elements(module: nn.Linear | QuantStack) -> int:
    if isinstance(module, QuantStack):
        return math.prod(module.shape)
    return module.in_features * module.out_features


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
