"""Gradients of a step, summed over its micro-batches in fp32."""

from __future__ import annotations

import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowmem_ft.runtime.together import round_up


class GradientAccumulator:
    """Moves every gradient into one flat fp32 buffer as soon as backward has finished it, and frees the original.

    In the buffer gradients follow each other as parameters do that lie together (`runtime.together`).

    A bf16 sum over micro-batches would lose small gradients, and its rounding would depend on how a step is split.

    Args:
        parameters: what is trained. The buffer takes 4 bytes for each of their elements, from now on.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        assert self._parameters, "nothing is trained"
        starts, end = [], 0
        for parameter in self._parameters:
            starts.append(end)
            end += round_up(parameter.numel())
        self._flat = torch.zeros(end, dtype=torch.float32, device=self._parameters[0].device)
        self._slices = {
            parameter: self._flat[start : start + parameter.numel()].view(parameter.shape)
            for parameter, start in zip(self._parameters, starts, strict=True)
        }
        self._arrived: set[nn.Parameter] = set()
        own = weakref.WeakMethod(self._add)  # parameters keep their hooks where no collector of garbage looks

        def arrived(parameter: Tensor) -> None:
            add = own()
            if add is not None:
                add(parameter)

        self._hooks: list[RemovableHandle] = [
            p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
            for p in self._parameters
        ]

    def buffer(self, parameter: nn.Parameter) -> Tensor:
        """The fp32 sum for `parameter`, for a kernel that adds to it itself."""
        self._arrived.add(parameter)
        return self._slices[parameter]

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """The fp32 gradient of the step, shaped as `parameter`; None if no micro-batch reached the parameter."""
        return self._slices[parameter] if parameter in self._arrived else None

    def clip(self, max_norm: float | None, *, scale: float = 1.0) -> Tensor:
        """Divide all gradients by `scale`, and then scale them down to the global norm `max_norm` if it is exceeded.

        Returns:
            The global L2 norm after the division and before clipping: an fp32 scalar on the gradients' device, not
            finite if any gradient is not. Reading it is left to the caller, who waits for the device only once.
        """
        norm: Tensor = torch.linalg.vector_norm(self._flat) / scale
        factor = torch.full_like(norm, 1.0 / scale)
        if max_norm is not None:
            factor *= (max_norm / (norm + 1e-6)).clamp(max=1.0)  # 1e-6 as in torch.nn.utils.clip_grad_norm_
        self._flat.mul_(factor)
        return norm

    def reset(self) -> None:
        """Forget all gradients, those of an aborted backward too."""
        self._flat.zero_()
        self._arrived.clear()
        for parameter in self._parameters:
            parameter.grad = None

    def remove(self) -> None:
        """Detach from the parameters."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _add(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        assert parameter.grad is not None
        self.buffer(parameter).add_(parameter.grad)
        parameter.grad = None
