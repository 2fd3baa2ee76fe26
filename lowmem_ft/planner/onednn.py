"""What oneDNN takes inside a product of 16-bit floats, where the CPU multiplies them.

It copies and pads operands into rooms whose size follows from the processor, the threads, shapes and strides by rules
of its own. Nothing tells it beforehand, so the product is made once and PyTorch's allocator events are read: with the
profiler that `torch.autograd.profiler_legacy` has, since each use of the newer one leaves 0.3 MB in the process.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _ExperimentalConfig

from lowmem_ft.quant.products import few_numbers_of_rows

_autograd: Any = torch.autograd  # whose stubs lack what `profiler_legacy` imports from it

# Multiplications of a product that takes too long to try. Of 13 shapes with more, among them 2048 x 32000 x 2048, each
# took at most 1.72 MB a thread (torch 2.13, AVX512 with bf16, one thread and two)
LARGE = 1 << 32
# Bytes of the operands of one that is not tried either, since a run plans inside its own budget: thin factors (rank 16)
# of a million rows made a process of 1.9 GB
HELD = 1 << 27
MOST = 7 << 18  # bytes a thread
# It works on so many rows at a time, or on some number below that divides them. With that it takes the most: for
# matrices of 96 x 48 to 2048 x 768 never more at 1 to 1024 rows, and less at 320, 384 and 640 (36 numbers tried)
ROWS = 256
# Of products with one matrix and a few numbers of rows. Planning grew a process by 65 MB with 35 matrices (in 72
# products), 40 MB with 20 (45 products) and 32 MB with 27 (36 products)
KERNEL = 7 << 18
# Of each other number of rows that products with it come to: 0.54 to 0.60 MB were measured for matrices of 16 x 512 to
# 1408 x 512 with two threads (torch 2.13, AVX512 with bf16, 2026-11-27)
KERNEL_OF_ROWS = 5 << 17


class Products:
    """The products of one plan that go to oneDNN, which compiles kernels for each of them."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._tokens = 0
        self._fewer: dict[Hashable, int] = {}  # rows of products with a matrix in the last step that are not its tokens

    def begin(self, tokens: int) -> None:
        """A step with so many tokens follows."""
        self._tokens = tokens
        self._fewer.clear()

    def kernel_bytes(self, *, most: int | None, routed: bool) -> int:
        """What these kernels take of the process, about.

        Args:
            most: tokens of any micro-batch, where they differ; None where they do not.
            routed: there are experts, to which any number of rows comes, up to that of the last step.
        """
        further = [most or 0] * len(self._seen) + [*self._fewer.values()] * routed
        return KERNEL * len(self._seen) + sum(KERNEL_OF_ROWS * len(few_numbers_of_rows(it)[1:]) for it in further)

    def scratch(self, op: Callable[..., Any], args: Sequence[Any], a: Tensor, b: Tensor) -> list[int]:
        """The most bytes that `op` takes beside what it returns.

        Args:
            args: of `op`, whose first tensor it may write into; shapes, strides and dtypes are looked at alone.
            a, b: (..., N, K) and (..., K, M), the largest that are multiplied.
        """
        threads = torch.get_num_threads()
        likes = tuple(_Like.of(it) if isinstance(it, Tensor) else it for it in args)
        plain = a.stride(-1) == 1
        key, rows = ((op, _Like.of(b)), a.shape[-2]) if plain else ((op, a.shape[:-1], b.shape[-1]), a.shape[-1])
        self._seen.add(key)
        if rows != self._tokens:
            self._fewer[key] = max(rows, self._fewer.get(key, 0))
        held = sum(it.nbytes for it in args if isinstance(it, Tensor))
        # of profilers there is one at a time
        if a.numel() * b.shape[-1] > LARGE or held > HELD or _autograd._profiler_enabled():
            return [MOST * threads]
        return [_taken(op, likes, threads)]


class _Like(tuple[tuple[int, ...], tuple[int, ...], torch.dtype]):
    """Shape, strides and dtype of a tensor."""

    __slots__ = ()

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls((tuple(tensor.shape), tensor.stride(), tensor.dtype))

    def made(self) -> Tensor:
        shape, strides, dtype = self
        return torch.empty_strided(shape, strides, dtype=dtype, device="cpu").zero_()


@cache
def _taken(op: Callable[..., Any], args: tuple[Any, ...], threads: int) -> int:
    made = [it.made() if isinstance(it, _Like) else it for it in args]
    op(*made)  # what is made once for a process must not count
    state = _autograd.ProfilerState.CPU
    _autograd._enable_profiler_legacy(
        _autograd.ProfilerConfig(state, False, True, False, False, False, _ExperimentalConfig())
    )
    try:
        kept = op(*made)
    finally:
        recorded = _autograd._disable_profiler_legacy()
    events = [event for thread in recorded for event in thread if event.kind() == "memory_alloc"]
    levels: list[int] = [0, *accumulate(event.cpu_memory_usage() for event in events)]
    del kept
    return max(levels) - levels[-1]
