"""What operators take inside and give back before they return: the memory that a trace of tensors does not see."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from lowmem_ft.planner.onednn import ROWS, Products, attention_blocks
from lowmem_ft.planner.scratch_cuda import Card, copied_factors, norms_in_tiles, scratch_on, whole_on
from lowmem_ft.planner.trace import Scratch, Whole, overloads
from lowmem_ft.quant.ops import BLOCK, CHUNK
from lowmem_ft.quant.products import TILE, multiplies, sums_rows
from lowmem_ft.runtime import attention_capped, attention_cpu, moments


def scratch_of(kind: Literal["cpu", "cuda"], card: Card, products: Products | None = None) -> Mapping[Any, Scratch]:
    """Operator -> the pieces that it takes, in bytes, from its arguments.

    Args:
        products: to which those of a CPU are added.
    """
    return {**_CPU, **_multiplying(products or Products())} if kind == "cpu" else {**_ANYWHERE, **scratch_on(card)}


def whole_of(kind: Literal["cpu", "cuda"], card: Card) -> Mapping[Any, Whole]:
    """Our own operators that are traced as their implementation for the device, with all that it allocates."""
    return {**(_WHOLE_CPU if kind == "cpu" else whole_on(card)), **_capped(on_card=kind == "cuda")}


def _flash_forward(q: Tensor, k: Tensor, *_: Any, **__: Any) -> list[int]:
    threads, (queries, keys) = torch.get_num_threads(), attention_blocks(q.shape[2], k.shape[2])
    rounded = 0 if q.dtype == torch.float32 else threads * queries * keys * q.element_size()
    return [4 * threads * queries * (keys + 2 + q.shape[3]), rounded]


def _flash_backward(products: Products, dout: Tensor, q: Tensor, k: Tensor, *_: Any, **__: Any) -> list[int]:
    threads, (queries, keys) = torch.get_num_threads(), attention_blocks(q.shape[2], k.shape[2])
    if _goes_to_onednn(q):
        products.attend(q, k)
    rounded = 0 if q.dtype == torch.float32 else 2 * threads * queries * keys * q.element_size()
    # what oneDNN takes for every thread in every thread: a little above 360 measured values, with one thread and two
    inside = 2 * keys * queries + 4 * keys * min(q.shape[3], 64) + 12288 if _goes_to_onednn(q) else 0
    return [8 * threads * queries * keys, rounded, 4 * queries, threads * threads * inside]


def _multiplying(products: Products) -> Mapping[Any, Scratch]:
    return {
        torch.ops.lowmem_ft.product.default: partial(_product, products),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default: partial(_flash_backward, products),
        **{op: partial(_product_of, products, op, first) for op, first in _PRODUCTS.items()},
    }


def _product(
    products: Products,
    out: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    c: Tensor | None,
    by: Tensor | None,
    d: Tensor | None,
    *alpha: float,
) -> list[int]:
    """What `quant.products` takes beside its kept tiles where the CPU multiplies no 16-bit floats; in fp32 BLAS has a
    copy made of a factor without neighbouring elements, as those of one expert among all are. Several products are made
    one after the other."""
    if a.ndim == 3:
        out, a, b = out[0], a[0], b[0]
        bias, c, by, d = (None if it is None else it[0] for it in (bias, c, by, d))
    if _goes_to_onednn(a):
        products.meet(a, b)
        if by is not None:
            products.meet(a, by)
        if c is not None and d is not None:
            products.meet(c, d, adds=True)
        op = torch.ops.lowmem_ft.product.default
        taken = products.scratch(op, (out, a, b, bias, c, by, d, *alpha), a, b)
        if a.shape[0] % ROWS and a.shape[0] > ROWS and not sums_rows(a):  # a run may have fewer, of an expert say
            few = None if c is None else c[:ROWS]
            more = products.scratch(op, (out[:ROWS], a[:ROWS], b, bias, few, by, d, *alpha), a[:ROWS], b)
            apart = out.untyped_storage().nbytes() == out.nbytes  # then it has fewer rows itself
            taken.append(max(more) - (out[ROWS:].nbytes if apart else 0))
        return [max(taken)]
    if c is None:
        return []
    if multiplies(a.dtype):
        return copied_factors(by, d)
    factors = [4 * factor.numel() for factor in (by, d) if factor is not None]
    return [*factors, 4 * min(TILE, c.shape[0]) * c.shape[1]]


def _goes_to_onednn(a: Tensor) -> bool:
    return a.dtype in (torch.bfloat16, torch.float16) and multiplies(a.dtype)


def _product_of(products: Products, op: Any, first: int, *args: Any, **_: Any) -> list[int]:
    """Of an operator whose factors are its arguments from `first` on."""
    a, b = args[first : first + 2]
    if not _goes_to_onednn(a):
        return []
    products.meet(a, b, adds=first > 0, as_is=True)
    return products.scratch(op, args, a, b)


def _mean(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> list[int]:
    """On the CPU that of 16-bit floats is a sum in fp32, of a copy (aten/native/ReduceOps.cpp, `mean_kernel`)."""
    if dtype not in (None, x.dtype) or x.dtype not in (torch.bfloat16, torch.float16):
        return _sum(x, dims, keepdim, dtype=dtype)
    return [4 * _kept(x, dims), 4 * x.numel()]


def _vector_norm(x: Tensor, *args: Any, dtype: torch.dtype | None = None, **_: Any) -> list[int]:
    """On the CPU a norm in another dtype is taken of a copy."""
    return [] if dtype in (None, x.dtype) else [x.numel() * dtype.itemsize]


def _sum(
    x: Tensor, dims: Sequence[int] | None = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> list[int]:
    """On the CPU a sum in another dtype is taken of a copy. One of 16-bit floats, too, if it goes over more than the
    two innermost dimensions: aten/native/ReduceOps.cpp (`should_use_acc_buffer`) then adds up a copy in fp32.
    """
    if dtype not in (None, x.dtype):
        return [x.numel() * dtype.itemsize]
    if x.dtype not in (torch.bfloat16, torch.float16) or not _reduces_outer_dimension(x, dims):
        return []
    return [4 * _kept(x, dims), 4 * x.numel()]


def _kept(x: Tensor, dims: Sequence[int] | None) -> int:
    """Values that are left when `dims` are reduced."""
    reduced = {dim % x.ndim for dim in dims} if dims else set(range(x.ndim))
    return math.prod(size for dim, size in enumerate(x.shape) if dim not in reduced)


def _reduces_outer_dimension(x: Tensor, dims: Sequence[int] | None) -> bool:
    """Whether it is summed over a dimension beyond the two innermost, neighbours merged as PyTorch does."""
    reduced = {dim % x.ndim for dim in dims} if dims else set(range(x.ndim))
    order = sorted((x.stride(dim), dim) for dim in range(x.ndim) if x.shape[dim] > 1)
    merged: list[tuple[int, bool]] = []  # stride of the next dimension that would continue this one, reduced
    for stride, dim in order:
        if merged and merged[-1] == (stride, dim in reduced):
            merged.pop()
        merged.append((stride * x.shape[dim], dim in reduced))
    return any(summed for _, summed in merged[2:])


def _promoted(a: Any, b: Any, *_: Any, **__: Any) -> list[int]:
    """On the CPU operands in another dtype than the one that is computed in are copied to that first."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.dtype == b.dtype or not b.is_floating_point():
        return []
    common = torch.result_type(a, b)
    return [t.numel() * common.itemsize for t in (a, b) if t.dtype != common and t.ndim > 0]


def _promoted_in_place(a: Tensor, b: Any, *_: Any, **__: Any) -> list[int]:
    """The same, and the result too is made in that dtype before it is copied back."""
    copies = _promoted(a, b)
    return [*copies, *([a.numel() * torch.result_type(a, b).itemsize] if a.dtype != torch.result_type(a, b) else [])]


def _dequantize_int8(qweight: Tensor, scale: Tensor, dtype: torch.dtype) -> list[int]:
    """The CPU's product copies both operands to fp32, chunk by chunk; it needs no copy of the result in fp32."""
    rows = min(qweight.shape[0], max(1, CHUNK // qweight.shape[1]))
    chunk = 4 * rows * qweight.shape[1]
    return [scale.nbytes, chunk, *([] if dtype == torch.float32 else [chunk])]


def _dequantize_4bit(qweight: Tensor, absmax: Tensor, kind: str, shape: Sequence[int], dtype: torch.dtype) -> list[int]:
    """Where the last block is short, the packed values are copied to fill it up."""
    return [] if math.prod(shape) == absmax.numel() * BLOCK else [absmax.numel() * BLOCK // 2]


def _scatter(x: Tensor, *_: Any, **__: Any) -> list[int]:
    """On the CPU 16-bit floats are scattered into a copy in fp32 (aten/native/cpu/ScatterGatherKernel.cpp)."""
    return [4 * x.numel()] if x.dtype in (torch.bfloat16, torch.float16) else []


def _sort(x: Tensor, *_: Any, **__: Any) -> list[int]:
    """Values and positions are sorted in place; one more copy of the values was measured."""
    return [x.nbytes]


def _safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None) -> list[int]:
    """It looks for rows without any position to attend to."""
    return [x.numel(), x.numel() // x.shape[dim], 4]


def _update_32bit(name: str, gradient: Tensor, *_: Any) -> list[int]:
    """bitsandbytes' update on the CPU: a scaled gradient, a denominator and what goes into it. (A parameter in another
    dtype than fp32 would be copied too; ours never is.)
    """
    return [4 * gradient.numel()] * 3 + [16]


def _update_8bit(value: Tensor, *_: Any) -> list[int]:
    """Both moments in fp32, what divides; once that is gone scales, upper bits, codes, and the middles between them."""
    numbers, count = 4 * value.numel(), value.numel()
    scales = 4 * max(1, count // moments.BLOCK)
    return [*[numbers] * 3, -numbers, scales, -scales, numbers, count, -numbers, *[numbers] * 2]


_SCATTERS = (
    "scatter.src",
    "scatter.value",
    "scatter_.src",
    "scatter_.value",
    "scatter_add.default",
    "scatter_add_.default",
)
_PRODUCTS: Mapping[Any, int] = {
    torch.ops.aten.mm.default: 0,
    torch.ops.aten.bmm.default: 0,
    torch.ops.aten.addmm.default: 1,
    torch.ops.aten.baddbmm.default: 1,
}
_POINTWISE = ("add", "sub", "mul", "div")
_ANYWHERE: Mapping[Any, Scratch] = {torch.ops.aten._safe_softmax.default: _safe_softmax}
_CPU: Mapping[Any, Scratch] = {
    **_ANYWHERE,
    **norms_in_tiles("cpu"),
    **dict.fromkeys(overloads(*(f"{name}.Tensor" for name in _POINTWISE)), _promoted),
    **dict.fromkeys(overloads(*(f"{name}_.Tensor" for name in _POINTWISE)), _promoted_in_place),
    torch.ops.lowmem_ft.dequantize_int8.default: _dequantize_int8,
    torch.ops.lowmem_ft.dequantize_4bit.default: _dequantize_4bit,
    **dict.fromkeys(overloads(*_SCATTERS), _scatter),
    torch.ops.bitsandbytes.optimizer_update_32bit.default: _update_32bit,
    torch.ops.lowmem_ft.adam_8bit.default: _update_8bit,
    torch.ops.aten.sort.stable: _sort,
    torch.ops.aten.sum.dim_IntList: _sum,
    torch.ops.aten.sum.default: _sum,
    torch.ops.aten.mean.dim: _mean,
    torch.ops.aten.mean.default: _mean,
    torch.ops.aten.linalg_vector_norm.default: _vector_norm,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default: _flash_forward,
}


def _rows_more(q: Tensor, *_: Any) -> float:
    """Of queries, or of what goes back to their outputs."""
    return q.shape[0] / attention_cpu.traced_rows(q)


def _capped(*, on_card: bool) -> Mapping[Any, Whole]:
    """Of our attention whose scores are capped."""
    forward, backward = attention_capped.capped_attention, attention_capped.capped_attention_backward
    return {
        torch.ops.lowmem_ft.capped_attention.default: (partial(forward, on_card=on_card), _rows_more),
        torch.ops.lowmem_ft.capped_attention_backward.default: (partial(backward, on_card=on_card), _rows_more),
    }


_WHOLE_CPU: Mapping[Any, Whole] = {
    torch.ops.lowmem_ft.attention.default: (attention_cpu.attention_cpu, _rows_more),
    torch.ops.lowmem_ft.attention_backward.default: (attention_cpu.attention_backward_cpu, _rows_more),
}
