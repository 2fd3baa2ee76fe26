"""`scaled_dot_product_attention` without data: the kernel that the planned device will take.

On tensors without data PyTorch always takes its plain math, which materialises all scores. Models that go by
transformers' attention interface do not come here: they call our operator (`runtime.attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lowmem_ft.runtime.attention import attention
from lowmem_ft.runtime.attention_cuda import additive, repeated


@contextmanager
def planned_attention(blocks: Iterable[nn.Module], kind: Literal["cpu", "cuda"]) -> Iterator[None]:
    """Within it `blocks` attend as on a device of `kind`, also where backward calls their forward once more."""

    def within(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def attending(*args: Any, **kwargs: Any) -> Any:
            with _Attending(kind):
                return forward(*args, **kwargs)

        return attending

    taken = list(blocks)
    for block in taken:
        block.forward = within(block.forward)  # a mode entered once for all would not reach into backward
    try:
        yield
    finally:
        for block in taken:
            del block.forward


class _Attending(TorchFunctionMode):
    def __init__(self, kind: Literal["cpu", "cuda"]) -> None:
        super().__init__()
        self._kernel = _on_cpu if kind == "cpu" else _on_cuda

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            out = self._kernel(*args, **kwargs)
            if out is not None:
                return out
        return func(*args, **kwargs)


def _on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The flash kernel where aten/native/transformers/sdp_utils_cpp.cpp takes it, else None."""
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


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """FlashAttention and the memory-efficient kernel hold what our operator holds, with a dropout too, of which they
    keep a seed; None where neither serves."""
    if query.ndim != 4 or query.shape[-1] != value.shape[-1]:
        return None
    mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask == 0
    if key.shape[2] == query.shape[2]:
        out = attention(query, key, value, mask, query.shape[-1] ** -0.5 if scale is None else scale)
        return out.transpose(1, 2)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention.default  # a prefix, which comes with a mask
    key, value = repeated(query, key), repeated(query, value)
    longer: Tensor = efficient(query, key, value, additive(query, mask), True, 0.0, is_causal, scale=scale)[0]
    return longer
