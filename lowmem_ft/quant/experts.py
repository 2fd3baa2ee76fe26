"""Stacked expert weights, quantized slice by slice, on which every architecture's own eager forward works unchanged.

transformers 5 keeps the experts of a layer as one 3-D parameter and computes `F.linear(x, stack[e])`, `x @ stack[e]`
or `torch.bmm(x, stack)`. A QuantStack takes the parameter's place; it and its slices answer those calls through
`__torch_function__`, so that a slice is dequantized in forward and again in backward, and autograd never saves it.

Letters in shapes: E experts, R and C rows and columns of a slice as stored, T tokens, `...` any leading dimensions.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from lowmem_ft.core.errors import CheckpointError, UnsupportedError
from lowmem_ft.quant.linear import FrozenLinear, check_storage, get_base_weight, set_base_weight, without_casts
from lowmem_ft.quant.ops import Kind, QuantSpec, dequantize, dequantizes_together, layout, quantize

_SHARED = frozenset({"nested_code"})  # the same table for every slice, so held once
_MATMULS = frozenset({torch.matmul, Tensor.matmul, torch.mm, Tensor.mm})  # `@` arrives as Tensor.matmul
_BATCHED = frozenset({torch.matmul, Tensor.matmul, torch.bmm, Tensor.bmm})


def slices_of(stacked: Tensor | Sequence[Tensor], e: int | tuple[int, ...]) -> Tensor:
    """Slice `e`; or a copy of several, with a leading G."""
    return torch.stack([stacked[at] for at in e]) if isinstance(e, tuple) else stacked[e]


def matrix_of(stack: Any, e: int | tuple[int, ...], transposed: bool, dtype: torch.dtype) -> Tensor:
    """Slice `e` as the (outputs, inputs) matrix of a product; of a stack with `base_slice`, or a (E, R, C) tensor.
    Of G experts (G, outputs, inputs)."""
    w_RC = slices_of(stack, e).to(dtype) if isinstance(stack, Tensor) else stack.base_slice(e, dtype)
    return w_RC.mT if transposed else w_RC


def frozen_product(
    stack: Any,
    x: Tensor,
    e: int | tuple[int, ...],
    transposed: bool,
    bias: Tensor | None = None,
    *,
    unread: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """x @ W[e] if `transposed`, else x @ W[e]^T; plus `bias`; of what `matrix_of` takes. Saves nothing for backward.
    Of G experts x is (G, T, ...), and `bias` has a leading G.

    Args:
        unread: nobody reads its values: it is not filled.
        out: what to return.
    """
    columns = stack.shape[2 if transposed else 1] if unread else 0
    weight = partial(matrix_of, stack, e, transposed)
    result: Tensor = FrozenLinear.apply(x, weight, bias, columns, out)  # type: ignore[no-untyped-call]
    return result


class QuantStack(nn.Module):
    """E frozen matrices of one shape, stored quantized; stands in for a 3-D parameter (E, R, C).

    The buffers are those of `quant.ops.layout((R, C), spec)` with a leading E, but for `nested_code`, held once.

    Args:
        slices, rows, cols: E, R and C.
        spec: 4 or 8 bits.
        dtype: of dequantized slices; `.to(dtype)` changes it and leaves the storage as it is.
        device: of the (uninitialised) storage, "meta" included.

    Attributes:
        adapter: if set, products with slice e are `adapter(x, e, transposed, bias)` instead of the plain frozen one
            (which the adapter can have from `matmul`). `transposed` is true for `x @ stack[e]`, where the slice is
            stored as (inputs, outputs), and false for `F.linear(x, stack[e])`. With `factors` it computes with those
            instead of its own; `unread` and `out` are as of `matmul`.
    """

    adapter: nn.Module | None
    _is_hf_initialized = True  # transformers leaves it alone when it initialises weights

    def __init__(
        self,
        slices: int,
        rows: int,
        cols: int,
        *,
        spec: QuantSpec,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.shape = torch.Size((slices, rows, cols))
        self.spec, self.dtype, self.adapter = spec, dtype, None
        for name, (shape, storage_dtype) in layout((rows, cols), spec).items():
            whole = shape if name in _SHARED else (slices, *shape)
            self.register_buffer(name, torch.empty(whole, dtype=storage_dtype, device=device))

    @property
    def kind(self) -> Kind:
        """The storage format, as `quant.ops.dequantize` takes it."""
        return self.spec.kind

    def storage(self) -> dict[str, Tensor]:
        """The storage tensors of the whole stack by name."""
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def slice_storage(self, e: int) -> dict[str, Tensor]:
        """Views of the storage tensors of slice `e`, as `quant.ops.quantize` returns them."""
        return {name: tensor if name in _SHARED else tensor[e] for name, tensor in self.storage().items()}

    def load_slice(self, e: int, storage: Mapping[str, Tensor]) -> None:
        """Copy the quantized slice `e` in. Storage still on meta is allocated first, on the device of the slice.

        Raises:
            CheckpointError: a tensor is missing, unknown, or of another shape or dtype.
        """
        check_storage(storage, layout(self.shape[1:], self.spec))
        for name, tensor in self.storage().items():
            if tensor.is_meta:
                self._buffers[name] = torch.empty_like(tensor, device=storage[name].device)
        for name, tensor in self.slice_storage(e).items():
            tensor.copy_(storage[name])

    def base_slice(self, e: int | tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """The dequantized slice `e`, (R, C) as stored; of G experts (G, R, C)."""
        dtype = dtype or self.dtype
        if not isinstance(e, tuple):
            return dequantize(self.slice_storage(e), kind=self.kind, shape=self.shape[1:], dtype=dtype)
        if not dequantizes_together(self.shape[1:], self.kind):
            return torch.stack([self.base_slice(at, dtype) for at in e])
        storage = {name: it if name in _SHARED else slices_of(it, e) for name, it in self.storage().items()}
        return dequantize(storage, kind=self.kind, shape=(len(e), *self.shape[1:]), dtype=dtype)

    matmul = frozen_product

    def __getitem__(self, e: int | Tensor) -> StackSlice:
        index = operator.index(e)
        if not -len(self) <= index < len(self):
            raise IndexError(f"expert {index} of {len(self)}")
        return StackSlice(self, index % len(self))

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _BATCHED and len(args) == 2 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            x_ETR, stack = args
            return torch.stack([x_TR @ stack[e] for e, x_TR in enumerate(x_ETR)])
        raise UnsupportedError(
            f"quantized experts do not support `{getattr(func, '__name__', func)}`",
            allowed="F.linear(x, stack[e]), x @ stack[e], torch.bmm(x, stack)",
            fix="set the model's experts implementation to 'eager', or do not quantize (`quant.bits: 16`)",
        )

    def extra_repr(self) -> str:
        return f"{tuple(self.shape)}, kind={self.kind}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantStack:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        super()._apply(without_casts(fn, self.storage().values()), recurse)  # type: ignore[no-untyped-call]
        return self


class StackSlice:
    """Slice `e` of a QuantStack, standing in for the (R, C) weight of one expert in a product.

    `F.linear(x, s)` and `x @ s` go through the frozen product (or the stack's adapter). Every other operation or
    attribute sees the dequantized tensor.
    """

    __slots__ = ("index", "stack")

    def __init__(self, stack: QuantStack, index: int) -> None:
        self.stack, self.index = stack, index

    @property
    def shape(self) -> torch.Size:
        """(R, C)."""
        return self.stack.shape[1:]

    @property
    def dtype(self) -> torch.dtype:
        """Of the dequantized slice."""
        return self.stack.dtype

    def dequantize(self) -> Tensor:
        """The (R, C) tensor."""
        return self.stack.base_slice(self.index)

    def product(self, x: Tensor, transposed: bool, bias: Tensor | None = None, **how: Any) -> Tensor:
        """x @ W if `transposed`, else x @ W^T; plus `bias`; through the stack's adapter if it has one.

        `how` is `unread` and `out` of `QuantStack.matmul`, and `factors` for an adapter.
        """
        adapter = self.stack.adapter
        result: Tensor = (self.stack.matmul if adapter is None else adapter)(x, self.index, transposed, bias, **how)
        return result

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # protocols (copy, pickle, numpy) that look for a hook that we do not have
            raise AttributeError(name)
        return getattr(self.dequantize(), name)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(args[0], Tensor) and isinstance(args[1], cls):
            if func is F.linear:
                bias = args[2] if len(args) > 2 else kwargs.get("bias")
                return args[1].product(args[0], transposed=False, bias=bias)
            if func in _MATMULS:
                return args[1].product(args[0], transposed=True)
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs))
        return func(*args, **kwargs)


@get_base_weight.register
def _(module: QuantStack, *, index: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    return module.base_slice(_expert(module, index), dtype)


@set_base_weight.register
def _(module: QuantStack, weight: Tensor, *, index: int | None = None) -> None:
    if weight.shape != module.shape[1:]:
        raise CheckpointError("a weight does not fit its slice", given=tuple(weight.shape), allowed=module.shape[1:])
    module.load_slice(_expert(module, index), quantize(weight, module.spec))


def _expert(module: QuantStack, index: int | None) -> int:
    if index is None:
        raise UnsupportedError("stacked experts are read and written one by one", allowed=f"index 0..{len(module) - 1}")
    return index
