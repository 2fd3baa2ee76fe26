"""The frozen quantized Linear, and the one seam through which the rest of the code reads and writes base weights.

Letters in shapes: O outputs, I inputs, `...` any leading dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.autocast_mode import is_autocast_available
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.ops import Kind, Layout, QuantSpec, dequantize, layout, quantize
from lowmem_ft.quant.products import as_rows, mm


class FrozenLinear(torch.autograd.Function):
    """y = x W^T + b with a frozen W that is dequantized in forward and again in backward, and never saved.

    Neither x, nor W, nor the storage behind W is kept for backward: only `weight`, a callable that finds the storage
    anew. So storage may be moved, evicted or refilled between the two passes (streaming).

    Args (of `apply`):
        x: (..., I).
        weight: dtype -> W of shape (O, I) in that dtype; or (G, O, I), which multiply (G, N, I).
        bias: (O,), or (G, O), or None; gets a gradient if it requires one.
        columns: O where nobody reads the values of the output, only its gradients: then it stays uninitialised. Else 0.
        out: (..., O), what to return; filled with the output if `columns` is 0.

    Returns:
        (..., O) in the dtype of x, or in that of the active autocast.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Callable[[torch.dtype], Tensor],
        bias: Tensor | None,
        columns: int = 0,
        out: Tensor | None = None,
    ) -> Tensor:
        ctx.weight = weight
        kind = x.device.type
        autocast = is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
        if columns:
            return x.new_empty(*x.shape[:-1], columns, dtype=dtype) if out is None else out
        W_OI = weight(dtype)
        x_NI = as_rows(x, stacked=W_OI.ndim == 3).to(dtype)
        # allocated here, because F.linear may return a view, which the model could not change in place (Falcon does)
        y = x_NI.new_empty(*x.shape[:-1], W_OI.shape[-2]) if out is None else out
        y_NO = y.view(*x_NI.shape[:-1], y.shape[-1])
        mm(x_NI, W_OI.mT, bias=None if bias is None else bias.to(dtype), out=y_NO)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None, None, None]:
        dx = None
        if ctx.needs_input_grad[0]:
            W_OI = ctx.weight(dy.dtype)
            dx = mm(as_rows(dy, stacked=W_OI.ndim == 3), W_OI).view(*dy.shape[:-1], -1)
        dbias = as_rows(dy).sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, dbias, None, None


class QuantLinear(nn.Linear):
    """A frozen linear layer whose weight is stored quantized and dequantized for each use.

    It is an nn.Linear so that whatever looks for one (peft, transformers) finds it, but it has no parameter `weight`:
    reading `weight` dequantizes. The storage tensors are persistent buffers under the names of `layout`.

    Args:
        in_features, out_features: I and O.
        bias: whether there is a bias; it is a frozen parameter of `dtype`.
        spec: 4 or 8 bits.
        dtype: of `weight`; `.to(dtype)`, `.half()` and the like change it and leave the storage as it is.
        device: of the (uninitialised) storage, "meta" included.
    """

    _is_hf_initialized = True  # transformers leaves such modules alone when it initialises weights
    unread = False  # set while nobody reads the values of the output, see runtime.activations

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        spec: QuantSpec,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which allocates a weight
        self.in_features, self.out_features = in_features, out_features
        self.spec, self.dtype = spec, dtype
        for name, (shape, storage_dtype) in layout(self.shape, spec).items():
            self.register_buffer(name, torch.empty(shape, dtype=storage_dtype, device=device))
        empty = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if empty is None else nn.Parameter(empty, requires_grad=False))

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.out_features, self.in_features

    @property
    def kind(self) -> Kind:
        """The storage format, as `quant.ops.dequantize` takes it."""
        return self.spec.kind

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantized (O, I) matrix, a new tensor of `dtype` at each reading; writing into it has no effect."""
        return self.dequantize(self.dtype)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The (O, I) matrix in `dtype`."""
        return dequantize(self.storage(), kind=self.kind, shape=self.shape, dtype=dtype)

    def storage(self) -> dict[str, Tensor]:
        """The storage tensors by name, as `quant.ops.quantize` returns them."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def load_storage(self, storage: Mapping[str, Tensor]) -> None:
        """Hold these tensors (not copies) from now on.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
        """
        check_storage(storage, layout(self.shape, self.spec))
        self._buffers.update(storage)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O)."""
        columns = self.out_features if self.unread else 0
        result: Tensor = FrozenLinear.apply(x, self.dequantize, self.bias, columns)  # type: ignore[no-untyped-call]
        return result

    def reset_parameters(self) -> None:
        """Nothing to draw: the weight is frozen and comes from a checkpoint."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kind={self.kind}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantLinear:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(without_casts(fn, self.storage().values()), recurse)  # type: ignore[no-untyped-call]
        return self


def check_storage(storage: Mapping[str, Tensor], expected: Layout) -> None:
    """Raise CheckpointError unless `storage` has exactly the names, shapes and dtypes of `expected`."""
    given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in storage.items()}
    if given != expected:
        raise CheckpointError(
            "quantized tensors do not fit the layer that they are meant for", given=given, allowed=expected
        )


def without_casts(fn: Callable[[Tensor], Tensor], storage: Collection[Tensor]) -> Callable[[Tensor], Tensor]:
    """What `nn.Module._apply` may do: `fn`, but on storage only its move to a device, as a cast would destroy it."""

    def apply(tensor: Tensor) -> Tensor:
        applied = fn(tensor)
        is_cast = applied.dtype != tensor.dtype and any(tensor is held for held in storage)
        return tensor.to(applied.device) if is_cast else applied

    return apply


@singledispatch
def get_base_weight(module: nn.Module, *, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """The frozen weight below whatever stores or wraps it.

    Args:
        module: nn.Linear, transformers' Conv1D or QuantLinear: the logical (O, I) matrix. QuantStack: the slice
            `index` as stored, (R, C). An adapter (anything with a `base_layer`): that of its base.
        index: the expert, for stacked experts only.
        dtype: of the result; by default that of the module.

    Raises:
        UnsupportedError: a module without such a weight.
    """
    return get_base_weight(_base_layer(module), index=index, dtype=dtype)


@singledispatch
def set_base_weight(module: nn.Module, weight: Tensor, *, index: int | None = None) -> None:
    """Overwrite in place what `get_base_weight(module, index=index)` reads, quantizing it where it is stored so.

    Raises:
        UnsupportedError: a module without such a weight.
    """
    set_base_weight(_base_layer(module), weight, index=index)


def _base_layer(module: nn.Module) -> nn.Module:
    base = getattr(module, "base_layer", None)
    if not isinstance(base, nn.Module):
        raise UnsupportedError(
            "this module has no base weight", given=type(module).__name__, allowed="linear layers and stacked experts"
        )
    return base


@get_base_weight.register
def _(module: nn.Linear, *, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return module.weight.detach().to(dtype or module.weight.dtype)


@get_base_weight.register
def _(module: Conv1D, *, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    weight: Tensor = module.weight
    return weight.detach().t().to(dtype or weight.dtype)


@get_base_weight.register
def _(module: QuantLinear, *, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return module.dequantize(dtype or module.dtype)


@set_base_weight.register
def _(module: nn.Linear, weight: Tensor, *, index: int | None = None) -> None:
    module.weight.detach().copy_(weight)


@set_base_weight.register
def _(module: Conv1D, weight: Tensor, *, index: int | None = None) -> None:
    module.weight.detach().copy_(weight.t())


@set_base_weight.register
def _(module: QuantLinear, weight: Tensor, *, index: int | None = None) -> None:
    if tuple(weight.shape) != module.shape:
        raise CheckpointError("a weight does not fit its layer", given=tuple(weight.shape), allowed=module.shape)
    for name, tensor in quantize(weight, module.spec).items():
        module.get_buffer(name).copy_(tensor)
