"""What operators take inside and give back before they return: the memory that a trace of tensors does not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_ft.planner.trace import Scratch
from lowmem_ft.runtime import attention


def scratch_of(kind: Literal["cpu", "cuda"]) -> Mapping[Any, Scratch]:
    """Operator -> the pieces that it takes, in bytes, from its arguments."""
    return _CPU if kind == "cpu" else {}


def whole_of(kind: Literal["cpu", "cuda"]) -> Mapping[Any, Callable[..., Any]]:
    """Our own operators that are traced as their implementation for the device, with all that it allocates."""
    return _WHOLE_CPU if kind == "cpu" else {}


def _flash_blocks(q: Tensor) -> tuple[int, int, int]:
    """Threads, queries and keys at a time in PyTorch's aten/native/cpu/FlashAttentionKernel.cpp."""
    length = q.shape[2]
    queries = 256 if length >= 768 else 64 if length >= 192 else 32
    return torch.get_num_threads(), min(queries, length), min(512, length)


def _flash_forward(q: Tensor, *_: Any, **__: Any) -> list[int]:
    threads, queries, keys = _flash_blocks(q)
    rounded = 0 if q.dtype == torch.float32 else threads * queries * keys * q.element_size()
    return [4 * threads * queries * (keys + 2 + q.shape[3]), rounded]


def _flash_backward(dout: Tensor, q: Tensor, *_: Any, **__: Any) -> list[int]:
    threads, queries, keys = _flash_blocks(q)
    rounded = 0 if q.dtype == torch.float32 else 2 * threads * queries * keys * q.element_size()
    return [8 * threads * queries * keys, rounded, 4 * queries]


def _vector_norm(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> list[int]:
    """On the CPU a norm in another dtype is taken of a copy."""
    return [] if dtype in (None, x.dtype) else [x.numel() * dtype.itemsize]


_CPU: Mapping[Any, Scratch] = {
    torch.ops.aten.linalg_vector_norm.default: _vector_norm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: _flash_backward,
}
_WHOLE_CPU: Mapping[Any, Callable[..., Any]] = {
    torch.ops.lowmem_ft.attention.default: attention.attention_cpu,
    torch.ops.lowmem_ft.attention_backward.default: attention.attention_backward_cpu,
}
