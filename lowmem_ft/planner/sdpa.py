"""What PyTorch's functions do on tensors without data, as they do it on the planned device.

On such tensors `scaled_dot_product_attention` always takes plain math, which materialises all scores; dropout keeps a
mask of numbers, where a card keeps one of bytes, and softmax of fp16 in fp32 copies, which a card does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from lowmem_ft.runtime.attend import Asked, Attending, attend_on_card, attend_within


@contextmanager
def planned_attention(
    blocks: Iterable[nn.Module], kind: Literal["cpu", "cuda"], capability: tuple[int, int]
) -> Iterator[None]:
    """Within it `blocks` attend as on a device of `kind`, a card of this compute capability."""
    before = {block: block.__dict__.get("forward") for block in blocks}  # as `use_attention` may have put there
    on_card = functools.partial(attend_on_card, capability=capability)
    attend_within(before, lambda: Attending(_on_cpu) if kind == "cpu" else _OnCard(on_card))
    try:
        yield
    finally:
        for block, forward in before.items():
            del block.forward
            if forward is not None:
                block.forward = forward


class _OnCard(Attending):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout:
            return _dropout(*args, **kwargs)
        if func is F.softmax and kwargs.get("dtype") == torch.float32 and args[0].dtype == torch.float16:
            return torch.ops.aten._softmax.default(args[0], kwargs.get("dim", -1), True)
        return super().__torch_function__(func, types, args, kwargs)


def _dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0.0:
        return x
    dropped: Tensor = _Dropped.apply(x)  # type: ignore[no-untyped-call]
    return dropped


class _Dropped(torch.autograd.Function):
    """Takes what aten::native_dropout does: it keeps a mask of bytes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = torch.empty_like(x, dtype=torch.bool)
        ctx.save_for_backward(mask)
        return x.mul(mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (mask,) = ctx.saved_tensors
        return dy.mul(mask)


def _on_cpu(asked: Asked) -> Tensor | None:
    """The flash kernel where aten/native/transformers/sdp_utils_cpp.cpp takes it, else None."""
    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa = asked
    heads = query.shape[1] % key.shape[1] == 0 if enable_gqa else query.shape[1] == key.shape[1]
    alike = heads and key.shape[:2] == value.shape[:2] and query.shape[-1] == key.shape[-1] == value.shape[-1]
    strided = all(tensor.stride(-1) == 1 for tensor in (query, key, value))
    learned = attn_mask is not None and attn_mask.requires_grad
    if dropout_p > 0 or query.ndim != 4 or learned or not (alike and strided):
        return None
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_full((), float("-inf")))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out: Tensor = flash(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
    return out
